"""Values of the weights of added units that change no output: shares of copies, zeros for readers of new units."""

from __future__ import annotations

import math
import operator
import zlib
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from netsurgery.analysis.growth import start
from netsurgery.axes import Axis, leaves
from netsurgery.edit import Edit
from netsurgery.positions import multiplied

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
        for dim in range(new.dim()):
            if (shares := _shares(edit, name, dim, reads=True)) is not None:
                new.mul_(_along(shares.to(new), dim, new.dim()))
        for dim, axis in enumerate(axes):
            if (made := at.new(axis, _makes(edit, name, dim))) is not None:
                _begin(new, old, name, dim, made.nonzero().flatten().to(new.device), edit)
            for channel, there in _hidden(edit, name, dim):
                if (unseen := at.new(axis, partial(operator.is_, channel))) is not None:
                    new.index_fill_(dim, (unseen & there).nonzero().flatten().to(new.device), 0)
    return new


def _hidden(edit: Edit, name: str, dim: int) -> list[tuple[Axis, Tensor]]:
    """The channels whose added units a tensor hides from products, and at which of its new positions: bool."""
    new = edit.positions(edit.network.axes[name][dim])
    return [(channel, at if new is None else at[new]) for channel, at in edit.hidden.get((name, dim), ())]


def _shares(edit: Edit, name: str, dim: int, reads: bool) -> Tensor | None:
    """The shares of copies at each position of a tensor: where it reads or hides them, or else where it makes them."""
    axis, at, hidden = edit.network.axes[name][dim], edit.positions, _hidden(edit, name, dim)
    meant = (_reads if reads else _makes)(edit, name, dim)
    shares = at.shares(axis, lambda channel: meant(channel) and all(channel is not one for one, _ in hidden))
    for one, there in hidden:
        if (own := at.shares(axis, partial(operator.is_, one))) is not None:
            own = own.where(there if reads else ~there, 1.0)
            shares = own if shares is None else shares * own
    return shares


def gradient(grad: Tensor, name: str, edit: Edit) -> Tensor:
    """The gradient of a tensor after an edit: copies share the gradient of a producer, and each has that of a consumer.

    That of new units is zero, though it need not be where they are read.
    """
    new = edit.positions.cut(grad, edit.network.axes[name])
    for dim in range(new.dim()):
        if (shares := _shares(edit, name, dim, reads=False)) is not None:
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
    new.index_copy_(dim, units, (_drawn(old, name, dim, units.cpu(), edit) * spread).to(new))


def _drawn(old: Tensor, name: str, dim: int, units: Tensor, edit: Edit) -> Tensor:
    """Random weights of a tensor at new units: one's own for each unit, whatever else is new; copies take their shares.

    They depend on the size of the tensor, too: else units that are planted later would be twins of the first.
    """
    at, axes, kind = edit.positions, edit.network.axes[name], torch.cfloat if old.is_complex() else None
    keys = _keys(axes[dim], edit)[units].tolist()

    def draw(shape: Iterable[int], *of: object) -> Tensor:
        seed = zlib.crc32(repr((name, tuple(old.shape), *of)).encode())
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=kind)

    rest = [size for place, size in enumerate(old.shape) if place != dim]
    drawn = torch.stack([draw(rest, key) for key in keys], dim)
    for place, axis in enumerate(axes):
        if place == dim or (old_places := at(axis)) is None:
            continue
        drawn = drawn.index_select(place, old_places)
        if (shares := _shares(edit, name, place, reads=True)) is not None:
            drawn.mul_(_along(shares.to(drawn), place, drawn.dim()))
        if (fresh := at.new(axis)) is not None:
            there = fresh.nonzero().flatten()
            shape = [len(there) if one == place else size for one, size in enumerate(drawn.shape)]
            drawn.index_copy_(place, there, draw(shape, keys, place))
    return drawn


def _keys(axis: Axis, edit: Edit) -> Tensor:
    """A number for each new position along an axis: of the seeds of new units, and of the old units beside them."""
    salts = {leaf: salt for salt, leaf in enumerate(leaves(axis))}

    def of(channel: Axis) -> Tensor:
        keys = edit.positions.keys.get(channel, range(channel.size))
        return torch.tensor([zlib.crc32(repr((salts[channel], key)).encode()) | 1 for key in keys])[None]

    return multiplied(axis, of)[0]


def _along(values: Tensor, dim: int, dims: int) -> Tensor:
    return values.reshape([-1 if i == dim else 1 for i in range(dims)])
