"""The criteria over sharded weights (DTensor): each rank sums its own parts; the sums are all-reduced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from netsurgery.kernels.criteria import CRITERIA, Name, WeightView, accumulator, column_count
from netsurgery.kernels.hgsr_reference import finalize
from netsurgery.kernels.layout import Layout, backend

__all__ = ["add_gradient", "values"]


_Way = tuple[DeviceMesh | None, tuple[int, ...]]  # ranks that a weight is sharded over, along which dimensions of these


class _Spec(NamedTuple):
    """The whole shape of a weight and, if it is sharded, the ranks and the placements."""

    shape: torch.Size
    mesh: DeviceMesh | None = None
    placements: tuple[Placement, ...] = ()


@dataclass(frozen=True)
class _Share:
    """The parts on this rank of the weights that are sharded in the same way.

    Attributes:
        one: one of these weights.
        dims: the dimensions of its mesh over which ranks hold its parts together.
        rows: a weight, where rows of what this rank holds begin, how many.
        layout: of these.
    """

    one: int
    dims: tuple[int, ...]
    rows: tuple[tuple[int, int, int], ...]
    layout: Layout

    def parts(self, local: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The rows that the layout reads, from a tensor for each weight, or None."""
        found = [(local[i], start, size) for i, start, size in self.rows]
        return [None if one is None else one.detach().narrow(0, start, size) for one, start, size in found]


@lru_cache(maxsize=64)  # the index is made, and sent to the device, once
def _shares(layout: Layout, specs: tuple[_Spec, ...], device: torch.device) -> tuple[_Share, ...]:
    """A share for each way to shard, on every rank in the same order, also where a rank holds nothing.

    Raises:
        ValueError: a weight is sharded so that kernels are cut, or in a way that is not known here.
    """
    sizes = [column_count(spec.shape, how) for spec, how in zip(specs, layout.readings, strict=True)]
    groups = sum(sizes) if layout.index is None else layout.groups
    index = torch.arange(groups) if layout.index is None else layout.index
    held: dict[_Way, tuple[int, list[tuple[tuple[int, int, int], WeightView, bool, Tensor]]]] = {}
    for i, (spec, ids) in enumerate(zip(specs, index.split(sizes), strict=True)):
        _, pieces = held.setdefault(_way(i, spec), (i, []))
        for start, size, how, part in _cut(i, spec, layout.readings[i], ids):
            pieces.append(((i, start, size), how, layout.in_l1[i], part))
    shares = []
    for (_, dims), (one, pieces) in held.items():
        rows, readings, in_l1, parts = zip(*pieces, strict=True) if pieces else ((), (), (), (index[:0],))
        share = Layout(readings, in_l1, torch.cat(parts).to(device), groups)
        shares.append(_Share(one, dims, rows, share))
    return tuple(shares)


class _Shards:
    """The parts of a list of weights on this rank."""

    def __init__(self, weights: Sequence[Tensor], layout: Layout):
        specs = tuple(
            _Spec(one.shape, one.device_mesh, tuple(one.placements)) if isinstance(one, DTensor) else _Spec(one.shape)
            for one in weights
        )
        self.meshes = [spec.mesh for spec in specs]
        self.local = [local_part(weight) for weight in weights]
        self.shares = _shares(layout, specs, weights[0].device)

    @torch.no_grad()
    def value(self, criterion: Name, like: Tensor) -> tuple[Tensor, Tensor]:
        """The criterion and the sum of absolute values, the same on all ranks; and the slopes."""
        rule = CRITERIA[criterion]
        total = like.new_zeros(self.shares[0].layout.groups + 1)
        for share in self.shares:
            how, mine = share.layout, torch.zeros_like(total)
            if share.rows:
                mine[:-1], mine[-1] = backend(self.local).sums(
                    share.parts(self.local), how.readings, how.index, how.groups, rule, how.in_l1
                )
            if mesh := self.meshes[share.one]:  # of now: the processes may have been brought together anew
                for dim in share.dims:
                    dist.all_reduce(mine, group=mesh.get_group(dim))
            total += mine
        return finalize(total[:-1], total[-1], rule)

    def gradient(
        self, criterion: Name, slopes: Tensor, scale: Tensor, outs: Sequence[Tensor | None], add: bool
    ) -> None:
        """Write the gradient of the parts on this rank to a tensor for each weight, or None."""
        for share in self.shares:
            if share.rows:
                how, parts = share.layout, share.parts(self.local)
                backend(self.local).gradient(
                    parts, how.readings, how.index, slopes, CRITERIA[criterion], how.in_l1, scale,
                    share.parts(outs), add,
                )  # fmt: skip


def local_part(tensor: Tensor) -> Tensor:
    """The part of a tensor on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _way(i: int, weight: _Spec) -> _Way:
    """The ranks that a weight is sharded over, and the dimensions of their mesh."""
    if not all(type(placement) in (Shard, Replicate) for placement in weight.placements):
        raise ValueError(
            f"hgsr: weight {i} of shape {tuple(weight.shape)} is placed as {weight.placements}: "
            "place it by Shard and Replicate only, or leave it out with exclude="
        )
    return weight.mesh, tuple(dim for dim, one in enumerate(weight.placements) if isinstance(one, Shard))


def _held(weight: _Spec) -> list[tuple[int, int]]:
    """For each axis the begin and size of the part on this rank: as torch.chunk cuts."""
    held = [(0, size) for size in weight.shape]
    for dim, placement in enumerate(weight.placements):
        if weight.mesh is not None and isinstance(placement, Shard):
            start, size = held[placement.dim]
            each = -(-size // weight.mesh.size(dim))
            before = min(each * weight.mesh.get_local_rank(dim), size)
            held[placement.dim] = start + before, min(each, size - before)
    return held


def _cut(i: int, weight: _Spec, how: WeightView, ids: Tensor) -> Iterator[tuple[int, int, WeightView, Tensor]]:
    """The parts of a weight on this rank, as (first row, rows, reading, outer groups of the columns)."""
    shape, held = weight.shape, _held(weight)
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
    return torch.empty(0, dtype=accumulator(*weights), device=weights[0].device)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def values(weights: Sequence[Tensor], layout: Layout, criterion: Name) -> Tensor:
    """The values of ``sparsity.values``, the same on all ranks."""
    shards = _Shards(weights, layout)
    found: Tensor = _Values.apply(shards, criterion, _like(weights), *shards.local)
    return found


@torch.no_grad()
def add_gradient(
    weights: Sequence[Tensor], layout: Layout, criterion: Name, scale: Tensor, outs: Sequence[Tensor | None]
) -> Tensor:
    """Add the gradient as ``sparsity.add_gradient`` does: each rank adds to its own parts.

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
