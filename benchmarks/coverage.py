"""How much of the world's networks is covered? `python benchmarks/coverage.py --out rows.jsonl --page docs/coverage.md`

For every model of coverage_models.py, in a process of its own: half of the channels of every layer that is not locked
are removed at random, and the result is compared with the original whose removed units are silenced. Weights, norms and
statistics are random (alive.py). A model that fails has its row as well. With ``--grow`` units are added instead
(half as many, as many, three new channels), and the outputs are compared with the original's.
"""

import argparse
import fnmatch
import json
from collections.abc import Iterator
from pathlib import Path

import coverage_models
import coverage_page
from coverage_rows import Options, Row, measured


def chosen(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """The models that the options name."""
    part, parts = map(int, options.slice.split("/"))
    patterns = options.models.split(",")
    kinds = list(coverage_models.KINDS) if options.kind == "all" else options.kind.split(",")
    listed = [
        (kind, name)
        for kind in kinds
        for name in coverage_models.names(kind)
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    ]
    yield from listed[part - 1 :: parts]


def read(path: Path) -> list[Row]:
    """The rows of a file: of each model the last one."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.strip()]
    return list({(row["kind"], row["model"]): row for row in rows}.values())


def line(row: Row) -> str:
    """A row on one line, for whoever waits."""
    share = f"{100 * row['share']:.1f}%" if "share" in row else ""
    difference = f"{row['difference']:.1e}" if "difference" in row else ""
    figures = f"{row['status']:14} {share:>7} {difference:>8} {row.get('seconds', 0):6.1f} s"
    return f"{figures}  {row['kind']}: {row['model']} {row.get('message', '')[:200]}"


def main() -> None:
    """Measure, append each row to the file as soon as it is there, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", default="all", help=f"kinds among {', '.join(coverage_models.KINDS)}")
    parser.add_argument("--models", default="*", help="patterns of names, such as resnet*,vit_b_16")
    parser.add_argument("--slice", default="1/1", help="i/n: every n-th model, from the i-th")
    parser.add_argument("--out", type=Path, default=Path("coverage.jsonl"), help="file that rows are appended to")
    parser.add_argument("--page", type=Path, help="file to write the page to, from all rows of --out")
    parser.add_argument("--resume", action="store_true", help="leave out the models that --out has")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for each model")
    parser.add_argument("--double", action="store_true", help="in float64, where 1e-9 is the bound")
    parser.add_argument("--grow", action="store_true", help="add units instead")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    options = Options(given.seed, given.timeout, given.double, given.grow)
    done = {(row["kind"], row["model"]) for row in read(given.out)} if given.resume else set()
    for kind, name in list(chosen(given)):
        if (kind, name) not in done:
            row = measured(kind, name, options)
            with given.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(line(row), flush=True)
    if given.page is not None:
        given.page.write_text(coverage_page.page(ordered(read(given.out)), coverage_models.KINDS))


def ordered(rows: list[Row]) -> list[Row]:
    """Rows in the order of the list of models; those of models that it no longer has are left out."""
    found = {(row["kind"], row["model"]): row for row in rows}
    everything = [(kind, name) for kind in coverage_models.KINDS for name in coverage_models.names(kind)]
    return [found[key] for key in everything if key in found]


if __name__ == "__main__":
    main()
