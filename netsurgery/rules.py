"""What each ATen operation says about dimensions.

Most operators are one line in a notation that reads like einops: a name is a dimension, ``*s`` any number of
them, ``(g i)`` a product. Dimensions of one name are the same; a name that only one input has is worked across
(a window, a kernel) and is frozen; a name that only the output has is new and holds no channel. Roles follow: a
parameter's dimension that the output lacks is consumed, one that only parameters bring is produced, one that
inputs have too is carried along.
Operators whose arguments decide get a short function. An operator without a rule freezes whatever it touches.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from math import prod
from typing import Any

import torch
from torch import fx

from netsurgery.axes import Axis, Fixed, channel, concat, cut, find, freeze, product, unify
from netsurgery.tracing import format_where

__all__ = ["Op", "apply_rule", "table"]

aten = torch.ops.aten
Dims = tuple[Axis, ...]
Rule = Callable[["Op"], Any]
RULES: dict[Any, tuple[Rule, str]] = {}


class Op:
    """One recorded operation while its rule looks at it: arguments by name, dimensions of its inputs and outputs."""

    def __init__(self, node: fx.Node, analysis: Any):
        self.node, self.analysis = node, analysis
        target: Any = node.target
        self.name = target._schema.name.replace("::", ".")

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        """The arguments by name, defaults included."""
        target: Any = self.node.target
        schema = target._schema.arguments
        values = dict(zip((a.name for a in schema), self.node.args, strict=False))
        return {a.name: values.get(a.name, self.node.kwargs.get(a.name, a.default_value)) for a in schema}

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    @property
    def inputs(self) -> list[fx.Node]:
        """Tensor arguments in order, lists flattened."""
        return self.node.all_input_nodes

    def dims(self, node: fx.Node) -> Dims:
        return node.meta["dims"]  # type: ignore[no-any-return]

    @functools.cached_property
    def place(self) -> str:
        module = f" in {self.node.meta['module']}" if self.node.meta["module"] else ""
        return f"{self.name}{module} {format_where(self.node.meta['where'])}".rstrip()

    def reason(self, why: str) -> str:
        """Why something is frozen, with the operation, the module and the line."""
        return f"{why}: {self.place}"

    def freeze(self, axis: Axis, why: str) -> None:
        freeze(axis, self.reason(why))

    def unify(self, a: Axis, b: Axis) -> None:
        unify(a, b, self.reason("sizes that do not align"))

    def shapes(self) -> list[tuple[int, ...] | None]:
        shape = self.node.meta["shape"]
        return shape if isinstance(shape, list) else [shape]

    def expect(self, sizes: dict[str, Axis]) -> None:
        """State that integer arguments are the sizes of dimensions."""
        self.node.meta["expected"] = sizes

    def fixed(self, size: int) -> Axis:
        """A new dimension that holds no channel."""
        return channel(size, Fixed(self.reason("holds no units")))

    def all_fixed(self, shape: Iterable[int]) -> Dims:
        """Dimensions that hold no channel."""
        return tuple([self.fixed(n) for n in shape])


def rule(*operators: Any, sized: tuple[str, ...] = ()) -> Callable[[Rule], Rule]:
    """Register a function as the rule of operators; the integer arguments named in ``sized`` follow dimensions."""

    def register(function: Rule) -> Rule:
        for operator in operators:
            RULES[operator] = function, (function.__doc__ or "").strip().splitlines()[0]
            SIZED[operator] = frozenset(sized)
        return function

    return register


SIZED: dict[Any, frozenset[str]] = {}

# The notation ------------------------------------------------------------------------------------------------


@functools.cache
def _parse(side: str) -> tuple[tuple[tuple[str, ...], ...], ...]:
    return tuple(
        tuple(tuple(token.strip("()").split()) for token in re.findall(r"\([^)]*\)|\S+", operand))
        for operand in side.split(",")
    )


class _Names:
    """The dimensions that the names of a pattern stand for."""

    def __init__(self, op: Op, known: dict[str, int]):
        self.op, self.known = op, known
        self.axes: dict[str, Axis] = {}
        self.stars: dict[str, Dims] = {}

    def meet(self, name: str, axis: Axis) -> None:
        if name in self.axes:
            self.op.unify(self.axes[name], axis)
        else:
            self.axes[name] = axis

    def meet_product(self, names: tuple[str, ...], axis: Axis) -> None:
        sizes = {name: self.axes[name].size if name in self.axes else self.known.get(name) for name in names}
        rest = axis.size // prod(n for n in sizes.values() if n)
        for name in names:
            if name not in self.axes:
                self.axes[name] = channel(sizes[name] or rest)
        self.op.unify(product(self.axes[name] for name in names), axis)

    def read(self, tokens: tuple[tuple[str, ...], ...], dims: Dims) -> list[tuple[str, Axis]]:
        """Match the dimensions of one operand; returns each name with the dimension it was read from."""
        origins: list[tuple[str, Axis]] = []
        stars = {token[0][1:] for token in tokens if token[0][0] == "*"}
        lengths = {name: len(self.stars[name]) if name in self.stars else self.known.get("*" + name) for name in stars}
        spare = len(dims) - len(tokens) + len(stars) - sum(n for n in lengths.values() if n is not None)
        position = 0
        for token in tokens:
            if token[0][0] == "*":
                name = token[0][1:]
                length = lengths[name]
                part = dims[position : position + (spare if length is None else length)]
                for old, new in zip(self.stars.setdefault(name, part), part, strict=True):
                    self.op.unify(old, new)
                position += len(part)
                origins.extend((token[0], axis) for axis in part)
                continue
            if len(token) == 1:
                self.meet(token[0], dims[position])
            else:
                self.meet_product(token, dims[position])
            origins.extend((name, dims[position]) for name in token)
            position += 1
        return origins

    def all(self, name: str) -> Dims:
        return self.stars.get(name[1:], ()) if name[0] == "*" else (self.axes[name],)

    def write(self, tokens: tuple[tuple[str, ...], ...], shape: tuple[int, ...]) -> Dims:
        """The dimensions of one output."""
        free = len(shape) - sum(1 if token[0][0] != "*" else len(self.all(token[0])) for token in tokens)
        out: list[Axis] = []
        for token in tokens:
            if token[0][0] == "*":
                if token[0][1:] not in self.stars:
                    self.stars[token[0][1:]] = tuple(self.op.fixed(n) for n in shape[len(out) : len(out) + free])
                out.extend(self.stars[token[0][1:]])
            else:
                for name in token:
                    if name not in self.axes:
                        self.axes[name] = self.op.fixed(shape[len(out)] if len(token) == 1 else self.known[name])
                out.append(product(self.axes[name] for name in token) if len(token) > 1 else self.axes[token[0]])
        return tuple(out)


def relate(
    op: Op, pattern: str, operands: list[fx.Node | None], known: dict[str, int] | None = None, macs: str = ""
) -> list[Any]:
    """Apply a pattern to the operands of an operation (None: absent) and return the dimensions of its outputs.

    ``known`` gives sizes of names inside products and lengths of starred names; the product of the dimensions named in
    ``macs`` is the number of multiply-accumulates.
    """
    left, right = (_parse(side.strip()) for side in pattern.split("->"))
    names = _Names(op, known or {})
    present = [(tokens, node) for tokens, node in zip(left, operands, strict=True) if node is not None]
    origins = [names.read(tokens, op.dims(node)) for tokens, node in present]
    outputs: list[Any] = [
        None
        if shape is None
        else names.write(right[i], shape)
        if i < len(right) and tuple(shape) != (0,)  # as norms save no statistics in eval mode
        else op.all_fixed(shape)
        for i, shape in enumerate(op.shapes())
    ]
    written = {name for tokens in right for token in tokens for name in token}
    uses = [{name for name, _ in origin} for origin in origins]
    fed = {name for mine, (_, node) in zip(uses, present, strict=True) if "params" not in node.meta for name in mine}
    for mine, origin, (_, node) in zip(uses, origins, present, strict=True):
        contracts = not mine <= written
        for name, source in origin:
            if name not in written and sum(name in other for other in uses) == 1:
                role = "window"
                freeze(source, Fixed(op.reason("works across positions")))
            elif name not in written:
                role = "consumes"
            else:
                role = "produces" if contracts and name not in fed else "carries"
            if "params" in node.meta:
                op.analysis.note_role(node, source, names.axes.get(name, source), role)
    op.node.meta["names"] = {**names.axes, **{"*" + name: axes for name, axes in names.stars.items()}}
    if macs:
        op.node.meta["macs"] = [axis for name in macs.split() for axis in names.all(name)]
    return outputs


def pattern(
    operators: list[Any], notation: str, *, operands: str, macs: str = "", sized: tuple[str, ...] = (), **known: str
) -> None:
    """Register a notation: ``operands`` names the tensor arguments, ``known`` the arguments that give sizes."""

    def run(op: Op) -> Any:
        sizes = {("*" + k[5:] if k.startswith("star_") else k): _number(op[v]) for k, v in known.items()}
        out = relate(op, notation, [op[name] for name in operands.split()], sizes, macs)
        op.expect({argument: op.node.meta["names"][k] for k, argument in known.items() if not k.startswith("star_")})
        return out

    for operator in operators:
        RULES[operator] = run, notation
        SIZED[operator] = frozenset(sized)


def _number(value: Any) -> int:
    return len(value) if isinstance(value, list | tuple) else int(value)


def apply_rule(node: fx.Node, analysis: Any) -> None:
    """Give a node its dimensions, relating them to those of its inputs."""
    op = Op(node, analysis)
    operator = node.target.overloadpacket  # type: ignore[union-attr]
    function = RULES.get(node.target) or RULES.get(operator)
    if function is None and torch.Tag.pointwise in node.target.tags:  # type: ignore[union-attr]
        function = RULES["pointwise"]
    if function is None:
        function = RULES["unknown"]
    dims = function[0](op)
    node.meta["dims"] = dims[0] if isinstance(dims, list) and not isinstance(node.meta["shape"], list) else dims


def table() -> list[tuple[str, str]]:
    """Every rule: operator, and what it says."""
    return sorted((str(operator).replace("aten.", ""), says) for operator, (_, says) in RULES.items())


# Contractions, norms, windows: one line each -------------------------------------------------------------------

pattern([aten.mm], "m k, k n -> m n", operands="self mat2", macs="m k n")
pattern([aten.bmm], "b m k, b k n -> b m n", operands="self mat2", macs="b m k n")
pattern([aten.baddbmm], "b m n, b m k, b k n -> b m n", operands="self batch1 batch2", macs="b m k n")
pattern([aten.mv], "m k, k -> m", operands="self vec", macs="m k")
pattern([aten.dot], "k, k -> ", operands="self tensor", macs="k")
pattern([aten.embedding], "v d, *i -> *i d", operands="weight indices", sized=("padding_idx",))
pattern(
    [aten.native_batch_norm, aten._native_batch_norm_legit, aten.cudnn_batch_norm, aten.miopen_batch_norm],
    "b c *s, c, c, c, c -> b c *s, c, c", operands="input weight bias running_mean running_var",
)  # fmt: skip
pattern(
    [aten.native_layer_norm], "*b *n, *n, *n -> *b *n, *b *o, *b *o", operands="input weight bias",
    star_n="normalized_shape", sized=("normalized_shape",),
)  # fmt: skip
pattern(
    [aten.native_group_norm], "b (g c) *s, (g c), (g c) -> b (g c) *s, b g, b g", operands="input weight bias",
    g="group", sized=("N", "C", "HxW", "group"),
)  # fmt: skip
pattern([aten.native_channel_shuffle, aten.channel_shuffle], "b (g c) *s -> b (c g) *s", operands="self", g="groups")
pattern(
    [aten.pixel_shuffle], "*b (c p q) h w -> *b c (h p) (w q)", operands="self", p="upscale_factor", q="upscale_factor"
)
pattern(
    [aten.max_pool2d_with_indices, aten.avg_pool2d, aten._adaptive_avg_pool2d, aten.adaptive_max_pool2d,
     aten.upsample_nearest2d, aten.upsample_bilinear2d, aten.upsample_bicubic2d, aten._upsample_nearest_exact2d,
     aten.reflection_pad2d, aten.replication_pad2d],
    "*b h w -> *b p q, *b p q", operands="self",
)  # fmt: skip
pattern(
    [aten.max_pool3d_with_indices, aten.avg_pool3d, aten._adaptive_avg_pool3d, aten.adaptive_max_pool3d,
     aten.upsample_nearest3d, aten.upsample_trilinear3d, aten.reflection_pad3d, aten.replication_pad3d],
    "*b d h w -> *b o p q, *b o p q", operands="self",
)  # fmt: skip
pattern(
    [aten.upsample_nearest1d, aten.upsample_linear1d, aten.reflection_pad1d, aten.replication_pad1d],
    "*b w -> *b q", operands="self",
)  # fmt: skip


@rule(aten.convolution, sized=("groups",))
def convolution(op: Op) -> Any:
    """b (g i) *s, (g o) i *k, (g o) -> b (g o) *t; transposed: b (g i) *s, (g i) o *k, (g o) -> b (g o) *t"""
    operands, groups = [op["input"], op["weight"], op["bias"]], {"g": op["groups"]}
    weight, positions = ("(g i) o *k", "*s") if op["transposed"] else ("(g o) i *k", "*t")
    out = relate(op, f"b (g i) *s, {weight}, (g o) -> b (g o) *t", operands, groups, macs=f"b g i o *k {positions}")
    op.expect({"groups": op.node.meta["names"]["g"]})
    return out


@rule(aten.addmm)
def addmm(op: Op) -> Any:
    """n, m k, k n -> m n"""
    bias = "n" if len(op.dims(op["self"])) == 1 else "m n"
    return relate(op, f"{bias}, m k, k n -> m n", [op["self"], op["mat1"], op["mat2"]], macs="m k n")


# Operations that leave positions where they are ----------------------------------------------------------------


@rule("pointwise")
def pointwise(op: Op) -> Any:
    """every operation tagged pointwise: dimensions align from the right, size one is broadcast"""
    return _broadcast(op, op.inputs)


@rule(
    aten.copy, aten.copy_, aten.masked_fill, aten.masked_fill_, aten.fill_, aten.rsub, aten._prelu_kernel,
    aten.hardswish, aten.hardswish_, aten.mish_, aten.log_sigmoid_forward,
)  # fmt: skip
def broadcasting(op: Op) -> Any:
    """like pointwise, though not tagged so"""
    return _broadcast(op, op.inputs)


def _broadcast(op: Op, inputs: list[fx.Node]) -> Any:
    results = []
    for shape in op.shapes():
        out: list[Axis | None] = [None] * len(shape or ())
        for node in inputs:
            for back, axis in enumerate(reversed(op.dims(node)), start=1):
                position = len(out) - back
                if position < 0 or axis.size != (shape or ())[position]:
                    continue
                known = out[position]
                if known is None:
                    out[position] = axis
                else:
                    op.unify(known, axis)
        results.append(tuple(axis or op.fixed(n) for axis, n in zip(out, shape or (), strict=True)))
    return results


@rule(
    aten.clone, aten.detach_, aten._to_copy, aten.contiguous, aten.native_dropout, aten.bernoulli, aten.bernoulli_,
    aten.zero_, aten.empty_like, aten.zeros_like, aten.ones_like,
    aten.full_like, aten.rand_like, aten.randn_like,
)  # fmt: skip
def same(op: Op) -> Any:
    """the output has the dimensions of the input"""
    return [op.dims(op.inputs[0]) for _ in op.shapes()]


@rule(aten.as_strided_, sized=("size", "stride"))
def restride(op: Op) -> Any:
    """only where it changes the strides of dimensions of size one"""
    (source,) = op.inputs
    strides = [(n, stride) for n, stride in zip(op["size"], op["stride"], strict=True) if n != 1]
    if source.meta["shape"] == op.shapes()[0] and strides == [
        (n, s) for n, s in zip(*source.meta["layout"], strict=True) if n != 1
    ]:
        return [op.dims(source)]
    return unknown(op)


@rule(aten._softmax, aten._log_softmax, aten._safe_softmax)
def softmax(op: Op) -> Any:
    """the output has the dimensions of the input; a removed unit is left out of the sum"""
    return [op.dims(op["self"])]


# Reductions ----------------------------------------------------------------------------------------------------


def _positions(dim: Any, ndim: int) -> set[int]:
    listed = range(ndim) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    return {d % ndim if ndim else d for d in listed}


@rule(aten.sum, aten.mean, aten.amax, aten.amin)
def reduction(op: Op) -> Any:
    """reduced dimensions vanish (or have size one); a removed unit is left out"""
    dims = op.dims(op["self"])
    gone = _positions(op.arguments.get("dim"), len(dims))
    if op.arguments.get("keepdim"):
        return [tuple(channel(1) if i in gone else axis for i, axis in enumerate(dims))]
    return [tuple(axis for i, axis in enumerate(dims) if i not in gone)]


# Views ---------------------------------------------------------------------------------------------------------


@rule(aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias, sized=("size",))
def view(op: Op) -> Any:
    """blocks of equal size: their products are the same dimension"""
    dims, shape = list(op.dims(op["self"])), list(op.shapes()[0] or ())
    if 0 in shape:
        return [op.all_fixed(shape)]
    out = [channel(n) for n in shape]
    i = j = 0
    while i < len(dims) or j < len(out):
        block_in, block_out = [i, i], [j, j]
        size_in = size_out = 1
        while size_in != size_out or block_in[1] == i or block_out[1] == j:
            if size_in <= size_out and block_in[1] < len(dims):
                size_in *= dims[block_in[1]].size
                block_in[1] += 1
            elif block_out[1] < len(out):
                size_out *= out[block_out[1]].size
                block_out[1] += 1
            elif block_in[1] < len(dims):
                size_in *= dims[block_in[1]].size
                block_in[1] += 1
            else:
                break
        i, j = block_in[1], block_out[1]
        op.unify(product(dims[slice(*block_in)]), product(out[slice(*block_out)]))
    return [tuple(out)]


@rule(aten.expand, sized=("size",))
def expand(op: Op) -> Any:
    """dimensions align from the right; a repeated one has units of its own, all alike"""
    shape, dims = op.shapes()[0] or (), op.dims(op["self"])
    padded = [None] * (len(shape) - len(dims)) + list(dims)
    return [
        tuple(
            axis if axis is not None and axis.size == n else channel(n) for axis, n in zip(padded, shape, strict=True)
        )
    ]


@rule(aten.permute, aten.transpose, aten.transpose_, aten.t, aten.t_, aten.numpy_T)
def permute(op: Op) -> Any:
    """dimensions change places"""
    dims = op.dims(op["self"])
    if "dims" in op.arguments:
        return [tuple(dims[d] for d in op["dims"])]
    order = list(range(len(dims)))
    a, b = (op["dim0"], op["dim1"]) if "dim0" in op.arguments else (0, -1)
    if order:
        order[a], order[b] = order[b], order[a]
    return [tuple(dims[d] for d in order)]


@rule(aten.unsqueeze, aten.unsqueeze_)
def unsqueeze(op: Op) -> Any:
    """a new dimension of size one"""
    dims = list(op.dims(op["self"]))
    dims.insert(op["dim"] % (len(dims) + 1), channel(1))
    return [tuple(dims)]


@rule(aten.squeeze, aten.squeeze_)
def squeeze(op: Op) -> Any:
    """dimensions of size one vanish"""
    dims = op.dims(op["self"])
    gone = _positions(op.arguments.get("dim"), len(dims))
    return [tuple(axis for i, axis in enumerate(dims) if i not in gone or axis.size != 1)]


@rule(aten.cat)
def cat(op: Op) -> Any:
    """parts in order along one dimension, the others are the same"""
    shape = op.shapes()[0] or ()
    tensors = [op.dims(node) for node in op["tensors"] if len(op.dims(node)) == len(shape)]  # torch skips empty lists
    at = op["dim"] % len(tensors[0])
    for dims in tensors[1:]:
        for i, (a, b) in enumerate(zip(tensors[0], dims, strict=True)):
            if i != at:
                op.unify(a, b)
    return [(*tensors[0][:at], concat(dims[at] for dims in tensors), *tensors[0][at + 1 :])]


@rule(aten.stack)
def stack(op: Op) -> Any:
    """a new dimension, one position for each tensor; the others are the same"""
    tensors = [op.dims(node) for node in op["tensors"]]
    for dims in tensors[1:]:
        for a, b in zip(tensors[0], dims, strict=True):
            op.unify(a, b)
    out = list(tensors[0])
    out.insert(op["dim"] % (len(out) + 1), op.fixed(len(tensors)))
    return [tuple(out)]


@rule(
    aten.split,
    aten.chunk,
    aten.split_with_sizes,
    aten.split_copy,
    aten.split_with_sizes_copy,
    sized=("split_size", "split_sizes"),
)
def split(op: Op) -> Any:
    """consecutive parts; parts of equal size keep equal sizes, as chunk would make them"""
    dims = op.dims(op["self"])
    at, rest, out, parts = op["dim"] % len(dims), dims[op["dim"]], [], []
    for shape in op.shapes():
        part, rest = cut(rest, (shape or ())[at], op.reason("cut through"))
        parts.append(part)
        out.append((*dims[:at], part, *dims[at + 1 :]))
    if "split_size" in op.arguments and len({find(part).size for part in parts}) == 1:
        op.analysis.tie(parts, op.reason("equal parts that are built differently"))
    return out


@rule(aten.unbind)
def unbind(op: Op) -> Any:
    """the dimension vanishes and cannot lose units"""
    dims = op.dims(op["self"])
    at = op["dim"] % len(dims)
    op.freeze(dims[at], "indexed")
    return [(*dims[:at], *dims[at + 1 :]) for _ in op.shapes()]


@rule(aten.select)
def select(op: Op) -> Any:
    """the dimension vanishes and cannot lose units"""
    dims = op.dims(op["self"])
    at = op["dim"] % len(dims)
    op.freeze(dims[at], "indexed")
    return [(*dims[:at], *dims[at + 1 :])]


@rule(aten.slice, sized=("start", "end"))
def slice_(op: Op) -> Any:
    """a consecutive part; a strided one freezes the dimension"""
    dims = op.dims(op["self"])
    at = op["dim"] % len(dims)
    taken = (op.shapes()[0] or ())[at]
    if taken == dims[at].size:
        return [dims]
    if op["step"] != 1:
        op.freeze(dims[at], "strided slice")
        return [(*dims[:at], op.fixed(taken), *dims[at + 1 :])]
    start = op["start"] or 0
    before, rest = cut(dims[at], start + dims[at].size if start < 0 else start, op.reason("cut through"))
    op.expect({"start": before})
    return [(*dims[:at], cut(rest, taken, op.reason("cut through"))[0], *dims[at + 1 :])]


@rule(aten.repeat, sized=("repeats",))
def repeat(op: Op) -> Any:
    """copies one after another: a product with the number of copies"""
    shape, dims = op.shapes()[0] or (), op.dims(op["self"])
    padded = [channel(1)] * (len(shape) - len(dims)) + list(dims)
    return [tuple(product([op.fixed(n // axis.size), axis]) for axis, n in zip(padded, shape, strict=True))]


@rule(aten.constant_pad_nd)
def constant_pad(op: Op) -> Any:
    """zeros before and after: a concatenation (a cut where the padding is negative)"""
    out = list(op.dims(op["self"]))
    for back, (before, after) in enumerate(zip(op["pad"][::2], op["pad"][1::2], strict=True), start=1):
        axis = cut(out[-back], -before)[1] if before < 0 else out[-back]
        axis = cut(axis, find(axis).size + after)[0] if after < 0 else axis
        out[-back] = concat([op.fixed(max(before, 0)), axis, op.fixed(max(after, 0))])
    return [tuple(out)]


@rule(aten.flip)
def flip(op: Op) -> Any:
    """the order turns round: those dimensions cannot lose units"""
    dims = op.dims(op["self"])
    for at in op["dims"]:
        op.freeze(dims[at], "order reversed")
    return [dims]


@rule(aten.glu)
def glu(op: Op) -> Any:
    """two halves that are the same dimension"""
    dims = op.dims(op["self"])
    at = op["dim"] % len(dims)
    half, gate = cut(dims[at], dims[at].size // 2)
    op.unify(half, gate)
    return [(*dims[:at], half, *dims[at + 1 :])]


# Where tensors come from -----------------------------------------------------------------------------------------


@rule(
    aten.zeros, aten.ones, aten.full, aten.empty, aten.rand, aten.randn, aten.new_zeros, aten.new_ones, aten.new_full,
    aten.new_empty, aten.scalar_tensor, sized=("size",),
)  # fmt: skip
def filled(op: Op) -> Any:
    """every position is alike, so any may be removed"""
    return [tuple(channel(n) for n in shape or ()) for shape in op.shapes()]


@rule("unknown")
def unknown(op: Op) -> Any:
    """an operation without a rule: whatever it touches is frozen"""
    for node in op.inputs:
        for axis in op.dims(node):
            op.freeze(axis, "no rule for this operation")
    reason = op.reason("no rule for this operation")
    return [None if shape is None else tuple(channel(n, reason) for n in shape) for shape in op.shapes()]
