"""Modules that are recorded as one operation, because they have a rule by ``netsurgery.rule``."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from netsurgery.capture.inputs import Args, Kwargs, Tree
from netsurgery.errors import InputError

__all__ = ["CUSTOM_MODULES", "CustomModule", "arguments_of", "operation_of"]

Shape = tuple[int, ...]

#: By class a function that gives the shapes of results, from a module and the shapes of its arguments by name.
CUSTOM_MODULES: dict[type[nn.Module], Callable[[nn.Module, dict[str, Shape]], Sequence[Shape]]] = {}


def arguments_of(kind: type[nn.Module]) -> list[str]:
    """The names of the inputs of a class of modules, in the order of its ``forward``.

    Raises:
        ValueError: it takes ``*args`` or ``**kwargs``, which have no names.
    """
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise ValueError(f"{kind.__name__}.forward takes *args or **kwargs: its inputs need names")
    return [p.name for p in parameters]


class CustomModule:
    """A module as one operation of a recorded graph: its own tensors are arguments like its inputs.

    With data, the module itself runs in eval mode. Without data, the rule gives the shapes of results: those of the
    copy that ran last, which may have other sizes.
    """

    def __init__(self, module: nn.Module):
        kind = type(module)
        self._module = weakref.ref(module)
        self._copy: Callable[[], nn.Module | None] = lambda: None
        self.__name__: str = kind.__name__
        self.__module__ = kind.__module__
        self.overloadpacket = kind
        self.tags: tuple[torch.Tag, ...] = ()
        self.own = list(_tensors(module))
        self.inputs = arguments_of(kind)
        arguments = [SimpleNamespace(name=name, default_value=None, alias_info=None) for name in self.own + self.inputs]
        self._schema = SimpleNamespace(name=kind.__name__, arguments=arguments, returns=())

    def __repr__(self) -> str:
        return self.__name__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CustomModule) and self.overloadpacket is other.overloadpacket  # of another copy, say

    def __hash__(self) -> int:
        return hash(self.overloadpacket)

    @property
    def module(self) -> nn.Module:
        """The module itself."""
        module = self._module()
        if module is None:
            raise InputError(f"the model that was traced is gone, and with it the code of {self!r}")
        return module

    def bind(self, copy: nn.Module, args: Args, kwargs: Kwargs) -> Args:
        """All arguments of one call of a copy of the module: the copy's tensors, then its inputs."""
        self._copy = weakref.ref(copy)
        bound = inspect.signature(type(copy).forward).bind(copy, *args, **kwargs)
        bound.apply_defaults()
        return *_tensors(copy).values(), *(bound.arguments[name] for name in self.inputs)

    def __call__(self, *values: object) -> Tree:
        given = dict(zip(self.own + self.inputs, values, strict=True))
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        if any(tensor.is_meta for tensor in tensors.values()):
            shapes = CUSTOM_MODULES[self.overloadpacket](
                self._copy() or self.module, {n: tuple(t.shape) for n, t in tensors.items()}
            )
            dtype = next(t.dtype for name, t in reversed(tensors.items()) if t.is_floating_point())
            out = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
            return out[0] if len(out) == 1 else tuple(out)
        modes = {part: part.training for part in self.module.modules()}
        try:
            self.module.eval()
            own = {name.removeprefix("self."): tensors[name] for name in self.own}
            return torch.func.functional_call(self.module, own, tuple(given[name] for name in self.inputs))
        finally:
            for part, training in modes.items():
                part.training = training


_OPERATION_OF: weakref.WeakKeyDictionary[nn.Module, CustomModule] = weakref.WeakKeyDictionary()


def operation_of(module: nn.Module) -> CustomModule:
    """The operation that stands for a module, the same one in each run."""
    if module not in _OPERATION_OF or _OPERATION_OF[module].own != list(_tensors(module)):
        _OPERATION_OF[module] = CustomModule(module)
    return _OPERATION_OF[module]


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a module: ``self.weight``, ..."""
    return {f"self.{name}": t for name, t in (*module.named_parameters(), *module.named_buffers())}
