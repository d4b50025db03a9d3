"""Calls of ATen operations, and the facts that schemas of operations have about arguments."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from netsurgery.capture.custom_modules import CustomModule
from netsurgery.capture.inputs import Args, Kwargs, Tree

__all__ = ["OpCall", "Target", "aliased", "argument_names", "schema_of", "target_of", "writes"]

Target = OpOverload[..., Any] | CustomModule  # an operation, as ``node.target`` of a recorded graph holds it


class OpCall(NamedTuple):
    """One call of an operation."""

    target: Target
    args: Args
    kwargs: Kwargs

    def run(self) -> Tree:
        """The result."""
        return self.target(*self.args, **self.kwargs)

    def mapped(self, change: Callable[[Tree], Tree]) -> OpCall:
        """The same operation with each argument changed."""
        return OpCall(self.target, change(self.args), {key: change(value) for key, value in self.kwargs.items()})


def target_of(node: fx.Node) -> Target:
    """The operation of a node that calls one."""
    assert isinstance(node.target, OpOverload | CustomModule)
    return node.target


def schema_of(node: fx.Node) -> torch._C.FunctionSchema | None:
    """The schema of a node's operation; None for inputs, parameters, and nodes that pick one of several results."""
    schema: torch._C.FunctionSchema | None = getattr(node.target, "_schema", None)
    return schema


@functools.cache
def writes(target: Target) -> bool:
    """True if an operation writes to one of its arguments."""
    return bool(getattr(target._schema, "is_mutable", False))


@functools.cache
def argument_names(target: Target) -> tuple[str, ...]:
    """The names of the arguments of an operation, in order."""
    return tuple(argument.name for argument in target._schema.arguments)


def aliased(node: fx.Node) -> Iterator[tuple[fx.Node, bool]]:
    """The arguments that a result shares memory with, and True for those that the operation writes to."""
    schema = schema_of(node)
    if schema is None:
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            yield node.args[0], False
        return
    aliases = {argument.name: argument.alias_info for argument in schema.arguments}
    for name, value in (*zip(aliases, node.args, strict=False), *node.kwargs.items()):
        if (alias := aliases.get(name)) is not None:
            yield from ((leaf, alias.is_write) for leaf in pytree.tree_leaves(value) if isinstance(leaf, fx.Node))
