"""Scores from one backward pass: the change of the loss when a gate on each unit begins to close."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from netsurgery.analysis.network import Network
from netsurgery.errors import InputError
from netsurgery.passes.ablation import Ablation, AblationSettings
from netsurgery.passes.gate_gradients import gate_slopes
from netsurgery.passes.losses import Loss
from netsurgery.passes.readings import Reading, warn_of_falls
from netsurgery.passes.reporting import DataPass

__all__ = ["FisherScore", "TaylorScore"]


@dataclass(frozen=True)
class _GateScore(DataPass):
    data: object = field(repr=False, compare=False)
    loss: Loss | None = None
    samples: int = 1000
    seed: int = 0
    rows: int | None = None

    gives: ClassVar[frozenset[str]] = frozenset({"scores"})
    labelled: ClassVar[bool] = True

    @property
    def groupwise(self) -> bool:
        """Each group has gates of its own."""
        return True

    def run(self, network: Network) -> Network:
        """Lay the scores on the network."""
        if not network.prunable:
            return network
        network.require_weights(self)
        ablation = Ablation(AblationSettings(self.loss, self.rows), network, self.drawn())
        ablation.check()
        slopes = gate_slopes(ablation)
        for name, slope in slopes.items():
            if not bool(slope.isfinite().all()):
                raise InputError(
                    f"{type(self).__name__}: gradients at group '{name}' are not finite: look for NaN and infinity "
                    "in the data, and for a loss that is infinite on it"
                )
        scores = {name: self.score(slope) for name, slope in slopes.items()}
        self.report(scores)
        return network.with_scores(scores, comparable=True)

    def score(self, slopes: Tensor) -> Tensor:
        """Scores ``(units,)`` from the slopes ``(samples, units)``."""
        raise NotImplementedError

    def report(self, scores: Mapping[str, Tensor]) -> None:
        """Warn of scores that may mislead."""


@dataclass(frozen=True)
class TaylorScore(_GateScore):
    """The change of the loss on removal as a Taylor expansion predicts it, from one backward pass.

    A gate multiplies each unit wherever it is read; a_n is the derivative of the loss of sample n by it. First order:
    mean_n |a_n|. Second order: mean_n |a_n²/2 - a_n|.

    Args:
        data: as for ``LossIncreaseScore``.
        loss: likewise.
        samples: likewise.
        seed: likewise.
        rows: likewise.
        order: 1 or 2.
        by: "effect": how much the loss of each sample changes, up or down. "rise", of second order: mean_n (a_n²/2 -
            a_n), in which the changes of samples cancel: units of large effect may have a small or negative rise and go
            first (see ``LossIncreaseScore``). The logger ``netsurgery`` warns where more than a tenth of a group's are
            negative. The first order has no rise: its mean vanishes where the loss is at a minimum.

    Raises:
        InputError: as ``LossIncreaseScore`` does; the first order by the rise; or a network that cannot be run in
            parts.

    Source: Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference", arXiv 1611.06440
    (first order), and "Importance Estimation for Neural Network Pruning", arXiv 1906.10771 (second order). Our choice,
    where these do otherwise: the gate on coupled units at all their readers. First order: the first paper averages
    activation times gradient over the positions of a feature map, a gate's slope is their sum; and it divides scores
    by the L2 norm of those of their layer, here they stay rises of the loss (``PruneChannels(normalize=...)`` divides).
    Second order: the Fisher information a_n² stands for the second derivative. The second paper squares the change of a
    minibatch's loss, of either order, and averages the squares over minibatches (its experiments with single samples
    for minibatches too); that is the effect, but for the root: the mean absolute change of samples did better than the
    mean square, and far better than the absolute value or the square of the mean over all samples
    (``benchmarks/RESULTS.md``).

    Example:
        >>> import torch, netsurgery
        >>> from netsurgery.passes import TaylorScore
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> data = torch.randn(64, 4), torch.randint(3, (64,))
        >>> TaylorScore(data).run(netsurgery.trace(model)).scores["0"].shape
        torch.Size([8])
    """

    order: Literal[1, 2] = 1
    by: Reading = "effect"
    _said: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in (1, 2):
            raise InputError(f"TaylorScore(order={self.order!r}): 1 or 2")
        if self.by not in ("effect", "rise"):
            raise InputError(f"TaylorScore(by={self.by!r}): 'effect' or 'rise'")
        if self.by == "rise" and self.order == 1:
            raise InputError("TaylorScore(by='rise') goes with order=2: of first order it vanishes at a minimum")

    def score(self, slopes: Tensor) -> Tensor:
        """Scores ``(units,)`` from the slopes ``(samples, units)``."""
        changes = -slopes if self.order == 1 else slopes.square() / 2 - slopes
        return (changes.abs() if self.by == "effect" else changes).mean(0)

    def report(self, scores: Mapping[str, Tensor]) -> None:
        """Say once where many rises are negative."""
        if self.by == "rise":
            warn_of_falls("TaylorScore(order=2, by='rise')", scores, self._said)


@dataclass(frozen=True)
class FisherScore(_GateScore):
    """Half the Fisher information of a gate on each unit, from one backward pass: mean_n a_n²/2, as in ``TaylorScore``.

    Args:
        data: as for ``LossIncreaseScore``.
        loss: likewise.
        samples: likewise.
        seed: likewise.
        rows: likewise.

    Source: Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", arXiv 1801.05787; the gate on
    coupled units at all their readers as in Liu et al., "Group Fisher Pruning", arXiv 2108.00708.

    Example:
        >>> import torch, netsurgery
        >>> from netsurgery.passes import FisherScore
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> data = torch.randn(64, 4), torch.randint(3, (64,))
        >>> bool((FisherScore(data).run(netsurgery.trace(model)).scores["0"] >= 0).all())
        True
    """

    def score(self, slopes: Tensor) -> Tensor:
        """Scores ``(units,)`` from the slopes ``(samples, units)``."""
        return slopes.square().mean(0) / 2
