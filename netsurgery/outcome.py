"""The removal or growth that a pass was asked for, and the one that it made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["LISTED", "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """The removal or growth that a pass was asked for, and the one that it made.

    Attributes:
        asked: such as ``50.0% of the channels of each layer``.
        got: likewise.
        short: groups that change less than asked, or not at all because they are locked, and why.
        few: groups that keep few units after all units were ranked together, and how many: a tenth or less, or as few
            as ``max_ratio`` allows.
        notes: what ``edit.summary()`` says of single groups or modules besides.
        does: "remove", "add", or another verb, such as "fold".
    """

    asked: str
    got: str
    short: Mapping[str, str] = field(default_factory=dict)
    few: Mapping[str, str] = field(default_factory=dict)
    does: str = "remove"
    notes: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        line = f"asked to {self.does} {self.asked}, {self.does.removesuffix('e')}ed {self.got}"
        return line + _named("short", self.short) + _named("few units stay", self.few)


LISTED = 3  # groups in one line


def _named(what: str, groups: Mapping[str, str]) -> str:
    """The first of some groups, and how many more there are."""
    if not groups:
        return ""
    first = [f"{name}: {why}" for name, why in list(groups.items())[:LISTED]]
    more = len(groups) - len(first)
    return f"; {what}: {'; '.join(first)}" + (f"; and {more} more groups" if more else "")
