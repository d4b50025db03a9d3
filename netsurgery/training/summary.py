"""The results of a study as a table: the mean over seeds, and the spread."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean, stdev
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

__all__ = ["COLUMNS", "Result", "Results", "lines", "markdown", "table"]

Result = dict[str, Any]  # of a variant and a seed
Results = dict[str, list[Result]]  # by variant
Line = dict[str, Any]  # of the table
COLUMNS: dict[str, Callable[[Result], float | None]] = {  # percentages
    "trained": lambda r: r["trained"],
    "removed": lambda r: r["removed"],
    "fine-tuned": lambda r: r["finetuned"],
    "params": lambda r: 100 * r["parameters"][1] / r["parameters"][0],
    "MACs": lambda r: 100 * r["macs"][1] / r["macs"][0],
}
CAPTION = (
    "Test accuracy of the trained network, after the removal (or the growth), and after fine-tuning; parameters and "
    "MACs that stay (above 100: grown); all in percent, mean ± standard deviation over seeds"
)


def lines(results: Results) -> list[Line]:
    """For each variant and column: mean, standard deviation, lowest and highest over the seeds, or None."""
    return [
        {"variant": name, "seeds": len(runs), **{key: spread(list(map(get, runs))) for key, get in COLUMNS.items()}}
        for name, runs in results.items()
    ]


def spread(values: list[float | None]) -> dict[str, float] | None:
    """Mean, sample standard deviation (0 of a single value), lowest and highest; None where a stage was left out."""
    there = [value for value in values if value is not None]
    if not there:
        return None
    deviation = stdev(there) if len(there) > 1 else 0.0
    return {"mean": mean(there), "std": deviation, "min": min(there), "max": max(there)}


def cells(line: Line) -> list[str]:
    """A line as texts."""
    found = [line[key] for key in COLUMNS]
    spreads = line["seeds"] > 1
    return [
        line["variant"],
        *("-" if f is None else f"{f['mean']:.2f}" + f" ± {f['std']:.2f}" * spreads for f in found),
    ]


def table(name: str, found: list[Line], width: int) -> Table:
    """A table for a terminal of some width. In a narrow one, spreads stand below their means and names are broken."""
    view = Table(title=f"{name}, {found[0]['seeds']} seed(s)", box=SIMPLE_HEAD, caption=CAPTION)
    view.collapse_padding, view.pad_edge, view.show_edge, view.padding = True, False, False, (0, 1, 0, 0)
    longest = max(len(line["variant"]) for line in found)
    rows, taken = numbers(found, " ±")
    if longest + taken > width:
        rows, taken = numbers(found, "\n±")
    if width < taken + len("variant"):
        view.width = taken + len("variant")  # the terminal wraps the lines; nothing is cut off
    view.add_column("variant", overflow="fold", width=min(longest, max(width - taken, len("variant"))))
    for key in COLUMNS:
        view.add_column(key.replace("-", "-\n"), justify="right", no_wrap=True)
    for line, row in zip(found, rows, strict=True):
        view.add_row(line["variant"], *row)
    return view


def numbers(found: list[Line], before_spread: str) -> tuple[list[list[str]], int]:
    """The cells of all columns but the first, and the width that these take with the space before each."""
    rows = [[cell.replace(" ± ", before_spread) for cell in cells(line)[1:]] for line in found]
    columns = zip((key.replace("-", "-\n") for key in COLUMNS), *rows, strict=True)
    return rows, sum(2 + max(len(part) for cell in column for part in cell.split("\n")) for column in columns)


def markdown(found: list[Line]) -> str:
    """The table in Markdown."""
    rows = [["variant", *COLUMNS], ["---", *["---:"] * len(COLUMNS)], *map(cells, found)]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows) + f"\n{CAPTION}.\n"
