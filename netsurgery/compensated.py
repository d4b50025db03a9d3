"""Errors of outputs before and after a compensation: a value that reads as a line and as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from netsurgery.tables import columns

__all__ = ["Compensation", "LayerError", "Taken"]

Taken = Literal["weights", "constant", "nothing"]


@dataclass(frozen=True)
class LayerError:
    """The error of one layer's outputs on held-back samples, when its inputs are those of the original that stay.

    Attributes:
        layer: path of the module.
        before: mean square of the error, relative to the variance of the outputs; without compensation.
        after: the same with it.
        taken: the kind of change that was made.
        ridge: the penalty of the refit, where weights were changed.
    """

    layer: str
    before: float
    after: float
    taken: Taken
    ridge: float | None = None


@dataclass(frozen=True)
class Compensation:
    """The errors before and after a compensation, of each layer and of the network.

    Attributes:
        layers: every layer that reads removed units and can take up something, in the order in which they run.
        taken: the strongest kind of change by which the network as a whole was found to gain.
        before: mean square of the difference of the cut network's outputs from the original's on samples that were held
            back, relative to the mean square of these; NaN where outputs cannot be compared.
        after: the same with compensation.
        samples: how many samples everything was measured on.
        in_order: whether layers were then fitted one after the other, to inputs of the smaller network.

    Example:
        >>> from netsurgery.compensated import Compensation, LayerError
        >>> layers = LayerError("2", 0.5, 0.1, "weights", 0.01), LayerError("4", 0.3, 0.3, "nothing")
        >>> found = Compensation(layers, "weights", 0.4, 0.05, 512)
        >>> print(found)
        compensated 1 of 2 layers on 512 samples; on those held back outputs differ by 22.4% (before: 63.2%)
        >>> print(found.table())
        layer  before  after  taken    ridge
        2       70.7%  31.6%  weights   0.01
        4       54.8%  54.8%  nothing
    """

    layers: tuple[LayerError, ...]
    taken: Taken
    before: float
    after: float
    samples: int
    in_order: bool = False

    def __str__(self) -> str:
        done = sum(one.taken != "nothing" for one in self.layers)
        order = ", one after the other," if self.in_order else ""
        line = f"compensated {done} of {len(self.layers)} layers{order} on {self.samples:,} samples"
        if self.before != self.before:
            return f"{line}; outputs of the network were not compared"
        return f"{line}; on those held back outputs differ by {_share(self.after)} (before: {_share(self.before)})"

    def table(self) -> str:
        """A row for each layer: the error of its outputs, as a share of their standard deviation."""
        rows = [("layer", "before", "after", "taken", "ridge")]
        for one in self.layers:
            ridge = "" if one.ridge is None else f"{one.ridge:g}"
            rows.append((one.layer, _share(one.before), _share(one.after), one.taken, ridge))
        return columns(rows, right=(1, 2, 4))


def _share(squares: float) -> str:
    return f"{100 * squares**0.5:.1f}%"
