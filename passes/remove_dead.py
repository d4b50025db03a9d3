"""Removal of units that are dead already: each of their weights is zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from netsurgery.analysis.network import Network
from netsurgery.edit import Edit
from netsurgery.pipeline import Pass

__all__ = ["RemoveDead"]


@dataclass(frozen=True)
class RemoveDead(Pass):
    """Remove dead units of the groups that may lose them; groups of equal sizes lose equally many.

    Args:
        dead: for some groups which units are dead, ``(units,)``.
    """

    dead: Mapping[str, tuple[bool, ...]] = field(repr=False)

    gives: ClassVar[frozenset[str]] = frozenset({"edit"})

    def run(self, network: Network) -> Edit:
        """Keep the units that are not dead."""
        gone = {g.name: [i for i, dead in enumerate(self.dead.get(g.name, ())) if dead] for g in network.prunable}
        for tied in network.equal_sizes:
            count = min(len(gone.get(name, ())) for name in tied)
            gone.update({name: gone[name][:count] for name in tied if name in gone})
        keep = {n: tuple(sorted(set(range(network[n].size)) - set(units))) for n, units in gone.items()}
        return Edit(network, keep)
