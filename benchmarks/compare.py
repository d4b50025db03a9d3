"""Seconds and megabytes of a surgery, beside the peer's and as networks grow: `python benchmarks/compare.py`.

Both tools prune half of every layer by magnitude, in place, on copies of the same network made outside the timed part.
They take turns, so that a busy machine slows both; the first round, when caches are cold, is reported apart.
A third table grows networks, beside pruning them: trace, plan and rewrite.
"""

import argparse
import copy
import gc
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from statistics import median

import torch
from models import (
    COMPARED,
    HALF,
    build,
    image,
    machine,
    parameters,
    print_table,
    prune_ours,
    prune_peer,
    reset_peak,
    resident_mb,
)
from torch import Tensor, nn

import netsurgery
from netsurgery.passes import PlantChannels, WidenChannels

SCALING = ("dense_stack_16", "dense_stack_32", "dense_stack_64", "dense_stack_128", "swin_t", "maxvit_t")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}  # on a busy machine: cpu, with one thread
AGAINST = (
    "model", "ours ms", "peer ms", "times faster (min to max)", "first round ms, ours / peer",
    "params M", "left M, ours / peer", "ours, peak MiB",
)  # fmt: skip
GROWING = (
    "model", "trace ms", "trace + plan ms (min to max)", "rewrite ms", "first trace + plan ms",
    "groups (locked)", "params M", "left M", "peak MiB",
)  # fmt: skip
GROWN = ("model", "half pruned, ms", "widened by half, ms", "8 channels planted, ms", "of pruning (min to max)")
GROWTH = ([WidenChannels(1.5)], [PlantChannels(8)])
Surgery = Callable[[nn.Module, Tensor], nn.Module]


def timed(surgery: Surgery, model: nn.Module, x: Tensor, clock: str) -> tuple[float, int]:
    """Milliseconds of one surgery on a copy of the model, and the parameters it leaves."""
    patient = copy.deepcopy(model)
    gc.collect()
    start = CLOCKS[clock]()
    small = surgery(patient, x)
    return 1e3 * (CLOCKS[clock]() - start), parameters(small)


def compare(name: str, rounds: int, clock: str) -> list[str]:
    """One row of the comparison: both tools in turns on one network."""
    model, x = build(name), image(name)
    ours, peer = [], []
    for _ in range(rounds + 1):
        taken, left = timed(prune_ours, model, x, clock)
        ours.append(taken)
        taken, left_by_peer = timed(prune_peer, model, x, clock)
        peer.append(taken)
    ratios = [p / o for p, o in zip(peer[1:], ours[1:], strict=True)]
    return [
        name,
        f"{median(ours[1:]):.0f}",
        f"{median(peer[1:]):.0f}",
        f"**{median(peer[1:]) / median(ours[1:]):.1f}** ({min(ratios):.1f} to {max(ratios):.1f})",
        f"{ours[0]:.0f} / {peer[0]:.0f}",
        f"{parameters(model) / 1e6:.2f}",
        f"{left / 1e6:.2f} / {left_by_peer / 1e6:.2f}",
        f"{memory(name):.0f}",
    ]


def grow(name: str, rounds: int, clock: str) -> list[str]:
    """One row: pruning and two ways to grow, in turns."""
    model, x = build(name), image(name)
    ways = [HALF, *GROWTH]
    taken: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds + 1):
        for passes, times in zip(ways, taken, strict=True):
            gc.collect()
            start = CLOCKS[clock]()
            netsurgery.apply(model, passes, (x,))
            times.append(1e3 * (CLOCKS[clock]() - start))
    pruned, *grown = [times[1:] for times in taken]
    ratios = [[g / p for g, p in zip(times, pruned, strict=True)] for times in grown]
    said = ", ".join(f"**{median(one):.2f}** ({min(one):.2f} to {max(one):.2f})" for one in ratios)
    return [name, *(f"{median(times):.0f}" for times in (pruned, *grown)), said]


def scale(name: str, rounds: int, clock: str) -> list[str]:
    """One row of the scaling table: ours alone, trace and plan apart from the rewriting."""
    model, x = build(name), image(name)
    traced: list[float] = []
    planned: list[float] = []
    rewritten: list[float] = []
    for _ in range(rounds + 1):
        patient = copy.deepcopy(model)
        gc.collect()
        times = [CLOCKS[clock]()]
        netsurgery.trace(patient, (x,))
        times.append(CLOCKS[clock]())
        edit = netsurgery.plan(patient, HALF, (x,))
        times.append(CLOCKS[clock]())
        small = netsurgery.rewrite(patient, edit, inplace=True)
        times.append(CLOCKS[clock]())
        for taken, start, end in zip((traced, planned, rewritten), times[:-1], times[1:], strict=True):
            taken.append(1e3 * (end - start))
    locked = sum(group.locked is not None for group in edit.network.groups)
    spread = f"{median(planned[1:]):.0f} ({min(planned[1:]):.0f} to {max(planned[1:]):.0f})"
    return [
        name,
        f"{median(traced[1:]):.0f}",
        spread,
        f"{median(rewritten[1:]):.0f}",
        f"{planned[0]:.0f}",
        f"{len(edit.network.groups)} ({locked})",
        f"{parameters(model) / 1e6:.2f}",
        f"{parameters(small) / 1e6:.2f}",
        f"{memory(name):.0f}",
    ]


def scale_or_say_why(name: str, rounds: int, clock: str) -> list[str]:
    """The row, or the refusal in its place: a network that is refused is a result too."""
    try:
        return scale(name, rounds, clock)
    except netsurgery.NetsurgeryError as error:
        return [name, f"refused: {error}", *["-"] * 7]


def memory(name: str) -> float:
    """Growth of the resident memory's peak in MiB during trace, plan and rewrite, in a process of its own."""
    answer = subprocess.run([sys.executable, __file__, "--memory", name], capture_output=True, text=True, check=True)
    return float(answer.stdout)


def measure_memory(name: str) -> float:
    """What `memory` runs. Lazy imports are done on another network before, so that only the surgery counts."""
    prune_ours(build("dense_stack_2"), image("dense_stack_2"))
    model, x = build(name), image(name)
    gc.collect()
    reset_peak()
    before = resident_mb("VmRSS")
    prune_ours(model, x, inplace=False)
    return resident_mb("VmHWM") - before


def main() -> None:
    """Print both tables in markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--models", default=",".join(COMPARED), help="compared with the peer; empty for none")
    parser.add_argument("--scaling", default=",".join(SCALING), help="ours alone; empty for none")
    parser.add_argument("--growing", default="resnet50,densenet121", help="grown beside pruned; empty for none")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        print(measure_memory(options.memory))
        return
    print(f"{machine()}; {options.rounds} rounds, {options.clock} time")
    clock, rounds = options.clock, options.rounds
    if options.models:
        print(f"\nAgainst torch-pruning {version('torch-pruning')}:\n")
        print_table(AGAINST, (compare(name, rounds, clock) for name in options.models.split(",")))
    if options.growing:
        print("\nGrown, beside pruned:\n")
        print_table(GROWN, (grow(name, rounds, clock) for name in options.growing.split(",")))
    if options.scaling:
        print("\nAs networks grow:\n")
        print_table(GROWING, (scale_or_say_why(name, rounds, clock) for name in options.scaling.split(",")))


if __name__ == "__main__":
    main()
