"""Values of the weights of added units, so that no output changes: shares of copies, zeros to readers of new units."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from netsurgery.analysis.growth import start
from netsurgery.axes import Axis, leaves
from netsurgery.edit import Edit
from netsurgery.units import New

__all__ = ["filled", "gradient"]


def filled(new: Tensor, old: Tensor, name: str, edit: Edit) -> Tensor:
    """A tensor whose units have been copied, with the values that it needs where units were added; it is changed.

    Args:
        new: at its new size, zero at new units.
        old: as it was.
        name: of the tensor.
    """
    at, axes = edit.positions, edit.network.axes[name]
    if new.is_meta or not any(leaf in at.planted or leaf in at.copied for axis in axes for leaf in leaves(axis)):
        return new
    with torch.no_grad():
        made: list[Tensor | None] = []  # of each dimension, where units are new that this tensor makes
        for dim, axis in enumerate(axes):
            reads, makes = _among(edit, name, dim)
            if (shares := at.shares(axis, reads)) is not None:
                new.mul_(_along(shares.to(new), dim, new.dim()))
            made.append(at.new(axis, makes))
        if any(where is not None for where in made):
            _begin(new, old, name, made, edit)
    return new


def gradient(grad: Tensor, name: str, edit: Edit) -> Tensor:
    """The gradient of a tensor after an edit: copies share that of what makes a unit, and have that of what reads it.

    That of new units is zero, though it need not be where they are read.
    """
    axes = edit.network.axes[name]
    new = edit.positions.cut(grad, axes)
    for dim, axis in enumerate(axes):
        shares = edit.positions.shares(axis, _among(edit, name, dim)[1])
        if shares is not None:
            dense = new.layout == torch.strided  # else of an embedding: its rows are sparse, what it makes is not
            values = new if dense else new._values()
            values.mul_(_along(shares.to(values), dim if dense else dim - new.sparse_dim() + 1, values.dim()))
    return new


def _among(edit: Edit, name: str, dim: int) -> tuple[Callable[[Axis], bool], Callable[[Axis], bool]]:
    """Whether a tensor reads the units of a channel in one of its dimensions; and whether it makes or carries them."""
    by_channel = edit.network.by_channel

    def reads(channel: Axis) -> bool:
        members = by_channel[channel].members if channel in by_channel else ()
        return any(m.role == "consumes" for m in members if (m.parameter, m.axis) == (name, dim))

    return reads, lambda channel: not reads(channel)


def _begin(new: Tensor, old: Tensor, name: str, made: list[Tensor | None], edit: Edit) -> None:
    """Let the entries of new units begin: by He where several inputs make a unit, else so that nothing changes."""
    entries = torch.zeros(new.shape, dtype=torch.bool)
    for dim, where in enumerate(made):
        if where is not None:
            entries |= _along(where, dim, new.dim())
    entries = entries.to(new.device)
    count = int(entries.sum())
    network = edit.network
    members = [m for group in network.groups for m in group.members if m.parameter == name]
    makes = {m.axis for m in members if m.role == "produces"}
    real = new.is_floating_point() or new.is_complex()
    if new.dim() < 2 or not makes or not real:
        begin = start(network, name)
        new[entries] = old.detach().mean().to(new) if begin is None and real else begin or 0
        return
    read = any(m.role == "consumes" for m in members) or new.dim() > 2
    inputs = math.prod(size for dim, size in enumerate(new.shape) if dim not in makes)
    spread = (
        math.sqrt(2 / inputs) if read else float(old.detach().to(torch.promote_types(old.dtype, torch.float32)).std())
    )
    generator = torch.Generator().manual_seed(_seed(edit, name))
    new[entries] = (
        torch.randn(count, generator=generator, dtype=torch.cfloat if new.is_complex() else None) * spread
    ).to(new)


def _seed(edit: Edit, name: str) -> int:
    """A number that depends on the tensor and the seeds of the new units."""
    seeds = [unit.seed for units in edit.keep.values() for unit in units if isinstance(unit, New)]
    return zlib.crc32(repr((name, sorted(set(seeds)))).encode())


def _along(values: Tensor, dim: int, dims: int) -> Tensor:
    return values.reshape([-1 if i == dim else 1 for i in range(dims)])
