"""Tables of a recipe, checked against the signature of what they configure: any pass or optimizer can be named."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from netsurgery.errors import InputError

__all__ = ["Arguments", "Place", "Table", "check", "near"]

Table = Mapping[str, Any]  # of a file
Arguments = dict[str, Any]  # by name


class Place:
    """The place of a table in a file, for messages."""

    def __init__(self, file: str, *path: str):
        self.file, self.path = file, path

    def at(self, key: str) -> Place:
        """A table inside this one."""
        return Place(self.file, *self.path, key)

    def error(self, text: str) -> InputError:
        """An error about this table, to be raised."""
        return InputError(f"{self.file}, [{'.'.join(self.path)}]: {text}" if self.path else f"{self.file}: {text}")


def check(target: Callable[..., object], table: object, place: Place, given: Collection[str] = ()) -> Arguments:
    """The table, if it holds arguments that the target takes.

    Args:
        target: a class or a function; the annotations of its parameters say which values fit.
        table: names and values, as a file gives them.
        given: parameters that the table may not set, as they come from elsewhere.

    Raises:
        InputError: no table, a name that the target does not take, a value of another type, or one that is missing.
    """
    if not isinstance(table, Mapping):
        raise place.error(f"expected a table, got {table!r}")
    hints = parameters(target)
    there = {name: hint for name, hint in hints.items() if name not in given and spell(hint)}
    for key, value in table.items():
        if key not in there:
            raise place.error(f"no key '{key}'{near(key, there)}; there are: {', '.join(there) or 'none'}")
        if not fits(value, there[key]):
            raise place.error(f"{key} = {value!r}: expected {spell(there[key])}")
    signature = inspect.signature(target).parameters
    missing = [name for name in there if name not in table and signature[name].default is inspect.Parameter.empty]
    if missing:
        raise place.error(f"{', '.join(missing)}: missing")
    return dict(table)


def parameters(target: Callable[..., object]) -> Arguments:
    """The parameters of a class or function by name, and their annotations."""
    hints = get_type_hints(inspect.getattr_static(target, "__init__") if isinstance(target, type) else target)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {k: hints.get(k, Any) for k, p in inspect.signature(target).parameters.items() if p.kind in named}


def fits(value: object, hint: Any) -> bool:
    """True if a value of a TOML or YAML file is of the annotated type; a whole number is a float too."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if kind is Literal:
        return value in inner and type(value) in {type(one) for one in inner}
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    if is_sequence(hint):
        return isinstance(value, list | tuple) and all(fits(one, item_of(hint)) for one in value)
    if kind is not None and issubclass(kind, Mapping):
        return isinstance(value, Mapping)
    return hint in (str, bool) and isinstance(value, hint)


def spell(hint: Any) -> str:
    """The type in words; empty for a type that no value in a file can have."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(filter(None, map(spell, inner))))
    if kind is Literal:
        return " or ".join(map(repr, inner))
    if is_sequence(hint):
        return f"a list of {spell(item_of(hint))}" if spell(item_of(hint)) else ""
    if kind is not None and isinstance(kind, type) and issubclass(kind, Mapping):
        return "a table"
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}.get(hint, "")


def is_sequence(hint: Any) -> bool:
    """True for types of lists and tuples."""
    kind = get_origin(hint)
    return isinstance(kind, type) and issubclass(kind, Sequence) and bool(get_args(hint))


def item_of(hint: Any) -> Any:
    """The type of a list's items."""
    return get_args(hint)[0]


def near(name: str, names: Collection[str]) -> str:
    """A proposal where a name resembles another."""
    found = get_close_matches(name, list(names), n=1)
    return f" (did you mean '{found[0]}'?)" if found else ""
