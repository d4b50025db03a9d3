"""The criteria of hierarchical group sparse regularisation, and how they read a weight.

Source: Mitsuno, Miyao, Kurita, "Hierarchical Group Sparse Regularization for Deep Convolutional Neural Networks",
IJCNN 2020, arXiv 2004.04394.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "CRITERIA",
    "Criterion",
    "Name",
    "WeightView",
    "accumulator",
    "arranged",
    "canonical",
    "column_count",
    "reading",
]

Name = Literal[
    "l1", "group_lasso", "hierarchical_sqrt_group_lasso", "hierarchical_sq_group_lasso", "exclusive_sparsity",
    "hierarchical_sqrt_exclusive", "hierarchical_sq_exclusive", "group_l12", "hierarchical_sqrt_group_l12",
    "hierarchical_sq_group_l12",
]  # fmt: skip


class Criterion(NamedTuple):
    """``sum over outer groups of (sum over the group's kernels of (norm of the kernel)^inner)^outer``.

    Attributes:
        norm: 1 or 2, the norm over a kernel's elements.
        inner: power of each kernel's norm.
        outer: power of each outer group's sum.
    """

    norm: int
    inner: float
    outer: float


CRITERIA: dict[Name, Criterion] = {
    "l1": Criterion(1, 1, 1),
    "group_lasso": Criterion(2, 2, 0.5),
    "hierarchical_sqrt_group_lasso": Criterion(2, 1, 0.5),
    "hierarchical_sq_group_lasso": Criterion(2, 1, 2),
    "exclusive_sparsity": Criterion(1, 1, 2),
    "hierarchical_sqrt_exclusive": Criterion(1, 2, 0.5),
    "hierarchical_sq_exclusive": Criterion(1, 2, 2),
    "group_l12": Criterion(1, 1, 0.5),
    "hierarchical_sqrt_group_l12": Criterion(1, 0.5, 0.5),
    "hierarchical_sq_group_l12": Criterion(1, 0.5, 2),
}


class WeightView(NamedTuple):
    """A weight as blocks of kernels, in columns that are the outer groups.

    Attributes:
        blocks: groups of a grouped convolution, the leading factor of axis 0; they share no outer group.
        outer: the axes whose positions are the outer groups, together with the blocks.
        window: the axes of a kernel's elements. The other axes are summed over within an outer group.
    """

    blocks: int = 1
    outer: tuple[int, ...] = (1,)
    window: tuple[int, ...] = ()


def reading(shape: tuple[int, ...], grouping: str, groups: int = 1, transposed: bool = False) -> WeightView:
    """The reading of a layer's weight ``(out, in / groups, *kernel)``, transposed ``(in, out / groups, *kernel)``."""
    return WeightView(groups, (int((grouping == "feature") != transposed),), tuple(range(2, len(shape))))


def column_count(shape: Sequence[int], how: WeightView) -> int:
    """The number of columns of a weight: its blocks times the positions of its outer axes."""
    count = 1 if 0 in how.outer else how.blocks
    for axis in how.outer:  # torch.compile does not take math.prod of a generator
        count *= shape[axis]
    return count


def arranged(weight: Tensor, how: WeightView) -> tuple[Tensor, tuple[int, int, int, int]]:
    """A view of the weight with its axes in the order blocks, rows, columns, window; and the sizes of these four."""
    split: Tensor = weight.unflatten(0, (how.blocks, -1))  # (blocks, axis 0 / blocks, other axes)
    outer, window = [axis + 1 for axis in how.outer], [axis + 1 for axis in how.window]
    rows = [axis for axis in range(1, split.dim()) if axis not in (*outer, *window)]
    sizes = [prod(split.shape[axis] for axis in axes) for axes in (rows, outer, window)]
    return split.permute(0, *rows, *outer, *window), (how.blocks, sizes[0], sizes[1], sizes[2])


def canonical(weight: Tensor, how: WeightView) -> Tensor:
    """The weight as ``(blocks, rows, columns, window)``: a view wherever its strides allow one.

    The outer groups are the blocks times the columns; rows are summed over.
    """
    view, sizes = arranged(weight, how)
    return view.reshape(sizes)


def accumulator(*weights: Tensor) -> torch.dtype:
    """The type to add in: float32, or float64 if a weight is."""
    return torch.float64 if any(weight.dtype == torch.float64 for weight in weights) else torch.float32
