"""Parameters and multiply-accumulates, as arithmetic on the sizes of dimensions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from netsurgery.axes import Axis, find
from netsurgery.tables import Rows, columns, html

__all__ = ["Cost", "Sizes", "Term", "total"]

Term = tuple[str, tuple[Axis, ...]]  # module path, and the axes whose sizes are multiplied


@dataclass(frozen=True)
class Cost:
    """The cost of one run of a network on its example inputs.

    Attributes:
        params: number of parameters.
        macs: multiply-accumulates of convolutions and matrix products (one MAC is two FLOPs).
        modules: ``(params, macs)`` of each module that owns parameters or does such work, by path.
    """

    params: int
    macs: int
    modules: Mapping[str, tuple[int, int]]

    def __str__(self) -> str:
        return columns(self.rows, right=(1, 2))

    def __repr__(self) -> str:
        return f"Cost(params={self.params}, macs={self.macs}, of {len(self.modules)} modules)"

    def _repr_html_(self) -> str:
        return html(f"{self.params:,} parameters, {self.macs:,} MACs", self.rows, right=(1, 2))

    @property
    def rows(self) -> Rows:
        """One row for each module, and the sum."""
        modules = [(path or "(top)", f"{n:,}", f"{m:,}") for path, (n, m) in self.modules.items()]
        return [("module", "parameters", "MACs"), *modules, ("total", f"{self.params:,}", f"{self.macs:,}")]


class Sizes:
    """Sizes of axes when some channels have other counts than their own."""

    def __init__(self, counts: Mapping[Axis, int]):
        self.counts = counts
        self.memo: dict[Axis, int] = {}

    def __call__(self, axis: Axis) -> int:
        axis = find(axis)
        if not axis.op:
            return self.counts.get(axis, axis.size)
        found = self.memo.get(axis)
        if found is None:
            terms = [self(term) for term in axis.terms]
            found = self.memo[axis] = prod(terms) if axis.op == "product" else sum(terms)
        return found


def total(parameters: Iterable[Term], macs: Iterable[Term], sizes: Sizes) -> Cost:
    """Sum of products over the terms, in all and by module."""
    modules: dict[str, tuple[int, int]] = {}
    for path, axes in parameters:
        p, m = modules.get(path, (0, 0))
        modules[path] = p + prod([sizes(axis) for axis in axes]), m
    for path, axes in macs:
        p, m = modules.get(path, (0, 0))
        modules[path] = p, m + prod([sizes(axis) for axis in axes])
    return Cost(sum(p for p, _ in modules.values()), sum(m for _, m in modules.values()), modules)
