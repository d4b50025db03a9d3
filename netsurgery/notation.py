"""A notation for the dimensions of an operation's arguments and results; it reads like einops.

    name      a dimension: the same name is the same dimension
    *name     any number of dimensions
    (g c)     a product: g blocks of c
    [name]    a dimension whose units are identified by position (indexed, sorted, rolled): locked; so is [*name]

``"b (g i) *s, (g o) i *k, (g o) -> b (g o) *t"`` is a convolution with groups: operands stand left of the arrow,
results right of it. A name that only one operand has, and no result, is worked across (a window, a kernel) and is
locked; a name that only a result has is new and holds no channel. Roles follow from this: a parameter's dimension is
consumed if the result lacks it, produced if only parameters have it, and carried along if inputs have it, too.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from math import prod
from typing import NamedTuple, Protocol

from torch import fx

from netsurgery.axes import Axis, Dims, Fixed, channel, lock, product, unify
from netsurgery.capture.inputs import Kwargs, Tree
from netsurgery.capture.operations import target_of
from netsurgery.capture.source_locations import format_where

__all__ = [
    "BY_POSITION",
    "Dims",
    "Findings",
    "Misfit",
    "Op",
    "Operation",
    "Results",
    "names_in",
    "parse",
    "relate",
    "results",
]

Results = list[Dims | None]  # the dimensions of each result of an operation; None for one that is no tensor

BY_POSITION = "units are identified by position"


class Misfit(ValueError):
    """Dimensions that a notation does not fit."""


class Operation:
    """A recorded operation: its arguments by name, and the dimensions that its inputs have."""

    def __init__(self, node: fx.Node):
        self.node = node
        self.schema = target_of(node)._schema
        self.name = self.schema.name.replace("::", ".")

    @functools.cached_property
    def arguments(self) -> Kwargs:
        """The arguments by name, defaults included."""
        schema = self.schema.arguments
        values = dict(zip((a.name for a in schema), self.node.args, strict=False))
        return {a.name: values.get(a.name, self.node.kwargs.get(a.name, a.default_value)) for a in schema}

    def __getitem__(self, name: str) -> Tree:
        return self.arguments[name]

    @property
    def inputs(self) -> list[fx.Node]:
        """Tensor arguments in order, lists flattened."""
        return self.node.all_input_nodes

    def dims(self, node: fx.Node) -> Dims:
        """The dimensions of an argument."""
        return node.meta["dims"]  # type: ignore[no-any-return]

    def shapes(self) -> list[tuple[int, ...] | None]:
        """The shape of each result."""
        shape = self.node.meta["shape"]
        return shape if isinstance(shape, list) else [shape]

    @functools.cached_property
    def location(self) -> str:
        """The operation, the module and the line, such as ``aten.topk in experts at model.py:12``."""
        module = f" in {self.node.meta['module']}" if self.node.meta["module"] else ""
        return f"{self.name}{module} {format_where(self.node.meta['where'])}".rstrip()

    def reason(self, why: str) -> str:
        """A reason to lock, with the operation, the module and the line."""
        return f"{why}: {self.location}"


class Findings(Protocol):
    """Facts that rules state beside the dimensions of results; ``netsurgery.analysis.network`` collects them."""

    def note_role(self, node: fx.Node, source: Axis, axis: Axis, role: str) -> None:
        """A parameter that ``node`` comes from has ``axis`` in its dimension ``source``, in this role."""

    def note_constant(self, dims: Iterable[Axis], reason: str) -> None:
        """A tensor with these dimensions is not learned."""

    def equate(self, parts: list[Axis], reason: str) -> None:
        """The parts must keep equal sizes."""


class Op(Operation):
    """One recorded operation while its rule looks at it: the rule relates, locks and makes dimensions."""

    def __init__(self, node: fx.Node, findings: Findings):
        super().__init__(node)
        self.findings = findings

    def lock(self, axis: Axis, why: str) -> None:
        """Forbid removal along an axis."""
        lock(axis, self.reason(why))

    def unify(self, a: Axis, b: Axis) -> None:
        """State that two axes index the same units."""
        unify(a, b, self.reason("the sizes do not align"))

    def expect(self, sizes: dict[str, Axis]) -> None:
        """State that integer arguments are the sizes of dimensions."""
        self.node.meta["expected"] = sizes

    def fixed(self, size: int) -> Axis:
        """A new dimension that holds no channel."""
        return channel(size, Fixed(self.reason("the dimension holds no units")))

    def all_fixed(self, shape: Iterable[int]) -> Dims:
        """Dimensions that hold no channel."""
        return tuple([self.fixed(n) for n in shape])


class Token(NamedTuple):
    """One entry of an operand: a name, several starred ones, or the names of a product."""

    names: tuple[str, ...]
    star: bool = False
    apart: bool = False  # in brackets


_TOKEN = re.compile(r"\(([a-zA-Z_][\w\s]*)\)|\[(\*?[a-zA-Z_]\w*)\]|(\*?[a-zA-Z_]\w*)|\s+|(.)", re.DOTALL)


def _operand(text: str) -> tuple[Token, ...]:
    tokens = []
    for match in _TOKEN.finditer(text.strip()):
        inside, bracketed, meta, wrong = match.groups()
        if wrong:
            raise ValueError(f"'{wrong}' in '{text.strip()}' is out of place: names, *names, (a b) and [a] are known")
        if inside is not None:
            if len(inside.split()) < 2:
                raise ValueError(f"'({inside})' needs two names or more")
            tokens.append(Token(tuple(inside.split())))
        elif name := bracketed or meta:
            tokens.append(Token((name.lstrip("*"),), name[0] == "*", bracketed is not None))
    return tuple(tokens)


@functools.cache
def parse(notation: str) -> tuple[tuple[tuple[Token, ...], ...], tuple[tuple[Token, ...], ...]]:
    """The operands and the results of a notation.

    Raises:
        ValueError: not one arrow, a parenthesis left open or empty, a name for one dimension and for several.
    """
    if notation.count("->") != 1:
        raise ValueError("expected one '->' between operands and results")
    left, right = (tuple(map(_operand, side.split(","))) for side in notation.split("->"))
    tokens = [token for operand in (*left, *right) for token in operand]
    both = {t.names for t in tokens if t.star} & {(name,) for t in tokens if not t.star for name in t.names}
    if both:
        raise ValueError(f"'{both.pop()[0]}' stands for one dimension and for any number of them")
    return left, right


def names_in(operands: Iterable[tuple[Token, ...]]) -> set[str]:
    """The names in operands, starred ones with their star."""
    return {"*" * token.star + name for operand in operands for token in operand for name in token.names}


class _Names:
    """The dimensions that the names of a notation stand for."""

    def __init__(self, op: Op | _SizesOnly, known: dict[str, int]):
        self.op, self.known = op, known
        self.axes: dict[str, Axis] = {}
        self.stars: dict[str, Dims] = {}

    def identify(self, name: str, a: Axis, b: Axis) -> None:
        if a.size != b.size:
            raise Misfit(f"'{name}' is {a.size} in one place and {b.size} in another")
        self.op.unify(a, b)

    def meet(self, token: Token, axis: Axis) -> None:
        """State that one name, or a product of names, is this dimension."""
        if len(token.names) == 1:
            self.identify(token.names[0], self.axes.setdefault(token.names[0], axis), axis)
            return
        sizes = {n: self.axes[n].size if n in self.axes else self.known.get(n) for n in token.names}
        rest = axis.size // (prod(n for n in sizes.values() if n) or 1)
        for name in token.names:
            if name not in self.axes:
                self.axes[name] = channel(sizes[name] or rest)
        self.identify(" ".join(token.names), product(self.axes[n] for n in token.names), axis)

    def read(self, tokens: tuple[Token, ...], dims: Dims) -> Iterator[tuple[str, Axis]]:
        """Match the dimensions of one operand; yield each name with the dimension that it stands for."""
        lengths = {t.names[0]: self.length(t.names[0]) for t in tokens if t.star}
        spare = len(dims) - len(tokens) + len(lengths) - sum(n for n in lengths.values() if n is not None)
        unknown = sum(n is None for n in lengths.values())
        if spare < 0 or unknown > 1 or (spare and not unknown):
            raise Misfit(f"{len(dims)} dimensions do not fit '{_text(tokens)}'")
        rest = iter(dims)
        for token in tokens:
            if token.star:
                length = lengths[token.names[0]]
                part = tuple(next(rest) for _ in range(spare if length is None else length))
                for old, new in zip(self.stars.setdefault(token.names[0], part), part, strict=True):
                    self.identify(token.names[0], old, new)
                found = [("*" + token.names[0], axis) for axis in part]
            else:
                axis = next(rest)
                self.meet(token, axis)
                found = [(name, axis) for name in token.names]
            for name, axis in found:
                if token.apart:
                    self.op.lock(axis, BY_POSITION)
                yield name, axis

    def length(self, name: str) -> int | None:
        return len(self.stars[name]) if name in self.stars else self.known.get("*" + name)

    def all(self, name: str) -> Dims:
        return self.stars.get(name[1:], ()) if name[0] == "*" else (self.axes[name],)

    def joined(self, token: Token, size: int | None = None) -> Axis:
        """The axis of one name or of a product; a new name, of ``size`` or of a known size, holds no channel."""
        for name in token.names:
            if name not in self.axes:
                own = self.known.get(name, size if len(token.names) == 1 else None)
                if own is None:
                    raise Misfit(f"the size of '{name}' is not known")
                self.axes[name] = self.op.fixed(own)
        return product(self.axes[n] for n in token.names) if len(token.names) > 1 else self.axes[token.names[0]]

    def write(self, tokens: tuple[Token, ...], shape: tuple[int, ...]) -> Dims:
        """The dimensions of one result."""
        spare = len(shape) - sum(len(self.stars.get(t.names[0], ())) if t.star else 1 for t in tokens)
        out: list[Axis] = []
        for token in tokens:
            name = token.names[0]
            if token.star:
                if name not in self.stars:
                    self.stars[name] = tuple(map(self.op.fixed, shape[len(out) : len(out) + spare]))
                out.extend(self.stars[name])
                continue
            out.append(self.joined(token, shape[len(out)] if len(out) < len(shape) else None))
        if [axis.size for axis in out] != list(shape):
            raise Misfit(f"a result of shape {'x'.join(map(str, shape))} does not fit '{_text(tokens)}'")
        return tuple(out)


def _text(tokens: Iterable[Token]) -> str:
    texts = ("*" * t.star + (t.names[0] if len(t.names) == 1 else f"({' '.join(t.names)})") for t in tokens)
    return " ".join(f"[{text}]" if t.apart else text for t, text in zip(tokens, texts, strict=True))


class _SizesOnly:
    """Takes the place of an ``Op`` where only sizes are computed."""

    unify = staticmethod(unify)

    fixed = staticmethod(channel)

    def lock(self, axis: Axis, why: str) -> None:
        """Lock nothing."""


def results(notation: str, shapes: Sequence[tuple[int, ...] | None], known: dict[str, int]) -> list[tuple[int, ...]]:
    """The shapes of the results of operands of some shapes (None: absent).

    Raises:
        Misfit: the notation does not fit them.
    """
    left, right = parse(notation)
    names = _Names(_SizesOnly(), known)
    for tokens, shape in zip(left, shapes, strict=True):
        if shape is not None:
            list(names.read(tokens, tuple(map(channel, shape))))
    out = []
    for tokens in right:
        parts = [names.all("*" + t.names[0]) if t.star else [names.joined(t)] for t in tokens]
        out.append(tuple(axis.size for part in parts for axis in part))
    return out


def relate(
    op: Op, notation: str, operands: list[fx.Node | None], known: dict[str, int] | None = None, macs: str = ""
) -> Results:
    """Apply a notation to the operands of an operation (None: absent) and return the dimensions of its results.

    Args:
        known: sizes of names inside products and, as ``*name``, numbers of starred dimensions.
        macs: the product of the dimensions of these names is the number of multiply-accumulates.

    Raises:
        Misfit: the notation does not fit the dimensions.
    """
    left, right = parse(notation)
    names = _Names(op, known or {})
    present = [(tokens, node) for tokens, node in zip(left, operands, strict=True) if node is not None]
    origins = [list(names.read(tokens, op.dims(node))) for tokens, node in present]
    outputs: Results = [
        None
        if shape is None
        else names.write(right[i], shape)
        if i < len(right) and tuple(shape) != (0,)  # as norms save no statistics in eval mode
        else op.all_fixed(shape)
        for i, shape in enumerate(op.shapes())
    ]
    _note_roles(op, names, [node for _, node in present], origins, names_in(right))
    op.node.meta["names"] = {**names.axes, **{"*" + name: axes for name, axes in names.stars.items()}}
    if macs:
        op.node.meta["macs"] = [axis for name in macs.split() for axis in names.all(name)]
    return outputs


def _note_roles(
    op: Op, names: _Names, nodes: list[fx.Node], origins: list[list[tuple[str, Axis]]], written: set[str]
) -> None:
    """Note the role of each name in each parameter. A name that only one operand has is worked across."""
    uses = [{name for name, _ in origin} for origin in origins]
    fed = {name for mine, node in zip(uses, nodes, strict=True) if "params" not in node.meta for name in mine}
    # For each operand that comes from parameters: the node, and (source, axis, role) of its dimensions.
    operands = op.node.meta.setdefault("operands", [])
    for mine, origin, node in zip(uses, origins, nodes, strict=True):
        contracts = not mine <= written
        roles = []
        for name, source in origin:
            if name not in written and sum(name in other for other in uses) == 1:
                role = "window"
                lock(names.axes.get(name, source), Fixed(op.reason("the operation works across positions")))
            elif name not in written:
                role = "consumes"
            else:
                role = "produces" if contracts and name not in fed else "carries"
            roles.append((source, names.axes.get(name, source), role))
        if "params" in node.meta:
            for source, axis, role in roles:
                op.findings.note_role(node, source, axis, role)
            operands.append((node, roles))
