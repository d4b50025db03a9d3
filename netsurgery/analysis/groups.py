"""Groups of units that live or die together, and the table of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from netsurgery.analysis.units import Unit
from netsurgery.axes import Axis
from netsurgery.tables import Rows

__all__ = ["Group", "Member", "Role", "group_rows", "places_of"]

Role = Literal["produces", "consumes", "carries"]


@dataclass(frozen=True)
class Member:
    """One occurrence of a group: axis ``axis`` of tensor ``parameter`` (its state_dict name)."""

    parameter: str
    axis: int
    role: Role

    @property
    def module(self) -> str:
        """Path of the module that owns the parameter."""
        return self.parameter.rpartition(".")[0]


@dataclass(frozen=True)
class Group:
    """Units that live or die together.

    Attributes:
        name: the module that first produces the units, in the order of the state dict.
        size: number of units.
        members: where they occur, in the order of the state dict.
        locked: why none may be removed, or None.
        channel: the group's place in the expressions of dimensions.
        unit: the sort of its units: attention heads, dimensions within heads, groups of a convolution or normalisation,
            ranks of a low-rank product, or channels of any other sort.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    locked: str | None
    channel: Axis = field(repr=False, compare=False)
    unit: Unit = "channel"

    def __repr__(self) -> str:
        locked = "" if self.locked is None else f", locked={self.locked!r}"
        return f"Group({self.name!r}, size={self.size}, unit={self.unit!r}, {len(self.members)} members{locked})"


def places_of(groups: Iterable[Group], role: Role) -> Iterator[tuple[str, int, Axis]]:
    """The places where tensors have the units of groups in one role: parameter, dimension and channel."""
    return ((m.parameter, m.axis, group.channel) for group in groups for m in group.members if m.role == role)


def group_rows(groups: Iterable[Group]) -> Rows:
    """One row for each group: name, size, where it occurs, and why it is locked if it is."""
    rows: list[tuple[str, ...]] = [("group", "units", "produced by", "consumed by", "locked")]
    for alike in _together(groups):
        members = [member for group in alike for member in group.members]
        by_role = {role: [m.module for m in members if m.role == role] for role in ("produces", "carries", "consumes")}
        made = _list(by_role["produces"] or by_role["carries"])
        reasons = list(dict.fromkeys(group.locked for group in alike if group.locked))
        locked = (reasons[0] if reasons else "") + (f" (and {len(reasons) - 1} more reasons)" if reasons[1:] else "")
        name = alike[0].name + (f" and {len(alike) - 1} more" if alike[1:] else "")
        rows.append((name, str(sum(group.size for group in alike)), made, _list(by_role["consumes"]), locked))
    return rows


def _together(groups: Iterable[Group]) -> list[list[Group]]:
    """Groups row by row: the locked pieces of one layer share a row."""
    rows: dict[tuple[str, str], list[Group]] = {}
    for group in groups:
        base, _, piece = group.name.rpartition(":")
        layer = base if piece.isdigit() else group.name
        rows.setdefault((layer, "locked" if group.locked else group.name), []).append(group)
    return list(rows.values())


def _list(modules: Sequence[str], most: int = 3) -> str:
    names = list(dict.fromkeys(modules))
    return ", ".join(names[:most]) + (f", +{len(names) - most}" if len(names) > most else "")
