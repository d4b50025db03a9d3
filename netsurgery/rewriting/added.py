"""Values of the weights of added units that change no output: shares of copies, zeros for readers of new units."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from netsurgery.analysis.growth import start
from netsurgery.axes import Axis
from netsurgery.edit import Edit

__all__ = ["filled", "gradient"]


def filled(new: Tensor, old: Tensor, name: str, edit: Edit) -> Tensor:
    """Give a tensor whose units have been copied, in place, the values that added units need.

    Args:
        new: at its new size, zero at new units.
        old: as it was.
        name: of the tensor.
    """
    at, axes = edit.positions, edit.network.axes[name]
    if new.is_meta or not (at.planted or at.copied) or not at.changes(axes):
        return new
    with torch.no_grad():
        for dim, axis in enumerate(axes):
            if (shares := at.shares(axis, _reads(edit, name, dim))) is not None:
                new.mul_(_along(shares.to(new), dim, new.dim()))
        for dim, axis in enumerate(axes):
            if (made := at.new(axis, _makes(edit, name, dim))) is not None:
                _begin(new, old, name, dim, made.nonzero().flatten().to(new.device), edit)
    return new


def gradient(grad: Tensor, name: str, edit: Edit) -> Tensor:
    """The gradient of a tensor after an edit: copies share the gradient of a producer, and each has that of a consumer.

    That of new units is zero, though it need not be where they are read.
    """
    new = edit.positions.cut(grad, edit.network.axes[name])
    for dim, axis in enumerate(edit.network.axes[name]):
        if (shares := edit.positions.shares(axis, _makes(edit, name, dim))) is not None:
            dense = new.layout == torch.strided  # else of an embedding: its rows are sparse, what it makes is not
            values = new if dense else new._values()
            values.mul_(_along(shares.to(values), dim if dense else dim - new.sparse_dim() + 1, values.dim()))
    return new


def _reads(edit: Edit, name: str, dim: int) -> Callable[[Axis], bool]:
    """True if a tensor reads the units of a channel in one of its dimensions."""
    return lambda channel: (name, dim, channel) in edit.readers


def _makes(edit: Edit, name: str, dim: int) -> Callable[[Axis], bool]:
    """True if a tensor makes or carries the units of a channel in one of its dimensions."""
    return lambda channel: (name, dim, channel) not in edit.readers


def _begin(new: Tensor, old: Tensor, name: str, dim: int, units: Tensor, edit: Edit) -> None:
    """Initialise new units: by He's method where several inputs make one, else so that they change nothing."""
    network = edit.network
    makes = {axis for parameter, axis, _ in edit.makers if parameter == name}
    real = new.is_floating_point() or new.is_complex()
    if new.dim() < 2 or not makes or not real:
        begin = start(network, name)
        value = old.detach().mean() if begin is None and real else begin or 0
        new.index_fill_(dim, units, value)
        return
    read = any(parameter == name for parameter, _, _ in edit.readers) or new.dim() > 2
    inputs = math.prod(size for place, size in enumerate(new.shape) if place not in makes)
    wide = old.detach().to(torch.promote_types(old.dtype, torch.float32))
    spread = math.sqrt(2 / inputs) if read else float(wide.std())
    seed = zlib.crc32(repr((name, tuple(old.shape), edit.positions.seeds)).encode())  # else a second time gives twins
    generator = torch.Generator().manual_seed(seed)
    shape = [len(units) if place == dim else size for place, size in enumerate(new.shape)]
    drawn = torch.randn(shape, generator=generator, dtype=torch.cfloat if new.is_complex() else None)
    new.index_copy_(dim, units, (drawn * spread).to(new))


def _along(values: Tensor, dim: int, dims: int) -> Tensor:
    return values.reshape([-1 if i == dim else 1 for i in range(dims)])
