"""The distance of a smaller network from the original on samples: a value that reads as a line."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Measured"]


@dataclass(frozen=True)
class Measured:
    """The outputs of a smaller model compared with the original's on the same samples, in eval mode.

    Attributes:
        samples: how many; 0 where nothing could be measured.
        loss: the mean loss of the model and of the smaller one, where the samples have targets that it fits.
        agreement: the share of samples (or of positions that have a label) whose largest logit is that of the original.
        kl: the Kullback-Leibler divergence of the smaller one's classes from the original's, its mean over these.
        error: the norm of the difference of all outputs over that of the original's.
        why: what could not be measured, and why; empty where everything could.

    Example:
        >>> from netsurgery.fidelity import Measured
        >>> print(Measured(96, loss=(0.41, 1.52), agreement=0.78125, kl=0.83, error=0.6))
        on 96 samples: loss 0.41 -> 1.52, agreement with the original 78.1% (KL 0.83)
        >>> print(Measured(96, error=0.123, why="no loss: the model returns dict, not logits"))
        on 96 samples: outputs differ by 12.3% (no loss: the model returns dict, not logits)
    """

    samples: int
    loss: tuple[float, float] | None = None
    agreement: float | None = None
    kl: float | None = None
    error: float | None = None
    why: str = ""

    def __str__(self) -> str:
        found = []
        if self.loss is not None:
            found.append(f"loss {self.loss[0]:.3g} -> {self.loss[1]:.3g}")
        if self.agreement is not None:
            kl = "" if self.kl is None else f" (KL {self.kl:.2f})"
            found.append(f"agreement with the original {100 * self.agreement:.1f}%{kl}")
        if self.error is not None and (self.agreement is None or self.loss is None):
            found.append(f"outputs differ by {100 * self.error:.3g}%")
        if not found:
            return f"not measured: {self.why}"
        return f"on {self.samples:,} samples: {', '.join(found)}" + (f" ({self.why})" if self.why else "")
