"""The meaning of the hierarchical group sparse criteria, in plain differentiable torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from netsurgery.kernels.criteria import CRITERIA, Criterion, Name, WeightView, accumulator, canonical

__all__ = ["column_sums", "finalize", "power", "reference"]


def power(x: Tensor, exponent: float) -> Tensor:
    """``x ** exponent`` for x >= 0, where the derivative at 0 is 0 (that of a square root is infinite)."""
    if exponent in (1, 2):
        return x if exponent == 1 else x * x
    other = x != 0  # also NaN, which must not get lost
    return torch.where(other, torch.where(other, x, 1) ** exponent, 0)


def column_sums(weight: Tensor, how: WeightView, criterion: Criterion) -> Tensor:
    """Sums over each outer group's kernels of norm^inner.

    Returns:
        Shape (blocks * columns,), in float32, or float64 for weights of float64.
    """
    weight = weight.to(accumulator(weight))
    powers = canonical(weight, how).abs() if criterion.norm == 1 else canonical(weight, how).square()
    return power(powers.sum(3), criterion.inner / criterion.norm).sum(1).flatten()


def reference(
    weights: Sequence[Tensor],
    criterion: Name,
    readings: Sequence[WeightView],
    index: Tensor | None = None,
    groups: int = 0,
) -> Tensor:
    """The value of a criterion over a list of weights; autograd gives its gradient.

    Args:
        index: shape (columns of all weights,): the outer group of each column, -1 for none; None: each its own.
        groups: the number of outer groups, where there is an index.
    """
    rule = CRITERIA[criterion]
    if not weights:
        return torch.zeros(())
    sums = torch.cat([column_sums(w, how, rule) for w, how in zip(weights, readings, strict=True)])
    if index is not None:
        sums = sums.new_zeros(groups).index_add(0, index[index >= 0], sums[index >= 0])
    return power(sums, rule.outer).sum()


def finalize(sums: Tensor, absolute: Tensor, rule: Criterion) -> tuple[Tensor, Tensor]:
    """The criterion and the sum of absolute values, shape (2,); and the criterion's derivative by each group's sum."""
    slopes = rule.outer * power(sums, rule.outer - 1)
    return torch.stack([power(sums, rule.outer).sum(), absolute]), slopes
