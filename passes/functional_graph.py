"""A recorded graph as steps that overwrite nothing; constants are computed once and batch norms are folded.

This is functionalization, as PyTorch calls it, of a graph that is recorded already: an operation in place becomes one
that returns what it writes, where nothing else shows what was written.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from netsurgery.analysis.computed_weights import ancestors, worked_across, writers
from netsurgery.analysis.network import Network
from netsurgery.analysis.replay import draws
from netsurgery.analysis.replay_without import is_view
from netsurgery.axes import Axis, find, leaves
from netsurgery.capture.known_values import Decided, any_layout, replay_decision
from netsurgery.capture.meta_run import home
from netsurgery.capture.operations import OpCall
from netsurgery.capture.randomness import torch_seeded

__all__ = ["CONTRACTED", "Dims", "FunctionalGraph", "Results", "Step", "Unsuited"]

aten = torch.ops.aten
Dims = Any  # of a node: a tuple of axes, or one for each result
Results = Mapping[fx.Node, Any]  # of operations: tensors, numbers, or several of them

#: The operations that contract, and how their notation names the axis that they contract over.
CONTRACTED = {**dict.fromkeys((aten.mm, aten.bmm, aten.addmm, aten.baddbmm), "k"), aten.convolution: "i"}


class Unsuited(Exception):
    """The recorded graph cannot be run in parts; the message says why."""


@dataclass
class Step:
    """One operation: the function to call, and the nodes whose results it takes.

    ``names`` has the axes of its notation.
    """

    node: fx.Node
    call: Callable[..., Any]
    packet: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dims: Dims
    names: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[fx.Node, ...] = field(init=False)

    def __post_init__(self) -> None:
        found: dict[fx.Node, None] = {}
        fx.node.map_arg((self.args, self.kwargs), lambda node: found.setdefault(node))
        self.inputs = tuple(found)


@dataclass
class FunctionalGraph:
    """The first recorded run of a network, to be run again in parts.

    Args:
        network: traced on as many rows as are to go through at once.
        tensors: the tensors of the model, by name.
        autocast: the type in which convolutions and matrix products are computed.
        decisions: whether what the code decided by values in the recorded run may be taken as it was; else a network
            whose code looks at numbers that depend on its weights is unsuited.
        seed: the seed of random numbers: an operation draws the same in every run.

    Attributes:
        rows: the axes along which samples lie.

    Raises:
        Unsuited: the graph decides by values, or writes into what is read elsewhere.
    """

    network: Network
    tensors: Mapping[str, Tensor]
    autocast: torch.dtype | None = None
    decisions: bool = False
    seed: int = 0
    steps: list[Step] = field(init=False)
    constants: dict[fx.Node, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.program = self.network.programs[0]
        if self.program.values == "all" and not self.decisions:
            raise Unsuited("its code decides by values")
        self.dims: dict[fx.Node, Dims] = {n: n.meta.get("dims") for n in self.program.graph.nodes}
        self.inputs = [node for node in self.program.graph.nodes if node.op == "placeholder"]
        *_, output = self.program.graph.nodes
        self.outputs: list[fx.Node] = list(output.args[0])
        self.rows = {find(node.meta["dims"][0]) for node in self.inputs if node.meta["dims"]}
        self.occurrences: dict[Axis, dict[Axis, int]] = {}
        with torch.no_grad():
            _Builder(self, home(self.network.model)).build()

    def product(self, target: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A convolution or matrix product, computed in the type that was asked for."""
        return target if self.autocast is None else functools.partial(_lowered, target, self.autocast)

    def carries(self, dims: Dims, channel: Axis) -> int:
        """The number of times that a channel occurs in the dimensions of a result, or of several results."""
        if isinstance(dims, Axis):
            if dims not in self.occurrences:
                counts = self.occurrences[dims] = {}
                for leaf in leaves(dims):
                    counts[leaf] = counts.get(leaf, 0) + 1
            return self.occurrences[dims].get(channel, 0)
        return sum(self.carries(one, channel) for one in dims or () if one is not None)

    def touches(self, dims: Dims, channels: Iterable[Axis]) -> bool:
        """True if any of some channels occurs in the dimensions of a result."""
        return any(self.carries(dims, channel) for channel in channels)

    def channels(self, names: Iterable[str]) -> tuple[Axis, ...]:
        """The channels of some groups."""
        return tuple(self.network[name].channel for name in names)

    def row(self, dims: tuple[Axis, ...]) -> int | None:
        """The dimension of a result in which the rows of the batch are outermost."""
        for dim, axis in enumerate(dims):
            axis = find(axis)
            if (find(axis.terms[0]) if axis.op == "product" else axis) in self.rows:
                return dim
        return None

    def arguments(self, args: Any, *values: Results) -> Any:
        """Arguments with each node replaced by its value."""

        def look(node: fx.Node) -> Any:
            for known in (*values, self.constants):
                if node in known:
                    return known[node]
            raise KeyError(node)

        return fx.node.map_arg(args, look)


class _Builder:
    """Turns a recorded graph into steps that overwrite nothing; constants and batch norms are folded."""

    def __init__(self, graph: FunctionalGraph, device: torch.device):
        self.of, self.device = graph, device
        self.order = {node: index for index, node in enumerate(graph.program.graph.nodes)}
        self.several: dict[fx.Node, Sequence[Tensor]] = {}  # results of operations on constants that return several

    def build(self) -> None:
        """Fill in the steps and constants."""
        of = self.of
        of.steps, of.constants = [], {}
        for node in of.program.graph.nodes:
            if node.op == "get_attr":
                source = of.tensors[node.target] if node.target in of.tensors else of.program.constants[node.target]
                if source.is_meta:
                    raise Unsuited(f"the values of '{node.target}' are not known")
                value = source.detach().to(self.device)
                of.constants[node] = value.clone() if writers(node) else value
            elif node.op == "call_function":
                self.add(node)
        self.prune()
        self.lay_out()

    def add(self, node: fx.Node) -> None:
        of = self.of
        if self.writes_constants(node):
            of.constants[node] = node.target(*of.arguments(node.args), **of.arguments(node.kwargs))  # type: ignore[operator]
            return
        if node.target is operator.getitem:
            step = Step(node, operator.getitem, operator.getitem, node.args, {}, node.meta["dims"])
        else:
            step = self.operation(node)
        if step.inputs and all(n in of.constants for n in step.inputs) and step.packet is not operator.getitem:
            made = step.call(*of.arguments(step.args), **of.arguments(step.kwargs))
            if isinstance(made, Tensor):
                of.constants[node] = made  # and a step, for where it lacks units
            else:
                self.several[node] = made
        if step.packet is operator.getitem and step.args[0] in self.several:
            of.constants[node] = self.several[step.args[0]][step.args[1]]
        if not (step.packet is operator.getitem and self.fold(step)):
            of.steps.append(step)

    def operation(self, node: fx.Node) -> Step:
        target: Any = node.target
        call, packet = any_layout(target), target.overloadpacket
        if any(a.alias_info is not None and a.alias_info.is_write for a in target._schema.arguments):
            call, packet = self.functional(node)
        if packet in CONTRACTED:
            call = self.of.product(target)
        kwargs = {k: self.device if isinstance(v, torch.device) else v for k, v in node.kwargs.items()}
        if draws(node):
            if "generator" in kwargs:
                kwargs["generator"] = None  # the default one, which is seeded
            call = functools.partial(self.drawn, call, self.order[node])
        if "decided" in node.meta:
            call = functools.partial(_decided, target, node.meta["decided"])
        return Step(node, call, packet, node.args, kwargs, node.meta["dims"], node.meta.get("names", {}))

    def writes_constants(self, node: fx.Node) -> bool:
        """True if an operation overwrites a constant with others, unit by unit: then it is carried out once."""
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable or not all(n in self.of.constants for n in node.all_input_nodes):
            return False
        if "decided" in node.meta or draws(node):
            return False
        return all(
            leaf in one.meta.get("whole", ())
            for one in ancestors(node)
            if one.op == "call_function"
            for leaf in worked_across(one)
        )

    def drawn(self, call: Callable[..., object], place: int, *args: object, **kwargs: object) -> object:
        """The result of an operation that draws random numbers, from a seed of its own."""
        with torch_seeded(self.of.seed + 7919 * place, self.device):
            return call(*args, **kwargs)

    def functional(self, node: fx.Node) -> tuple[Callable[..., Any], Any]:
        """An operation that returns the result of one in place, if no other tensor shows that; and its packet."""
        target: Any = node.target
        written: Any = node.args[0]
        packet = getattr(aten, target.overloadpacket.__name__.removesuffix("_"), None)
        own = isinstance(written, fx.Node) and written.op == "call_function" and not is_view(written)
        if not own or any(is_view(n) or self.order[n] > self.order[node] for n in written.users):
            raise Unsuited(f"{target} writes into what is read elsewhere")
        overload = getattr(packet, target._overloadname, None)
        if overload is None:
            return functools.partial(_on_a_copy, target), target.overloadpacket
        return overload, packet

    def fold(self, step: Step) -> bool:
        """Fold a batch norm in eval mode into the convolution that it alone reads."""
        of = self.of
        norm = next((s for s in reversed(of.steps) if s.node is step.args[0]), None)
        if norm is None or norm.packet is not aten.native_batch_norm or norm.args[5] or step.args[1] != 0:
            return False
        conv = next((s for s in reversed(of.steps) if s.node is norm.args[0]), None)
        if conv is None or conv.packet is not aten.convolution or conv.args[6] or len(conv.node.users) > 1:
            return False
        kernel, bias = conv.args[1:3]
        numbers = [kernel, *norm.args[1:5], *([] if bias is None else [bias])]
        if any(isinstance(n, fx.Node) and n.op != "get_attr" for n in numbers) or norm.args[3] is None:
            return False
        weight, gamma, beta, mean, var = (None if n is None else of.constants[n].double() for n in numbers[:5])
        assert weight is not None and mean is not None and var is not None
        scale = torch.rsqrt(var + norm.args[7]) * (1 if gamma is None else gamma)
        shift = (0 if beta is None else beta) + ((0 if bias is None else of.constants[bias].double()) - mean) * scale
        dtype = of.constants[kernel].dtype
        of.constants[conv.node] = (weight * scale.reshape(-1, *[1] * (weight.dim() - 1))).to(dtype)
        of.constants[norm.node] = shift.to(dtype)
        of.dims[conv.node], of.dims[norm.node] = of.dims[kernel], (of.dims[kernel][0],)
        of.steps.remove(norm)
        of.steps.remove(conv)
        args = (conv.args[0], conv.node, norm.node, *conv.args[3:])
        of.steps.append(Step(step.node, conv.call, conv.packet, args, {}, step.dims, conv.names))
        return True

    def prune(self) -> None:
        """Forget steps whose results nothing needs."""
        of, needed = self.of, set(self.of.outputs)
        kept = []
        for step in reversed(of.steps):
            if step.node in needed:
                needed.update(step.inputs)
                kept.append(step)
        of.steps = kept[::-1]
        of.constants = {node: value for node, value in of.constants.items() if node in needed}

    def lay_out(self) -> None:
        """Lay kernels of two dimensions out with channels last, and so all results: a CPU is faster with these."""
        for step in self.of.steps:
            weight = self.of.constants.get(step.args[1]) if step.packet is aten.convolution else None
            if weight is not None and weight.dim() == 4 and weight.dtype is torch.float32 and self.device.type == "cpu":
                self.of.constants[step.args[1]] = weight.contiguous(memory_format=torch.channels_last)


def _on_a_copy(target: Callable[..., object], written: Tensor, *args: object, **kwargs: object) -> object:
    return target(written.clone(), *args, **kwargs)


def _decided(target: Any, decided: Decided, *args: object, **kwargs: object) -> object:
    """The result of an operation as the recorded run decided it."""
    if target._schema.is_mutable:
        written, *others = args
        assert isinstance(written, Tensor)
        args = (written.clone(), *others)
    return replay_decision(OpCall(target, args, kwargs), decided)


def _lowered(target: Callable[..., Tensor], dtype: torch.dtype, *args: object, **kwargs: object) -> Tensor:
    """A product computed in a shorter type, returned in the type of its arguments."""
    own = next(value.dtype for value in args if isinstance(value, Tensor))
    if not own.is_floating_point:
        return target(*args, **kwargs)
    short = [value.to(dtype) if isinstance(value, Tensor) else value for value in args]
    return target(*short, **kwargs).to(own)
