"""The layers of a network: weights that activations are contracted with, how each is read, and what its role is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from netsurgery.axes import Axis, leaves, product, resolve
from netsurgery.kernels.criteria import Reading, column_count
from netsurgery.kernels.sparsity import Layout
from netsurgery.network import Network
from netsurgery.tracing import Program

__all__ = ["ROLES", "Grouping", "Layer", "LayerRole", "OuterGroups", "layers", "outer_groups", "units_of"]

aten = torch.ops.aten
LayerRole = Literal["convolution", "linear", "shortcut", "classifier"]
Grouping = Literal["feature", "neuron", "coupled"]
ROLES: tuple[LayerRole, ...] = ("convolution", "linear", "shortcut", "classifier")


@dataclass(frozen=True)
class Layer:
    """A weight that activations are contracted with.

    Attributes:
        name: its state_dict name.
        shape: its shape.
        role: "classifier", a layer after which no other comes; "shortcut", a convolution on its own beside at least two
            layers that its result is added to; else "convolution" or "linear".
        inputs: how to read it with an outer group for each input channel.
        outputs: how to read it with an outer group for each output channel.
        input_axis: what its input channels are, in the order of the outer groups.
        output_axis: what its output channels are, likewise.
    """

    name: str
    shape: torch.Size
    role: LayerRole
    inputs: Reading
    outputs: Reading
    input_axis: Axis
    output_axis: Axis

    @property
    def module(self) -> str:
        """Path of the module that owns the weight."""
        return self.name.rpartition(".")[0]

    @property
    def parameter(self) -> str:
        """The weight's name in that module."""
        return self.name.rpartition(".")[2]


def layers(network: Network) -> tuple[Layer, ...]:
    """The layers in the order of the state dict. A weight that is used in several places is read as in the first."""
    found: dict[str, Layer] = {}
    for program in network.programs:
        roles = _roles(program)
        for node, name, dims in _contractions(program):
            if name in network.tensors and name not in found:
                layer = _layer(network, node, name, dims, roles[node])
                if layer is not None:
                    found[name] = layer
    return tuple(found[name] for name in network.tensors if name in found)


Dimensions = list[tuple[Axis, Axis, str]]  # of a weight: as it stands there, what it has become, its role


def _contractions(program: Program) -> Iterator[tuple[fx.Node, str, Dimensions]]:
    """Nodes that contract activations with one parameter."""
    for node in program.graph.nodes:
        for weight, dims in node.meta.get("weights", ()):
            if "params" not in node.meta and len(weight.meta["params"]) == 1:
                yield node, weight.meta["params"][0], dims


def _layer(network: Network, node: fx.Node, name: str, dims: Dimensions, role: LayerRole) -> Layer | None:
    """None where the weight is used in another arrangement than it is kept in."""
    own = _source(node, name)
    shape = network.tensors[name].shape
    places: dict[str, list[int]] = {"consumes": [], "produces": [], "window": [], "carries": []}
    blocks: list[Axis] = []
    memo: dict[Axis, Axis] = {}
    found = [next((i for i, one in enumerate(own) if one is source), None) for source, _, _ in dims]
    left = [i for i in range(len(own)) if i not in found]
    for (_, axis, what), place in zip(dims, found, strict=True):
        at = place if place is not None else left[0] if found.count(None) == len(left) == 1 else None  # a slice of it
        if at is None:
            return None
        if what == "carries":
            blocks.append(resolve(axis, memo))
        if at not in places[what]:
            places[what].append(at)
    shared = product(blocks)
    if shared.size > 1 and places["carries"] != [0]:
        return None
    consumes, produces, window = (tuple(sorted(places[what])) for what in ("consumes", "produces", "window"))
    axes = network.axes[name]

    def channels(where: tuple[int, ...]) -> Axis:
        inner = [axes[axis] for axis in where if axis or shared.size == 1]
        return product([axes[0]] if 0 in where else [shared, *inner])

    return Layer(
        name, shape, role, Reading(shared.size, consumes, window), Reading(shared.size, produces, window),
        channels(consumes), channels(produces),
    )  # fmt: skip


def _source(node: fx.Node, name: str) -> tuple[Axis, ...]:
    """The dimensions of a parameter where a node's computation begins with it."""
    left = list(node.all_input_nodes)
    while left:
        one = left.pop()
        if one.op == "get_attr" and one.target == name:
            return tuple(one.meta["dims"])
        if "params" in one.meta:
            left.extend(one.all_input_nodes)
    return ()


def _roles(program: Program) -> dict[fx.Node, LayerRole]:
    """The role of each node that contracts with a parameter."""
    contractions = list(dict.fromkeys(node for node, _, _ in _contractions(program)))
    bits = {node: 1 << i for i, node in enumerate(contractions)}
    before: dict[fx.Node, int] = {}  # layers that a node's value comes from, itself included
    followed = shortcuts = 0
    for node in program.graph.nodes:
        sources = [before[source] for source in node.all_input_nodes]
        before[node] = bits.get(node, 0)
        for mask in sources:
            before[node] |= mask
        if node in bits:
            followed |= before[node] & ~bits[node]
        if node.target in (aten.add.Tensor, aten.add_.Tensor) and len(sources) == 2:
            for mine, other in (sources, sources[::-1]):
                alone = mine & ~other
                if alone.bit_count() == 1 and (other & ~mine).bit_count() > 1:
                    shortcuts |= alone
    return {node: _role(node, not bit & followed, bool(bit & shortcuts)) for node, bit in bits.items()}


def _role(node: fx.Node, last: bool, aside: bool) -> LayerRole:
    if last:
        return "classifier"
    if node.target is not aten.convolution.default:
        return "linear"
    return "shortcut" if aside else "convolution"


def units_of(axis: Axis) -> list[tuple[Axis, Tensor]]:
    """Each channel of an axis, and which of its units stands at each position: int64, shape (axis.size,), or -1.

    A channel that occurs twice is listed twice.
    """
    if not axis.op:
        return [(axis, torch.arange(axis.size))]
    found: list[tuple[Axis, Tensor]] = []
    if axis.op == "concat":
        start = 0
        for term in axis.terms:
            for channel, units in units_of(term):
                padded = torch.full((axis.size,), -1)
                padded[start : start + term.size] = units
                found.append((channel, padded))
            start += term.size
        return found
    sizes = [term.size for term in axis.terms]
    for place, term in enumerate(axis.terms):
        shape = [size if i == place else 1 for i, size in enumerate(sizes)]
        found.extend((channel, units.view(shape).expand(sizes).reshape(-1)) for channel, units in units_of(term))
    return found


@dataclass(frozen=True)
class OuterGroups:
    """The outer groups of a list of layers, as ``netsurgery.kernels`` takes them.

    Attributes:
        layers: a layer is listed once for each of its weight's readings.
        layout: the readings.
        counts: in how many outer groups each of these takes part.
        total: the number of outer groups.
        units: where each group of the network has its outer groups, one for each unit; "coupled" only.
    """

    layers: tuple[Layer, ...]
    layout: Layout
    counts: tuple[int, ...]
    total: int
    units: Mapping[str, slice]


def outer_groups(network: Network, chosen: Sequence[Layer], grouping: Grouping) -> OuterGroups:
    """The outer groups of layers.

    Args:
        grouping: "feature" or "neuron", one for each input or output channel of each layer; "coupled", one for each
            unit of each group that can be pruned, over all of the layers that read it.
    """
    if grouping != "coupled":
        readings = tuple(layer.inputs if grouping == "feature" else layer.outputs for layer in chosen)
        counts = tuple(column_count(layer.shape, how) for layer, how in zip(chosen, readings, strict=True))
        return OuterGroups(tuple(chosen), Layout(readings, (True,) * len(chosen)), counts, sum(counts), {})
    read = {channel for layer in chosen for channel in leaves(layer.input_axis)}
    units: dict[str, slice] = {}
    start = 0
    for group in network.prunable:
        if group.channel in read:
            units[group.name] = slice(start, start := start + group.size)
    listed: list[tuple[Layer, Tensor]] = []
    for layer in chosen:
        listed.extend((layer, index) for index in _indices(network, layer, units))
    counted = tuple(i == 0 or listed[i - 1][0] is not layer for i, (layer, _) in enumerate(listed))
    index = torch.cat([index for _, index in listed]) if listed else torch.zeros(0, dtype=torch.int64)
    layout = Layout(tuple(layer.inputs for layer, _ in listed), counted, index, start)
    counts = tuple(len(one[one >= 0].unique()) for _, one in listed)
    return OuterGroups(tuple(layer for layer, _ in listed), layout, counts, start, units)


def _indices(network: Network, layer: Layer, units: Mapping[str, slice]) -> list[Tensor]:
    """The outer group of each input channel of a layer, -1 for none; several times where it belongs to several."""
    found = [torch.full((layer.input_axis.size,), -1)]
    for channel, unit in units_of(layer.input_axis):
        group = network.by_channel.get(channel)
        if group is None or group.name not in units:
            continue
        place = torch.where(unit >= 0, unit + units[group.name].start, -1)
        free = next((one for one in found if not bool(((one >= 0) & (place >= 0)).any())), None)
        if free is None:
            found.append(place)
        else:
            torch.maximum(free, place, out=free)
    return found
