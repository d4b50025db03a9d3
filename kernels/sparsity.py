"""Hierarchical group sparse regularisation of a list of weights: the value, and its exact gradient.

    R(W) = sum over outer groups of (sum over the group's kernels of (norm of the kernel)^inner)^outer

``hgsr`` is the function to call; ``values``, ``add_gradient`` and ``outer_terms`` take a ``Layout`` and are what it is
made of. ``hgsr_cpu`` does the work or, on a GPU, ``hgsr_triton`` in one launch over all weights; ``hgsr_reference`` is
the meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from netsurgery.kernels.criteria import CRITERIA, Criterion, Name, accumulator, column_count, reading
from netsurgery.kernels.hgsr_reference import power
from netsurgery.kernels.layout import Layout, backend, parsed
from netsurgery.kernels.placed import PLAIN, Placed

__all__ = ["add_gradient", "hgsr", "outer_terms", "values"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def hgsr(
    weights: Sequence[Tensor],
    criterion: Name = "hierarchical_sq_group_l12",
    grouping: Literal["feature", "neuron"] | Sequence[Tensor] = "feature",
    *,
    groups: int | Sequence[int] = 1,
    transposed: bool | Sequence[bool] = False,
) -> Tensor:
    """The value of a criterion over a list of weights, differentiable once; the gradient is exact and never NaN.

    Args:
        weights: of linear layers ``(out, in)``, of convolutions ``(out, in / groups, *kernel)`` and of transposed ones
            ``(in, out / groups, *kernel)``; float16, bfloat16, float32 or float64, of any strides, on one device.
        criterion: one of the ten of ``CRITERIA``.
        grouping: "feature", an outer group for each input channel; "neuron", one for each output channel; or for each
            weight an int64 tensor ``(in,)`` with the outer group of each input channel, -1 for none.
        groups: of grouped convolutions, one number for all or one for each weight.
        transposed: which weights are of transposed convolutions, likewise.

    Returns:
        A scalar: float32 (float64 if a weight is), which sums are taken in. Where a kernel, or a group, is zero, the
        gradient is 0.

    Raises:
        ValueError: no such criterion or grouping, weights of wrong shape or type, or on several devices.

    Example:
        >>> import torch, netsurgery
        >>> weight = torch.tensor([[1.0, 4.0], [9.0, 16.0]], requires_grad=True)
        >>> netsurgery.kernels.hgsr([weight])
        tensor(52., grad_fn=<SelectBackward0>)

    Source: Mitsuno, Miyao, Kurita, arXiv 2004.04394: layers are summed, without normalisation by size.
    """
    weights = list(weights)
    many = len(weights)
    blocks = [groups] * many if isinstance(groups, int) else list(groups)
    turned = [transposed] * many if isinstance(transposed, bool) else list(transposed)
    if len(blocks) != many or len(turned) != many:
        raise ValueError(f"hgsr: {many} weights, but groups for {len(blocks)} and transposed for {len(turned)}")
    if isinstance(grouping, str) and grouping not in ("feature", "neuron"):
        raise ValueError(f"hgsr(grouping='{grouping}'): 'feature', 'neuron', or a tensor for each weight")
    for i, (weight, n) in enumerate(zip(weights, blocks, strict=True)):
        if weight.dim() < 2 or n < 1 or weight.shape[0] % n:
            raise ValueError(
                f"hgsr: weight {i} of shape {tuple(weight.shape)} in {n} groups: expected (out, in / groups, *kernel)"
            )
    kind = grouping if isinstance(grouping, str) else "feature"
    readings = tuple(reading(w.shape, kind, n, t) for w, n, t in zip(weights, blocks, turned, strict=True))
    layout = Layout(readings, (False,) * many)
    if not isinstance(grouping, str):
        layout = _indexed(layout, weights, grouping)
    return values(weights, layout, criterion)[0]


def _indexed(layout: Layout, weights: list[Tensor], grouping: Sequence[Tensor]) -> Layout:
    """The layout with the outer groups that tensors give."""
    sizes = [column_count(weight.shape, how) for weight, how in zip(weights, layout.readings, strict=True)]
    given = [tuple(one.shape) for one in grouping]
    if given != [(size,) for size in sizes]:
        raise ValueError(f"hgsr: the weights have {sizes} input channels, but grouping has shapes {given}")
    if not weights:
        return layout
    index = torch.cat([one.to(weights[0].device) for one in grouping])
    if index.is_floating_point() or index.is_complex() or bool((index < -1).any()):
        raise ValueError(
            "hgsr: grouping holds something else than the numbers of outer groups, from 0 up, and -1 for none"
        )
    return replace(layout, index=index.long(), groups=int(index.max()) + 1 if len(index) else 0)


def values(weights: Sequence[Tensor], layout: Layout, criterion: Name) -> Tensor:
    """The criterion and the sum of the absolute values that count: shape (2,), differentiable once."""
    _checked(weights, criterion)
    if not weights:
        return torch.zeros(2)
    if _sharded(weights):
        from netsurgery.kernels import sharded

        on_all_ranks: Tensor = sharded.values(weights, layout, criterion)
        return on_all_ranks
    layout = layout.to(weights[0].device)
    found: Tensor
    if _is_eager(weights):
        found = _Values.apply(layout, criterion, weights, *weights)
    else:
        found = _values(list(weights), layout.index, _groups(weights, layout), layout.key, criterion)[0]
    return found


def _is_eager(weights: Sequence[Tensor]) -> bool:
    """True if these are tensors with memory, and nothing records or transforms the operations."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
        and not weights[0].is_meta
        and _plain(weights)
    )


def _plain(weights: Sequence[Tensor]) -> bool:
    return isinstance(weights, Placed) or all(type(weight) in PLAIN for weight in weights)


class _Values(torch.autograd.Function):
    """The same as the operators below, with less overhead."""

    @staticmethod
    def forward(ctx: Any, layout: Layout, criterion: Name, listed: Sequence[Tensor], *weights: Tensor) -> Tensor:
        groups, rule = _groups(listed, layout), CRITERIA[criterion]
        found, slopes = backend(listed).value(listed, layout.readings, layout.index, groups, rule, layout.in_l1)
        ctx.layout, ctx.criterion = layout, criterion
        ctx.listed = listed if isinstance(listed, Placed) else None
        ctx.save_for_backward(slopes, *weights)
        ctx.set_materialize_grads(False)
        return found  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, scale: Tensor | None) -> tuple[Tensor | None, ...]:
        slopes, *weights = ctx.saved_tensors
        if scale is None:
            return None, None, None, *(None for _ in weights)
        layout, wanted = ctx.layout, list(ctx.needs_input_grad[3:])
        if torch.is_grad_enabled():  # through the operator, which has no derivative: a second one is an error, not zero
            grads = _gradient(weights, layout.index, slopes, scale, layout.key, ctx.criterion, wanted)
            return None, None, None, *(grad if want else None for grad, want in zip(grads, wanted, strict=True))
        if ctx.listed is not None and ctx.listed.still(weights):
            weights = ctx.listed
        outs = [torch.empty_like(weight) if want else None for weight, want in zip(weights, wanted, strict=True)]
        rule = CRITERIA[ctx.criterion]
        backend(weights).gradient(
            weights, layout.readings, layout.index, slopes, rule, layout.in_l1, scale, outs, False
        )
        return None, None, None, *outs


def outer_terms(weights: Sequence[Tensor], layout: Layout, criterion: Name) -> Tensor:
    """The term of each outer group in the criterion: shape (groups,); no gradient."""
    _checked(weights, criterion)
    layout, groups, rule = layout.to(weights[0].device), _groups(weights, layout), CRITERIA[criterion]
    weights = [weight.detach() for weight in weights]
    found, _ = backend(weights).sums(weights, layout.readings, layout.index, groups, rule, layout.in_l1)
    return power(found, rule.outer)


@torch.no_grad()
def add_gradient(
    weights: Sequence[Tensor], layout: Layout, criterion: Name, scale: Tensor, outs: Sequence[Tensor | None]
) -> Tensor:
    """Add the gradient to tensors in place, without autograd.

    Args:
        scale: shape (2,), on the weights' device: the factors of the criterion and of the sum of absolute values.
        outs: a tensor for each weight, of its shape, or None where it is not wanted.

    Returns:
        What ``values`` returns.
    """
    _checked(weights, criterion)
    if not weights:
        return torch.zeros(2)
    if _sharded(weights):
        from netsurgery.kernels import sharded

        return sharded.add_gradient(weights, layout, criterion, scale, outs)
    outs = _written(weights, outs)
    layout, groups, rule = layout.to(weights[0].device), _groups(weights, layout), CRITERIA[criterion]
    work = backend(weights)
    found: tuple[Tensor, Tensor] = work.value(weights, layout.readings, layout.index, groups, rule, layout.in_l1)
    work.gradient(weights, layout.readings, layout.index, found[1], rule, layout.in_l1, scale, outs, True)
    return found[0]


def _written(weights: Sequence[Tensor], outs: Sequence[Tensor | None]) -> Placed[Tensor | None]:
    """The tensors to add to; they are checked again only where their forms are others than the last time."""
    wrong = [i for i, out in enumerate(outs) if out is not None and out.layout != torch.strided]
    found = Placed(outs if not wrong else ())
    if not isinstance(weights, Placed) or weights.kept.get(_written) != found.forms:
        wrong += [i for i, out in enumerate(found) if out is not None and 0 in out.stride() and _overlaps(out)]
    if wrong:
        raise ValueError(
            f"hgsr: gradient {wrong[0]} is sparse, or expanded: make it dense with p.grad = p.grad.to_dense()"
        )
    if isinstance(weights, Placed):
        weights.kept[_written] = found.forms
    return found


def _overlaps(tensor: Tensor) -> bool:
    """True if one element of memory stands for several of a tensor."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _groups(weights: Sequence[Tensor], layout: Layout) -> int:
    """The number of outer groups."""
    if layout.index is not None or layout.groups:
        return layout.groups
    return sum(column_count(weight.shape, how) for weight, how in zip(weights, layout.readings, strict=True))


def _checked(weights: Sequence[Tensor], criterion: str) -> None:
    if criterion not in CRITERIA:
        raise ValueError(f"there is no criterion '{criterion}': choose one of {', '.join(CRITERIA)}")
    forward = not torch.compiler.is_compiling() and forward_ad._current_level >= 0
    if forward and any(forward_ad.unpack_dual(w).tangent is not None for w in weights):
        raise ValueError("hgsr: it has no forward-mode derivative: use backward")
    if isinstance(weights, Placed) and _checked in weights.kept:
        return
    for i, weight in enumerate(weights):
        if weight.dtype not in DTYPES or weight.layout != torch.strided:
            raise ValueError(
                f"hgsr: weight {i} is of {weight.dtype}, {weight.layout}: expected a dense tensor of "
                "float16, bfloat16, float32 or float64"
            )
    if len(devices := {weight.device for weight in weights}) > 1:
        raise ValueError(f"hgsr: weights on several devices ({', '.join(sorted(map(str, devices)))}): call it for each")
    if isinstance(weights, Placed):
        weights.kept[_checked] = True


def _sharded(weights: Sequence[Tensor]) -> bool:
    return not isinstance(weights, Placed) and any(
        type(one) not in PLAIN and getattr(one, "placements", None) is not None for one in weights
    )


# Two operators, so that torch.compile takes each as one step --------------------------------------------------------


# Their tables on the device outlive a call: a pool of torch.compile's CUDA graphs is no place for them.
@torch.library.custom_op("netsurgery::hgsr", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _values(
    weights: Sequence[Tensor], index: Tensor | None, groups: int, layout: Sequence[int], criterion: str
) -> tuple[Tensor, Tensor]:
    """(R, sum of absolute values), shape (2,); and the derivative of R by the sum of each outer group."""
    readings, in_l1 = parsed(tuple(layout))
    rule: Criterion = CRITERIA[criterion]  # type: ignore[index]
    found: tuple[Tensor, Tensor] = backend(weights).value(weights, readings, index, groups, rule, in_l1)
    return found


@torch.library.custom_op("netsurgery::hgsr_gradient", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _gradient(
    weights: Sequence[Tensor],
    index: Tensor | None,
    slopes: Tensor,
    scale: Tensor,
    layout: Sequence[int],
    criterion: str,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Gradients; an empty tensor for each weight whose gradient is not wanted."""
    readings, in_l1 = parsed(tuple(layout))
    rule: Criterion = CRITERIA[criterion]  # type: ignore[index]
    outs = [torch.empty_like(weight) if want else None for weight, want in zip(weights, wanted, strict=True)]
    backend(weights).gradient(weights, readings, index, slopes, rule, in_l1, scale, outs, False)
    return [weights[0].new_empty(0) if out is None else out for out in outs]


@_values.register_fake
def _(
    weights: Sequence[Tensor], index: Tensor | None, groups: int, layout: Sequence[int], criterion: str
) -> tuple[Tensor, Tensor]:
    dtype = accumulator(*weights)
    return weights[0].new_empty(2, dtype=dtype), weights[0].new_empty(groups, dtype=dtype)


@_gradient.register_fake
def _(
    weights: Sequence[Tensor],
    index: Tensor | None,
    slopes: Tensor,
    scale: Tensor,
    layout: Sequence[int],
    criterion: str,
    wanted: Sequence[bool],
) -> list[Tensor]:
    return [torch.empty_like(w) if want else w.new_empty(0) for w, want in zip(weights, wanted, strict=True)]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    weights, index, _, ctx.layout, ctx.criterion = inputs
    ctx.save_for_backward(index, output[1], *weights)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, scale: Tensor | None, _: Tensor | None) -> tuple[object, ...]:
    index, slopes, *weights = ctx.saved_tensors
    if scale is None:
        return None, None, None, None, None
    wanted = list(ctx.needs_input_grad[0])
    # The weights are not detached: a second derivative, of which there is none here, is then an error and not zero.
    grads = _gradient(weights, index, slopes, scale, ctx.layout, ctx.criterion, wanted)
    return [grad if want else None for grad, want in zip(grads, wanted, strict=True)], None, None, None, None


_values.register_autograd(_backward, setup_context=_remember)
