"""What a run without data leaves in the caches of the code that ran is taken out again, and numbers pass them by."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

__all__ = ["caches_kept", "caches_passed_by"]

Place = tuple[dict[str, Any], str, Any]  # where a cached function is global, under which name, and itself


@contextlib.contextmanager
def caches_kept(model: nn.Module) -> Iterator[None]:
    """Leave the caches of the modules that a model's code is in as they were.

    Those are functions with ``functools.lru_cache``, and dictionaries and lists that are global; a tensor without data
    that stays in one would meet the user's own run.
    """
    found = [value for name in _own(model) for value in vars(sys.modules[name]).values()]
    cached: list[Any] = [value for value in found if isinstance(value, functools._lru_cache_wrapper)]
    before = [wrapper.cache_info().currsize for wrapper in cached]
    tables = [(value, set(value)) for value in found if type(value) is dict]
    rows = [(value, len(value)) for value in found if type(value) is list]
    try:
        yield
    finally:
        for wrapper, size in zip(cached, before, strict=True):
            if wrapper.cache_info().currsize > size:
                wrapper.cache_clear()
        for table, keys in tables:
            for key in [key for key in table if key not in keys and _is_bare(table[key])]:
                del table[key]
        for row, length in rows:
            row[length:] = [item for item in row[length:] if not _is_bare(item)]


@contextlib.contextmanager
def caches_passed_by(model: nn.Module, kind: type) -> Iterator[None]:
    """Let cached functions of a model's code, and of all that it imports, work anew for arguments of some kind.

    What they have kept was worked out from equal integers, but not from these, which remember where they come from.
    """
    places = [place for name in _reachable(_own(model)) for place in _cached_in(name)]
    places = [(names, name, wrapper) for names, name, wrapper in places if names.get(name) is wrapper]
    try:
        for names, name, wrapper in places:
            names[name] = _passed_by(wrapper, kind)
        yield
    finally:
        for names, name, wrapper in places:
            names[name] = wrapper


@functools.cache
def _passed_by(wrapper: Any, kind: type) -> Callable[..., Any]:
    @functools.wraps(wrapper.__wrapped__)
    def call(*args: Any, **kwargs: Any) -> Any:
        anew = _holds((args, list(kwargs.values())), kind)
        return (wrapper.__wrapped__ if anew else wrapper)(*args, **kwargs)

    return call


def _holds(value: Any, kind: type) -> bool:
    return isinstance(value, kind) or (isinstance(value, tuple | list) and any(_holds(item, kind) for item in value))


def _own(model: nn.Module) -> list[str]:
    """The modules that the classes of a model's parts are in."""
    places = {base.__module__ for module in model.modules() for base in type(module).__mro__}
    return sorted(name for name in places if name in sys.modules and not name.startswith(("torch.", "builtins")))


def _reachable(names: Iterable[str]) -> list[str]:
    """Modules, and all that they use functions, classes or modules of, but torch and the standard library."""
    found: dict[str, None] = {}
    left = list(names)
    while left:
        name = left.pop()
        if name not in found:
            found[name] = None
            left.extend(_used_by(name))
    return list(found)


def _used_by(name: str) -> list[str]:
    return _look_up(name, _modules_in) if name == "__main__" else _known(name, _modules_in)


def _cached_in(name: str) -> list[Place]:
    return _look_up(name, _cached) if name == "__main__" else _known(name, _cached)


def _look_up(name: str, what: Callable[[dict[str, Any]], list[Any]]) -> list[Any]:
    return what(vars(sys.modules[name]))


_known = functools.cache(_look_up)  # modules stay as they are once they are imported


def _modules_in(names: dict[str, Any]) -> list[str]:
    named = [value for value in names.values() if isinstance(value, _NAMED)]
    used = {value.__name__ if isinstance(value, ModuleType) else value.__module__ for value in named}
    return [one for one in sorted(filter(None, used)) if one in sys.modules and one.partition(".")[0] not in _OTHERS]


_NAMED = (ModuleType, FunctionType, type, functools._lru_cache_wrapper)
_OTHERS = {"torch", "numpy", "netsurgery", *sys.stdlib_module_names} - {"__main__"}


def _cached(names: dict[str, Any]) -> list[Place]:
    return [(names, name, value) for name, value in names.items() if isinstance(value, functools._lru_cache_wrapper)]


def _is_bare(value: Any) -> bool:
    leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    return any(leaf.is_meta or isinstance(leaf, FakeTensor) for leaf in leaves)
