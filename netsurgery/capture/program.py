"""A recorded run: a graph of ATen operations, the runs of modules in it, and the facts noted on nodes."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, TypedDict

import torch
from torch import Tensor, fx

from netsurgery.axes import Axis, Dims
from netsurgery.capture.custom_modules import Shape
from netsurgery.capture.inputs import Args, Kwargs, Tree
from netsurgery.capture.known_values import Decided

__all__ = ["Call", "Looks", "Mode", "Named", "NodeMeta", "Program", "names_used"]

Mode = Literal["eval", "train"]
Looks = Literal["none", "known", "all"]  # the values that the code looked at


class NodeMeta(TypedDict, total=False):
    """The keys of ``node.meta`` of a recorded graph (torch types it as ``dict[str, Any]``)."""

    # Noted by the recorder:
    shape: Shape | list[Shape | None] | None  # of the result if it is a tensor; a list where there are several results
    dtype: torch.dtype
    layout: tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides
    module: str  # path of the module that ran
    where: tuple[str, int] | None  # file and line of the user's code
    decided: Decided  # the decisions that were taken from values, see ``known_values``

    # Noted by the analysis:
    dims: Dims | list[Dims | None]  # of the result; a list where there are several results
    params: tuple[str, ...]  # the parameters and constants that the result comes from, where it reads nothing else
    names: dict[str, Axis | Dims]  # by name in the rule's notation its axis; several axes for a starred name
    operands: list[Operand]  # those that come from parameters
    macs: list[Axis]  # the axes whose sizes multiply to the number of multiply-accumulates
    expected: dict[str, Axis]  # by integer argument the axis that it is the size of
    attributes: dict[str, Axis]  # by integer attribute of a module with a rule the axis that it is the size of
    whole: frozenset[Axis]  # channels of which the computation of a weight must see all units
    scaled_by: str  # the parameter that makes up for a removal in a computed weight
    limited: bool  # True if that parameter is itself the weight, within a largest norm


#: The node of an operand of an operation, and (source, axis, role) of its dimensions.
Operand = tuple[fx.Node, list[tuple[Axis, Axis, str]]]


@dataclass(eq=False)  # compared by identity: it is a key
class Program:
    """One recorded run.

    Attributes:
        graph: a placeholder for each input tensor, a get_attr for each parameter, buffer or constant that is used, and
            a call_function for each ATen operation.
        constants: the tensors that the code made itself.
        calls: the runs of modules, in the order in which they began.
        values: the values that the code looked at: "none", those that are "known" without running the network, or
            "all".
    """

    graph: fx.Graph
    mode: Mode
    constants: dict[str, Tensor] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    values: Looks = "none"

    def __repr__(self) -> str:
        return f"Program(mode={self.mode!r}, {len(self.operations)} operations, values={self.values!r})"

    @functools.cached_property
    def operations(self) -> list[fx.Node]:
        """The ATen operations in order, without those that only pick one result of several."""
        return [n for n in self.graph.nodes if n.op == "call_function" and n.target is not operator.getitem]


@dataclass
class Call:
    """One run of a module.

    Attributes:
        path: of the module.
        begin: the place of its first operation in the program.
        end: the place after its last operation.
        args, kwargs: its arguments, with nodes for tensors, and ``Named`` for parameters and buffers.
        out: its result, likewise.
        kept: the tensors that objects among its arguments, such as a cache of keys and values, hold afterwards.
    """

    path: str
    begin: int
    args: Args
    kwargs: Kwargs
    out: Tree = None
    end: int = -1
    next: int = -1  # the first call that began after this one ended
    kept: list[Tree] = field(default_factory=list)


class Named(str):
    """A parameter or buffer by its name, where it was handed over as an argument."""


def names_used(programs: Iterable[Program]) -> set[str]:
    """The parameters, buffers and constants that the programs read."""
    return {str(node.target) for program in programs for node in program.graph.nodes if node.op == "get_attr"}
