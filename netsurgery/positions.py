"""Which positions along an axis hold which units of its channels: the one evaluator of axis expressions.

The oracle (``verification.py``) has another of its own, on purpose: it must not share a mistake.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from itertools import accumulate

import torch
from torch import Tensor

from netsurgery.axes import Axis, find

__all__ = ["masked", "positions", "units_at"]


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


def masked(axis: Axis, masks: Callable[[Axis], Tensor]) -> Tensor:
    """Which positions along an axis hold only units that stay, in each of several blocks: bool, ``(blocks, size)``.

    Args:
        masks: for a channel which units stay, ``(blocks, units)``; ``(1, units)`` if in all blocks the same.
    """
    axis = find(axis)
    if not axis.op:
        return masks(axis)
    parts = [masked(term, masks) for term in axis.terms]
    if axis.op == "concat":
        blocks = max(map(len, parts))
        return torch.cat([part.expand(blocks, -1) for part in parts], 1)
    return reduce(lambda a, b: (a[:, :, None] & b[:, None]).flatten(1), parts)


def units_at(axis: Axis) -> list[tuple[Axis, Tensor]]:
    """The inverse: each channel of an axis, and which of its units stands at each position: int64, ``(size,)``, or -1.

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
