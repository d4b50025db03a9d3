"""Samples to learn from, samples that are held out, and what a teacher says of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from netsurgery.arguments import is_real
from netsurgery.capture.meta_run import home
from netsurgery.errors import InputError
from netsurgery.passes.calibration import Samples, draw_samples, in_eval_mode, outputs_of
from netsurgery.passes.losses import logits_in

__all__ = ["Split", "logits_of", "read"]

_ALL = 2**62  # samples: as many as there are
_ROWS = 256  # that go through a network at once where nothing is trained


@dataclass(frozen=True)
class Split:
    """Samples for a search.

    Attributes:
        train: to learn from.
        held: to compare candidates on.
        teacher: its logits for ``train``, ``(n, classes, ...)``.
    """

    train: Samples
    held: Samples
    teacher: Tensor | None = None

    def taught(self, teacher: nn.Module) -> Split:
        """With the logits of a teacher."""
        return replace(self, teacher=logits_of(teacher, self.train))


def read(data: Any, validation: Any, seed: int) -> Split:
    """Read all samples, and hold some out.

    Args:
        data: as ``LossIncreaseScore`` takes it.
        validation: the share of each class that is held out, or other samples.
        seed: fixes which.

    Raises:
        InputError: no samples, or none with labels; a share out of range.
    """
    samples = _labelled(data, seed)
    if not is_real(validation):
        return Split(samples, _labelled(validation, seed))
    if not 0 < validation < 1:
        raise InputError(f"validation={validation!r}: the share of the data to hold out, in (0, 1), or other data")
    held = _held_out(samples, float(validation), seed)
    if not 0 < int(held.sum()) < samples.count:
        raise InputError(f"validation={validation!r} of {samples.count} samples leaves none to learn or none to hold")
    return Split(samples.of((~held).nonzero().flatten()), samples.of(held.nonzero().flatten()))


def _labelled(data: Any, seed: int) -> Samples:
    if isinstance(data, Tensor) or (isinstance(data, tuple) and len(data) == 2 and data[1] is None):
        raise InputError("the data has no labels: pass (inputs, targets), or a Dataset or DataLoader of such")
    return draw_samples(data, _ALL, seed)


def _held_out(samples: Samples, share: float, seed: int) -> Tensor:
    """The samples that are held out, bool ``(n,)``: the same share of each class."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(samples.count, generator=generator)
    targets = samples.targets
    classes = torch.zeros(samples.count)
    if isinstance(targets, Tensor) and targets.dim() == 1 and not targets.is_floating_point():
        classes = targets[order]
    held = torch.zeros(samples.count, dtype=torch.bool)
    for one in classes.unique():
        own = order[classes == one]
        held[own[: round(share * len(own))]] = True
    return held


@torch.no_grad()
def logits_of(model: nn.Module, samples: Samples) -> Tensor:
    """The logits of a network in eval mode, on the CPU.

    Raises:
        InputError: it does not run on the samples, or returns no logits.
    """
    device, found = home(model), []
    with in_eval_mode(model):
        for inputs, _ in samples.batches(_ROWS, device):
            logits = logits_in(outputs_of(model, inputs, device))
            if logits is None:
                raise InputError(f"{type(model).__name__} returns no logits (n, classes, ...)")
            found.append(logits.cpu())
    return torch.cat(found)
