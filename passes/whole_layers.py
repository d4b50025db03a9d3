"""Layers that can be replaced by others with other weights: nothing else has a part in these, or looks at them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from netsurgery.analysis.network import Network
from netsurgery.capture.copies import held_tensors, named_modules
from netsurgery.capture.fast_path import fused

__all__ = ["Layer", "Layers", "has_hooks", "shell"]

Layer = _ConvNd | nn.Linear
Kind = TypeVar("Kind", bound=nn.Module)


class Layers:
    """The convolutions and linear layers of a network.

    Attributes:
        modules: all modules, by path.
    """

    def __init__(self, network: Network):
        self.network, self.modules = network, named_modules(network.model)
        self.held = Counter(id(tensor) for _, tensor in held_tensors(network.model))
        self.fused = fused(network.model)
        self.counts = [Counter(call.path for call in program.calls) for program in network.programs]
        self.weights = [[n for n in program.graph.nodes if n.op == "get_attr"] for program in network.programs]

    def ran(self, path: str) -> int:
        """The number of runs of a module, in the mode in which it runs most often."""
        return max(count[path] for count in self.counts)

    def obstacle(self, path: str) -> str | None:
        """Why a layer cannot be replaced by one with other weights, None if it can.

        Args:
            path: of a convolution or a linear layer.
        """
        module = self.modules[path]
        if not self.ran(path):
            return f"'{path}' does not run"
        if path in self.fused:
            return self.fused[path]
        runs = [weights for weights, count in zip(self.weights, self.counts, strict=True) if path in count]
        if not all(self._is_own(weights, path) for weights in runs):
            return f"a weight of '{path}', a {type(module).__name__}, is shared, or computed from others"
        return f"'{path}' has hooks, which would see something else" if has_hooks(module) else None

    def _is_own(self, weights: Sequence[fx.Node], path: str) -> bool:
        """True if a layer's weight and bias are parameters of its own that nothing else reads or holds."""
        own = self.modules[path]._parameters
        if any(self.held[id(tensor)] > 1 for tensor in own.values() if tensor is not None):
            return False  # whatever holds it, too, need not run
        names = [f"{path}.{key}" for key, tensor in own.items() if tensor is not None]
        nodes = {name: node for node in weights if (name := str(node.target)) in names}
        once = all(name in nodes and _readers(nodes[name]) <= self.ran(path) for name in names)
        return "weight" in own and set(own) <= {"weight", "bias"} and once and self._work(nodes[f"{path}.weight"], path)

    def _work(self, weight: fx.Node, path: str) -> bool:
        """True if the layer's work is done with its weight as it is."""
        users = [reader for user in weight.users for reader in (user.users if _is_turned(user) else [user])]
        kinds = ("convolution",) if isinstance(self.modules[path], _ConvNd) else ("addmm", "mm")
        return all(
            getattr(user.target, "__name__", "").partition(".")[0] in kinds and user.meta["module"] == path
            for user in users
        )


def _readers(weight: fx.Node) -> int:
    return sum(len(user.users) if _is_turned(user) else 1 for user in weight.users)


def _is_turned(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "t.default"


def shell(module: Kind) -> Kind:
    """A module of the class and settings of another, without its parameters and hooks."""
    new = copy.copy(module)
    for key, value in vars(module).items():
        if isinstance(value, dict):
            new.__dict__[key] = copy.copy(value)  # else hooks of one would be those of both
    new._parameters = dict.fromkeys(module._parameters)
    return new


def has_hooks(module: nn.Module) -> bool:
    """True if hooks look at inputs, outputs or gradients of a module."""
    return any(module.__dict__.get(f"_{kind}_hooks") for kind in ("forward", "forward_pre", "backward", "backward_pre"))
