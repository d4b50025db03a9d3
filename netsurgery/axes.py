"""The algebra of dimensions: every axis of every tensor is an expression over channels.

    Channel(n)            n units that live or die together everywhere they appear
    Product(a, b, ...)    row-major product, as reshape, flatten and head-split make
    Concat(a, b, ...)     ordered concatenation, as cat makes and split reads

``unify`` states that two axes index the same units. A channel that meets an expression becomes that expression;
two expressions are aligned factor by factor or part by part; channels that cannot be aligned are locked with a reason.
All of it is exact: a channel is only ever refined, coupled or locked, never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from math import prod

__all__ = [
    "Axis",
    "Dims",
    "Edge",
    "Fixed",
    "axes_in",
    "channel",
    "concat",
    "cut",
    "equate",
    "find",
    "inner",
    "leaves",
    "leaves_in",
    "lock",
    "product",
    "resolve",
    "share_with",
    "unify",
]


class Axis:
    """One expression: a channel while ``op`` is empty, else the product or concatenation of ``terms``."""

    __slots__ = ("bound", "locked", "op", "size", "terms")

    def __init__(self, size: int, op: str = "", terms: tuple[Axis, ...] = (), locked: str | None = None):
        self.size = size
        self.op = op
        self.terms = terms
        self.locked = locked  # only meaningful on a channel
        self.bound: Axis | None = None  # the axis that a channel has become

    def __repr__(self) -> str:
        axis = find(self)
        if axis.op:
            return "(" + {"product": " ", "concat": " + "}[axis.op].join(map(repr, axis.terms)) + ")"
        return f"{axis.size}{'!' if axis.locked else ''}"


Dims = tuple[Axis, ...]  # the dimensions of a tensor


class Fixed(str):
    """The reason to lock a dimension that never held units: batch, space, time, windows."""


class Edge(str):
    """The reason to lock a dimension of a network's inputs or outputs. One that constants feed counts as an input."""


Meet = Callable[["Axis", "Axis"], None]  # called with a channel and the axis that it is to become


def channel(size: int, locked: str | None = None) -> Axis:
    """A new channel of ``size`` units; ``locked`` says why none may be removed, if so."""
    return Axis(size, locked=locked)


def find(axis: Axis) -> Axis:
    """The axis that ``axis`` has become; itself while it is bound to none."""
    while axis.bound is not None:
        if axis.bound.bound is not None:
            axis.bound = axis.bound.bound
        axis = axis.bound
    return axis


def product(factors: Iterable[Axis]) -> Axis:
    """Row-major product; factors of size one vanish."""
    flat: list[Axis] = []
    for factor in map(find, factors):
        flat.extend(map(find, factor.terms) if factor.op == "product" else [factor] if factor.size != 1 else [])
    if len(flat) == 1:
        return flat[0]
    return Axis(prod(f.size for f in flat), "product", tuple(flat)) if flat else channel(1)


def concat(parts: Iterable[Axis]) -> Axis:
    """Ordered concatenation; parts of size zero vanish."""
    flat: list[Axis] = []
    for part in map(find, parts):
        flat.extend(part.terms if part.op == "concat" else [part] if part.size else [])
    if len(flat) == 1:
        return flat[0]
    return Axis(sum(p.size for p in flat), "concat", tuple(flat)) if flat else channel(0)


def leaves(axis: Axis) -> Iterator[Axis]:
    """The channels of an axis from left to right (a channel may come twice)."""
    axis = find(axis)
    if axis.op:
        for term in axis.terms:
            yield from leaves(term)
    else:
        yield axis


def axes_in(dims: Dims | Sequence[Dims | None] | Axis | None) -> list[Axis]:
    """All axes in the dimensions of one tensor, or of several."""
    return [dims] if isinstance(dims, Axis) else [axis for item in dims or () for axis in axes_in(item)]


def leaves_in(dims: Dims | Sequence[Dims | None] | None) -> list[Axis]:
    """The channels in the dimensions of one tensor, or of several, each as often as it occurs."""
    return [leaf for axis in axes_in(dims) for leaf in leaves(axis)]


def inner(leaf: Axis) -> bool:
    """True if a channel, locked or not, has several units of the network's own: no positions, inputs or outputs."""
    return leaf.size > 1 and not isinstance(leaf.locked, Fixed | Edge)


def lock(axis: Axis, reason: str) -> None:
    """Forbid removal in every channel of ``axis``; the first reason stays."""
    for leaf in leaves(axis):
        if leaf.locked is None:
            leaf.locked = reason


def _bind(leaf: Axis, axis: Axis) -> None:
    if leaf.locked is not None:
        lock(axis, leaf.locked)
    leaf.bound = axis


def _parts(axis: Axis) -> list[Axis]:
    axis = find(axis)
    return list(axis.terms) if axis.op == "concat" else [axis]


def cut(axis: Axis, at: int, reason: str = "a cut goes through a unit") -> tuple[Axis, Axis]:
    """Split an axis in two at a position. A unit that the cut goes through is locked for ``reason``."""
    axis = find(axis)
    if at <= 0 or at >= axis.size:
        empty = channel(0)
        return (empty, axis) if at <= 0 else (axis, empty)
    if axis.op == "concat":
        for index, part in enumerate(axis.terms):
            if at < part.size:
                left, right = cut(part, at, reason)
                return concat([*axis.terms[:index], left]), concat([right, *axis.terms[index + 1 :]])
            at -= part.size
    if axis.op == "product":
        first, rest = axis.terms[0], product(axis.terms[1:])
        whole, within = divmod(at, rest.size)
        before, after = cut(first, whole, reason)
        if not within:
            return product([before, rest]), product([after, rest])
        between, after = cut(after, 1, reason)
        lock(between, reason)
        left, right = cut(rest, within, reason)
        return concat([product([before, rest]), left]), concat([right, product([after, rest])])
    left, right = channel(at), channel(axis.size - at)
    _bind(axis, concat([left, right]))
    return left, right


def _factor(axis: Axis, inner: int) -> tuple[Axis, Axis] | None:
    """Write an axis as a product whose last factor has size ``inner``, or None where that is impossible."""
    axis = find(axis)
    if axis.size == inner:
        return channel(1), axis
    if axis.size % inner or axis.op == "product":
        return None
    if axis.op == "concat":
        if any(part.size % inner for part in axis.terms):
            return None
        pairs = [_factor(part, inner) for part in axis.terms]
        whole = [pair for pair in pairs if pair is not None]
        if len(whole) < len(pairs):
            return None
        for _, last in whole[1:]:
            unify(whole[0][1], last)
        return concat(outer for outer, _ in whole), whole[0][1]
    outer, last = channel(axis.size // inner), channel(inner)
    _bind(axis, product([outer, last]))
    return outer, last


def _pop(factors: list[Axis]) -> Axis:
    while (last := find(factors.pop())).op == "product":
        factors.extend(last.terms)
    return last


def _align_products(a: Axis, b: Axis, reason: str, meet: Meet) -> None:
    left, right = list(a.terms), list(b.terms)
    while left and right:
        x, y = _pop(left), _pop(right)
        small, large = (left, right) if x.size < y.size else (right, left)
        x, y = (x, y) if x.size < y.size else (y, x)
        while x.size != y.size:
            if pair := _factor(y, x.size):
                large.append(pair[0])
                y = pair[1]
            else:  # no common refinement here: widen the smaller block by its next factor
                x = product([_pop(small), x])
                if x.size > y.size:
                    x, y, small, large = y, x, large, small
        if find(x).op == "product" and find(y).op == "product" and find(x) is not find(y):
            lock(x, reason)
            lock(y, reason)
        else:
            unify(x, y, reason, meet)


def unify(a: Axis, b: Axis, reason: str = "the sizes do not align", meet: Meet = _bind) -> None:
    """State that two axes of equal size index the same units.

    Args:
        reason: the reason to lock channels that cannot be aligned.
        meet: called with a channel and the axis that it is to be; by default the channel becomes that axis.

    Raises:
        ValueError: the sizes differ.
    """
    a, b = find(a), find(b)
    if a is b:
        return
    if a.size != b.size:
        raise ValueError(f"axes of {a.size} and {b.size} units cannot be the same")
    if not a.op:
        meet(a, b)
    elif not b.op:
        meet(b, a)
    elif a.op == b.op == "product":
        _align_products(a, b, reason, meet)
    else:
        left, right = _parts(a)[::-1], _parts(b)[::-1]
        while left:
            x, y = left.pop(), right.pop()
            n = min(find(x).size, find(y).size)
            for rest, axis in ((left, x), (right, y)):
                if find(axis).size > n:
                    rest.append(cut(axis, n, reason)[1])
            unify(cut(x, n, reason)[0], cut(y, n, reason)[0], reason, meet)


def equate(a: Axis, b: Axis, reason: str) -> list[tuple[Axis, Axis]]:
    """State that two axes keep equal sizes, though their units differ.

    The finer structure of one is imposed on the other. Axes whose channels still differ in size are locked.

    Returns:
        The pairs of channels that must keep equal sizes.
    """
    if find(a) is find(b):
        return []
    live = [
        [part for part in _parts(axis) if any(leaf.locked is None and leaf.size > 1 for leaf in leaves(part))]
        for axis in (a, b)
    ]
    first, second = map(concat, live)
    if first.size != second.size:
        lock(a, reason)
        lock(b, reason)
    if first.size != second.size or not first.size:
        return []
    pairs: list[tuple[Axis, Axis]] = []

    def meet(leaf: Axis, axis: Axis) -> None:
        copies = {other: channel(other.size) for other in leaves(axis)}
        if axis.op:
            _bind(leaf, _renamed(axis, copies))
            pairs.extend(copies.items())
        else:
            pairs.append((leaf, axis))

    unify(first, second, reason, meet)
    for x, y in pairs:
        for one, other in ((x, y), (y, x)):
            if one.locked is not None:
                lock(other, one.locked)
    return pairs


def _renamed(axis: Axis, names: dict[Axis, Axis]) -> Axis:
    axis = find(axis)
    if not axis.op:
        return names[axis]
    terms = [_renamed(term, names) for term in axis.terms]
    return product(terms) if axis.op == "product" else concat(terms)


def resolve(axis: Axis, memo: dict[Axis, Axis]) -> Axis:
    """The axis with every channel replaced by the axis that it has become; equal channels are the same object."""
    axis = find(axis)
    if axis not in memo:
        if axis.op:
            terms = [resolve(term, memo) for term in axis.terms]
            memo[axis] = product(terms) if axis.op == "product" else concat(terms)
        else:
            memo[axis] = axis
    return memo[axis]


def share_with(axis: Axis, channels: Container[Axis]) -> float:
    """The share of an axis's positions that hold units of some channels; one factor of a product is enough."""
    axis = find(axis)
    if not axis.op:
        return float(axis in channels)
    parts = [share_with(term, channels) for term in axis.terms]
    if axis.op == "product":
        return 1 - prod(1 - part for part in parts)
    return sum(part * term.size for part, term in zip(parts, axis.terms, strict=True)) / axis.size
