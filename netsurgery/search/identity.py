"""Fingerprints by which two searches can be told apart: of networks, and of functions and objects that users pass."""

from __future__ import annotations

import dis
import functools
import hashlib
import pickle
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from netsurgery.capture.copies import named_modules, named_tensors
from netsurgery.errors import InputError

__all__ = ["fingerprint", "is_plain", "of_network"]

_PLAIN = (type(None), type(...), bool, int, float, complex, str, bytes)
_CODE = (types.FunctionType, staticmethod, classmethod, property)
_LIBRARIES = (*sys.stdlib_module_names, "torch", "netsurgery")


def fingerprint(what: str, value: Any) -> str:
    """A fingerprint of a value that is the same in another process.

    Functions and classes count by their code, with defaults, closures, and the functions and plain values that they
    read of their module; those of installed libraries by name and version; objects by class and pickled state.

    Args:
        what: names the argument in the message.

    Raises:
        InputError: it holds something whose state cannot be told, such as a generator or an open file.
    """
    try:
        return _Walk().of(value)
    except (TypeError, AttributeError, pickle.PickleError, RuntimeError) as error:  # as objects refuse to be pickled
        raise InputError(
            f"{what} cannot be told from another for the log ({error}): pass one that can be pickled, or log=None"
        ) from error


def of_network(model: nn.Module) -> str:
    """A fingerprint of the modules of a network, their plain settings, and their tensors.

    Raises:
        InputError: the class of a module holds something whose state cannot be told.
    """
    parts = list[str]()
    for path, module in named_modules(model).items():
        settings = {key: one for key, one in vars(module).items() if key != "training" and is_plain(one)}
        own = fingerprint(f"'{path or 'the network'}' ({type(module).__name__})", (type(module), settings))
        parts += [path, own, module.extra_repr()]
    for path, tensor in named_tensors(model):
        parts += [path, _of_tensor(tensor), str(tensor.requires_grad)]
    return _join(parts)


class _Walk:
    """The way through a value; one that holds itself is named by how far out it began."""

    def __init__(self) -> None:
        self.met: dict[int, tuple[str, Any]] = {}  # the value too, so that no other one takes its place in memory
        self.depth = 0

    def of(self, value: Any) -> str:
        if isinstance(value, _PLAIN):
            return _join((type(value).__name__, repr(value)))
        if id(value) not in self.met:
            self.met[id(value)] = f"the one at depth {self.depth}", value
            self.depth += 1
            self.met[id(value)] = _join(self._parts(value)), value
            self.depth -= 1
        return self.met[id(value)][0]

    def _parts(self, value: Any) -> Iterable[str]:
        if isinstance(value, Tensor):
            return ("tensor", _of_tensor(value), str(value.requires_grad))
        if isinstance(value, types.ModuleType):
            return ("module", value.__name__)
        if isinstance(value, set | frozenset):
            return (type(value).__name__, *sorted(map(self.of, value)))
        if type(value) in (tuple, list):
            return (type(value).__name__, *map(self.of, value))
        if type(value) is dict:
            return ("dict", *(self.of(one) for pair in value.items() for one in pair))
        if isinstance(value, types.FunctionType | type) and _is_of_a_library(value):
            return (_name(value), _version(value))
        if isinstance(value, type):
            return self._of_class(value)
        return self._of_callable(value)

    def _of_class(self, value: type) -> Iterator[str]:
        yield _name(value)
        yield from map(self.of, value.__bases__)
        for key, one in vars(value).items():
            told = isinstance(one, _CODE) or not key.startswith("__")  # the others are notes of Python's
            if told and key != "_abc_impl" and not isinstance(one, types.MemberDescriptorType):
                yield key
                yield self.of(one)

    def _of_callable(self, value: Any) -> Iterable[str]:
        compiled = vars(value).get("_torchdynamo_orig_callable") if isinstance(value, types.FunctionType) else None
        if compiled is not None:
            return ("compiled", self.of(compiled))
        if isinstance(value, types.FunctionType):
            return self._of_function(value)
        if isinstance(value, types.CodeType):
            return self._of_code(value)
        if isinstance(value, types.MethodType):
            return ("method", self.of(value.__func__), self.of(value.__self__))
        if isinstance(value, functools.partial):
            return ("partial", *map(self.of, (value.func, value.args, value.keywords)))
        if isinstance(value, staticmethod | classmethod):
            return (type(value).__name__, self.of(value.__func__))
        if isinstance(value, property):
            return ("property", *map(self.of, (value.fget, value.fset, value.fdel)))
        if isinstance(value, types.CellType):
            return ("cell", self.of(_content(value)))
        return self._of_object(value)

    def _of_function(self, value: types.FunctionType) -> Iterator[str]:
        yield _name(value)
        yield self.of(value.__code__)
        yield from map(self.of, (value.__defaults__, value.__kwdefaults__, value.__closure__))
        yield self.of({key: one for key, one in vars(value).items() if key != "__wrapped__"})
        for name in dict.fromkeys(_globals_of(value.__code__)):
            found = value.__globals__.get(name)
            if isinstance(found, types.FunctionType | type | Tensor) or is_plain(found):
                yield name
                yield self.of(found)

    def _of_code(self, value: types.CodeType) -> Iterator[str]:
        yield hashlib.sha256(value.co_code).hexdigest()
        yield from map(self.of, (value.co_consts, value.co_names, value.co_freevars, value.co_varnames))

    def _of_object(self, value: Any) -> Iterator[str]:
        yield self.of(type(value))
        reduced = value.__reduce_ex__(4)
        if isinstance(reduced, str):  # pickled by name
            yield f"{_name(value)} {reduced}"
            yield self.of(getattr(value, "__wrapped__", None))
            return
        for index, one in enumerate(reduced[:5]):  # what makes it, arguments, state; then iterators of its items
            yield self.of(list(one) if index > 2 and one is not None else one)


def _join(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(f"{len(one)} {one}" for one in parts).encode()).hexdigest()[:16]


def _of_tensor(value: Tensor) -> str:
    raw = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(raw).hexdigest()}"


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', None)}.{getattr(value, '__qualname__', type(value).__qualname__)}"


def is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(is_plain, value))
    if isinstance(value, Mapping):
        return type(value) is dict and all(is_plain(one) for pair in value.items() for one in pair)
    return isinstance(value, _PLAIN)


def _is_of_a_library(value: Any) -> bool:
    """True if it lies at the top of a module that was installed, where its name says all but the version."""
    module = getattr(value, "__module__", None) or "builtins"
    if "<" in value.__qualname__ or module == "__main__":
        return False
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return module.partition(".")[0] in _LIBRARIES or "site-packages" in file or "dist-packages" in file


def _version(value: Any) -> str:
    return str(getattr(sys.modules.get((value.__module__ or "").partition(".")[0]), "__version__", ""))


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing is in it yet
        return None


def _globals_of(code: types.CodeType) -> Iterator[str]:
    """The names that code reads of its module, in functions inside it, too."""
    for one in dis.get_instructions(code):
        if one.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield str(one.argval)
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _globals_of(inner)
