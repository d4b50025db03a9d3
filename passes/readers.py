"""The layers that read removed units, and the tensors of each that may change."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from netsurgery.analysis.network import Network
from netsurgery.axes import Axis, resolve
from netsurgery.capture.copies import named_modules
from netsurgery.edit import Edit
from netsurgery.notation import Operation
from netsurgery.passes.least_squares import Change
from netsurgery.passes.scores import BATCH_NORMS
from netsurgery.positions import Positions

__all__ = ["CONVOLUTIONS", "Reader", "hooked", "readers_of"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FORWARDS = {kind.forward for kind in (nn.Linear, *CONVOLUTIONS)}


@dataclass(frozen=True)
class Reader:
    """A layer that reads removed units.

    Attributes:
        path: the path of its module.
        axis: the dimension of its inputs that is summed over.
        inputs: which of its inputs stay, or None for all.
        kept: which of its outputs stay, or None for all.
        weight: the name of its weight, if that may be refitted.
        shift: the name of the tensor that takes a constant, and with which sign: its bias, or the running mean of the
            batch norm that follows; None where there is neither.
    """

    path: str
    axis: Axis
    inputs: Tensor | None
    kept: Tensor | None
    weight: str | None
    shift: tuple[str, int] | None

    @property
    def names(self) -> list[str]:
        """The tensors that may change."""
        return [name for name in (self.weight, self.shift and self.shift[0]) if name]

    def changed(self, tensors: Mapping[str, Tensor], change: Change) -> dict[str, Tensor]:
        """New values of the smaller network's tensors, by name."""
        found = {}
        if change.weights is not None and self.weight:
            old = tensors[self.weight]
            found[self.weight] = (old.double() + change.weights.mT.reshape(old.shape)).to(old.dtype)
        if change.constant is not None and self.shift:
            name, sign = self.shift
            found[name] = (tensors[name].double() + sign * change.constant.flatten()).to(tensors[name].dtype)
        return found


def readers_of(edit: Edit, refit: bool) -> tuple[list[Reader], dict[str, str]]:
    """The layers that read removed units, in the order in which they run; and the reasons for those that are left out.

    Args:
        refit: whether weights may change, not constants alone.
    """
    network, places = edit.network, edit.positions
    modules = named_modules(network.model)
    readers: dict[str, Reader] = {}
    left: dict[str, str] = {}
    for name in edit.keep:
        weights = [member.parameter for member in network[name].members if member.role == "consumes"]
        if not weights:
            left[name] = "no weight reads its units"
        for weight in weights:
            nodes = _uses(network, weight)
            paths = list(dict.fromkeys(node.meta["module"] for node in nodes))
            for path in paths:
                place = weight if len(paths) == 1 else f"{weight} in {path}"
                if getattr(modules[path].forward, "__func__", None) not in _FORWARDS:
                    left[place] = f"{type(modules[path]).__name__}, which uses it, is no linear layer or convolution"
                elif path not in readers:
                    held = modules[path]._parameters.get("weight") is network.tensors[weight]
                    own = weight if held and len(paths) == 1 else None
                    reader = _reader(network, path, nodes, places, own if refit else None)
                    if reader.weight is None and reader.shift is None:
                        left[place] = "its layer has no bias of its own, and no batch norm alone follows"
                        continue
                    readers[path] = reader
                    if refit and own is None:
                        left[place] = "it is shared or computed from others: only a bias was compensated"
    order = {call.path: call.begin for call in reversed(network.programs[0].calls)}
    return sorted(readers.values(), key=lambda reader: order.get(reader.path, -1)), left


@contextlib.contextmanager
def hooked(
    network: nn.Module, readers: Sequence[Reader], callback: Callable[[Reader, Tensor, Tensor], Tensor | None]
) -> Iterator[None]:
    """Call a function with the inputs and outputs of layers whenever they run; its result replaces the outputs."""

    def hook_of(reader: Reader) -> Callable[..., Tensor | None]:
        @torch.no_grad()  # also where the code turns gradients on
        def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], out: Tensor) -> Tensor | None:
            return callback(reader, args[0] if args else kwargs["input"], out)

        return hook

    with contextlib.ExitStack() as hooks:
        for reader in readers:
            layer = network.get_submodule(reader.path)
            hooks.callback(layer.register_forward_hook(hook_of(reader), with_kwargs=True, prepend=True).remove)
        yield


def _reader(network: Network, path: str, nodes: list[fx.Node], places: Positions, weight: str | None) -> Reader:
    mine = [node for node in nodes if node.meta["module"] == path]
    dim = -1 if isinstance(named_modules(network.model)[path], nn.Linear) else 1
    given = next(node for node in mine[0].all_input_nodes if "params" not in node.meta and node.op != "get_attr")
    axis, out = (resolve(node.meta["dims"][dim], {}) for node in (given, mine[0]))
    return Reader(path, axis, places(axis), places(out), weight, _shift(network, path, mine))


def _uses(network: Network, name: str) -> list[fx.Node]:
    """The operations that combine activations with a parameter, or with a tensor that is computed from it alone."""
    found: dict[fx.Node, None] = {}
    for program in network.programs:
        left = [node for node in program.graph.nodes if node.op == "get_attr" and node.target == name]
        while left:
            for user in left.pop(0).users:
                if "params" in user.meta:
                    left.append(user)
                else:
                    found[user] = None
    return list(found)


def _shift(network: Network, path: str, nodes: list[fx.Node]) -> tuple[str, int] | None:
    """The tensor that takes a constant which is added to the outputs of a layer, and the sign with which it does."""
    bias = named_modules(network.model)[path]._parameters.get("bias")
    if bias is not None:
        name = next((name for name, tensor in network.tensors.items() if tensor is bias), "")
        return (name, 1) if {node.meta["module"] for node in _uses(network, name)} == {path} else None
    norms = [user for node in nodes for user in node.users]
    if not norms or any(getattr(norm.target, "overloadpacket", None) not in BATCH_NORMS for norm in norms):
        return None
    if any(Operation(norm)["input"] not in nodes for norm in norms):
        return None
    means = {getattr(Operation(norm)["running_mean"], "target", None) for norm in norms}
    name = str(means.pop())
    alone = not means and name in network.tensors and set(_uses(network, name)) == set(norms)
    return (name, -1) if alone else None
