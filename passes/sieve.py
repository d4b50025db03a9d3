"""A sieve: slopes of gates say of most units on which side of the border they are, and only the others are tried.

Some units of each group, drawn at random, are tried. A regression on them turns what slopes predict into rises, and its
errors at units that it was not fitted to say how far it can be trusted. The same units measure what the sieve misses:
how many of them it would have put on the wrong side, had they not been tried.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Draw", "Fit", "Sieve", "at_most", "drawn", "sift"]

_log = logging.getLogger("netsurgery")
_LEAST = 12  # units of a group that are drawn
_SHARE = 0.05  # of every group, at least
_ENOUGH = 8.0  # units drawn, times the share that may be wrong: twice what a bound needs where none is wrong
_MOST = 0.5
_DOUBT = 0.25  # a unit that is on the other side with this chance is tried
_LEVEL = 0.05  # chance that the bound does not hold
_WIDER = 1.5  # times the width of the band, where the bound is not good enough
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
    """The share that is wrong of all, at most, where so many of some tried at random are: Clopper and Pearson's bound.

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


class Fit:
    """Rises of a group's units as a regression on predictions has them, on a scale that tames the largest.

    Args:
        predictions: of the rise, first and second order, ``(units, 2)``.
        units: those that were tried.
        rises: what came out.

    Attributes:
        means: of all units, on that scale; of those tried as the regression fitted to the others has them.
        error: standard deviation of what comes out around it.
    """

    def __init__(self, predictions: Tensor, units: list[int], rises: Tensor):
        self.scale = rises.abs().median().clamp_min(1e-30)
        parts = torch.cat([predictions, predictions.sum(1, keepdim=True)], 1) / self.scale
        x = torch.cat([parts.asinh(), torch.ones(len(parts), 1, dtype=parts.dtype)], 1)
        y, z = (rises / self.scale).asinh(), x[units]
        ridge = _RIDGE * torch.eye(x.shape[1], dtype=x.dtype)
        inverse = torch.linalg.inv(z.T @ z + ridge)
        self.means = x @ (inverse @ (z.T @ y))
        leverage = ((z @ inverse) * z).sum(1).clamp(max=0.99)
        left_out = (y - self.means[units]) / (1 - leverage)
        self.error = left_out.square().mean().sqrt().clamp_min(1e-12)
        self.estimates = self.means.sinh() * self.scale
        self.means[units] = y - left_out
        self.found = y

    def sides(self, selected: int, width: float) -> tuple[float, Tensor]:
        """The border below which so many are expected, and of each unit the chance to be above it."""
        low, high = (float(end) for end in (self.means.min() - 1, self.means.max() + 1))
        for _ in range(60):
            border = (low + high) / 2
            below = torch.special.ndtr((border - self.means) / (width * self.error))
            low, high = (border, high) if float(below.sum()) < selected else (low, border)
        return border, 1 - below


@dataclass(frozen=True)
class Sieve:
    """What slopes decide.

    Attributes:
        estimates: rises as the regressions have them, by group.
        tried: the units that are to be tried, those drawn at random among them.
        missed: share of the selection that is wrong, at most.
    """

    estimates: Mapping[str, Tensor]
    tried: Mapping[str, list[int]]
    missed: float


def sift(fits: Mapping[str, Fit], draw: Draw, selected: Mapping[str, int], confidence: float) -> Sieve:
    """Decide which units to try: so many that the share of the selection that is wrong is small enough, by a bound."""
    sizes = {name: len(fit.means) for name, fit in fits.items()}
    number, chosen = sum(draw.equal.values()), sum(selected.values())
    width, level = 1.0, _LEVEL
    while True:
        level /= 2  # each look spends half of the chance that is left
        tried, wrong = {}, 0
        for name, fit in fits.items():
            units, errors = _band(fit, draw.units[name], draw.equal[name], selected[name], confidence, width)
            tried[name], wrong = units, wrong + errors
        missed = 0.0
        if any(len(tried[name]) < size for name, size in sizes.items()):
            # a unit on the wrong side puts another there: one of the two is selected
            missed = at_most(wrong, number, level) * sum(sizes.values()) / (2 * max(1, chosen))
        if missed <= 1 - confidence:
            return Sieve({name: fit.estimates for name, fit in fits.items()}, tried, missed)
        width *= _WIDER


def _band(
    fit: Fit, units: list[int], equal: int, selected: int, confidence: float, width: float
) -> tuple[list[int], int]:
    """The units to try, and how many of an equal share drawn at random would be on the wrong side without that."""
    size = len(fit.means)
    if not 0 < selected < size or len(units) == size:
        return [*range(size)], 0
    border, above = fit.sides(selected, width)
    doubt = torch.minimum(above, 1 - above)
    order = doubt.argsort(stable=True)
    surest = order[(doubt[order].cumsum(0) <= (1 - confidence) * selected) & (doubt[order] < _DOUBT)]
    decided = torch.zeros(size, dtype=torch.bool)
    decided[surest] = True
    wrong = decided[units] & ((fit.found > border) != (fit.means[units] > border))
    decided[units] = False
    return (~decided).nonzero().flatten().tolist(), int(wrong[:equal].sum())
