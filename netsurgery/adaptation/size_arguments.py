"""Which integers of a call are sizes of dimensions: those of ``view``, the bounds of slices, the parts of ``split``.

``SIZES`` is the table, from the name of a torch function to a function of its arguments. Each returns the arguments in
one fixed order, and where among them a size stands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from netsurgery.axes import Axis, concat

__all__ = ["SIZES", "CallDims", "Size", "size_arguments"]

Size = tuple[tuple[int, ...], Axis]  # the place of an integer among a node's arguments, and its dimension
Sized = tuple[list[Any], list[Size]]


@dataclass
class CallDims:
    """The dimensions of the tensors of one call, and the recorded operations that it ran.

    Attributes:
        dims: by id of a tensor: the axes of its dimensions.
        operations: the recorded operations.
    """

    dims: dict[int, Any]
    operations: list[fx.Node] = field(default_factory=list)

    def of(self, tensor: Tensor) -> tuple[Axis, ...]:
        return self.dims[id(tensor)]  # type: ignore[no-any-return]

    def start(self) -> Axis | None:
        """The dimension before the part that the first operation with a start takes."""
        return next((node.meta.get("expected", {}).get("start") for node in self.operations), None)


def size_arguments(name: str, args: list[Any], kwargs: dict[str, Any], dims: CallDims, out: Any) -> Sized:
    """The arguments of a call in one fixed order, and which of its integers are sizes of dimensions.

    Args:
        kwargs: keyword arguments; those that move into the list are removed here.
        out: the result of the call.
    """
    return SIZES[name](args, kwargs, dims, out) if name in SIZES else (args, [])


def _take(args: list[Any], kwargs: dict[str, Any], position: int, *keys: str, default: Any = None) -> Any:
    """An argument given by position or under one of some names."""
    given = next((kwargs.pop(key) for key in keys if key in kwargs), None)
    return given if given is not None else args[position] if len(args) > position else default


def _listed(args: list[Any], kwargs: dict[str, Any], first: int, *keys: str) -> list[Any]:
    """Sizes given as one list, one by one, or by keyword."""
    given = next((kwargs.pop(key) for key in keys if key in kwargs), args[first:])
    return list(given[0]) if len(given) == 1 and isinstance(given[0], tuple | list) else list(given)


def _view(args: list[Any], kwargs: dict[str, Any], dims: CallDims, out: Any) -> Sized:
    if isinstance(args[-1], torch.dtype):
        return args, []
    sizes = _listed(args, kwargs, 1, "size", "shape")
    return [args[0], *sizes], [((1 + i,), axis) for i, axis in enumerate(dims.of(out))]


def _new(args: list[Any], kwargs: dict[str, Any], dims: CallDims, out: Any) -> Sized:
    """``torch.zeros`` and the like."""
    return [_listed(args, kwargs, 0, "size")], [((0, i), axis) for i, axis in enumerate(dims.of(out))]


def _new_like(args: list[Any], kwargs: dict[str, Any], dims: CallDims, out: Any) -> Sized:
    """``x.new_zeros`` and the like."""
    sizes = _listed(args, kwargs, 1, "size")
    return [args[0], sizes], [((1, i), axis) for i, axis in enumerate(dims.of(out))]


def _unflatten(args: list[Any], kwargs: dict[str, Any], dims: CallDims, out: Any) -> Sized:
    dim, sizes = _take(args, kwargs, 1, "dim"), list(_take(args, kwargs, 2, "sizes", default=()))
    first = dim % args[0].dim()
    return [args[0], dim, sizes], [((2, i), dims.of(out)[first + i]) for i in range(len(sizes))]


def _split(args: list[Any], kwargs: dict[str, Any], dims: CallDims, out: Any) -> Sized:
    given = _take(args, kwargs, 1, "split_size", "split_size_or_sections", "split_sizes")
    dim = _take(args, kwargs, 2, "dim", default=0)
    parts = [dims.of(part)[dim] for part in out]
    if isinstance(given, int):
        return [args[0], given, dim], [((1,), parts[0])]
    return [args[0], list(given), dim], [((1, i), part) for i, part in enumerate(parts)]


def _narrow(args: list[Any], kwargs: dict[str, Any], dims: CallDims, out: Any) -> Sized:
    before = dims.start()
    length: Size = (3,), dims.of(out)[args[1]]
    return args, [length] if before is None else [length, ((2,), before)]


def _normalized(args: list[Any], kwargs: dict[str, Any], dims: CallDims, out: Any) -> Sized:
    """``layer_norm`` and ``rms_norm``."""
    shape = list(_take(args, kwargs, 1, "normalized_shape", default=()))
    own = dims.of(args[0])[-len(shape) :]
    return [args[0], shape, *args[2:]], [((1, i), axis) for i, axis in enumerate(own)]


def _group_norm(args: list[Any], kwargs: dict[str, Any], dims: CallDims, out: Any) -> Sized:
    groups = [node.meta["names"]["g"] for node in dims.operations if "g" in node.meta.get("names", {})]
    return args, [((1,), groups[0])] if groups and len(args) > 1 else []


def _getitem(args: list[Any], kwargs: dict[str, Any], dims: CallDims, out: Any) -> Sized:
    index = list(args[1]) if isinstance(args[1], tuple) else [args[1]]
    return [args[0], tuple(index)], _bounds(args[0], index, dims)


def _bounds(x: Tensor, index: list[Any], dims: CallDims) -> list[Size]:
    """The bounds of slices. Torch ran one recorded operation for each of these slices, in the same order."""
    slices = iter([node for node in dims.operations if node.target is torch.ops.aten.slice.Tensor])
    sizes: list[Size] = []
    taken = sum(1 for item in index if item is not None and item is not Ellipsis)
    dim = 0
    for place, item in enumerate(index):
        if isinstance(item, slice) and item.indices(x.shape[dim]) != (0, x.shape[dim], 1):
            sizes += _slice_bounds(place, item, next(slices, None))
        dim += x.dim() - taken if item is Ellipsis else item is not None
    return sizes


def _slice_bounds(place: int, item: slice, node: fx.Node | None) -> list[Size]:
    """The start and stop of one slice that are given and are sizes."""
    before = node.meta.get("expected", {}).get("start") if node is not None else None
    if node is None or before is None:
        return []
    end = concat([before, node.meta["dims"][node.args[1] if len(node.args) > 1 else 0]])
    bounds = (((1, place, 0), before, item.start), ((1, place, 1), end, item.stop))
    return [(where, axis) for where, axis, bound in bounds if bound is not None]


#: By the name of a torch function: its arguments in order, and the sizes among them.
SIZES: dict[str, Callable[[list[Any], dict[str, Any], CallDims, Any], Sized]] = {
    **dict.fromkeys(("view", "reshape", "expand"), _view),
    **dict.fromkeys(("zeros", "ones", "empty", "rand", "randn"), _new),
    **dict.fromkeys(("new_zeros", "new_ones", "new_empty"), _new_like),
    "unflatten": _unflatten,
    **dict.fromkeys(("split", "split_with_sizes"), _split),
    "__getitem__": _getitem,
    "narrow": _narrow,
    **dict.fromkeys(("layer_norm", "rms_norm"), _normalized),
    "group_norm": _group_norm,
}
