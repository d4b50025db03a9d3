"""Check the inputs of a rewritten ``forward``: it refuses kinds of inputs that it was not traced with.

Its graph is one path through the original code, and another kind of input may take another path.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from netsurgery.errors import InputError

__all__ = ["EXPECTATIONS", "expect_keys", "expect_same", "expect_tensor", "expect_value", "first_that_fits"]


T = TypeVar("T")


def _refuse(name: str, traced: str, found: str) -> None:
    raise InputError(
        f"netsurgery rewrote this module's forward as it runs where '{name}' is {traced}, got {found}: "
        "do the surgery again with example_inputs of that kind"
    )


def expect_tensor(value: object, dim: int, kind: str, name: str) -> None:
    """Make sure that an input is a tensor of ``dim`` dimensions, and "floating", "complex" or of the dtype ``kind``.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(value, Tensor):
        _refuse(name, f"a tensor of {dim} dimensions", repr(value)[:80])
    elif value.dim() != dim:
        _refuse(name, f"a tensor of {dim} dimensions", f"{value.dim()}")
    else:
        sort = "floating" if torch.is_floating_point(value) else "complex" if torch.is_complex(value) else ""
        if kind not in (sort, str(value.dtype)):
            _refuse(name, f"a tensor of {kind} numbers", str(value.dtype))


def expect_same(value: object, other: object, name: str) -> None:
    """Make sure that two inputs are one tensor.

    Raises:
        InputError: they are two.
    """
    if value is not other:
        _refuse(name, "the same tensor as another input", "another one")


def expect_value(value: object, traced: object, name: str) -> None:
    """Make sure that an input that is no tensor has the traced value.

    Raises:
        InputError: it has another value.
    """
    if value is not traced and (isinstance(value, Tensor) or traced is None or value != traced):
        _refuse(name, repr(traced), "a tensor" if isinstance(value, Tensor) else repr(value)[:80])


def expect_keys(value: Collection[str], traced: int | list[str], name: str) -> None:
    """Make sure that a dictionary has the traced keys, or a list the traced length.

    Raises:
        InputError: they are others.
    """
    if (len(value) if isinstance(traced, int) else list(value)) != traced:
        _refuse(
            name,
            f"{traced} items" if isinstance(traced, int) else f"{traced}",
            f"{list(value) if isinstance(value, dict) else len(value)}",
        )


EXPECTATIONS = (expect_tensor, expect_same, expect_value, expect_keys)


def first_that_fits(branches: Sequence[Callable[..., T]], *args: object, **kwargs: object) -> T:
    """The result of the first branch of a module's code that accepts the inputs; its first lines check them.

    Raises:
        InputError: no branch accepts them; the last one tells why.
    """
    for branch in branches[:-1]:
        with contextlib.suppress(InputError):
            return branch(*args, **kwargs)
    return branches[-1](*args, **kwargs)
