"""The rules: how each ATen operation relates the dimensions of its arguments and results.

Most operators are one line in the notation of ``netsurgery.notation``; those whose arguments decide get a short
function. An operator without a rule locks whatever it touches; ``netsurgery.rule`` adds one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from math import prod

import torch
from torch import fx
from torch._ops import OpOverload

from netsurgery.axes import Axis, Dims, Edge, channel, concat, cut, find, product
from netsurgery.capture.operations import Target, target_of
from netsurgery.notation import BY_POSITION, Findings, Op, Results, relate

__all__ = ["CUSTOM_RULES", "RULES", "SIZED", "Op", "Rule", "apply_rule", "locked", "reduced", "table", "title"]

aten = torch.ops.aten
Rule = Callable[[Op], Results]
RULES: dict[object, tuple[Rule, str]] = {}  # by overload, operator, or name such as "torchvision::nms"
CUSTOM_RULES: dict[object, tuple[Rule, str]] = {}  # by netsurgery.rule; asked first
SIZED: dict[object, frozenset[str]] = {}


def rule(*operators: object, sized: tuple[str, ...] = ()) -> Callable[[Rule], Rule]:
    """Register a function as the rule of operators; the integer arguments named in ``sized`` follow dimensions."""

    def register(function: Rule) -> Rule:
        for one in operators:
            RULES[one] = function, (function.__doc__ or "").strip().splitlines()[0]
            SIZED[one] = frozenset(sized)
        return function

    return register


def pattern(
    operators: Iterable[object],
    notation: str,
    *,
    operands: str,
    macs: str = "",
    plus: str = "",
    at: str = "",
    sized: tuple[str, ...] = (),
    **known: str,
) -> None:
    """Register a notation.

    Args:
        operators: overloads, operators, or names such as ``"torchvision::nms"``.
        operands: the names of the tensor arguments, in the order of the notation.
        macs: the names whose dimensions multiply to the number of multiply-accumulates.
        plus: a tensor argument that is added, and broadcast, to the result.
        at: the argument that says how many dimensions ``*a`` has.
        sized: integer arguments that may change with the sizes.
        known: name of a dimension -> the argument that holds its size (``kernel_size.0``: the first of several).
    """

    def run(op: Op) -> Results:
        nodes = [value if isinstance(value := op[name], fx.Node) else None for name in operands.split()]
        sizes = {("*" + k[5:] if k.startswith("star_") else k): _number(op, v) for k, v in known.items()}
        if at:
            sizes["*a"] = op[at] % max(1, len(op.dims(op.inputs[0])))
        out = relate(op, notation, nodes, sizes, macs)
        names = op.node.meta["names"]
        op.expect({argument: names[k] for k, argument in known.items() if not k.startswith("star_")})
        if plus:
            out[0] = aligned(op, [out[0] or (), op.dims(op[plus])], op.shapes()[0] or ())
        return out

    for one in operators:
        RULES[one] = run, notation + (f"; {plus} is broadcast" if plus else "")
        SIZED[one] = frozenset(sized)


def _number(op: Op, argument: str) -> int:
    name, _, index = argument.partition(".")
    value = op[name][int(index)] if index else op[name]
    return len(value) if isinstance(value, list | tuple) else int(value)


def find_rule(target: Target) -> Rule:
    """The rule of an operator; one in place has that of the operator that returns a new tensor."""
    keys: list[object] = [target, target.overloadpacket, target._schema.name]
    namespace, _, base = target._schema.name.rpartition("::")
    in_place = namespace == "aten" and base.endswith("_")
    if isinstance(target, OpOverload) and in_place and (functional := getattr(aten, base[:-1], None)):
        keys += [getattr(functional, target._overloadname, None), functional]
    found = next((book[key] for book in (CUSTOM_RULES, RULES) for key in keys if key in book), None)
    if found is None:
        pointwise = any(torch.Tag.pointwise in getattr(key, "tags", ()) for key in keys)
        found = RULES["pointwise" if pointwise else "unknown"]
    return found[0]


def apply_rule(node: fx.Node, findings: Findings) -> None:
    """Give a node its dimensions, relating them to those of its inputs."""
    op = Op(node, findings)
    try:
        dims = find_rule(target_of(node))(op)
        wrong = [shape for axes, shape in zip(dims, op.shapes(), strict=True) if not _fits(axes, shape)]
        why = f"results of shapes {wrong}" if wrong else ""
    except ValueError as error:  # a Misfit, or axes of different sizes
        why = str(error)
    if why:
        dims = locked(op, f"no rule fits these shapes ({why})")
    node.meta["dims"] = dims[0] if isinstance(dims, list) and not isinstance(node.meta["shape"], list) else dims


def _fits(axes: Dims | None, shape: tuple[int, ...] | None) -> bool:
    if axes is None or shape is None:
        return not axes and shape is None
    return [axis.size for axis in axes] == list(shape)


def table() -> list[tuple[str, str]]:
    """The name of each operator, and its rule in one line."""
    known = {title(one): says for book in (RULES, CUSTOM_RULES) for one, (_, says) in book.items()}
    return sorted(known.items())


def title(target: object) -> str:
    """The name of an operation or of a class of modules."""
    return target.__qualname__ if isinstance(target, type) else str(target).replace("aten::", "").replace("aten.", "")


def locked(op: Op, why: str) -> Results:
    """Lock whatever an operation touches."""
    for node in op.inputs:
        for axis in op.dims(node):
            op.lock(axis, why)
    reason = op.reason(why)
    return [None if shape is None else tuple(channel(n, reason) for n in shape) for shape in op.shapes()]


# One line each: contractions ---------------------------------------------------------------------------------

pattern([aten.mm], "m k, k n -> m n", operands="self mat2", macs="m k n")
pattern([aten.bmm], "b m k, b k n -> b m n", operands="self mat2", macs="b m k n")
pattern([aten.mv], "m k, k -> m", operands="self vec", macs="m k")
pattern([aten.dot], "k, k -> ", operands="self tensor", macs="k")
pattern([aten.vdot], "k, k -> ", operands="self other", macs="k")
pattern([aten._grouped_mm], "m k, [e] k n, [e] -> m n", operands="self mat2 offs", macs="m k n")  # rows by expert
pattern([aten.addmm], "m k, k n -> m n", operands="mat1 mat2", plus="self", macs="m k n")
pattern([aten.baddbmm], "b m k, b k n -> b m n", operands="batch1 batch2", plus="self", macs="b m k n")
pattern([aten.addbmm], "b m k, b k n -> m n", operands="batch1 batch2", plus="self", macs="b m k n")
pattern([aten.addmv], "m k, k -> m", operands="mat vec", plus="self", macs="m k")
pattern([aten.addr], "m, n -> m n", operands="vec1 vec2", plus="self", macs="m n")
pattern([aten._trilinear], "b i, o i j, b j -> b o", operands="i1 i2 i3", macs="b o i j")  # as nn.Bilinear calls it
pattern([aten._cdist_forward], "*b m k, *b n k -> *b m n", operands="x1 x2", macs="*b m n k")

# Norms, and windows over positions -----------------------------------------------------------------------------

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
    [aten.pixel_unshuffle], "*b c (h p) (w q) -> *b (c p q) h w", operands="self", p="downscale_factor",
    q="downscale_factor",
)  # fmt: skip
pattern([aten.im2col], "*b c h w -> *b (c p q) l", operands="self", p="kernel_size.0", q="kernel_size.1")
pattern([aten.col2im], "*b (c p q) l -> *b c h w", operands="self", p="kernel_size.0", q="kernel_size.1")
pattern([aten.unfold], "*a [n] *b -> *a m *b k", operands="self", at="dimension")
pattern(
    [aten.max_pool2d_with_indices, aten.avg_pool2d, aten._adaptive_avg_pool2d, aten.adaptive_max_pool2d,
     aten.upsample_nearest2d, aten.upsample_bilinear2d, aten.upsample_bicubic2d, aten._upsample_nearest_exact2d,
     aten._upsample_bilinear2d_aa, aten._upsample_bicubic2d_aa, aten.reflection_pad2d, aten.replication_pad2d],
    "*b h w -> *b p q, *b p q", operands="self",
)  # fmt: skip
pattern(
    [aten.max_pool3d_with_indices, aten.avg_pool3d, aten._adaptive_avg_pool3d, aten.adaptive_max_pool3d,
     aten.upsample_nearest3d, aten.upsample_trilinear3d, aten._upsample_nearest_exact3d, aten.reflection_pad3d,
     aten.replication_pad3d],
    "*b d h w -> *b o p q, *b o p q", operands="self",
)  # fmt: skip
pattern(
    [aten.upsample_nearest1d, aten.upsample_linear1d, aten._upsample_nearest_exact1d, aten.reflection_pad1d,
     aten.replication_pad1d],
    "*b w -> *b q", operands="self",
)  # fmt: skip
pattern([aten.max_unpool2d], "*b h w, *b h w -> *b p q", operands="self indices")
pattern([aten.max_unpool3d], "*b d h w, *b d h w -> *b o p q", operands="self indices")
pattern([aten.fractional_max_pool2d], "b c h w, b c r -> b c p q, b c p q", operands="self random_samples")
pattern(
    [aten.grid_sampler_2d, aten.grid_sampler_3d, aten.cudnn_grid_sampler], "b c *s, b *t [x] -> b c *t",
    operands="input grid",
)  # fmt: skip
pattern([aten.affine_grid_generator], "b [i] [j] -> b *s x", operands="theta", sized=("size",))
pattern(
    ["torchvision::roi_align", "torchvision::roi_pool"], "b c h w, r [x] -> r c p q, r c p q", operands="input rois"
)
pattern(
    ["torchvision::ps_roi_align", "torchvision::ps_roi_pool"], "b (c p q) h w, r [x] -> r c p q, r c p q",
    operands="input rois", p="pooled_height", q="pooled_width",
)  # fmt: skip

# Positions ---------------------------------------------------------------------------------------------------------

pattern([aten.embedding], "v d, *i -> *i d", operands="weight indices", sized=("padding_idx",))
pattern([aten.embedding_renorm_], "[v] d, *i -> v d", operands="self indices")
pattern([aten._embedding_bag], "v d, [i], [b], i -> o d", operands="weight indices offsets per_sample_weights")
pattern([aten.index_select], "*a [n] *b, i -> *a i *b", operands="self index", at="dim")
pattern([aten.index_add, aten.index_copy], "*a [n] *b, [i], *a i *b -> *a n *b", operands="self index source", at="dim")
pattern([aten.index_fill], "*a [n] *b, i -> *a n *b", operands="self index", at="dim")
pattern([aten.tril, aten.triu], "*b [m] [n] -> *b m n", operands="self")
pattern([aten.bucketize], "*s, [n] -> *s", operands="self boundaries")
pattern([aten.searchsorted], "[n], *s -> *s", operands="sorted_sequence self")
pattern([aten.multinomial], "*b [n] -> *b k", operands="self")
pattern([aten._pack_padded_sequence], "[b] [t] *f, l -> n *f, s", operands="input lengths")
pattern([aten.view_as_real], "*s -> *s p", operands="self")
pattern([aten.view_as_complex], "*s [p] -> *s", operands="self")
pattern([aten.nonzero], "[*s] -> n d", operands="self")
pattern([aten.masked_select], "[*s], [*t] -> n", operands="self mask")
pattern(["torchvision::nms"], "[n] x, [n] -> k", operands="dets scores")


@rule(aten.convolution, sized=("groups",))
def convolution(op: Op) -> Results:
    """b (g i) *s, (g o) i *k, (g o) -> b (g o) *t; transposed: b (g i) *s, (g i) o *k, (g o) -> b (g o) *t"""
    operands, groups = [op["input"], op["weight"], op["bias"]], {"g": op["groups"]}
    weight, positions = ("(g i) o *k", "*s") if op["transposed"] else ("(g o) i *k", "*t")
    out = relate(op, f"b (g i) *s, {weight}, (g o) -> b (g o) *t", operands, groups, macs=f"b g i o *k {positions}")
    op.expect({"groups": op.node.meta["names"]["g"]})
    return out


@rule("torchvision::deform_conv2d")
def deformable_convolution(op: Op) -> Results:
    """b (g i) h w, (g o) i *k, b d p q, b m p q, (g o) -> b (g o) p q; blocks of inputs share an offset"""
    operands = [op[name] for name in ("input", "weight", "offset", "mask", "bias")]
    groups, blocks = op["groups"], op["offset_groups"]
    used = operands if op["use_mask"] else [*operands[:3], None, operands[4]]
    notation = "b (g i) h w, (g o) i *k, b [d] p q, b [m] p q, (g o) -> b (g o) p q"
    out = relate(op, notation, used, {"g": groups}, macs="b g i o *k p q")
    given = op.dims(operands[0])[1]
    op.unify(product([channel(blocks, op.reason(BY_POSITION)), channel(given.size // blocks)]), given)
    op.expect({"groups": op.node.meta["names"]["g"]})
    return out


# Operations that leave positions where they are ----------------------------------------------------------------


@rule("pointwise")
def pointwise(op: Op) -> Results:
    """every operation tagged pointwise: dimensions align from the right, size one is broadcast"""
    return [aligned(op, map(op.dims, op.inputs), shape or ()) for shape in op.shapes()]


@rule(
    aten.copy, aten.masked_fill, aten.fill, aten.rsub, aten._prelu_kernel, aten.hardswish, aten.log_sigmoid_forward,
    aten.rrelu_with_noise, aten.polar, aten.complex, aten._conj, aten._weight_norm_interface, aten.bernoulli,
    aten.uniform, aten.normal, aten.random, aten.exponential, aten.cauchy, aten.geometric, aten.log_normal,
    aten.leaky_relu,
)  # fmt: skip
def broadcasting(op: Op) -> Results:
    """like pointwise, though not tagged so"""
    return pointwise(op)


def aligned(op: Op, tensors: Iterable[Dims], shape: tuple[int, ...]) -> Dims:
    """The dimensions of a result of tensors that are broadcast."""
    out: list[Axis | None] = [None] * len(shape)
    for dims in tensors:
        for back, axis in enumerate(reversed(dims), start=1):
            position = len(out) - back
            if position < 0 or axis.size != shape[position]:
                continue
            known = out[position]
            if known is None:
                out[position] = axis
            else:
                op.unify(known, axis)
    return tuple(axis or op.fixed(n) for axis, n in zip(out, shape, strict=True))


@rule(
    aten.clone, aten.detach, aten._to_copy, aten.native_dropout, aten.zero, aten.empty_like,
    aten.zeros_like, aten.ones_like, aten.full_like, aten.rand_like, aten.randn_like, aten.randint_like, aten.renorm,
)  # fmt: skip
def unchanged(op: Op) -> Results:
    """the output has the dimensions of the input"""
    return [op.dims(op.inputs[0]) for _ in op.shapes()]


@rule(aten.as_strided_, sized=("size", "stride"))
def restride(op: Op) -> Results:
    """only where it changes the strides of dimensions of size one"""
    (source,) = op.inputs
    strides = [(n, stride) for n, stride in zip(op["size"], op["stride"], strict=True) if n != 1]
    if source.meta["shape"] == op.shapes()[0] and strides == [
        (n, s) for n, s in zip(*source.meta["layout"], strict=True) if n != 1
    ]:
        return [op.dims(source)]
    return unknown(op)


@rule(aten._softmax, aten._log_softmax, aten._safe_softmax)
def softmax(op: Op) -> Results:
    """the output has the dimensions of the input; a removed unit is left out of the sum"""
    return [op.dims(op["self"])]


# Reductions ----------------------------------------------------------------------------------------------------


def reduced(dim: int | Sequence[int] | None, ndim: int) -> set[int]:
    """The dimensions that a reduction works along: by default, and for an empty list, all."""
    listed = range(ndim) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    return {d % ndim for d in listed} if ndim else set()


@rule(
    aten.sum, aten.nansum, aten.mean, aten.prod, aten.amax, aten.amin, aten.aminmax, aten.max, aten.min, aten.any,
    aten.all, aten.var, aten.var_mean, aten.std, aten.std_mean, aten.logsumexp, aten.norm, aten.linalg_vector_norm,
    aten.count_nonzero,
)  # fmt: skip
def reduction(op: Op) -> Results:
    """reduced dimensions vanish (or have size one); a removed unit is left out"""
    return _without(op, _worked_along(op))


@rule(aten.max.dim, aten.min.dim)
def extreme(op: Op) -> Results:
    """a reduction; where the index is used, the dimension is identified by position"""
    indexed = any(user.target is operator.getitem and user.args[1] == 1 for user in op.node.users)
    return along(op) if indexed else reduction(op)


@rule(
    aten.select, aten.unbind, aten.flip, aten.roll, aten.rot90, aten.sort, aten.topk, aten.kthvalue, aten.median,
    aten.nanmedian, aten.mode, aten.argmax, aten.argmin, aten.cumsum, aten.cumprod, aten.cummax, aten.cummin,
    aten.logcumsumexp, aten._fft_r2c, aten._fft_c2r, aten._fft_c2c,
)  # fmt: skip
def along(op: Op) -> Results:
    """the dimensions worked along are identified by position; the others pass through"""
    for at in _worked_along(op):
        op.lock(op.dims(op["self"])[at], BY_POSITION)
    return _without(op, _worked_along(op))


def _worked_along(op: Op) -> set[int]:
    return reduced(op.arguments.get("dim", op.arguments.get("dims")), len(op.dims(op["self"])))


def _without(op: Op, gone: set[int]) -> list[Dims | None]:
    """The dimensions of the input, those at some positions gone, or new where a result has another size there."""
    dims = op.dims(op["self"])
    kept = tuple(axis for i, axis in enumerate(dims) if i not in gone)
    results: list[Dims | None] = []
    for shape in op.shapes():
        if shape is None or len(shape) < len(dims):
            results.append(None if shape is None else kept)
            continue
        changed = {i for i in gone if dims[i].size != shape[i]}
        results.append(tuple(op.fixed(shape[i]) if i in changed else axis for i, axis in enumerate(dims)))
    return results


@rule(aten.diagonal, aten.diagonal_copy)
def diagonal(op: Op) -> Results:
    """two dimensions that are identified by position become one at the end"""
    dims, shape = op.dims(op["self"]), op.shapes()[0] or ()
    gone = reduced([op["dim1"], op["dim2"]], len(dims))
    for at in gone:
        op.lock(dims[at], BY_POSITION)
    return [(*(axis for i, axis in enumerate(dims) if i not in gone), op.fixed(shape[-1]))]


@rule(aten.diag_embed)
def diagonal_matrix(op: Op) -> Results:
    """the last dimension becomes two that are the same; off the main diagonal it is identified by position"""
    dims = op.dims(op["self"])
    shape = op.shapes()[0] or ()
    if op["offset"]:
        op.lock(dims[-1], BY_POSITION)
    own = dims[-1] if not op["offset"] else op.fixed(shape[op["dim1"]])
    at = reduced([op["dim1"], op["dim2"]], len(shape))
    rest = iter(dims[:-1])
    return [tuple(own if place in at else next(rest) for place in range(len(shape)))]


@rule(aten.block_diag)
def block_diagonal(op: Op) -> Results:
    """blocks one after another in both dimensions, zeros beside them"""
    blocks = [(channel(1), channel(1), *op.dims(node))[-2:] for node in op["tensors"]]
    return [tuple(concat(block[place] for block in blocks) for place in (0, 1))]


# Indices -------------------------------------------------------------------------------------------------------


@rule(aten.index)
def index(op: Op) -> Results:
    """indexed dimensions are identified by position; in their place are those of the indices, broadcast"""
    shape = op.shapes()[0] or ()
    return [tuple(axis or op.fixed(n) for axis, n in zip(_indexed(op), shape, strict=True))]


@rule(aten.index_put)
def index_put(op: Op) -> Results:
    """indexed dimensions are identified by position; the others are those of the values, which are broadcast"""
    for axis, value in zip(_indexed(op)[::-1], op.dims(op["values"])[::-1], strict=False):
        if axis is None:
            op.lock(value, BY_POSITION)
        elif axis.size == value.size:
            op.unify(axis, value)
    return [op.dims(op["self"])]


def _indexed(op: Op) -> list[Axis | None]:
    """The dimensions of ``self[indices]``; None where a mask decides how many positions there are."""
    dims, at = op.dims(op["self"]), 0
    kept: list[Axis | None] = []
    starts: set[int] = set()
    found: list[tuple[Axis | None, ...]] = []
    for node in op["indices"]:
        if node is None:
            kept.append(dims[at])
            at += 1
            continue
        mask = node.meta["dtype"] in (torch.bool, torch.uint8)
        own = op.dims(node)
        span = len(own) if mask else 1
        for axis in (*dims[at : at + span], *(own if mask else ())):
            op.lock(axis, BY_POSITION)
        starts.add(len(kept))
        found.append((None,) if mask else own)
        at += span
    start = starts.pop() if len(starts) == 1 else 0  # indices that stand apart go first
    kept.extend(dims[at:])
    return [*kept[:start], *_broadcast(op, found), *kept[start:]]


def _broadcast(op: Op, tensors: list[tuple[Axis | None, ...]]) -> list[Axis | None]:
    """The dimensions of indices together; None where one of them is a mask."""
    out: list[Axis | None] = []
    for back in range(max(map(len, tensors)), 0, -1):
        met = [dims[-back] for dims in tensors if len(dims) >= back]
        axes = [axis for axis in met if axis is not None]
        largest = max(axes, key=lambda axis: axis.size, default=None)
        for axis in axes:
            if None in met:
                op.lock(axis, BY_POSITION)
            elif largest is not None and axis.size == largest.size:
                op.unify(axis, largest)
        out.append(None if None in met else largest)
    return out


@rule(aten.gather)
def gather(op: Op) -> Results:
    """the dimension gathered along is identified by position; the others are those of the index"""
    _pick(op, op.dims(op["index"]))
    return [op.dims(op["index"])]


@rule(aten.scatter, aten.scatter_add, aten.scatter_reduce)
def scatter(op: Op) -> Results:
    """the dimension scattered along is identified by position; the others are those of the index and the source"""
    _pick(op, op.dims(op["index"]))
    if isinstance(op.arguments.get("src"), fx.Node):
        _align_first(op, op.dims(op["src"]), op.dims(op["index"]), set())
    return [op.dims(op["self"])]


def _pick(op: Op, index: Dims) -> None:
    dims, at = op.dims(op["self"]), _worked_along(op)
    for i in at:
        op.lock(dims[i], BY_POSITION)
        op.lock(index[i], BY_POSITION)
    _align_first(op, dims, index, at)


def _align_first(op: Op, dims: Dims, index: Dims, without: set[int]) -> None:
    """Align an index with the first positions of a tensor: along any dimension it may be shorter."""
    for i, (axis, part) in enumerate(zip(dims, index, strict=True)):
        if i not in without:
            op.unify(cut(axis, part.size, op.reason("a cut goes through a unit"))[0], part)


def _replacing(op: Op, part: Dims) -> Results:
    for axis, other in zip(part, op.dims(op["src"]), strict=True):
        op.unify(axis, other)
    return [op.dims(op["self"])]


@rule(aten.slice_scatter, sized=("start", "end"))
def slice_scatter(op: Op) -> Results:
    """a slice of the first is the second"""
    return _replacing(op, slice_(op)[0] or ())


@rule(aten.select_scatter)
def select_scatter(op: Op) -> Results:
    """one position of the first is the second"""
    dims, gone = op.dims(op["self"]), _worked_along(op)
    along(op)
    return _replacing(op, tuple(axis for i, axis in enumerate(dims) if i not in gone))


# Views ---------------------------------------------------------------------------------------------------------


@rule(aten.view, aten._unsafe_view, aten._reshape_alias, sized=("size",))
def view(op: Op) -> Results:
    """blocks of equal size: their products are the same dimension"""
    shape = op.shapes()[0] or ()
    blocks_in, blocks_out = _between_empty(op.dims(op["self"])), _between_empty(op.all_fixed(shape))
    if [prod(axis.size for axis in block) for block in blocks_in] != [prod(a.size for a in b) for b in blocks_out]:
        return [op.all_fixed(shape)]  # only where there is nothing to see
    out = [_viewed(op, dims, [axis.size for axis in new]) for dims, new in zip(blocks_in, blocks_out, strict=True)]
    return [tuple(axis for block in out for axis in (op.fixed(0), *block))[1:]]


def _between_empty(dims: Iterable[Axis]) -> list[list[Axis]]:
    """Dimensions before, between and after those of size zero, which keep their place in a view."""
    blocks: list[list[Axis]] = [[]]
    for axis in dims:
        if axis.size:
            blocks[-1].append(axis)
        else:
            blocks.append([])
    return blocks


def _viewed(op: Op, dims: list[Axis], shape: list[int]) -> list[Axis]:
    """The new dimensions, each block of them made of the smallest block of old ones that has as many units.

    To align the products of all old and all new dimensions at once is not the same: it binds other channels, and where
    a view meets the locks of a channel shuffle (ShuffleNet), it locks others.
    """
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
    return out


@rule(aten.expand, sized=("size",))
def expand(op: Op) -> Results:
    """dimensions align from the right; a repeated one has units of its own, all alike"""
    shape, dims = op.shapes()[0] or (), op.dims(op["self"])
    padded = [None] * (len(shape) - len(dims)) + list(dims)
    return [
        tuple(
            axis if axis is not None and axis.size == n else channel(n) for axis, n in zip(padded, shape, strict=True)
        )
    ]


@rule(aten.permute, aten.transpose, aten.t)
def permute(op: Op) -> Results:
    """dimensions change places"""
    dims = op.dims(op["self"])
    if "dims" in op.arguments:
        return [tuple(dims[d] for d in op["dims"])]
    order = list(range(len(dims)))
    a, b = (op["dim0"], op["dim1"]) if "dim0" in op.arguments else (0, -1)
    if order:
        order[a], order[b] = order[b], order[a]
    return [tuple(dims[d] for d in order)]


@rule(aten.unsqueeze)
def unsqueeze(op: Op) -> Results:
    """a new dimension of size one"""
    dims = list(op.dims(op["self"]))
    dims.insert(op["dim"] % (len(dims) + 1), channel(1))
    return [tuple(dims)]


@rule(aten.squeeze)
def squeeze(op: Op) -> Results:
    """dimensions of size one vanish"""
    dims = op.dims(op["self"])
    gone = reduced(op.arguments.get("dim"), len(dims))
    return [tuple(axis for i, axis in enumerate(dims) if i not in gone or axis.size != 1)]


@rule(aten.cat)
def cat(op: Op) -> Results:
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
def stack(op: Op) -> Results:
    """a new dimension, one position for each tensor; the others are the same"""
    tensors = [op.dims(node) for node in op["tensors"]]
    for dims in tensors[1:]:
        for a, b in zip(tensors[0], dims, strict=True):
            op.unify(a, b)
    out = list(tensors[0])
    out.insert(op["dim"] % (len(out) + 1), op.fixed(len(tensors)))
    return [tuple(out)]


@rule(
    aten.split, aten.split_with_sizes, aten.unsafe_split,
    aten.unsafe_split_with_sizes, sized=("split_size", "split_sizes"),
)  # fmt: skip
def split(op: Op) -> Results:
    """consecutive parts; parts of equal size keep equal sizes, as chunk would make them"""
    dims = op.dims(op["self"])
    at, rest = op["dim"] % len(dims), dims[op["dim"]]
    out: Results = []
    parts: list[Axis] = []
    for shape in op.shapes():
        part, rest = cut(rest, (shape or ())[at], op.reason("a cut goes through a unit"))
        parts.append(part)
        out.append((*dims[:at], part, *dims[at + 1 :]))
    if "split_size" in op.arguments and len({find(part).size for part in parts}) == 1:
        op.findings.equate(parts, op.reason("parts of equal size are built differently"))
    return out


@rule(aten.slice, sized=("start", "end"))
def slice_(op: Op) -> Results:
    """a consecutive part; with a step that divides the size, one position in each block"""
    dims = op.dims(op["self"])
    at = op["dim"] % len(dims)
    axis, step = dims[at], op["step"]
    start, end, _ = slice(op["start"], op["end"], step).indices(axis.size)
    taken = len(range(start, end, step))
    if taken == axis.size:
        return [dims]
    if step == 1:
        before, rest = cut(axis, start, op.reason("a cut goes through a unit"))
        part = cut(rest, taken, op.reason("a cut goes through a unit"))[0]
    elif taken * step == axis.size:  # the positions within a block are distinct, the blocks are alike
        before, within, part = channel(start, op.reason(BY_POSITION)), channel(step), channel(taken)
        op.unify(product([part, within]), axis)
        op.lock(within, BY_POSITION)
    else:
        before, part = channel(start, op.reason(BY_POSITION)), op.fixed(taken)
        op.lock(axis, BY_POSITION)
    op.expect({"start": before})
    return [(*dims[:at], part, *dims[at + 1 :])]


@rule(aten.repeat, sized=("repeats",))
def repeat(op: Op) -> Results:
    """copies one after another: a product with the number of copies"""
    shape, dims = op.shapes()[0] or (), op.dims(op["self"])
    padded = [channel(1)] * (len(shape) - len(dims)) + list(dims)
    return [tuple(product([op.fixed(n // axis.size), axis]) for axis, n in zip(padded, shape, strict=True))]


@rule(aten.constant_pad_nd)
def constant_pad(op: Op) -> Results:
    """zeros before and after: a concatenation (a cut where the padding is negative)"""
    out = list(op.dims(op["self"]))
    for back, (before, after) in enumerate(zip(op["pad"][::2], op["pad"][1::2], strict=True), start=1):
        axis = cut(out[-back], -before)[1] if before < 0 else out[-back]
        axis = cut(axis, find(axis).size + after)[0] if after < 0 else axis
        out[-back] = concat([op.fixed(max(before, 0)), axis, op.fixed(max(after, 0))])
    return [tuple(out)]


@rule(aten.glu)
def glu(op: Op) -> Results:
    """two halves that are the same dimension"""
    dims = op.dims(op["self"])
    at = op["dim"] % len(dims)
    half, gate = cut(dims[at], dims[at].size // 2)
    op.unify(half, gate)
    return [(*dims[:at], half, *dims[at + 1 :])]


# Where tensors come from -----------------------------------------------------------------------------------------


@rule(
    aten.zeros, aten.ones, aten.full, aten.empty, aten.rand, aten.randn, aten.randint, aten.new_zeros, aten.new_ones,
    aten.new_full, aten.new_empty, aten.scalar_tensor, sized=("size",),
)  # fmt: skip
def filled(op: Op) -> Results:
    """every position is alike, so any may be removed, unless this constant, if not 0, is all that makes the units"""
    dims: Results = [tuple(channel(n) for n in shape or ()) for shape in op.shapes()]
    if "zeros" not in op.name and op.arguments.get("fill_value") != 0:  # as states are in the beginning
        reason = Edge(op.reason("a constant feeds this dimension, as an input would"))
        op.findings.note_constant([axis for one in dims for axis in one or ()], reason)
    return dims


@rule(
    aten.arange, aten.linspace, aten.logspace, aten.eye, aten.randperm, aten.tril_indices, aten.triu_indices,
)  # fmt: skip
def counted(op: Op) -> Results:
    """positions are counted, so units are identified by position"""
    return locked(op, BY_POSITION)


@rule("unknown")
def unknown(op: Op) -> Results:
    """an operation without a rule: whatever it touches is locked"""
    return locked(op, "the operation has no rule (add one with netsurgery.rule)")
