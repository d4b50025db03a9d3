"""The outer groups of a list of weights, and the module that computes on their device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from netsurgery.kernels import hgsr_cpu
from netsurgery.kernels.criteria import WeightView

__all__ = ["Layout", "backend", "parsed"]


@dataclass(frozen=True)
class Layout:
    """The outer groups of a list of weights.

    Attributes:
        readings: how each weight is read. A weight may be listed twice, read in two ways.
        counted: whether each is counted in the sum of absolute values.
        index: int64, shape (columns of all weights,): each column's outer group, -1 for none; None: each its own.
        groups: the number of outer groups; where there is no index, 0 says as many as there are columns.
    """

    readings: tuple[WeightView, ...]
    in_l1: tuple[bool, ...]
    index: Tensor | None = None
    groups: int = 0

    def to(self, device: torch.device) -> Layout:
        """The layout for weights on a device."""
        same = self.index is None or self.index.device == device
        return self if same else replace(self, index=self.index.to(device))  # type: ignore[union-attr]

    @property
    def key(self) -> list[int]:
        """The readings as numbers: of each the blocks, both kinds of axes as bits, and 1 if it is counted in L1."""
        found: list[int] = []
        for how, count in zip(self.readings, self.in_l1, strict=True):
            found += [how.blocks, _bits(how.outer), _bits(how.window), int(count)]
        return found


def _bits(axes: tuple[int, ...]) -> int:
    found = 0
    for axis in axes:
        found += 2**axis
    return found


@lru_cache(maxsize=256)
def parsed(key: tuple[int, ...]) -> tuple[tuple[WeightView, ...], tuple[bool, ...]]:
    def axes(bits: int) -> tuple[int, ...]:
        return tuple(axis for axis in range(bits.bit_length()) if bits >> axis & 1)

    rows = [key[i : i + 4] for i in range(0, len(key), 4)]
    return tuple(WeightView(n, axes(outer), axes(window)) for n, outer, window, _ in rows), tuple(
        bool(r[3]) for r in rows
    )


def backend(weights: Sequence[Tensor]) -> ModuleType:
    """The module that does the work on the weights' device."""
    if weights[0].is_cuda and find_spec("triton"):
        return import_module("netsurgery.kernels.hgsr_triton")
    return hgsr_cpu
