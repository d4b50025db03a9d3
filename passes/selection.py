"""The groups that a pass works on: those of named modules, and only one of the factors of a dimension.

A ratio is a share of a layer's channels. Where these are a product (heads and dimensions within heads, groups of a
convolution and channels within them), the same share of both factors would take it twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import gcd, prod
from typing import get_args

from torch import fx
from torch.utils import _pytree as pytree

from netsurgery.analysis.groups import Group
from netsurgery.analysis.network import Network
from netsurgery.analysis.units import Unit
from netsurgery.axes import Axis, Fixed, leaves, leaves_in
from netsurgery.errors import InputError
from netsurgery.passes.patterns import Chosen, Pattern
from netsurgery.tables import first_of

__all__ = [
    "ANY", "belongs", "channels_beside", "channels_per_unit", "is_touched", "one_of_each_product", "others_made_by",
    "protected", "sorts_of", "stands_still",
]  # fmt: skip

ANY: tuple[Unit, ...] = ("channel", "head", "head_dim")
FINER_FIRST: tuple[Unit, ...] = ("head_dim", "channel", "head", "group", "rank")  # they meet a share more closely


def sorts_of(caller: str, unit: str | Sequence[str]) -> list[tuple[str, ...]]:
    """The sorts of units that a setting names, in its order; those that "any" stands for together.

    Raises:
        InputError: it names none, or others.
    """
    units = (unit,) if isinstance(unit, str) else tuple(unit)
    if not units or not set(units) <= {"any", *get_args(Unit)}:
        known = ", ".join(map(repr, ("any", *get_args(Unit))))
        raise InputError(f"{caller}(unit={unit!r}): one or several of {known}")
    return [ANY if one == "any" else (one,) for one in units]


# Modules ---------------------------------------------------------------------------------------------------------


def is_touched(group: Group, modules: Chosen) -> bool:
    """True if some modules produce or carry a group's units."""
    return any(modules.holds(member.parameter) for member in group.members if member.role != "consumes")


def belongs(group: Group, modules: Chosen, patterns: Sequence[Pattern]) -> bool:
    """True if some modules alone produce a group's units, or produce none of them but alone carry them, as norms do.

    Or the group is asked for by name.
    """
    made = [member for member in group.members if member.role == "produces"]
    owners = {member.module for member in made}
    carried = [m for m in group.members if m.role == "carries" and m.module not in owners]
    held = [modules.holds(member.parameter) for member in made]
    alone = all(held) if any(held) else bool(carried) and all(modules.holds(m.parameter) for m in carried)
    return alone or group.name in [pattern for pattern in patterns if isinstance(pattern, str)]


def others_made_by(group: Group, modules: Chosen) -> str:
    """The other modules that produce a group's units beside some modules."""
    makers = dict.fromkeys(m.module for m in group.members if m.role == "produces" and not modules.holds(m.parameter))
    return first_of(makers, 2)


def protected(network: Network, modules: Chosen) -> set[str]:
    """The groups whose units some modules produce, carry, consume or get as inputs."""
    found = {g.name for g in network.groups if any(modules.holds(member.parameter) for member in g.members)}
    for call in [call for program in network.programs for call in program.calls if call.path in modules]:
        given = [node for node in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(node, fx.Node)]
        channels = {leaf for node in given for leaf in leaves_in(node.meta["dims"])}
        found.update(group.name for group in network.groups if group.channel in channels)
    return found


# Factors ---------------------------------------------------------------------------------------------------------


def one_of_each_product(
    network: Network, groups: Iterable[Group], sorts: Sequence[Unit] = FINER_FIRST
) -> dict[str, Group]:
    """The first of groups that are factors of one dimension: in the order of sorts, then those that most layers use.

    Groups that are tied go together.
    """
    apart = _factors(network)
    order = {group.name: index for index, group in enumerate(network.groups)}

    def rank(group: Group) -> tuple[int, int, int, int]:
        layers = len({member.module for member in group.members})
        return sorts.index(group.unit), -layers, _outerness(network, group), order[group.name]

    taken: dict[str, Group] = {}
    for group in sorted(groups, key=rank):
        together = [network[name] for name in network.equal_to(group.name)]
        beside = {channel for one in together for channel in apart.get(one.channel, ())}
        if not any(other.channel in beside for other in taken.values() if other not in together):
            taken[group.name] = group
    return {name: taken[name] for name in sorted(taken, key=order.__getitem__)}


def _factors(network: Network) -> dict[Axis, set[Axis]]:
    """For each channel the others that stand beside it as factors of a dimension of a parameter."""
    found: dict[Axis, set[Axis]] = {}
    for axis in dict.fromkeys(axis for axes in network.axes.values() for axis in axes if axis.op):
        for leaf in dict.fromkeys(leaves(axis)):
            beside = {other for partners in _beside(axis, leaf) for one in partners for other in leaves(one)}
            found.setdefault(leaf, set()).update(beside)
    return found


def _beside(axis: Axis, leaf: Axis) -> Iterator[tuple[Axis, ...]]:
    """The factors beside a channel, for each place where it occurs in a dimension."""
    if axis is leaf:
        yield ()
    for index, term in enumerate(axis.terms):
        for partners in _beside(term, leaf):
            rest = (*axis.terms[:index], *axis.terms[index + 1 :]) if axis.op == "product" else ()
            yield (*partners, *rest)


def _outerness(network: Network, group: Group) -> int:
    """The largest number of factors that follow a group's channel in a dimension."""
    axes = [network.axes[member.parameter][member.axis] for member in group.members]
    after = [
        len(axis.terms) - i
        for axis in axes
        for i, term in enumerate(axis.terms)
        if axis.op == "product" and term is group.channel
    ]
    return max(after, default=0)


def channels_per_unit(network: Network, group: Group, cut: Iterable[Axis] = ()) -> int:
    """The number of channels of a layer that a unit has: dimensions within a head, or channels of a norm's group.

    Args:
        cut: channels that are cut too; nothing can be said of how many of them stay.
    """
    others = {*cut} - {group.channel}

    def width(axis: Axis) -> int:
        if axis.op:
            return (prod if axis.op == "product" else sum)(map(width, axis.terms))
        return 1 if isinstance(axis.locked, Fixed) or axis in others else axis.size

    made = [member for member in group.members if member.role == "produces"] or list(group.members)
    found = [partners for m in made for partners in _beside(network.axes[m.parameter][m.axis], group.channel)]
    for m in group.members:
        if m.role == "consumes":
            found += [p for p in _beside(network.axes[m.parameter][m.axis], group.channel) if p]
    return gcd(*(prod(map(width, partners)) for partners in found))


def channels_beside(network: Network, names: Iterable[str]) -> set[Axis]:
    """The channels that some groups are multiplied with in a dimension of a parameter."""
    apart = _factors(network)
    return {channel for name in names for channel in apart.get(network[name].channel, ())}


def stands_still(network: Network, locked: Iterable[Group], cut: Iterable[str]) -> list[Group]:
    """The locked groups that are channels between layers: no factors of what is cut, and no mere inputs or outputs."""
    others = channels_beside(network, cut)
    found = []
    for group in locked:
        roles = {member.role for member in group.members}
        inner = {"produces", "consumes"} <= roles and not isinstance(group.locked, Fixed) and group.size > 1
        if inner and group.channel not in others:
            found.append(group)
    return found
