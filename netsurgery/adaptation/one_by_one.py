"""Cut each group alone. One that cannot be gets the size of a group that the code confuses it with, or a lock.

The code may run with all groups at half their sizes and not with one group alone: ``y.view_as(x)`` is right while both
shrink alike. So all groups are tried at once, with different shares of their units left. Where the code does not run
so, or sizes are too small, sets of groups are tried that keep those apart which the code of one module handles.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import networkx as nx

from netsurgery.adaptation.fit_code import fit_code, runs_at
from netsurgery.adaptation.model_code import ModelCode
from netsurgery.analysis.groups import Group
from netsurgery.analysis.network import Network

__all__ = ["settle_alone"]


def settle_alone(code: ModelCode, network: Network) -> Network:
    """The same network with equal sizes, or locks, for the groups that cannot be cut alone."""
    near = _near(code, network)
    counts, unsure = _differing(network, near)
    doubtful = unsure if runs_at(code, network, counts) else set(near)
    for names in _apart(near):
        names = [name for name in names if name in doubtful]
        if not names or runs_at(code, network, _counts(network, names)):
            continue
        while found := fit_code(code, network, _counts(network, names))[1]:  # each round settles at least one
            network = _settled(code, network, near, found)
    return network


def _near(code: ModelCode, network: Network) -> nx.Graph:
    """The open groups, as a graph: an edge joins two that the code of one module, without its parts, handles."""
    graph = nx.Graph()
    graph.add_nodes_from(group.name for group in network.prunable)
    handled: dict[str, dict[str, None]] = {}
    for program in network.programs:
        for node in program.operations:
            found = [network.by_channel.get(channel) for channel in code.channels_of(node)]
            here = handled.setdefault(node.meta["module"], {})
            here.update((group.name, None) for group in found if group is not None and group.locked is None)
    for here in handled.values():
        graph.add_edges_from((a, b) for a in here for b in here if a != b)
    return graph


def _differing(network: Network, near: nx.Graph) -> tuple[dict[str, int], set[str]]:
    """Numbers of units with which near groups keep different shares, and the groups that are too small for that."""
    counts: dict[str, int] = {}
    unsure: set[str] = set()
    for names in _classes(network, near):
        size = network[names[0]].size
        others = {other for name in names for other in near[name]} - set(names)
        shares = {counts[other] / network[other].size for other in others if other in counts}
        count, gap = _unlike(size, shares)
        counts.update(dict.fromkeys(names, count))
        if not gap:
            unsure.update(names)
    return counts, unsure


_GAP = 0.15  # between two shares; nearer ones may be alike by rounding


def _unlike(size: int, shares: set[float]) -> tuple[int, float]:
    """A number of units, about two thirds, whose share differs from these; and the difference, up to a limit."""
    found = []
    for n in [n for n in range(1, size) if 0.25 <= n / size <= 0.9] or [1]:
        gap = min([_GAP, *(abs(n / size - share) for share in shares)])
        found.append((-gap, abs(n / size - 2 / 3), n))
    gap, _, n = min(found)
    return n, -gap


def _classes(network: Network, near: nx.Graph) -> list[tuple[str, ...]]:
    """The open groups, in tuples of those with equal sizes."""
    return list(dict.fromkeys(network.equal_to(name) for name in near))


def _apart(near: nx.Graph) -> list[list[str]]:
    """Sets of groups: for any two near groups, each is in a set without the other."""
    colours: dict[str, int] = nx.greedy_color(near, "largest_first")
    count = max(colours.values(), default=-1) + 1
    bits = range((count - 1).bit_length())
    if count <= 2 * len(bits):
        sets = [[name for name in near if colours[name] == colour] for colour in range(count)]
    else:
        sets = [[name for name in near if colours[name] >> bit & 1 == value] for bit in bits for value in (0, 1)]
    return [names for names in sets if names]


def _counts(network: Network, names: Iterable[str]) -> dict[str, int]:
    """About two thirds of the units of some groups, and of those with equal sizes; locked ones are left out."""
    every = dict.fromkeys(other for name in names for other in network.equal_to(name))
    return {n: max(1, 2 * network[n].size // 3) for n in every if network[n].locked is None}


def _settled(code: ModelCode, network: Network, near: nx.Graph, found: Mapping[str, str]) -> Network:
    """Give groups the size of a partner with which the code runs, or lock them; like places share the search."""
    partners: dict[str, str | None] = {}
    equal_sizes: list[tuple[str, ...]] = []
    locked: dict[str, str] = {}
    for name, why in found.items():
        place = _place(network[name])
        others = [other for other in near[name] if _may_be_equal(network, name, other)]
        if place not in partners:
            partner = next((other for other in others if _run_together(code, network, (name, other))), None)
            partners[place] = None if partner is None else _place(network[partner])
        partner = next((other for other in others if _place(network[other]) == partners[place]), None)
        if partner is None:
            locked[name] = why
        else:
            equal_sizes.append((name, partner))
    return network.with_equal_sizes(equal_sizes).with_locked(locked)


def _place(group: Group) -> str:
    """The places of a group as text, with ``#`` for the numbers of layers."""
    return re.sub(r"\d+", "#", " ".join(f"{m.parameter}[{m.axis}]" for m in group.members))


def _may_be_equal(network: Network, name: str, other: str) -> bool:
    tied = any(name in names and other in names for names in network.equal_sizes)
    return network[other].locked is None and network[other].size == network[name].size and not tied


def _run_together(code: ModelCode, network: Network, names: Iterable[str]) -> bool:
    """True if the code follows when some groups are cut together."""
    return not fit_code(code, network, _counts(network, names))[1]
