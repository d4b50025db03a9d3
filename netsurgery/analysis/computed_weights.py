"""Weights that the code computes from others: a removal must not change the entries that stay.

A weight norm divides a filter by its length, weight standardisation by its deviation, spectral norm by its largest
singular value: where some of the inputs go, the same code makes another weight of the rest. But the entries of a
weight that stay must keep their values. So the units that such a computation works across are locked, unless a
parameter multiplies the result and can make up for the change, as the length of a weight norm can. Such a parameter is
noted as ``scaled_by``, and ``netsurgery.rewriting.kept_weights`` works out its new values.

Queries, tokens and tables of positions come from parameters alone too, but layers work on them as on activations:
so their norms and products do not count as computations of a weight.
"""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from netsurgery.axes import Axis, find, leaves, leaves_in, lock
from netsurgery.capture.inputs import Tree
from netsurgery.capture.operations import aliased
from netsurgery.capture.program import Program
from netsurgery.notation import Operation

__all__ = [
    "ALIKE",
    "Computations",
    "aligned_dims",
    "ancestors",
    "is_moved",
    "is_stream",
    "lock_normalised",
    "meetings",
    "packet_of",
    "peeled",
    "scaled",
    "worked_across",
    "writers",
]  # fmt: skip

aten = torch.ops.aten
_PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution}
_LINEAR = {*_PRODUCTS, aten.mv, aten.addmv, aten.dot, aten.vdot, aten.sum}
_LAYER_NORMS = {
    aten.native_layer_norm, aten.native_group_norm, aten._softmax, aten._safe_softmax, aten._log_softmax,
}  # fmt: skip
_WEIGHT_OF = {
    aten.mm, aten.addmm, aten.mv, aten.addmv, aten.convolution, aten.embedding, aten._embedding_bag, aten._trilinear,
    aten.native_batch_norm, aten.native_layer_norm, aten.native_group_norm,
}  # fmt: skip
_ARRANGED = {aten.t, aten.transpose, aten.permute, aten.detach, aten.alias}
_LIMITS = {aten.renorm, aten.renorm_, aten.embedding_renorm_}
_MULTIPLIED = {aten.mul, aten.mul_, aten.div, aten.div_}
ALIKE = {aten._to_copy, aten.clone, aten.neg, aten.expand}


# Weights of operations -----------------------------------------------------------------------------------------------


def meetings(program: Program) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Each result of parameters and constants alone that an operation combines with activations, and the operation."""
    for node in program.graph.nodes:
        if node.op == "call_function" and "params" not in node.meta:
            yield from ((source, node) for source in node.all_input_nodes if "params" in source.meta)


def packet_of(node: fx.Node) -> Any:
    """The operator of a node, without its overload."""
    return getattr(node.target, "overloadpacket", node.target)


def is_moved(node: fx.Node) -> bool:
    """True if a node holds all of its input, in other dimensions or in another order of dimensions."""
    if node.op != "call_function" or packet_of(node) is aten.expand or packet_of(node) is operator.getitem:
        return False
    written = [written for _, written in aliased(node)]
    return bool(written) and not any(written) and _count(node) == _count(node.all_input_nodes[0])


def _count(node: fx.Node) -> int:
    shape = node.meta["shape"]
    return -1 if isinstance(shape, list) else torch.Size(shape).numel()


def peeled(node: fx.Node) -> fx.Node:
    """A node without the views around it: a parameter, or a computed weight, in dimensions of its own."""
    core, arranged = node, True
    while is_moved(core):
        arranged = arranged and packet_of(core) in _ARRANGED
        core = core.all_input_nodes[0]
        node = core if arranged else node
    return core if core.op == "get_attr" else node


def writers(node: fx.Node) -> list[fx.Node]:
    """The operations that write into a result, or into a view of it."""
    found = []
    for user in node.users:
        written = next((written for base, written in aliased(user) if base is node), None)
        if written is not None:
            found.extend([user] if written else writers(user))
    return found


def ancestors(node: fx.Node) -> dict[fx.Node, None]:
    """A node and all nodes that its value comes from, with the operations that write into these.

    The indices of a lookup that normalises rows first are left out: they change nothing in other rows.
    """
    found: dict[fx.Node, None] = {}
    left = [node]
    while left:
        one = left.pop()
        if one not in found:
            found[one] = None
            left.extend(one.all_input_nodes[:1] if packet_of(one) is aten.embedding_renorm_ else one.all_input_nodes)
            left.extend(writers(one))
    return found


class Computations:
    """Numbers nodes: those that compute the same from the same tensors get the same number."""

    def __init__(self) -> None:
        self.numbers: dict[tuple[object, str], int] = {}
        self.known: dict[fx.Node, int] = {}

    def __call__(self, node: fx.Node) -> int:
        for one in node.graph.nodes if node not in self.known else ():
            if "params" in one.meta and one not in self.known:
                self.known[one] = self.numbers.setdefault(self._key(one), len(self.numbers))
        return self.known[node]

    def _key(self, node: fx.Node) -> tuple[object, str]:
        made = [node] if node.op == "call_function" else []
        written = [(one.target, self._arguments(one)) for one in (*made, *writers(node))]
        return node.target, repr(written)

    def _arguments(self, node: fx.Node) -> Tree:
        numbers = {one: f"%{self.known[one]}" for one in node.all_input_nodes if one in self.known}
        return fx.node.map_arg((node.args, node.kwargs), lambda one: numbers.get(one, one.name))


def is_stream(node: fx.Node) -> bool:
    """True if a result of parameters is a stream of activations: layers made it, and none has it as its weight."""
    worked_on = any(packet_of(one) in _PRODUCTS for one in ancestors(node))
    return worked_on and not any("params" not in user.meta and _reads_weight(user, node) for user in node.users)


def _reads_weight(user: fx.Node, node: fx.Node) -> bool:
    """True if an operation has a node as its weight; products of batches of matrices, as in attention, have none."""
    batched = packet_of(user) in (aten.bmm, aten.baddbmm)
    return packet_of(user) in _WEIGHT_OF or (batched and node.meta["dims"][0].size == 1)


# Dependence between units --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Across:
    """An operation whose result at one unit depends on others; it may be a layer, and may be linear."""

    node: fx.Node
    layer: bool
    linear: bool


Mixed = dict[Axis, _Across]  # by channel


def _counts(dims: Tree) -> dict[Axis, int]:
    """The number of times that each channel of more than one unit occurs in dimensions."""
    return Counter(leaf for leaf in leaves_in(dims) if leaf.size > 1)


def _normalised(node: fx.Node) -> tuple[Axis, ...] | None:
    """The dimensions over which an operation takes statistics; every entry of its result depends on these."""
    packet, op = packet_of(node), Operation(node)
    if packet in (aten._softmax, aten._log_softmax, aten._safe_softmax):
        return (op.dims(op["self"])[op["dim"]],)
    if packet is aten.native_layer_norm:
        return tuple(op.dims(op["input"])[-len(op["normalized_shape"]) :])
    if packet is aten.native_group_norm:
        return tuple(op.dims(op["input"])[1:])
    if packet is aten._weight_norm_interface:
        return tuple(axis for dim, axis in enumerate(op.dims(op["v"])) if dim != op["dim"])
    if packet in (aten.renorm, aten.renorm_):
        return tuple(axis for dim, axis in enumerate(op.dims(op["self"])) if dim != op["dim"])
    if packet is aten.embedding_renorm_:
        return (op.dims(op["self"])[1],)
    if packet is aten.native_batch_norm and op["training"]:
        return tuple(axis for dim, axis in enumerate(op.dims(op["input"])) if dim != 1)
    return None


def worked_across(node: fx.Node) -> Mixed:
    """The channels that an operation works across: its result at one unit depends on its arguments at others."""
    if node.target is operator.getitem or is_moved(node):
        return {}
    packet = packet_of(node)
    if (along := _normalised(node)) is not None:
        across = _Across(node, packet in _LAYER_NORMS, linear=False)
        return dict.fromkeys(_counts(along), across)
    after = _counts(node.meta["dims"])
    across = _Across(node, packet in _PRODUCTS, packet in _LINEAR)
    found: Mixed = {}
    for source in node.all_input_nodes:
        found.update({leaf: across for leaf, n in _counts(source.meta["dims"]).items() if n > after.get(leaf, 0)})
    return found


def _join(one: Mixed, other: Mixed) -> Mixed:
    """Join both; where both have an operation for a channel, the one that is less like a layer counts."""
    joined = dict(one)
    for leaf, across in other.items():
        known = joined.get(leaf)
        if known is None or (across.layer, across.linear) < (known.layer, known.linear):
            joined[leaf] = across
    return joined


class _Computed:
    """The computed weights of one program."""

    def __init__(self, program: Program):
        self.program = program
        self.own: dict[fx.Node, Mixed] = {}
        for node in program.graph.nodes:
            made = "params" in node.meta or packet_of(node) is aten.embedding_renorm_
            if node.op == "call_function" and made and (across := worked_across(node)):
                self.own[node] = across
        self.mixed = functools.cache(self._mixed)
        met = dict.fromkeys(weight for weight, _ in meetings(program)) if self.own else {}
        self.met = [weight for weight in met if self.mixed(weight)]

    def _mixed(self, node: fx.Node) -> Mixed:
        """The channels across which a node depends on the nodes that it comes from."""
        found: Mixed = {}
        for one in ancestors(node):
            found = _join(found, self.own.get(one, {}))
        return found


def lock_normalised(programs: tuple[Program, ...], parameters: set[str]) -> None:
    """Lock the units that the computation of a weight works across, or note the parameter that makes up for it.

    A node of such a weight then says which channels its computation must see whole (``meta["whole"]``), and the weight
    which parameter is to be scaled (``meta["scaled_by"]``).
    """
    found = [_Computed(program) for program in programs]
    if not any(one.met for one in found):
        return
    computation = Computations()
    carried = {leaf for p in programs for n in p.graph.nodes if "params" not in n.meta for leaf in _carried(n)}
    for one in found:
        for weight in one.met:
            _settle(one, weight, carried, _Alone(found, computation, parameters))


def _carried(node: fx.Node) -> Mapping[Axis, int]:
    return _counts(node.meta.get("dims"))


def _settle(of: _Computed, weight: fx.Node, carried: set[Axis], alone: _Alone) -> None:
    own = _counts(weight.meta["dims"])
    stream = is_stream(weight)
    whole: dict[Axis, _Across] = {}
    for leaf, across in of.mixed(weight).items():
        if leaf.locked is not None or (stream and across.layer):
            continue
        if leaf in own or leaf in carried:
            whole[leaf] = across
        elif not across.linear:
            _lock_across(leaf, across)
    scale, kept = _limited(weight, set(whole), alone) or _scale(of, weight, list(whole), alone)
    for leaf, across in whole.items():
        if leaf not in kept:
            _lock_across(leaf, across)
    if scale is not None:
        peeled(weight).meta["scaled_by"] = scale.target
        peeled(weight).meta["limited"] = _limited(weight, set(), alone) is not None
        for node in ancestors(weight):
            node.meta["whole"] = node.meta.get("whole", frozenset()) | frozenset(kept)


def _lock_across(leaf: Axis, across: _Across) -> None:
    lock(
        leaf,
        Operation(across.node).reason(
            "a weight is computed across these units, and a removal would change the rest of it"
        ),
    )


# Parameters that compensate ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Factor:
    """One factor of a weight that is a product: its node, its channels, and those that its computation works across.

    A factor that divides cannot be scaled instead of the weight.
    """

    node: fx.Node
    channels: frozenset[Axis]
    mixed: frozenset[Axis]
    divides: bool = False


def _factors(of: _Computed, node: fx.Node, divides: bool = False) -> list[_Factor]:
    """The factors of a weight; a weight that is no product is its only factor."""
    packet = packet_of(node)
    if node.op == "call_function":
        if packet is operator.getitem:
            whole = node.args[0]
            if node.args[1] == 0 and packet_of(whole) is aten._weight_norm_interface:  # type: ignore[arg-type]
                return _length_and_direction(of, whole, divides)  # type: ignore[arg-type]
        elif packet in _MULTIPLIED and len(node.args) == 2 and not node.kwargs:
            one, other = node.args
            found = _factors(of, one, divides) if isinstance(one, fx.Node) else []
            turned = divides != (packet in (aten.div, aten.div_))
            return found + (_factors(of, other, turned) if isinstance(other, fx.Node) else [])
        elif packet in ALIKE or is_moved(node):
            return _factors(of, node.all_input_nodes[0], divides)
    channels = frozenset(_counts(node.meta["dims"]))
    return [_Factor(node, channels, frozenset(of.mixed(node)), divides)]


def _length_and_direction(of: _Computed, node: fx.Node, divides: bool) -> list[_Factor]:
    op = Operation(node)
    along = frozenset(_counts(_normalised(node)))
    norm = _Factor(op["v"], frozenset(_counts(op.dims(op["v"])[op["dim"]])), along, divides=True)
    return [*_factors(of, op["v"], divides), *_factors(of, op["g"], divides), norm]


def _scale(of: _Computed, weight: fx.Node, wanted: list[Axis], alone: _Alone) -> tuple[fx.Node | None, set[Axis]]:
    """The parameter that can keep a weight as it is where units of some channels go, and which of these."""
    factors = _factors(of, weight)
    best: tuple[fx.Node | None, set[Axis]] = (None, set())
    for factor in factors:
        scale = factor.node
        if scale.op != "get_attr" or writers(scale) or factor.divides or not wanted:
            continue
        others = [other for other in factors if other is not factor]
        if any(scale in ancestors(other.node) for other in others):
            continue
        if not _fits(scale, weight) or not alone(scale, weight):
            continue
        covered = {leaf for leaf in wanted if all(o.channels <= factor.channels for o in others if leaf in o.mixed)}
        if len(covered) > len(best[1]):
            best = scale, covered
    return best


def _limited(weight: fx.Node, wanted: set[Axis], alone: _Alone) -> tuple[fx.Node, set[Axis]] | None:
    """The parameter of a weight whose rows are only limited to a largest norm: it can hold the limited rows."""
    core = peeled(weight)
    written = [one for one in writers(core) if packet_of(one) in _LIMITS]
    if written and (packet_of(written[0]) is aten.embedding_renorm_ or written == writers(core)):
        limit, parameter = written[0], core
    elif packet_of(core) in _LIMITS:
        limit, parameter = core, peeled(core.all_input_nodes[0])
    else:
        return None
    if parameter.op != "get_attr" or peeled(limit.all_input_nodes[0]) is not parameter:
        return None
    return (parameter, wanted) if alone(parameter, weight) else None


def _fits(scale: fx.Node, weight: fx.Node) -> bool:
    """True if each dimension of a parameter is a dimension of the weight."""
    return None not in aligned_dims(scale, weight)


def aligned_dims(scale: fx.Node, weight: fx.Node) -> list[int | None]:
    """For each dimension of a factor, but those of size one, the dimension of the weight that it is, or None."""
    own = [find(axis) for axis in peeled(weight).meta["dims"]]
    shift = len(own) - len(scale.meta["dims"])
    direct = all(packet_of(user) in {*_MULTIPLIED, aten._weight_norm_interface} for user in scale.users)
    found: list[int | None] = []
    for place, axis in enumerate(map(find, scale.meta["dims"])):
        if axis.size > 1:
            same = [dim for dim, one in enumerate(own) if one is axis]
            aligned = place + shift if direct else -1
            found.append(same[0] if len(same) == 1 else aligned if aligned in same else None)
    return found


def scaled(program: Program, channels: Container[Axis]) -> list[fx.Node]:
    """The weights whose parameter ``scaled_by`` must change when units of some channels are removed."""
    return [
        node
        for node in program.graph.nodes
        if "scaled_by" in node.meta and any(leaf in channels for one in node.meta["whole"] for leaf in leaves(one))
    ]


@dataclass(frozen=True)
class _Alone:
    """Tells whether a parameter is used for one weight only, however often that weight is computed."""

    everywhere: list[_Computed]
    computation: Computations
    parameters: set[str]

    def __call__(self, scale: fx.Node, weight: fx.Node) -> bool:
        mine = self.computation(peeled(weight))
        met = [one for computed in self.everywhere for one, _ in meetings(computed.program)]
        met = [one for one in met if scale.target in one.meta["params"]]
        return scale.target in self.parameters and all(self.computation(peeled(one)) == mine for one in met)
