"""Positional and keyword inputs of a model, and the tensors in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = [
    "Args",
    "Inputs",
    "Kwargs",
    "Tree",
    "as_inputs",
    "is_namedtuple",
    "meta_inputs",
    "shapes_text",
    "tensors_in",
    "with_tensors",
]

Tree = Any  # tensors, or nodes of a graph in their place, and other values in nested tuples, lists and dictionaries
Args = tuple[Any, ...]  # positional arguments
Kwargs = dict[str, Any]  # keyword arguments
Inputs = tuple[Args, Kwargs]  # positional and keyword inputs of a model


def as_inputs(example_inputs: object) -> Inputs:
    """Positional and keyword inputs from what a user passes: a tuple, a list, a dictionary or one tensor."""
    if isinstance(example_inputs, Mapping):  # a tokenizer's result is one, too
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def tensors_in(value: object) -> list[Tensor]:
    """The tensors in an input or output, also in nested tuples, dictionaries, registered and plain objects."""
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, nn.Module | type) and not callable(leaf):
            found.extend(tensors_in(list(vars(leaf).values())))
    return found


def is_namedtuple(value: object) -> bool:
    """True if a value is a named tuple, such as a packed sequence."""
    return isinstance(value, tuple) and hasattr(value, "_fields")


def with_tensors(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """The same inputs with other tensors; one that is given twice stays one."""
    made: dict[int, Tensor] = {}

    def changed(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = change(tensor)
        return made[id(tensor)]

    result: Inputs = pytree.tree_map_only(Tensor, changed, inputs)
    return result


def meta_inputs(inputs: Inputs) -> Inputs:
    """Inputs without data."""
    return with_tensors(inputs, lambda tensor: torch.empty_like(tensor, device="meta"))


def shapes_text(value: object) -> str:
    """The shapes of the tensors in a value, such as ``1x3x224x224, 10``."""
    return ", ".join("x".join(map(str, tensor.shape)) or "()" for tensor in tensors_in(value))
