"""Low-rank updates that are not merged: ``layer(x) + up(down(x)) * scale`` is a layer with the weight of their sum.

Each term may be multiplied by numbers that come from parameters, too, one for each output, as DoRA does:
``layer(x) + (s - 1) * (layer(x) - bias) + s * up(down(x)) * scale``, where s is ``magnitude / norm(weight + update)``.

Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from netsurgery.analysis.computed_weights import is_moved, packet_of
from netsurgery.axes import Axis, resolve
from netsurgery.capture.program import Program
from netsurgery.notation import Operation

__all__ = ["LAYER_INPUT", "LAYER_WEIGHT", "Adapted", "Update", "adapted_layers"]

aten = torch.ops.aten
#: By operation the arguments that are the weight of a layer, and its input.
LAYER_WEIGHT = {aten.mm: "mat2", aten.addmm: "mat2", aten.convolution: "weight", aten.embedding: "weight"}
LAYER_INPUT = {aten.mm: "self", aten.addmm: "mat1", aten.convolution: "input", aten.embedding: "indices"}
_COPIES = {aten.clone, aten._to_copy, aten._unsafe_view}


@dataclass(frozen=True)
class Factor:
    """The factor of a term of a sum.

    Attributes:
        number: the part that is the same for all outputs.
        vectors: nodes that come from parameters and hold a number for each unit of a dimension, with that dimension.
    """

    number: float = 1.0
    vectors: tuple[tuple[fx.Node, Axis], ...] = ()

    def times(self, number: float) -> Factor:
        """This factor times a number."""
        return replace(self, number=self.number * number)


@dataclass(frozen=True)
class Update:
    """``up(down(x)) * factor``: the operands that are its weights."""

    down: fx.Node
    up: fx.Node
    factor: Factor


@dataclass(frozen=True)
class Adapted:
    """A layer and its updates: the operation, the operand that is its weight, its factors, and the updates."""

    layer: fx.Node
    weight: fx.Node
    factors: tuple[Factor, ...]
    updates: tuple[Update, ...]

    @property
    def vectors(self) -> tuple[fx.Node, ...]:
        """The nodes that come from parameters and multiply a term."""
        factors = (*self.factors, *(update.factor for update in self.updates))
        return tuple(dict.fromkeys(node for factor in factors for node, _ in factor.vectors))

    @property
    def parts(self) -> tuple[fx.Node, ...]:
        """The operands that are weights of the updates."""
        return tuple(node for update in self.updates for node in (update.down, update.up))

    def value(self, values: Mapping[fx.Node, Tensor]) -> Tensor:
        """The weight of the sum, in the dimensions of the layer's own."""
        own = values[self.weight]
        whole = torch.zeros_like(own)
        for factor in self.factors:
            whole = whole + self.scaled(own, factor, values)
        for update in self.updates:
            down, up = values[update.down], values[update.up]
            if packet_of(self.layer) is aten.convolution:
                product = torch.einsum("or,ri...->oi...", up.flatten(1), down)
            else:
                product = down @ up
            whole = whole + self.scaled(product.reshape(own.shape), update.factor, values)
        return whole

    def scaled(self, weight: Tensor, factor: Factor, values: Mapping[fx.Node, Tensor]) -> Tensor:
        """A weight times a factor of its outputs."""
        outputs = 0 if packet_of(self.layer) is aten.convolution else weight.dim() - 1
        shape = [-1 if dim == outputs else 1 for dim in range(weight.dim())]
        for node, _ in factor.vectors:
            weight = weight * values[node].reshape(shape)
        return factor.number * weight


def adapted_layers(program: Program) -> list[Adapted]:
    """The layers of a program whose outputs a low-rank update is added to, and nothing else reads."""
    found: dict[fx.Node, Adapted] = {}
    for node in program.graph.nodes:  # a sum of more is met later, and counts instead
        for one in _sums(node):
            found[one.layer] = one
    return list(found.values())


def _sums(node: fx.Node) -> Iterator[Adapted]:
    terms = list(_terms(node, Factor())) if packet_of(node) in _SUMS and "params" not in node.meta else []
    for layer in dict.fromkeys(term for term, factor in terms if factor == Factor()):
        if packet_of(layer) not in LAYER_WEIGHT:
            continue
        factors = tuple(factor for term, factor in terms if term is layer)
        updates = [_update(term, factor, layer) for term, factor in terms if term is not layer]
        weight = Operation(layer)[LAYER_WEIGHT[packet_of(layer)]]
        out = _axis(layer, _OUTPUTS[packet_of(layer)])
        if updates and all(updates) and "params" in weight.meta:
            one = Adapted(layer, weight, factors, tuple(update for update in updates if update is not None))
            known = [factor for update in one.updates for factor in (update.factor, *factors)]
            if all(_same_units(axis, out) for factor in known for _, axis in factor.vectors):
                yield one
                return


_SUMS = {aten.add, aten.add_, aten.sub, aten.sub_}
_OUTPUTS = {aten.mm: "n", aten.addmm: "n", aten.convolution: "o", aten.embedding: "d"}


def _terms(node: fx.Node, factor: Factor) -> Iterator[tuple[fx.Node, Factor]]:
    """The terms of a sum and their factors, without those that come from parameters alone, such as a bias."""
    node, number = _peeled(node)
    factor = factor.times(number)
    if "params" in node.meta:
        return
    packet, pair = packet_of(node), [one for one in node.args[:2] if isinstance(one, fx.Node)]
    if packet in _SUMS and len(pair) == 2:
        alpha = float(node.kwargs.get("alpha", 1)) * (1 if packet in (aten.add, aten.add_) else -1)  # type: ignore[arg-type]
        yield from _terms(pair[0], factor)
        yield from _terms(pair[1], factor.times(alpha))
    elif packet in (aten.mul, aten.mul_) and len(pair) == 2 and (found := _by_vector(node, *pair)) is not None:
        term, vector = found
        yield from _terms(term, replace(factor, vectors=(*factor.vectors, vector)))
    else:
        yield node, factor


def _by_vector(node: fx.Node, one: fx.Node, other: fx.Node) -> tuple[fx.Node, tuple[fx.Node, Axis]] | None:
    """Split a product into activations and a vector from parameters, with the dimension of its numbers."""
    vectors = [source for source in (one, other) if "params" in source.meta]
    if len(vectors) != 1:
        return None
    shape = vectors[0].meta["shape"]
    at = [dim - len(shape) for dim, size in enumerate(shape) if size > 1]
    if len(at) != 1:
        return None
    return (one if vectors[0] is other else other), (vectors[0], resolve(node.meta["dims"][at[0]], {}))


def _peeled(node: fx.Node, factor: float = 1.0) -> tuple[fx.Node, float]:
    """A node without views, copies and constant factors around it."""
    while node.op == "call_function" and "params" not in node.meta:
        packet = packet_of(node)
        if packet in (aten.mul, aten.div) and isinstance(node.args[1], int | float):
            factor = factor * node.args[1] if packet is aten.mul else factor / node.args[1]
        elif not (is_moved(node) or packet in _COPIES):
            break
        node = node.all_input_nodes[0]
    return node, factor


def _update(up: fx.Node, factor: Factor, layer: fx.Node) -> Update | None:
    """The update of a layer that a term is: a product of two layers of the same input and outputs; None for others."""
    kind = packet_of(layer)
    if packet_of(up) not in ((aten.convolution,) if kind is aten.convolution else (aten.mm, aten.addmm)):
        return None
    down, number = _peeled(Operation(up)[LAYER_INPUT[packet_of(up)]])
    if packet_of(down) not in ((kind,) if kind in (aten.convolution, aten.embedding) else (aten.mm, aten.addmm)):
        return None
    if down is layer or not _feeds_only(down, up):
        return None
    reads = [_peeled(Operation(one)[LAYER_INPUT[packet_of(one)]]) for one in (layer, down)]
    operands = [Operation(one)[LAYER_WEIGHT[packet_of(one)]] for one in (down, up)]
    if reads[0][0] is not reads[1][0] or reads[0][1] != 1 or not all("params" in one.meta for one in operands):
        return None
    if not (_fits_convolution(layer, down, up) if kind is aten.convolution else _fits(layer, down, up)):
        return None
    return Update(operands[0], operands[1], factor.times(number * reads[1][1]))


def _feeds_only(node: fx.Node, reader: fx.Node) -> bool:
    """True if one operation alone reads a result, maybe through views, copies and constant factors."""
    return all(
        user is reader
        or (_peeled(user)[0] is _peeled(node)[0] and user.op == "call_function" and _feeds_only(user, reader))
        for user in node.users
    )


def _axis(node: fx.Node, name: str) -> Axis:
    return resolve(node.meta["names"][name], {})


def _same_units(one: Axis, other: Axis) -> bool:
    """True if dimensions hold the same units; dimensions of heads may be different products of the same channels."""
    if one is other:
        return True
    pairs = zip(one.terms, other.terms, strict=False)
    return one.op == other.op != "" and len(one.terms) == len(other.terms) and all(_same_units(a, b) for a, b in pairs)


def _fits(layer: fx.Node, down: fx.Node, up: fx.Node) -> bool:
    """True if matrices are multiplied along the same dimensions."""
    first = "d" if packet_of(down) is aten.embedding else "n"
    same_inputs = first == "d" or _same_units(_axis(layer, "k"), _axis(down, "k"))
    last = "d" if packet_of(layer) is aten.embedding else "n"
    return (
        same_inputs
        and _same_units(_axis(down, first), _axis(up, "k"))
        and _same_units(_axis(layer, last), _axis(up, "n"))
    )


def _fits_convolution(layer: fx.Node, down: fx.Node, up: fx.Node) -> bool:
    """True if a convolution of the same windows is followed by one that takes each position alone."""
    ops = [Operation(one) for one in (layer, down, up)]
    settings = [[op[name] for name in ("stride", "padding", "dilation", "transposed", "groups")] for op in ops]
    window = [axis.size for axis in ops[2]["weight"].meta["dims"][2:]]
    alone = settings[2][:2] == [[1] * len(window), [0] * len(window)] and {*window} <= {1}
    plain = not any(op["transposed"] or op["groups"] != 1 for op in ops)
    return plain and alone and settings[0] == settings[1]
