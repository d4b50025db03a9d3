"""Integers that remember the graph node that computes them, and the guards that comparisons leave in the graph.

A number read from a shape or from an attribute of a module is a ``TracedInt``; arithmetic with it adds nodes to the
graph, and a comparison adds a check that the answer is still the same. ``SizeEvaluator`` computes such numbers again
for other sizes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from torch import fx

from netsurgery.analysis.costs import Sizes
from netsurgery.axes import Axis, leaves
from netsurgery.capture.inputs import Args, Tree

__all__ = ["Shape", "SizeEvaluator", "TracedFloat", "TracedInt", "guard", "plain", "traced"]


class TracedInt(int):
    """An integer, and the node of the graph that computes it."""

    node: fx.Node

    def __hash__(self) -> int:
        return int.__hash__(self)

    def __getnewargs__(self) -> tuple[int]:
        return (int(self),)


def traced(value: int, node: fx.Node) -> TracedInt:
    """An integer that ``node`` computes."""
    number = TracedInt(value)
    number.node = node
    node.meta["value"] = int(value)
    return number


def _node_of(value: object) -> Any:
    return value.node if isinstance(value, TracedInt) else value


def _arithmetic(function: Callable[..., float], reverse: bool = False) -> Callable[..., float]:
    """A method for arithmetic. The result of integers is traced; one with a fraction is a constant, and guarded."""

    def compute(self: TracedInt, *others: Any) -> Any:
        operands = (*others, self) if reverse else (self, *others)
        if not all(isinstance(o, int) for o in others):
            return (
                NotImplemented if others and not isinstance(others[0], float) else _constant_result(function, operands)
            )
        value = function(*[int(o) for o in operands])
        if not isinstance(value, int):
            return _constant_result(function, operands)
        return traced(value, self.node.graph.call_function(function, tuple(map(_node_of, operands))))

    return compute


def _constant_result(function: Callable[..., float], operands: Args) -> float:
    """The result as a plain number; checks that its operands stay the same are added to the graph."""
    constants = [int(o) if isinstance(o, TracedInt) else o for o in operands]
    for operand in operands:
        if isinstance(operand, TracedInt):
            guard(operator.eq, operand, int(operand))
    return function(*constants)


def _comparison(function: Callable[..., bool]) -> Callable[..., bool]:
    """A method for a comparison. A guard makes sure that the answer, and so the branch of the code, stays."""

    def compare(self: TracedInt, other: object) -> Any:
        if not isinstance(other, int | float):
            return NotImplemented
        return guard(function, self, other)

    return compare


_OTHER_BRANCH = (
    "netsurgery rewrote this module as it ran when it was traced; at these other sizes its code would take another "
    "branch: trace with inputs of such sizes"
)
_OPPOSITE = {
    operator.eq: operator.ne, operator.lt: operator.ge, operator.le: operator.gt,
    operator.ne: operator.eq, operator.ge: operator.lt, operator.gt: operator.le,
}  # fmt: skip


def guard(function: Callable[..., bool], number: Any, other: float) -> bool:
    """The answer of a comparison; a check that it stays the same is added to the graph."""
    answer = bool(function(int(number), int(other) if isinstance(other, TracedInt) else other))
    graph = number.node.graph
    condition = graph.call_function(function if answer else _OPPOSITE[function], (number.node, _node_of(other)))
    condition.meta["value"] = True
    check = graph.call_function(torch._assert, (condition, _OTHER_BRANCH))
    check.meta["guard"] = True
    return answer


for _name in ("add", "sub", "mul", "floordiv", "mod", "truediv", "pow"):
    setattr(TracedInt, f"__{_name}__", _arithmetic(getattr(operator, _name)))
    setattr(TracedInt, f"__r{_name}__", _arithmetic(getattr(operator, _name), reverse=True))
for _name in ("neg", "pos", "abs"):
    setattr(TracedInt, f"__{_name}__", _arithmetic(getattr(operator, _name)))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(TracedInt, f"__{_name}__", _comparison(getattr(operator, _name)))
TracedInt.__bool__ = lambda self: guard(operator.ne, self, 0)  # type: ignore[method-assign]
TracedInt.__float__ = lambda self: float(_constant_result(int, (self,)))  # type: ignore[method-assign]
TracedInt.__int__ = int.__int__  # type: ignore[method-assign]


class TracedFloat(float):
    """A float attribute, such as a rate of dropout, and the node that reads it. Arithmetic gives plain floats."""

    node: fx.Node


class Shape(tuple[int, ...]):
    """The shape of a tensor, like ``torch.Size``, with traced integers."""

    __slots__ = ()

    def numel(self) -> int:
        return math.prod(self)


def plain(value: Tree) -> Tree:
    """The same arguments with plain numbers instead of traced ones."""
    if isinstance(value, TracedInt):
        return int(value)
    if isinstance(value, TracedFloat):
        return float(value)
    if isinstance(value, slice):
        return slice(*map(plain, (value.start, value.stop, value.step)))
    if type(value) is dict:
        return {key: plain(item) for key, item in value.items()}
    if type(value) in (tuple, list, Shape):
        return (list if type(value) is list else tuple)([plain(item) for item in value])
    return value


class SizeEvaluator:
    """Computes the numbers of a graph at other sizes, given the attributes of its module.

    Dimensions of channels that are not among ``units`` (batch, space, time) may be of any size.
    """

    def __init__(self, sizes: Sizes, attributes: Mapping[str, Tree], units: Container[Axis]):
        self.sizes, self.attributes, self.units = sizes, attributes, units
        self.memo: dict[fx.Node, Tree] = {}

    def free(self, axis: Axis) -> bool:
        """True if a dimension has other sizes for other inputs: batch, space, time."""
        return any(leaf not in self.units for leaf in leaves(axis))

    def depends(self, value: object) -> bool:
        """True if a number depends on the inputs of the module."""
        if not isinstance(value, fx.Node):
            return False
        axis = value.meta.get("axis")
        if value.op == "placeholder" or (axis is not None and self.free(axis)):
            return True
        return any(map(self.depends, value.args))

    def __call__(self, value: Tree) -> Tree:
        if not isinstance(value, fx.Node):
            return value
        if value not in self.memo:
            self.memo[value] = self.evaluate(value)
        return self.memo[value]

    def evaluate(self, node: fx.Node) -> Tree:
        """The value of one node."""
        if node.meta.get("axis") is not None:
            return self.sizes(node.meta["axis"])
        if "attribute" in node.meta:
            name, index = node.meta["attribute"]
            return self.attributes[name] if index is None else self.attributes[name][index]
        if node.op == "call_function" and all("value" in a.meta for a in node.all_input_nodes):
            return node.target(*map(self, node.args))  # type: ignore[operator]
        return node.meta["value"]
