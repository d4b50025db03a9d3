"""The results of ATen operations on tensors without data: frequent ones by shortcuts, the rest by torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from netsurgery.axes import Axis
from netsurgery.capture.inputs import Tree
from netsurgery.capture.operations import OpCall, Target

__all__ = ["empty_as", "infer"]

aten = torch.ops.aten


def infer(call: OpCall) -> Tree:
    """The result of an operation on meta tensors."""
    shortcut = _SHORTCUTS.get(call.target)
    plain = shortcut is not None and not call.kwargs and isinstance(call.args[0], Tensor | list)
    found = shortcut(*call.args) if shortcut is not None and plain else None
    return call.run() if found is None else found


def empty_as(node: fx.Node, sizes: Callable[[Axis], int]) -> Tensor:
    """A tensor without data for a recorded one, at other sizes: its dimensions lie in memory in the same order."""
    strides = node.meta["layout"][1]
    order = sorted(range(len(strides)), key=lambda dim: -strides[dim])
    shape = tuple(map(sizes, node.meta["dims"]))
    return torch.empty_permuted(shape, order, dtype=node.meta["dtype"], device="meta")


def _like(x: Tensor) -> Tensor:
    """A tensor of the same sizes, and the same strides where these leave no gaps."""
    if x.is_contiguous():
        return torch.empty(x.shape, dtype=x.dtype, device="meta")
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1 and stride != expected:
            return torch.empty_like(x)
        expected *= size
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int],
    transposed: bool, output_padding: list[int], groups: int,
) -> Tensor | None:  # fmt: skip
    """The output of a plain convolution, or None where torch should answer (or complain)."""
    n = weight.dim() - 2
    if (
        transposed
        or x.dtype != weight.dtype
        or x.dim() != n + 2
        or x.shape[1] != weight.shape[1] * groups
        or weight.shape[0] % groups
    ):
        return None
    if bias is not None and bias.shape[0] != weight.shape[0]:
        return None
    if n == 2 and not (x.is_contiguous() and weight.is_contiguous()):
        return None  # torch chooses the memory format
    shape = [x.shape[0], weight.shape[0]]
    for i in range(n):
        s, p, d = (v[i] if len(v) > 1 else v[0] for v in (stride, padding, dilation))
        shape.append((x.shape[i + 2] + 2 * p - d * (weight.shape[i + 2] - 1) - 1) // s + 1)
    return torch.empty(shape, dtype=x.dtype, device="meta") if min(shape) > 0 else None


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    training: bool,
    *_: float,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The outputs of a batch norm in eval mode; its saved statistics are empty, as on a CPU."""
    if (
        training
        or x.dtype.is_complex
        or any(t is not None and t.shape != x.shape[1:2] for t in (weight, bias, mean, var))
    ):
        return None
    return _like(x), torch.empty(0, device="meta"), torch.empty(0, device="meta")


def _pointwise(x: Tensor, *others: object) -> Tensor | None:
    """The output of a pointwise operation that keeps the dtype, where one argument has the shape of the result."""
    largest = x
    for other in others:
        if isinstance(other, Tensor):
            if other.dtype != x.dtype or other.dim() != x.dim():
                return None
            largest = other if other.numel() > largest.numel() else largest
        elif isinstance(other, complex):
            return None
    for one in (x, *others):
        if isinstance(one, Tensor) and not all(n in (1, m) for n, m in zip(one.shape, largest.shape, strict=True)):
            return None
    return _like(largest) if x.dtype.is_floating_point else None


def _in_place(x: Tensor, *others: object) -> Tensor | None:
    """The output of a pointwise operation in place."""
    return x if all(other.shape == x.shape for other in others if isinstance(other, Tensor)) else None


def _mean(x: Tensor, dim: list[int] | None = None, keepdim: bool = False) -> Tensor | None:
    if not dim or not x.dtype.is_floating_point:
        return None
    gone = {d % x.dim() for d in dim}
    shape = [1 if i in gone else n for i, n in enumerate(x.shape) if keepdim or i not in gone]
    return torch.empty(shape, dtype=x.dtype, device="meta")


def _layer_norm(
    x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, _: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    own = torch.Size(shape)
    if x.shape[x.dim() - len(shape) :] != own or any(t is not None and t.shape != own for t in (weight, bias)):
        return None
    statistics = torch.empty((*x.shape[: x.dim() - len(shape)], *[1] * len(shape)), dtype=x.dtype, device="meta")
    return torch.empty(x.shape, dtype=x.dtype, device="meta"), statistics, torch.empty_like(statistics)


def _addmm(bias: Tensor, a: Tensor, b: Tensor) -> Tensor | None:
    if bias.dim() != 1 or a.shape[1] != b.shape[0] or bias.shape[0] != b.shape[1] or a.dtype != b.dtype:
        return None
    return torch.empty((a.shape[0], b.shape[1]), dtype=a.dtype, device="meta")


def _resized(x: Tensor, size: list[int], *_: object) -> Tensor | None:
    if x.dim() != 4 or not x.is_contiguous() or min(*size, *x.shape) <= 0:
        return None
    return torch.empty((*x.shape[:2], *size), dtype=x.dtype, device="meta")


def _softmax(x: Tensor, dim: int, *_: object) -> Tensor | None:
    return _like(x) if x.dtype.is_floating_point and -x.dim() <= dim < x.dim() else None


def _mm(a: Tensor, b: Tensor) -> Tensor | None:
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0] or a.dtype != b.dtype:
        return None
    return torch.empty((a.shape[0], b.shape[1]), dtype=a.dtype, device="meta")


def _grouped_mm(rows: Tensor, weights: Tensor, offsets: Tensor | None = None, *others: object) -> Tensor | None:
    """The output of products of blocks of rows; without data some versions of torch take but one dtype."""
    if rows.dim() != 2 or weights.dim() != 3 or offsets is None or any(one is not None for one in others):
        return None
    if rows.shape[1] != weights.shape[1] or offsets.shape != weights.shape[:1] or rows.dtype != weights.dtype:
        return None
    return torch.empty((rows.shape[0], weights.shape[2]), dtype=rows.dtype, device="meta")


def _cat(tensors: list[Tensor], dim: int = 0) -> Tensor | None:
    """The output of a concatenation of contiguous tensors that are plainly not in the channels-last format."""
    first = tensors[0]
    plain = first.dim() not in (4, 5) or 1 not in first.shape[1:]
    if not plain or not -first.dim() <= dim < first.dim():
        return None
    shape = list(first.shape)
    shape[dim] = 0
    for one in tensors:
        others = list(one.shape)
        if one.dtype != first.dtype or one.dim() != first.dim() or not one.is_contiguous():
            return None
        shape[dim], others[dim] = shape[dim] + others[dim], shape[dim] + others[dim]
        if others != shape:
            return None
    return torch.empty(shape, dtype=first.dtype, device="meta")


_SHORTCUTS: dict[Target, Callable[..., Tree]] = {
    aten.convolution.default: _convolution,
    aten.native_batch_norm.default: _batch_norm,
    aten.native_layer_norm.default: _layer_norm,
    aten.addmm.default: _addmm,
    aten.mm.default: _mm,
    aten._grouped_mm.default: _grouped_mm,
    aten.cat.default: _cat,
    aten.mean.dim: _mean,
    aten._safe_softmax.default: _softmax,
    **dict.fromkeys(
        [aten.upsample_bilinear2d.default, aten.upsample_bicubic2d.default, aten.upsample_nearest2d.default], _resized
    ),
    **dict.fromkeys(
        [aten.relu_.default, aten.silu_.default, aten.hardtanh_.default, aten.hardswish_.default, aten.sigmoid_.default,
         aten.tanh_.default, aten.add_.Tensor, aten.mul_.Tensor],
        _in_place,
    ),
    **dict.fromkeys(
        [aten.relu.default, aten.silu.default, aten.gelu.default, aten.sigmoid.default, aten.hardsigmoid.default,
         aten.hardswish.default, aten.tanh.default, aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.div.Tensor,
         aten.mul.Scalar, aten.add.Scalar, aten.div.Scalar, aten.pow.Tensor_Scalar, aten.rsqrt.default,
         aten.neg.default],
        _pointwise,
    ),
}  # fmt: skip
