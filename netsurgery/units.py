"""What sort of units a dimension holds.

Attention heads, dimensions within heads, groups of a convolution or of a normalisation, and ranks of low-rank products
are told apart from channels, which all others are: a ratio is a share of a layer's channels, and of factors of one
dimension only one should be cut for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import fx

from netsurgery.adapters import adapted_layers
from netsurgery.axes import Axis
from netsurgery.computed_weights import ancestors, is_stream, meetings, packet_of
from netsurgery.tracing import Program

__all__ = ["Unit", "units_of", "units_of_products"]

Unit = Literal["channel", "head", "head_dim", "group", "rank"]

aten = torch.ops.aten
_ATTENTION = {aten.bmm, aten.baddbmm}
_IN_GROUPS = {aten.convolution, aten.native_group_norm, aten.native_channel_shuffle, aten.channel_shuffle}


def units_of(node: fx.Node) -> Iterator[tuple[Axis, Unit]]:
    """The sorts of units that one operation tells of."""
    packet, names = packet_of(node), node.meta.get("names", {})
    if packet in _ATTENTION and not any("params" in source.meta for source in node.all_input_nodes):
        yield names["b"], "head"  # a product of activations, one for each of a batch
        yield from ((names[name], "head_dim") for name in "mkn")
    elif packet in _IN_GROUPS and all(names[name].size > 1 for name in "cio" if name in names):
        yield names["g"], "group"  # of one channel each, groups are channels


def units_of_products(program: Program) -> Iterator[tuple[Axis, Unit]]:
    """The ranks of low-rank products: of updates beside a layer, and of weights that are computed as such a product."""
    for adapted in adapted_layers(program):
        for update in adapted.updates:
            down, up = update.down.meta["dims"], update.up.meta["dims"]
            inner, outer = (0, 0) if packet_of(adapted.layer) is aten.convolution else (-1, -1)
            sizes = [down[1 if inner == 0 else 0].size, up[outer].size]
            if down[inner].size < min(sizes):
                yield down[inner], "rank"
    for weight, _ in meetings(program):
        products = [node for node in ancestors(weight) if packet_of(node) in (aten.mm, aten.bmm)]
        for node in products if not is_stream(weight) else ():
            names = node.meta.get("names", {})
            if names and names["k"].size < min(names["m"].size, names["n"].size):
                yield names["k"], "rank"
