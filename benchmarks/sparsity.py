"""Which penalties empty whole channels by themselves, on the digits: `python benchmarks/sparsity.py --out DIR`.

A small convolutional network is trained by SGD on cross-entropy + strength * penalty; nothing sets a weight to zero.
Then each channel that a convolution reads has a norm: the L2 norm of all the weights that read it. A channel is empty
when that is under 1e-3. Equally many strengths of each penalty are tried: a few fixed ones, then by bisection towards
the strongest at which the mean test accuracy is still within half a point of no penalty. There the penalties are
compared, and there the empty channels are removed by netsurgery to see what they were worth. The test images that
choose the strength also give the accuracy, which is therefore a little too high, for all penalties alike.

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
from statistics import mean, pstdev
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
ALLOWED = 0.5  # points of mean accuracy that a penalty may cost
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


def average(runs: Iterable[Run], what: str) -> float:
    return float(mean(getattr(run, what) for run in runs))


Tried = dict[float, list[Run]]  # by push, the runs of all seeds


def allowed(tried: Tried, least: float) -> list[float]:
    """The pushes, ascending, up to the strongest whose mean accuracy is at least so much.

    One image is 0.2 points and a lucky run is no result: the means are first made to fall with the push, by isotonic
    regression (means that rise are averaged with their neighbours).
    """
    from sklearn.isotonic import isotonic_regression

    pushes = sorted(tried)
    falling = isotonic_regression([average(tried[push], "accuracy") for push in pushes], increasing=False)
    return [push for push, mean_accuracy in zip(pushes, falling, strict=True) if mean_accuracy >= least - 1e-9]


def next_push(tried: Tried, least: float) -> float:
    """Between the strongest push that is allowed and the next that was tried, or three times beyond all of them."""
    good = allowed(tried, least)
    if not good:
        return min(tried) / 3
    above = [push for push in tried if push > good[-1]]
    return math.sqrt(good[-1] * min(above)) if above else 3 * good[-1]


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
        found: dict[str, Tried] = {NONE: {}, **{name: {} for name in PENALTIES}}
        with workers(self.jobs) as run_all, progress_bar(console) as progress:
            total = self.seeds * (1 + len(PENALTIES) * (len(self.pushes) + self.rounds))
            bar = progress.add_task("training", total=total)

            def try_all(wanted: list[tuple[str, float]]) -> None:
                for run in run_all(measure, [job for name, push in wanted for job in self.of(name, push)]):
                    found[run.penalty].setdefault(run.push, []).append(run)
                    progress.advance(bar)

            try_all([(NONE, 0.0), *((name, push) for name in PENALTIES for push in self.pushes)])
            least = average(found[NONE][0.0], "accuracy") - ALLOWED
            for _ in range(self.rounds):
                try_all([(name, next_push(found[name], least)) for name in PENALTIES])
        return found

    def of(self, penalty: str, push: float) -> list[Job]:
        """The networks of one push: one for each seed."""
        return [Job(penalty, push, seed, self.epochs, self.network, self.grouping) for seed in range(self.seeds)]


QUICK = Study(seeds=1, pushes=(1.0,), rounds=0, epochs=1, jobs=1)


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
        spread([run.left for run in runs]),
        spread([run.removed_accuracy for run in runs], 2),
    ]


def terminal(best: dict[str, list[Run]]) -> Table:
    """The table in 80 columns: means over the seeds, and the standard deviation of what it is about."""
    view = Table(title="Channels that penalties empty by themselves, in percent", box=SIMPLE_HEAD, pad_edge=False)
    view.collapse_padding = True
    view.caption = (
        f"empty: the norm of what reads the channel is under {EMPTY:g}; small: under {SMALL:g} of the layer's largest; "
        f"zeros: weights under {EMPTY:g}; left: parameters without the empty channels, and the accuracy then"
    )
    view.add_column("penalty", no_wrap=True)
    for name in ("acc.", "empty", "small", "zeros", "left", "acc."):
        view.add_column(name, justify="right", no_wrap=True)
    for name, runs in best.items():
        if not runs:
            view.add_row(name, *"------")
            continue
        before, empty, small, weights, left, then = (
            average(runs, what) for what in ("accuracy", "empty", "small", "weights", "left", "removed_accuracy")
        )
        spread = f"{empty:.1f}±{pstdev(run.empty for run in runs):.1f}"
        view.add_row(name, f"{before:.2f}", spread, f"{small:.1f}", f"{weights:.1f}", f"{left:.1f}", f"{then:.2f}")
    return view


def markdown(rows: list[list[str]]) -> str:
    lines = [HEADER, ("---", *["---:"] * (len(HEADER) - 1)), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def run(study: Study, out: Path, console: Console) -> dict[str, Any]:
    """Train, print the table, and write `sparsity.json`, `sparsity.md` and `sparsity.png` to the folder `out`."""
    start = time.perf_counter()
    before = machine()
    found = study.search(console)
    best = matched(found)
    rows = [cells(name, runs) for name, runs in best.items()]
    result: dict[str, Any] = {
        "machine": before,
        "study": {**asdict(study), "pushes": list(study.pushes)},
        "training": {"batch": BATCH, "lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY},
        "thresholds": {"empty": EMPTY, "small": SMALL, "allowed": ALLOWED},
        "seconds": time.perf_counter() - start,
        "matched": {name: runs[0].push if runs else None for name, runs in best.items()},
        "runs": [asdict(one) for tried in found.values() for push in sorted(tried) for one in tried[push]],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "sparsity.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "sparsity.md").write_text(markdown(rows))
    plot(found, best, out / "sparsity.png")
    console.print(terminal(best))
    console.print(f"Wrote sparsity.json, sparsity.md and sparsity.png to {out}.", markup=False, soft_wrap=True)
    return result


def plot(found: dict[str, Tried], best: dict[str, list[Run]], path: Path) -> None:
    """Empty channels against accuracy, a line for each penalty; beside it the matched points as bars (PNG)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display and leaves pyplot's state alone
    curves, bars = figure.subplots(1, 2, width_ratios=(1.1, 1))
    colours = dict(zip(found, COLOURS, strict=True))
    plot_curves(curves, found, best, colours)
    plot_bars(bars, best, colours)
    for axes in (curves, bars):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def plot_curves(axes: Any, found: dict[str, Tried], best: dict[str, list[Run]], colours: dict[str, str]) -> None:
    whole = average(found[NONE][0.0], "accuracy")
    highest = max(average(runs, "accuracy") for tried in found.values() for runs in tried.values())
    for name, tried in found.items():
        points = [tried[push] for push in sorted(tried)]
        x, y = [average(runs, "accuracy") for runs in points], [average(runs, "empty") for runs in points]
        axes.plot(x, y, "o-", color=colours[name], markersize=4, linewidth=1.2)
        if runs := best[name]:
            at = average(runs, "accuracy"), average(runs, "empty")
            axes.plot(*at, "o", color=colours[name], markersize=10, markeredgecolor="black")
    axes.axvline(whole - ALLOWED, color="#999999", linestyle="--", linewidth=1)
    axes.set(xlim=(whole - SHOWN, highest + 0.1), ylim=(-3, 100))
    axes.set_xlabel(f"test accuracy, %, mean over the seeds (dashed: {ALLOWED} points below no penalty)")
    axes.set_ylabel(f"channels with a norm under {EMPTY:g}, %")
    axes.set_title("Stronger and stronger penalties, from right to left; large dots: the bars")


def plot_bars(axes: Any, best: dict[str, list[Run]], colours: dict[str, str]) -> None:
    for place, (name, runs) in enumerate(best.items()):
        values = [run.empty for run in runs]
        if not values:
            axes.text(1, place, "no strength is allowed", va="center", fontsize=9)
            continue
        axes.barh(place, mean(values), color=colours[name])
        axes.plot(values, [place] * len(values), "o", color="black", markeredgecolor="white", markersize=5)
        axes.text(max(values) + 2, place, f"{mean(values):.0f}", va="center", fontsize=9)
    axes.set_yticks(range(len(best)), list(best), fontsize=9)
    for label in axes.get_yticklabels():
        label.set(color=colours[label.get_text()], fontweight="bold")
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel=f"channels with a norm under {EMPTY:g}, % (dots: seeds)")
    axes.set_title(f"At the strongest that costs at most {ALLOWED} points of accuracy")


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
