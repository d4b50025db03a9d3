"""Run code again, operation by operation beside a recorded run."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from netsurgery.capture.known_values import VIEWS, ConcreteValues
from netsurgery.capture.op_observer import OpObserver
from netsurgery.capture.program import Program

__all__ = ["Lockstep", "PathDiverged", "source_of"]


class PathDiverged(RuntimeError):
    """The code ran another operation than the recorded one."""


class Lockstep(OpObserver):
    """Sees each operation of a run, and which recorded one it is."""

    def __init__(self, program: Program, values: ConcreteValues | None = None):
        super().__init__(values)
        self.program = program
        self.position = 0  # operations so far
        self.left_out: set[fx.Node] = set()  # copies that torch does not need here

    def expected(self, func: Any) -> fx.Node | None:
        """The recorded operation that this should be; None for a copy that only the memory's layout asks for here."""
        operations = self.program.operations
        while self.position < len(operations):
            node = operations[self.position]
            if node.target == func or {node.target, func} in _ALIKE:
                self.position += 1
                return node
            if func is _CLONE:
                return None
            if not self.leave_out(node):
                break
        ran = operations[self.position].target if self.position < len(operations) else "nothing"
        raise PathDiverged(f"{func} runs where {ran} ran when it was traced")

    def leave_out(self, node: fx.Node) -> bool:
        """Pass over a recorded copy that the memory's layout did not ask for here, if nothing writes to it."""
        if node.target is not _CLONE or self.written_later(node) or self.written_later(node.args[0]):
            return False
        self.position += 1
        self.left_out.add(node)
        return True

    def written_later(self, source: Any) -> bool:
        """Whether a later operation writes to the memory that a recorded result is in."""
        node = source[0] if isinstance(source, tuple) else source
        while (base := _base(node)) is not None:
            node = base
        return _is_written(node, dict.fromkeys(self.program.operations[self.position :]))

    def origin(self, node: fx.Node) -> Any:
        """The source in this run of a recorded node: copies that were left out stand for their argument."""
        while (source := source_of(node)) in self.left_out:
            node = source.args[0]
        return source


_SPLITS = {torch.ops.aten.split.Tensor, torch.ops.aten.split_with_sizes.default}
_ALIKE = (VIEWS, _SPLITS)
_CLONE = torch.ops.aten.clone.default


def _base(node: fx.Node) -> fx.Node | None:
    """The tensor that a recorded result is a view of, or that was written to make it."""
    if _is_part(node):
        return node.args[0]  # type: ignore[return-value]
    schema = getattr(node.target, "_schema", None)
    pairs = zip(schema.arguments, node.args, strict=False) if schema is not None else ()
    return next((given for a, given in pairs if a.alias_info is not None and isinstance(given, fx.Node)), None)


def _is_written(node: fx.Node, later: dict[fx.Node, None]) -> bool:
    """Whether one of some operations writes into a tensor or a view of it."""
    for user in node.users:
        schema = getattr(user.target, "_schema", None)
        if schema is None:
            if _is_part(user) and _is_written(user, later):
                return True
            continue
        aliases = [a.alias_info for a, given in zip(schema.arguments, user.args, strict=False) if given is node]
        if any(
            alias is not None and ((alias.is_write and user in later) or _is_written(user, later)) for alias in aliases
        ):
            return True
    return False


def _is_part(node: fx.Node) -> bool:
    return node.target is operator.getitem


def source_of(node: fx.Node) -> Any:
    """The source of a recorded node: a name, an operation, or an operation and which of its results."""
    if node.op == "get_attr":
        return node.target
    return (node.args[0], node.args[1]) if _is_part(node) else node
