"""Racing: units are tried on growing sets of samples until it is clear enough which have the lowest scores.

Three things make few samples enough. The samples that matter most to any unit, by the slopes of gates, are all tried.
On the others the rise is regressed on what these slopes predict, whose mean over all samples is known; or its absolute
value, where that is scored by. And only units whose side of the border is still open go on: of large
networks the slopes alone decide for many (see ``sieve``).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from netsurgery.passes.ablation import Ablation
from netsurgery.passes.forecast import time_trials
from netsurgery.passes.gate_gradients import gate_slopes
from netsurgery.passes.progress import span
from netsurgery.passes.readings import Reading
from netsurgery.passes.score_checkpoint import ScoreCheckpoint
from netsurgery.passes.sieve import Regression, Sieve, drawn

__all__ = ["race"]

_log = logging.getLogger("netsurgery")
_WIDER = 2.0  # times the standard error: rises of the loss have heavy tails


def race(
    ablation: Ablation, checkpoint: ScoreCheckpoint, reading: Reading, share: float, confidence: float, seed: int
) -> dict[str, Tensor]:
    """Rises of the loss, or effects on it, by group: estimates, exact for units whose side stays open to the end.

    Args:
        reading: whether units are scored by the rise or the effect.
        share: the share of each group that is to be removed.
        confidence: the share of the selection that must be expected to be right.
        seed: the seed of the random draw of units.
    """
    runner = _Race(ablation, checkpoint, reading, share, confidence, seed)
    runner.forecast_time()
    sieve = runner.sieve()
    if sieve is None:
        runner.go(ablation.everything())
    else:
        while units := sieve.more():
            runner.say(sieve)
            runner.go(units)
            for name, some in units.items():
                sieve.regressions[name].learn(some, runner.estimates(name)[0][some])
        runner.say(sieve)
    if all(bool((seen == ablation.samples.count).all()) for _, seen in checkpoint.entries.values()):
        _log.info("racing has saved nothing: every unit was tried on all %d samples", ablation.samples.count)
    return {group.name: runner.estimates(group.name)[0] for group in ablation.network.prunable}


@dataclass
class _Race:
    ablation: Ablation
    checkpoint: ScoreCheckpoint
    reading: Reading
    share: float
    confidence: float
    seed: int
    guesses: Mapping[str, Tensor] = field(default_factory=dict)  # loss deltas of units that are not tried

    def __post_init__(self) -> None:
        ablation, count = self.ablation, self.ablation.samples.count
        self.predicted = ablation.engine(min(ablation.chunk(), count), 1) is not None
        if self.predicted:
            slopes = gate_slopes(ablation)
        else:  # nothing is predicted
            slopes = {g.name: torch.zeros(count, g.size, dtype=torch.float64) for g in ablation.network.prunable}
        squares = [slope.square().sum(1) for slope in slopes.values()]
        weight = torch.stack([square / square.sum().clamp_min(1e-300) for square in squares]).sum(0)
        self.head = min(count, max(32, count // 16))
        top = weight.argsort(descending=True, stable=True)[: self.head]
        rest = torch.ones(count, dtype=torch.bool)
        rest[top] = False
        order = torch.cat([top, rest.nonzero().flatten()])
        ablation.reorder(order)
        ahead = {name: slope[order].T for name, slope in slopes.items()}  # (units, samples)
        self.read = torch.abs if self.reading == "effect" else torch.Tensor.clone
        self.predictions = {
            name: torch.stack([self.read(a.square() / 2 - a), a.square() / 2], 2) for name, a in ahead.items()
        }

    def forecast_time(self) -> None:
        """Forecast the time of all trials."""
        ablation = self.ablation
        rows = ablation.rows_left(self.checkpoint, ablation.everything())
        self.forecast = time_trials(ablation, rows) if ablation.settings.progress else None
        self.rate = None if self.forecast is None else self.forecast.rate

    def sieve(self) -> Sieve | None:
        """Try units at random, and fit to them what slopes predict; None where slopes cannot decide anything."""
        ablation = self.ablation
        sizes = {group.name: group.size for group in ablation.network.prunable}
        draw = drawn(sizes, self.confidence, self.seed) if self.predicted else None
        if draw is None:
            return None
        ablation.report.begin("units drawn at random", ablation.rows_left(self.checkpoint, draw.units), self.rate)
        for stop in (self.head, ablation.samples.count):
            ablation.extend(self.checkpoint, draw.units, stop, self.terms, 5)
        regressions = {}
        for name, units in draw.units.items():
            loss_deltas = self.checkpoint.entries[name][0][:2, units].sum(0) / ablation.samples.count
            regressions[name] = Regression(self.predictions[name].mean(1), units, loss_deltas)
        self.guesses = {name: one.estimates for name, one in regressions.items()}
        return Sieve(
            regressions, draw, {name: int(size * self.share + 1e-9) for name, size in sizes.items()}, self.confidence
        )

    def say(self, sieve: Sieve) -> None:
        """Log what slopes decide, and the time of the rest or, at the end, the share that may be wrong."""
        sizes = [group.size for group in self.ablation.network.prunable]
        left = self.ablation.rows_left(self.checkpoint, sieve.tried)
        if sieve.missed <= 1 - sieve.confidence:
            more = f"at most {100 * sieve.missed:.1f}% of the selection is wrong by that, with a chance of 95%"
        elif self.forecast is not None:
            more = f"trying the others takes at most about {span(self.forecast.total(left))}"
        else:
            more = "the others are tried"
        decided = sum(sizes) - sum(map(len, sieve.tried.values()))
        _log.info("sieve: slopes decide for %s of %s units; %s", f"{decided:,}", f"{sum(sizes):,}", more)

    def go(self, active: dict[str, list[int]]) -> None:
        """Try some units on growing sets of samples."""
        ablation, count = self.ablation, self.ablation.samples.count
        more = max(64, count // 10)
        at_once = self.head if ablation.dear else None  # batches of one size, which is traced once
        if ablation.dear:
            more = self.head * math.ceil(more / self.head)
        seen = min(count, self.head + more)
        left = ablation.rows_left(self.checkpoint, active) if seen == count else None
        ablation.report.begin("racing", left, self.rate)
        ablation.extend(self.checkpoint, active, self.head, self.terms, 5, at_once)
        while active:
            ablation.extend(self.checkpoint, active, seen, self.terms, 5, at_once)
            if seen == count:
                break
            active = {name: self.undecided(name, units) for name, units in active.items()}
            active = {name: units for name, units in active.items() if units}
            seen = min(count, self.head + 2 * (seen - self.head))

    def terms(self, name: str, units: list[int], loss_deltas: Tensor, start: int) -> Tensor:
        """Sums over loss deltas or effects y: of y in the head; of y, y², and y times each prediction in the rest."""
        loss_deltas = self.read(loss_deltas)
        if start < self.head:
            return torch.cat([loss_deltas.sum(1)[None], torch.zeros(4, len(units), dtype=torch.float64)])
        x = self.predictions[name][units, start : start + loss_deltas.shape[1]]
        products = (x * loss_deltas[..., None]).sum(1).T
        return torch.cat(
            [torch.zeros(1, len(units)), loss_deltas.sum(1)[None], loss_deltas.square().sum(1)[None], products]
        )

    def estimates(self, name: str) -> tuple[Tensor, Tensor]:
        """Means over all samples, and their standard errors."""
        sums, seen = self.checkpoint.entries[name]
        count, predictions = self.ablation.samples.count, self.predictions[name]
        left, known = count - self.head, seen > 0
        guesses = self.guesses[name] if name in self.guesses else torch.zeros_like(sums[0])
        if not left:
            return torch.where(known, sums[0] / count, guesses), torch.zeros_like(sums[0])
        means, variances = guesses.clone(), torch.zeros_like(sums[0])
        overall = predictions[:, self.head :].mean(1)
        for rows in seen[known].unique().tolist():
            units = (seen == rows).nonzero().flatten()
            n = rows - self.head
            x = predictions[units, self.head : rows]
            centre, y = x.mean(1), sums[1, units] / n
            moments = (x - centre[:, None]).transpose(1, 2) @ (x - centre[:, None])
            ridge = 1e-9 * moments.diagonal(dim1=1, dim2=2).clamp_min(1e-30)
            products = sums[3:, units].T - n * centre * y[:, None]
            weights = torch.linalg.solve(moments + torch.diag_embed(ridge), products)
            squares = sums[2, units] - n * y.square() - (weights * products).sum(1)
            means[units] = (sums[0, units] + left * (y + ((overall[units] - centre) * weights).sum(1))) / count
            variances[units] = squares.clamp_min(0) / max(1, n - 3)
        n = (seen - self.head).double()
        variances = (variances * n + variances[known].mean()) / (n + 1)  # no effect so far may change
        errors = (variances / n * (1 - n / left)).clamp_min(0).sqrt() * left / count
        return means, torch.where(known, errors, 0.0)  # where slopes have decided, nothing is open

    def undecided(self, name: str, active: list[int]) -> list[int]:
        """The units whose side is still open, given what has been seen.

        The errors that are allowed, ``(1 - confidence)`` of the selection, are spent by halves: one on the units that
        stop while others go on, the other on those that are left when it suffices for all of them.
        """
        means, errors = self.estimates(name)
        selected = int(len(means) * self.share + 1e-9)
        if not 0 < selected < len(means):
            return []
        ordered = means.sort().values
        border = (ordered[selected - 1] + ordered[selected]) / 2
        wrong = torch.special.ndtr(-(means - border).abs() / (_WIDER * errors).clamp_min(1e-300))
        allowed = (1 - self.confidence) * selected
        if float(wrong.sum()) <= allowed:
            return []
        surest = wrong.argsort(stable=True)
        decided = set(surest[wrong[surest].cumsum(0) <= allowed / 2].tolist())
        return [unit for unit in active if unit not in decided]
