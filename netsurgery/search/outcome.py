"""The rounds of a search as a table and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import nn

from netsurgery.edit import Edit
from netsurgery.outputs import writing
from netsurgery.tables import columns

__all__ = ["Growth", "Round"]


@dataclass(frozen=True)
class Round:
    """The result of a round; round 0 is the network as it was given.

    Attributes:
        number: from 1 on; 0 of the start.
        group: what grew, by the name of its group of units; empty at the start.
        loss: the mean loss on held-out samples.
        accuracy: in percent, on held-out samples; None where targets are no classes.
        params: parameters.
        macs: multiply-accumulates of one run on the example inputs.
        widths: units of each group that can grow.
        tried: candidates that were trained.
        seconds: that went into its candidates, together, wherever they were trained, and into finding them.
        surgery: seconds of these that went into anything but training and measuring.
    """

    number: int
    group: str
    loss: float
    accuracy: float | None
    params: int
    macs: int
    widths: Mapping[str, int]
    tried: int = 0
    seconds: float = 0.0
    surgery: float = 0.0

    def entry(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> Round:
        """From JSON."""
        return cls(**{one.name: entry[one.name] for one in fields(cls)})


@dataclass(frozen=True)
class Growth:
    """The result of a search.

    Attributes:
        model: the network with the lowest loss on held-out samples, of all rounds: your own class, in the mode that
            yours was in.
        history: the rounds, the first of which is the start.
        why: why it stopped.
        edit: what was added to your network, in all.
    """

    model: nn.Module = field(repr=False)
    history: tuple[Round, ...] = field(repr=False)
    why: str
    edit: Edit

    @property
    def best(self) -> Round:
        """The round that ``model`` is from."""
        return min(self.history, key=lambda one: (one.loss, one.number))

    def __str__(self) -> str:
        rows = [("round", "grown", "parameters", "MACs", "held-out loss", "accuracy %", "tried", "s")]
        for one in self.history:
            accuracy = "-" if one.accuracy is None else f"{one.accuracy:.2f}"
            loss = f"{one.loss:.4f}" + (" *" if one is self.best else "  ")
            rows.append(
                (
                    str(one.number),
                    one.group or "(start)",
                    f"{one.params:,}",
                    f"{one.macs:,}",
                    loss,
                    accuracy,
                    str(one.tried),
                    f"{one.seconds:.1f}",
                )
            )
        return f"{columns(rows, (0, 2, 3, 4, 5, 6, 7))}\nstopped: {self.why}; * is the network that is given back"

    def plot(self, path: str | Path) -> None:
        """Write a picture (PNG): the width of each group over the rounds, and the loss.

        Raises:
            NetsurgeryError: the file cannot be written.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)  # draws without a display and leaves pyplot's state alone
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        rounds = [one.number for one in self.history]
        for index, name in enumerate(self.history[0].widths):
            marks = "osD^vPX<>*"
            sizes = [one.widths[name] for one in self.history]
            above.plot(rounds, sizes, drawstyle="steps-post", marker=marks[index % 10], markersize=4, label=name)
        below.plot(rounds, [one.loss for one in self.history], color="#333333", marker="o", markersize=4)
        above.axvline(self.best.number, color="#bbbbbb", zorder=0)
        below.axvline(self.best.number, color="#bbbbbb", zorder=0)
        above.set(ylabel="units", title="Units of each group over the rounds; the line is the network given back")
        below.set(xlabel="round", ylabel="held-out loss")
        for axes in (above, below):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
        with writing(Path(path), "pass another path"):
            figure.savefig(path, format="png")
