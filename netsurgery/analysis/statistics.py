"""Statistics over the units that stay: the operation runs on a tensor of these alone, and zeros fill the rest."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from netsurgery.analysis.rules import reduced
from netsurgery.capture.inputs import Kwargs, Tree

__all__ = ["STATISTICS", "Kept"]

aten = torch.ops.aten

Kept = Sequence[Tensor | None]  # for each dimension the positions that stay, ascending; None for all
Parts = Tensor | list[Tensor | None]  # the result of an operation; None for statistics that nothing reads
Statistic = Callable[[Callable[..., Tree], Kwargs, Kept], Parts]


def _cut(tensor: Tensor, kept: Kept) -> Tensor:
    """The entries of a tensor that stay."""
    for dim, where in enumerate(kept):
        if where is not None:
            tensor = tensor.index_select(dim, where)
    return tensor


def _cut_all(arguments: Kwargs, names: Sequence[str], kept: Kept) -> dict[str, Tensor | None]:
    """The entries that stay of some arguments, None of those that are not given."""
    return {name: None if arguments[name] is None else _cut(arguments[name], kept) for name in names}


def _among_zeros(part: Tensor, sizes: Sequence[int], kept: Kept) -> Tensor:
    """A tensor of some sizes that holds ``part`` where it stays, and zeros elsewhere."""
    for dim, where in enumerate(kept):
        if where is not None:
            shape = [*part.shape[:dim], sizes[dim], *part.shape[dim + 1 :]]
            part = part.new_zeros(shape).index_copy_(dim, where, part)
    return part


def _reduction(vanish: bool, operation: Callable[..., Tree], arguments: Kwargs, kept: Kept) -> Parts:
    """Reduce along some dimensions, or normalise along them.

    Args:
        vanish: True if the dimensions worked along vanish, or become 1 by ``keepdim``; else all keep their sizes.
    """
    x: Tensor = arguments["self"]
    found = operation(**{**arguments, "self": _cut(x, kept)})
    along = reduced(arguments.get("dim"), x.dim()) if vanish else set[int]()
    dims = [dim for dim in range(x.dim()) if dim not in along or arguments.get("keepdim", False)]
    sizes = [1 if dim in along else x.shape[dim] for dim in dims]
    places = [None if dim in along else kept[dim] for dim in dims]
    if isinstance(found, Tensor):
        return _among_zeros(found, sizes, places)
    return [_among_zeros(part, sizes, places) for part in found]


def _batch_norm(operation: Callable[..., Tree], arguments: Kwargs, kept: Kept) -> Parts:
    """In training mode: the result does not depend on running statistics, which would be written to."""
    x: Tensor = arguments["input"]
    units = _cut_all(arguments, ("weight", "bias"), [kept[1]])
    none = {"running_mean": None, "running_var": None}
    out, *_ = operation(**{**arguments, **units, **none, "input": _cut(x, kept)})
    return [_among_zeros(out, x.shape, kept), None, None]


def _layer_norm(operation: Callable[..., Tree], arguments: Kwargs, kept: Kept) -> Parts:
    x: Tensor = arguments["input"]
    small, last = _cut(x, kept), len(arguments["normalized_shape"])
    units = _cut_all(arguments, ("weight", "bias"), kept[-last:])
    out, *_ = operation(**{**arguments, **units, "input": small, "normalized_shape": small.shape[-last:]})
    return [_among_zeros(out, x.shape, kept), None, None]


def _group_norm(operation: Callable[..., Tree], arguments: Kwargs, kept: Kept) -> Parts:
    """Each group loses equally many channels, or all."""
    x: Tensor = arguments["input"]
    small, group = _cut(x, kept), arguments["group"]
    if not small.numel():
        return [torch.zeros_like(x), None, None]
    if kept[1] is not None:
        group = len((kept[1] // (x.shape[1] // group)).unique())
    units = _cut_all(arguments, ("weight", "bias"), [kept[1]])
    sizes = {"N": small.shape[0], "C": small.shape[1], "HxW": math.prod(small.shape[2:]), "group": group}
    out, *_ = operation(**{**arguments, **units, **sizes, "input": small})
    return [_among_zeros(out, x.shape, kept), None, None]


#: By operation a function that calls it, with arguments by name, on the units of the first argument that stay.
STATISTICS: dict[object, Statistic] = {
    **{
        one: functools.partial(_reduction, True)
        for one in (
            aten.mean, aten.amax, aten.amin, aten.aminmax, aten.max, aten.min, aten.prod, aten.all, aten.var,
            aten.var_mean, aten.std, aten.std_mean, aten.logsumexp, aten.norm, aten.linalg_vector_norm,
        )
    },
    **{
        one: functools.partial(_reduction, False)
        for one in (aten._softmax, aten._safe_softmax, aten._log_softmax)
    },
    aten.native_batch_norm: _batch_norm,
    aten.native_layer_norm: _layer_norm,
    aten.native_group_norm: _group_norm,
}  # fmt: skip
