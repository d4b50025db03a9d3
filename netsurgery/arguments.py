"""Arguments of the wrong kind, in the wrong order or unknown: a sentence says what a function takes."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from numbers import Integral, Real
from typing import TypeGuard

from netsurgery.errors import InputError

__all__ = ["expect", "is_count", "is_real", "near_names", "require_counts"]


def expect(call: str, what: str, *given: tuple[object, type | tuple[type, ...]]) -> None:
    """Make sure that arguments are of the kinds that a function takes.

    Args:
        call: such as ``rewrite(model, edit)``.
        what: the kinds of its arguments in words, in their order.
        given: each argument, and of which types it may be.

    Raises:
        InputError: one is of another type.

    Example:
        >>> expect("repeat(text, times)", "a text and a number", ("ab", str), (3, int))
        >>> expect("repeat(text, times)", "a text and a number", (3, str), ("ab", int))
        Traceback (most recent call last):
        netsurgery.errors.InputError: repeat(text, times) takes a text and a number, got int, str
    """
    if not all(isinstance(value, kinds) for value, kinds in given):
        found = ", ".join(
            f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__ for value, _ in given
        )
        raise InputError(f"{call} takes {what}, got {found}")


def is_count(value: object, least: int | None = None) -> TypeGuard[int]:
    """True if a value is a whole number, of at least ``least`` where that is given; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool) and (least is None or int(value) >= least)


def is_real(value: object) -> TypeGuard[float]:
    """True if a value is a number; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def require_counts(owner: object, *names: str, least: int = 1) -> None:
    """Make sure that attributes, where they are not None, are whole numbers of at least ``least``.

    Raises:
        InputError: one is not; the message names it as an argument of the owner's class.

    Example:
        >>> require_counts(slice(2, 0), "start", "stop")
        Traceback (most recent call last):
        netsurgery.errors.InputError: slice(stop=0): a whole number of at least 1
    """
    for name in names:
        value = getattr(owner, name)
        if value is not None and not is_count(value, least):
            raise InputError(f"{type(owner).__name__}({name}={value!r}): a whole number of at least {least}")


def near_names(name: str, names: Iterable[str], suffix: str = "") -> str:
    """The end of a sentence about an unknown name: those that resemble it, or nothing.

    Example:
        >>> near_names("layer5", ["stem", "layer3", "layer4"])
        '; did you mean layer4 or layer3?'
    """
    near = [f"{match}{suffix}" for match in get_close_matches(name, list(names), n=3)]
    return f"; did you mean {' or '.join(near)}?" if near else ""
