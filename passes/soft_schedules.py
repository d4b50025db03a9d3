"""Schedules of soft filter pruning: the pruned share after an epoch, the factor of weights, the final share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, log
from typing import Literal

__all__ = ["METHODS", "Method", "Schedule", "hard_share", "pruned_share", "soft_factor"]

Method = Literal["sfp", "asfp", "srfp", "asrfp", "hfp", "ghfp"]


def pruned_share(epoch: int, epochs: int, ratio: float, *, delay: float = 1 / 8, pinned: float = 0.05) -> float:
    """The share of filters that is pruned after an epoch: ``ratio * (1 - exp(-k * epoch))``, and ``ratio`` at the end.

    Args:
        epoch: from 0 to epochs - 1.
        ratio: the share in the end.
        delay: three quarters of the ratio are reached after this share of the epochs.
        pinned: for this share of the epochs, at the end, but at least for the last one, it is the ratio itself.

    Source: asymptotic soft filter pruning, He et al., arXiv 1808.07471. Pinning makes the end reach the ratio.

    Example:
        >>> from netsurgery.passes.soft import pruned_share
        >>> [round(pruned_share(t, 200, 0.4), 3) for t in (0, 25, 50, 199)]
        [0.0, 0.3, 0.375, 0.4]
    """
    if _is_last(epoch, epochs, pinned):
        return ratio
    return ratio * (1 - exp(-log(4) * epoch / (delay * epochs)))


def soft_factor(epoch: int, epochs: int, *, start: float = 1.0, end: float = 1e-5, zero: float = 0.1) -> float:
    """The factor of pruned filters after an epoch: from ``start`` exponentially to ``end``, and 0 at the end.

    Args:
        epoch: from 0 to epochs - 1.
        zero: for this share of the epochs, at the end, but at least for the last one, the factor is 0.

    Source: softer pruning, Cai et al., arXiv 2010.09498.

    Example:
        >>> from netsurgery.passes.soft import soft_factor
        >>> [round(soft_factor(t, 200), 3) for t in (0, 25, 50, 180)]
        [1.0, 0.237, 0.056, 0.0]
    """
    if start == 0 or _is_last(epoch, epochs, zero):
        return 0.0
    return float(start * (end / (start + 0.01 * end)) ** (epoch / epochs))


def hard_share(epoch: int, epochs: int) -> float:
    """The share of the pruned filters that may not come back after an epoch: ``1 - (1 - (epoch + 1) / epochs)^3``.

    Args:
        epoch: from 0 to epochs - 1.

    Source: gradually hard filter pruning, Cai et al., arXiv 2011.03170.

    Example:
        >>> from netsurgery.passes.soft import hard_share
        >>> [round(hard_share(t, 200), 3) for t in (25, 100, 199)]
        [0.341, 0.879, 1.0]
    """
    return 1 - (1 - (epoch + 1) / epochs) ** 3


def _is_last(epoch: int, epochs: int, share: float) -> bool:
    return epochs - epoch <= max(1.0, share * epochs + 1e-9)


@dataclass(frozen=True)
class Schedule:
    """The schedule of a method of soft filter pruning.

    Attributes:
        asymptotic: whether the pruned share grows, by ``pruned_share``; else it is the ratio from the beginning.
        softer: whether pruned filters are multiplied by ``soft_factor``; else by 0.
        hard: the share of the pruned filters that may not come back, from the epoch and the number of epochs; None
            where all may.
    """

    asymptotic: bool = False
    softer: bool = False
    hard: Callable[[int, int], float] | None = None

    def at(self, epoch: int, epochs: int, ratio: float, settle: float) -> tuple[float, float, float]:
        """The pruned share, the factor of soft filters and the share pruned for good after an epoch.

        Args:
            settle: the share of the epochs, at the end, in which the whole ratio is pruned for good.
        """
        share = pruned_share(epoch, epochs, ratio, pinned=max(0.05, settle)) if self.asymptotic else ratio
        factor = soft_factor(epoch, epochs) if self.softer else 0.0
        hard = self.hard(epoch, epochs) if self.hard is not None else 0.0
        return share, factor, 1.0 if _is_last(epoch, epochs, settle) else hard


#: The methods by their names, as in the table of ``SoftPruning``.
METHODS: dict[str, Schedule] = {
    "sfp": Schedule(),
    "asfp": Schedule(asymptotic=True),
    "srfp": Schedule(softer=True),
    "asrfp": Schedule(asymptotic=True, softer=True),
    "hfp": Schedule(hard=lambda epoch, epochs: 1.0),
    "ghfp": Schedule(softer=True, hard=hard_share),
}
