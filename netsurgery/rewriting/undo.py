"""All stages of an edit or none: what earlier ones have changed is put back where a later one cannot be carried out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from netsurgery.capture.copies import named_tensors
from netsurgery.rewriting.data import set_data
from netsurgery.rewriting.optimizers import within

__all__ = ["all_or_nothing"]

_STORES = ("_modules", "_parameters", "_buffers")


@contextlib.contextmanager
def all_or_nothing(models: Sequence[nn.Module], optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """Put models and optimizers back as they were where an exception is raised; no weight is copied.

    This is enough since the rewriting lets tensors hold other data, and writes to none.
    """
    modules = [_Module(module) for model in models for module in model.modules()]
    tensors = [(tensor, tensor.data, tensor.grad) for model in models for _, tensor in _leaves(model)]
    held = [_Optimizer(one) for optimizer in optimizers for one in within(optimizer)]
    try:
        yield
    except BaseException:
        for module in modules:
            module.put_back()
        for tensor, data, grad in tensors:
            tensor.grad = None  # it must have the shape of the tensor at any time
            set_data(tensor, data)
            tensor.grad = grad
        for one in held:
            one.put_back()
        raise


def _leaves(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, tensor) for name, tensor in named_tensors(model) if tensor.is_leaf]


class _Module:
    """A module's class and attributes; of those that hold others, what they hold."""

    def __init__(self, module: nn.Module):
        self.module, self.kind = module, type(module)
        self.attributes = dict(module.__dict__)
        self.stores = {key: dict(module.__dict__[key]) for key in _STORES}

    def put_back(self) -> None:
        self.module.__class__ = self.kind
        self.module.__dict__.clear()
        self.module.__dict__.update(self.attributes)
        for key, held in self.stores.items():
            store = self.module.__dict__[key]
            store.clear()
            store.update(held)


class _Optimizer:
    """The parameters, settings and state of an optimizer."""

    def __init__(self, optimizer: Optimizer):
        self.groups = [(group, dict(group), list(group["params"])) for group in optimizer.param_groups]
        self.state, self.of = optimizer.state, dict(optimizer.state)
        self.entries = [(one, dict(one)) for one in optimizer.state.values() if isinstance(one, dict)]

    def put_back(self) -> None:
        for group, settings, params in self.groups:
            group.clear()
            group.update(settings)
            group["params"][:] = params
        self.state.clear()
        self.state.update(self.of)
        for entry, held in self.entries:
            entry.clear()
            entry.update(held)
