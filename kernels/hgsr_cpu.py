"""The hierarchical group sparse criteria in torch operations, piece by piece.

A weight is read twice, once for the value and once for the gradient, in pieces that stay in the processor's cache
together with all that is computed from them; nothing of the weights' size is written but the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from netsurgery.kernels.criteria import Criterion, WeightView, accumulator, arranged, canonical, column_count
from netsurgery.kernels.hgsr_flat import Flat, flat
from netsurgery.kernels.hgsr_reference import finalize
from netsurgery.kernels.placed import Placed, widest

__all__ = ["gradient", "sums", "value"]

PIECE = 1 << 18  # elements
Piece = tuple[slice, ...]


class _Scratch:
    """Memory for one piece, used again and again: fresh memory costs more than the arithmetic."""

    def __init__(self) -> None:
        self.held: dict[tuple[torch.dtype, torch.Size], Tensor] = {}

    def like(self, part: Tensor, dtype: torch.dtype) -> Tensor:
        """Scratch memory of the size of a piece; it holds anything."""
        key = dtype, part.shape
        if key not in self.held:
            most = max((one for one in self.held.values() if one.dtype == dtype), key=Tensor.numel, default=None)
            if most is None or most.numel() < part.numel():
                self.held = {}  # grown: pieces of other shapes find their place in it again
                most = torch.empty(part.numel(), dtype=dtype, device=part.device)
            self.held[key] = most.flatten()[: part.numel()].view(part.shape)
        return self.held[key]


class _TileWalk:
    """A weight's four axes in the order of memory, and what is computed from its pieces."""

    def __init__(self, weight: Tensor, how: WeightView, rule: Criterion, room: _Scratch):
        read = canonical(weight, how)
        strides = read.stride()
        self.order = sorted(range(4), key=lambda axis: (-strides[axis], axis))
        self.weight = read.permute(self.order)
        self.rows, self.window = self.order.index(1), self.order.index(3)
        self.elements = read.shape[3]
        self.columns = (read.shape[0], 1, read.shape[2], 1)
        self.norm = 1 if self.elements == 1 else rule.norm  # of one element both norms are its absolute value
        self.power = rule.inner / self.norm
        self.dtype = accumulator(weight)
        self.ones = torch.ones(self.elements, dtype=self.dtype, device=weight.device)
        self.room = room

    def pieces(self) -> Iterator[tuple[Piece, Piece]]:
        """Slices in memory's order, of at most PIECE elements where that leaves kernels whole; and their columns'."""
        shape = self.weight.shape
        room = PIECE // max(1, shape[self.window])
        cuts: list[list[slice]] = []
        for axis in reversed(range(4)):
            step = max(1, shape[axis] if axis == self.window else min(shape[axis], room))
            cuts.insert(0, [slice(start, start + step) for start in range(0, shape[axis], step)])
            room //= 1 if axis == self.window else step
        for piece in product(*cuts):
            yield piece, tuple(slice(None) if i in (self.rows, self.window) else s for i, s in enumerate(piece))

    def by_column(self, values: Tensor) -> Tensor:
        """Values of columns, laid out like the weight."""
        return values.view(self.columns).permute(self.order)

    def powers(self, part: Tensor) -> Tensor:
        """The sums of |w|^norm over each kernel of a piece."""
        powers = self.room.like(part, self.dtype)
        if part.dtype != self.dtype:
            part = powers.copy_(part)
        if self.norm == 1:
            torch.abs(part, out=powers)
        else:
            torch.mul(part, part, out=powers)
        if self.elements == 1:
            return powers
        if self.window == 3:  # a product with ones is several times faster than torch's sum over a few neighbours
            kernels = torch.empty(part.shape[:3], dtype=self.dtype, device=part.device)
            torch.mv(powers.view(-1, self.elements), self.ones, out=kernels.view(-1))  # `out`: autocast leaves it alone
            return kernels[..., None]
        return powers.sum(self.window, keepdim=True)


class _Plan(NamedTuple):
    """The walk over a list of weights.

    Attributes:
        readings, counted: for which it holds.
        columns: the number of columns of each.
        small: the small ones.
        large: the others, and where their columns are.
    """

    readings: Sequence[WeightView]
    in_l1: Sequence[bool]
    columns: tuple[int, ...]
    small: Flat | None
    large: tuple[tuple[int, slice], ...]


def _plan(weights: Sequence[Tensor], readings: Sequence[WeightView], in_l1: Sequence[bool]) -> _Plan:
    held: _Plan | None = weights.kept.get(_Plan) if isinstance(weights, Placed) else None
    if held is not None and held.readings is readings and held.in_l1 is in_l1:
        return held
    sizes = [column_count(weight.shape, how) for weight, how in zip(weights, readings, strict=True)]
    columns = [slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
    small = flat(weights, readings, in_l1)
    large = [(i, own) for i, own in enumerate(columns) if small is None or i not in small.numbers]
    plan = _Plan(readings, in_l1, tuple(sizes), small, tuple(large))
    if isinstance(weights, Placed):
        weights.kept[_Plan] = plan
    return plan


def value(
    weights: Sequence[Tensor],
    readings: Sequence[WeightView],
    index: Tensor | None,
    groups: int,
    rule: Criterion,
    in_l1: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """The criterion and the sum of absolute values, shape (2,); and the criterion's derivative by each group's sum."""
    total, absolute = sums(weights, readings, index, groups, rule, in_l1)
    values, slopes = finalize(total, absolute, rule)
    if (small := _plan(weights, readings, in_l1).small) is not None:
        small.slopes = slopes
    return values, slopes


def sums(
    weights: Sequence[Tensor],
    readings: Sequence[WeightView],
    index: Tensor | None,
    groups: int,
    rule: Criterion,
    in_l1: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Sums of norm^inner over the kernels of each outer group, and the sum of absolute values of what is counted."""
    plan = _plan(weights, readings, in_l1)
    double = weights[0].device.type != "mps"  # which has none
    # Behind the groups: the sum of absolute values, and what belongs to no group and is left there.
    total = weights[0].new_zeros(groups + 2, dtype=torch.float64 if double else torch.float32)
    absolute = total[-1]
    if plan.small is not None:
        plan.small.add_sums(weights, index, groups, rule, total, absolute)
    if plan.large:
        by_column = total if index is None else total.new_zeros(len(index))
        _add_large(weights, readings, plan.large, rule, in_l1, by_column, absolute)
        if index is not None:
            total.index_add_(0, index.where(index >= 0, groups), by_column)
    total = total.to(widest(weights))
    return total[:groups], total[-1]


def _add_large(
    weights: Sequence[Tensor],
    readings: Sequence[WeightView],
    large: Sequence[tuple[int, slice]],
    rule: Criterion,
    in_l1: Sequence[bool],
    by_column: Tensor,
    absolute: Tensor,
) -> None:
    room = _Scratch()
    for i, columns in large:
        walk = _TileWalk(weights[i], readings[i], rule, room)
        laid = walk.by_column(by_column[columns])
        for piece, own in walk.pieces():
            part = walk.weight[piece]
            kernels = walk.powers(part)
            if in_l1[i]:
                absolute += (kernels if walk.norm == 1 else part.abs()).sum(dtype=walk.dtype)
            if walk.power != 1:
                kernels = kernels.sqrt_() if walk.power == 0.5 else kernels.square_()
            laid[own].add_(kernels.sum(walk.rows, keepdim=True))


def gradient(
    weights: Sequence[Tensor],
    readings: Sequence[WeightView],
    index: Tensor | None,
    slopes: Tensor,
    rule: Criterion,
    in_l1: Sequence[bool],
    scale: Tensor,
    outs: Sequence[Tensor | None],
    accumulate: bool,
) -> None:
    """Write the gradient of scale[0] * criterion + scale[1] * (sum of absolute values of what is counted).

    Args:
        slopes: the criterion's derivative by each group's sum.
        outs: a tensor for each weight, of its shape, or None where it is not wanted.
        accumulate: add to what stands there.
    """
    plan = _plan(weights, readings, in_l1)
    group, sign = scale.tolist()
    if plan.small is not None:
        plan.small.write(weights, index, slopes, rule, (group, sign), outs, accumulate)
    if not plan.large:
        return
    by_column = group * (slopes if index is None else torch.cat([slopes, slopes.new_zeros(1)])[index])
    room, second = _Scratch(), _Scratch()
    for i, columns in plan.large:
        how, out = readings[i], outs[i]
        if out is None:
            continue
        walk = _TileWalk(weights[i], how, rule, room)
        slope = by_column[columns].to(walk.dtype) * (walk.power * walk.norm)
        target = canonical(out, how)
        ordered, laid = target.permute(walk.order), walk.by_column(slope)
        for piece, own in walk.pieces():
            part, goal = walk.weight[piece], ordered[piece]
            factor = _factor(walk, part, laid[own])
            alike = goal.dtype == part.dtype == walk.dtype
            step = goal if alike and not accumulate else second.like(part, walk.dtype)
            _step(part, factor, step, walk.norm, sign if in_l1[i] else 0.0)
            if step is not goal:
                goal.add_(step) if accumulate else goal.copy_(step)
        if target.data_ptr() != out.data_ptr():
            view, _ = arranged(out, how)
            view.copy_(target.reshape(view.shape))


def _step(part: Tensor, factor: Tensor, step: Tensor, norm: int, sign: float) -> None:
    """step = factor * d|w|^norm/dw / norm + sign * d|w|/dw."""
    if norm == 1:
        torch.sign(part, out=step) if part.dtype == step.dtype else step.copy_(part).sign_()
        step.mul_(factor + sign if sign else factor)
    else:
        torch.mul(part, factor, out=step)
        if sign:
            step.add_(part.sign(), alpha=sign)


def _factor(walk: _TileWalk, part: Tensor, slope: Tensor) -> Tensor:
    """slope * q^(power - 1), by kernel; for q = 0 any finite number, as it is multiplied by elements that are 0 then.

    (Or so small that their squares are: below 1e-22 in float32 the gradient of a 2-norm fades to 0.)
    """
    if walk.power == 1:
        return slope
    kernels = walk.powers(part)
    if walk.power == 0.5:
        kernels.clamp_min_(torch.finfo(walk.dtype).tiny).rsqrt_()
    return kernels.mul_(slope)
