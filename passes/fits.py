"""Changes of a layer that make up for removed inputs, and their errors on samples that were held back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from netsurgery.compensated import LayerError, Taken
from netsurgery.passes.least_squares import Change, Sums
from netsurgery.passes.readers import Reader

__all__ = ["LEVELS", "Fit"]

LEVELS: tuple[Taken, ...] = ("nothing", "constant", "weights")
_FACTORS = 1, 10, 100  # factors of the ridge that are tried


@dataclass(frozen=True)
class Fit:
    """Changes of one layer that make up for inputs which it lacks.

    Attributes:
        reader: the layer.
        trial: by level, what is added to it as the samples say that are not held back.
        final: likewise, as all samples say.
        errors: by level, what outputs lack on the samples that were held back after the trial's change, relative to
            their variance.
        ridge: the ridge of the refit.
        rows: positions of outputs that the samples have together, or as many as are looked at.
    """

    reader: Reader
    trial: Mapping[Taken, Change]
    final: Mapping[Taken, Change]
    errors: Mapping[Taken, float]
    ridge: float | None
    rows: int

    @classmethod
    def of(cls, reader: Reader, fitted: Sums, held: Sums, ridge: float) -> Fit:
        """Fit to some sums, choose the ridge by others, and fit again to both."""
        both, shift = fitted + held, reader.shift is not None
        trial: dict[Taken, Change] = {"nothing": Change()}
        final = dict(trial)
        if shift:
            trial["constant"], final["constant"] = fitted.constant(), both.constant()
        chosen: float | None = None
        if reader.weight:
            chosen, trial["weights"] = _refit(fitted, held, ridge, shift)
            final["weights"] = both.refit(chosen, shift)
        scale = held.variance or 1.0
        errors = {level: held.error(one) / scale for level, one in trial.items()}
        return cls(reader, trial, final, errors, chosen, both.count)

    def level(self, most: Taken) -> Taken:
        """The level with the smallest error, of all up to one."""
        allowed = [level for level in self.errors if LEVELS.index(level) <= LEVELS.index(most)]
        return min(allowed, key=lambda level: self.errors[level])

    def chosen(self, most: Taken) -> tuple[Reader, float | None]:
        """The layer, without its weight where that is not refitted, and the ridge."""
        if self.level(most) == "weights":
            return self.reader, self.ridge
        return dataclasses.replace(self.reader, weight=None), None

    def error(self, most: Taken) -> LayerError:
        """The layer's errors before and after."""
        level = self.level(most)
        ridge = self.ridge if level == "weights" else None
        return LayerError(self.reader.path, self.errors["nothing"], self.errors[level], level, ridge)

    @property
    def left(self) -> str:
        """The reason why the layer is left as it is; empty where a change helps."""
        if self.level("weights") != "nothing" or not self.errors["nothing"]:
            return ""
        return "its outputs come no nearer to the original's on samples that were held back"


def _refit(fitted: Sums, held: Sums, ridge: float, shift: bool) -> tuple[float, Change]:
    """The ridge after which the error on samples that were held back no longer falls, and the change it leads to."""
    best, found = ridge, fitted.refit(ridge, shift)
    for factor in _FACTORS[1:]:
        other = fitted.refit(factor * ridge, shift)
        if held.error(other) >= held.error(found):
            break
        best, found = factor * ridge, other
    return best, found
