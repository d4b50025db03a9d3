"""Keep the caches of the user's code clean: tensors that a run without data leaves there are taken out again."""

from __future__ import annotations

import builtins
import contextlib
import functools
import sys
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any, TypeAlias, TypeVar

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

__all__ = ["caches_kept", "caches_passed_by"]

T = TypeVar("T")
Names = dict[str, object]  # the globals of a module's code
Cached: TypeAlias = "functools._lru_cache_wrapper[Any]"
Place = tuple[Names, str, Cached]  # globals, the name of a cached function there, and the function
Box = dict[Any, object] | list[object] | deque[object]


@contextlib.contextmanager
def caches_kept(model: nn.Module) -> Iterator[None]:
    """Take tensors that a run without data leaves in the caches of a model's code out of them afterwards.

    Such caches are functions with ``functools.lru_cache``, globals, class attributes, and dictionaries, lists and
    deques in these. A tensor without data that stayed there would break the user's next run.
    """
    names = _own(model)
    found = [value for name in names for value in vars(sys.modules[name]).values()]
    cached = [value for value in found if isinstance(value, functools._lru_cache_wrapper)]
    before = [wrapper.cache_info().currsize for wrapper in cached]
    classes = [value for value in found if isinstance(value, type) and value.__module__ in names]
    held = [(kind, dict(vars(kind))) for kind in classes]
    boxes = [(box, dict(box) if isinstance(box, dict) else list(box)) for box in _boxes(names, held)]
    try:
        yield
    finally:
        for wrapper, size in zip(cached, before, strict=True):
            if wrapper.cache_info().currsize > size:
                wrapper.cache_clear()
        for kind, old in held:
            for key in _meta_keys(vars(kind), old):
                setattr(kind, key, old[key]) if key in old else delattr(kind, key)
        for box, kept in boxes:
            _put_back(box, kept)


def _boxes(names: Iterable[str], held: Iterable[tuple[type, Names]]) -> list[Box]:
    """The globals of modules, and the dictionaries, lists and deques in them, in classes and in one another."""
    found: dict[int, Box] = {}
    stack: list[object] = [vars(sys.modules[name]) for name in names]
    stack += [value for _, own in held for value in own.values()]
    while stack:
        box = stack.pop()
        if isinstance(box, dict | list | deque) and id(box) not in found and box is not vars(builtins):
            found[id(box)] = box
            stack.extend(box.values() if isinstance(box, dict) else box)
    return list(found.values())


def _meta_keys(now: Mapping[Any, object], old: Mapping[Any, object]) -> list[Any]:
    """The keys under which a tensor without data has been put."""
    return [key for key, value in now.items() if old.get(key) is not value and _holds_meta(value)]


def _put_back(box: Box, old: dict[Any, object] | list[object]) -> None:
    if isinstance(box, dict) and isinstance(old, dict):
        for key in _meta_keys(box, old):
            if key in old:
                box[key] = old[key]
            else:
                del box[key]
    elif not isinstance(box, dict) and [*map(id, box)] != [*map(id, old)] and _holds_meta([*box]):
        box.clear()
        box.extend(old)


@contextlib.contextmanager
def caches_passed_by(model: nn.Module, kind: type) -> Iterator[None]:
    """Let cached functions run again for arguments of one class, in a model's code and in all that it imports.

    Such arguments are integers that remember their size's node in a graph. A result that was cached for an equal plain
    integer does not have this node.
    """
    places = [place for names in _reachable(_seen_by(model)) for place in _look_up(names, _cached)]
    places = [(names, name, wrapper) for names, name, wrapper in places if names.get(name) is wrapper]
    try:
        for names, name, wrapper in places:
            names[name] = _passed_by(wrapper, kind)
        yield
    finally:
        for names, name, wrapper in places:
            names[name] = wrapper


@functools.cache
def _passed_by(wrapper: Cached, kind: type) -> Callable[..., object]:
    @functools.wraps(wrapper.__wrapped__)
    def call(*args: Hashable, **kwargs: Hashable) -> object:
        anew = _holds((args, list(kwargs.values())), kind)
        return (wrapper.__wrapped__ if anew else wrapper)(*args, **kwargs)

    return call


def _holds(value: object, kind: type) -> bool:
    return isinstance(value, kind) or (isinstance(value, tuple | list) and any(_holds(item, kind) for item in value))


def _own(model: nn.Module) -> list[str]:
    """The modules that the classes of a model's parts are in."""
    places = {base.__module__ for module in model.modules() for base in type(module).__mro__}
    return sorted(name for name in places if name in sys.modules and not name.startswith(("torch.", "builtins")))


def _seen_by(model: nn.Module) -> list[Names]:
    """The globals of the code of a model's parts; a class that a function makes may have others than its module."""
    owners: list[object] = list(model.modules())  # a module may have a forward of its own
    owners += dict.fromkeys(base for module in model.modules() for base in type(module).__mro__)
    methods = [value for owner in owners for value in vars(owner).values() if isinstance(value, FunctionType)]
    return [vars(sys.modules[name]) for name in _own(model)] + [method.__globals__ for method in methods]


def _reachable(start: Iterable[Names]) -> list[Names]:
    """Namespaces, and the namespaces of all that is in them, without those of torch and the standard library."""
    found: dict[int, Names] = {}
    left = list(start)
    while left:
        names = left.pop()
        if id(names) not in found and str(names.get("__name__")).partition(".")[0] not in _OTHERS:
            found[id(names)] = names
            left.extend(_look_up(names, _used))
    return list(found.values())


def _look_up(names: Names, find: Callable[[Names], list[T]]) -> list[T]:
    """The result of ``find`` for a namespace, remembered while it has as many names: imported modules rarely change."""
    if names.get("__name__") == "__main__":
        return find(names)
    key = (id(names), len(names), find)
    if key not in _LOOKED_UP or _LOOKED_UP[key][0] is not names:
        _LOOKED_UP[key] = (names, find(names))
    return _LOOKED_UP[key][1]


_LOOKED_UP: dict[object, tuple[Names, list[Any]]] = {}
_OTHERS = {"torch", "numpy", "netsurgery", *sys.stdlib_module_names} - {"__main__"}


def _used(names: Names) -> list[Names]:
    return list({id(space): space for space in map(_space_of, names.values()) if space is not None}.values())


def _space_of(value: object) -> Names | None:
    if isinstance(value, ModuleType):
        return vars(value)
    if isinstance(value, FunctionType):
        return value.__globals__
    if isinstance(value, functools._lru_cache_wrapper):
        return getattr(value.__wrapped__, "__globals__", None)
    if isinstance(value, type) and value.__module__ in sys.modules:
        return vars(sys.modules[value.__module__])
    return None


def _cached(names: Names) -> list[Place]:
    return [(names, name, value) for name, value in names.items() if isinstance(value, functools._lru_cache_wrapper)]


def _holds_meta(value: object) -> bool:
    leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    return any(leaf.is_meta or isinstance(leaf, FakeTensor) for leaf in leaves)
