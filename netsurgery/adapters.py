"""Low-rank updates that are not merged: ``layer(x) + up(down(x)) * scale`` is a layer with the weight of their sum."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from netsurgery.axes import Axis, resolve
from netsurgery.computed_weights import is_moved, packet_of
from netsurgery.notation import Op
from netsurgery.tracing import Program

__all__ = ["LAYER_INPUT", "LAYER_WEIGHT", "Adapted", "Update", "adapted_layers"]

aten = torch.ops.aten
#: By operation the arguments that are the weight of a layer, and its input.
LAYER_WEIGHT = {aten.mm: "mat2", aten.addmm: "mat2", aten.convolution: "weight", aten.embedding: "weight"}
LAYER_INPUT = {aten.mm: "self", aten.addmm: "mat1", aten.convolution: "input", aten.embedding: "indices"}
_SAME = {aten.clone, aten._to_copy, aten._unsafe_view}


@dataclass(frozen=True)
class Update:
    """``up(down(x)) * scale``: the operands that are its weights."""

    down: fx.Node
    up: fx.Node
    scale: float


@dataclass(frozen=True)
class Adapted:
    """A layer and its updates: the operation, the operand that is its weight, and those of the updates."""

    layer: fx.Node
    weight: fx.Node
    updates: tuple[Update, ...]

    def value(self, values: Mapping[fx.Node, Tensor]) -> Tensor:
        """The weight of the sum, in the dimensions of the layer's own."""
        whole = values[self.weight]
        for update in self.updates:
            down, up = values[update.down], values[update.up]
            if packet_of(self.layer) is aten.convolution:
                product = torch.einsum("or,ri...->oi...", up.flatten(1), down)
            else:
                product = down @ up
            whole = whole + update.scale * product.reshape(whole.shape)
        return whole


def adapted_layers(program: Program) -> list[Adapted]:
    """The layers of a program whose outputs a low-rank update is added to, and nothing else reads."""
    found: dict[fx.Node, Adapted] = {}
    for node in program.graph.nodes:  # a sum of more is met later, and counts instead
        for one in _sums(node):
            found[one.layer] = one
    return list(found.values())


def _sums(node: fx.Node) -> Iterator[Adapted]:
    terms = list(_terms(node, 1.0)) if packet_of(node) in (aten.add, aten.add_) and "params" not in node.meta else []
    for layer, factor in terms:
        if packet_of(layer) not in LAYER_WEIGHT or factor != 1.0:
            continue
        updates = [_update(other, scale, layer) for other, scale in terms if other is not layer]
        if updates and all(updates):
            weight = Op(layer, None)[LAYER_WEIGHT[packet_of(layer)]]
            if "params" in weight.meta:
                yield Adapted(layer, weight, tuple(update for update in updates if update is not None))
                return


def _terms(node: fx.Node, factor: float) -> Iterator[tuple[fx.Node, float]]:
    """What a sum is a sum of, and how often."""
    node, factor = _bare(node, factor)
    if packet_of(node) in (aten.add, aten.add_) and all(isinstance(one, fx.Node) for one in node.args[:2]):
        one, other = node.args[:2]
        yield from _terms(one, factor)  # type: ignore[arg-type]
        yield from _terms(other, factor * float(node.kwargs.get("alpha", 1)))  # type: ignore[arg-type]
    else:
        yield node, factor


def _bare(node: Any, factor: float = 1.0) -> tuple[fx.Node, float]:
    """A node without views, copies and constant factors around it."""
    while node.op == "call_function" and "params" not in node.meta:
        packet = packet_of(node)
        if packet in (aten.mul, aten.div) and isinstance(node.args[1], int | float):
            factor = factor * node.args[1] if packet is aten.mul else factor / node.args[1]
        elif not (is_moved(node) or packet in _SAME):
            break
        node = node.all_input_nodes[0]
    return node, factor


def _update(up: fx.Node, scale: float, layer: fx.Node) -> Update | None:
    """A product of two layers in place of one, if it is one: of the same input and for the same outputs."""
    kind = packet_of(layer)
    if packet_of(up) not in ((aten.convolution,) if kind is aten.convolution else (aten.mm, aten.addmm)):
        return None
    down, scale = _bare(Op(up, None)[LAYER_INPUT[packet_of(up)]], scale)
    if packet_of(down) not in ((kind,) if kind in (aten.convolution, aten.embedding) else (aten.mm, aten.addmm)):
        return None
    if down is layer or not _feeds_only(down, up):
        return None
    reads = [_bare(Op(one, None)[LAYER_INPUT[packet_of(one)]]) for one in (layer, down)]
    operands = [Op(one, None)[LAYER_WEIGHT[packet_of(one)]] for one in (down, up)]
    if reads[0][0] is not reads[1][0] or reads[0][1] != 1 or not all("params" in one.meta for one in operands):
        return None
    if not (_fits_convolution(layer, down, up) if kind is aten.convolution else _fits(layer, down, up)):
        return None
    return Update(operands[0], operands[1], scale * reads[1][1])


def _feeds_only(node: fx.Node, reader: fx.Node) -> bool:
    """Whether nothing but one operation reads a result, be it through views, copies and constant factors."""
    return all(
        user is reader
        or (_bare(user)[0] is _bare(node)[0] and user.op == "call_function" and _feeds_only(user, reader))
        for user in node.users
    )


def _axis(node: fx.Node, name: str) -> Axis:
    return resolve(node.meta["names"][name], {})


def _fits(layer: fx.Node, down: fx.Node, up: fx.Node) -> bool:
    """Whether matrices are multiplied along the same dimensions."""
    first = "d" if packet_of(down) is aten.embedding else "n"
    same_inputs = first == "d" or _axis(layer, "k") is _axis(down, "k")
    last = "d" if packet_of(layer) is aten.embedding else "n"
    return same_inputs and _axis(down, first) is _axis(up, "k") and _axis(layer, last) is _axis(up, "n")


def _fits_convolution(layer: fx.Node, down: fx.Node, up: fx.Node) -> bool:
    """Whether a convolution of the same windows is followed by one that takes each position alone."""
    ops = [Op(one, None) for one in (layer, down, up)]
    settings = [[op[name] for name in ("stride", "padding", "dilation", "transposed", "groups")] for op in ops]
    window = [axis.size for axis in ops[2]["weight"].meta["dims"][2:]]
    alone = settings[2][:2] == [[1] * len(window), [0] * len(window)] and {*window} <= {1}
    plain = not any(op["transposed"] or op["groups"] != 1 for op in ops)
    return plain and alone and settings[0] == settings[1]
