"""Where units can be added so that no output changes.

A layer that reads a unit takes nothing from a new one, and shares from copies. Other operations that work across units
have no weights that could: means and variances stay as they are if all that they are taken over has equally many
copies, sums do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from netsurgery.analysis.computed_weights import is_moved, packet_of, peeled, worked_across
from netsurgery.analysis.network import Network
from netsurgery.analysis.weights import is_computed
from netsurgery.axes import Axis, leaves
from netsurgery.notation import Operation
from netsurgery.positions import Positions
from netsurgery.units import Planned, listed

__all__ = ["obstacles", "starts_at_one"]

aten = torch.ops.aten
#: What these compute of units is the same where each unit has equally many copies.
_AVERAGES = {
    aten.mean, aten.var, aten.var_mean, aten.std, aten.std_mean, aten.native_layer_norm, aten.native_group_norm,
    aten.native_batch_norm, aten.amax, aten.amin, aten.max, aten.min, aten.all, aten.any,
}  # fmt: skip
_VARIANCES = {aten.var, aten.var_mean, aten.std, aten.std_mean}
_SCALES = {aten.mul, aten.mul_, aten.div, aten.div_}


def obstacles(network: Network, keep: Mapping[str, Sequence[Planned]]) -> dict[str, str]:
    """The groups that cannot get these units without a change of outputs, and why.

    Args:
        keep: by name what the units of groups will be; those that only lose units are no obstacle.
    """
    names = {network[n].channel: n for n, own in keep.items() if not all(isinstance(unit, int) for unit in own)}
    if not names:
        return {}
    roles = {(m.parameter, network[name].channel): m.role for name in names.values() for m in network[name].members}
    groups = [(network[name], own) for name, own in keep.items()]
    at = Positions({group.channel: listed(group.name, own, group.size, False) for group, own in groups})
    found: dict[str, str] = {}
    for program in network.programs:
        for node in program.graph.nodes:
            if node.op != "call_function" or _is_view(node):
                continue
            own = set(leaves(node.meta["names"]["g"])) if packet_of(node) is aten.native_group_norm else set()
            for leaf in worked_across(node).keys() & names.keys():
                if leaf in own or names[leaf] in found:  # statistics are of each group of channels
                    continue
                if why := _obstacle(node, leaf, at, roles):
                    found[names[leaf]] = Operation(node).reason(why)
    return found


def _obstacle(node: fx.Node, leaf: Axis, at: Positions, roles: Mapping[tuple[str, Axis], str]) -> str | None:
    """Why an operation that works across units does not give the same of more of them, if so."""
    holders = [one for one in node.all_input_nodes if any(leaf in leaves(axis) for axis in _axes(one))]
    weights = [one for one in holders if "params" in one.meta]
    if packet_of(node) in _AVERAGES and not _corrected(node):
        over = [axis for one in holders for axis in _axes(one) if leaf in leaves(axis)]
        if all(_evenly(axis, at) for axis in over):
            return None
        return "it takes statistics over these units, which stay if all that they are taken over has as many copies"
    if len(holders) != 2 or len(weights) != 1:
        return "it works across these units without weights, and would count the added ones"
    if is_computed(weights[0]):
        return "it reads these units by a weight that is computed from others"
    if roles.get((str(peeled(weights[0]).target), leaf)) != "consumes":
        return "the tensor that makes these units reads them, too"
    return None


def _corrected(node: fx.Node) -> bool:
    """Whether an operation is a variance over the number of units less one, as torch's are by default."""
    arguments = Operation(node).arguments
    given = arguments.get("correction", arguments.get("unbiased"))
    return packet_of(node) in _VARIANCES and (given is None or bool(given))


def _evenly(axis: Axis, at: Positions) -> bool:
    """Whether each position that is left along an axis has equally many copies, and none is new."""
    found = at(axis)
    counts = [] if found is None else found.unique(return_counts=True)[1].tolist()
    return len({*counts}) <= 1 and at.new(axis) is None


def _axes(node: fx.Node) -> list[Axis]:
    dims = node.meta["dims"]
    return [axis for axis in (dims if isinstance(dims, tuple) else ()) if axis is not None]


def _is_view(node: fx.Node) -> bool:
    """Whether a result is a part of its input, or is in other dimensions."""
    schema = getattr(node.target, "_schema", None)
    aliases = [a.alias_info for a in schema.arguments if a.alias_info] if schema else []
    return schema is None or is_moved(node) or (bool(aliases) and not any(a.is_write for a in aliases))


def starts_at_one(network: Network, name: str) -> bool:
    """Whether a tensor scales what it meets, as the weight and the variance of a norm do, so that 1 changes nothing."""
    for program in network.programs:
        left = [node for node in program.graph.nodes if node.op == "get_attr" and node.target == name]
        while left:
            node = left.pop()
            for user in node.users:
                if "params" in user.meta:
                    left.append(user)
                    continue
                arguments = Operation(user).arguments if hasattr(user.target, "_schema") else {}
                given = next((key for key, value in arguments.items() if value is node), None)
                return given in ("weight", "running_var") or packet_of(user) in _SCALES
    return False
