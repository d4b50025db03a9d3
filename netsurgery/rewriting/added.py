"""Values of the weights of added units, so that no output changes: shares of copies, zeros to readers of new units."""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

from netsurgery.analysis.growth import starts_at_one
from netsurgery.axes import leaves
from netsurgery.edit import Edit

__all__ = ["filled"]


def filled(new: Tensor, old: Tensor, name: str, edit: Edit) -> Tensor:
    """A tensor whose units have been copied, with the values that it needs where units were added; it is changed.

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
            reads = {channel for channel in leaves(axis) if (name, dim, channel) in edit.readers}
            if (shares := at.shares(axis, reads.__contains__)) is not None:
                new.mul_(shares.to(new).reshape([-1 if i == dim else 1 for i in range(new.dim())]))
        for dim, axis in enumerate(axes):
            reads = {channel for channel in leaves(axis) if (name, dim, channel) in edit.readers}
            made = at.new(axis, lambda channel, reads=reads: channel not in reads)  # type: ignore[misc]
            if made is not None:
                _begin(new, old, name, dim, made.nonzero().flatten().to(new.device), edit)
    return new


def _begin(new: Tensor, old: Tensor, name: str, dim: int, units: Tensor, edit: Edit) -> None:
    """Let new units begin: by He where several inputs make one, else so that they change nothing."""
    network = edit.network
    makes = {axis for parameter, axis, _ in edit.makers if parameter == name}
    if new.dim() < 2 or not makes or not new.is_floating_point():
        new.index_fill_(dim, units, 1.0 if starts_at_one(network, name) else 0.0)
        return
    read = any(parameter == name for parameter, _, _ in edit.readers) or new.dim() > 2
    inputs = math.prod(size for place, size in enumerate(new.shape) if place not in makes)
    spread = math.sqrt(2 / inputs) if read else float(old.detach().float().std())
    seed = zlib.crc32(repr((name, edit.positions.seeds)).encode())
    generator = torch.Generator().manual_seed(seed)
    shape = [len(units) if place == dim else size for place, size in enumerate(new.shape)]
    new.index_copy_(dim, units, (torch.randn(shape, generator=generator) * spread).to(new))
