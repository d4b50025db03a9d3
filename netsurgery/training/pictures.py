"""Pictures of a study (PNG): accuracy against cost, widths of the layers, loss over the epochs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from netsurgery.training.summary import COLUMNS, Result, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw"]

COLOURS = (
    "#333333", "#1f77b4", "#d62728", "#2ca02c", "#e68a00", "#7b4fb0", "#12a5b5", "#d457a6", "#8c564b", "#00574b",
)  # fmt: skip
MARKS = "osD^vPX<>*"


def draw(results: Results, out: Path) -> None:
    """Write `tradeoff.png`, `widths.png` and `losses.png` to a folder."""
    figure(out / "tradeoff.png", (12, 5), 2, lambda axes: tradeoff(results, axes))
    figure(out / "widths.png", (max(9.0, 0.5 * len(layers(results))), 5), 1, lambda axes: widths(results, axes[0]))
    figure(out / "losses.png", (12, 5), 2, lambda axes: losses(results, axes))


def figure(path: Path, size: tuple[float, float], count: int, paint: Callable[[Sequence[Axes]], None]) -> None:
    """Axes side by side with one legend under them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(drawn)  # draws without a display and leaves pyplot's state alone
    axes = drawn.subplots(1, count, squeeze=False)[0]
    paint(axes)
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.25)
    handles, labels = axes[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    new = path.with_name(path.name + ".new")
    drawn.savefig(new, format="png")
    new.replace(path)


def style(index: int) -> dict[str, Any]:
    """Colour and mark of a variant, alike in all pictures."""
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKS[index % len(MARKS)]}


def final(run: Result) -> float:
    """The accuracy at the end, in percent."""
    value: float = run["removed"] if run["finetuned"] is None else run["finetuned"]
    return value


def tradeoff(results: Results, axes: Sequence[Axes]) -> None:
    """A point for each seed and a larger one for the mean, against parameters and against MACs."""
    for one, cost in zip(axes, ("params", "MACs"), strict=True):
        for index, (name, runs) in enumerate(results.items()):
            x = [share for run in runs if (share := COLUMNS[cost](run)) is not None]
            y = [final(run) for run in runs]
            one.scatter(x, y, s=14, alpha=0.5, linewidths=0, **style(index))
            one.scatter(mean(x), mean(y), s=80, alpha=0.8, label=name, **style(index))
        one.set(
            xlabel=f"{'parameters' if cost == 'params' else cost} that stay, %", ylabel="test accuracy at the end, %"
        )


def layers(results: Results) -> list[str]:
    """The layers of the whole networks, each once."""
    return list(dict.fromkeys(k for runs in results.values() for k in runs[0]["widths"][0]))


def widths(results: Results, axes: Axes) -> None:
    """Output channels that stay in each layer, the mean over seeds; a grey line for the whole network."""
    names = layers(results)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
    whole = {k: v for runs in results.values() for k, v in runs[0]["widths"][0].items()}
    axes.step(range(len(names)), [whole[k] for k in names], where="mid", color="#bbbbbb", linewidth=6, label="whole")
    for index, (name, runs) in enumerate(results.items()):
        means = [mean(run["widths"][1].get(k, float("nan")) for run in runs) for k in names]
        beside = 0.5 * ((index + 0.5) / len(results) - 0.5)  # so that those that are alike can be told apart
        axes.plot([i + beside for i in range(len(names))], means, label=name, markersize=4, linewidth=1, **style(index))
    axes.set(ylabel="output channels", title="Output channels of each layer after the removal")


def losses(results: Results, axes: Sequence[Axes]) -> None:
    """Loss and accuracy over the epochs, fine-tuning behind training; the mean over seeds."""
    for index, (name, runs) in enumerate(results.items()):
        epochs = list(zip(*(run["training"] + run["finetuning"] for run in runs), strict=True))
        x = list(accumulate([1] * len(epochs)))
        for one, key in zip(axes, ("loss", "accuracy"), strict=True):
            y = [mean(epoch[key] for epoch in epochs_of) for epochs_of in epochs]
            one.plot(x, y, label=name, linewidth=1.2, color=style(index)["color"])
    axes[0].set(xlabel="epoch, fine-tuning after training", ylabel="cross-entropy on the training images")
    axes[0].set_yscale("log")
    axes[1].set(xlabel="epoch, fine-tuning after training", ylabel="test accuracy, %")
    late = [
        e["accuracy"] for runs in results.values() for run in runs for e in run["training"][-5:] + run["finetuning"]
    ]
    axes[1].set_ylim(min(late, default=0.0) - 1, 100.2)
