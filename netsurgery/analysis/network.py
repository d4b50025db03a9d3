"""The network as surgery sees it: a recorded graph, the dimensions of every tensor, and the groups they share.

A **group** is a set of units (channels, neurons, heads) that live or die together wherever they appear. Its
**members** are the parameter axes that carry it. A group is **locked** when removing a unit would change what the
network means; the reason names the operation and the line of source.

``trace`` makes a Network; passes read it and return scores laid on it, or an Edit. Nothing here changes a tensor.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

import networkx as nx
import torch
from torch import Tensor, fx, nn

from netsurgery.analysis.blocks import Block, residual_blocks
from netsurgery.analysis.computed_weights import lock_normalised
from netsurgery.analysis.costs import Cost, Sizes, Term, total
from netsurgery.analysis.groups import Group, Member, group_rows
from netsurgery.analysis.rules import apply_rule
from netsurgery.analysis.units import Unit, units_of, units_of_products
from netsurgery.axes import (
    Axis,
    Edge,
    Fixed,
    channel,
    equate,
    find,
    inner,
    leaves,
    leaves_in,
    lock,
    resolve,
    share_with,
)
from netsurgery.capture.copies import named_tensors
from netsurgery.capture.inputs import Inputs
from netsurgery.capture.paths import is_within
from netsurgery.capture.program import Program
from netsurgery.capture.source_locations import format_where
from netsurgery.errors import InputError
from netsurgery.tables import columns, html

__all__ = ["Network", "analyse"]


@dataclass(frozen=True)
class Network:
    """A traced model; see the module's docstring.

    Attributes:
        programs: the recorded runs: in eval mode and, where parameters are only used in training, in that mode too.
        tensors: parameters, buffers and tensor attributes of the model by name (the model's own, not copies).
        axes: the dimensions of each of these tensors, as expressions over the groups' channels.
        groups: every group, in the order of the state dict.
        equal_sizes: names of groups that must keep equally many units, though not the same ones.
        inputs: the example inputs: positional and keyword.
        model: the model that was traced, for passes that run it on data; they leave it as it is.
        scores: importance of each unit, by group name, laid on by scoring passes.
        comparable: True if scores mean the same in every group, as increases of the loss do.
        ordinal: True if scores only rank units, as LAMP's do; such scores must not be divided by costs.
        block_scores: importance of residual blocks, by path, laid on by passes that score them.
        original: the model that earlier passes have made this one from; modules are named as in it.
        given: the model that the first of them was run on, where modules have been rewritten since; their paths are the
            same.
    """

    model_name: str
    programs: tuple[Program, ...]
    tensors: Mapping[str, Tensor] = field(repr=False)
    axes: Mapping[str, tuple[Axis, ...]] = field(repr=False)
    groups: tuple[Group, ...]
    equal_sizes: tuple[tuple[str, ...], ...]
    inputs: Inputs = field(repr=False)
    model: nn.Module = field(repr=False, compare=False)
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    comparable: bool = False
    ordinal: bool = False
    block_scores: Mapping[str, float] = field(default_factory=dict)
    original: nn.Module | None = field(default=None, repr=False, compare=False)
    given: nn.Module | None = field(default=None, repr=False, compare=False)

    def __getitem__(self, name: str) -> Group:
        if name not in self.by_name:
            made = [g.name for g in self.groups for m in g.members if m.module == name and m.role == "produces"]
            where = f"the units of that module are in '{made[0]}'" if made else "print(network) lists them"
            raise InputError(f"'{name}' is no group of this network; {where}")
        return self.by_name[name]

    @cached_property
    def by_name(self) -> dict[str, Group]:
        """The groups by name."""
        return {group.name: group for group in self.groups}

    @cached_property
    def by_channel(self) -> dict[Axis, Group]:
        """The groups by channel."""
        return {group.channel: group for group in self.groups}

    @property
    def ir(self) -> fx.Graph:
        """The operations of the run in eval mode; ``node.meta`` has ``module``, ``where``, ``shape`` and ``dims``."""
        return self.programs[0].graph

    @property
    def graph(self) -> nx.MultiDiGraph:
        """The dependency graph: module -> group it produces (or carries), group -> module that consumes it."""
        graph = nx.MultiDiGraph()
        for group in self.groups:
            graph.add_node(group.name, kind="group", size=group.size, locked=group.locked)
            for member in group.members:
                module = f"module:{member.module}"
                graph.add_node(module, kind="module")
                ends = (group.name, module) if member.role == "consumes" else (module, group.name)
                graph.add_edge(*ends, parameter=member.parameter, axis=member.axis, role=member.role)
        return graph

    @property
    def prunable(self) -> tuple[Group, ...]:
        """The groups that are not locked."""
        return tuple(group for group in self.groups if group.locked is None)

    @property
    def prunable_share(self) -> float:
        """The share of the network's inner dimensions that a removal can take.

        Let every group that is not locked lose the same small share of its units, and count the entries of parameters
        that go. The result is relative to the count where all dimensions lose that share, except inputs, outputs and
        positions. A matrix with one locked axis counts half.

        Example:
            >>> import torch, netsurgery
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
            >>> netsurgery.trace(model, torch.zeros(1, 4)).prunable_share
            1.0
        """
        channels = {leaf for dims in self.axes.values() for axis in dims for leaf in leaves(axis)}
        most = self.entries({leaf for leaf in channels if inner(leaf)})
        return self.entries({group.channel for group in self.prunable}) / most if most else 0.0

    def entries(self, channels: Container[Axis]) -> float:
        """Entries of parameters at units of some channels: an entry counts once for each axis that has such units."""
        parameters = (dims for name, dims in self.axes.items() if isinstance(self.tensors[name], nn.Parameter))
        return sum(
            prod(axis.size for axis in dims) * sum(share_with(axis, channels) for axis in dims) for dims in parameters
        )

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The residual blocks that can be left out, in the order in which they run."""
        return residual_blocks(self.model, self.programs)

    def equal_to(self, name: str) -> tuple[str, ...]:
        """The names of the groups that must keep as many units as a group, its own among them."""
        return self._equal.get(name, (name,))

    @cached_property
    def _equal(self) -> dict[str, tuple[str, ...]]:
        return {name: names for names in self.equal_sizes for name in names}

    @cached_property
    def terms(self) -> tuple[list[Term], list[Term]]:
        """Parameters and MACs as sums of products of dimensions: ``(module, axes)`` each."""
        parameters = [
            (name.rpartition(".")[0], self.axes[name])
            for name, t in self.tensors.items()
            if isinstance(t, nn.Parameter)
        ]
        macs = [
            (node.meta["module"], tuple(node.meta["macs"]))
            for node in self.programs[0].graph.nodes
            if "macs" in node.meta
        ]
        return parameters, macs

    def sizes(self, counts: Mapping[str, int] | None = None) -> Sizes:
        """Sizes of expressions when the named groups have ``counts`` units and all others have theirs."""
        return Sizes({self[name].channel: count for name, count in (counts or {}).items()})

    def cost(self, counts: Mapping[str, int] | None = None, dropped: Sequence[str] = ()) -> Cost:
        """Parameters and multiply-accumulates, now, with other numbers of units or without modules; nothing is built.

        Args:
            counts: the number of units of each group that has another one.
            dropped: paths of modules that go with all that is in them.
        """
        parameters, macs = (
            [term for term in terms if not any(is_within(term[0], path) for path in dropped)] for terms in self.terms
        )
        return total(parameters, macs, self.sizes(counts))

    def require_weights(self, reader: object) -> None:
        """Make sure that the model has weights, for a pass that reads them.

        Raises:
            InputError: it is on the meta device.
        """
        absent = next((n for n, t in self.tensors.items() if t.is_meta and isinstance(t, nn.Parameter)), None)
        if absent is not None:
            raise InputError(
                f"{type(reader).__name__} reads weights, but '{absent}' has none, it is on the meta device: "
                "pass a model with its weights loaded, or use RandomScore()"
            )

    def with_scores(self, scores: Mapping[str, Tensor], comparable: bool = False, ordinal: bool = False) -> Network:
        """The same network with scores laid on its groups.

        Args:
            scores: of each unit, ``(units,)`` for each group.
            comparable: True if they mean the same in every group.
            ordinal: True if they only rank units, and must not be divided by costs.
        """
        return dataclasses.replace(self, scores=dict(scores), comparable=comparable, ordinal=ordinal)

    def with_locked(self, reasons: Mapping[str, str]) -> Network:
        """The same network with more groups locked; groups that must keep as many units are locked with them."""
        reasons = dict(reasons)
        for names in self.equal_sizes:
            why = next((reasons[name] for name in names if name in reasons), None)
            reasons.update({name: why for name in names if why is not None and name not in reasons})
        groups = [dataclasses.replace(g, locked=g.locked or reasons.get(g.name)) for g in self.groups]
        return dataclasses.replace(self, groups=tuple(groups))

    def with_equal_sizes(self, equal_sizes: Iterable[tuple[str, ...]]) -> Network:
        """The same network with more groups that must keep equally many units."""
        graph = nx.Graph()
        for names in (*self.equal_sizes, *equal_sizes):
            nx.add_path(graph, names)
        order = {group.name: index for index, group in enumerate(self.groups)}
        joined = [tuple(sorted(names, key=order.__getitem__)) for names in nx.connected_components(graph)]
        return dataclasses.replace(self, equal_sizes=tuple(sorted(joined, key=lambda names: order[names[0]])))

    def axis_expression(self, axis: Axis) -> str:
        """An axis in the words of the groups, such as ``conv1*7*7`` or ``conv1+conv2``."""
        axis = find(axis)
        if axis.op:
            return {"product": "*", "concat": "+"}[axis.op].join(
                f"({text})" if term.op == "concat" and axis.op == "product" else text
                for term, text in ((term, self.axis_expression(term)) for term in axis.terms)
            )
        group = self.by_channel.get(axis)
        return group.name if group else str(axis.size)

    @property
    def _line(self) -> str:
        cost, locked = self.cost(), len(self.groups) - len(self.prunable)
        return f"{cost.params:,} parameters, {cost.macs:,} MACs, {len(self.groups)} groups, {locked} locked"

    def __str__(self) -> str:
        inputs = ", ".join("x".join(map(str, node.meta["shape"])) for node in self.ir.nodes if node.op == "placeholder")
        share = f"{100 * self.prunable_share:.1f}% of its inner dimensions prunable"
        return f"{self.model_name} on {inputs}: {self._line}, {share}\n{columns(group_rows(self.groups), right=(1,))}"

    def __repr__(self) -> str:
        return f"Network({self.model_name}: {self._line}{', scored' if self.scores else ''})"

    def _repr_html_(self) -> str:
        return html(repr(self).removeprefix("Network(").removesuffix(")"), group_rows(self.groups), right=(1,))


class Analysis:
    """Interprets recorded programs over the dimensions of a model's tensors."""

    def __init__(self, shapes: Mapping[str, Sequence[int]], parameters: Container[str]):
        self.axes = {name: tuple(channel(n) for n in shape) for name, shape in shapes.items()}
        self.parameters = parameters  # names of those that are learned
        self.roles: list[tuple[str, Axis, Axis, str]] = []
        self.equal_sizes: list[tuple[list[Axis], str]] = []
        self.used: set[str] = set()
        self.units: list[tuple[Axis, Unit]] = []
        self.constants: list[tuple[Axis, str]] = []  # of tensors that are not learned, and the reason to lock

    def note_role(self, node: fx.Node, source: Axis, axis: Axis, role: str) -> None:
        """A parameter that ``node`` comes from has ``axis`` in its dimension ``source``, in this role."""
        self.roles.extend((name, source, axis, role) for name in node.meta["params"])

    def equate(self, parts: list[Axis], reason: str) -> None:
        """The parts must keep equal sizes."""
        self.equal_sizes.append((parts, reason))

    def interpret(self, program: Program) -> None:
        """Give every node of a program its dimensions."""
        for node in program.graph.nodes:
            shape = node.meta.get("shape")
            if node.op == "placeholder":
                node.meta["dims"] = tuple(
                    channel(n, Edge(f"the network input {node.name} has this dimension")) for n in shape
                )
            elif node.op == "get_attr":
                self.used.add(node.target)
                node.meta["params"] = (node.target,)
                own = tuple(
                    channel(n, f"the code makes this constant {format_where(node.meta['where'])}") for n in shape
                )
                node.meta["dims"] = self.axes.get(node.target, own)
                if node.target not in self.parameters:
                    self.note_constant(
                        node.meta["dims"], Edge(f"a constant feeds this dimension, as an input would: {node.target}")
                    )
            elif node.op == "output":
                for result in node.all_input_nodes:
                    for axis in result.meta["dims"]:
                        lock(axis, Edge("the network output has this dimension"))
            elif "dims" not in node.meta:
                if all("params" in source.meta for source in node.all_input_nodes):
                    names = dict.fromkeys(name for source in node.all_input_nodes for name in source.meta["params"])
                    node.meta["params"] = tuple(names)
                if node.target.__name__ == "getitem":
                    node.meta["dims"] = node.args[0].meta["dims"][node.args[1]]
                else:
                    apply_rule(node, self)
                    self.units.extend(units_of(node))

    def note_constant(self, dims: Iterable[Axis], reason: str) -> None:
        """A tensor that is not learned has these dimensions."""
        self.constants.extend((axis, reason) for axis in dims)

    def settle_equal_sizes(self) -> list[list[Axis]]:
        """Classes of channels that must keep equal counts."""
        pairs: dict[tuple[Axis, Axis], str] = {}
        while True:
            wanted = [(parts[0], part, reason) for parts, reason in self.equal_sizes for part in parts[1:]]
            wanted += [
                (a, b, reason) for (a, b), reason in pairs.items()
            ]  # equal sizes stay equal when an axis is refined
            before, pairs = pairs, {}
            for one, other, reason in wanted:
                pairs.update(dict.fromkeys(equate(one, other, reason), reason))
            if pairs == before:
                break
        classes: dict[Axis, list[Axis]] = {}
        for a, b in pairs:
            if a.locked is None and b.locked is None:
                _merge(classes, a, b)
        return [members for members in {id(c): c for c in classes.values()}.values() if len(members) > 1]

    def resolve(self) -> dict[Axis, Axis]:
        """Replace every dimension of a tensor by the axis that it has become."""
        memo: dict[Axis, Axis] = {}
        self.axes = {name: tuple(resolve(axis, memo) for axis in dims) for name, dims in self.axes.items()}
        return memo


def _merge(classes: dict[Axis, list[Axis]], a: Axis, b: Axis) -> None:
    left, right = classes.setdefault(a, [a]), classes.setdefault(b, [b])
    if left is not right:
        left.extend(right)
        classes.update(dict.fromkeys(right, left))


def analyse(model: nn.Module, programs: tuple[Program, ...], inputs: Inputs) -> Network:
    """Find the groups of a model from its recorded programs."""
    tensors = dict(named_tensors(model))
    parameters = {name for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)}
    analysis = Analysis({name: tensor.shape for name, tensor in tensors.items()}, parameters)
    for program in programs:
        analysis.interpret(program)
        analysis.units.extend(units_of_products(program))
    for name in [name for name in tensors if name not in analysis.used]:
        for axis in analysis.axes[name]:
            lock(axis, "the recorded run does not use this tensor")
    _lock_what_is_cut_off(analysis, programs)
    lock_normalised(programs, parameters)
    sources = analysis.axes
    classes = analysis.settle_equal_sizes()
    memo = analysis.resolve()
    roles = _roles(analysis, sources, memo)
    _lock_what_constants_feed(analysis, roles, classes)
    groups = _groups(analysis, roles, memo)
    names = {group.channel: group.name for group in groups}
    equal_sizes = [tuple(names[leaf] for leaf in members if leaf in names and not leaf.locked) for members in classes]
    return Network(
        type(model).__name__,
        programs,
        tensors,
        analysis.axes,
        groups,
        tuple(t for t in equal_sizes if len(t) > 1),
        inputs,
        model,
    )


def _lock_what_is_cut_off(analysis: Analysis, programs: tuple[Program, ...]) -> None:
    """Lock the part of a position embedding or a mask that only longer inputs than the recorded ones need."""
    working = {leaf for _, _, axis, role in analysis.roles if role in ("produces", "consumes") for leaf in leaves(axis)}
    read: set[Axis] = set()
    idle: set[Axis] = set()
    for program in programs:
        for node in program.graph.nodes:
            if node.op == "get_attr" and node.target in analysis.axes:
                for leaf in set(leaves_in(node.meta["dims"])) - working - read:
                    if leaf.locked is None:
                        (read if _reads(node, leaf) else idle).add(leaf)
    for leaf in idle - read:
        lock(leaf, "the recorded run does not use this part of the tensor")


_CUTS = (torch.ops.aten.slice.Tensor, operator.getitem)


def _reads(node: fx.Node, leaf: Axis) -> bool:
    """True if anything is computed from the units of one channel of a tensor."""
    seen, left = {node}, [node]
    while left:
        for user in left.pop().users:
            if user.op == "output":
                return True
            if leaf not in leaves_in(user.meta["dims"]):
                if user.target not in _CUTS:
                    return True
            elif user not in seen:
                seen.add(user)
                left.append(user)
    return False


Roles = dict[tuple[str, int, Axis], str]  # by tensor, axis and channel, where an operation has said


def _roles(analysis: Analysis, sources: Mapping[str, tuple[Axis, ...]], memo: dict[Axis, Axis]) -> Roles:
    roles: Roles = {}
    strength = {"window": 0, "carries": 1, "consumes": 2, "produces": 3}
    for name, source, axis, role in analysis.roles:
        places = [i for i, own in enumerate(sources.get(name, ())) if own is source] or range(
            len(sources.get(name, ()))
        )
        for leaf in leaves(resolve(axis, memo)):
            for place in places:
                key = (name, place, leaf)
                if strength[role] > strength.get(roles.get(key, ""), -1):
                    roles[key] = role
    return roles


def _lock_what_constants_feed(analysis: Analysis, roles: Roles, classes: Sequence[Sequence[Axis]]) -> None:
    """Lock units that constants alone make, such as the columns of a table of coordinates: they are inputs."""
    made: set[Axis] = set()
    weights = {name for (name, _, _), role in roles.items() if role == "consumes"}
    for name, dims in analysis.axes.items():
        learned, contracted = name in analysis.parameters, name in weights
        for place, axis in enumerate(dims):
            for leaf in leaves(axis):
                role = roles.get((name, place, leaf))  # None: added, say, and not only multiplied as by a norm
                if (role == "produces" and (learned or contracted)) or (role is None and learned):
                    made.add(leaf)
    for axis, reason in analysis.constants:
        for leaf in leaves(axis):
            if leaf not in made and leaf.size > 1:
                lock(leaf, reason)
    for together in classes:
        for reason in [leaf.locked for leaf in together if leaf.locked]:
            for leaf in together:
                lock(leaf, reason)


def _groups(analysis: Analysis, roles: Roles, memo: dict[Axis, Axis]) -> tuple[Group, ...]:
    members: dict[Axis, list[tuple[str, int, str]]] = {}
    for name, dims in analysis.axes.items():
        for place, axis in enumerate(dims):
            for leaf in dict.fromkeys(leaves(axis)):
                members.setdefault(leaf, []).append((name, place, roles.get((name, place, leaf), "carries")))
    units = {leaf: unit for axis, unit in reversed(analysis.units) for leaf in leaves(resolve(axis, memo))}
    groups: list[Group] = []
    taken: set[str] = set()
    for leaf, found in members.items():
        only_read = all(role in ("window", "consumes") for _, _, role in found)
        if isinstance(leaf.locked, Fixed) and (leaf.size == 1 or only_read):
            continue
        if leaf.size == 1 and leaf.locked is None:
            continue
        name, place, role = min(found, key=lambda m: {"produces": 0, "carries": 1}.get(m[2], 2))
        base = (name.rpartition(".")[0] or name) + (":in" if role in ("consumes", "window") else "")
        unique = next(n for i in range(1, len(members) + 2) if (n := base if i == 1 else f"{base}:{i}") not in taken)
        taken.add(unique)
        listed = tuple(Member(n, p, r if r != "window" else "carries") for n, p, r in found)  # type: ignore[arg-type]
        groups.append(Group(unique, leaf.size, listed, leaf.locked, leaf, units.get(leaf, "channel")))
    return tuple(groups)
