"""Readable tables of networks, edits and costs, as plain text and for notebooks, and each in one line."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from html import escape
from math import prod
from typing import TYPE_CHECKING

from torch import Tensor, nn

from netsurgery.axes import Axis, find, inner, leaves

if TYPE_CHECKING:
    from netsurgery.analysis.costs import Cost
    from netsurgery.analysis.network import Group, Network
    from netsurgery.edit import Edit
    from netsurgery.module_rewrites import ModuleRewrite, Rewritten

__all__ = [
    *("columns", "cost_html", "cost_table", "edit_html", "edit_line", "entries", "first_of", "network_html"),
    *("network_line", "network_table", "prunable_share", "rewrite_lines"),
]

Rows = Sequence[Sequence[str]]
SHOWN = 200  # rows of a table in a notebook


def first_of(texts: Iterable[str], most: int = 3) -> str:
    """The first of some texts in a line, and how many more there are."""
    found = list(texts)
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")


def columns(rows: Rows, right: Sequence[int] = ()) -> str:
    """Rows as lines of text, with the columns `right` aligned to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def html(caption: str, rows: Rows, right: Sequence[int] = ()) -> str:
    """Rows as an HTML table under a caption, the first as its head; the last line says how many are not shown."""

    def line(row: Sequence[str], tag: str) -> str:
        sides = ["right" if i in right else "left" for i in range(len(row))]
        cells = zip(row, sides, strict=True)
        return "<tr>" + "".join(f'<{tag} style="text-align: {s}">{escape(cell)}</{tag}>' for cell, s in cells) + "</tr>"

    head, body = rows[0], rows[1:]
    more = f'<tr><td colspan="{len(head)}">and {len(body) - SHOWN} more</td></tr>' if body[SHOWN:] else ""
    lines = [line(head, "th"), *(line(row, "td") for row in body[:SHOWN])]
    return f"<table><caption>{escape(caption)}</caption>{''.join(lines)}{more}</table>"


def prunable_share(network: Network) -> float:
    """The share of a network's inner dimensions that a removal can take.

    Let every group that is not locked lose the same small share of its units, and count the entries of parameters that
    go. The result is relative to the count where all dimensions lose that share, except inputs, outputs and positions.
    A matrix with one locked axis counts half.

    Example:
        >>> import torch, netsurgery
        >>> from netsurgery.report import prunable_share
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> prunable_share(netsurgery.trace(model, torch.zeros(1, 4)))
        1.0
    """
    channels = {leaf for dims in network.axes.values() for axis in dims for leaf in leaves(axis)}
    most = entries(network, {leaf for leaf in channels if inner(leaf)})
    return entries(network, {group.channel for group in network.prunable}) / most if most else 0.0


def entries(network: Network, channels: Container[Axis]) -> float:
    """Entries of parameters at units of some channels: an entry counts once for each axis that has such units."""
    return sum(
        prod(axis.size for axis in dims) * sum(_part(axis, channels) for axis in dims)
        for name, dims in network.axes.items()
        if isinstance(network.tensors[name], nn.Parameter)
    )


def _part(axis: Axis, channels: Container[Axis]) -> float:
    """The share of an axis's positions that hold units of some channels; one factor of a product is enough."""
    axis = find(axis)
    if not axis.op:
        return float(axis in channels)
    parts = [_part(term, channels) for term in axis.terms]
    if axis.op == "product":
        return 1 - prod(1 - part for part in parts)
    return sum(part * term.size for part, term in zip(parts, axis.terms, strict=True)) / axis.size


def _together(groups: Iterable[Group]) -> list[list[Group]]:
    """Groups row by row: the locked pieces of one layer share a row."""
    rows: dict[tuple[str, str], list[Group]] = {}
    for group in groups:
        base, _, piece = group.name.rpartition(":")
        layer = base if piece.isdigit() else group.name
        rows.setdefault((layer, "locked" if group.locked else group.name), []).append(group)
    return list(rows.values())


def network_line(network: Network) -> str:
    """The network in one line."""
    cost, scored = network.cost(), ", scored" if network.scores else ""
    return (
        f"{network.model_name}: {cost.params:,} parameters, {cost.macs:,} MACs, {len(network.groups)} groups, "
        f"{len(network.groups) - len(network.prunable)} locked{scored}"
    )


def network_rows(network: Network) -> list[tuple[str, ...]]:
    """One row for each group: name, size, where it occurs, and why it is locked if it is."""
    rows: list[tuple[str, ...]] = [("group", "units", "produced by", "consumed by", "locked")]
    for groups in _together(network.groups):
        members = [member for group in groups for member in group.members]
        by_role = {role: [m.module for m in members if m.role == role] for role in ("produces", "carries", "consumes")}
        made = _list(by_role["produces"] or by_role["carries"])
        reasons = list(dict.fromkeys(group.locked for group in groups if group.locked))
        locked = (reasons[0] if reasons else "") + (f" (and {len(reasons) - 1} more reasons)" if reasons[1:] else "")
        name = groups[0].name + (f" and {len(groups) - 1} more" if groups[1:] else "")
        rows.append((name, str(sum(group.size for group in groups)), made, _list(by_role["consumes"]), locked))
    return rows


def network_table(network: Network) -> str:
    """A line with the network's cost and how much of it can be removed; then a row for each group."""
    cost = network.cost()
    inputs = ", ".join(
        "x".join(map(str, node.meta["shape"])) for node in network.programs[0].graph.nodes if node.op == "placeholder"
    )
    head = (
        f"{network.model_name} on {inputs}: {cost.params:,} parameters, {cost.macs:,} MACs, "
        f"{len(network.groups)} groups, {len(network.groups) - len(network.prunable)} locked, "
        f"{100 * prunable_share(network):.1f}% of its inner dimensions prunable"
    )
    return head + "\n" + columns(network_rows(network), right=(1,))


def network_html(network: Network) -> str:
    """The table for a notebook."""
    return html(network_line(network), network_rows(network), right=(1,))


def edit_line(edit: Edit) -> str:
    """The edit in one line."""
    before, after, network = edit.before, edit.after, edit.network
    if not edit.keep and not edit.values and not edit.dropped and not edit.modules and edit.first is None:
        return f"{network.model_name}: nothing goes"
    if edit.modules:
        return f"{network.model_name}: {len(edit.modules)} modules rewritten, {_costs(before, after)}"
    changed = "changed" if edit.grown else "cut"
    dropped = f", {len(edit.dropped)} of {len(network.blocks)} blocks removed" if edit.dropped else ""
    valued = f", {len(edit.values)} tensors with new values" if edit.values else ""
    return (
        f"{network.model_name}: {len(edit.keep)} of {len(network.groups)} groups {changed}{valued}{dropped}, "
        f"{_costs(before, after)}"
    )


def _costs(before: Cost, after: Cost) -> str:
    return (
        f"parameters {before.params:,} -> {after.params:,} ({share(after.params, before.params)}), "
        f"MACs {before.macs:,} -> {after.macs:,} ({share(after.macs, before.macs)})"
    )


def rewrite_lines(modules: Mapping[str, ModuleRewrite], before: Network, after: Rewritten) -> list[str]:
    """What becomes of modules, and of tensors: those that go, that have another name, and that are new."""

    def shape(tensor: Tensor) -> str:
        return "x".join(map(str, tensor.shape)) or "scalar"

    lines = [f"{path} becomes {rewrite!r}" for path, rewrite in modules.items()]
    tensors, stay = after.network.tensors, set(after.names.values())
    for name, tensor in before.tensors.items():
        new = after.names.get(name)
        if new is not None:
            lines.extend([f"{name} is {new}"] if new != name else [])
        elif name not in tensors or name in stay:
            lines.append(f"{name} {shape(tensor)} goes")
        else:
            sizes = shape(tensor), shape(tensors[name])
            lines.append(f"{name} {' -> '.join(dict.fromkeys(sizes))} has new values")
            stay.add(name)
    fresh = [(name, tensor) for name, tensor in tensors.items() if name not in stay]
    return lines + [f"{name} {shape(tensor)} is new" for name, tensor in fresh]


def edit_html(edit: Edit) -> str:
    """A row for each group that is cut, for a notebook."""
    rows = [("group", "units", "stay", "kept")]
    for name, count in edit.counts.items():
        size = edit.network[name].size
        rows.append((name, f"{size:,}", f"{count:,}", share(count, size)))
    return html(edit_line(edit), rows, right=(1, 2, 3))


def share(part: int, whole: int) -> str:
    """A part in percent."""
    return f"{100 * part / whole:.1f}%" if whole else "-"


def _list(modules: Sequence[str], most: int = 3) -> str:
    names = list(dict.fromkeys(modules))
    return ", ".join(names[:most]) + (f", +{len(names) - most}" if len(names) > most else "")


def cost_rows(cost: Cost) -> Rows:
    """One row for each module, and the sum."""
    rows = [
        ("module", "parameters", "MACs"),
        *((p or "(top)", f"{n:,}", f"{m:,}") for p, (n, m) in cost.modules.items()),
    ]
    return [*rows, ("total", f"{cost.params:,}", f"{cost.macs:,}")]


def cost_table(cost: Cost) -> str:
    """The cost of each module."""
    return columns(cost_rows(cost), right=(1, 2))


def cost_html(cost: Cost) -> str:
    """The table for a notebook."""
    return html(f"{cost.params:,} parameters, {cost.macs:,} MACs", cost_rows(cost), right=(1, 2))
