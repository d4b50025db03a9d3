"""A sieve: slopes of gates decide on which side of the border most units are, and only the others are tried.

Some units of each group, drawn at random, are tried. A regression on them turns what slopes predict into rises, and its
errors at units that it was not fitted to say how far it can be trusted. The same units measure what the sieve misses:
how many of them it would have put on the wrong side, had they not been tried.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Draw", "Regression", "Sieve", "at_most", "drawn"]

_LEAST = 12  # units of a group that are drawn
_SHARE = 0.05  # of every group, at least
_ENOUGH = 16.0  # units drawn, times the share that may be wrong: twice what a bound needs where none is wrong
_MOST = 0.5
_DOUBT = 0.25  # a unit that is on the other side with this chance is tried
_LEVEL = 0.05  # chance that the bound does not hold
_WIDTHS = (0.5, 1.0, 2.0, 4.0)  # of the band, in errors of predictions, until the bound is good enough
_RIDGE = 1e-2


@dataclass(frozen=True)
class Draw:
    """Units of each group that are tried at random.

    Attributes:
        units: by group; at first those that make up an equal share of every group, then more of small ones.
        equal: how many make up the equal share, by group.
    """

    units: Mapping[str, list[int]]
    equal: Mapping[str, int]


def drawn(sizes: Mapping[str, int], confidence: float, seed: int) -> Draw | None:
    """Draw as many units as a bound at this confidence needs; None where that would be most of them."""
    share = max(_SHARE, _ENOUGH / (1 - confidence) / max(1, sum(sizes.values())))
    if share > _MOST:
        return None
    units, equal = {}, {}
    for index, (name, size) in enumerate(sizes.items()):
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed + 7919 * index))
        equal[name] = math.ceil(share * size)
        count = max(_LEAST, equal[name])
        units[name] = order[: size if size < 2 * count else count].tolist()
    return Draw(units, equal)


def at_most(wrong: int, tried: int, level: float = _LEVEL) -> float:
    """An upper bound of the share of wrong units, from those that were tried at random (Clopper and Pearson).

    Args:
        level: the chance that the bound does not hold.

    Source: Clopper and Pearson, "The use of confidence or fiducial limits illustrated in the case of the binomial",
    Biometrika 26, 1934.

    Example:
        >>> round(at_most(0, 59), 3), round(at_most(5, 100), 3)
        (0.05, 0.102)
    """
    if wrong >= tried:
        return 1.0
    ways = [math.lgamma(tried + 1) - math.lgamma(i + 1) - math.lgamma(tried - i + 1) for i in range(wrong + 1)]
    low, high = wrong / tried, 1.0
    for _ in range(50):
        q = (low + high) / 2
        so_few = sum(math.exp(w + i * math.log(q) + (tried - i) * math.log1p(-q)) for i, w in enumerate(ways))
        low, high = (q, high) if so_few > level else (low, q)
    return high


class Regression:
    """A regression of the loss deltas of a group's units on predictions, on a scale that tames the largest.

    Args:
        predictions: the loss deltas that slopes predict, first and second order, ``(units, 2)``.
        units: those that were tried at random.
        loss_deltas: their measured loss deltas.

    Attributes:
        means: predicted means of all units, on that scale; for units tried at random by a fit to the others.
        error: standard deviation of measured loss deltas around the regression.
        known: measured loss deltas, on that scale; NaN for units that were not tried.
        estimates: loss deltas that the regression predicts.
    """

    def __init__(self, predictions: Tensor, units: list[int], loss_deltas: Tensor):
        self.units = units
        self.scale = loss_deltas.abs().median().clamp_min(1e-30)
        parts = torch.cat([predictions, predictions.sum(1, keepdim=True)], 1) / self.scale
        x = torch.cat([parts.asinh(), torch.ones(len(parts), 1, dtype=parts.dtype)], 1)
        y, z = (loss_deltas / self.scale).asinh(), x[units]
        inverse = torch.linalg.inv(z.T @ z + _RIDGE * torch.eye(x.shape[1], dtype=x.dtype))
        self.means = x @ (inverse @ (z.T @ y))
        self.estimates = self.means.sinh() * self.scale
        leverage = ((z @ inverse) * z).sum(1).clamp(max=0.99)
        left_out = (y - self.means[units]) / (1 - leverage)
        self.error = left_out.square().mean().sqrt().clamp_min(1e-12)
        self.means[units] = y - left_out
        self.known = torch.full_like(self.means, math.nan)
        self.known[units] = y

    def learn(self, units: list[int], loss_deltas: Tensor) -> None:
        """Take in units that were tried."""
        self.known[units] = (loss_deltas / self.scale).asinh()

    def untried(self) -> list[int]:
        """Units that were not tried."""
        found: list[int] = self.known.isnan().nonzero().flatten().tolist()
        return found

    def border(self, selected: int, width: float) -> float:
        """The border below which the selected number of units is expected."""
        ends = torch.cat([self.means, self.known[~self.known.isnan()]])
        low, high = float(ends.min() - 1), float(ends.max() + 1)
        for _ in range(60):
            border = (low + high) / 2
            below = torch.special.ndtr((border - self.means) / (width * self.error))
            below = torch.where(self.known.isnan(), below, (self.known < border).to(below.dtype))
            low, high = (border, high) if float(below.sum()) < selected else (low, border)
        return border

    def decided(self, border: float, allowed: float, width: float) -> Tensor:
        """True for units whose side the predictions decide: as many as keep the expected errors within the allowed."""
        doubt = torch.special.ndtr(-(self.means - border).abs() / (width * self.error))
        order = doubt.argsort(stable=True)
        decided = torch.zeros(len(order), dtype=torch.bool)
        decided[order[(doubt[order].cumsum(0) <= allowed) & (doubt[order] < _DOUBT)]] = True
        return decided


@dataclass
class Sieve:
    """Decides which units to try, so many that the share of the selection that is wrong is small enough, by a bound.

    Attributes:
        regressions: loss deltas from predictions, by group.
        draw: the units that were tried at random.
        selected: how many units of each group are to be removed.
        tried: those that were tried.
        missed: share of the selection that is wrong, at most.
    """

    regressions: Mapping[str, Regression]
    draw: Draw
    selected: Mapping[str, int]
    confidence: float
    tried: dict[str, list[int]] = field(init=False)
    missed: float = 1.0
    looks: int = 0

    def __post_init__(self) -> None:
        self.tried = {name: sorted(units) for name, units in self.draw.units.items()}

    def more(self) -> dict[str, list[int]]:
        """The units to try now; none where enough is known."""
        while self.looks < len(_WIDTHS):
            found, wrong = self._look(_WIDTHS[self.looks])
            if found:
                return self._trying(found)
            self.missed = self._bound(wrong)
            if self.missed <= 1 - self.confidence:
                return {}
            self.looks += 1
        self.missed = 0.0
        return self._trying({name: one.untried() for name, one in self.regressions.items() if one.untried()})

    def _trying(self, units: dict[str, list[int]]) -> dict[str, list[int]]:
        for name, some in units.items():
            self.tried[name] = sorted({*self.tried[name], *some})
        return units

    def _look(self, width: float) -> tuple[dict[str, list[int]], tuple[int, int]]:
        """The undecided units that were not tried; and how many of the equal share would be wrong above and below."""
        found, above, below = {}, 0, 0
        for name, one in self.regressions.items():
            selected, equal = self.selected[name], self.draw.units[name][: self.draw.equal[name]]
            if not 0 < selected < len(one.means):
                continue
            border = one.border(selected, width)
            decided = one.decided(border, (1 - self.confidence) * selected, width)
            if units := (~decided & one.known.isnan()).nonzero().flatten().tolist():
                found[name] = units
            low, high = one.means[equal] < border, one.known[equal] < border
            above += int((decided[equal] & low & ~high).sum())
            below += int((decided[equal] & ~low & high).sum())
        return found, (above, below)

    def _bound(self, wrong: tuple[int, int]) -> float:
        """A bound of the share of the selection that is wrong, by the worse of errors above and below the border."""
        units, number = sum(len(one.means) for one in self.regressions.values()), sum(self.draw.equal.values())
        if all(len(self.tried[name]) == len(one.means) for name, one in self.regressions.items()):
            return 0.0
        share = max(at_most(errors, number, _LEVEL / (2 * len(_WIDTHS))) for errors in wrong)
        return share * units / max(1, sum(self.selected.values()))
