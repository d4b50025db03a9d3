"""The rows of coverage.py as a page of markdown: a summary, a table for each kind, and what holds the locked groups."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]

STATUSES = ("exact", "WRONG", "REFUSED", "CRASH", "TIMEOUT", "PROVES NOTHING")
INTRODUCTION = """\
# Coverage

Every model here has random weights, norms and statistics. Half of the channels of every layer that is not locked are
removed at random (`PruneChannels(0.5)`), and the outputs are compared, in float32, with those of the original whose
removed units are silenced (`netsurgery.verify`); *permuted* is the second oracle: the units of all groups in another
order. Both are largest differences relative to the largest output. Each model is measured in a process of its own.

The *share* says how much of what a removal could take at best it can take: the entries of parameters that go when every
group that is not locked loses the same small share of its units, relative to those that go when every dimension does
but inputs, outputs and positions (a matrix counts half if one axis is locked).

- **exact**: both differences are at most 1e-4. **WRONG**: one is not. Where a network decides by comparing numbers
  (which of two boxes comes first), rounding alone can be above that; float64 then tells: *f64* marks such rows, at most
  1e-9.
- **REFUSED**: netsurgery raised its own error, before anything was changed. **CRASH**: any other error.
  **TIMEOUT**: no result in time.
- **PROVES NOTHING**: exact, but the output is not finite or the same everywhere, or what was removed did not matter.

Made by `OMP_NUM_THREADS=1 python benchmarks/coverage.py --out rows.jsonl --page docs/coverage.md`; seconds on a machine
that did other things as well say little.
"""
HEADER = (
    "model", "status", "parameters", "groups", "locked", "share", "removed", "difference", "permuted", "trace, s",
    "plan and rewrite, s", "replaced modules",
)  # fmt: skip
MOST = 6  # reasons listed for each model


def page(rows: Sequence[Row], kinds: Iterable[str]) -> str:
    """The whole page; rows are shown in the order of their kinds."""
    parts = [INTRODUCTION, *machines(rows), summary(rows, kinds)]
    for kind in kinds:
        of_kind = [row for row in rows if row["kind"] == kind]
        if of_kind:
            parts += [f"## {kind}\n", table(HEADER, map(cells, of_kind)), failures(of_kind), reasons(of_kind)]
    return "\n".join(part for part in parts if part).rstrip() + "\n"


def machines(rows: Sequence[Row]) -> list[str]:
    """What the rows were measured on."""
    return [f"{text}\n" for text in dict.fromkeys(row["machine"] for row in rows if "machine" in row)]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table; all columns but the first two stand to the right."""
    lines = [header, ["---"] * 2 + ["---:"] * (len(header) - 2), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def summary(rows: Sequence[Row], kinds: Iterable[str]) -> str:
    """How many models of each kind are exact, and how much of them can be pruned."""
    header = ("kind", "models", *STATUSES, "share of 90 % or more", "median share")

    def counts(name: str, some: Sequence[Row]) -> list[str]:
        shares = [row.get("share", 0.0) if row["status"] == "exact" else 0.0 for row in some]
        found = [str(sum(row["status"] == status for row in some)) for status in STATUSES]
        high = (
            f"{sum(share >= 0.9 for share in shares)} ({percent(sum(share >= 0.9 for share in shares) / len(some), 0)})"
        )
        return [name, str(len(some)), *found, high, percent(statistics.median(shares))]

    listed = [(kind, [row for row in rows if row["kind"] == kind]) for kind in kinds]
    lines = [counts(kind, some) for kind, some in listed if some]
    return table(header, [*lines, counts("**all**", rows)]) + "\nA model that is not exact counts as a share of 0.\n"


def percent(value: float, digits: int = 1) -> str:
    """A share in per cent."""
    return f"{100 * value:.{digits}f} %"


def cells(row: Row) -> list[str]:
    """The cells of a model's row; what was not reached is left empty."""

    def cell(key: str, text: str) -> str:
        return text.format(row[key]) if row.get(key) is not None else ""

    shares = [percent(row[key]) if key in row else "" for key in ("share", "removed")]
    replaced = row.get("replaced", [])
    return [
        row["model"],
        row["status"] + (" (f64)" if "in_float32" in row else ""),
        cell("parameters", "{:,}"),
        cell("groups", "{}"),
        cell("locked", "{}"),
        *shares,
        cell("difference", "{:.1e}"),
        cell("permuted", "{:.1e}"),
        cell("trace_s", "{:.2f}"),
        cell("rewrite_s", "{:.2f}"),
        f"{len(replaced)}: {some(replaced, 3)}" if replaced else "",
    ]


def some(names: Sequence[str], most: int) -> str:
    """The first of some names, and how many more there are."""
    more = f", +{len(names) - most}" if len(names) > most else ""
    return ", ".join(f"`{name}`" for name in names[:most]) + more


def failures(rows: Sequence[Row]) -> str:
    """What the models that are not exact say."""
    failed = [row for row in rows if row["status"] != "exact"]
    lines = [f"- {row['model']}: {row['status']}: {one_line(row.get('message', ''))}\n" for row in failed]
    return "Not exact:\n\n" + "".join(lines) if lines else ""


def one_line(text: str, most: int = 300) -> str:
    """A message on one line, shortened, that markdown leaves as it is."""
    text = " ".join(text.replace("`", "'").split())
    return f"`{text if len(text) <= most else text[:most] + '…'}`"


def reasons(rows: Sequence[Row]) -> str:
    """What holds the locked groups inside a network, once for all models that say the same."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if text := reasons_of(row):
            found.setdefault(text, []).append(row["model"])
    lines = [f"- {', '.join(models)}:\n{text}" for text, models in found.items()]
    none = [row["model"] for row in rows if "reasons" in row and not reasons_of(row)]
    head = f"Only inputs, outputs and positions are locked in {len(none)} of these models.\n" if none else ""
    return head + ("\nFrozen inside the network:\n\n" + "".join(lines) if lines else "")


def reasons_of(row: Row) -> str:
    """What holds locked groups of a model, but its inputs, outputs and positions; what holds most entries first."""
    inner = [one for one in row.get("reasons", []) if one["entries"]]
    lines = [f"  - {groups(one['groups'])}: {one_line(one['reason'], 200)}\n" for one in inner[:MOST]]
    more = sum(one["groups"] for one in inner[MOST:])
    return "".join(lines) + (f"  - {groups(more)}: {len(inner) - MOST} more reasons\n" if more else "")


def groups(count: int) -> str:
    """A number of groups in words."""
    return "1 group" if count == 1 else f"{count} groups"
