"""The main job on real data: train a small residual network with the penalty, prune, fine-tune, verify, report."""

import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
import torch.nn.functional as F
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import netsurgery
from netsurgery.models import DigitsResNet
from netsurgery.outputs import check_writable, writing
from netsurgery.passes import HGSR, HGSRScore, PruneChannels

BATCH = 64  # images in a training step
TIMED_BATCH = 256  # images in a timed forward pass
STRENGTH = 3e-5  # of the penalty in training: benchmarks/strength.py, on held-out training images
WIDTHS = (32, 64, 128)  # channels of each stage of the network
PASSES = (HGSRScore(grouping="coupled"), PruneChannels(params=0.5, scope="global"))
Figures = dict[str, Any]  # what `table.json` holds
Step = Callable[[], None]  # says that a step of the work is done
Stage = Callable[[str, int], Step]  # announces a stage of the work and its number of steps


@dataclass(frozen=True)
class Digits:
    """scikit-learn's handwritten digits: images `(n, 1, 8, 8)` in [0, 1], labels `(n,)`."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Row:
    """One line of the table: accuracy in percent; milliseconds for a batch: median, lower and upper quartile."""

    network: str
    accuracy: float
    parameters: int
    macs: int
    latency_ms: float
    latency_low_ms: float
    latency_high_ms: float


def digits(seed: int) -> Digits:
    """Load the digits and hold a quarter of every class back for the test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    x = torch.as_tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    y = torch.as_tensor(labels)
    train, test = train_test_split(range(len(y)), test_size=0.25, stratify=labels, random_state=seed)
    return Digits((x[train], y[train]), (x[test], y[test]))


def fit(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    epochs: int,
    lr: float,
    seed: int,
    step: Step,
    penalty: HGSR | None = None,
) -> None:
    """Minimise the cross-entropy, and a penalty, by AdamW on a one-cycle schedule; `step` is called after an epoch."""
    x, y = data
    order = torch.Generator().manual_seed(seed)
    batches = -(-len(x) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * batches)
    model.train()
    for _ in range(epochs):
        for picked in torch.randperm(len(x), generator=order).chunk(batches):
            optimizer.zero_grad()
            F.cross_entropy(model(x[picked]), y[picked]).backward()
            if penalty is not None:
                penalty.add_gradient()
            optimizer.step()
            schedule.step()
        step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Percentage of images whose largest logit is the label's."""
    x, y = data
    return 100 * float((model(x).argmax(1) == y).double().mean())


@torch.no_grad()
def latency(models: list[nn.Module], x: Tensor, rounds: int, step: Step) -> list[list[float]]:
    """Quartiles of the milliseconds of a forward pass. The models take turns: a busy machine slows all alike."""
    times: list[list[float]] = [[] for _ in models]
    for _ in range(rounds + 1):
        for model, taken in zip(models, times, strict=True):
            start = time.perf_counter()
            model(x)
            taken.append(1e3 * (time.perf_counter() - start))
        step()
    return [quantiles(taken[1:], n=4) for taken in times]  # the first round warms up


def widths(model: nn.Module) -> dict[str, int]:
    """Output channels of every convolution and linear layer, by module path."""
    return {k: m.weight.shape[0] for k, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def plot(before: dict[str, int], after: dict[str, int], path: Path) -> None:
    """Write the widths per layer before and after as grouped bars (PNG)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display and leaves pyplot's state alone
    axes = figure.subplots()
    places = range(len(before))
    for shift, label, colour, sizes in ((-0.2, "trained", "#9aa5b1", before), (0.2, "pruned", "#1f6feb", after)):
        bars = axes.bar([p + shift for p in places], [sizes[k] for k in before], 0.4, label=label, color=colour)
        axes.bar_label(bars, fontsize=8)
    axes.set_xticks(places, list(before), rotation=30, ha="right", fontsize=8)
    axes.set(title="Output channels per layer before and after pruning", xlabel="layer", ylabel="output channels")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


def table(rows: list[Row]) -> Table:
    """The rows as a table for the terminal."""
    view = Table(title="DigitsResNet on scikit-learn's handwritten digits", box=SIMPLE_HEAD)
    view.collapse_padding, view.pad_edge, view.show_edge, view.padding = True, False, False, (0, 1, 0, 0)
    view.add_column("network", overflow="fold")
    for name in ("test\naccuracy", "parameters", "MACs"):
        view.add_column(name, justify="right", no_wrap=True)
    view.add_column(f"ms per {TIMED_BATCH} images", justify="right", overflow="fold")
    for r in rows:
        time_ms = f"{r.latency_ms:.2f} ({r.latency_low_ms:.2f} to {r.latency_high_ms:.2f})"
        view.add_row(r.network, f"{r.accuracy:.2f} %", f"{r.parameters:,}", f"{r.macs:,}", time_ms)
    return view


def progress_bar(console: Console) -> Progress:
    """A bar with the work that goes on, its progress and the time; it leaves the terminal when the work is done."""
    text = TextColumn("{task.description:<12}")
    return Progress(text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console, transient=True)


def operate(
    data: Digits,
    seed: int,
    epochs: int,
    finetune_epochs: int,
    stage: Stage,
    *,
    strength: float = STRENGTH,
    widths: tuple[int, ...] = WIDTHS,
) -> tuple[dict[str, nn.Module], float]:
    """Train with the penalty, score, prune, verify and fine-tune without it.

    Args:
        strength: of the penalty.
        widths: channels of each stage of the network.

    Returns:
        The networks by name in the order of the table, and the proof figure of the pruned one.
    """
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.manual_seed(seed)
        trained = DigitsResNet(widths)
    penalty = HGSR(trained, data.test[0], grouping="coupled", strength=strength)
    fit(trained, data.train, epochs, 3e-3, seed, stage("training", epochs), penalty)
    step = stage("surgery", 3)
    edit = netsurgery.plan(trained, PASSES, (data.test[0],))
    step()
    pruned = netsurgery.rewrite(trained, edit)
    step()
    proof = netsurgery.verify(trained, pruned, edit, (data.test[0],))
    step()
    tuned = copy.deepcopy(pruned)
    fit(tuned, data.train, finetune_epochs, 1e-3, seed + 1, stage("fine-tuning", finetune_epochs))
    return {"trained": trained, "pruned": pruned, "pruned, fine-tuned": tuned}, proof


def measure(networks: dict[str, nn.Module], data: Digits, rounds: int, stage: Stage) -> list[Row]:
    """The rows of the table."""
    x = data.test[0]
    times = latency(list(networks.values()), x[:TIMED_BATCH], rounds, stage("timing", rounds + 1))
    rows = []
    for (name, network), (low, median, high) in zip(networks.items(), times, strict=True):
        cost = netsurgery.cost(network, (x[:1],))
        rows.append(Row(name, accuracy(network, data.test), cost.params, cost.macs, median, low, high))
    return rows


def write(result: Figures, out: Path) -> None:
    """Write `table.json` and `widths.png` to the folder `out`, which is made where it is missing."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.json").write_text(json.dumps(result, indent=2) + "\n")
    plot(result["widths"]["trained"], result["widths"]["pruned"], out / "widths.png")


def run(
    seed: int,
    out: Path | None,
    console: Console,
    *,
    epochs: int = 15,
    finetune_epochs: int = 10,
    rounds: int = 50,
) -> Figures:
    """Train on digits with HGSR, remove half of the parameters by its score, verify, fine-tune, and print a table.

    Args:
        seed: fixes the split, the initial weights and the order of the images: the same table again, latency aside.
        out: folder for `table.json` and `widths.png`; None writes nothing.
        console: where the progress and the table go.
        epochs: passes over the training images before the pruning.
        finetune_epochs: passes over them after it.
        rounds: timed forward passes of each network.

    Returns:
        What `table.json` holds: seed, torch version, sizes of the data, the rows, the proof figure, widths, seconds.
    """
    if out is not None:
        check_writable(out, ("table.json", "widths.png"))
    start = time.perf_counter()
    data = digits(seed)
    with progress_bar(console) as progress:

        def stage(description: str, total: int) -> Step:
            task = progress.add_task(description, total=total)
            return lambda: progress.advance(task)

        networks, proof = operate(data, seed, epochs, finetune_epochs, stage)
        rows = measure(networks, data, rounds, stage)
    result: Figures = {
        "seed": seed,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "train_images": len(data.train[1]),
        "test_images": len(data.test[1]),
        "latency_batch": TIMED_BATCH,
        "rows": [asdict(row) for row in rows],
        "verify": proof,
        "widths": {name: widths(networks[name]) for name in ("trained", "pruned")},
        "seconds": time.perf_counter() - start,
    }
    console.print(table(rows))
    console.print(f"verify: over the test images, the pruned network differs by {proof:.1e} at most (relative)")
    console.print("from the trained one whose removed channels are silenced.")
    if out is not None:
        with writing(out, "the table above holds what came out"):
            write(result, out)
        console.print(f"Wrote {out / 'table.json'} and {out / 'widths.png'}.", markup=False, soft_wrap=True)
    return result
