"""Positions of units: find the units of channels along an axis, and cut tensors to them.

This is the one evaluator of axis expressions. The oracle (``netsurgery.verification``) has another, on purpose: it must
not share a mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, reduce
from itertools import accumulate

import torch
from torch import Tensor

from netsurgery.axes import Axis, find, leaves
from netsurgery.units import Copy, Planned, keyed, sources

__all__ = ["Positions", "laid_out_as", "multiplied", "positions", "units_at"]


def positions(axis: Axis, units: Callable[[Axis], Tensor]) -> Tensor:
    """The old position for each new position along an axis: int64, ``(new size,)``.

    Args:
        units: for a channel the old units, in the order in which they are to stand.
    """
    axis = find(axis)
    if not axis.op:
        return units(axis)
    parts = [positions(term, units) for term in axis.terms]
    if axis.op == "concat":
        return torch.cat([start + part for start, part in zip(_starts(axis), parts, strict=True)])
    found = parts[0]
    for term, part in zip(axis.terms[1:], parts[1:], strict=True):
        found = (found[:, None] * find(term).size + part).flatten()
    return found


def multiplied(axis: Axis, values: Callable[[Axis], Tensor]) -> Tensor:
    """For each position along an axis the product of its units' values, in each of several blocks: ``(blocks, size)``.

    For booleans, the result is True at positions that hold only units with True.

    Args:
        values: for a channel those of its units, ``(blocks, units)``; ``(1, units)`` if in all blocks the same.
    """
    axis = find(axis)
    if not axis.op:
        return values(axis)
    parts = [multiplied(term, values) for term in axis.terms]
    if axis.op == "concat":
        blocks = max(map(len, parts))
        return torch.cat([part.expand(blocks, -1) for part in parts], 1)
    return reduce(lambda a, b: (a[:, :, None] * b[:, None]).flatten(1), parts)


def units_at(axis: Axis) -> list[tuple[Axis, Tensor]]:
    """The inverse: each channel of an axis, with its unit at each position: int64, ``(size,)``; -1 for none.

    A channel that occurs twice is listed twice.
    """
    axis = find(axis)
    if not axis.op:
        return [(axis, torch.arange(axis.size))]
    found: list[tuple[Axis, Tensor]] = []
    if axis.op == "concat":
        for start, term in zip(_starts(axis), axis.terms, strict=True):
            for leaf, units in units_at(term):
                padded = torch.full((axis.size,), -1)
                padded[start : start + len(units)] = units
                found.append((leaf, padded))
        return found
    sizes = [find(term).size for term in axis.terms]
    for place, term in enumerate(axis.terms):
        shape = [size if i == place else 1 for i, size in enumerate(sizes)]
        found.extend((leaf, units.view(shape).expand(sizes).reshape(-1)) for leaf, units in units_at(term))
    return found


def _starts(axis: Axis) -> list[int]:
    """Where the parts of a concatenation begin."""
    return list(accumulate((find(part).size for part in axis.terms[:-1]), initial=0))


def laid_out_as(old: Tensor, new: Tensor) -> Tensor:
    """A tensor in the memory format of another one."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(new.dim())
    if last is not None and not old.is_contiguous() and old.is_contiguous(memory_format=last):
        return new.contiguous(memory_format=last)
    return new


class Positions:
    """The old position for each new one along an axis when channels have other units: int64, or None for no change.

    Args:
        units: by channel its units; other channels keep theirs. A new unit stands in the place of the first old one.
    """

    def __init__(self, units: Mapping[Axis, Sequence[Planned]]):
        self.memo: dict[Axis, Tensor | None] = {}
        self.planted: dict[Axis, Tensor] = {}  # by channel with new units, which are new: bool
        self.planned = units
        self.copied: dict[Axis, Tensor] = {}  # by channel with copies, the share that is taken of each unit: float64
        for channel, own in units.items():
            found = torch.tensor(sources(own))
            self.memo[channel] = found.clamp(min=0)
            if bool((found < 0).any()):
                self.planted[channel] = found < 0
            if any(isinstance(unit, Copy) for unit in own):
                shares = [unit.share if isinstance(unit, Copy) else 1.0 for unit in own]
                self.copied[channel] = torch.tensor(shares, dtype=torch.float64)

    @cached_property
    def keys(self) -> dict[Axis, list[object]]:
        """By changed channel a key for each of its units, as ``keyed`` makes them."""
        return {channel: keyed(own) for channel, own in self.planned.items()}

    def __call__(self, axis: Axis) -> Tensor | None:
        if axis not in self.memo:
            lost = any(self.memo.get(leaf) is not None for leaf in leaves(axis))
            self.memo[axis] = positions(axis, self._units) if lost else None
        return self.memo[axis]

    def _units(self, channel: Axis) -> Tensor:
        units = self.memo.get(channel)
        return torch.arange(channel.size) if units is None else units

    def new(self, axis: Axis, among: Callable[[Axis], bool] = lambda channel: True) -> Tensor | None:
        """True at positions that hold a new unit: bool, ``(new size,)``, or None where none does.

        Args:
            among: channels whose new units count.
        """
        found = {leaf: ~self.planted[leaf] for leaf in leaves(axis) if leaf in self.planted and among(leaf)}
        return ~self._multiplied(axis, found, torch.bool) if found else None

    def new_entries(self, axes: tuple[Axis, ...]) -> Tensor | None:
        """True at entries of a tensor that belong to a new unit in any dimension: bool, or None where none does."""
        found = [self.new(axis) for axis in axes]
        if all(one is None for one in found):
            return None
        sizes = [axis.size if (at := self(axis)) is None else len(at) for axis in axes]
        entries = torch.zeros(sizes, dtype=torch.bool)
        for dim, one in enumerate(found):
            if one is not None:
                entries.index_fill_(dim, one.nonzero().flatten(), True)
        return entries

    def shares(self, axis: Axis, among: Callable[[Axis], bool]) -> Tensor | None:
        """The share taken from each position where units are copied: float64, ``(new size,)``, or None for all of it.

        Args:
            among: channels that are read.
        """
        found = {leaf: self.copied[leaf] for leaf in leaves(axis) if leaf in self.copied and among(leaf)}
        return self._multiplied(axis, found, torch.float64) if found else None

    def _multiplied(self, axis: Axis, values: Mapping[Axis, Tensor], dtype: torch.dtype) -> Tensor:
        def of(channel: Axis) -> Tensor:
            own = values.get(channel)
            return (torch.ones(len(self._units(channel)), dtype=dtype) if own is None else own)[None]

        return multiplied(axis, of)[0]

    def changes(self, axes: tuple[Axis, ...]) -> bool:
        """True if a tensor of these dimensions changes."""
        return any(self(axis) is not None for axis in axes)

    def cut(self, tensor: Tensor, axes: tuple[Axis | None, ...]) -> Tensor:
        """A new tensor of the old positions along every axis, zero at new units, in the memory format of the old one.

        Args:
            axes: the axis of each dimension; None for a dimension that stays as it is.
        """
        with torch.no_grad():
            new = tensor.detach()
            for dim, axis in enumerate(axes):
                if axis is not None and (positions := self(axis)) is not None:
                    new = new.index_select(dim, positions.to(tensor.device))
                    if self.planted and (planted := self.new(axis)) is not None:
                        new.index_fill_(dim, planted.nonzero().flatten().to(tensor.device), 0)
            if tensor.layout != torch.strided:  # the gradient of a sparse embedding
                return new.clone()
            new = laid_out_as(tensor, new)
            return new.clone() if new.data_ptr() == tensor.data_ptr() else new

    def put(self, full: Tensor, axes: tuple[Axis, ...], part: Tensor) -> Tensor:
        """A copy of a full-size tensor that holds ``part`` where it stays."""
        new = full.detach().clone()
        found = [self(axis) for axis in axes]
        grid = [torch.arange(axis.size) if at is None else at for axis, at in zip(axes, found, strict=True)]
        new[torch.meshgrid([at.to(new.device) for at in grid], indexing="ij")] = part.detach().to(new)
        return new
