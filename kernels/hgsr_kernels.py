# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""The Triton kernels of the hierarchical group sparse criteria; ``hgsr_triton`` launches them.

Plan. A weight is read as ``(blocks, rows, columns, window)`` (see ``criteria.canonical``); its ``blocks * columns``
are the outer groups' columns. A program takes a tile of columns and a chunk of their rows, and walks down the chunk. A
table in device memory says where each weight lies and which programs are its own.

Value: a program leaves its columns' sums in scratch memory; whoever arrives last at a tile of columns adds the chunks;
whoever arrives last of all adds the tiles, or, where there is an index, the columns of each group. Every sum has a
fixed order whoever does it, so the same weights give the same bits.

Gradient: programs are independent of each other: each reads its kernels once, and writes their gradient.

A tile has a fast axis, along which threads lie next to each other in memory. Its kind, per weight, is one of: along
columns or along rows; "unit", neighbours in memory and aligned, read in words of 16 bytes; strided; and, in the
gradient, "window", where the elements of a kernel are the neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl

__all__ = ["FIELDS", "FOLD", "KIND", "VECTOR", "Tile", "gradient_kernel", "tile_fields", "value_kernel"]

# A weight's row in the table. Strides, in elements, come in fours after it: blocks, rows, columns, window.
FIELDS = (
    "KIND",  # of its tiles, as a place among the kinds that the kernel is compiled for
    "BLOCK",  # columns of a block
    "COLUMNS",  # of all blocks
    "ROWS",
    "WINDOW",  # elements of a kernel
    "CHUNK",  # rows that a program reads
    "CHUNKS",  # programs for each tile of columns
    "COUNTED",  # whether it counts in L1
    "FIRST",  # its first column among those of all weights
    "PROGRAM",  # its first program
    "TILE",  # its first tile of columns
    "PARTIAL",  # where its partial sums begin
)
KIND, BLOCK, COLUMNS, ROWS, WINDOW, CHUNK, CHUNKS, COUNTED, FIRST, PROGRAM, TILE, PARTIAL = (
    tl.constexpr(i) for i in range(len(FIELDS))
)
READ = tl.constexpr(len(FIELDS))  # strides of the weight
WRITE = tl.constexpr(len(FIELDS) + 4)  # and of its gradient
WIDTH = tl.constexpr(len(FIELDS) + 8)
VECTOR = tl.constexpr(8)  # elements that strides and lengths of a "unit" tile are multiples of
FOLD = tl.constexpr(8)  # chunks added at a time


# Arguments whose alignment or size is no reason to compile anew.
_VARY = [
    "partials", "ends", "columns", "order", "starts", "out", "values", "tiles", "groups", "slopes", "index", "scale"
]  # fmt: skip


class Tile(NamedTuple):
    """A kind of tile, ``(slow, fast, depth)`` elements; all sizes are powers of 2.

    Attributes:
        by_rows: whether rows are the fast axis, else columns.
        unit: whether neighbours along the fast axis are neighbours in memory, and aligned.
        slow: elements along the other axis.
        fast: elements along the fast axis.
        depth: elements of a window.
    """

    by_rows: bool
    unit: bool
    slow: int
    fast: int
    depth: int


def tile_fields(kinds: Sequence[Tile]) -> dict[str, tuple[int, ...]]:
    """The constants of a kernel for some kinds of tiles: a tuple for each field, as not every Triton nests tuples."""
    return {name.upper(): tuple(int(getattr(kind, name)) for kind in kinds) for name in Tile._fields}


@triton.jit
def _root(x):
    """The root of x >= 0 and its inverse, 0 for 0 (also where the hardware takes a tiny x for 0)."""
    root = tl.sqrt(x)
    other = root != 0  # also NaN, which must not get lost
    return root, tl.where(other, 1.0 / tl.where(other, root, 1.0), 0.0)


@triton.jit
def _power(x, EXPONENT: tl.constexpr):
    """``x ** EXPONENT`` and its derivative, 0 at 0."""
    if EXPONENT == 0.5:
        root, inverse = _root(x)
        result, slope = root, 0.5 * inverse
    elif EXPONENT == 2:
        result, slope = x * x, 2.0 * x
    else:
        result, slope = x, tl.where(x != 0, x * 0.0 + 1.0, 0.0)
    return result, slope


@triton.jit
def _sign(x, ACC: tl.constexpr):
    return (x > 0).to(ACC) - (x < 0).to(ACC)


@triton.jit
def _place(entry, program, BY_ROWS: tl.constexpr, UNIT: tl.constexpr, COUNT: tl.constexpr):
    """The tile and chunk of a program, the columns of its tile, their mask, the begin and end of its rows."""
    local = (program - tl.load(entry + PROGRAM)).to(tl.int32)
    chunks = tl.load(entry + CHUNKS).to(tl.int32)
    tile, chunk = local // chunks, local % chunks
    columns = tile * COUNT + tl.arange(0, COUNT)
    length = tl.load(entry + COLUMNS).to(tl.int32)
    if UNIT and not BY_ROWS:
        length = tl.multiple_of(length, VECTOR)
    step = tl.load(entry + CHUNK).to(tl.int32)
    down = tl.load(entry + ROWS).to(tl.int32)
    if UNIT and BY_ROWS:
        step, down = tl.multiple_of(step, VECTOR), tl.multiple_of(down, VECTOR)
    begin = chunk * step
    end = tl.minimum(begin + step, down)
    return tile, chunk, columns, columns < length, begin, end


@triton.jit
def _stride(entry, FIELD: tl.constexpr, UNIT: tl.constexpr):
    stride = tl.load(entry + FIELD)
    if UNIT:
        stride = tl.multiple_of(stride, VECTOR)
    return stride


@triton.jit
def _pointer(pointers, number, WHICH: tl.constexpr, DTYPE: tl.constexpr, UNIT: tl.constexpr):
    pointer = tl.load(pointers + 2 * number + WHICH).to(tl.pointer_type(DTYPE))
    if UNIT:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _axis(x, FAST: tl.constexpr):
    """A vector as an axis of the tile ``(slow, fast, depth)``."""
    return x[None, :, None] if FAST else x[:, None, None]


@triton.jit
def _columns(entry, columns, STRIDES: tl.constexpr, BY_ROWS: tl.constexpr, UNIT: tl.constexpr):
    """The offsets of columns, in elements, as an axis of the tile."""
    if UNIT and not BY_ROWS:
        offsets = columns.to(tl.int64)
    else:
        block = tl.load(entry + BLOCK).to(tl.int32)
        offsets = (columns // block) * _stride(entry, STRIDES, UNIT)
        offsets += (columns % block) * _stride(entry, STRIDES + 2, UNIT)
    return _axis(offsets, not BY_ROWS)


@triton.jit
def _rows(entry, rows, STRIDES: tl.constexpr, BY_ROWS: tl.constexpr, UNIT: tl.constexpr):
    """The offsets of rows, in elements, as an axis of the tile."""
    offsets = rows.to(tl.int64) if UNIT and BY_ROWS else rows * _stride(entry, STRIDES + 1, UNIT)
    return _axis(offsets, BY_ROWS)


@triton.jit
def _raised(w, window, NORM: tl.constexpr, POWER: tl.constexpr):
    """The share of each element in q, where the kernel's term is q^POWER; a single element needs no square."""
    x = tl.abs(w)
    if NORM == 1:
        q = x
    elif POWER == 0.5:
        q = tl.where(window == 1, x, x * x)
    else:
        q = x * x
    return tl.sum(q, 2)


@triton.jit
def _term(q, window, NORM: tl.constexpr, POWER: tl.constexpr):
    """``q^POWER``, and its slope in sign(w), or in w where the norm is 2."""
    term, slope = _power(q, POWER)
    if NORM == 2:
        slope = 2.0 * slope
        if POWER == 0.5:
            term = tl.where(window == 1, q, term)
            slope = tl.where(window == 1, 1.0, slope)
    return term, slope


@triton.jit
def _visit(
    table, pointers, partials, counters, ends, out, number, program, tiles,
    DTYPE: tl.constexpr, ACC: tl.constexpr, NORM: tl.constexpr, POWER: tl.constexpr, OUTER: tl.constexpr,
    INDEXED: tl.constexpr, BY_ROWS: tl.constexpr, UNIT: tl.constexpr, SLOW: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """A program's sums; the tile's, where it is the last there; returns whether it is the last of all."""
    count: tl.constexpr = SLOW if BY_ROWS else FAST
    step: tl.constexpr = FAST if BY_ROWS else SLOW
    entry = table + number * WIDTH
    tile, chunk, columns, known, begin, end = _place(entry, program, BY_ROWS, UNIT, count)
    window = tl.load(entry + WINDOW).to(tl.int32)
    weight = _pointer(pointers, number, 0, DTYPE, UNIT) + _columns(entry, columns, READ, BY_ROWS, UNIT)
    stride = _stride(entry, READ + 3, UNIT)
    total = tl.zeros([SLOW, FAST], ACC)
    absolute = tl.zeros([SLOW, FAST], ACC)
    for row in range(begin, end, step):
        rows = row + tl.arange(0, step)
        here = weight + _rows(entry, rows, READ, BY_ROWS, UNIT)
        inside = _axis(known, not BY_ROWS) & _axis(rows < end, BY_ROWS)
        q = tl.zeros([SLOW, FAST], ACC)
        for k in range(window):
            w = tl.load(here + k * stride, mask=inside, other=0.0).to(ACC)
            q += _raised(w, window, NORM, POWER)
            if NORM == 2:
                absolute += tl.sum(tl.abs(w), 2)
        if NORM == 1:
            absolute += q
        total += _term(q, window, NORM, POWER)[0]
    sums = tl.sum(total, 1 if BY_ROWS else 0)
    l1 = tl.sum(tl.sum(absolute, 1), 0) * tl.load(entry + COUNTED).to(ACC)

    # The chunks of a tile: all add up in the same order, the last one's own not excepted.
    chunks = tl.load(entry + CHUNKS).to(tl.int32)
    place = tl.load(entry + TILE) + tile
    last = chunks == 1
    if chunks > 1:
        tile_partials = partials + tl.load(entry + PARTIAL) + tile.to(tl.int64) * chunks * (count + 1)
        tl.store(tile_partials + chunk * count + tl.arange(0, count), sums)
        tl.store(tile_partials + chunks * count + chunk, l1)
        tl.debug_barrier()
        last = tl.atomic_add(counters + 1 + place, 1, sem="acq_rel") == chunks - 1
        if last:
            sums = tl.zeros([count], ACC)
            parts = tl.zeros([FOLD], ACC)
            for c in range(0, chunks, FOLD):
                fold = c + tl.arange(0, FOLD)
                here = tile_partials + fold[:, None] * count + tl.arange(0, count)[None, :]
                sums += tl.sum(tl.load(here, mask=fold[:, None] < chunks, other=0.0, cache_modifier=".cg"), 0)
                here = tile_partials + chunks * count + fold
                parts += tl.load(here, mask=fold < chunks, other=0.0, cache_modifier=".cg")
            l1 = tl.sum(parts, 0)
            tl.store(counters + 1 + place, 0)

    final = tile < 0
    if last:
        if INDEXED or OUTER == 0:
            tl.store(out + tl.load(entry + FIRST) + columns, sums, mask=known)
            tl.store(ends + place, l1 * 0.0)
        else:
            term, slope = _power(sums, OUTER)
            tl.store(out + tl.load(entry + FIRST) + columns, slope, mask=known)
            tl.store(ends + place, tl.sum(tl.where(known, term, 0.0), 0))
        tl.store(ends + tiles + place, l1)
        tl.debug_barrier()
        final = tl.atomic_add(counters, 1, sem="acq_rel") == tiles - 1
    return final


@triton.jit(do_not_specialize=_VARY)
def value_kernel(
    table, owners, pointers, partials, counters, ends, columns, order, starts, out, values, tiles, groups,
    DTYPE: tl.constexpr, ACC: tl.constexpr, NORM: tl.constexpr, POWER: tl.constexpr, OUTER: tl.constexpr,
    INDEXED: tl.constexpr, BY_ROWS: tl.constexpr, UNIT: tl.constexpr, SLOW: tl.constexpr, FAST: tl.constexpr,
    DEPTH: tl.constexpr, WIDE: tl.constexpr, MEMBERS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    number = tl.load(owners + program)
    kind = tl.load(table + number * WIDTH + KIND)
    final = program < 0
    column_out = columns if INDEXED else out
    for i in tl.static_range(len(SLOW)):
        if kind == i:
            final = _visit(
                table, pointers, partials, counters, ends, column_out, number, program, tiles,
                DTYPE, ACC, NORM, POWER, OUTER, INDEXED, BY_ROWS[i], UNIT[i], SLOW[i], FAST[i],
            )  # fmt: skip
    if final:
        tl.store(counters, 0)
        total = tl.zeros([WIDE], ACC)
        absolute = tl.zeros([WIDE], ACC)
        for first in range(0, tiles, WIDE):
            here = first + tl.arange(0, WIDE)
            total += tl.load(ends + here, mask=here < tiles, other=0.0, cache_modifier=".cg")
            absolute += tl.load(ends + tiles + here, mask=here < tiles, other=0.0, cache_modifier=".cg")
        if INDEXED:
            total = _group_sums(columns, order, starts, out, groups, ACC, OUTER, WIDE, MEMBERS)
        tl.store(values, tl.sum(total, 0))
        tl.store(values + 1, tl.sum(absolute, 0))


@triton.jit
def _group_sums(
    columns, order, starts, out, groups, ACC: tl.constexpr, OUTER: tl.constexpr, WIDE: tl.constexpr,
    MEMBERS: tl.constexpr,
):  # fmt: skip
    """Writes each group's sum or slope, from its columns ``order[starts[g]:starts[g + 1]]``; returns the terms."""
    lanes: tl.constexpr = WIDE // MEMBERS
    total = tl.zeros([lanes], ACC)
    for first in range(0, groups, lanes):
        group = first + tl.arange(0, lanes)
        begin = tl.load(starts + group, mask=group < groups, other=0)
        length = (tl.load(starts + group + 1, mask=group < groups, other=0) - begin).to(tl.int32)
        parts = tl.zeros([lanes, MEMBERS], ACC)  # summed once, after the loop: within it Triton 3.6 cannot compile it
        for m in range(0, tl.max(length, 0), MEMBERS):
            member = (m + tl.arange(0, MEMBERS))[None, :]
            inside = member < length[:, None]
            column = tl.load(order + begin[:, None] + member, mask=inside, other=0)
            parts += tl.load(columns + column, mask=inside, other=0.0, cache_modifier=".cg")
        sums = tl.sum(parts, 1)
        if OUTER == 0:
            tl.store(out + group, sums, mask=group < groups)
        else:
            term, slope = _power(sums, OUTER)
            tl.store(out + group, slope, mask=group < groups)
            total += term
    return total


@triton.jit
def _write(
    entry, pointers, slopes, index, scale, number, program,
    DTYPE: tl.constexpr, TARGET: tl.constexpr, ACC: tl.constexpr, NORM: tl.constexpr, POWER: tl.constexpr,
    INDEXED: tl.constexpr, ACCUMULATE: tl.constexpr, BY_ROWS: tl.constexpr, UNIT: tl.constexpr, SLOW: tl.constexpr,
    FAST: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    step: tl.constexpr = FAST if BY_ROWS else SLOW
    _, _, columns, known, begin, end = _place(entry, program, BY_ROWS, UNIT, SLOW if BY_ROWS else FAST)
    window = tl.load(entry + WINDOW).to(tl.int32)
    group = tl.load(entry + FIRST) + columns
    grouped = known
    if INDEXED:
        group = tl.load(index + group, mask=known, other=-1)
        grouped = known & (group >= 0)
    slope = tl.load(slopes + group, mask=grouped, other=0.0).to(ACC) * tl.load(scale).to(ACC)
    level = tl.load(scale + 1).to(ACC) * tl.load(entry + COUNTED).to(ACC)
    source = _pointer(pointers, number, 0, DTYPE, UNIT) + _columns(entry, columns, READ, BY_ROWS, UNIT)
    target = _pointer(pointers, number, 1, TARGET, UNIT) + _columns(entry, columns, WRITE, BY_ROWS, UNIT)
    inward, outward = _stride(entry, READ + 3, UNIT), _stride(entry, WRITE + 3, UNIT)
    depth = tl.arange(0, DEPTH)[None, None, :]
    for row in range(begin, end, step):
        rows = row + tl.arange(0, step)
        inside = _axis(known, not BY_ROWS) & _axis(rows < end, BY_ROWS)
        part = inside & (depth < window) if DEPTH > 1 else inside
        read = source + _rows(entry, rows, READ, BY_ROWS, UNIT) + depth * inward
        write = target + _rows(entry, rows, WRITE, BY_ROWS, UNIT) + depth * outward
        # The numbers stay in registers, so that only a window deeper than the tile is read again, from the cache.
        w = tl.load(read, mask=part, other=0.0).to(ACC)
        q = _raised(w, window, NORM, POWER)
        if DEPTH == 1:
            for k in range(1, window):
                more = tl.load(read + k * inward, mask=inside, other=0.0).to(ACC)
                q += _raised(more, window, NORM, POWER)
        factor = tl.expand_dims(_term(q, window, NORM, POWER)[1], 2) * _axis(slope, not BY_ROWS)
        _add(write, w, factor, level, part, window, ACC, NORM, POWER, ACCUMULATE)
        if DEPTH == 1:
            for k in range(1, window):
                more = tl.load(read + k * inward, mask=inside, other=0.0).to(ACC)
                _add(write + k * outward, more, factor, level, inside, window, ACC, NORM, POWER, ACCUMULATE)


@triton.jit
def _add(
    write, w, factor, level, inside, window, ACC: tl.constexpr, NORM: tl.constexpr, POWER: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Stores, or adds, the gradient of elements whose kernel's factor is given."""
    sign = _sign(w, ACC)
    if NORM == 1:
        result = (factor + level) * sign
    elif POWER == 0.5:
        result = factor * tl.where(window == 1, sign, w) + level * sign
    else:
        result = factor * w + level * sign
    if ACCUMULATE:
        result += tl.load(write, mask=inside, other=0.0).to(ACC)
    tl.store(write, result.to(write.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_VARY)
def gradient_kernel(
    table, owners, pointers, slopes, index, scale,
    DTYPE: tl.constexpr, TARGET: tl.constexpr, ACC: tl.constexpr, NORM: tl.constexpr, POWER: tl.constexpr,
    INDEXED: tl.constexpr, ACCUMULATE: tl.constexpr, BY_ROWS: tl.constexpr, UNIT: tl.constexpr, SLOW: tl.constexpr,
    FAST: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    number = tl.load(owners + program)
    entry = table + number * WIDTH
    kind = tl.load(entry + KIND)
    for i in tl.static_range(len(SLOW)):
        if kind == i:
            _write(
                entry, pointers, slopes, index, scale, number, program,
                DTYPE, TARGET, ACC, NORM, POWER, INDEXED, ACCUMULATE, BY_ROWS[i], UNIT[i], SLOW[i], FAST[i], DEPTH[i],
            )  # fmt: skip
