"""Which penalties empty whole channels by themselves, on the digits: `python benchmarks/sparsity.py --out DIR`.

A small convolutional network is trained by SGD on cross-entropy + strength * penalty; nothing sets a weight to zero.
Then each channel that a convolution reads has a norm: the L2 norm of all the weights that read it. A channel is empty
when that is under 1e-3; netsurgery then removes the empty ones, to see what they were worth.

Penalties are compared where each costs half a point of mean test accuracy. Equally many strengths of each are tried, a
few fixed ones and then some near that place, and all figures are interpolated between the two strengths around it.
Accuracy is noisy, one image is 0.2 points: the means are first made to fall with the strength by isotonic regression,
and everything is done again on seeds drawn with replacement, which gives the range in brackets (nine in ten draws).

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
from random import Random
from statistics import mean, quantiles
from typing import Any, ClassVar, get_args

import torch
import torch.nn.functional as F
from models import machine, parameters
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import netsurgery
from netsurgery.demo import accuracy, digits, progress_bar
from netsurgery.kernels.criteria import CRITERIA, Name
from netsurgery.models import DigitsResNet
from netsurgery.passes import HGSR, HGSRScore
from netsurgery.passes.layers import Grouping

EMPTY = 1e-3  # a norm or a weight under this counts as zero
SMALL = 1e-2  # a norm under this share of the layer's largest counts as small
ALLOWED = 0.5  # points of mean accuracy that a penalty costs where penalties are compared
DRAWS = 200  # of seeds with replacement
BATCH, LR, MOMENTUM, DECAY = 64, 0.1, 0.9, 5e-4
SHOWN = 2  # points of accuracy below no penalty in the picture
COLOURS = (  # of the penalties in their order, none first
    "#8a8a8a", "#333333", "#8c564b", "#2ca02c", "#d62728", "#e68a00", "#12a5b5", "#d457a6", "#1f77b4", "#00574b",
    "#7b4fb0", "#a98bd0",
)  # fmt: skip
images = functools.cache(digits)
IMAGE = torch.zeros(1, 1, 8, 8)
NORM = HGSRScore("group_lasso", "coupled")  # of a channel: the L2 norm of all weights that read it
NONE = "no penalty"
MIXED = "hierarchical_sq_group_l12, l1"  # half of each: what the source trains with
PENALTIES: dict[str, tuple[Name, float]] = {  # criterion and share of plain L1
    **{name: (name, 0.0) for name in CRITERIA},
    MIXED: ("hierarchical_sq_group_l12", 0.5),
}


class PlainNet(nn.Sequential):
    """Four 3x3 convolutions with batch norm on `(batch, 1, 8, 8)`: each channel is read by one layer."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 32, 32)) -> None:
        layers: list[nn.Module] = []
        for index, (cin, cout) in enumerate(zip((1, *widths), widths, strict=False)):
            layers += [nn.Conv2d(cin, cout, 3, padding=1, bias=False), nn.BatchNorm2d(cout), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if index % 2 == 0 else []
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": PlainNet,
    "residual": functools.partial(DigitsResNet, widths=(12, 24, 48)),
}


@dataclass(frozen=True)
class Job:
    """One network to train."""

    penalty: str
    push: float
    seed: int
    epochs: int
    network: str = "plain"
    grouping: Grouping = "feature"


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

    @property
    def left(self) -> float:
        """Percentage of the parameters that the removal leaves."""
        return 100 * self.removed_parameters / self.parameters


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
            stays = (norms >= self.threshold).index_fill(0, norms.argmax(), True)
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


def penalty_of(model: nn.Module, name: str, grouping: Grouping, strength: float) -> HGSR:
    """The penalty, on the layers that take part by default."""
    criterion, l1_ratio = PENALTIES[name]
    return HGSR(model, IMAGE, criterion=criterion, grouping=grouping, strength=strength, l1_ratio=l1_ratio)


def untrained(network: str, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.manual_seed(seed)
        return NETWORKS[network]().to(memory_format=torch.channels_last)  # faster on a CPU


@functools.cache
def value_of(network: str, grouping: Grouping, penalty: str) -> float:
    """The penalty of the untrained network, at a strength of 1."""
    return float(penalty_of(untrained(network, 0), penalty, grouping, 1.0)().detach())


def strength_of(job: Job) -> float:
    """The strength of a push: the same for all seeds."""
    return job.push * math.log(10) / value_of(job.network, job.grouping, job.penalty) if job.push else 0.0


def train(job: Job) -> nn.Module:
    """Minimise cross-entropy + strength * penalty by SGD with momentum, the rate falling to 0 along half a cosine."""
    model = untrained(job.network, job.seed)
    strength = strength_of(job)
    penalty = penalty_of(model, job.penalty, job.grouping, strength) if strength else None
    x, y = images(job.seed).train
    order = torch.Generator().manual_seed(job.seed)
    batches = -(-len(x) // BATCH)
    optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, job.epochs * batches)
    for _ in range(job.epochs):
        for picked in torch.randperm(len(x), generator=order).chunk(batches):
            optimizer.zero_grad()
            F.cross_entropy(model(x[picked]), y[picked]).backward()
            if penalty:
                penalty.add_gradient()
            optimizer.step()
            schedule.step()
    return model.eval()


def measure(job: Job) -> Run:
    """Train, look at the weights, remove the empty channels."""
    model = train(job)
    small, norms = model, []
    if all(bool(p.isfinite().all()) for p in model.parameters()):  # a network that diverged has no empty channels
        edit = netsurgery.plan(model, [NORM, RemoveEmpty(EMPTY)], IMAGE)
        small = netsurgery.rewrite(model, edit)
        norms = list(norms_of(edit.network).values())
    test = images(job.seed).test
    return Run(
        penalty=job.penalty,
        push=job.push,
        strength=strength_of(job),
        seed=job.seed,
        accuracy=accuracy(model, test),
        empty=share([n < EMPTY for n in norms]),
        small=share([n < SMALL * n.max() for n in norms]),
        weights=share([p.detach().flatten().abs() < EMPTY for p in model.parameters() if p.dim() == 4]),
        parameters=parameters(model),
        removed_parameters=parameters(small),
        removed_accuracy=accuracy(small, test),
    )


def share(chosen: list[Tensor]) -> float:
    """Percentage of masks that is true; 0 of none."""
    return 100 * float(torch.cat(chosen).double().mean()) if chosen else 0.0


FIGURES = ("strength", "accuracy", "empty", "small", "weights", "left", "removed_accuracy")


def average(runs: Iterable[Run], what: str) -> float:
    return float(mean(getattr(run, what) for run in runs))


Tried = dict[float, list[Run]]  # by push, 0 for no penalty, the runs of all seeds


def limit(tried: Tried) -> float:
    """The mean accuracy at which penalties are compared."""
    return average(tried[0.0], "accuracy") - ALLOWED


def falling(tried: Tried) -> list[tuple[float, float]]:
    """Pushes, ascending, and mean accuracies, made to fall: those that rise are averaged with their neighbours."""
    from sklearn.isotonic import isotonic_regression

    pushes = sorted(tried)
    means = [average(tried[push], "accuracy") for push in pushes]
    return list(zip(pushes, isotonic_regression(means, increasing=False).tolist(), strict=True))


def around(tried: Tried) -> tuple[float, float | None, float]:
    """The strongest push that is within the limit, the next, and how far from the one to the other the limit is."""
    curve = falling(tried)
    at = max(index for index, (_, mean_accuracy) in enumerate(curve) if mean_accuracy >= limit(tried) - 1e-9)
    if at + 1 == len(curve):
        return curve[at][0], None, 0.0
    (push, before), (after_push, after) = curve[at : at + 2]
    return push, after_push, (before - limit(tried)) / (before - after)


def next_push(tried: Tried) -> float:
    """Between the pushes around the limit, or three times beyond all of them."""
    low, high, _ = around(tried)
    if high is None:
        return 3 * low
    return math.sqrt(low * high) if low else high / 3


def matched(tried: Tried) -> dict[str, float]:
    """The figures at the limit; those of the strongest push where that is within it."""
    low, high, way = around(tried)
    here = {what: average(tried[low], what) for what in FIGURES}
    if high is None:
        return here
    return {what: value + way * (average(tried[high], what) - value) for what, value in here.items()}


def drawn(tried: Tried) -> tuple[float, float]:
    """The range of the share of empty channels, when the seeds are drawn with replacement: 5th and 95th percentile."""
    random, seeds = Random(0), range(len(tried[0.0]))
    shares = []
    for _ in range(DRAWS):
        chosen = random.choices(seeds, k=len(seeds))
        shares.append(matched({push: [runs[seed] for seed in chosen] for push, runs in tried.items()})["empty"])
    cuts = quantiles(shares, n=20)
    return cuts[0], cuts[-1]


@contextmanager
def workers(jobs: int) -> Iterator[Callable[[Callable[[Job], Run], Iterable[Job]], Iterable[Run]]]:
    """A `map` over so many processes of one thread each; one job: in this process."""
    if jobs == 1:
        yield map
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        yield pool.map


@dataclass(frozen=True)
class Study:
    """What is trained: `pushes` for every penalty, then one more in each of `rounds`; `jobs` networks at a time."""

    network: str = "plain"
    grouping: Grouping = "feature"
    seeds: int = 3
    pushes: tuple[float, ...] = (0.3, 1.0, 3.0)
    rounds: int = 1
    epochs: int = 24
    jobs: int = 2

    def search(self, console: Console) -> dict[str, Tried]:
        """Train everything."""
        found: dict[str, Tried] = {name: {} for name in (NONE, *PENALTIES)}
        with workers(self.jobs) as run_all, progress_bar(console) as progress:
            total = self.seeds * (1 + len(PENALTIES) * (len(self.pushes) + self.rounds))
            bar = progress.add_task("training", total=total)

            def try_all(wanted: list[tuple[str, float]]) -> None:
                for run in run_all(measure, [job for name, push in wanted for job in self.of(name, push)]):
                    for name in found if run.penalty == NONE else (run.penalty,):  # every curve begins at no penalty
                        found[name].setdefault(run.push, []).append(run)
                    progress.advance(bar)

            try_all([(NONE, 0.0), *((name, push) for name in PENALTIES for push in self.pushes)])
            for _ in range(self.rounds):
                try_all([(name, next_push(found[name])) for name in PENALTIES])
        return found

    def of(self, penalty: str, push: float) -> list[Job]:
        """The networks of one push: one for each seed."""
        return [Job(penalty, push, seed, self.epochs, self.network, self.grouping) for seed in range(self.seeds)]


QUICK = Study(seeds=1, pushes=(1.0,), rounds=0, epochs=1, jobs=1)


@dataclass(frozen=True)
class Row:
    """A penalty where it costs half a point: figures, and the range of the share of empty channels."""

    penalty: str
    strength: float
    accuracy: float
    empty: float
    small: float
    weights: float
    left: float
    removed_accuracy: float
    low: float
    high: float


def rows_of(found: dict[str, Tried]) -> list[Row]:
    return [
        Row(name, **matched(tried), **dict(zip(("low", "high"), drawn(tried), strict=True)))
        for name, tried in found.items()
    ]


HEADER = (
    "penalty", "strength", "accuracy %", "empty channels %", "small channels %", "weights under 1e-3 %",
    "parameters left %", "accuracy then %",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    return [
        row.penalty,
        f"{row.strength:.1e}" if row.strength else "-",
        f"{row.accuracy:.2f}",
        f"{row.empty:.0f} ({row.low:.0f} to {row.high:.0f})",
        f"{row.small:.0f}",
        f"{row.weights:.0f}",
        f"{row.left:.0f}",
        f"{row.removed_accuracy:.2f}",
    ]


def terminal(rows: list[Row]) -> Table:
    """The table in 80 columns."""
    view = Table(title="Channels that penalties empty by themselves, in percent", box=SIMPLE_HEAD, pad_edge=False)
    view.collapse_padding = True
    view.caption = (
        f"empty: the norm of what reads the channel is under {EMPTY:g}; small: under {SMALL:g} of the layer's largest; "
        f"zeros: weights under {EMPTY:g}; left: parameters without the empty channels, and the accuracy then"
    )
    view.add_column("penalty", no_wrap=True)
    for name in ("acc.", "empty", "small", "zeros", "left", "acc."):
        view.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        name, _, *rest = cells(row)
        view.add_row(name, *rest)
    return view


def markdown(rows: list[Row]) -> str:
    lines = [HEADER, ("---", *["---:"] * (len(HEADER) - 1)), *map(cells, rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def run(study: Study, out: Path, console: Console) -> list[Row]:
    """Train, print the table, and write `sparsity.json`, `sparsity.md` and `sparsity.png` to the folder `out`."""
    start, before = time.perf_counter(), machine()
    found = study.search(console)
    rows = rows_of(found)
    result: dict[str, Any] = {
        "machine": before,
        "seconds": time.perf_counter() - start,
        "study": {**asdict(study), "pushes": list(study.pushes)},
        "training": {"batch": BATCH, "lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY},
        "thresholds": {"empty": EMPTY, "small": SMALL, "allowed": ALLOWED},
        "rows": [asdict(row) for row in rows],
        "runs": [
            asdict(one)
            for name, tried in found.items()
            for runs in tried.values()
            for one in runs
            if one.penalty == name
        ],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "sparsity.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "sparsity.md").write_text(markdown(rows))
    plot(found, rows, out / "sparsity.png")
    console.print(terminal(rows))
    console.print(f"Wrote sparsity.json, sparsity.md and sparsity.png to {out}.", markup=False, soft_wrap=True)
    return rows


def plot(found: dict[str, Tried], rows: list[Row], path: Path) -> None:
    """Empty channels against accuracy, a line for each penalty; beside it the points at the limit as bars (PNG)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display and leaves pyplot's state alone
    curves, bars = figure.subplots(1, 2, width_ratios=(1.1, 1))
    colours = dict(zip(found, COLOURS, strict=True))
    plot_curves(curves, found, colours)
    plot_bars(bars, rows, colours)
    for axes in (curves, bars):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def plot_curves(axes: Any, found: dict[str, Tried], colours: dict[str, str]) -> None:
    whole = average(found[NONE][0.0], "accuracy")
    for name, tried in found.items():
        x = [mean_accuracy for _, mean_accuracy in falling(tried)]
        y = [average(tried[push], "empty") for push in sorted(tried)]
        axes.plot(x, y, "o-", color=colours[name], markersize=5, linewidth=1.4)
    axes.axvline(whole - ALLOWED, color="#999999", linestyle="--", linewidth=1)
    axes.set(xlim=(whole - SHOWN, whole + 0.3), ylim=(-3, 100))
    axes.set_xlabel(f"test accuracy, % (dashed: {ALLOWED} points below no penalty)")
    axes.set_ylabel(f"channels with a norm under {EMPTY:g}, %")
    axes.set_title("Stronger and stronger penalties, from right to left")


def plot_bars(axes: Any, rows: list[Row], colours: dict[str, str]) -> None:
    for place, row in enumerate(rows):
        axes.barh(place, row.empty, color=colours[row.penalty])
        axes.plot([row.low, row.high], [place, place], color="black", marker="|", markersize=9)
        axes.text(max(row.empty, row.high) + 2, place, f"{row.empty:.0f}", va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [row.penalty for row in rows], fontsize=9)
    for label in axes.get_yticklabels():
        label.set(color=colours[label.get_text()], fontweight="bold")
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel=f"channels with a norm under {EMPTY:g}, % (lines: seeds drawn again)")
    axes.set_title(f"Where each costs {ALLOWED} points of accuracy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for sparsity.json, sparsity.md, sparsity.png")
    parser.add_argument("--network", choices=tuple(NETWORKS), default=Study.network)
    parser.add_argument("--grouping", choices=get_args(Grouping), default=Study.grouping)
    parser.add_argument("--seeds", type=int, default=Study.seeds)
    parser.add_argument("--rounds", type=int, default=Study.rounds, help="steps of the search for the strongest")
    parser.add_argument("--epochs", type=int, default=Study.epochs)
    parser.add_argument("--jobs", type=int, default=Study.jobs, help="networks trained at a time, on one core each")
    parser.add_argument("--quick", action="store_true", help="one seed, one strength, one epoch: only to try it out")
    options = vars(parser.parse_args())
    torch.set_num_threads(1)
    out, quick = options.pop("out"), options.pop("quick")
    run(QUICK if quick else Study(**options), out, Console())


if __name__ == "__main__":
    main()
