"""Find the changes that code makes in all that it can reach: arguments, attributes, containers, globals, closures.

A rewritten ``forward`` computes what the code computed, and writes nothing where others see it. So all that the code
can reach is noted before it runs, object by object, and compared afterwards.
"""

from __future__ import annotations

import array
import collections
import dis
import functools
import itertools
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from types import CellType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy
from torch import Tensor, nn

from netsurgery.capture.source_locations import format_where

__all__ = ["Reach"]

Parts = list[tuple[object, object]]  # of an object: names or keys, and what they stand for
Label = tuple[Any, object]  # the label of the object around, or None; and the name in it
Held = tuple[object, Label, Parts]
Reader = Callable[[Any], Parts]  # lists the parts of the objects of one class


class Reach:
    """The present state of all that can be reached from some objects.

    Args:
        roots: objects by name.
        ran: the code of the functions that run; objects that they name can be reached, too.
    """

    def __init__(self, roots: Mapping[str, object], ran: Set[CodeType]):
        self.ran = ran
        self.held: dict[int, Held] = {}  # by id of the object, which is kept alive
        for name, root in {**roots, **_DRAWN}.items():
            self.note(root, (None, name))

    def note(self, root: object, label: Label | None = None) -> None:
        """Note the present state of all that can be reached from an object."""
        for one in self.walk(root, label or self.label(root)):
            self.held[id(one[0])] = one

    def label(self, value: object) -> Label:
        """The label under which an object was found."""
        return self.held[id(value)][1] if id(value) in self.held else (None, type(value).__name__)

    def changes(self, code: Iterable[CodeType], root: object = None) -> list[str]:
        """Each change since objects were noted (only below ``root``, if given), with a line of code that names it."""
        found = []
        for value, _, parts in self.noted() if root is None else self.walk(root, self.label(root)):
            _, label, before = self.held.get(id(value), (value, (None, ""), parts))
            for name in _differing(before, parts)[:1]:
                label = label if isinstance(value, _CONTAINERS) else _below(value, label, name)
                found.append(f"changes {_text(label)}{_line_naming(label, code)}")
        return found

    def noted(self) -> Iterator[Held]:
        """All objects that are noted, with the parts that they have now."""
        for value, label, _ in self.held.values():
            yield value, label, self.parts(value) or []

    def walk(self, root: object, label: Label) -> Iterator[Held]:
        """An object and all that can be reached from it and can change, with labels and parts."""
        stack: list[tuple[object, Label]] = [(root, label)]
        seen = set()
        while stack:
            value, label = stack.pop()
            if type(value) in _ATOMS or id(value) in seen:
                continue
            seen.add(id(value))
            if (parts := self.parts(value)) is not None:
                yield value, label, parts
                stack += [(item, _below(value, label, name)) for name, item in parts]

    def parts(self, value: object) -> Parts | None:
        """The parts of an object; None where it has none that code changes."""
        if not isinstance(value, FunctionType):  # no class can derive that of functions
            kind: type = type(value)
            read = _reader(kind)
            return None if read is None else read(value)
        found: Parts = [*value.__dict__.items()]
        if value.__code__ in self.ran:
            found += zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
            found += _defaults(value)
            found += _named(value.__globals__, _names(value.__code__))
        return found


class _Digest(int):
    """A hash of the state of an object that has no parts."""


def _differing(before: Parts, after: Parts) -> list[object]:
    """The names that stand for something else than before."""
    pairs = zip(before, after, strict=False)
    if len(before) == len(after) and all(a is b and _unchanged(x, y) for (a, x), (b, y) in pairs):
        return []
    old, new = ({id(name): (name, item) for name, item in parts} for parts in (before, after))
    gone = [name for key, (name, _) in old.items() if key not in new]
    return gone + [
        name for key, (name, item) in new.items() if key not in old or not _unchanged(old[key][1], item)
    ] or [""]


def _unchanged(one: object, other: object) -> bool:
    return one is other or (type(one) is _Digest and one == other)


def _below(value: object, label: Label, name: object) -> Label:
    """The label of a part of an object."""
    if isinstance(value, FunctionType) and name not in value.__dict__:
        return None, name  # a global, or a variable of a function around
    if isinstance(value, type):
        return (None, value.__name__), name
    return label if isinstance(name, str) and name == "" else (label, name)


def _text(label: Label | None) -> str:
    if label is None:
        return ""
    around, name = _text(label[0]), label[1]
    if isinstance(name, str) and name.isidentifier():
        return f"{around}.{name}" if around else name
    return f"{around}[{str(name)[:40]!r}]"


# The parts of objects ------------------------------------------------------------------------------------------------


@functools.cache
def _reader(kind: type) -> Reader | None:
    """The function that lists the parts of objects of a class; None for a class whose objects do not change."""
    read = next((read for known, read in _KNOWN.items() if issubclass(kind, known)), None)
    if _is_library_class(kind):
        return _of_object if kind is SimpleNamespace else read
    return _of_object if read is None else _both(read) if issubclass(kind, _CONTAINERS) else read


def _both(read: Reader) -> Reader:
    """A reader of containers of the user's own classes: their items and their attributes."""
    return lambda value: [*read(value), *_of_object(value)]


def _of_object(value: object) -> Parts:
    slots = [name for base in type(value).__mro__ for name in _listed(vars(base).get("__slots__", ()))]
    found = [(name, getattr(value, name)) for name in slots if name != "__dict__" and hasattr(value, name)]
    return [*found, *getattr(value, "__dict__", {}).items(), ("", type(value))]


def _listed(slots: str | Iterable[str]) -> list[str]:
    return [slots] if isinstance(slots, str) else list(slots)


def _of_module(module: nn.Module) -> Parts:
    own = [item for item in module.__dict__.items() if item[0] not in _INTERNAL or item[1]]  # most have no hooks
    return [*own, ("", type(module))]


def _of_class(kind: type) -> Parts:
    own = [base for base in kind.__mro__ if not _is_library_class(base)]
    return [item for base in own for item in vars(base).items() if not _is_magic(item[0])]


def _is_magic(name: str) -> bool:
    return name.startswith(("__", "_abc_"))


def _of_cell(cell: CellType) -> Parts:
    try:
        return [("", cell.cell_contents)]
    except ValueError:  # nothing has been put into it yet
        return []


def _state(read: Callable[[Any], object]) -> Reader:
    return lambda value: [("", _Digest(hash(read(value))))]


def _attributes(*names: str) -> Reader:
    return lambda value: [("", getattr(value, name)) for name in names]


_CONTAINERS = (dict, list, tuple, set, frozenset, collections.deque)
_KNOWN: dict[type | tuple[type, ...], Reader | None] = {
    (int, float, complex, str, bytes, Tensor, ModuleType): None,
    nn.Module: _of_module,
    type: _of_class,
    **dict.fromkeys(_CONTAINERS, lambda value: [("", item) for item in value]),
    dict: lambda value: list(value.items()),
    CellType: _of_cell,
    MethodType: _attributes("__self__", "__func__"),
    functools.partial: _attributes("func", "args", "keywords"),
    (staticmethod, classmethod, functools._lru_cache_wrapper): _attributes("__wrapped__"),
    property: _attributes("fget", "fset"),
    (bytearray, array.array, itertools.count): _state(repr),
    random.Random: _state(lambda value: value.getstate()),
    numpy.ndarray: _state(lambda value: value.tobytes()),
    numpy.random.Generator: _state(lambda value: str(value.bit_generator.state)),
    numpy.random.RandomState: _state(lambda value: str(value.get_state()[2:])),  # its position among the numbers
}
_ATOMS = frozenset([int, float, complex, bool, str, bytes, type(None), Tensor, nn.Parameter, CodeType, ModuleType])
_INTERNAL = frozenset(nn.Module().__dict__)
_DRAWN = {
    "random": getattr(random.random, "__self__", None),
    "numpy.random": getattr(numpy.random.rand, "__self__", None),
}
_LIBRARIES = sys.stdlib_module_names | {"torch", "numpy", "netsurgery"}


def _is_library_class(kind: type) -> bool:
    """True if a class is one of Python, torch, numpy or netsurgery: code of the user's does not own its objects."""
    return str(kind.__module__).partition(".")[0] in _LIBRARIES


# The reach of functions ----------------------------------------------------------------------------------------------


@functools.cache
def _names(code: CodeType) -> tuple[str, ...]:
    """The names of globals and attributes in a function, and in the functions that are written in it."""
    inner = [name for one in code.co_consts if isinstance(one, CodeType) for name in _names(one)]
    return tuple(dict.fromkeys([*code.co_names, *inner]))


def _named(scope: Mapping[str, object], names: tuple[str, ...]) -> Parts:
    """The objects that names stand for: globals, and attributes of the user's own modules."""
    found: Parts = []
    for name in names:
        if name in scope:
            value = scope[name]
            found.append((name, value))
            if isinstance(value, ModuleType) and value.__name__.partition(".")[0] not in _LIBRARIES:
                found += _named(vars(value), tuple([other for other in names if other != name]))
    return found


def _defaults(function: FunctionType) -> Parts:
    code, given = function.__code__, function.__defaults__ or ()
    names = code.co_varnames[code.co_argcount - len(given) : code.co_argcount]
    return [*zip(names, given, strict=True), *(function.__kwdefaults__ or {}).items()]


@functools.cache
def _lines(code: CodeType) -> dict[str, int]:
    """The first line on which a function mentions a name."""
    found: dict[str, int] = {}
    for one in dis.get_instructions(code):
        if isinstance(one.argval, str) and one.positions is not None and one.positions.lineno is not None:
            found.setdefault(one.argval, one.positions.lineno)
    return found


def _line_naming(label: Label | None, code: Iterable[CodeType]) -> str:
    """The line that names the last part of a label that any line names."""
    while label is not None:
        label, name = label
        found = ((one.co_filename, _lines(one)[name]) for one in code if isinstance(name, str) and name in _lines(one))
        if (where := next(found, None)) is not None:
            return f" {format_where(where)}"
    return ""
