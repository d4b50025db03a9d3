"""Copies of a model that share no state with it and hold other tensors, without ever copying its weights."""

from __future__ import annotations

import copy
import functools
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from netsurgery.capture.inputs import Tree
from netsurgery.errors import TraceError

__all__ = ["copy_with", "held_tensors", "like", "named_modules", "named_tensors", "on_meta"]

Module = TypeVar("Module", bound=nn.Module)

_ATOMS = frozenset(
    [int, float, bool, str, type(None), FunctionType, type, torch.dtype, torch.Size, torch.jit.ScriptFunction]
)


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by the path it has first, as ``model.named_modules()`` gives them, but quickly."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def visit(module: nn.Module, path: str) -> None:
        seen.add(id(module))
        found[path] = module
        for name, child in module._modules.items():
            if child is not None and id(child) not in seen:
                visit(child, f"{path}.{name}" if path else name)

    visit(model, "")
    return found


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers and tensors kept as plain attributes, each once, by the name it has first.

    A tensor in a dictionary or list that is an attribute is called ``path.attribute[key]``.
    """
    seen: set[int] = set()
    for name, tensor in held_tensors(model):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def held_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The same, each as often as modules hold it, by all of its names."""
    for path, module in named_modules(model).items():
        for store in (module._parameters, module._buffers, module.__dict__):
            for key, value in store.items():
                if isinstance(value, Tensor):
                    found = [(key, value)]
                elif type(value) in _CONTAINERS and value and key not in _INTERNAL:
                    found = list(_contained(key, value))
                else:
                    continue
                for name, tensor in found:
                    yield (f"{path}.{name}" if path else name), tensor


# Raised by objects that cannot be copied: locks, modules and files cannot be pickled, others raise their own errors.
_RAISED_BY_COPIES = (
    TypeError,
    RuntimeError,
    ValueError,
    AttributeError,
    AssertionError,
    pickle.PickleError,
    copy.Error,
)
_CONTAINERS = frozenset([dict, list, tuple])
_INTERNAL = frozenset(nn.Module().__dict__)


def _contained(name: str, value: Tree, around: tuple[int, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(item, Tensor):
            yield f"{name}[{key!r}]", item
        elif type(item) in _CONTAINERS and id(item) not in around:
            yield from _contained(f"{name}[{key!r}]", item, (*around, id(value)))


def like(old: Tensor, new: Tensor) -> Tensor:
    """``new`` as a parameter and as trained where ``old`` is, with the attributes that ``old`` was given."""
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    elif old.requires_grad and old.is_leaf:
        new.requires_grad_()
    if old.__dict__:
        new.__dict__.update(old.__dict__)
    return new


def on_meta(tensor: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """A tensor without data of the same kind (and another shape, if given)."""
    if shape is None or shape == tensor.shape:
        data = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    else:
        data = torch.empty(shape, dtype=tensor.dtype, device="meta")
    return like(tensor, data)


_HOOKS = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")
_USUAL = (nn.Module, nn.modules.conv._ConvNd)  # a convolution's __setstate__ only mends old pickles


@functools.cache
def _customised(kind: type) -> bool:
    """True if a class has methods of its own that decide how it is copied."""
    return any(all(getattr(kind, hook, None) is not getattr(usual, hook, None) for usual in _USUAL) for hook in _HOOKS)


def _copier(memo: dict[int, Any]) -> Callable[[Any], Any]:
    def duplicate(value: Any) -> Any:
        if type(value) in _ATOMS:
            return value
        if id(value) in memo:
            return memo[id(value)]
        if type(value) in (dict, OrderedDict):
            new = memo[id(value)] = type(value)()
            for key, item in value.items():
                new[key] = memo[id(item)] if id(item) in memo else duplicate(item)
            return new
        if type(value) is tuple:
            items = tuple([duplicate(item) for item in value])
            return value if all(new is old for new, old in zip(items, value, strict=True)) else items
        if type(value) is set and not value:
            return set()
        return copy.deepcopy(value, memo)

    return duplicate


def copy_with(model: Module, tensors: Mapping[int, Tensor]) -> Module:
    """A deep copy of a model in which tensor ``t`` is ``tensors[id(t)]``: the old weights are never copied.

    Args:
        tensors: by ``id`` of the old tensor. Tied parameters stay tied, since they have one id.

    Raises:
        TraceError: a module is scripted, or holds something that Python cannot copy.
    """
    memo: dict[int, Any] = dict(tensors)
    modules = named_modules(model)
    for path, module in modules.items():
        if isinstance(module, torch.jit.ScriptModule):
            raise TraceError(
                f"module '{path}' is a scripted module, which cannot be rewritten: pass the original model"
            )
    kinds: dict[str, type] = {path: type(module) for path, module in modules.items()}
    plain = [(path, module) for path, module in modules.items() if not _customised(kinds[path])]
    for _, module in plain:
        memo[id(module)] = module.__class__.__new__(module.__class__)
    duplicate = _copier(memo)
    for path, module in plain:
        target = memo[id(module)].__dict__
        for key, value in module.__dict__.items():
            if key == "_compiled_call_impl":  # of module.compile(): it would run the module that was copied
                continue
            kind = type(value)
            if kind in _ATOMS:
                target[key] = value
                continue
            if kind is OrderedDict and not value:  # most attributes of most modules: no hooks
                target[key] = OrderedDict()
                continue
            try:
                target[key] = duplicate(value)
            except _RAISED_BY_COPIES as error:
                raise TraceError(
                    f"attribute '{key}' of module '{path or type(model).__name__}' cannot be copied: {error}"
                ) from error
    result: Module = duplicate(model)
    return result
