"""The sort of units that a dimension holds.

Attention heads, dimensions within heads, groups of a convolution or of a normalisation, and ranks of low-rank products
have sorts of their own; all other units are channels. A ratio is a share of a layer's channels. Where a dimension is a
product of several sorts, only one of them should be cut for it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from math import prod
from typing import Literal

import torch
from torch import fx

from netsurgery.analysis.computed_weights import ancestors, is_moved, is_stream, meetings, packet_of
from netsurgery.analysis.low_rank import LAYER_INPUT, LAYER_WEIGHT
from netsurgery.axes import Axis
from netsurgery.capture.program import Program
from netsurgery.notation import Operation

__all__ = ["Unit", "units_of", "units_of_products"]

Unit = Literal["channel", "head", "head_dim", "group", "rank"]

aten = torch.ops.aten
_ATTENTION = {aten.bmm, aten.baddbmm}
_IN_GROUPS = {aten.convolution, aten.native_group_norm, aten.native_channel_shuffle, aten.channel_shuffle}


def units_of(node: fx.Node) -> Iterator[tuple[Axis, Unit]]:
    """The sorts of units that one operation shows."""
    packet, names = packet_of(node), node.meta.get("names", {})
    if packet in _ATTENTION and not any("params" in source.meta for source in node.all_input_nodes):
        yield names["b"], "head"  # a product of activations, one for each of a batch
        yield from ((names[name], "head_dim") for name in "mkn")
    elif packet in _IN_GROUPS and all(names[name].size > 1 for name in "cio" if name in names):
        yield names["g"], "group"  # of one channel each, groups are channels


def units_of_products(program: Program) -> Iterator[tuple[Axis, Unit]]:
    """The ranks of low-rank products: of updates beside a layer, and of weights that are computed as such a product."""
    for node in program.graph.nodes:
        if packet_of(node) in (aten.add, aten.add_) and "params" not in node.meta:
            yield from ((rank, "rank") for rank in _ranks_beside(node))
    for weight, _ in meetings(program):
        products = [node for node in ancestors(weight) if packet_of(node) in (aten.mm, aten.bmm)]
        for node in products if not is_stream(weight) else ():
            names = node.meta.get("names", {})
            if names and names["k"].size < min(names["m"].size, names["n"].size):
                yield names["k"], "rank"


# Updates beside a layer: layer(x) + up(down(x)), times numbers or parameters ----------------------------------------

_NAMES = {aten.mm: ("k", "n"), aten.addmm: ("k", "n"), aten.convolution: ("i", "o"), aten.embedding: ("v", "d")}
_SCALED = {aten.mul, aten.div, aten.neg, aten.clone, aten._to_copy, aten._unsafe_view, aten.native_dropout}


def _ranks_beside(node: fx.Node) -> Iterator[Axis]:
    """The ranks of those terms of a sum that are products of two layers without a bias between them."""
    layers = [term for term in _terms(node) if _is_layer(term)]
    read = {layer: _source(layer) for layer in layers}
    for up in layers:
        down = read[up]
        if not _is_layer(down) or packet_of(down) is aten.addmm or _has_bias(down):
            continue
        (given, rank), (_, out) = (_ends(layer) for layer in (down, up))
        beside = any(read[other] is _source(down) for other in layers if other is not up)
        if beside and rank.size < min(given.size * _window(down), out.size):
            yield rank


def _terms(node: fx.Node) -> Iterator[fx.Node]:
    node = _peeled(node)
    if packet_of(node) in (aten.add, aten.add_) and "params" not in node.meta:
        for source in node.all_input_nodes:
            yield from _terms(source)
    else:
        yield node


def _peeled(node: fx.Node) -> fx.Node:
    """A node without the views, copies and factors around it."""
    while node.op == "call_function" and "params" not in node.meta:
        moved = packet_of(node) in _SCALED or node.target is operator.getitem or is_moved(node)
        given = [source for source in node.all_input_nodes if "params" not in source.meta]
        if not moved or len(given) != 1:
            break
        node = given[0]
    return node


def _is_layer(node: fx.Node) -> bool:
    weight = LAYER_WEIGHT.get(packet_of(node))
    return weight is not None and "params" not in node.meta and "params" in Operation(node)[weight].meta


def _has_bias(node: fx.Node) -> bool:
    return packet_of(node) is aten.convolution and Operation(node)["bias"] is not None


def _source(layer: fx.Node) -> fx.Node:
    return _peeled(Operation(layer)[LAYER_INPUT[packet_of(layer)]])


def _window(layer: fx.Node) -> int:
    """The number of positions of the input that an output of a layer is computed from."""
    convolution = packet_of(layer) is aten.convolution
    return prod(Operation(layer)["weight"].meta["shape"][2:]) if convolution else 1


def _ends(layer: fx.Node) -> tuple[Axis, Axis]:
    """The dimensions of a layer's inputs and outputs."""
    first, last = _NAMES[packet_of(layer)]
    return layer.meta["names"][first], layer.meta["names"][last]
