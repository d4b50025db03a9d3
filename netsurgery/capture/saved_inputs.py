"""Example inputs as JSON, so that a saved edit can be read without them: shapes, and the values of whole numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from netsurgery.capture.inputs import Inputs, Tree

__all__ = ["described", "made"]

Json = Any  # numbers, texts and None in lists and dictionaries
_MOST = 10_000  # elements of a tensor whose values are written down


class _NotPlain(Exception):
    """An input holds something that JSON cannot."""


def described(inputs: Inputs) -> Json:
    """Inputs as JSON; None where they hold other objects than tensors, texts and numbers in lists and dictionaries.

    Masks and indices decide which way the code takes. So the values of whole numbers are kept, and of tensors of one or
    two different numbers; other values are not.
    """
    tensors: dict[int, int] = {}

    def describe(value: Tree) -> Json:
        if isinstance(value, Tensor):
            if id(value) in tensors:
                return {"same": tensors[id(value)]}
            tensors[id(value)] = len(tensors)
            kind = str(value.dtype).removeprefix("torch.")
            return {"shape": list(value.shape), "dtype": kind, **_values(value)}
        if type(value) in (list, tuple):
            return {type(value).__name__: [describe(item) for item in value]}
        if type(value) is dict and all(type(key) is str for key in value):
            return {"dict": {key: describe(item) for key, item in value.items()}}
        if value is None or type(value) in (bool, int, float, str):
            return value
        raise _NotPlain

    positional, keyword = inputs
    try:
        return describe(dict(keyword) if keyword else tuple(positional))
    except _NotPlain:
        return None


def _values(tensor: Tensor) -> dict[str, Json]:
    if tensor.is_meta or not tensor.numel() or tensor.is_complex() or tensor.layout != torch.strided:
        return {}
    first = tensor.detach().flatten()[0]
    if bool((tensor == first).all()):
        return {"fill": first.item()}
    few = tensor.numel() <= _MOST and (not tensor.is_floating_point() or len(tensor.detach().unique()) <= 2)
    return {"values": tensor.tolist()} if few else {}


def made(description: Json) -> Tree:
    """Example inputs from the result of ``described``: a tuple, or a dictionary of keyword inputs.

    Raises:
        LookupError, TypeError, ValueError, AttributeError, RuntimeError: this is something else.
    """
    tensors: list[Tensor] = []

    def make(value: Json) -> Tree:
        if not isinstance(value, dict):
            return value
        if "same" in value:
            return tensors[value["same"]]
        if "shape" in value:
            dtype = getattr(torch, value["dtype"])
            if "values" in value:
                tensors.append(torch.tensor(value["values"], dtype=dtype).reshape(value["shape"]))
            else:
                tensors.append(torch.full(value["shape"], value.get("fill", 0), dtype=dtype))
            return tensors[-1]
        ((kind, inner),) = value.items()
        if kind == "dict":
            return {key: make(item) for key, item in inner.items()}
        items = [make(item) for item in inner]
        return tuple(items) if kind == "tuple" else items

    return make(description)
