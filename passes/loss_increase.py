"""Scores by the change of the loss on samples when a unit, and all that is coupled to it, is removed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from netsurgery.analysis.network import Network
from netsurgery.errors import InputError
from netsurgery.passes.ablation import Ablation, AblationSettings, Terms
from netsurgery.passes.forecast import time_trials
from netsurgery.passes.losses import Loss
from netsurgery.passes.patterns import Modules, as_patterns
from netsurgery.passes.prefixes import cumulative, per_group
from netsurgery.passes.racing import race
from netsurgery.passes.readings import Reading, warn_of_falls
from netsurgery.passes.removal import PruneChannels
from netsurgery.passes.reporting import DataPass
from netsurgery.passes.scope import scoped
from netsurgery.passes.score_checkpoint import ScoreCheckpoint

__all__ = ["LossIncreaseScore"]


@dataclass(frozen=True)
class LossIncreaseScore(DataPass):
    """The exact change of the loss when a unit and everything coupled to it is removed, on a fixed set of samples.

    Score of unit u: the mean over the samples n of ``|L(n; without u) - L(n)|``, the network in eval mode. A unit that
    is removed contributes nothing to any consumer, batch norm's shift included, just as when it is cut out. Scores of
    different groups are compared as they are. Where the code splits into equal parts, one group loses a unit alone; a
    network that cannot be run in parts, as its code looks at values, loses the unit of this number in each. A loss that
    depends on other samples of the batch depends on ``rows``.

    Args:
        data: a DataLoader, a Dataset, or a pair of tensors, without augmentation: what
            ``netsurgery.passes.calibration.draw_samples`` takes.
        loss: ``loss(outputs, targets)``, the mean over the samples, or one number for each ``(n,)``. By default the
            cross-entropy of logits ``(n, classes, ...)``.
        samples: how many are drawn, class-balanced.
        mode: "score" tries each unit alone. "cumulative" removes units one after the other, each from the network that
            those before it have left, as long as the loss of the *whole network* rises by at most ``tolerance``: what
            ``PruneChannels(threshold=tolerance)`` then removes is what was tried last, and any lower threshold holds as
            well. Groups are taken in the order of the state dict, the units of each in order of the norm of their
            weights. They share the tolerance: in two rounds each may take the rise up to the share of it that its units
            and those before make up, in a third round all that is left. "per-group" tries each group where all others
            are whole: a rise of at most ``tolerance`` holds for each group alone, and *not* for the network, whose loss
            may rise by many times that.
        tolerance: the rise of the loss that is allowed, in all (mode "cumulative") or in each group ("per-group"). A
            unit's score is the highest rise up to it; beyond the tolerance scores only keep the order.
        removal: the removal that is to follow: groups that it may not take, by its ``unit``, ``include``, ``protect``
            and so on, are not scored. In mode "cumulative" what its ``multiple_of``, ``max_ratio`` and so on forbid is
            not tried either; there it has a threshold, and the tolerance holds for the removal that is given here
            (by default ``PruneChannels(threshold=tolerance)``).
        racing: try only units, and only on so many samples, as it takes to tell which are among the ``share`` of their
            group with the lowest scores: others keep an estimate. In large networks slopes of gates (see
            ``TaylorScore``) are the sieve: some units of each group, drawn at random, are tried, what slopes predict is
            fitted to them, and units near the border are tried; the same units bound what that may miss, and more are
            tried until the bound, which is logged, is good enough. A unit is tried on growing sets of samples, as long
            as it is open on which side of the border it is: estimates regress the rise, or the effect, on what slopes
            predict. At least ``confidence`` of the exact selection is expected to be found: by Clopper and Pearson's
            bound at 95% where slopes decide (on each side of the border, groups taken together), under a normal
            approximation with standard errors doubled where samples decide. The loss must return one number for each
            sample. It pays where running the network takes long.
        share: in racing, the share of each group that is to be removed.
        confidence: in racing, the share of the selection that must be expected to be right.
        seed: fixes the samples.
        rows: rows that go through the network at once; by default as many as suit the caches of a CPU, or the memory
            of a GPU, where the largest result takes a 32nd of it.
        memory: bytes of results that may be kept of a run; what does not fit is computed again.
        include: modules, as for ``PruneChannels``: only groups whose units these alone produce are scored. Others have
            no scores, and a removal that is to take some of them says so.
        exclude: likewise; no group is scored that a matching module produces or carries.
        autocast: the type in which convolutions and matrix products are computed, such as ``torch.bfloat16``; all
            else, and the loss, are in the model's own. By default everything is.
        file: results are kept there (safetensors), every few seconds and when interrupted, and are continued from.
        progress: say before it starts how long the work will take, after a few trials, and then how far it is: by a bar
            on a terminal, by lines of the logger ``netsurgery`` elsewhere.
        by: "effect", the default of mode "score": how much the loss of each sample changes, up or down. If the loss is
            a mean, each sample goes through alone, which takes longer than a loss of one number for each.
            "rise": the mean of the changes, ``L(S; without u) - L(S)``, in which they cancel. A unit of large effect
            may have a small or a negative rise; it goes first, and with others of its kind its removal may wreck the
            network. The logger ``netsurgery`` warns where the loss falls without more than a tenth of a group's units.
            Modes "cumulative" and "per-group" hold the rise of the loss against the tolerance: "rise" alone goes with
            them. After "effect", ``PruneChannels(threshold=t)`` removes each unit that alone changes the loss of a
            sample by at most t in the mean, so the loss by no more; after "rise", each without which the loss rises by
            at most t, or falls by whatever it may.

    Raises:
        InputError: no samples, data that can be read once, a loss of another shape or that is not finite, a file that
            was made for another model, other samples or other settings.

    Source: the selection of Mitsuno and Kurita, "Filter Pruning using Hierarchical Group Sparse Regularization for Deep
    Convolutional Neural Networks", arXiv 2011.02389: "the increase of the classification loss on randomly selected
    training samples", which is the rise. Not given by the source, and our choice: 1,000 samples, class-balanced, no
    augmentation, eval mode, a unit removed as if cut out, the modes, racing. The effect is the default by what was
    measured on five trained networks (``benchmarks/RESULTS.md``); Molchanov et al., "Importance Estimation for Neural
    Network Pruning", arXiv 1906.10771, square the change of the loss likewise.

    Example:
        >>> import torch, netsurgery
        >>> from netsurgery.passes import LossIncreaseScore, PruneChannels
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> data = torch.randn(64, 4), torch.randint(3, (64,))
        >>> small = netsurgery.apply(model, [LossIncreaseScore(data), PruneChannels(0.5)])
        >>> small[0]
        Linear(in_features=4, out_features=4, bias=True)
    """

    data: object = field(repr=False, compare=False)
    loss: Loss | None = None
    samples: int = 1000
    mode: Literal["score", "cumulative", "per-group"] = "score"
    tolerance: float = 0.01
    removal: PruneChannels | None = None
    racing: bool = False
    share: float = 0.5
    confidence: float = 0.95
    seed: int = 0
    rows: int | None = None
    memory: int = 2 << 30
    include: Modules = ()
    exclude: Modules = ()
    autocast: torch.dtype | None = None
    file: str | Path | None = None
    progress: bool = True
    by: Reading | None = None
    _said: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    gives: ClassVar[frozenset[str]] = frozenset({"scores"})
    labelled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in ("score", "cumulative", "per-group"):
            raise InputError(f"LossIncreaseScore(mode={self.mode!r}): 'score', 'cumulative' or 'per-group'")
        if self.by not in (None, "effect", "rise"):
            raise InputError(f"LossIncreaseScore(by={self.by!r}): 'effect' or 'rise'")
        if self.by == "effect" and self.mode != "score":
            raise InputError(
                f"LossIncreaseScore(by='effect') goes with mode='score': mode={self.mode!r} holds the rise of the loss "
                "against the tolerance"
            )
        if self.racing and self.mode != "score":
            raise InputError("LossIncreaseScore(racing=True) goes with mode='score'")
        for name in ("share", "confidence"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"LossIncreaseScore({name}={getattr(self, name)!r}): a number in (0, 1)")
        if not self.tolerance >= 0:
            raise InputError(f"LossIncreaseScore(tolerance={self.tolerance!r}): must not be negative")
        self._check_removal()
        for name in ("include", "exclude"):
            object.__setattr__(self, name, as_patterns(getattr(self, name)))

    def _check_removal(self) -> None:
        if self.removal is None or self.mode != "cumulative":
            return
        threshold = self.removal.threshold
        if threshold is None or threshold > self.tolerance:
            raise InputError(
                f"LossIncreaseScore(tolerance={self.tolerance!r}, removal={self.removal!r}): the removal needs a "
                f"threshold of at most the tolerance, PruneChannels(threshold={self.tolerance!r}, ...)"
            )

    @property
    def reading(self) -> Reading:
        """The reading that units are scored by."""
        return self.by or ("effect" if self.mode == "score" else "rise")

    @property
    def groupwise(self) -> bool:
        """True if each group is tried by itself."""
        return self.mode == "per-group" or (self.mode == "score" and not self.racing)

    def run(self, network: Network) -> Network:
        """Lay the scores on the network."""
        if not network.prunable:
            return network
        network.require_weights(self)
        effects = self.reading == "effect"
        settings = AblationSettings(
            self.loss, self.rows, self.memory, self.autocast, self.progress, each=effects, compared=self.racing
        )
        ablation = Ablation(settings, self._scoped(network), self.drawn())
        ablation.check()
        race_of = (self.share, self.confidence, [*ablation.everything()]) if self.racing else None
        tolerance = self.tolerance if self.mode != "score" else None
        key = f"{self.reading} {ablation.fingerprint(self.mode, race_of, tolerance)}"
        checkpoint = ScoreCheckpoint(key, Path(self.file) if self.file is not None else None)
        checkpoint.load()
        with ablation.report.running(), checkpoint.kept():
            if self.mode != "score" and self.progress and not checkpoint.entries:
                time_trials(ablation, ablation.rows_left(checkpoint, ablation.everything()))
            if self.racing:
                scores = race(ablation, checkpoint, self.reading, self.share, self.confidence, self.seed)
            elif self.mode == "cumulative":
                removal = self.removal or PruneChannels(threshold=self.tolerance)
                scores = cumulative(ablation, checkpoint, removal, self.tolerance)
            elif self.mode == "per-group":
                scores = per_group(ablation, checkpoint, self.tolerance)
            else:
                scores = self._exact(ablation, checkpoint)
        if self.mode == "score" and self.reading == "rise":
            warn_of_falls("LossIncreaseScore(by='rise')", scores, self._said)
        return network.with_scores(scores, comparable=True)

    def _scoped(self, network: Network) -> Network:
        """The network with locks on all groups that are not to be scored."""
        return scoped(network, as_patterns(self.include), as_patterns(self.exclude), self.removal)

    def _exact(self, ablation: Ablation, checkpoint: ScoreCheckpoint) -> dict[str, Tensor]:
        left = ablation.rows_left(checkpoint, ablation.everything())
        forecast = time_trials(ablation, left, could_race=True) if self.progress else None
        ablation.report.begin("every unit", left, None if forecast is None else forecast.rate)
        ablation.extend(checkpoint, ablation.everything(), ablation.samples.count, _SUMS[self.reading])
        return {group.name: checkpoint.means(group.name) for group in ablation.network.prunable}


_SUMS: dict[Reading, Terms] = {
    "effect": lambda name, units, loss_deltas, start: loss_deltas.abs().sum(1)[None],
    "rise": lambda name, units, loss_deltas, start: loss_deltas.sum(1)[None],
}
