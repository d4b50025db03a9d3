"""Which penalties empty whole channels by themselves? Digits, every criterion: `python benchmarks/sparsity.py --out DIR`.

A small convolutional network is trained by SGD on cross-entropy + strength * penalty; nothing sets a weight to zero.
Then each channel that a convolution reads has a norm: the L2 norm of all the weights that read it. A channel is empty
when that is under 1e-3. Strengths are searched for each penalty, the same number for all: first a few fixed ones, then
by bisection towards the strongest at which the mean test accuracy is still within half a point of no penalty. There
the penalties are compared, and there the empty channels are removed by netsurgery to see what they were worth.

A strength is given as a push: the penalty of the untrained network, divided by the cross-entropy of guessing.
"""

import argparse
import functools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from models import machine, parameters
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import netsurgery
from netsurgery.demo import accuracy, digits, progress_bar
from netsurgery.kernels.criteria import CRITERIA, reading
from netsurgery.kernels.hgsr_reference import reference
from netsurgery.passes import HGSRScore

EMPTY = 1e-3  # a norm or a weight under this counts as zero
SMALL = 1e-2  # a norm under this share of the layer's largest counts as small
ALLOWED = 0.5  # points of mean accuracy that a penalty may cost
BATCH, LR, MOMENTUM, DECAY = 64, 0.1, 0.9, 5e-4
PUSHES = (0.1, 1.0, 10.0)
NONE = "no penalty"
MIXED = "hierarchical_sq_group_l12 + l1"  # half of each: what the source trains with
PENALTIES: dict[str, tuple[str, float]] = {**{name: (name, 0.0) for name in CRITERIA}, MIXED: (MIXED.split()[0], 0.5)}


class PlainNet(nn.Sequential):
    """Four 3x3 convolutions with batch norm on `(batch, 1, 8, 8)`: each channel is read by one layer."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 32, 32)) -> None:
        layers: list[nn.Module] = []
        for index, (cin, cout) in enumerate(zip((1, *widths), widths, strict=False)):
            layers += [nn.Conv2d(cin, cout, 3, padding=1, bias=False), nn.BatchNorm2d(cout), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if index % 2 == 0 else []
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


@dataclass(frozen=True)
class Job:
    """One network to train."""

    penalty: str
    push: float
    seed: int
    epochs: int


@dataclass(frozen=True)
class Run:
    """What became of it: shares and accuracies in percent; `removed` is after the removal of the empty channels."""

    penalty: str
    push: float
    strength: float
    seed: int
    accuracy: float
    empty: float
    small: float
    weights: float
    parameters: int
    removed_parameters: int
    removed_accuracy: float


@dataclass(frozen=True)
class RemoveEmpty(netsurgery.Pass):
    """Remove every channel whose score is under a threshold; the highest of a layer always stays."""

    threshold: float

    needs: ClassVar[frozenset[str]] = frozenset({"scores"})
    gives: ClassVar[frozenset[str]] = frozenset({"edit"})

    def run(self, network: netsurgery.Network) -> netsurgery.Edit:
        """Choose the units that stay."""
        keep = {}
        for name, norms in norms_of(network).items():
            stays = ~(norms < self.threshold).index_fill(0, norms.argmax(), False)  # NaN stays
            keep[name] = tuple(stays.nonzero().flatten().tolist())
        return netsurgery.Edit(network, keep)


def norms_of(network: netsurgery.Network) -> dict[str, Tensor]:
    """For each group that a convolution reads, the scores of its units `(size,)`."""
    read = {
        group.name
        for group in network.prunable
        if any(m.role == "consumes" and network.tensors[m.parameter].dim() == 4 for m in group.members)
    }
    return {name: score for name, score in network.scores.items() if name in read}


def penalty_of(model: nn.Module, name: str, strength: float) -> Callable[[], Tensor]:
    """The penalty on all convolutions, feature-wise: an outer group is what reads one channel."""
    criterion, l1_ratio = PENALTIES[name]
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    readings = [reading(tuple(w.shape), "feature") for w in weights]

    def value() -> Tensor:
        found = (1 - l1_ratio) * reference(weights, criterion, readings)
        return strength * (found + l1_ratio * reference(weights, "l1", readings) if l1_ratio else found)

    return value


def untrained(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.manual_seed(seed)
        return PlainNet().to(memory_format=torch.channels_last)  # faster on a CPU


@functools.cache
def strength_of(penalty: str, push: float) -> float:
    """The strength of a push: the same for all seeds."""
    return push * math.log(10) / penalty_of(untrained(0), penalty, 1.0)().item()


def train(job: Job) -> nn.Module:
    """Minimise cross-entropy + strength * penalty by SGD with momentum, the rate falling to 0 along half a cosine."""
    model = untrained(job.seed)
    penalty = penalty_of(model, job.penalty, strength_of(job.penalty, job.push)) if job.push else None
    x, y = digits(job.seed).train
    order = torch.Generator().manual_seed(job.seed)
    batches = -(-len(x) // BATCH)
    optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, job.epochs * batches)
    for _ in range(job.epochs):
        for picked in torch.randperm(len(x), generator=order).chunk(batches):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[picked]), y[picked])
            (loss + penalty() if penalty else loss).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def measure(job: Job) -> Run:
    """Train, look at the weights, remove the empty channels."""
    model = train(job)
    test = digits(job.seed).test
    norm = HGSRScore("group_lasso")  # of a channel: the L2 norm of the weights of each layer that reads it, summed
    edit = netsurgery.plan(model, [norm, RemoveEmpty(EMPTY)], (test[0][:1],))
    small = netsurgery.rewrite(model, edit)
    norms = norms_of(norm.run(edit.network)).values()
    weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.dim() == 4])
    return Run(
        penalty=job.penalty,
        push=job.push,
        strength=strength_of(job.penalty, job.push) if job.push else 0.0,
        seed=job.seed,
        accuracy=accuracy(model, test),
        empty=share(torch.cat([n < EMPTY for n in norms])),
        small=share(torch.cat([n < SMALL * n.max() for n in norms])),
        weights=share(weights.abs() < EMPTY),
        parameters=parameters(model),
        removed_parameters=parameters(small),
        removed_accuracy=accuracy(small, test),
    )


def share(chosen: Tensor) -> float:
    """Percentage of a mask that is true."""
    return 100 * float(chosen.double().mean())


def average(runs: Iterable[Run], what: str) -> float:
    return mean(getattr(run, what) for run in runs)


Tried = dict[float, list[Run]]  # by push, the runs of all seeds


def allowed(tried: Tried, least: float) -> list[float]:
    """The pushes whose mean accuracy is at least so much."""
    return [push for push, runs in tried.items() if average(runs, "accuracy") >= least]


def next_push(tried: Tried, least: float) -> float:
    """Between the strongest push that is allowed and the next that was tried; ten times beyond where there is none."""
    good = allowed(tried, least)
    if not good:
        return min(tried) / 10
    above = [push for push in tried if push > max(good)]
    return math.sqrt(max(good) * min(above)) if above else 10 * max(good)


@contextmanager
def workers(jobs: int) -> Iterator[Callable[[Callable[[Job], Run], Iterable[Job]], Iterable[Run]]]:
    """A `map` over so many processes of one thread each; one job: in this process."""
    if jobs == 1:
        yield map
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        yield pool.map


def search(
    seeds: int, pushes: tuple[float, ...], rounds: int, epochs: int, jobs: int, console: Console
) -> dict[str, Tried]:
    """Train everything: without penalty, at the fixed pushes, then at one more push for each penalty in every round."""
    found: dict[str, Tried] = {NONE: {}, **{name: {} for name in PENALTIES}}
    with workers(jobs) as run_all, progress_bar(console) as progress:
        bar = progress.add_task("training", total=seeds * (1 + len(PENALTIES) * (len(pushes) + rounds)))

        def try_all(wanted: list[tuple[str, float]]) -> None:
            for run in run_all(measure, [Job(name, push, seed, epochs) for name, push in wanted for seed in range(seeds)]):
                found[run.penalty].setdefault(run.push, []).append(run)
                progress.advance(bar)

        try_all([(NONE, 0.0), *((name, push) for name in PENALTIES for push in pushes)])
        least = average(found[NONE][0.0], "accuracy") - ALLOWED
        for _ in range(rounds):
            try_all([(name, next_push(found[name], least)) for name in PENALTIES])
    return found


def matched(found: dict[str, Tried]) -> dict[str, list[Run]]:
    """For each penalty the runs at its strongest push that is allowed; none where no push is."""
    least = average(found[NONE][0.0], "accuracy") - ALLOWED
    strongest = {name: max(allowed(tried, least), default=None) for name, tried in found.items()}
    return {name: found[name][push] if push is not None else [] for name, push in strongest.items()}


HEADER = (
    "penalty", "strength", "accuracy %", "empty channels %", "small channels %", "weights under 1e-3 %",
    "parameters left %", "accuracy after removal %",
)  # fmt: skip


def cells(name: str, runs: list[Run]) -> list[str]:
    """A row of the table: means over the seeds, the range in brackets."""
    if not runs:
        return [name, "none allowed", *["-"] * (len(HEADER) - 2)]

    def spread(values: list[float], digits: int = 1) -> str:
        return f"{mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"

    return [
        name,
        f"{runs[0].strength:.1e}",
        spread([run.accuracy for run in runs], 2),
        spread([run.empty for run in runs]),
        spread([run.small for run in runs]),
        spread([run.weights for run in runs]),
        spread([100 * run.removed_parameters / run.parameters for run in runs]),
        spread([run.removed_accuracy for run in runs], 2),
    ]


def terminal(rows: list[list[str]]) -> Table:
    view = Table(title="Channels that penalties empty by themselves, at matched accuracy")
    for index, name in enumerate(HEADER):
        view.add_column(name, justify="right" if index else "left")
    for row in rows:
        view.add_row(*row)
    return view


def markdown(rows: list[list[str]]) -> str:
    lines = [HEADER, ("---", *["---:"] * (len(HEADER) - 1)), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def run(
    out: Path,
    console: Console,
    *,
    seeds: int = 3,
    pushes: tuple[float, ...] = PUSHES,
    rounds: int = 3,
    epochs: int = 24,
    jobs: int = 1,
) -> dict[str, Any]:
    """Train, print the table, and write `sparsity.json`, `sparsity.md` and `sparsity.png` to the folder `out`."""
    start = time.perf_counter()
    found = search(seeds, pushes, rounds, epochs, jobs, console)
    best = matched(found)
    rows = [cells(name, runs) for name, runs in best.items()]
    settings = {"seeds": seeds, "pushes": pushes, "rounds": rounds, "epochs": epochs, "batch": BATCH, "lr": LR}
    settings |= {"momentum": MOMENTUM, "weight_decay": DECAY, "empty": EMPTY, "small": SMALL, "allowed": ALLOWED}
    result: dict[str, Any] = {
        "machine": machine(),
        "settings": {**settings, "jobs": jobs},
        "seconds": time.perf_counter() - start,
        "matched": {name: runs[0].push if runs else None for name, runs in best.items()},
        "runs": [asdict(r) for tried in found.values() for push in sorted(tried) for r in tried[push]],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "sparsity.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "sparsity.md").write_text(markdown(rows))
    plot(found, best, out / "sparsity.png")
    console.print(terminal(rows))
    console.print(f"Wrote sparsity.json, sparsity.md and sparsity.png to {out}.", markup=False, soft_wrap=True)
    return result


def plot(found: dict[str, Tried], best: dict[str, list[Run]], path: Path) -> None:
    """Empty channels against accuracy, a line for each penalty; beside it the matched points as bars (PNG)."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display and leaves pyplot's state alone
    curves, bars = figure.subplots(1, 2)
    least = average(found[NONE][0.0], "accuracy") - ALLOWED
    colours = dict(zip(found, ["#555555", *map(colormaps["tab20"], range(len(found)))], strict=False))
    for name, tried in found.items():
        points = [tried[push] for push in sorted(tried)]
        x, y = [average(runs, "accuracy") for runs in points], [average(runs, "empty") for runs in points]
        curves.plot(x, y, "o-", color=colours[name], label=name, markersize=4)
    curves.axvline(least, color="#999999", linestyle="--", linewidth=1)
    names = list(best)[::-1]
    for place, name in enumerate(names):
        values = [r.empty for r in best[name]] or [0.0]
        bars.barh(place, mean(values), color=colours[name])
        bars.plot(values, [place] * len(values), "k.", markersize=4)
    bars.set_yticks(range(len(names)), names, fontsize=9)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for sparsity.json, sparsity.md, sparsity.png")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="steps of the bisection")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--jobs", type=int, default=2, help="networks trained at a time, on one core each")
    parser.add_argument("--quick", action="store_true", help="one seed, two strengths, few epochs: only to try it out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.quick:
        run(options.out, Console(), **QUICK)
    else:
        run(options.out, Console(), seeds=options.seeds, rounds=options.rounds, epochs=options.epochs, jobs=options.jobs)


if __name__ == "__main__":
    main()
