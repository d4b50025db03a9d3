"""Removals that are tried one after the other: single units, or growing sets of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from netsurgery.passes.partial_replay import PartialReplay, Suffix
from netsurgery.passes.removed_units import NOTHING, Removal

__all__ = ["Series"]


@dataclass(frozen=True)
class Series:
    """Removals of units of one group, or of several that lose equally many.

    Attributes:
        orders: the units of each group, in the order in which they are tried.
        prefixes: whether the units before it go with each.
        before: units of other groups that are gone already.
    """

    orders: Mapping[str, Sequence[int]]
    prefixes: bool = False
    before: Removal = field(default_factory=lambda: NOTHING)

    @property
    def size(self) -> int:
        """The number of removals."""
        return min(map(len, self.orders.values()))

    def removal(self, index: int) -> Removal:
        """The units that go in a removal, without those of ``before``."""
        first = 0 if self.prefixes else index
        return {name: tuple(sorted(order[first : index + 1])) for name, order in self.orders.items()}

    def suffix(self, engine: PartialReplay) -> Suffix:
        """The part of the network that is run again."""
        return engine.suffix(tuple(self.orders), frozenset(self.before))
