"""Readable tables, as plain text and for notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["SHOWN", "Rows", "columns", "first_of", "html", "share"]

Rows = Sequence[Sequence[str]]
SHOWN = 200  # rows of a table in a notebook


def first_of(texts: Iterable[str], most: int = 3) -> str:
    """The first of some texts in a line, and how many more there are."""
    found = list(texts)
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")


def columns(rows: Rows, right: Sequence[int] = ()) -> str:
    """Rows as lines of text, with the columns `right` aligned to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def html(caption: str, rows: Rows, right: Sequence[int] = ()) -> str:
    """Rows as an HTML table under a caption, the first as its head; the last line says how many are not shown."""

    def line(row: Sequence[str], tag: str) -> str:
        sides = ["right" if i in right else "left" for i in range(len(row))]
        cells = zip(row, sides, strict=True)
        return "<tr>" + "".join(f'<{tag} style="text-align: {s}">{escape(cell)}</{tag}>' for cell, s in cells) + "</tr>"

    head, body = rows[0], rows[1:]
    more = f'<tr><td colspan="{len(head)}">and {len(body) - SHOWN} more</td></tr>' if body[SHOWN:] else ""
    lines = [line(head, "th"), *(line(row, "td") for row in body[:SHOWN])]
    return f"<table><caption>{escape(caption)}</caption>{''.join(lines)}{more}</table>"


def share(part: int, whole: int) -> str:
    """A part in percent."""
    return f"{100 * part / whole:.1f}%" if whole else "-"
