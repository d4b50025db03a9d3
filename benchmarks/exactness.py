"""Is removing the same as silencing? `python benchmarks/exactness.py [--models a,b] [--slice i/n]`

For every convolutional classifier of torchvision: half of every group that is not locked is removed at random, and the
result is compared with the original whose removed units are silenced. Weights, norms and their statistics are random
(tests/zoo.py).
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from models import machine, print_table

import netsurgery
from netsurgery.passes import PruneChannels, RandomScore
from netsurgery.report import prunable_share

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import zoo

HEADER = ("model", "groups", "locked", "parameters in open groups", "removed", "relative difference", "s")


def row(name: str, seed: int) -> tuple[list[str], dict[str, str]]:
    """One line of the table, and why each locked group is locked."""
    model, x = zoo.build(name, seed), zoo.images(name)
    start = time.perf_counter()
    edit = netsurgery.plan(model, [RandomScore(seed), PruneChannels(0.5)], (x,))
    small = netsurgery.rewrite(model, edit)
    taken = time.perf_counter() - start
    difference = netsurgery.verify(model, small, edit, (x,))
    network = edit.network
    locked = {group.name: group.frozen for group in network.groups if group.frozen is not None}
    share = prunable_share(network)
    removed = 1 - edit.after.params / edit.before.params
    figures = f"{100 * share:.2f} %", f"{100 * removed:.1f} %", f"{difference:.1e}", f"{taken:.2f}"
    return [name, str(len(network.groups)), str(len(locked)), *figures], locked


def row_or_refusal(name: str, seed: int) -> tuple[list[str], dict[str, str]]:
    """The row, or a refusal in its place: that is a result too, and the other networks are still of interest."""
    try:
        return row(name, seed)
    except netsurgery.NetsurgeryError as error:
        return [name, *["-"] * 4, "nan", "-"], {type(error).__name__: str(error)}


def summary(locked: dict[str, str]) -> str:
    """Each reason once: with its group, or with the number of its groups."""
    groups: dict[str, list[str]] = {}
    for group, why in locked.items():
        groups.setdefault(why, []).append(group)
    return "; ".join(f"{g[0] if len(g) == 1 else f'{len(g)} groups'}: {why}" for why, g in groups.items()) or "none"


def main() -> None:
    """Print the table and the reasons in markdown; fail where a difference is above the bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(zoo.names()))
    parser.add_argument("--slice", default="1/1", help="i/n: every n-th model, from the i-th")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bound", type=float, default=1e-5)
    options = parser.parse_args()
    part, parts = map(int, options.slice.split("/"))
    names = options.models.split(",")[part - 1 :: parts]
    reasons: dict[str, list[str]] = {}
    wrong = []

    def lines() -> Iterator[list[str]]:
        for name in names:
            line, locked = row_or_refusal(name, options.seed)
            reasons.setdefault(summary(locked), []).append(name)
            if not float(line[-2]) <= options.bound:
                wrong.append(name)
            yield line

    print(f"{machine()}\n")
    print_table(HEADER, lines())
    print("\nLocked groups, and refusals:\n")
    for why, models in reasons.items():
        print(f"- {', '.join(models)}: {why}")
    if wrong:
        raise SystemExit(f"above {options.bound}: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
