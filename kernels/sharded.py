"""The criteria over weights that are sharded (DTensor): each rank sums what it holds; the sums are all-reduced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Replicate, Shard

from netsurgery.kernels.criteria import CRITERIA, Name, Reading, column_count
from netsurgery.kernels.hgsr_cpu import finished
from netsurgery.kernels.sparsity import Layout, backend

__all__ = ["add_gradient", "values"]


class _Shards:
    """What this rank holds of a list of weights, and the layout of that.

    Raises:
        ValueError: a weight is sharded so that kernels are cut, or in a way that is not known here.
    """

    def __init__(self, weights: Sequence[Tensor], layout: Layout):
        sizes = [column_count(weight.shape, how) for weight, how in zip(weights, layout.readings, strict=True)]
        groups = sum(sizes) if layout.index is None else layout.groups
        index = torch.arange(groups) if layout.index is None else layout.index
        self.local = [local_part(weight) for weight in weights]
        self.reduce: dict[Any, list[Any]] = {}  # each way to shard: the process groups to add sums over
        self.ways: list[Any] = []
        self.rows: list[tuple[int, int, int]] = []  # a weight, where rows of what this rank holds begin, how many
        readings, indices = [], []
        for i, (weight, ids) in enumerate(zip(weights, index.split(sizes), strict=True)):
            way, self.reduce[way] = _way(i, weight)  # on every rank in the same order, whether it holds anything or not
            for start, size, how, part in _cut(i, weight, layout.readings[i], ids):
                self.ways.append(way)
                self.rows.append((i, start, size))
                readings.append(how)
                indices.append(part)
        index = torch.cat(indices) if indices else index[:0]
        counted = tuple(layout.counted[i] for i, _, _ in self.rows)
        self.layout = Layout(tuple(readings), counted, index.to(weights[0].device), groups)

    def parts(self, local: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The rows that the layout reads, of a tensor for each weight or None."""
        found = [(local[i], start, size) for i, start, size in self.rows]
        return [None if one is None else one.detach().narrow(0, start, size) for one, start, size in found]

    @torch.no_grad()
    def value(self, criterion: Name, like: Tensor) -> tuple[Tensor, Tensor]:
        """The criterion and the sum of absolute values, the same on all ranks; and the slopes."""
        rule, how, weights = CRITERIA[criterion], self.layout, self.parts(self.local)
        parts = how.index.split([column_count(w.shape, r) for w, r in zip(weights, how.readings, strict=True)])  # type: ignore[union-attr]
        total = like.new_zeros(how.groups + 1)
        for way, groups in self.reduce.items():
            mine = torch.zeros_like(total)
            held = [i for i, one in enumerate(self.ways) if one == way]
            if held:
                mine[:-1], mine[-1] = backend(self.local).sums(
                    [weights[i] for i in held], [how.readings[i] for i in held], torch.cat([parts[i] for i in held]),
                    how.groups, rule, [how.counted[i] for i in held],
                )  # fmt: skip
            for group in groups:
                dist.all_reduce(mine, group=group)
            total += mine
        return finished(total[:-1], total[-1], rule)

    def gradient(
        self, criterion: Name, slopes: Tensor, scale: Tensor, outs: Sequence[Tensor | None], add: bool
    ) -> None:
        """Of what this rank holds, for a tensor for each weight or None."""
        if self.rows:
            how = self.layout
            backend(self.local).gradient(
                self.parts(self.local), how.readings, how.index, slopes, CRITERIA[criterion], how.counted, scale,
                self.parts(outs), add,
            )  # fmt: skip


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _way(i: int, weight: Tensor) -> tuple[Any, list[Any]]:
    """How a weight is sharded, and the process groups that hold its parts together."""
    if not isinstance(weight, DTensor):
        return None, []
    if not all(type(placement) in (Shard, Replicate) for placement in weight.placements):
        raise ValueError(
            f"hgsr: weight {i} of shape {tuple(weight.shape)} is placed as {weight.placements}: "
            "place it by Shard and Replicate only, or leave it out with exclude="
        )
    mesh = weight.device_mesh
    cut = tuple(dim for dim, placement in enumerate(weight.placements) if isinstance(placement, Shard))
    return (mesh, cut), [mesh.get_group(dim) for dim in cut]


def _held(weight: DTensor) -> list[tuple[int, int]]:
    """For each axis where what this rank holds begins, and its size: as torch.chunk cuts."""
    held = [(0, size) for size in weight.shape]
    for dim, placement in enumerate(weight.placements):
        if isinstance(placement, Shard):
            start, size = held[placement.dim]
            each = -(-size // weight.device_mesh.size(dim))
            before = min(each * weight.device_mesh.get_local_rank(dim), size)
            held[placement.dim] = start + before, min(each, size - before)
    return held


def _cut(i: int, weight: Tensor, how: Reading, ids: Tensor) -> Iterator[tuple[int, int, Reading, Tensor]]:
    """What this rank holds of a weight, as (first row, rows, reading, outer groups of the columns)."""
    shape = weight.shape
    held = _held(weight) if isinstance(weight, DTensor) else [(0, size) for size in shape]
    for axis in how.window:
        if held[axis][1] != shape[axis]:
            raise ValueError(
                f"hgsr: weight {i} of shape {tuple(shape)} is sharded along axis {axis}, which cuts its kernels: "
                "shard it along axis 0 or 1, or leave it out with exclude="
            )
    if not all(size for _, size in held):
        return
    if 0 in how.outer:  # then blocks make no difference: each row has outer groups of its own
        how = how._replace(blocks=1)
    each = shape[0] // how.blocks
    grid = ids.view(how.blocks, *(shape[axis] for axis in how.outer))
    for place, axis in enumerate(how.outer):
        grid = grid.narrow(1 + place, *held[axis])
    first, rows = held[0]
    if how.blocks == 1:
        yield 0, rows, how, grid.reshape(-1)
        return
    row, stop = first, first + rows
    while row < stop:  # the rest of a block that begins on another rank, whole blocks, the beginning of one
        within = row % each
        size = min(each - within, stop - row) if within or stop - row < each else (stop - row) // each * each
        blocks = max(1, size // each)
        yield row - first, size, how._replace(blocks=blocks), grid[row // each :][:blocks].reshape(-1)
        row += size


class _Values(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shards: _Shards, criterion: Name, like: Tensor, *local: Tensor) -> Tensor:
        found, slopes = shards.value(criterion, like)
        ctx.shards, ctx.criterion = shards, criterion
        ctx.save_for_backward(slopes, *local)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        slopes, *local = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        outs = [torch.empty_like(one) if want else None for one, want in zip(local, wanted, strict=True)]
        ctx.shards.gradient(ctx.criterion, slopes, scale, outs, False)
        return None, None, None, *outs


def _like(weights: Sequence[Tensor]) -> Tensor:
    exact = any(weight.dtype == torch.float64 for weight in weights)
    return torch.empty(0, dtype=torch.float64 if exact else torch.float32, device=weights[0].device)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def values(weights: Sequence[Tensor], layout: Layout, criterion: Name) -> Tensor:
    """As ``sparsity.values``, the same on all ranks."""
    shards = _Shards(weights, layout)
    found: Tensor = _Values.apply(shards, criterion, _like(weights), *shards.local)
    return found


@torch.no_grad()
def add_gradient(
    weights: Sequence[Tensor], layout: Layout, criterion: Name, scale: Tensor, outs: Sequence[Tensor | None]
) -> Tensor:
    """As ``sparsity.add_gradient``: each rank adds to what it holds.

    Raises:
        ValueError: a gradient is placed otherwise than its weight.
    """
    for i, (weight, out) in enumerate(zip(weights, outs, strict=True)):
        places = [getattr(one, "placements", None) for one in (weight, out)]
        if out is not None and places[0] != places[1]:
            raise ValueError(
                f"hgsr: weight {i} is placed as {places[0]}, but its gradient as {places[1]}: "
                "redistribute the gradient, or add the penalty to the loss"
            )
    shards = _Shards(weights, layout)
    found, slopes = shards.value(criterion, _like(weights))
    shards.gradient(criterion, slopes, scale, [None if out is None else local_part(out) for out in outs], True)
    return found
