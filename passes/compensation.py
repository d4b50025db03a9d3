"""What a removal loses is made up for where it was read: in the biases of those layers, or in their weights."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from netsurgery.axes import resolve
from netsurgery.check import adapt
from netsurgery.copying import named_modules, named_tensors
from netsurgery.cutting import Positions
from netsurgery.edit import Edit
from netsurgery.errors import InputError
from netsurgery.network import Network
from netsurgery.notation import Op
from netsurgery.passes.samples import Samples, draw_inputs, in_eval_mode
from netsurgery.passes.scores import BATCH_NORMS
from netsurgery.rewriting import rewrite
from netsurgery.tracing import RAISED_BY_MODELS, home

__all__ = ["Method", "compensate"]

aten = torch.ops.aten
Method = Literal["bias", "least-squares"]
_log = logging.getLogger("netsurgery")
_BATCH = 32  # samples that go through both networks at once
_UNFOLDED = 1 << 22  # numbers of unfolded inputs that are held at once
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FORWARDS = {kind.forward for kind in (nn.Linear, *_CONVOLUTIONS)}


@dataclass
class _Reader:
    """A layer that reads removed units.

    Attributes:
        path: of its module.
        kept: which of its outputs stay, or None for all.
        weight: the name of its weight, if that may be refitted.
        shift: the name of the tensor that takes a constant, and with which sign: its bias, or the running mean of the
            batch norm that follows; None where there is neither.
        runs: how often it runs.
    """

    path: str
    kept: Tensor | None
    weight: str | None
    shift: tuple[str, int] | None
    runs: int


def compensate(edit: Edit, method: Method, data: Any, samples: int = 512, ridge: float = 1e-2, seed: int = 0) -> Edit:
    """An edit with new values (made anew, if it has some) for the layers that read what it removes.

    Layers are gone through in the order in which they run: each is compared, over the data and in eval mode, with what
    it gave before, its inputs being those of the smaller network as compensated so far. So both networks run over the
    data once for each of these layers, up to it.

    Args:
        method: "bias" lets every output of such a layer keep its mean, by its bias or else by the running mean of the
            batch norm that follows. "least-squares" also refits its weights: W' and b' minimise the mean squared
            difference of its outputs plus ``ridge * mean(X^2) * |W' - W|^2``.
        data: as for ``netsurgery.passes.samples.draw_inputs``: inputs, with targets or without. They are drawn as they
            come, not class-balanced: the means are those over the data.
        samples: how many are drawn.
        ridge: positive; keeps weights that the data says nothing of as they are.

    Where a layer cannot be compensated in this way, ``edit.uncompensated`` says why, and the logger ``netsurgery`` too.
    """
    network = edit.network
    adaptation, refused = adapt(network.model, network, edit.counts)
    if refused or not edit.keep:  # what the code does not follow is frozen by plan, and this asked for again
        return edit
    edit = dataclasses.replace(edit, adaptation=adaptation, values={}, uncompensated={})
    small = rewrite(network.model, edit)
    readers, left = _readers(edit, method)
    drawn = draw_inputs(data, samples, seed)
    done: list[str] = []
    with in_eval_mode(network.model), in_eval_mode(small), torch.no_grad():
        for reader in readers:
            sums = _Sums(small.get_submodule(reader.path), reader)
            if why := _compare(network.model, small, reader, drawn, sums):
                left[reader.path] = why
            else:
                done.extend(_mend(small, reader, sums, ridge))
    tensors, places = dict(named_tensors(small)), Positions(edit)
    values = {
        name: places.put(network.tensors[name], network.axes[name], tensors[name]) for name in dict.fromkeys(done)
    }
    if left:
        _log.warning("not compensated: %s", "; ".join(f"{name}: {why}" for name, why in left.items()))
    return dataclasses.replace(edit, values=values, uncompensated=left)


# Which layers ------------------------------------------------------------------------------------------------------


def _readers(edit: Edit, method: Method) -> tuple[list[_Reader], dict[str, str]]:
    """The layers that read removed units, in the order in which they run; and what is left as it is, and why."""
    network, places = edit.network, Positions(edit)
    modules = named_modules(network.model)
    readers: dict[str, _Reader] = {}
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
                    reader = _reader(network, path, nodes, places, own if method == "least-squares" else None)
                    if reader.weight is None and reader.shift is None:
                        left[place] = "its layer has no bias of its own, and no batch norm alone follows"
                        continue
                    readers[path] = reader
                    if method == "least-squares" and own is None:
                        left[place] = "it is shared or computed from others: only a bias was compensated"
    order = {call.path: call.begin for call in reversed(network.programs[0].calls)}
    return sorted(readers.values(), key=lambda reader: order.get(reader.path, -1)), left


def _reader(network: Network, path: str, nodes: list[fx.Node], places: Positions, weight: str | None) -> _Reader:
    mine = [node for node in nodes if node.meta["module"] == path]
    linear = isinstance(named_modules(network.model)[path], nn.Linear)
    out = resolve(mine[0].meta["dims"][-1 if linear else 1], {})
    runs = sum(call.path == path for call in network.programs[0].calls)
    return _Reader(path, places(out), weight, _shift(network, path, mine), runs)


def _uses(network: Network, name: str) -> list[fx.Node]:
    """The operations that bring activations together with a parameter, or with what is computed from it alone."""
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
    """What takes a constant that is added to the outputs of a layer, and with which sign."""
    bias = named_modules(network.model)[path]._parameters.get("bias")
    if bias is not None:
        name = next((name for name, tensor in network.tensors.items() if tensor is bias), "")
        return (name, 1) if {node.meta["module"] for node in _uses(network, name)} == {path} else None
    norms = [user for node in nodes for user in node.users]
    if not norms or any(getattr(norm.target, "overloadpacket", None) not in BATCH_NORMS for norm in norms):
        return None
    if any(Op(norm, network)["input"] not in nodes for norm in norms):
        return None
    means = {getattr(Op(norm, network)["running_mean"], "target", None) for norm in norms}
    name = str(means.pop())
    alone = not means and name in network.tensors and set(_uses(network, name)) == set(norms)
    return (name, -1) if alone else None


# What they lose ----------------------------------------------------------------------------------------------------


class _Sums:
    """Sums over the data of one layer: of what its outputs lack, and of how its inputs go together with that.

    For each group of a convolution, with inputs X ``(n, d)``, a column of ones if a constant can be taken up, and what
    its outputs lack R ``(n, o)``: ``gram = X'X`` and ``cross = X'R``, in float64. Where weights stay, X has no columns
    but that of ones.
    """

    def __init__(self, module: Any, reader: _Reader):
        self.module = module
        self.reader = reader
        self.spatial: int = 0 if isinstance(module, nn.Linear) else len(self.module.kernel_size)
        self.groups: int = self.module.groups if reader.weight and self.spatial else 1
        self.gram: Tensor | None = None
        self.cross: Tensor | None = None

    @property
    def channels(self) -> int:
        """Which dimension of the outputs holds channels."""
        return -1 - self.spatial

    def add(self, x: Tensor, lacks: Tensor) -> None:
        """Inputs as the layer is given them, and the difference that its outputs should make."""
        whole = self.spatial + 1  # dimensions of one sample
        x, lacks = (t.reshape(-1, *t.shape[t.dim() - whole :]) for t in (x, lacks))
        window = prod(self.module.kernel_size) if self.spatial else 1
        size = max(1, _UNFOLDED // max(1, x[0].numel() * window))
        for some, other in zip(x.split(size), lacks.split(size), strict=True):
            outputs = other.double().unflatten(1, (self.groups, -1)).movedim(1, 0).movedim(2, -1).flatten(1, -2)
            self._add(self._inputs(some.double(), outputs), outputs)

    def _inputs(self, x: Tensor, outputs: Tensor) -> Tensor:
        if not self.reader.weight:
            return outputs[:, :, :0]
        return _windows(self.module, x, self.groups) if self.spatial else x[None]

    def _add(self, x: Tensor, lacks: Tensor) -> None:
        if self.reader.shift:
            x = torch.cat([x, x.new_ones(*x.shape[:2], 1)], 2)
        gram, cross = x.mT @ x, x.mT @ lacks
        self.gram = gram if self.gram is None else self.gram + gram
        self.cross = cross if self.cross is None else self.cross + cross

    def solve(self, ridge: float) -> tuple[Tensor, Tensor | None]:
        """The change of the weights ``(groups, o, d)`` and of the constant ``(groups, o)``."""
        assert self.gram is not None and self.cross is not None
        gram, width = self.gram.clone(), self.gram.shape[-1] - (self.reader.shift is not None)
        diagonal = gram.diagonal(dim1=1, dim2=2)[:, :width]
        scale = diagonal.mean(1, keepdim=True) if width else diagonal
        diagonal += torch.where(scale > 0, ridge * scale, 1.0)
        found = torch.linalg.solve(gram, self.cross)
        return found[:, :width].mT, found[:, width] if self.reader.shift else None


def _windows(module: Any, x: Tensor, groups: int) -> Tensor:
    """What a convolution multiplies with its weights: shape (groups, n, channels of a group * kernel)."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    for dim, (size, step, apart) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True), 2):
        x = x.unfold(dim, apart * (size - 1) + 1, step)[..., ::apart]
    first = 2 + len(module.kernel_size)  # of what is multiplied: (groups, b, *positions, channels, *kernel)
    rows: Tensor = x.unflatten(1, (groups, -1)).movedim(1, 0).movedim(2, first).flatten(first).flatten(1, -2)
    return rows


def _compare(model: nn.Module, small: nn.Module, reader: _Reader, drawn: Samples, sums: _Sums) -> str:
    """Add up over the data what the outputs of a layer lack; why that cannot be done, if so."""
    for (args, kwargs), _ in drawn.batches(_BATCH, home(model)):
        with _listening(model, reader) as before, _listening(small, reader) as after:
            for network in (model, small):
                try:
                    network(*args, **kwargs)
                except _HeardEnough:
                    pass
                except RAISED_BY_MODELS as error:
                    raise InputError(f"{type(model).__name__} does not run on the data: {error}") from error
        if not before:
            return "it does not run as a module in eval mode"
        if len(before) != len(after):
            return "it runs less or more often in the smaller network"
        for (_, wanted), (x, found) in zip(before, after, strict=True):
            if reader.kept is not None:
                wanted = wanted.index_select(sums.channels, reader.kept.to(wanted.device))
            if wanted.shape != found.shape:
                return "its outputs have other shapes in the smaller network"
            lacks = wanted.double() - found.double()
            if not bool(lacks.isfinite().all() and x.isfinite().all()):
                return "its inputs or outputs are not finite on the data"
            sums.add(x, lacks)
    return ""


def _mend(small: nn.Module, reader: _Reader, sums: _Sums, ridge: float) -> Iterator[str]:
    """Change the tensors of a layer; the names of those that are."""
    tensors = dict(named_tensors(small))
    weights, constant = sums.solve(ridge)
    if reader.weight:
        weight = tensors[reader.weight]
        weight.copy_(weight.double() + weights.reshape(weight.shape))
        yield reader.weight
    if reader.shift and constant is not None:
        name, sign = reader.shift
        tensors[name].copy_(tensors[name].double() + sign * constant.flatten())
        yield name


class _HeardEnough(BaseException):
    """Ends a run that has nothing more to tell; no model catches it."""


@contextlib.contextmanager
def _listening(model: nn.Module, reader: _Reader) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The input and output of a layer each time it runs."""
    heard: list[tuple[Tensor, Tensor]] = []

    def hear(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        heard.append((args[0] if args else kwargs["input"], out))
        if len(heard) == reader.runs:
            raise _HeardEnough
        heard[-1] = heard[-1][0].clone(), out.clone()  # code that goes on may change them in place

    handle = model.get_submodule(reader.path).register_forward_hook(hear, with_kwargs=True, prepend=True)
    try:
        yield heard
    finally:
        handle.remove()
