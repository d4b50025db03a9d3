"""Units that are gone from parts of a batch: their positions in tensors of a graph, and these without them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from netsurgery.axes import Axis, find, leaves
from netsurgery.passes.functional_graph import FunctionalGraph, Step
from netsurgery.positions import multiplied

__all__ = ["NOTHING", "Removal", "RemovedUnits"]

aten = torch.ops.aten
NOTHING: Removal = MappingProxyType({})
Removal = Mapping[str, tuple[int, ...]]  # the units that go, by group


@dataclass
class RemovedUnits:
    """Units that are gone, by channel, in each of several equal parts of a batch.

    Attributes:
        going: those that go now; others were gone before.
    """

    graph: FunctionalGraph
    units: list[dict[Axis, tuple[int, ...]]]
    memo: dict[Axis, Tensor] = field(default_factory=dict)
    places: dict[tuple[Axis, torch.device], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if all(units == self.units[0] for units in self.units):
            self.units = self.units[:1]
        self.going = self
        self.channels = tuple(self.units[0])

    @classmethod
    def once(cls, graph: FunctionalGraph, removal: Removal) -> RemovedUnits:
        """Units that are gone in all of a batch."""
        return cls(graph, [{graph.network[name].channel: units for name, units in removal.items()}])

    def beside(self, before: Removal) -> RemovedUnits:
        """These units, and some that were gone before."""
        if not before:
            return self
        (earlier,) = RemovedUnits.once(self.graph, before).units
        both = RemovedUnits(self.graph, [{**units, **earlier} for units in self.units])
        both.going = self
        return both

    def seen_by(self, node: fx.Node) -> RemovedUnits:
        """The units that a node lacks: the computation of a weight sees all units of some channels."""
        seen = {leaf for axis in node.meta.get("whole", ()) for leaf in leaves(axis)}
        if not seen & {*self.channels}:
            return self
        left = RemovedUnits(self.graph, [{c: u for c, u in units.items() if c not in seen} for units in self.units])
        left.going = left if self.going is self else self.going.seen_by(node)
        return left

    def stays(self, axis: Axis) -> Tensor:
        """True at positions of an axis that stay in each block: ``(blocks, size)``, ``(1, size)`` if all are alike."""
        axis = find(axis)
        if axis not in self.memo:
            self.memo[axis] = multiplied(axis, self._stays)
        return self.memo[axis]

    def _stays(self, channel: Axis) -> Tensor:
        if channel not in self.channels:
            return torch.ones(1, channel.size, dtype=torch.bool)
        left = torch.ones(len(self.units), channel.size, dtype=torch.bool)
        sizes = torch.tensor([len(units[channel]) for units in self.units])
        blocks = torch.arange(len(sizes)).repeat_interleave(sizes)
        left[blocks, torch.tensor([u for units in self.units for u in units[channel]], dtype=torch.int64)] = False
        return left

    def stay(self, axis: Axis, index: int) -> Tensor:
        """True at the positions along an axis that stay in one block."""
        stays = self.stays(axis)
        return stays[index if len(stays) > 1 else 0]

    def positions(self, axis: Axis, index: int) -> Tensor:
        """The positions along an axis that go in one block."""
        blocks, positions = self.pairs(axis, torch.device("cpu"))
        return positions if len(self.units) == 1 else positions[blocks == index]

    def pairs(self, axis: Axis, device: torch.device) -> tuple[Tensor, Tensor]:
        """Blocks, and the positions along an axis that go in them."""
        key = find(axis), device
        if key not in self.places:
            stays = self.stays(axis).expand(len(self.units), -1)
            self.places[key] = (~stays).nonzero().T.contiguous().to(device)
        blocks, positions = self.places[key]
        return blocks, positions

    def block(self, tensor: Tensor, row: int | None, index: int) -> Tensor:
        """The part of a batch that lacks the units of one removal."""
        if len(self.units) == 1:
            return tensor
        assert row is not None
        size = tensor.shape[row] // len(self.units)
        return tensor.narrow(row, index * size, size)

    def zeroed(self, tensor: Tensor, dims: tuple[Axis, ...]) -> Tensor:
        """A tensor whose entries at the units are set to zero in place."""
        row = self.graph.row(dims)
        for dim, axis in enumerate(dims):
            if self.graph.touches(axis, self.channels):
                if len(self.units) == 1:
                    _fill(tensor, dim, self.positions(axis, 0))
                elif dim == row:
                    tensor.index_fill_(dim, self.in_blocks(axis).to(tensor.device), 0)
                else:
                    self.zero_apart(tensor, row, dim, axis)
        return tensor

    def zero_apart(self, tensor: Tensor, row: int | None, dim: int, axis: Axis) -> None:
        """Set the entries along a dimension to zero that each block of the batch lacks."""
        assert row is not None
        places: list[Tensor | None] = [None] * (tensor.dim() + 1)
        places[row], places[dim + (dim > row)] = self.pairs(axis, tensor.device)
        blocks = tensor.unflatten(row, (len(self.units), -1))
        aten.index_put_(blocks, places, tensor.new_zeros(()))

    def in_blocks(self, axis: Axis) -> Tensor:
        """The positions that go, along an axis that holds the batch too: in each block its own."""
        size, found = axis.size // len(self.units), []
        for index in range(len(self.units)):
            positions = self.positions(axis, index)
            found.append(positions[positions // size == index])
        return torch.cat(found)

    def statistics(self, step: Step, special: Callable[..., Any], args: Sequence[Tensor]) -> object:
        """The result of an operation that takes statistics, over what stays."""
        target: Any = step.node.target
        names = [argument.name for argument in target._schema.arguments]
        first = step.inputs[0]
        dims, row, rows = self.graph.dims[first], self.graph.row(self.graph.dims[first]), []
        for index in range(len(self.units)):
            masks = [self.stay(axis, index) for axis in dims]
            if len(self.units) > 1 and row is not None:
                size = dims[row].size // len(self.units)
                masks[row] = masks[row][index * size : (index + 1) * size]
            kept = [None if bool(one.all()) else one.nonzero().flatten().to(args[0].device) for one in masks]
            given = {**dict(zip(names, args, strict=False)), **step.kwargs, names[0]: self.block(args[0], row, index)}
            rows.append(special(target, given, kept))
        if len(rows) == 1:
            return rows[0]
        return torch.cat(rows, row or 0) if isinstance(rows[0], Tensor) else _joined(rows, row or 0)


def _fill(tensor: Tensor, dim: int, positions: Tensor) -> None:
    """Set the entries at some positions to zero."""
    if len(positions) == 1:
        tensor.select(dim, int(positions[0])).zero_()
    else:
        tensor.index_fill_(dim, positions.to(tensor.device), 0)


def _joined(rows: Sequence[Sequence[Tensor | None]], dim: int) -> list[Tensor | None]:
    return [None if column[0] is None else torch.cat(column, dim) for column in zip(*rows, strict=True)]
