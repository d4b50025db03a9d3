"""Filters: units, their positions in the parameters that produce and carry them, and their scaling in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, fx, nn

from netsurgery.analysis.groups import Group
from netsurgery.analysis.network import Network
from netsurgery.analysis.weights import uses
from netsurgery.axes import Axis
from netsurgery.capture.copies import copy_with, like, named_tensors
from netsurgery.edit import Edit
from netsurgery.errors import InputError
from netsurgery.kernels.criteria import accumulator
from netsurgery.passes.entries import per_unit
from netsurgery.passes.layers import Layer, contracted, layers
from netsurgery.positions import units_at
from netsurgery.verification import verify

__all__ = [
    "Filters", "Place", "computed_norms", "dead_units", "filters_of_group", "filters_of_layers", "norms",
    "published_macs", "scale",
]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Place:
    """The positions of units along an axis of a parameter.

    Attributes:
        parameter: its state_dict name.
        axis: the axis.
        units: which unit stands at each position of it, -1 for none: int64, shape (size of the axis,).
    """

    parameter: str
    axis: int
    units: Tensor

    def positions(self, chosen: Tensor) -> Tensor:
        """True at each position whose unit is chosen, from bool of shape (units,)."""
        return (self.units >= 0) & chosen[self.units.clamp(min=0)]


@dataclass(frozen=True, eq=False)
class Filters:
    """The filters of a layer, or the units of a group.

    Attributes:
        name: the name of the weight, or of the group.
        size: the number of filters.
        weights: the kernels that produce them.
        carriers: parameters between them and the next layer: biases, scale and shift of norms, depthwise kernels.
    """

    name: str
    size: int
    weights: tuple[Place, ...]
    carriers: tuple[Place, ...]


def filters_of_group(network: Network, group: Group) -> Filters:
    """The units of a group; ``weights`` is empty where no parameter produces them."""

    def places(role: str) -> tuple[Place, ...]:
        return tuple(
            Place(member.parameter, member.axis, units)
            for member in group.members
            if member.role == role and _is_weight(network.tensors[member.parameter])
            for channel, units in units_at(network.axes[member.parameter][member.axis])
            if channel is group.channel
        )

    return Filters(group.name, group.size, places("produces"), places("carries"))


def filters_of_layers(network: Network) -> dict[str, tuple[Layer, Filters]]:
    """The output channels of each layer that produces units which can be pruned, by the name of its weight.

    Not listed: layers whose weight is computed from several parameters, or has its outputs along several axes.
    """
    found: dict[str, tuple[Layer, Filters]] = {}
    members = [m for g in network.prunable for m in g.members if _is_weight(network.tensors[m.parameter])]
    producers = {(m.parameter, m.axis) for m in members if m.role == "produces"}
    carriers = [m for m in members if m.role == "carries"]
    met = _met(network)
    for layer in layers(network):
        axis = layer.outputs.outer[0] if len(layer.outputs.outer) == 1 else -1
        if layer.name in found or layer.role == "computed" or (layer.name, axis) not in producers:
            continue
        if layer.shape[axis] != layer.output_axis.size:  # a grouped transposed convolution
            continue
        rows = torch.arange(layer.output_axis.size)
        mine = dict.fromkeys(
            (m.parameter, m.axis)
            for m in carriers
            if met.get(m.parameter) == frozenset({layer.name})
            and _same(network.axes[m.parameter][m.axis], layer.output_axis)
        )
        places = tuple(Place(name, at, rows) for name, at in mine)
        found[layer.name] = layer, Filters(layer.name, len(rows), (Place(layer.name, axis, rows),), places)
    return found


def _is_weight(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.is_floating_point()


def _same(one: Axis, other: Axis) -> bool:
    """True if two resolved axes are the same expression."""
    return one is other or (
        one.op == other.op != "" and len(one.terms) == len(other.terms) and all(map(_same, one.terms, other.terms))
    )


def _own(node: fx.Node, produced: frozenset[str]) -> frozenset[str]:
    """The weights that a node contracts activations with to make new units; depthwise kernels make none."""
    if "params" in node.meta:
        return frozenset()
    return produced.intersection(name for weight, _ in contracted(node) for name in weight.meta["params"])


def _produced(network: Network) -> frozenset[str]:
    return frozenset(m.parameter for group in network.groups for m in group.members if m.role == "produces")


def _origins(program: fx.Graph, produced: frozenset[str]) -> dict[fx.Node, frozenset[str]]:
    """For each node the layers whose outputs it is made of without another layer in between."""
    found: dict[fx.Node, frozenset[str]] = {}
    for node in program.nodes:
        found[node] = _own(node, produced).union(*(found[s] for s in node.all_input_nodes if not _own(node, produced)))
    return found


def _met(network: Network) -> dict[str, frozenset[str]]:
    """For each parameter the layers whose outputs it is applied to."""
    found: dict[str, frozenset[str]] = {}
    produced = _produced(network)
    for program in network.programs:
        origins = _origins(program.graph, produced)
        for node in program.graph.nodes:
            if "params" not in node.meta:
                with_it = origins[node]  # of a bias that is its own layer
                for name in (name for source in node.all_input_nodes for name in source.meta.get("params", ())):
                    found[name] = found.get(name, frozenset()) | with_it
    return found


def norms(filters: Filters, tensors: Mapping[str, Tensor]) -> Tensor:
    """The L2 norm of the weights of each filter: float64 on the CPU, (size,).

    Every process gets the same number from the same weights: nothing is summed in an order that may change.
    """
    squares = torch.zeros(filters.size, dtype=torch.float64)
    for place in filters.weights:
        weight = tensors[place.parameter].detach().movedim(place.axis, 0).flatten(1)
        found = torch.linalg.vector_norm(weight, dim=1, dtype=accumulator(weight)).to("cpu", torch.float64)
        some = place.units >= 0
        squares.index_add_(0, place.units[some], found[some].square())
    return squares.sqrt()


def computed_norms(network: Network, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The norms of units that computed weights produce, by group."""
    found: dict[str, Tensor] = {}
    for name, used in uses(network, tensors).items():
        made = [use for use in used if use.role == "produces"]
        if all(use.weight.node is None for use in made):
            continue
        squares = torch.zeros(network[name].size, dtype=torch.float64)
        for use in made:
            weight = use.weight.value.detach().movedim(use.axis, 0).flatten(1)
            norm = torch.linalg.vector_norm(weight, dim=1, dtype=accumulator(weight)).to("cpu", torch.float64)
            squares += per_unit(use.weight.axes[use.axis], norm.square())[network[name].channel]
        found[name] = squares.sqrt()
    return found


@torch.no_grad()
def scale(tensor: Tensor, axis: int, positions: Tensor, factor: float) -> None:
    """Multiply the entries at some positions of an axis by a factor, in place; by 0 also entries that are not finite.

    Args:
        positions: bool, shape (size of the axis,).
    """
    index = positions.nonzero().flatten().to(tensor.device)
    if factor == 0:
        tensor.index_fill_(axis, index, 0)
    elif factor != 1:
        tensor.index_copy_(axis, index, tensor.index_select(axis, index) * factor)


def dead_units(network: Network, group: Group, gone: Mapping[tuple[str, int], Tensor]) -> Tensor:
    """The units of a group that nothing produces any more: bool, shape (units,).

    Args:
        gone: for axes of parameters (name and axis) the positions at which they are zero: bool. Others are alive.
    """
    dead = torch.ones(group.size, dtype=torch.bool)
    for member in (m for m in group.members if m.role == "produces"):
        axis = network.axes[member.parameter][member.axis]
        alive = ~gone.get((member.parameter, member.axis), torch.zeros(axis.size, dtype=torch.bool))
        for channel, units in units_at(axis):
            if channel is group.channel:
                dead[units[alive & (units >= 0)]] = False
    return dead


def published_macs(network: Network, pruned: Mapping[str, float]) -> float:
    """MACs of the convolutions of a network whose pruned filters are skipped, as papers on soft pruning count them.

    A pruned filter is skipped where it is computed, even if its channel stays in a residual stream; and where it is
    read, if what is read comes from that layer alone. So less is counted than what a dense network of the same
    function needs. With the nominal ``ratio * filters``, not rounded down, these are the papers' numbers.

    Args:
        pruned: the number of pruned filters by the name of the layer's weight; it need not be whole.

    Example:
        >>> import torch, netsurgery
        >>> from netsurgery.passes.filter_positions import published_macs
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 1), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 1))
        >>> published_macs(netsurgery.trace(model, (torch.zeros(1, 1, 1, 1),)), {"0.weight": 1})
        9.0

    Source: the numbers of arXiv 1808.06866 and 1808.07471 for the residual networks for CIFAR.
    """
    sizes = {name: filters.size for name, (_, filters) in filters_of_layers(network).items()}
    left = {name: 1 - pruned.get(name, 0) / size for name, size in sizes.items()}
    produced = _produced(network)
    origins = _origins(network.ir, produced)
    total = 0.0
    for node in network.ir.nodes:
        if node.target is not torch.ops.aten.convolution.default:
            continue
        read = origins[node.args[0]]
        share = left.get(next(iter(read)), 1.0) if len(read) == 1 else 1.0
        made = prod(left.get(name, 1.0) for name in _own(node, produced))
        total += prod(axis.size for axis in node.meta["macs"]) * share * made
    return total


def leaking_groups(model: nn.Module, network: Network) -> list[str]:
    """The groups whose units still contribute although all of their weights are zero.

    Behind a sigmoid a zero is a half; in a layer norm it counts in the mean. Such units cannot be removed without a
    change. Half of the units of every group are set to zero in a copy, and it is seen whether silencing them does more.

    Raises:
        InputError: the code decides by values of activations.
    """
    if any(program.values == "all" for program in network.programs):
        raise InputError(
            f"SoftPruning: the code of {network.model_name} decides by the values of activations, which a filter of "
            "zeros may change in ways that its removal does not: it is not supported"
        )
    halves = {g.name: tuple(range(g.size // 2, g.size)) for g in network.prunable if g.size > 1}
    rough = {name: _perturbed(tensor) for name, tensor in named_tensors(model)}

    def leaking(some: Sequence[tuple[str, ...]]) -> list[str]:
        names = [name for names in some for name in names]
        if not names or _is_silent(model, network, rough, {name: halves[name] for name in names}):
            return []
        if len(some) == 1:
            return names
        return leaking(some[: len(some) // 2]) + leaking(some[len(some) // 2 :])

    return leaking(list(dict.fromkeys(network.equal_to(name) for name in halves)))


def _is_silent(
    model: nn.Module, network: Network, rough: Mapping[str, Tensor], keep: Mapping[str, tuple[int, ...]]
) -> bool:
    """True if silencing the units that do not stay changes nothing in a copy where their weights are zero."""
    tensors = dict(rough)
    for name, units in keep.items():
        filters = filters_of_group(network, network[name])
        gone = torch.ones(filters.size, dtype=torch.bool)
        gone[list(units)] = False
        for place in (*filters.weights, *filters.carriers):
            if tensors[place.parameter] is rough[place.parameter]:
                tensors[place.parameter] = rough[place.parameter].clone()
            scale(tensors[place.parameter], place.axis, place.positions(gone), 0)
    zeroed = copy_with(model, {id(tensor): like(tensor, tensors[name]) for name, tensor in named_tensors(model)})
    eps = max(torch.finfo(tensor.dtype).eps for tensor in tensors.values() if tensor.is_floating_point())
    return verify(zeroed, zeroed, Edit(network, keep)) < 1e3 * eps  # it is 0 where nothing leaks


def _perturbed(tensor: Tensor) -> Tensor:
    """A copy of a tensor; a constant one, such as a fresh norm, is made uneven, as it would hide a difference."""
    new = tensor.detach().clone()
    if new.is_floating_point() and new.numel() and bool((new == new.flatten()[0]).all()):
        generator = torch.Generator().manual_seed(0)
        new += (0.1 + 0.1 * torch.rand(new.shape, generator=generator)).to(new.device, new.dtype)
    return new
