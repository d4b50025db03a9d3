"""Tensors that a loop uses again and again: results for them are kept until one of them moves."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from operator import is_
from typing import Any, TypeVar

import torch
from torch import Tensor

from netsurgery.kernels.criteria import accumulator

__all__ = ["PLAIN", "Placed", "widest"]

PLAIN = (Tensor, torch.nn.Parameter)  # a tuple: the compiler of torch 2.8 knows no sets of classes
_T = TypeVar("_T", bound=Tensor | None)


class Placed(list[_T]):
    """Plain dense tensors, or None, and their addresses.

    Attributes:
        places: addresses.
        forms: strides, shapes and types; while these and the places are equal, all is read as before.
        kept: results for these tensors in these places, under keys of the modules that computed them.
    """

    def __init__(self, tensors: Iterable[_T]):
        super().__init__(tensors)
        held = [one for one in self if one is not None]
        self.places = list(map(Tensor.data_ptr, held))
        self.forms = (
            list(map(Tensor.stride, held)),
            list(map(Tensor.size, held)),
            [one.dtype for one in held],
            None if len(held) == len(self) else [one is None for one in self],
        )
        self.kept: dict[Hashable, Any] = {}

    def still(self, tensors: Sequence[_T]) -> bool:
        """True if the tensors are the same objects in the same places, with the same forms."""
        if len(tensors) != len(self) or not all(map(is_, self, tensors)):
            return False
        now = Placed(tensors)
        return now.places == self.places and now.forms == self.forms


def widest(tensors: Sequence[Tensor]) -> torch.dtype:
    """``accumulator`` of tensors that may be placed, without a look at each."""
    if isinstance(tensors, Placed):
        return torch.float64 if torch.float64 in tensors.forms[2] else torch.float32
    return accumulator(*tensors)
