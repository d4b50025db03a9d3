"""Products of activations over units, such as of queries and keys: the layer that makes one side can hide added units.

The weights that make one side take the part that a reader's weights have elsewhere: zeros at new units, shares at
copies. So the product stays as it is, whatever the other side has there.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from netsurgery.analysis.computed_weights import packet_of, peeled, worked_across, writers
from netsurgery.analysis.network import Network
from netsurgery.analysis.replay_without import is_view
from netsurgery.axes import Axis, leaves, leaves_in
from netsurgery.capture.known_values import any_layout
from netsurgery.notation import Operation
from netsurgery.positions import positions, units_at

__all__ = ["Hidden", "hiding", "is_inner_product"]

aten = torch.ops.aten
#: The two sides of products of activations.
_SIDES = {aten.bmm: ("self", "mat2"), aten.baddbmm: ("batch1", "batch2"), aten.mm: ("self", "mat2")}
#: The weights and biases of layers, whose outputs are in proportion to both together.
_MAKERS = {
    aten.addmm: ("mat2", "self"), aten.mm: ("mat2",), aten.convolution: ("weight", "bias"),
    aten.native_layer_norm: ("weight", "bias"), aten.native_batch_norm: ("weight", "bias"),
    aten.native_group_norm: ("weight", "bias"), aten.mul: ("self", "other"),
}  # fmt: skip
#: Operations that pass every number on to one place or to several, besides views.
_PASSES_ON = {aten.expand, aten.clone, aten.contiguous, aten._to_copy, aten._unsafe_view}
_SCALES = {aten.mul, aten.div}
_MOST = 6  # products over the same units, of which each may have two sides to choose from

Hidden = Mapping[tuple[str, int], Tensor]  # by parameter and dimension, at which positions it makes that side: bool


@dataclass(frozen=True)
class _Side:
    """One side of products.

    Attributes:
        products: the products that read it; twice where a product has it on both sides.
        hidden: the parameters that make it, and where.
    """

    products: tuple[fx.Node, ...]
    hidden: dict[tuple[str, int], Tensor]


def is_inner_product(node: fx.Node, leaf: Axis) -> bool:
    """True if an operation multiplies two activations and sums over a channel's units."""
    if packet_of(node) not in _SIDES:
        return False
    activations = all(not one.meta.get("params") and leaf in leaves_in(one.meta["dims"]) for one in _sides(node))
    return activations and leaf in worked_across(node)


def hiding(network: Network, leaf: Axis) -> Hidden | None:
    """The parameters that can hide added units from all inner products over them.

    Returns:
        For each parameter and dimension the positions that make that side; empty where there are no such products;
        None where no layer makes one side alone.
    """
    found: dict[tuple[str, int], Tensor] = {}
    for number, program in enumerate(network.programs):
        products = [node for node in program.operations if is_inner_product(node, leaf)]
        own = _chosen(products, network, leaf)
        if own is None or (number and own.keys() != found.keys()):
            return None
        found = own
    return found


def _chosen(products: list[fx.Node], network: Network, leaf: Axis) -> dict[tuple[str, int], Tensor] | None:
    """One side of each product, such that no product has both."""
    if len(products) > _MOST:
        return None
    made = {side: _made(side, products, network, leaf) for product in products for side in _sides(product)}
    options = [[one for side in reversed(_sides(product)) if (one := made[side])] for product in products]
    for some in itertools.product(*options):
        sides = list({frozenset(one.hidden): one for one in some}.values())
        if sorted(map(id, products)) == sorted(id(product) for one in sides for product in one.products):
            return {place: at for one in sides for place, at in one.hidden.items()}
    return None


def _made(side: fx.Node, products: Collection[fx.Node], network: Network, leaf: Axis) -> _Side | None:
    """The layer that makes an operand of products over a channel, if it makes these units for no other operation."""
    if (layer := _layer(side)) is None:
        return None
    base, given = layer
    dims = base.meta["dims"][0] if isinstance(base.meta["dims"], list) else base.meta["dims"]
    dim = next((dim for dim, axis in enumerate(dims) if axis is not None and leaf in leaves(axis)), None)
    if dim is None:
        return None
    axis = dims[dim]
    reads = [(user, node, set(ids.unique().tolist())) for user, node, ids in _exits(base, dim)]
    own = next(ids for user, node, ids in reads if node is side and user in products)
    theirs = [(user, node, ids) for user, node, ids in reads if ids & own]
    if not all(user in products and ids == own for user, _, ids in theirs):
        return None
    at = torch.zeros(axis.size, dtype=torch.bool)
    at[list(own)] = True
    units = positions(axis, lambda one: torch.arange(one.size) * (one is not leaf))
    hidden = _parameters(given, leaf, network)
    alike = all(_same(network.axes[name][place], axis) for name, place in hidden)
    if not hidden or not alike or not torch.equal(at, at[units]):
        return None
    return _Side(
        tuple(user for user, node, _ in theirs for one in _sides(user) if one is node), dict.fromkeys(hidden, at)
    )


def _layer(side: fx.Node) -> tuple[fx.Node, list[tuple[fx.Node, fx.Node]]] | None:
    """The result of the layer that an operand comes from; its weights and biases, and the operations they are in."""
    node, result, given = side, None, list[tuple[fx.Node, fx.Node]]()
    while not writers(node) and (result is None or node is result or len(node.users) == 1):
        arguments = Operation(node).arguments if hasattr(node.target, "_schema") else {}
        weights = [one for one in arguments.values() if isinstance(one, fx.Node) and one.meta.get("params")]
        packet, rest = packet_of(node), [one for one in node.all_input_nodes if one not in weights]
        if packet in _MAKERS and weights:
            meant = [arguments.get(name) for name in _MAKERS[packet]]
            return result or node, [*given, *((node, one) for one in weights if one in meant)]
        if packet is aten.add and weights and len(rest) == 1 and arguments.get("alpha", 1) == 1:  # a bias
            result = result or node
            given.extend((node, one) for one in weights)
        elif not _passed_on(node):
            return None
        node = rest[0]
    return None


def _parameters(given: list[tuple[fx.Node, fx.Node]], leaf: Axis, network: Network) -> list[tuple[str, int]]:
    """The parameters by which a layer makes a channel, and in which dimension, if all are used there alone."""
    found: list[tuple[str, int]] = []
    for user, weight in given:
        core = peeled(weight)
        name = str(core.target)
        dims = [dim for dim, axis in enumerate(network.axes.get(name, ())) if leaf in leaves(axis)]
        if core.op != "get_attr" or len(dims) != 1 or _users(core) != {user} or name in dict(found):
            return []
        found.append((name, dims[0]))
    return found


def _same(one: Axis, other: Axis) -> bool:
    """True if the same units stand at the same positions."""
    pairs = itertools.zip_longest(units_at(one), units_at(other), fillvalue=(None, torch.empty(0)))
    return all(a is b and torch.equal(at, there) for (a, at), (b, there) in pairs)


def _users(core: fx.Node) -> set[fx.Node]:
    """The operations that use a parameter, in whichever dimensions."""
    found, left = set[fx.Node](), [one for one in core.graph.nodes if one.op == core.op and one.target == core.target]
    while left:
        for user in left.pop().users:
            if "params" in user.meta:
                left.append(user)
            else:
                found.add(user)
    return found


def _exits(base: fx.Node, dim: int) -> Iterator[tuple[fx.Node, fx.Node, Tensor]]:
    """The operations that do something with a result, and which positions of one of its dimensions they see.

    Yields:
        The operation, its operand, and for each number of the operand its position in the layer's output.
    """
    several = isinstance(base.meta["shape"], list)  # a norm gives its statistics, too
    shape = base.meta["shape"][0] if several else base.meta["shape"]
    ids = torch.arange(shape[dim]).reshape([-1 if i == dim else 1 for i in range(len(shape))]).expand(shape)
    begin = [one for one in base.users if one.args[1] == 0] if several else [base]
    left = [(one, ids.contiguous()) for one in begin]
    while left:
        node, seen = left.pop()
        for user in node.users:
            if _passed_on(user) and not writers(user):
                left.append((user, _moved(user, node, seen)))
            else:
                yield user, node, seen if isinstance(seen, Tensor) else torch.cat([one.flatten() for one in seen])


def _moved(user: fx.Node, node: fx.Node, seen: Tensor) -> Tensor:
    """The numbers of an operand where an operation puts them."""
    if packet_of(user) in _SCALES or packet_of(user) is aten._to_copy:
        return seen
    args, kwargs = fx.map_arg((user.args, user.kwargs), lambda one: seen if one is node else one)
    moved: Tensor = any_layout(user.target)(*args, **kwargs)  # type: ignore[arg-type]
    return moved


def _passed_on(node: fx.Node) -> bool:
    """True if a node passes the numbers of its one operand on, or a number times them."""
    if node.op != "call_function" or len(node.all_input_nodes) != 1:
        return False
    scales = packet_of(node) in _SCALES and node.args[0] is node.all_input_nodes[0]
    return scales or node.target is operator.getitem or is_view(node) or packet_of(node) in _PASSES_ON


def _sides(node: fx.Node) -> list[fx.Node]:
    given = Operation(node).arguments
    return [one for name in _SIDES[packet_of(node)] if isinstance(one := given[name], fx.Node)]
