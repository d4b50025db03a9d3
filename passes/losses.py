"""The loss of each sample, and checks of targets and losses without which its rise means nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from netsurgery.errors import InputError
from netsurgery.passes.calibration import IGNORED

__all__ = [
    "Loss", "check_mean", "check_targets", "cross_entropy", "form_of", "ignored_by", "logits_in", "loss_of",
    "twice_over",
]  # fmt: skip

Loss = Callable[[Any, Any], Tensor]
_OWN = "pass loss=f(outputs, targets)"


def ignored_by(loss: Loss | None) -> int:
    """The label that a loss leaves out."""
    return int(getattr(loss, "ignore_index", IGNORED))


def logits_in(outputs: object) -> Tensor | None:
    """The part of a model's output that may be logits: a tensor, or its entry or attribute ``logits``."""
    named = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", outputs)
    return named if isinstance(named, Tensor) and named.is_floating_point() and named.dim() > 1 else None


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of logits ``(n, classes, ...)``, ``(n,)``: the mean over the positions that have a label."""
    logits = logits if logits.dtype.itemsize >= 4 else logits.float()
    if targets.is_floating_point():
        return F.cross_entropy(logits, targets.to(logits.dtype), reduction="none").reshape(len(logits), -1).mean(1)
    labels = targets.long()
    found = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED).reshape(len(logits), -1)
    return found.sum(1) / (labels != IGNORED).reshape(len(logits), -1).sum(1).clamp_min(1)


def loss_of(outputs: object, targets: object, loss: Loss | None = None) -> Tensor:
    """The loss of samples: their mean, or one number for each, ``(n,)``; by default the cross-entropy.

    Raises:
        InputError: the loss is of another shape.
    """
    rows = len(pytree.tree_leaves(targets)[0])
    own: Loss = cross_entropy if loss is None else loss
    found = own(outputs, targets)
    if not isinstance(found, Tensor) or found.shape not in ((), (rows,)):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InputError(f"the loss of {rows} samples is {shape}: return the mean, or one number for each")
    return found


def form_of(value: object) -> str:
    """The type and shape of a tensor, in words; the class of anything else."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def check_targets(logits: object, targets: object, everything: object) -> None:
    """Make sure that targets are classes, or shares of them, for logits ``(n, classes, ...)``.

    Args:
        targets: the targets of the same samples.
        everything: the targets of all samples.

    Raises:
        InputError: they are neither; there are fewer than two classes; labels are out of range; or the dimension that
            holds the classes cannot be told.
    """
    if not isinstance(logits, Tensor):
        raise InputError(f"the model returns {type(logits).__name__}, not logits: {_OWN}")
    both = f"the model returns {tuple(logits.shape)} and targets are {form_of(targets)}"
    whole = isinstance(targets, Tensor) and not targets.is_floating_point() and not targets.is_complex()
    wanted = (logits.shape[0], *logits.shape[2:]) if whole else logits.shape
    if not isinstance(targets, Tensor) or targets.is_complex() or logits.dim() < 2 or targets.shape != wanted:
        raise InputError(f"{both}, neither classes nor their shares: {_OWN}")
    if logits.shape[1] < 2:
        raise InputError(f"{both}: that is one class, of which the cross-entropy is always zero: {_OWN}")
    assert isinstance(everything, Tensor)  # as the targets of some samples are
    clash = _clash_of_labels if whole else _clash_of_shares
    if why := clash(logits, everything):
        raise InputError(f"{both}, {why}: {_OWN}")


def _clash_of_labels(logits: Tensor, targets: Tensor) -> str:
    """The reason why integers are no labels of the classes of logits; empty if they are."""
    if logits.dim() > 2 and logits.shape[:-1] == (logits.shape[0], *logits.shape[2:]):
        return "which fit classes in dimension 1 and classes in the last"
    labels = targets[targets != IGNORED].long()
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        return (
            f"but labels go from {int(labels.min())} to {int(labels.max())} where there are {logits.shape[1]} classes"
        )
    return ""


def _clash_of_shares(logits: Tensor, targets: Tensor) -> str:
    """The reason why numbers are no shares of the classes of logits; empty if they are."""
    sums, least = targets.double().sum(1), float(targets.min())
    if least < 0 or not _ones(sums):
        return (
            f"no shares of classes: the least is {least:.3g}, and their sums over dimension 1 go from "
            f"{float(sums.min()):.3g} to {float(sums.max()):.3g}"
        )
    if logits.dim() > 2 and _ones(targets.double().sum(-1)):
        return "which fit classes in dimension 1 and classes in the last"
    return ""


def _ones(sums: Tensor) -> bool:
    return bool(((sums - 1).abs() < 1e-2).all())


def twice_over(once: Sequence[Tensor], twice: Sequence[Tensor]) -> list[Tensor] | None:
    """The outputs of samples joined with themselves; a run on twice the rows tells which dimension holds rows.

    None where a run on twice as many does not differ by rows alone.
    """
    doubled = []
    for one, two in zip(once, twice, strict=True):
        dims = [dim for dim, (a, b) in enumerate(zip(one.shape, two.shape, strict=True)) if a != b]
        if len(dims) > 1 or any(two.shape[dim] != 2 * one.shape[dim] for dim in dims):
            return None
        doubled.append(torch.cat([one, one], dims[0]) if dims else one)
    return doubled


def check_mean(once: float, twice: float, several: bool) -> None:
    """Make sure that a loss is a mean over the samples.

    Args:
        once: the loss of some samples.
        twice: the loss of the same samples twice over.
        several: whether the samples go through in several batches.

    Raises:
        InputError: it is a sum, or depends on how many samples there are.
    """
    if math.isclose(twice, once, rel_tol=1e-3) or not (math.isfinite(once) and math.isfinite(twice)):
        return
    means = "return the mean, or one number for each sample, (n,), as reduction='none' does"
    if math.isclose(twice, 2 * once, rel_tol=1e-3):
        raise InputError(f"the loss of the same samples twice over is twice as high, {twice:.4g}: it is a sum; {means}")
    if several or math.isclose(once, 2 * twice, rel_tol=1e-3):
        raise InputError(
            f"the loss of the same samples twice over is {twice:.4g} instead of {once:.4g}, so it depends on how many "
            f"go through at once: {means}"
        )
