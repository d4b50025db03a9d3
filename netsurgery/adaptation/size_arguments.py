"""The integers of a call that are sizes of dimensions: those of ``view``, the bounds of slices, the parts of ``split``.

``SIZES`` is the table, from the name of a torch function to a function of its call. Each returns the arguments in one
fixed order, and the places of sizes among them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from netsurgery.axes import Axis, Dims, concat
from netsurgery.capture.inputs import Kwargs, Tree

__all__ = ["SIZES", "Size", "TorchCall", "size_arguments"]

Size = tuple[tuple[int, ...], Axis]  # the place of an integer among a node's arguments, and its dimension
Sized = tuple[list[Tree], list[Size]]


@dataclass
class TorchCall:
    """One call of a torch function.

    Attributes:
        args, kwargs: its arguments; those that one of the functions below moves into its list go from ``kwargs``.
        out: its result.
        known: by id of a tensor its dimensions.
        operations: the recorded operations that it ran.
    """

    args: list[Tree]
    kwargs: Kwargs
    out: Tree
    known: dict[int, Dims]
    operations: list[fx.Node]

    def dims(self, tensor: Tensor) -> Dims:
        """The dimensions of a tensor."""
        return self.known[id(tensor)]

    def start(self) -> Axis | None:
        """The dimension before the part that the first operation with a start takes."""
        return next((node.meta.get("expected", {}).get("start") for node in self.operations), None)

    def take(self, position: int, *keys: str, default: Tree = None) -> Tree:
        """An argument given by position or under one of some names."""
        given = next((self.kwargs.pop(key) for key in keys if key in self.kwargs), None)
        return given if given is not None else self.args[position] if len(self.args) > position else default

    def listed(self, first: int, *keys: str) -> list[Tree]:
        """Sizes given as one list, one by one, or by keyword."""
        given = next((self.kwargs.pop(key) for key in keys if key in self.kwargs), self.args[first:])
        return list(given[0]) if len(given) == 1 and isinstance(given[0], tuple | list) else list(given)

    def parts(self) -> list[Axis]:
        """The dimension of each part that ``chunk`` and the like make."""
        dim: Tree = self.kwargs.get("dim", self.args[2] if len(self.args) > 2 else 0)
        return [self.dims(part)[dim] for part in self.out]


def size_arguments(name: str, call: TorchCall) -> Sized:
    """The arguments of a call of a function in one fixed order, and the sizes of dimensions among them."""
    return SIZES[name](call) if name in SIZES else (call.args, [])


def _view(call: TorchCall) -> Sized:
    if isinstance(call.args[-1], torch.dtype):
        return call.args, []
    sizes = call.listed(1, "size", "shape")
    return [call.args[0], *sizes], [((1 + i,), axis) for i, axis in enumerate(call.dims(call.out))]


def _new(call: TorchCall) -> Sized:
    """``torch.zeros`` and the like."""
    return [call.listed(0, "size")], [((0, i), axis) for i, axis in enumerate(call.dims(call.out))]


def _new_like(call: TorchCall) -> Sized:
    """``x.new_zeros`` and the like."""
    sizes = call.listed(1, "size")
    return [call.args[0], sizes], [((1, i), axis) for i, axis in enumerate(call.dims(call.out))]


def _unflatten(call: TorchCall) -> Sized:
    dim, sizes = call.take(1, "dim"), list(call.take(2, "sizes", default=()))
    first = dim % call.args[0].dim()
    return [call.args[0], dim, sizes], [((2, i), call.dims(call.out)[first + i]) for i in range(len(sizes))]


def _split(call: TorchCall) -> Sized:
    given = call.take(1, "split_size", "split_size_or_sections", "split_sizes")
    dim = call.take(2, "dim", default=0)
    parts = [call.dims(part)[dim] for part in call.out]
    if isinstance(given, int):
        return [call.args[0], given, dim], [((1,), parts[0])]
    return [call.args[0], list(given), dim], [((1, i), part) for i, part in enumerate(parts)]


def _narrow(call: TorchCall) -> Sized:
    before = call.start()
    length: Size = (3,), call.dims(call.out)[call.args[1]]
    return call.args, [length] if before is None else [length, ((2,), before)]


def _normalized(call: TorchCall) -> Sized:
    """``layer_norm`` and ``rms_norm``."""
    shape = list(call.take(1, "normalized_shape", default=()))
    own = call.dims(call.args[0])[-len(shape) :]
    return [call.args[0], shape, *call.args[2:]], [((1, i), axis) for i, axis in enumerate(own)]


def _group_norm(call: TorchCall) -> Sized:
    groups = [node.meta["names"]["g"] for node in call.operations if "g" in node.meta.get("names", {})]
    return call.args, [((1,), groups[0])] if groups and len(call.args) > 1 else []


def _getitem(call: TorchCall) -> Sized:
    x, index = call.args[0], list(call.args[1]) if isinstance(call.args[1], tuple) else [call.args[1]]
    return [x, tuple(index)], _bounds(x, index, call.operations)


def _bounds(x: Tensor, index: list[Tree], operations: list[fx.Node]) -> list[Size]:
    """The bounds of slices. Torch ran one recorded operation for each of these slices, in the same order."""
    slices = iter([node for node in operations if node.target is torch.ops.aten.slice.Tensor])
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
SIZES: dict[str, Callable[[TorchCall], Sized]] = {
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
