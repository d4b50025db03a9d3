"""Run code again, operation by operation beside a recorded run."""

from __future__ import annotations

import operator

import torch
from torch import fx

from netsurgery.capture.known_values import VIEWS, ConcreteValues
from netsurgery.capture.op_observer import OpObserver
from netsurgery.capture.operations import aliased
from netsurgery.capture.program import Program

__all__ = ["Lockstep", "PathDiverged", "Source", "source_of"]

Part = tuple[fx.Node, int]  # an operation, and which of its results
Source = str | fx.Node | Part  # where a tensor comes from: the name of a parameter, or an operation


class PathDiverged(RuntimeError):
    """The code ran another operation than the recorded one."""


class Lockstep(OpObserver):
    """Sees each operation of a run, and finds the recorded one that it repeats."""

    def __init__(self, program: Program, values: ConcreteValues | None = None):
        super().__init__(values)
        self.program = program
        self.position = 0  # operations so far
        self.left_out: set[fx.Node] = set()  # copies that torch does not need here

    def expected(self, target: object) -> fx.Node | None:
        """The recorded operation that must run now; None for a copy that only the layout of memory asks for."""
        operations = self.program.operations
        while self.position < len(operations):
            node = operations[self.position]
            if node.target == target or {node.target, target} in _ALIKE:
                self.position += 1
                return node
            if target is _CLONE:
                return None
            if not self.leave_out(node):
                break
        ran = operations[self.position].target if self.position < len(operations) else "nothing"
        raise PathDiverged(f"{target} runs where {ran} ran when it was traced")

    def leave_out(self, node: fx.Node) -> bool:
        """Pass over a recorded copy that nothing writes to: with another memory layout, torch makes none."""
        if node.target is not _CLONE or any(map(self.written_later, (node, *node.all_input_nodes))):
            return False
        self.position += 1
        self.left_out.add(node)
        return True

    def written_later(self, node: fx.Node) -> bool:
        """True if a later operation writes to the memory that a recorded result is in."""
        while (base := next((base for base, _ in aliased(node)), None)) is not None:
            node = base
        return _is_written(node, dict.fromkeys(self.program.operations[self.position :]))

    def origin(self, node: fx.Node) -> Source:
        """The source of a recorded node in this run: the argument of a copy that was left out."""
        while node in self.left_out:
            (node,) = node.all_input_nodes
        return source_of(node)


_SPLITS = {torch.ops.aten.split.Tensor, torch.ops.aten.split_with_sizes.default}
_ALIKE = (VIEWS, _SPLITS)
_CLONE = torch.ops.aten.clone.default


def _is_written(node: fx.Node, later: dict[fx.Node, None]) -> bool:
    """True if one of some operations writes into a tensor or a view of it."""
    return any(
        (written and user in later) or _is_written(user, later)
        for user in node.users
        for base, written in aliased(user)
        if base is node
    )


def source_of(node: fx.Node) -> Source:
    """The source of a recorded node."""
    if node.op == "get_attr":
        return str(node.target)
    if node.target is operator.getitem:
        whole, index = node.args
        return whole, index  # type: ignore[return-value]
    return node
