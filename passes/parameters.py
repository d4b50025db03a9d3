"""The user's own module, and its parameters, looked up by name at every step of a training loop."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn

__all__ = ["Parameters", "own_module"]


def own_module(model: nn.Module) -> nn.Module:
    """The user's own module inside torch.compile's or DistributedDataParallel's."""
    while isinstance(model, torch._dynamo.OptimizedModule | nn.parallel.DistributedDataParallel | nn.DataParallel):
        model = model._orig_mod if isinstance(model, torch._dynamo.OptimizedModule) else model.module
    return model


class Parameters:
    """Tensors of a model by name, as they are now; a path is looked up anew only where a module on it was replaced.

    Args:
        model: any module.
        names: names of parameters, or of tensors that are computed on access.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]):
        self.model, self.names = model, tuple(names)
        self._ways: list[tuple[nn.Module, str, nn.Module]] = []  # a module, a name in it, and the module of that name
        self._owners: list[tuple[nn.Module, str]] = []  # the module of each parameter, and its name there

    def __call__(self) -> list[Tensor]:
        """The tensors, in the order of the names."""
        if torch.compiler.is_compiling():
            return [self._found(name) for name in self.names]
        if not self._owners or any(one._modules.get(name) is not inner for one, name, inner in self._ways):
            self._walk()
        held = [module._parameters.get(name) for module, name in self._owners]
        if all(one is not None for one in held):
            return held  # type: ignore[return-value]
        return [self._found(name) if one is None else one for one, name in zip(held, self.names, strict=True)]

    def sharded(self) -> list[bool]:
        """For each parameter: True if ``fully_shard`` was called on a module around it."""
        if not any(_is_sharded(one) for one in (self.model, *(inner for _, _, inner in self._ways))):
            return [False] * len(self.names)
        return [any(map(_is_sharded, chain)) for chain in self.around()]

    def around(self) -> list[list[nn.Module]]:
        """For each parameter the modules from the model to its own."""
        found = []
        for name in self.names:
            *path, _ = name.split(".")
            chain = [self.model]
            for part in path:
                chain.append(getattr(chain[-1], part))
            found.append(chain)
        return found

    def _walk(self) -> None:
        ways: dict[tuple[int, str], tuple[nn.Module, str, nn.Module]] = {}
        owners = []
        for whole, chain in zip(self.names, self.around(), strict=True):
            *path, name = whole.split(".")
            for one, part, inner in zip(chain, path, chain[1:], strict=False):
                ways[id(one), part] = (one, part, inner)
            owners.append((chain[-1], name))
        self._ways, self._owners = list(ways.values()), owners

    def _found(self, name: str) -> Tensor:
        tensor: Tensor = reduce(getattr, name.split("."), self.model)  # type: ignore[assignment]
        return tensor


def _is_sharded(module: nn.Module) -> bool:
    return hasattr(type(module), "set_reshard_after_backward")
