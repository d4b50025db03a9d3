"""The criteria over weights that are sharded (DTensor): each rank sums what it holds; the sums are all-reduced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from netsurgery.kernels.criteria import CRITERIA, Name, Reading
from netsurgery.kernels.hgsr_cpu import finished
from netsurgery.kernels.sparsity import Layout, backend, columns

__all__ = ["add_gradient", "values"]


class _Shards:
    """What this rank holds of a list of weights, and the layout of that.

    Raises:
        ValueError: a weight is sharded so that kernels, or groups of a grouped convolution, are cut.
    """

    def __init__(self, weights: Sequence[Tensor], layout: Layout):
        sizes = [columns(weight.shape, how) for weight, how in zip(weights, layout.readings, strict=True)]
        groups = sum(sizes) if layout.index is None else layout.groups
        index = torch.arange(groups, device=weights[0].device) if layout.index is None else layout.index
        self.reduce: dict[Any, list[Any]] = {}  # each way to shard: the process groups to add sums over
        self.weights: list[Tensor] = []
        self.ways: list[Any] = []
        self.places: list[int] = []  # in the list of all weights
        readings, indices = [], []
        for i, (weight, ids) in enumerate(zip(weights, index.split(sizes), strict=True)):
            way, reduce = _way(i, weight)
            self.reduce[way] = reduce
            local = local_part(weight)
            if local.numel():
                how, ids = _cut(i, weight, layout.readings[i], ids)
                self.weights.append(local)
                self.ways.append(way)
                self.places.append(i)
                readings.append(how)
                indices.append(ids)
        counted = tuple(layout.counted[i] for i in self.places)
        self.layout = Layout(tuple(readings), counted, torch.cat(indices) if indices else index[:0], groups)

    @torch.no_grad()
    def value(self, criterion: Name, like: Tensor) -> tuple[Tensor, Tensor]:
        """The criterion and the sum of absolute values, the same on all ranks; and the slopes."""
        rule, how = CRITERIA[criterion], self.layout
        parts = how.index.split([columns(w.shape, r) for w, r in zip(self.weights, how.readings, strict=True)])  # type: ignore[union-attr]
        total = like.new_zeros(how.groups + 1)
        for way, groups in self.reduce.items():
            mine = torch.zeros_like(total)
            held = [i for i, one in enumerate(self.ways) if one == way]
            if held:
                weights = [self.weights[i].detach() for i in held]
                mine[:-1], mine[-1] = backend(weights).sums(
                    weights, [how.readings[i] for i in held], torch.cat([parts[i] for i in held]), how.groups, rule,
                    [how.counted[i] for i in held],
                )  # fmt: skip
            for group in groups:
                dist.all_reduce(mine, group=group)
            total += mine
        return finished(total[:-1], total[-1], rule)

    def gradient(
        self, criterion: Name, slopes: Tensor, scale: Tensor, outs: Sequence[Tensor | None], add: bool
    ) -> None:
        """Of what this rank holds."""
        if self.weights:
            weights, how = [weight.detach() for weight in self.weights], self.layout
            backend(weights).gradient(
                weights, how.readings, how.index, slopes, CRITERIA[criterion], how.counted, scale, outs, add
            )


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _way(i: int, weight: Tensor) -> tuple[Any, list[Any]]:
    """How a weight is sharded, and the process groups that hold its parts together."""
    if not isinstance(weight, DTensor):
        return None, []
    if not all(type(placement) in (Shard, Replicate) for placement in weight.placements):
        raise ValueError(f"hgsr: weight {i} is placed as {weight.placements}: expected Shard and Replicate only")
    mesh = weight.device_mesh
    cut = tuple(dim for dim, placement in enumerate(weight.placements) if isinstance(placement, Shard))
    return (mesh, cut), [mesh.get_group(dim) for dim in cut]


def _cut(i: int, weight: Tensor, how: Reading, ids: Tensor) -> tuple[Reading, Tensor]:
    """The reading of what this rank holds of a weight, and the outer groups of its columns."""
    if not isinstance(weight, DTensor):
        return how, ids
    shape = weight.shape
    local, offset = compute_local_shape_and_global_offset(shape, weight.device_mesh, weight.placements)
    each = shape[0] // how.blocks
    grid = ids.view(how.blocks, *(each if axis == 0 else shape[axis] for axis in how.outer))
    for axis, (size, start) in enumerate(zip(local, offset, strict=True)):
        whole_blocks = axis == 0 and how.blocks > 1
        if size == shape[axis]:
            continue
        if axis in how.window or (whole_blocks and (start % each or size % each)):
            what = "kernels" if axis in how.window else "groups of a grouped convolution"
            raise ValueError(
                f"hgsr: weight {i} of shape {tuple(shape)} is sharded along axis {axis}, which cuts {what}: "
                "shard it along another axis, or leave it out with exclude="
            )
        if whole_blocks:
            grid = grid.narrow(0, start // each, size // each)
        elif axis in how.outer:
            grid = grid.narrow(1 + how.outer.index(axis), start, size)
    return how._replace(blocks=grid.shape[0]), grid.reshape(-1)


class _Values(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shards: _Shards, criterion: Name, like: Tensor, *local: Tensor) -> Tensor:
        found, slopes = shards.value(criterion, like)
        ctx.shards, ctx.criterion = shards, criterion
        ctx.save_for_backward(slopes, *local)
        return found

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        slopes, *local = ctx.saved_tensors
        outs = [torch.empty_like(weight) for weight in local]
        ctx.shards.gradient(ctx.criterion, slopes, scale, outs, False)
        return None, None, None, *outs


def _like(weights: Sequence[Tensor]) -> Tensor:
    exact = any(weight.dtype == torch.float64 for weight in weights)
    return torch.empty(0, dtype=torch.float64 if exact else torch.float32, device=weights[0].device)


def values(weights: Sequence[Tensor], layout: Layout, criterion: Name) -> Tensor:
    """As ``sparsity.values``, the same on all ranks."""
    shards = _Shards(weights, layout)
    found: Tensor = _Values.apply(shards, criterion, _like(weights), *shards.weights)
    return found


@torch.no_grad()
def add_gradient(
    weights: Sequence[Tensor], layout: Layout, criterion: Name, scale: Tensor, outs: Sequence[Tensor | None]
) -> Tensor:
    """As ``sparsity.add_gradient``: each rank adds to what it holds."""
    shards = _Shards(weights, layout)
    found, slopes = shards.value(criterion, _like(weights))
    held = [outs[i] for i in shards.places]
    shards.gradient(criterion, slopes, scale, [None if out is None else local_part(out) for out in held], True)
    return found
