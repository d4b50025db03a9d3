"""Readable tables of networks and costs, plain text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import TYPE_CHECKING

from torch import nn

from netsurgery.axes import leaves

if TYPE_CHECKING:
    from netsurgery.costs import Cost
    from netsurgery.network import Group, Network

__all__ = ["columns", "cost_table", "network_table", "prunable_share"]


def columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Rows as lines of text, with the columns `right` aligned to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def prunable_share(network: Network) -> float:
    """Share of the parameters that lose entries when units are removed from groups that are not frozen."""
    free = {group.channel for group in network.prunable}
    counted = [(axes, network.tensors[name]) for name, axes in network.axes.items()]
    sizes = [
        (prod(t.shape), any(leaf in free for axis in axes for leaf in leaves(axis)))
        for axes, t in counted
        if isinstance(t, nn.Parameter)
    ]
    return sum(n for n, is_free in sizes if is_free) / max(1, sum(n for n, _ in sizes))


def _together(groups: Iterable[Group]) -> list[list[Group]]:
    """Groups row by row: the locked pieces of one layer share a row."""
    rows: dict[tuple[str, str], list[Group]] = {}
    for group in groups:
        base, _, piece = group.name.rpartition(":")
        layer = base if piece.isdigit() else group.name
        rows.setdefault((layer, "locked" if group.frozen else group.name), []).append(group)
    return list(rows.values())


def network_table(network: Network) -> str:
    """One row for each group: name, size, where it occurs, and why it is locked if it is."""
    rows = [("group", "units", "produced by", "consumed by", "locked")]
    for groups in _together(network.groups):
        members = [member for group in groups for member in group.members]
        by_role = {role: [m.module for m in members if m.role == role] for role in ("produces", "carries", "consumes")}
        made = _list(by_role["produces"] or by_role["carries"])
        reasons = list(dict.fromkeys(group.frozen for group in groups if group.frozen))
        locked = (reasons[0] if reasons else "") + (f" (and {len(reasons) - 1} more reasons)" if reasons[1:] else "")
        name = groups[0].name + (f" and {len(groups) - 1} more" if groups[1:] else "")
        rows.append((name, str(sum(group.size for group in groups)), made, _list(by_role["consumes"]), locked))
    cost = network.cost()
    inputs = ", ".join(
        "x".join(map(str, node.meta["shape"])) for node in network.programs[0].graph.nodes if node.op == "placeholder"
    )
    head = (
        f"{network.model_name} on {inputs}: {cost.params:,} parameters, {cost.macs:,} MACs, "
        f"{len(network.groups)} groups, {len(network.groups) - len(network.prunable)} locked, "
        f"{100 * prunable_share(network):.1f}% of the parameters prunable"
    )
    return head + "\n" + columns(rows, right=(1,))


def _list(modules: Sequence[str], most: int = 3) -> str:
    names = list(dict.fromkeys(modules))
    return ", ".join(names[:most]) + (f", +{len(names) - most}" if len(names) > most else "")


def cost_table(cost: Cost) -> str:
    """One row for each module, and the sum."""
    rows = [
        ("module", "parameters", "MACs"),
        *((p or "(top)", f"{n:,}", f"{m:,}") for p, (n, m) in cost.modules.items()),
    ]
    return columns([*rows, ("total", f"{cost.params:,}", f"{cost.macs:,}")], right=(1, 2))
