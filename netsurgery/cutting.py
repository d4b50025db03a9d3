"""Which positions of a tensor stay, and a tensor of these alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from netsurgery.axes import Axis, leaves
from netsurgery.positions import positions

if TYPE_CHECKING:
    from netsurgery.edit import Edit

__all__ = ["Positions"]


class Positions:
    """Positions that stay along an axis after an edit: int64, ascending, or None where all do."""

    def __init__(self, edit: Edit):
        channels = {edit.network[name].channel: units for name, units in edit.keep.items()}
        self.memo: dict[Axis, Tensor | None] = {channel: torch.tensor(units) for channel, units in channels.items()}

    def __call__(self, axis: Axis) -> Tensor | None:
        if axis not in self.memo:
            lost = any(self.memo.get(leaf) is not None for leaf in leaves(axis))
            self.memo[axis] = positions(axis, self._units) if lost else None
        return self.memo[axis]

    def _units(self, channel: Axis) -> Tensor:
        units = self.memo.get(channel)
        return torch.arange(channel.size) if units is None else units

    def changes(self, axes: tuple[Axis, ...]) -> bool:
        """Whether a tensor of these dimensions loses anything."""
        return any(self(axis) is not None for axis in axes)

    def cut(self, tensor: Tensor, axes: tuple[Axis | None, ...]) -> Tensor:
        """A new tensor with the positions that stay along every axis, in the memory format of the old one.

        Args:
            axes: what the dimensions are; None for one that loses nothing.
        """
        with torch.no_grad():
            new = tensor.detach()
            for dim, axis in enumerate(axes):
                if axis is not None and (positions := self(axis)) is not None:
                    new = new.index_select(dim, positions.to(tensor.device))
            if tensor.layout != torch.strided:  # the gradient of a sparse embedding
                return new.clone()
            last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(new.dim())
            if last is not None and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=last):
                new = new.contiguous(memory_format=last)
            return new.clone() if new.data_ptr() == tensor.data_ptr() else new

    def put(self, full: Tensor, axes: tuple[Axis, ...], part: Tensor) -> Tensor:
        """A copy of a full-size tensor that holds ``part`` where it stays."""
        new = full.detach().clone()
        found = [self(axis) for axis in axes]
        grid = [torch.arange(axis.size) if at is None else at for axis, at in zip(axes, found, strict=True)]
        new[torch.meshgrid([at.to(new.device) for at in grid], indexing="ij")] = part.detach().to(new)
        return new
