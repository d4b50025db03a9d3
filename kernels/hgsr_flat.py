"""The hierarchical group sparse criteria over many small weights of at most 32 bits at once, on a CPU.

Small weights cost what the calls of torch cost, not what their elements do. Their kernels stand here one after the
other, so that a step over them is one call whatever the number of weights; a table says which column each is in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import groupby
from math import prod
from threading import Lock
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from netsurgery.kernels.criteria import Criterion, WeightView, arranged, column_count

__all__ = ["Flat", "flat"]

_Part = TypeVar("_Part", Tensor, Tensor | None)

ROOM = 1 << 19  # elements of all small weights


class _Small(NamedTuple):
    """A small weight.

    Attributes:
        number: its place in the list.
        shape: with the axes of a kernel's elements last.
        axes: the order of its own axes then.
        how: how it is read.
        first: the number of its first column.
        counted: in the sum of absolute values.
    """

    number: int
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    how: WeightView
    first: int
    in_l1: bool

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def window(self) -> int:
        return prod(self.shape[len(self.shape) - len(self.how.window) :])

    def columns(self) -> Tensor:
        """The column of each kernel, in the order of the weight's axes."""
        sizes = dict(zip(self.axes, self.shape, strict=True)) | dict.fromkeys(self.how.window, 1)
        found = torch.empty([sizes[axis] for axis in sorted(sizes)], dtype=torch.int64)
        view, (blocks, _, columns, _) = arranged(found, self.how)
        rows = view.dim() - 1 - len(self.how.outer) - len(self.how.window)
        numbers = torch.arange(self.first, self.first + blocks * columns)
        view.copy_(numbers.view(blocks, *(1,) * rows, *view.shape[1 + rows :]))
        return found.flatten()


class _Run:
    """Weights of one size of window; those that are counted come first.

    Attributes:
        kernels: for each kernel the sum of |w|^norm, later its root.
        factors: for each kernel what its elements' gradient is multiplied by.
        elements: of the weights, one weight after the other, or of their gradient; by kernel.
        parts: the same, by weight.
        room: for as many elements.
    """

    def __init__(self, members: Sequence[_Small], kernels: Tensor, factors: Tensor):
        self.window, sizes = members[0].window, [member.size for member in members]
        self.numbers = [member.number for member in members]
        straight = all(member.axes == tuple(range(len(member.axes))) for member in members)
        self.axes = None if straight else [member.axes for member in members]
        self.kernels, self.factors = kernels, factors[:, None]
        self.elements, self.room = torch.empty(2, len(kernels), self.window, dtype=torch.float32)
        self.parts, self.kernel_parts = (
            [part.view(one.shape) for part, one in zip(whole.flatten().split(sizes), members, strict=True)]
            for whole in (self.elements, self.kernels if self.window == 1 else self.elements)
        )
        in_l1 = sum(member.size for member in members if member.in_l1) // self.window
        self.in_l1, self.counted_room = self.elements[:in_l1], self.room[:in_l1]
        self.ones = torch.ones(self.window, dtype=torch.float32)

    def powers(self, rule: Criterion) -> tuple[int, float]:
        """Norm, and the power of the sum over a kernel; of one element both norms are its absolute value."""
        norm = 1 if self.window == 1 else rule.norm
        return norm, rule.inner / norm

    def of(self, tensors: Sequence[_Part]) -> list[_Part]:
        """The tensors of this run, with the axes of a kernel's elements last."""
        found = [tensors[number] for number in self.numbers]
        if self.axes is None:
            return found
        return [None if one is None else one.permute(axes) for one, axes in zip(found, self.axes, strict=True)]

    def read(self, weights: Sequence[Tensor], norm: int) -> None:
        """Take the sums over kernels."""
        if norm == 1:
            for part, weight in zip(self.kernel_parts, self.of(weights), strict=True):
                _apply(torch.abs, weight, part)
        else:
            torch._foreach_copy_(self.parts, self.of(weights))
            torch.mul(self.elements, self.elements, out=self.room)
        if self.window > 1:
            # A product with ones is several times faster than torch's sum over a few neighbours; autocast leaves what
            # has an `out` alone.
            torch.mv(self.elements if norm == 1 else self.room, self.ones, out=self.kernels)

    def write(
        self, weights: Sequence[Tensor], norm: int, sign: float, outs: Sequence[Tensor | None], accumulate: bool
    ) -> None:
        """Write factor * d|w|^norm/dw / norm, and where the norm is 2 add sign * d|w|/dw."""
        if norm == 1:
            for part, weight in zip(self.parts, self.of(weights), strict=True):
                _apply(torch.sgn, weight, part)
        else:
            torch._foreach_copy_(self.parts, self.of(weights))
            torch.sgn(self.in_l1, out=self.counted_room)
        self.elements.mul_(self.factors)
        if norm == 2 and sign:
            self.in_l1.add_(self.counted_room, alpha=sign)
        wanted = [(out, part) for out, part in zip(self.of(outs), self.parts, strict=True) if out is not None]
        if wanted:
            goals, steps = [out for out, _ in wanted], [part for _, part in wanted]
            (torch._foreach_add_ if accumulate else torch._foreach_copy_)(goals, steps)


def _apply(function: Callable[..., Tensor], weight: Tensor, out: Tensor) -> None:
    """Apply a function to a tensor; ``out`` is of float32."""
    function(weight if weight.dtype == out.dtype else out.copy_(weight), out=out)


class Flat:
    """The small weights in a list.

    Attributes:
        numbers: their places in the list.
        columns: the column of each kernel.
        counted: 1 for each kernel that is counted in the sum of absolute values, else 0; None: all are.
        slopes: the derivatives that were worked out from the kernels as they stand here.
    """

    def __init__(self, members: Sequence[_Small]):
        members = sorted(members, key=lambda one: (one.window, not one.in_l1, one.number))
        self.numbers = frozenset(member.number for member in members)
        kernels = [member.size // member.window for member in members]
        self.kernels, self.factors = torch.empty(2, sum(kernels), dtype=torch.float32)
        self.columns = torch.cat([member.columns() for member in members])
        given = torch.tensor([member.in_l1 for member in members]).repeat_interleave(torch.tensor(kernels))
        self.in_l1 = None if bool(given.all()) else given.float()
        self.runs, start = [], 0
        for _, run in groupby(members, lambda one: one.window):
            own = list(run)
            end = start + sum(member.size // member.window for member in own)
            self.runs.append(_Run(own, self.kernels[start:end], self.factors[start:end]))
            start = end
        self.slopes: Tensor | None = None
        self._lock = Lock()
        self._grouped: tuple[Tensor | None, tuple[int, int], Tensor] = (None, (0, 0), self.columns)

    def _groups(self, index: Tensor | None, groups: int) -> Tensor:
        """The outer group of each kernel; ``groups`` for kernels in none."""
        if index is None:
            return self.columns
        state = 0 if index.is_inference() else index._version, groups
        if self._grouped[0] is not index or self._grouped[1] != state:
            self._grouped = index, state, index.where(index >= 0, groups)[self.columns]
        return self._grouped[2]

    def _stretches(self, rule: Criterion) -> list[tuple[Tensor, Tensor, int, float]]:
        """Kernels of one norm and power together, with their factors."""
        if rule.norm == 1:
            return [(self.kernels, self.factors, 1, float(rule.inner))]
        return [(run.kernels, run.factors[:, 0], *run.powers(rule)) for run in self.runs]

    def _read(self, weights: Sequence[Tensor], rule: Criterion, absolute: Tensor) -> None:
        """Take the sums over kernels, and roots of them; add the absolute values of what is counted."""
        for run in self.runs:
            norm, _ = run.powers(rule)
            run.read(weights, norm)
            if norm == 2:
                absolute += torch.abs(run.in_l1, out=run.counted_room).sum()
            elif rule.norm == 2:
                absolute += run.kernels[: len(run.in_l1)].sum()
        if rule.norm == 1:
            absolute += (self.kernels if self.in_l1 is None else self.kernels * self.in_l1).sum()
        for kernels, _, _, power in self._stretches(rule):
            if power == 0.5:
                kernels.sqrt_()

    def add_sums(
        self, weights: Sequence[Tensor], index: Tensor | None, groups: int, rule: Criterion, total: Tensor,
        absolute: Tensor,
    ) -> None:  # fmt: skip
        """Add to the groups' sums of norm^inner, and to the sum of absolute values of what is counted.

        Args:
            total: of all groups and, behind them, of what is in none.
        """
        with self._lock:
            self.slopes = None
            self._read(weights, rule, absolute)
            terms = [kernels.square() if power == 2 else kernels for kernels, _, _, power in self._stretches(rule)]
            whole = terms[0] if len(terms) == 1 else torch.cat(terms)
            total.scatter_add_(0, self._groups(index, groups), whole.to(total.dtype))

    def write(
        self, weights: Sequence[Tensor], index: Tensor | None, slopes: Tensor, rule: Criterion,
        scale: tuple[float, float], outs: Sequence[Tensor | None], accumulate: bool,
    ) -> None:  # fmt: skip
        """Write the gradient, or add it."""
        factor, sign = scale
        padded = factor * slopes if index is None else torch.cat([factor * slopes, slopes.new_zeros(1)])
        with self._lock:
            read, self.slopes = self.slopes is slopes, None
            if not read:
                self._read(weights, rule, slopes.new_zeros(()))
            torch.index_select(padded.float(), 0, self._groups(index, len(slopes)), out=self.factors)
            self._multiply(rule)
            if sign and rule.norm == 1:
                self.factors.add_(sign if self.in_l1 is None else sign * self.in_l1)
            for run in self.runs:
                norm, _ = run.powers(rule)
                if sign and norm == 1 != rule.norm:
                    run.factors[: len(run.in_l1)] += sign
                run.write(weights, norm, sign, outs, accumulate)
            self.slopes = slopes

    def _multiply(self, rule: Criterion) -> None:
        """Multiply the factors by the derivative of norm^inner by an element, over the element or its sign."""
        for kernels, factors, norm, power in self._stretches(rule):
            if power == 0.5:  # for a kernel of 0 any finite number will do: it is multiplied by elements that are 0
                factors.div_(kernels.clamp_min_(torch.finfo(kernels.dtype).tiny ** 0.5))
            elif power == 2:
                factors.mul_(kernels)
            if power * norm != 1:
                factors.mul_(power * norm)


def flat(weights: Sequence[Tensor], readings: Sequence[WeightView], in_l1: Sequence[bool]) -> Flat | None:
    """The small weights of a list, on a CPU: the smallest, as many as there is room for; none of float64."""
    if weights[0].device.type != "cpu":
        return None
    kinds = tuple((tuple(weight.shape), weight.dtype != torch.float64) for weight in weights)
    return _made(kinds, tuple(readings), tuple(in_l1), ROOM)


@lru_cache(maxsize=8)
def _made(
    kinds: tuple[tuple[tuple[int, ...], bool], ...],
    readings: tuple[WeightView, ...],
    in_l1: tuple[bool, ...],
    room: int,
) -> Flat | None:
    members, first = [], 0
    for number, ((shape, single), how, count) in enumerate(zip(kinds, readings, in_l1, strict=True)):
        axes = (*(axis for axis in range(len(shape)) if axis not in how.window), *how.window)
        member = _Small(number, tuple(shape[axis] for axis in axes), axes, how, first, count)
        members += [member] if single and member.size else []
        first += column_count(shape, how)
    small = []
    for member in sorted(members, key=lambda one: one.size):
        room -= member.size
        small += [member] if room >= 0 else []
    with torch.inference_mode(False), torch.device("cpu"):  # what is made here is used in training too
        return Flat(small) if small else None
