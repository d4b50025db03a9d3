"""Removals one after the other within a tolerance: the units of a group in order of the norms of their weights."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from netsurgery.analysis.network import Network
from netsurgery.passes.ablation import Ablation
from netsurgery.passes.bundles import Bundle, Choice
from netsurgery.passes.removed_units import Removal
from netsurgery.passes.score_checkpoint import ScoreCheckpoint
from netsurgery.passes.scores import MagnitudeScore
from netsurgery.passes.series import Series

if TYPE_CHECKING:
    from netsurgery.passes.removal import PruneChannels

__all__ = ["cumulative", "per_group"]

_log = logging.getLogger("netsurgery")
_ROUNDS = 2
_WIDTH = 4  # prefixes that are tried first; then twice as many each time


def per_group(ablation: Ablation, checkpoint: ScoreCheckpoint, tolerance: float) -> dict[str, Tensor]:
    """The highest rise up to each unit of a group, where every other group is whole."""
    orders = _by_norm(ablation.network)
    ablation.add_series({name: Series({name: order[:-1]}, prefixes=True) for name, order in orders.items()})
    ablation.report.begin("one unit after the other")
    open_ = {name: 0 for name, series in ablation.series.items() if series.size}  # prefixes tried so far
    width = _WIDTH
    while open_:
        tried = {name: list(range(n, min(n + width, ablation.series[name].size))) for name, n in open_.items()}
        ablation.extend(checkpoint, tried, ablation.samples.count)
        open_ = {
            name: units[-1] + 1
            for name, units in tried.items()
            if units[-1] + 1 < ablation.series[name].size and bool((checkpoint.means(name)[units] <= tolerance).all())
        }
        width *= 2
    return {name: _laid_out(order, _up_to(checkpoint, name, tolerance), tolerance) for name, order in orders.items()}


def _up_to(checkpoint: ScoreCheckpoint, name: str, tolerance: float) -> list[float]:
    """The highest rise up to each prefix, for the prefixes within the tolerance."""
    if name not in checkpoint.entries:  # one unit, which stays
        return []
    heights = checkpoint.means(name).nan_to_num(math.inf).cummax(0).values
    return [height for height in heights.tolist() if height <= tolerance]


def cumulative(
    ablation: Ablation, checkpoint: ScoreCheckpoint, removal: PruneChannels, tolerance: float
) -> dict[str, Tensor]:
    """The highest rise of the loss up to each unit, where all that was accepted before it is gone.

    Args:
        removal: the removal whose limits hold.
    """
    network, orders = ablation.network, _by_norm(ablation.network)
    ranks = {name: torch.tensor(order).argsort().double() for name, order in orders.items()}
    way = _Way(ablation, checkpoint, Choice(removal, network.with_scores(ranks)).bundles)
    ablation.report.begin("one unit after the other")
    way.go(tolerance)
    accepted = {group.name: n for n, bundle in enumerate(way.bundles) for group in bundle.groups}
    return {
        name: _laid_out(order, way.heights[accepted[name]] if name in accepted else [], tolerance)
        for name, order in orders.items()
    }


@dataclass
class _Way:
    """Choose units of one group after the other, in the network that the choices before have left.

    Attributes:
        heights: for each unit of a bundle that was accepted, the highest rise of the loss so far.
        highest: the highest rise of all that was accepted.
        last: the rise where all that was accepted is gone.
    """

    ablation: Ablation
    checkpoint: ScoreCheckpoint
    bundles: Sequence[Bundle]
    heights: list[list[float]] = field(init=False)
    highest: float = -math.inf
    last: float = 0.0

    def __post_init__(self) -> None:
        self.heights = [[] for _ in self.bundles]

    def go(self, tolerance: float) -> None:
        """Rounds that deal out the tolerance step by step, in proportion to units, and a last one for the rest."""
        whole, sizes = _ROUNDS * sum(bundle.size for bundle in self.bundles), 0
        for _ in range(_ROUNDS):
            for index, bundle in enumerate(self.bundles):
                sizes += bundle.size
                self.visit(index, tolerance * sizes / whole)
        for index in range(len(self.bundles)):
            self.visit(index, tolerance)
        gone = sum(len(heights) * len(b.groups) for heights, b in zip(self.heights, self.bundles, strict=True))
        _log.info(
            "without %d units of %d groups the loss rises by %.4g on %d samples; the tolerance is %g",
            gone, sum(map(bool, self.heights)), self.last, self.ablation.samples.count, tolerance,
        )  # fmt: skip

    def visit(self, index: int, level: float) -> None:
        """Let a bundle lose units as long as the loss does not rise above a level."""
        bundle, heights = self.bundles[index], self.heights[index]
        name = self.open(index)
        for counts in _widening([k for k in range(len(heights) + 1, bundle.most + 1) if bundle.allowed(k) == k]):
            self.ablation.extend(self.checkpoint, {name: [k - 1 for k in counts]}, self.ablation.samples.count)
            loss_deltas = self.checkpoint.means(name)
            for k in counts:
                loss_delta = float(loss_deltas[k - 1])
                if not loss_delta <= level:  # nor one that is NaN
                    return
                self.highest, self.last = max(self.highest, loss_delta), loss_delta
                heights.extend([self.highest] * (k - len(heights)))

    def open(self, index: int) -> str:
        """Register the series of a bundle where the units of others are gone; return its name in the checkpoint."""
        bundle, before = self.bundles[index], dict[str, tuple[int, ...]]()
        for other, heights in zip(self.bundles, self.heights, strict=True):
            if heights and other is not self.bundles[index]:
                before.update(_first_units(other, len(heights)))
        orders = {g.name: order[:-1] for g, order in zip(bundle.groups, bundle.order, strict=True)}
        name = f"{bundle.groups[0].name} after {_digest(before)}"
        self.ablation.add_series({name: Series(orders, prefixes=True, before=before)})
        return name


def _first_units(bundle: Bundle, count: int) -> dict[str, tuple[int, ...]]:
    return {g.name: tuple(sorted(order[:count])) for g, order in zip(bundle.groups, bundle.order, strict=True)}


def _digest(removal: Removal) -> str:
    return hashlib.sha256(repr(sorted(removal.items())).encode()).hexdigest()[:16]


def _widening(counts: Sequence[int]) -> Iterator[Sequence[int]]:
    """Numbers in portions that grow."""
    first, width = 0, _WIDTH
    while first < len(counts):
        yield counts[first : first + width]
        first, width = first + width, 2 * width


def _by_norm(network: Network) -> dict[str, list[int]]:
    norms: Mapping[str, Tensor] = MagnitudeScore().run(network).scores
    return {group.name: norms[group.name].argsort(stable=True).tolist() for group in network.prunable}


def _laid_out(order: Sequence[int], heights: Sequence[float], tolerance: float) -> Tensor:
    """Scores of units: heights for the first in the order; for the others their rank, above any threshold."""
    left = len(order) - len(heights)
    steps = torch.arange(1, left + 1, dtype=torch.float64) / len(order)
    scores = torch.empty(len(order), dtype=torch.float64)
    above = 1e9 * max(tolerance, 1.0) * (1 + steps)
    scores[torch.tensor(order)] = torch.cat([torch.tensor(heights, dtype=torch.float64), above])
    return scores
