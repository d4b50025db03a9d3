"""Where units can be added so that no output changes.

A layer that reads a unit takes nothing from a new one, and shares from copies. Other operations that work across units
have no weights to do so. Means and variances stay as they are if all units that they are taken over have equally many
copies; sums change.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import fx

from netsurgery.analysis.computed_weights import is_moved, packet_of, peeled, worked_across
from netsurgery.analysis.domains import is_limited, undefined
from netsurgery.analysis.groups import Group, places_of
from netsurgery.analysis.inner_products import hiding, is_inner_product
from netsurgery.analysis.network import Network
from netsurgery.analysis.replay_without import is_view
from netsurgery.analysis.weights import is_computed
from netsurgery.axes import Axis, axes_in, leaves, leaves_in
from netsurgery.notation import Operation
from netsurgery.positions import Positions
from netsurgery.units import Planned

__all__ = ["obstacles", "start"]

aten = torch.ops.aten
#: Results of these are the same where each unit has equally many copies.
_AVERAGES = {
    aten.mean, aten.var, aten.var_mean, aten.std, aten.std_mean, aten.native_layer_norm, aten.native_group_norm,
    aten.native_batch_norm, aten.amax, aten.amin, aten.max, aten.min, aten.all, aten.any,
}  # fmt: skip
#: Results of these at a unit depend on no other, though dimensions differ: of equal halves, or of no values.
_APART = {aten.glu, aten.new_zeros, aten.new_ones, aten.new_full}
_DEVIATIONS = {aten.var, aten.var_mean, aten.std, aten.std_mean}
#: The arguments that products multiply, without what they add.
_FACTORS = {
    aten.mm: ("self", "mat2"), aten.addmm: ("mat1", "mat2"), aten.bmm: ("self", "mat2"),
    aten.baddbmm: ("batch1", "batch2"), aten.mv: ("self", "vec"), aten.addmv: ("mat", "vec"),
    aten.dot: ("self", "tensor"), aten.vdot: ("self", "other"), aten.convolution: ("input", "weight"),
}  # fmt: skip
_SCALES = {aten.mul, aten.mul_, aten.div, aten.div_}
_SHIFTS = {aten.add, aten.add_, aten.sub, aten.sub_, aten.addmm, aten.addmv, aten.baddbmm}


def obstacles(network: Network, keep: Mapping[str, tuple[Planned, ...]]) -> dict[str, str]:
    """The groups that cannot get these units without a change of outputs, and why.

    Args:
        keep: by name the units that groups will have, as ``listed`` gives them; groups that only lose units are no
            obstacle.
    """
    names = {network[n].channel: n for n, own in keep.items() if not all(isinstance(unit, int) for unit in own)}
    if not names:
        return {}
    at = Positions({network[name].channel: own for name, own in keep.items()})
    readers: dict[str, dict[Axis, None]] = {}  # by parameter: the channels that it reads
    for parameter, _, leaf in places_of(map(network.__getitem__, names.values()), "consumes"):
        readers.setdefault(parameter, {})[leaf] = None
    found: dict[str, str] = {}
    for program in network.programs:
        for node in sorted(program.graph.nodes, key=lambda node: node.op == "get_attr"):
            if node.op == "get_attr":
                reasons = _used_otherwise(node, readers.get(str(node.target), {}))
            elif node.op == "call_function" and not is_view(node):
                reasons = _across(node, network, names, at)
            else:
                continue
            for leaf, why in reasons:
                found.setdefault(names[leaf], why)
    return found


Reasons = Iterator[tuple[Axis, str]]  # a channel, and why it cannot have these units


def _across(node: fx.Node, network: Network, names: Mapping[Axis, str], at: Positions) -> Reasons:
    """The channels that would change the result of an operation, each with the reason."""
    packet = packet_of(node)
    across = set(worked_across(node)) if packet not in _APART else set()
    if packet is aten.native_batch_norm:  # in training, whatever the mode is now
        dims = node.all_input_nodes[0].meta["dims"]
        across.update(leaves_in((dims[0], *dims[2:])))
    if packet is aten.native_group_norm:  # statistics are of each group of channels
        across -= set(leaves(node.meta["names"]["g"]))
    for leaf in across & names.keys():
        if why := _obstacle(node, leaf, at, network[names[leaf]], network):
            yield leaf, Operation(node).reason(why)
    for leaf in at.planted.keys() & undefined(node, network.tensors):
        why = "it gives no number for some values, and those of a new unit are not known; copies have known ones"
        yield leaf, Operation(node).reason(why)


def _obstacle(node: fx.Node, leaf: Axis, at: Positions, group: Group, network: Network) -> str | None:
    """The reason why an operation that works across units changes with more of them; None if it does not."""
    packet, given = packet_of(node), Operation(node).arguments
    if packet in _AVERAGES:
        over = [axis for one in node.all_input_nodes for axis in axes_in(one.meta["dims"]) if leaf in leaves(axis)]
        if not all(_evenly(axis, at) for axis in over):
            return "it takes statistics over these units: they grow by a whole factor, as by WidenChannels(2), or not"
        if packet in _DEVIATIONS and given.get("unbiased", True) and given.get("correction", 1) != 0:
            return "it takes a variance over these units with a correction for their number (unbiased)"
        return None
    weights = [given[name] for name in _FACTORS.get(packet, ()) if given[name].meta.get("params")]
    if is_inner_product(node, leaf):
        if hiding(network, leaf) is None:
            return "it multiplies units by each other, and no layer makes one side for it alone"
        return None
    if len(weights) != 1:
        return "it works across these units without weights, and would count the added ones"
    if is_computed(weights[0]):
        return "it reads these units by a weight that is computed from others"
    name = str(peeled(weights[0]).target)
    if len([m for m in group.members if (m.parameter, m.role) == (name, "consumes")]) != 1:
        return "the tensor that makes these units reads them, too"
    if leaf in at.copied and not (network.tensors[name].is_floating_point() or network.tensors[name].is_complex()):
        return "it reads these units by whole numbers, of which copies cannot take shares"
    return None


def _used_otherwise(node: fx.Node, read: Iterable[Axis]) -> Reasons:
    """The channels that a tensor reads, where an operation that shares would change uses the tensor, too."""
    left = list(node.users) if read else []
    while left:
        user = left.pop()
        if is_moved(user):
            left.extend(user.users)
        elif user.op == "call_function":
            for leaf in read:
                if packet_of(user) not in _FACTORS or leaf not in worked_across(user):
                    yield leaf, Operation(user).reason("a tensor that reads these units is used otherwise, too")


def _evenly(axis: Axis, at: Positions) -> bool:
    """True if each position that is left along an axis has equally many copies, and none is new."""
    found = at(axis)
    counts = [] if found is None else found.unique(return_counts=True)[1].tolist()
    return len({*counts}) <= 1 and at.new(axis) is None


def start(network: Network, name: str) -> float | None:
    """The first value of a tensor at new units, with which it changes nothing; None for the mean of its old values.

    A factor and a variance begin at 1, and a tensor that is added at 0. Elsewhere the mean does as well as the old
    values; it is positive where they all are.
    """
    found: set[float | None] = set()
    for program in network.programs:
        left = [node for node in program.graph.nodes if node.op == "get_attr" and node.target == name]
        while left:
            node = left.pop()
            inner = [user for user in node.users if "params" in user.meta and not is_limited(user)]
            left.extend(inner)
            found.update(_neutral(user, node) for user in node.users if user not in inner)
    return found.pop() if len(found) == 1 else None


def _neutral(user: fx.Node, node: fx.Node) -> float | None:
    """The value of a tensor with which an operation changes nothing, if there is one."""
    packet, arguments = packet_of(user), Operation(user).arguments if hasattr(user.target, "_schema") else {}
    given = next((key for key, value in arguments.items() if value is node), None)
    if packet in _SHIFTS or given in ("bias", "running_mean"):
        return 0.0
    scales = packet in _SCALES or (given == "weight" and packet in _AVERAGES)
    return 1.0 if scales or given == "running_var" else None
