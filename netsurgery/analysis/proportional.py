"""Parameters that a computed weight is proportional to, entry by entry: a masked one, or the length of a weight norm.

Let p be such a parameter and W its weight. Summed over a unit, p times its gradient equals W times its gradient: the
factor between p and W multiplies the one and divides the other.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from netsurgery.analysis.computed_weights import ALIKE, ancestors, is_moved, packet_of, writers

__all__ = ["proportional_to"]

aten = torch.ops.aten
_PARTS = {aten.slice, aten.select, aten.split, aten.split_with_sizes, aten.unbind}


def proportional_to(node: fx.Node) -> list[str]:
    """The names of the parameters that a weight is proportional to: each multiplies all the rest of it."""
    packet = packet_of(node)
    if writers(node):
        return []
    if node.op == "get_attr":
        return [str(node.target)]
    if packet is operator.getitem:
        return _part(node.all_input_nodes[0], node.args[1])
    if packet in (aten.mul, aten.div) and not node.kwargs:
        one, other = node.args
        return [*_factors(one, other), *(_factors(other, one) if packet is aten.mul else [])]
    if packet in ALIKE or packet in _PARTS or is_moved(node):
        return proportional_to(node.all_input_nodes[0])
    return []


def _part(whole: fx.Node, index: object) -> list[str]:
    if packet_of(whole) is aten._weight_norm_interface and index == 0:
        direction, length = whole.args[:2]
        return _factors(length, direction)
    return proportional_to(whole) if packet_of(whole) in _PARTS else []


def _factors(factor: object, other: object) -> list[str]:
    """The parameters that one factor is proportional to, without those that the other factor depends on."""
    sources = {str(one.target) for one in ancestors(other)} if isinstance(other, fx.Node) else set()
    found = proportional_to(factor) if isinstance(factor, fx.Node) else []
    return [name for name in found if name not in sources]
