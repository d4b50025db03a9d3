"""The hierarchical group sparse criteria in Triton: one launch over all weights for the value, one for the gradient.

``hgsr_kernels`` says how these work. Here a launch is planned: which weights go together, how their tiles lie, and what
of this is kept from step to step, also in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor

from netsurgery.kernels.criteria import Criterion, WeightView, accumulator, arranged, canonical, column_count
from netsurgery.kernels.hgsr_kernels import KIND, VECTOR, Tile, gradient_kernel, tile_fields, value_kernel
from netsurgery.kernels.hgsr_reference import finalize
from netsurgery.kernels.placed import Placed, widest

__all__ = ["gradient", "sums", "value"]


class Sizes(NamedTuple):
    """Tile sizes, in elements; small ones make small tests walk many tiles.

    Attributes:
        chunk: elements read by one program, about.
        unit: (slow, fast) sizes of a tile of neighbours.
        strided: the same, small: of each line fetched, elements wait in the cache for the rest of the window.
        window: elements of a tile of whole windows.
        wide: elements at a time in the last program.
    """

    chunk: int = 16384
    unit: tuple[int, int] = (8, 128)
    strided: tuple[int, int] = (2, 128)
    window: int = 1024
    wide: int = 1024


SIZES = Sizes()


class _Plan(NamedTuple):
    """One launch: a table of the weights of one dtype.

    Attributes:
        members: positions in the list, in the order of the table.
        spans: the columns of each.
        copied: members that are read through a copy, since their strides allow no canonical view.
        buffered: members whose gradients are written so.
        kinds: the fields of the kinds of tiles, as a kernel takes them.
        table: a row for each member, see ``hgsr_kernels.FIELDS``.
        owners: the row of each program.
        tiles: the number of tiles of columns.
        partials: elements of scratch memory for sums of chunks.
        counters: programs that have arrived, at the end and at each tile; zero between launches.
    """

    members: tuple[int, ...]
    spans: tuple[slice, ...]
    copied: frozenset[int]
    buffered: frozenset[int]
    kinds: dict[str, tuple[int, ...]]
    table: Tensor
    owners: Tensor
    tiles: int
    partials: int
    counters: Tensor


_T = TypeVar("_T")
_DTYPES = {
    torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64
}  # fmt: skip
_CACHE: dict[Hashable, dict[int, Any]] = {}  # what was made, by the stream that it was made on
_LIMIT = 256
# Tensors whose addresses graphs hold, by the memory of a weight that they read: without it none can be replayed.
_CAPTURED: WeakKeyDictionary[torch.UntypedStorage, dict[int, object]] = WeakKeyDictionary()
_CAPTURED_FOR_GOOD: list[object] = []  # for weights made within the capture, which each replay makes again


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _keep(made: object, weights: Sequence[Tensor]) -> None:
    """Keep what a graph uses as long as the weights' memory is there."""
    lasting = next((w for w in weights if isinstance(w, torch.nn.Parameter) or (w.is_leaf and w.requires_grad)), None)
    if lasting is None:
        _CAPTURED_FOR_GOOD.append(made)
    else:
        _CAPTURED.setdefault(lasting.untyped_storage(), {})[id(made)] = made


def _cached(key: Hashable, weights: Sequence[Tensor], make: Callable[[], _T]) -> _T:
    """The object of a key on the present stream. A graph may use an older one; it keeps those that it makes."""
    device = weights[0].device
    made = _CACHE.get(key, {})  # the one hash of a long key
    if _capturing(device):
        captured: _T = next(iter(made.values())) if made else make()
        _keep(captured, weights)
        return captured
    stream = _stream(device)
    if stream not in made:
        made = made | {stream: make()}
        _CACHE[key] = made
        for oldest in list(_CACHE)[:-_LIMIT]:
            _CACHE.pop(oldest, None)
    result: _T = made[stream]
    return result


def _upload(values: Tensor, weights: Sequence[Tensor]) -> Tensor:
    device = weights[0].device
    if device.type != "cuda":
        return values.to(device)
    pinned = values.pin_memory()
    if _capturing(device):
        _keep(pinned, weights)  # read at each replay
    return pinned.to(device, non_blocking=True)


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _strides(tensor: Tensor) -> list[int]:
    """Strides of a canonical tensor, 0 along axes of one element."""
    return [stride if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]


def _tile(sizes: Sequence[int], strides: Sequence[Sequence[int]], aligned: bool, writes: bool, tile: Sizes) -> Tile:
    """The kind of tile for a weight."""
    blocks, rows, columns, window = sizes
    across, along = strides[0][1], strides[0][2] if columns > 1 else strides[0][0]
    shorter = rows if across < along else blocks * columns
    by_rows = rows > 1 and (across < along or blocks * columns == 1)
    if shorter < 16 and rows > 1 and blocks * columns > 1:  # most threads of a tile would find nothing
        by_rows = rows > blocks * columns
    length, fast, others = (rows, 1, (0, 2, 3)) if by_rows else (columns, 2, (0, 1, 3))
    multiples = [length] + [each[axis] for each in strides for axis in others]
    unit = aligned and (by_rows or blocks == 1) and all(each[fast] == 1 for each in strides)
    if unit and all(number % VECTOR.value == 0 for number in multiples):
        return Tile(by_rows, True, *tile.unit, 1)
    depth = triton.next_power_of_2(window)
    if writes and 1 < depth <= tile.window // 8 and strides[0][3] < strides[0][fast]:
        return Tile(by_rows, False, 2, tile.window // (2 * depth), depth)
    return Tile(by_rows, False, *tile.strided, 1)


def _plan(
    members: Sequence[int], weights: Sequence[Tensor], readings: Sequence[WeightView], in_l1: Sequence[bool],
    outs: Sequence[Tensor | None] | None, firsts: Sequence[int], sizes: Sizes,
) -> _Plan:  # fmt: skip
    """The launch over some weights. It holds shapes and strides, but no addresses."""
    rows: list[list[int]] = []
    kinds: list[Tile] = []
    copied, buffered = set(), set()
    programs, tiles, partials, owned = 0, 0, 0, []
    for i in members:
        view = canonical(weights[i], readings[i])
        copied.update([] if _same_memory(view, weights[i]) else [i])
        strides, aligned = [_strides(view)], i in copied or weights[i].data_ptr() % 16 == 0
        if outs is not None and (out := outs[i]) is not None:
            target = canonical(out, readings[i])
            buffered.update([] if _same_memory(target, out) else [i])
            strides.append(_strides(target))
            aligned = aligned and (i in buffered or out.data_ptr() % 16 == 0)
        blocks, down, columns, window = view.shape
        kind = _tile(view.shape, strides, aligned, outs is not None, sizes)
        count, step = (kind.slow, kind.fast) if kind.by_rows else (kind.fast, kind.slow)
        chunk = step * max(1, sizes.chunk // (step * count * max(1, window)))
        chunks, across = max(1, triton.cdiv(down, chunk)), triton.cdiv(blocks * columns, count)
        kinds.append(kind)
        rows.append([
            0, columns, blocks * columns, down, window, chunk, chunks,
            int(in_l1[i]), firsts[i], programs, tiles, partials, *strides[0], *strides[-1],
        ])  # fmt: skip
        owned.append(chunks * across)
        programs, tiles = programs + chunks * across, tiles + across
        partials += across * chunks * (count + 1) if chunks > 1 else 0
    distinct = tuple(sorted(set(kinds)))  # the kernel is compiled for them, in this order
    for row, kind in zip(rows, kinds, strict=True):
        row[KIND.value] = distinct.index(kind)
    device = weights[members[0]].device
    spans = tuple(slice(firsts[i], firsts[i] + column_count(weights[i].shape, readings[i])) for i in members)
    owners = torch.arange(len(rows), dtype=torch.int32).repeat_interleave(torch.tensor(owned))
    return _Plan(
        tuple(members), spans, frozenset(copied), frozenset(buffered), tile_fields(distinct),
        _upload(torch.tensor(rows), weights), _upload(owners, weights), tiles, partials,
        torch.zeros(tiles + 1, dtype=torch.int32, device=device),
    )  # fmt: skip


def _plans(
    weights: Sequence[Tensor],
    readings: Sequence[WeightView],
    in_l1: Sequence[bool],
    outs: Sequence[Tensor | None] | None,
) -> list[_Plan]:
    """A launch for each dtype; and, where gradients are written, so that none is written twice in one."""
    device, targets = weights[0].device, weights if outs is None else outs
    layout: list[Hashable] = [
        (w.shape, w.stride(), w.dtype, w.data_ptr() % 16, how, once)
        for w, how, once in zip(weights, readings, in_l1, strict=True)
    ]
    rounds = [0] * len(weights)
    if outs is not None:
        seen: dict[int, int] = {}
        for i, out in enumerate(outs):
            if out is not None:
                rounds[i] = seen[out.data_ptr()] = seen.get(out.data_ptr(), -1) + 1
            layout.append(None if out is None else (out.stride(), out.dtype, out.data_ptr() % 16))

    def make() -> list[_Plan]:
        firsts, first = [], 0
        launches: dict[tuple[int, torch.dtype, torch.dtype], list[int]] = {}
        for i, (w, how) in enumerate(zip(weights, readings, strict=True)):
            firsts.append(first)
            count, target = column_count(w.shape, how), targets[i]
            first += count
            if target is not None and (count if outs is None else w.numel()):
                launches.setdefault((rounds[i], w.dtype, target.dtype), []).append(i)
        return [
            _plan(launches[key], weights, readings, in_l1, outs, firsts, SIZES)
            for key in sorted(launches, key=lambda key: key[0])
        ]

    return _cached((device, SIZES, tuple(rounds), *layout), weights, make)


class _Steady(NamedTuple):
    """Launches over weights that have not moved, each with the table of the addresses of its tensors.

    Attributes:
        readings, counted: for which they are.
        places, forms: of the gradients.
        apart: how each lies beside words of 16 bytes, if all lie in places of their own: then the plans hold for other
            places that are so, too.
        launches: a plan, and its table.
    """

    readings: Sequence[WeightView]
    in_l1: Sequence[bool]
    places: list[int]
    forms: object
    apart: list[int] | None
    launches: list[tuple[_Plan, Tensor | None]]


def _launches(
    weights: Sequence[Tensor],
    readings: Sequence[WeightView],
    in_l1: Sequence[bool],
    outs: Sequence[Tensor | None] | None,
) -> list[tuple[_Plan, Tensor | None]]:
    """Plans, and tables of addresses; no table where copies are read or written, since these move each time."""
    device = weights[0].device
    if not isinstance(weights, Placed) or _capturing(device):  # a graph keeps what it uses
        return [(plan, None) for plan in _plans(weights, readings, in_l1, outs)]
    goals: Placed[Any] = weights if outs is None else outs if isinstance(outs, Placed) else Placed(outs)
    key = _Steady, outs is None, SIZES, _stream(device)
    held: _Steady | None = weights.kept.get(key)
    if held is not None and (held.readings is not readings or held.in_l1 is not in_l1 or held.forms != goals.forms):
        held = None
    if held is None or held.places != goals.places:
        apart = [place % 16 for place in goals.places] if len(set(goals.places)) == len(goals) else None
        same = held is not None and held.apart == apart is not None
        plans = [plan for plan, _ in held.launches] if same else _plans(weights, readings, in_l1, outs)  # type: ignore[union-attr]
        launches: list[tuple[_Plan, Tensor | None]] = []
        for plan in plans:
            if plan.copied or plan.buffered:
                launches.append((plan, None))
                continue
            read = [weights[i] for i in plan.members]
            launches.append((plan, _pointers(weights, plan, read, [goals[i] for i in plan.members])))
        held = _Steady(readings, in_l1, goals.places, goals.forms, apart, launches)
        weights.kept[key] = held
    return held.launches


def _pointers(weights: Sequence[Tensor], plan: _Plan, read: Sequence[Tensor], written: Sequence[Tensor]) -> Tensor:
    """The table of the addresses of tensors."""
    numbers = [0] * (2 * len(read))
    numbers[::2], numbers[1::2] = map(Tensor.data_ptr, read), map(Tensor.data_ptr, written)
    key = plan.table.device, tuple(numbers)
    return _cached(key, weights, lambda: _upload(torch.tensor(numbers, dtype=torch.int64), weights))


def _members(weights: Sequence[Tensor], index: Tensor, groups: int, plan: _Plan) -> tuple[Tensor, ...]:
    """The columns of each group that the launch reads: ``order[starts[g]:starts[g + 1]]``."""

    def make() -> tuple[Tensor, Tensor, Tensor, _Plan]:
        own = torch.full_like(index, -1)
        for span in plan.spans:
            own[span] = index[span]
        order = torch.argsort(own, stable=True)
        starts = torch.searchsorted(own[order], torch.arange(groups + 1, device=index.device))
        return order, starts, index, plan  # the last two so that nothing else takes their addresses

    version = 0 if index.is_inference() else index._version
    key = (index.device, index.data_ptr(), index.stride(), version, groups, plan.table.data_ptr())
    return _cached(key, weights, make)[:2]


def _read(plan: _Plan, weights: Sequence[Tensor], readings: Sequence[WeightView]) -> list[Tensor]:
    return [canonical(weights[i], readings[i]).contiguous() if i in plan.copied else weights[i] for i in plan.members]


def _on(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _counters(plan: _Plan) -> Tensor:
    # A graph zeroes its own, whatever else runs while it is replayed.
    return torch.zeros_like(plan.counters) if _capturing(plan.counters.device) else plan.counters


def _reduce(
    weights: Sequence[Tensor], readings: Sequence[WeightView], index: Tensor | None, groups: int, rule: Criterion,
    in_l1: Sequence[bool], outer: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Values (2,), and slopes (groups,), or sums where outer is 0."""
    wide = widest(weights)
    device = weights[0].device if weights else torch.device("cpu") if index is None else index.device
    plans = _launches(weights, readings, in_l1, None) if weights else []
    if not plans:
        return torch.zeros(2, dtype=wide, device=device), torch.zeros(groups, dtype=wide, device=device)
    values = torch.empty(len(plans), 2, dtype=wide, device=device)
    result = torch.empty(1 if index is None else len(plans), groups, dtype=wide, device=device)
    for number, (plan, pointers) in enumerate(plans):
        first = weights[plan.members[0]]  # of a launch all are of its type
        dtype, narrow = first.dtype, accumulator(first)
        columns = 0 if index is None else len(index)
        scratch = torch.empty(plan.partials + 2 * plan.tiles + columns, dtype=narrow, device=device)
        partials, ends, sums = torch.split_with_sizes(scratch, [plan.partials, 2 * plan.tiles, columns])
        order, starts = (plan.owners, plan.owners) if index is None else _members(weights, index, groups, plan)
        if pointers is None:
            read = _read(plan, weights, readings)
            pointers = _pointers(weights, plan, read, read)
        with _on(device):
            value_kernel[(len(plan.owners),)](
                plan.table, plan.owners, pointers, partials, _counters(plan), ends, sums,
                order, starts, result[0 if index is None else number], values[number], plan.tiles, groups,
                DTYPE=_DTYPES[dtype], ACC=_DTYPES[narrow], NORM=rule.norm, POWER=rule.inner / rule.norm, OUTER=outer,
                INDEXED=index is not None, **plan.kinds, WIDE=SIZES.wide,
                MEMBERS=min(SIZES.wide, triton.next_power_of_2(max(1, columns // max(1, groups)))),
                enable_fp_fusion=True,
            )  # fmt: skip
    return (values[0] if len(values) == 1 else values.sum(0)), (result[0] if len(result) == 1 else result.sum(0))


def value(
    weights: Sequence[Tensor], readings: Sequence[WeightView], index: Tensor | None, groups: int, rule: Criterion,
    in_l1: Sequence[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The criterion and L1, and each group's slope.

    Args:
        index: shape (columns of all weights,), the group of each column, -1 for none; None: each its own.
        groups: the number of groups: of columns, where there is no index.
        counted: whether a weight counts in L1.

    Returns:
        ``sum over g of s_g^outer`` and the sum of absolute weights, shape (2,); and the derivative of the former in
        each s_g, 0 at 0, shape (groups,). In float32, or float64 if a weight is.
    """
    dtypes = weights.forms[2] if isinstance(weights, Placed) else [w.dtype for w in weights]
    if index is None or len(set(dtypes)) <= 1:
        return _reduce(weights, readings, index, groups, rule, in_l1, rule.outer)
    # A group may have columns of several launches.
    total, l1 = sums(weights, readings, index, groups, rule, in_l1)
    return finalize(total, l1, rule)


def sums(
    weights: Sequence[Tensor], readings: Sequence[WeightView], index: Tensor | None, groups: int, rule: Criterion,
    in_l1: Sequence[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Each group's sum, shape (groups,), and L1; arguments as ``value``."""
    values, result = _reduce(weights, readings, index, groups, rule, in_l1, 0)
    return result, values[1]


def gradient(
    weights: Sequence[Tensor], readings: Sequence[WeightView], index: Tensor | None, slopes: Tensor, rule: Criterion,
    in_l1: Sequence[bool], scale: Tensor, outs: Sequence[Tensor | None], accumulate: bool,
) -> None:  # fmt: skip
    """Writes ``scale[0] * slopes[group] * d norm^inner / dw + scale[1] * sign(w) * in_l1``, or adds it.

    Args:
        slopes: shape (groups,), as ``value`` returns them.
        scale: shape (2,), on the device of the weights.
        outs: written; each of its weight's shape, any strides; or None, where it is not wanted.
        accumulate: whether to add to what is there. A weight that stands twice is then written once after the other.
    """
    slopes, scale = slopes.contiguous(), scale.contiguous()  # the kernel knows no strides of these
    index = None if index is None else index.contiguous()
    for plan, pointers in _launches(weights, readings, in_l1, outs) if weights else []:
        copies: list[tuple[Tensor, WeightView, Tensor]] = []
        if pointers is None:
            read, written = _read(plan, weights, readings), []
            for i, out in ((i, out) for i in plan.members if (out := outs[i]) is not None):
                written.append(canonical(out, readings[i]).contiguous() if i in plan.buffered else out)
                copies += [(out, readings[i], written[-1])] if i in plan.buffered else []
            pointers = _pointers(weights, plan, read, written)
        first, target = weights[plan.members[0]], outs[plan.members[0]]  # of a launch all are of its types
        dtype, narrow = first.dtype, accumulator(first)
        assert target is not None  # a plan has no members whose gradient is not wanted
        with _on(scale.device):
            gradient_kernel[(len(plan.owners),)](
                plan.table, plan.owners, pointers, slopes,
                slopes if index is None else index, scale,
                DTYPE=_DTYPES[dtype], TARGET=_DTYPES[target.dtype], ACC=_DTYPES[narrow],
                NORM=rule.norm, POWER=rule.inner / rule.norm, INDEXED=index is not None, ACCUMULATE=accumulate,
                **plan.kinds, enable_fp_fusion=True,
            )  # fmt: skip
        for out, how, buffer in copies:
            view, _ = arranged(out, how)
            view.copy_(buffer.view(view.shape))
