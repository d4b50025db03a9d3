"""The groups of a network and those of one made from it: the same groups occur in the same places."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from netsurgery.analysis.groups import Group
from netsurgery.analysis.network import Network

__all__ = ["counterparts", "met"]


def counterparts(
    original: Network,
    later: Network,
    among: Iterable[str] | None = None,
    tensors: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The names in an original network of the groups of a later one: they occur in the same places.

    Args:
        among: names of the original's groups that may be meant; by default of all.
        tensors: the later names of the original's tensors that stay; by default all do, under their names.
    """
    there = [_renamed(original[name], tensors) for name in (original.by_name if among is None else among)]
    mine, theirs = ([g for g in groups if g.unit in ("head", "head_dim")] for groups in (there, later.groups))
    # A single head that is left is no group: the dimensions within it stand alone in its places.
    apart = _matched(mine, theirs, lambda group: (_occurrences(group), group.unit))
    return {**apart, **_matched(there, later.groups, _occurrences)}


def met(original: Network, later: Network, tensors: Mapping[str, str]) -> dict[str, str]:
    """The names in an original network of the groups of a later one that share a place with them, and are as large."""
    places = {place: g for g in original.groups for place in _occurrences(_renamed(g, tensors))}
    found: dict[str, str] = {}
    for group in later.groups:
        met = next((places[place] for place in _occurrences(group) if place in places), None)
        if met is not None and met.size == group.size and met.name not in found.values():
            found[group.name] = met.name
    return found


def _renamed(group: Group, tensors: Mapping[str, str] | None) -> Group:
    """A group under the later names of its tensors, where it occurs in those that stay."""
    if tensors is None:
        return group
    members = [replace(m, parameter=tensors[m.parameter]) for m in group.members if m.parameter in tensors]
    return replace(group, members=tuple(members))


def _matched(there: Sequence[Group], here: Sequence[Group], key: Callable[[Group], Any]) -> dict[str, str]:
    """Pairs of groups with the same key, by name here: in order, where both sides have equally many."""
    found: list[dict[Any, list[str]]] = []
    for groups in (there, here):
        names: dict[Any, list[str]] = {}
        for group in groups:
            if group.size > 1:
                names.setdefault(key(group), []).append(group.name)
        found.append(names)
    pairs = [(names, found[0].get(key, [])) for key, names in found[1].items()]
    return {new: old for one, other in pairs if len(one) == len(other) for new, old in zip(one, other, strict=True)}


def _occurrences(group: Group) -> tuple[tuple[str, int], ...]:
    return tuple((member.parameter, member.axis) for member in group.members)
