"""Silencing: every removed unit is zeroed in the result of each operation; statistics are taken over what stays."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from netsurgery.analysis.replay import Drawn, Numbers, draws, replay, units_in
from netsurgery.axes import Axis, find, leaves
from netsurgery.capture.inputs import Inputs
from netsurgery.capture.known_values import flat
from netsurgery.capture.program import Program
from netsurgery.notation import Operation

__all__ = ["STATISTICS", "entries", "is_view", "silenced"]

aten = torch.ops.aten

Arguments = dict[str, Any]  # of an operation, by name
Results = Mapping[Node, Any]  # of operations
Several = Tensor | Sequence[Tensor]
Normalised = Sequence[Tensor | None]  # what a norm returns: its output, and statistics where anything reads them


def _copied(value: object) -> object:
    """A result of an operation that later ones do not write to."""
    parts = [part.clone() if isinstance(part, Tensor) else part for part in flat(value)]
    return parts if isinstance(value, list | tuple) else parts[0]


def entries(masks: Sequence[Tensor]) -> Tensor:
    """True at the entries of a tensor that stay, from masks along each dimension; to be broadcast."""
    shaped = [one.reshape([-1 if i == dim else 1 for i in range(len(masks))]) for dim, one in enumerate(masks)]
    return functools.reduce(torch.logical_and, shaped)


def silenced(
    program: Program,
    tensors: Mapping[str, Tensor],
    inputs: Inputs,
    keep: Mapping[Axis, Tensor],
    numbers: Numbers | None = None,
    drawn: Drawn | None = None,
) -> list[Tensor]:
    """Outputs of the original network where every unit that is not in ``keep`` contributes nothing.

    The computation of a weight from others sees all units, so that the entries that stay keep their values.

    Args:
        keep: the units that stay, by channel.
        numbers: gets the floating-point numbers that decisions are taken from, with their nodes.
        drawn: gets the random numbers that each operation draws.
    """

    @functools.cache
    def mask(axis: Axis, whole: frozenset[Axis]) -> Tensor:
        if find(axis) is not axis:
            return mask(find(axis), whole)
        if not axis.op:
            stays = torch.zeros(axis.size, dtype=torch.bool)
            stays[units_in({} if axis in whole else keep)(axis)] = True
            return stays
        parts = [mask(term, whole) for term in axis.terms]
        if axis.op == "concat":
            return torch.cat(parts)
        return functools.reduce(lambda a, b: torch.kron(a.to(torch.uint8), b.to(torch.uint8)).bool(), parts)

    def stays(node: Node, dims: tuple[Axis, ...], device: torch.device) -> Tensor | None:
        """True at the entries that stay of a tensor which a node gives or takes; None where all do."""
        whole = frozenset(leaf for axis in node.meta.get("whole", ()) for leaf in leaves(axis))
        masks = [mask(axis, whole).to(device) for axis in dims]
        if all(bool(one.all()) for one in masks):
            return None
        return entries(masks)

    def silence(node: Node, values: Results, out: object) -> object:
        if drawn is not None and node.op == "call_function" and draws(node):
            drawn[node] = _copied(out)
        special = STATISTICS.get(getattr(node.target, "overloadpacket", None))
        if special is not None and "decided" not in node.meta:
            op = Operation(node)
            dims = op.dims(op["self"] if "self" in op.arguments else op["input"])
            kept = stays(node, dims, values[op.inputs[0]].device)
            if kept is not None:
                out = special(
                    {k: values.get(v, v) if isinstance(v, Node) else v for k, v in op.arguments.items()},
                    kept,
                )
        if isinstance(out, Tensor) and out.dim() and out.numel():
            kept = stays(node, node.meta["dims"], out.device)
            if kept is not None and not is_view(node):
                out = out.masked_fill_(~kept, 0) if _is_inplace(node) else out.masked_fill(~kept, 0)
        return out

    return replay(program, tensors, inputs, silence, numbers=numbers)


def _aliases(node: Node) -> list[bool]:
    """For each argument that the result shares memory with: True if it is written to."""
    schema = getattr(node.target, "_schema", None)
    return [argument.alias_info.is_write for argument in schema.arguments if argument.alias_info] if schema else []


def _is_inplace(node: Node) -> bool:
    return any(_aliases(node))


def is_view(node: Node) -> bool:
    """A view of silenced memory is silenced; only expand makes units of its own."""
    if node.target is operator.getitem:
        return is_view(node.all_input_nodes[0])
    expands = getattr(node.target, "overloadpacket", None) is aten.expand
    return bool(_aliases(node)) and not _is_inplace(node) and not expands


def _masked_mean(x: Tensor, stays: Tensor, dims: list[int]) -> Tensor:
    full = stays.expand_as(x)
    return (x * full).sum(dims, keepdim=True) / full.sum(dims, keepdim=True)


def _normalise(x: Tensor, stays: Tensor, dims: list[int], eps: float) -> Tensor:
    centred = x - _masked_mean(x, stays, dims)
    return centred * torch.rsqrt(_masked_mean(centred**2, stays, dims) + eps)


def _dims(arguments: Arguments) -> list[int]:
    ndim, dim = arguments["self"].dim(), arguments.get("dim")
    return list(range(ndim)) if dim is None or dim == [] else [dim] if isinstance(dim, int) else list(dim)


def _over_what_stays(operation: Callable[..., Several], vanish: bool, a: Arguments, stays: Tensor) -> Several:
    """Run an operation on the entries that stay alone; put its results where they belong, and zeros elsewhere.

    Args:
        vanish: whether the dimensions worked along vanish, or keep their size.
    """
    along = [[d for d in range(stays.dim()) if d != dim] for dim in range(stays.dim())]
    sizes = [int((stays.sum(others) > 0).sum()) if others else int(stays.sum()) for others in along]
    found = operation(**{**a, "self": a["self"].masked_select(stays).reshape(sizes)})
    places = stays.int().amax(_dims(a), a.get("keepdim", False)).bool() if vanish else stays
    results = [small.new_zeros(places.shape).masked_scatter(places, small) for small in _listed(found)]
    return results[0] if isinstance(found, Tensor) else results


def _listed(found: Several) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def _batch_norm(a: Arguments, stays: Tensor) -> Normalised:
    """In eval mode the statistics are given; otherwise they are taken here, as weight standardisation does."""
    x = a["input"]
    if not a["training"]:
        found: Normalised = aten.native_batch_norm(*a.values())
        return found
    out = torch.nan_to_num(_normalise(x, stays, [d for d in range(x.dim()) if d != 1], a["eps"]))
    return _scaled(out, a, [1, -1] + [1] * (x.dim() - 2))


def _layer_norm(a: Arguments, stays: Tensor) -> Normalised:
    x = a["input"]
    out = _normalise(x, stays, list(range(x.dim() - len(a["normalized_shape"]), x.dim())), a["eps"])
    return _scaled(out, a, a["normalized_shape"])


def _group_norm(a: Arguments, stays: Tensor) -> Normalised:
    x, blocks = a["input"], (a["N"], a["group"], -1)
    out = _normalise(x.reshape(blocks), stays.expand_as(x).reshape(blocks), [2], a["eps"])
    return _scaled(torch.nan_to_num(out).reshape(x.shape), a, [1, -1] + [1] * (x.dim() - 2))


def _scaled(out: Tensor, a: Arguments, shape: Sequence[int]) -> Normalised:
    """The outputs of a norm, from normalised entries and a scale and shift of a shape."""
    out = out if a["weight"] is None else out * a["weight"].reshape(shape)
    return [out if a["bias"] is None else out + a["bias"].reshape(shape), None, None]


STATISTICS: dict[object, Callable[[Arguments, Tensor], object]] = {
    **{
        one: functools.partial(_over_what_stays, one, True)
        for one in (
            aten.mean, aten.amax, aten.amin, aten.aminmax, aten.max, aten.min, aten.prod, aten.all, aten.var,
            aten.var_mean, aten.std, aten.std_mean, aten.logsumexp, aten.norm, aten.linalg_vector_norm,
        )
    },
    **{
        one: functools.partial(_over_what_stays, one, False)
        for one in (aten._softmax, aten._safe_softmax, aten._log_softmax)
    },
    aten.native_batch_norm: _batch_norm,
    aten.native_layer_norm: _layer_norm,
    aten.native_group_norm: _group_norm,
}  # fmt: skip
