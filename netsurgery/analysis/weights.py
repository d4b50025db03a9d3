"""Weights as layers use them: parameters, and results that the code computes from parameters alone.

Such are weight norms, masks, low-rank updates and scales of the learning rate: the norm of a unit is one of the result,
and not of the parameters that go into it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from netsurgery.analysis.computed_weights import (
    Computations,
    ancestors,
    is_stream,
    meetings,
    packet_of,
    peeled,
    writers,
)
from netsurgery.analysis.groups import Group, Role
from netsurgery.analysis.low_rank import adapted_layers
from netsurgery.analysis.network import Network
from netsurgery.analysis.replay import replay
from netsurgery.axes import Axis, leaves, resolve
from netsurgery.capture.inputs import Inputs
from netsurgery.capture.program import Program
from netsurgery.capture.source_locations import format_where
from netsurgery.errors import InputError

__all__ = [
    "Use",
    "Weight",
    "computed_weights",
    "evaluated",
    "is_computed",
    "no_inputs",
    "part",
    "used_directly",
    "uses",
]


@dataclass(frozen=True, eq=False)
class Weight:
    """A tensor that comes from parameters alone and that operations combine with activations.

    Attributes:
        names: of the tensors of the model that it comes from.
        axes: its dimensions, as expressions over the groups' channels.
        value: its present value.
        roles: by ``(dimension, channel)`` the role of a channel, where an operation gives it one.
        node: the operation that computes it; None for a parameter itself.
        parts: the weights of a layer's low-rank updates; by themselves they are no weights of its units.
    """

    names: tuple[str, ...]
    axes: tuple[Axis, ...]
    value: Tensor
    roles: Mapping[tuple[int, Axis], Role]
    node: fx.Node | None = None
    parts: tuple[fx.Node, ...] = ()


@dataclass(frozen=True, eq=False)
class Use:
    """An axis of a weight that carries the units of a group, and their role there."""

    weight: Weight
    axis: int
    role: Role


def is_computed(node: fx.Node) -> bool:
    """True if a node is more than a parameter or a view of one."""
    core = peeled(node)
    return core.op != "get_attr" or bool(writers(core))


def uses(network: Network, tensors: Mapping[str, Tensor] | None = None) -> dict[str, list[Use]]:
    """For each group the axes of weights that carry its units; a computed weight stands for its parameters.

    Args:
        tensors: of the model, by name; by default as they are now.

    Raises:
        InputError: a weight is computed from something else than parameters, such as random numbers.
    """
    tensors = network.tensors if tensors is None else tensors
    computed = computed_weights(network, tensors)
    direct = used_directly(network)
    return {group.name: _uses(network, group, computed, direct, tensors) for group in network.prunable}


def used_directly(network: Network) -> set[str]:
    """The tensors that activations meet as they are (in training only those that are not used otherwise)."""
    direct: set[str] = set()
    known: set[str] = set()
    for program in network.programs:
        met = {peeled(weight) for weight, _ in meetings(program)}
        direct |= {str(node.target) for node in met if not is_computed(node)} - known
        known.update(name for node in met for name in _names(network, node))
    return direct


def _uses(
    network: Network, group: Group, computed: list[Weight], direct: set[str], tensors: Mapping[str, Tensor]
) -> list[Use]:
    found: list[Use] = []
    replaced: set[str] = set()
    merged: set[str] = set()
    for weight in computed:
        mine = [member for member in group.members if member.parameter in weight.names]
        if not weight.roles and (not mine or any(member.role != "carries" for member in mine)):
            continue  # it is a result of layers, which use the parameters themselves
        for axis, expression in enumerate(weight.axes):
            if group.channel in leaves(expression):
                found.append(Use(weight, axis, weight.roles.get((axis, group.channel), "carries")))
                (merged if weight.parts else replaced).update(member.parameter for member in mine)
    gone = merged | (replaced - direct)
    kept = [member for member in group.members if member.parameter not in gone]
    own = {m.parameter: Weight((m.parameter,), network.axes[m.parameter], tensors[m.parameter], {}) for m in kept}
    return [*(Use(own[member.parameter], member.axis, member.role) for member in kept), *found]


def computed_weights(network: Network, tensors: Mapping[str, Tensor]) -> list[Weight]:
    """The weights that are computed from parameters, each once, with their values."""
    found: dict[int, Weight] = {}
    known: set[str] = set()  # tensors whose use in eval mode was seen: their use in training does not count
    computation = Computations()
    for program in network.programs:
        met: dict[fx.Node, list[tuple[fx.Node, fx.Node]]] = {}
        for weight, user in meetings(program):
            if is_computed(weight) and not is_stream(weight) and weight.meta["dtype"].is_floating_point:
                met.setdefault(peeled(weight), []).append((weight, user))
        new = {node: names for node in met if not known.issuperset(names := _names(network, node))}
        values = evaluated(program, list(new), tensors)
        for (node, names), value in zip(new.items(), values, strict=True):
            axes = tuple(resolve(axis, {}) for axis in node.meta["dims"])
            found.setdefault(computation(node), Weight(names, axes, value, _roles(node, met[node]), node))
        known.update(*(_names(network, peeled(weight)) for weight, _ in meetings(program)))
    adapted, vectors = _adapted(network, tensors)
    own = {weight.node for weight in adapted} | vectors
    return [*(weight for weight in found.values() if weight.node not in own), *adapted]


def _adapted(network: Network, tensors: Mapping[str, Tensor]) -> tuple[list[Weight], set[fx.Node]]:
    """The weights of layers with low-rank updates beside them, and the vectors that multiply the updates."""
    program = network.programs[0]
    layers = adapted_layers(program)
    nodes = [node for one in layers for node in (one.weight, *one.parts, *one.vectors)]
    values = dict(zip(nodes, evaluated(program, nodes, tensors), strict=True))
    found, vectors = [], set[fx.Node]()
    for one in layers:
        sources = (one.weight, *one.parts, *one.vectors)
        names = tuple(dict.fromkeys(name for node in sources for name in _names(network, node)))
        axes = tuple(resolve(axis, {}) for axis in one.weight.meta["dims"])
        roles = _roles(one.weight, [(one.weight, one.layer)])
        found.append(Weight(names, axes, one.value(values), roles, peeled(one.weight), one.parts))
        vectors.update(map(peeled, one.vectors))
    return found, vectors


def _names(network: Network, node: fx.Node) -> tuple[str, ...]:
    found = [str(one.target) for one in ancestors(node) if one.op == "get_attr" and one.target in network.tensors]
    return tuple(name for name in network.tensors if name in found)


_STRENGTH = {"carries": 0, "window": 0, "consumes": 1, "produces": 2}


def _roles(node: fx.Node, met: list[tuple[fx.Node, fx.Node]]) -> dict[tuple[int, Axis], Role]:
    """The roles that the channels of a weight have in the operations that read it."""
    found: dict[tuple[int, Axis], Role] = {}
    for weight, user in met:
        for operand, dims in user.meta.get("operands", ()):
            for source, axis, role in dims if operand is weight else ():
                at = [i for i, own in enumerate(node.meta["dims"]) if own is source] or range(len(node.meta["dims"]))
                for key in ((i, leaf) for i in at for leaf in leaves(resolve(axis, {}))):
                    if key not in found or _STRENGTH[role] > _STRENGTH[found[key]]:
                        found[key] = "carries" if role == "window" else role
    return found


# Their values --------------------------------------------------------------------------------------------------------


def part(program: Program, wanted: list[fx.Node], whole: bool = False) -> Program:
    """The part of a program that computes some nodes.

    Args:
        whole: True if computations still see all units, as before a removal.
    """
    needed: dict[fx.Node, None] = {}
    for node in wanted:
        needed.update(ancestors(node))
    graph, constants = fx.Graph(), dict(program.constants)
    copies: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node in needed:
            copies[node] = _copied(graph, node, copies, constants)
            if not whole:
                copies[node].meta.pop("whole", None)  # here, statistics are taken over what stays
    graph.output(tuple(copies[node] for node in wanted))
    return Program(graph, program.mode, constants, values=program.values)


def _copied(graph: fx.Graph, node: fx.Node, copies: dict[fx.Node, fx.Node], constants: dict[str, Tensor]) -> fx.Node:
    if packet_of(node) is not torch.ops.aten.embedding_renorm_:
        return graph.node_copy(node, copies.__getitem__)
    table = node.all_input_nodes[0]
    name = f"rows of {node.name}"  # all: whichever is looked up is normalised before
    constants[name] = torch.arange(table.meta["shape"][0])
    rows = graph.get_attr(name)
    rows.meta["dims"] = table.meta["dims"][:1]
    new = graph.create_node("call_function", node.target, (copies[table], rows, *node.args[2:]), node.kwargs)
    new.meta = dict(node.meta)
    return new


def no_inputs(tensors: Mapping[str, Tensor]) -> Inputs:
    """Inputs for a part of a program that takes none: an empty tensor on the device to run on."""
    return tuple(tensor.new_empty(0) for tensor in list(tensors.values())[:1]), {}


def evaluated(program: Program, nodes: list[fx.Node], tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The values of nodes that come from parameters alone.

    Raises:
        InputError: they come from something else too.
    """
    if not nodes:
        return []
    for node in nodes:
        if why := _unknown(program, node):
            names = ", ".join(f"'{name}'" for name in node.meta["params"])
            raise InputError(
                f"the weight that is computed from {names} {format_where(node.meta['where'])} cannot be scored: {why}"
            )
    return replay(part(program, nodes), tensors, no_inputs(tensors))


def _unknown(program: Program, node: fx.Node) -> str:
    """The reason why a node has no value without data; empty where it has one."""
    for one in ancestors(node):
        if one.op == "placeholder":
            return "activations are written into it"
        if torch.Tag.nondeterministic_seeded in getattr(one.target, "tags", ()):
            return f"{one.target} draws random numbers"
        if one.op == "get_attr" and one.target in program.constants and program.constants[str(one.target)].is_meta:
            return "the values of a tensor that the code makes are not known"
    return ""
