"""The layers of a network: weights that activations are contracted with, their readings and their roles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, fx

from netsurgery.analysis.computed_weights import peeled
from netsurgery.analysis.network import Network
from netsurgery.analysis.weights import Weight, computed_weights, used_directly
from netsurgery.axes import Axis, leaves, product, resolve
from netsurgery.capture.program import Program
from netsurgery.errors import InputError
from netsurgery.kernels.criteria import CRITERIA, WeightView, column_count
from netsurgery.kernels.layout import Layout
from netsurgery.positions import units_at

__all__ = [
    "ROLES", "Grouping", "Layer", "LayerRole", "OuterGroups", "check_choice", "contracted", "layers", "outer_groups",
    "scored_layers",
]  # fmt: skip

aten = torch.ops.aten
LayerRole = Literal["convolution", "linear", "shortcut", "classifier", "computed"]
Grouping = Literal["feature", "neuron", "coupled"]
ROLES: tuple[LayerRole, ...] = ("convolution", "linear", "shortcut", "classifier")


@dataclass(frozen=True)
class Layer:
    """A weight that activations are contracted with.

    Attributes:
        name: its state_dict name.
        shape: its shape.
        role: "classifier", a layer after which no other comes; "shortcut", a convolution on its own beside at least two
            layers of a residual branch; "computed", made from several parameters, of which this is one; else
            "convolution" or "linear".
        inputs: how to read it with an outer group for each input channel.
        outputs: how to read it with an outer group for each output channel.
        input_axis: the axis of its input channels, in the order of the outer groups.
        output_axis: the axis of its output channels, likewise.
    """

    name: str
    shape: torch.Size
    role: LayerRole
    inputs: WeightView
    outputs: WeightView
    input_axis: Axis
    output_axis: Axis

    @property
    def module(self) -> str:
        """Path of the module that owns the weight."""
        return self.name.rpartition(".")[0]


def layers(network: Network) -> tuple[Layer, ...]:
    """The layers in the order of the state dict; a weight that is read in two ways is listed twice."""
    found: dict[str, dict[tuple[WeightView, WeightView], Layer]] = {}
    for program in network.programs:
        roles = _roles(program)
        for node, weight, dims in _contractions(program):
            computed = len(weight.meta["params"]) > 1
            for name in weight.meta["params"]:
                if name in network.tensors and network.tensors[name].dim() > 1:
                    layer = _layer(
                        name, network.axes[name], _source(node, name), dims, "computed" if computed else roles[node]
                    )
                    if layer is not None:
                        found.setdefault(name, {}).setdefault((layer.inputs, layer.outputs), layer)
    return tuple(layer for name in network.tensors for layer in found.get(name, {}).values())


def scored_layers(network: Network, grouping: Grouping) -> tuple[list[Layer], list[Tensor]]:
    """The layers and their weights; a weight that is computed from parameters stands in place of these.

    In a low-rank update, the matrix that has the units of the whole layer is no layer by itself.

    Raises:
        InputError: as for ``netsurgery.analysis.weights.uses``.
    """
    computed = {one.node: one for one in computed_weights(network, network.tensors)}
    found: dict[tuple[Weight, WeightView, WeightView], Layer] = {}
    for program in network.programs:
        for _, operand, dims in _contractions(program):
            node = peeled(operand)
            weight = computed.get(node)
            if weight is None:
                continue
            name = f"what is computed from {', '.join(weight.names)}"
            dims_of = operand if weight.parts else node
            layer = _layer(name, weight.axes, tuple(dims_of.meta["dims"]), dims, "computed")
            if layer is not None:
                found.setdefault((weight, layer.inputs, layer.outputs), layer)
    direct = used_directly(network)
    for weight in computed.values():
        for node in weight.parts[grouping == "neuron" :: 2]:
            direct -= set(node.meta["params"])
        if weight.parts and weight.node is not None:
            direct -= set(weight.node.meta["params"])
    own = [layer for layer in layers(network) if layer.name in direct]
    listed = list(found.items())
    return (
        [*own, *(layer for _, layer in listed)],
        [*(network.tensors[layer.name] for layer in own), *(weight.value for (weight, _, _), _ in listed)],
    )


Dimensions = list[tuple[Axis, Axis, str]]  # of a weight: as it stands there, what it has become, its role


def _contractions(program: Program) -> Iterator[tuple[fx.Node, fx.Node, Dimensions]]:
    """Nodes that contract activations with a weight: a parameter, or a tensor computed from parameters alone."""
    for node in program.graph.nodes:
        if "params" not in node.meta:
            yield from ((node, weight, dims) for weight, dims in contracted(node))


def contracted(node: fx.Node) -> Iterator[tuple[fx.Node, Dimensions]]:
    """The weights that a node contracts activations with, and their dimensions there."""
    for weight, dims in node.meta.get("operands", ()):
        if any(role == "consumes" for _, _, role in dims):
            yield weight, dims


def _layer(name: str, axes: tuple[Axis, ...], own: tuple[Axis, ...], dims: Dimensions, role: LayerRole) -> Layer | None:
    """The layer of a weight; None where the weight is used in an arrangement that its own axes do not show.

    Args:
        axes: the axes of the weight.
        own: these axes where the weight is read.
    """
    where = _places([source for source, _, _ in dims], own)
    if where is None:
        return None
    by_role: dict[str, set[int]] = {"consumes": set(), "produces": set(), "window": set(), "carries": set()}
    blocks: list[Axis] = []
    memo: dict[Axis, Axis] = {}
    for (_, axis, what), places in zip(dims, where, strict=True):
        if what == "carries":
            blocks.append(resolve(axis, memo))
        by_role[what].update(places)
    consumes, produces, window = (tuple(sorted(by_role[what])) for what in ("consumes", "produces", "window"))
    shared = product(blocks)
    mixed = len({*consumes, *produces, *window}) < len(consumes) + len(produces) + len(window)
    if mixed or not consumes or (shared.size > 1 and by_role["carries"] != {0}):
        return None
    shape = torch.Size([axis.size for axis in axes])

    def channels(where: tuple[int, ...]) -> Axis:
        inner = [axes[axis] for axis in where if axis or shared.size == 1]
        return product([axes[0]] if 0 in where else [shared, *inner])

    return Layer(
        name, shape, role, WeightView(shared.size, consumes, window),
        WeightView(shared.size, produces, window), channels(consumes), channels(produces),
    )  # fmt: skip


def _source(node: fx.Node, name: str) -> tuple[Axis, ...]:
    """The dimensions of a parameter at the node with which the computation of a weight begins."""
    left = list(node.all_input_nodes)
    while left:
        one = left.pop()
        if one.op == "get_attr" and one.target == name:
            return tuple(one.meta["dims"])
        if "params" in one.meta:
            left.extend(one.all_input_nodes)
    return ()


def _places(dims: list[Axis], own: tuple[Axis, ...]) -> list[tuple[int, ...]] | None:
    """For each dimension the axes of the weight that it comes from, through views, permutations and slices."""
    found: list[tuple[int, ...] | None] = [
        next(((i,) for i, one in enumerate(own) if one is axis), None) for axis in dims
    ]
    taken = {i for place in found if place for i in place}
    parts = [list(leaves(axis)) if axis.size > 1 else [] for axis in own]
    for at, axis in enumerate(dims):
        if found[at] is None and axis in dims[:at]:
            found[at] = found[dims.index(axis)]
        elif found[at] is None:
            found[at] = () if axis.size == 1 else _spanned(list(leaves(axis)), parts, taken)
            taken.update(found[at] or ())
    return [place for place in found if place is not None] if None not in found else None


def _spanned(wanted: list[Axis], parts: list[list[Axis]], taken: set[int]) -> tuple[int, ...] | None:
    """The consecutive axes that a merged dimension spans, or the one axis that it is a factor or a slice of."""
    place, rest = [], wanted
    for i, part in enumerate(parts):
        if part and i not in taken and rest[: len(part)] == part:
            place.append(i)
            rest = rest[len(part) :]
    if place and not rest:
        return tuple(place)
    return next(((i,) for i, part in enumerate(parts) if set(wanted) < set(part)), None)


def _roles(program: Program) -> dict[fx.Node, LayerRole]:
    """The role of each node that contracts with a parameter."""
    contractions = list(dict.fromkeys(node for node, _, _ in _contractions(program)))
    bits = {node: 1 << i for i, node in enumerate(contractions)}
    before: dict[fx.Node, int] = {}  # layers that a node's value comes from, itself included
    followed = shortcuts = 0
    for node in program.graph.nodes:
        before[node] = bits.get(node, 0)
        for source in node.all_input_nodes:
            before[node] |= before[source]
        if node in bits:
            followed |= before[node] & ~bits[node]
        if node.target in (aten.add.Tensor, aten.add_.Tensor) and len(node.all_input_nodes) == 2:
            for mine, other in (node.all_input_nodes, node.all_input_nodes[::-1]):
                alone, beside = before[mine] & ~before[other], before[other] & ~before[mine]
                if alone.bit_count() == 1 and beside.bit_count() > 1 and _ends_in(node, other, beside, before):
                    shortcuts |= alone
    return {node: _role(node, not bit & followed, bool(bit & shortcuts)) for node, bit in bits.items()}


def _ends_in(sum_: fx.Node, branch: fx.Node, beside: int, before: dict[fx.Node, int]) -> bool:
    """True if all results of the layers of a branch go into a sum, as in a residual block (not in a pyramid)."""
    inside, left = {branch}, [branch]
    while left:
        for source in left.pop().all_input_nodes:
            if before[source] & beside and source not in inside:
                inside.add(source)
                left.append(source)
    return all(
        user in inside or user is sum_ or not (user.users or user.op == "output") for m in inside for user in m.users
    )


def _role(node: fx.Node, last: bool, aside: bool) -> LayerRole:
    if last:
        return "classifier"
    if node.target is not aten.convolution.default:
        return "linear"
    return "shortcut" if aside else "convolution"


def positions_of(axis: Axis, channel: Axis) -> list[Tensor]:
    """For each time a channel occurs in an axis, the positions of its units: ``(units, positions of each)``."""
    return [
        (units >= 0).nonzero().flatten()[units[units >= 0].argsort(stable=True)].reshape(channel.size, -1)
        for leaf, units in units_at(axis)
        if leaf is channel
    ]


def check_choice(who: str, criterion: str, grouping: str) -> None:
    """Make sure that there are such a criterion and such a grouping.

    Raises:
        InputError: there is none; the message names ``who`` was asked for it.
    """
    if criterion not in CRITERIA:
        raise InputError(f"{who} has no criterion '{criterion}': choose one of {', '.join(CRITERIA)}")
    if grouping not in get_args(Grouping):
        raise InputError(f"{who}(grouping='{grouping}'): 'feature', 'neuron' or 'coupled'")


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
        in_l1 = _first_of([layer.name for layer in chosen])
        counts = tuple(column_count(layer.shape, how) for layer, how in zip(chosen, readings, strict=True))
        return OuterGroups(tuple(chosen), Layout(readings, in_l1, groups=sum(counts)), counts, sum(counts), {})
    read = {channel for layer in chosen for channel in leaves(layer.input_axis)}
    units: dict[str, slice] = {}
    start = 0
    for group in network.prunable:
        if group.channel in read:
            units[group.name] = slice(start, start := start + group.size)
    listed: list[tuple[Layer, Tensor]] = []
    for layer in chosen:
        listed.extend((layer, index) for index in _indices(network, layer, units))
    in_l1 = _first_of([layer.name for layer, _ in listed])
    index = torch.cat([index for _, index in listed]) if listed else torch.zeros(0, dtype=torch.int64)
    layout = Layout(tuple(layer.inputs for layer, _ in listed), in_l1, index, start)
    counts = tuple(len(one[one >= 0].unique()) for _, one in listed)
    return OuterGroups(tuple(layer for layer, _ in listed), layout, counts, start, units)


def _first_of(names: list[str]) -> tuple[bool, ...]:
    """True for each name that has not come before."""
    return tuple(name not in names[:i] for i, name in enumerate(names))


def _indices(network: Network, layer: Layer, units: Mapping[str, slice]) -> list[Tensor]:
    """The outer group of each input channel of a layer, -1 for none; several times where it belongs to several."""
    found = [torch.full((layer.input_axis.size,), -1)]
    for channel, unit in units_at(layer.input_axis):
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
