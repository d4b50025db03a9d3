"""A notation for series of operations in a recorded graph: passes find by it what they rewrite, whatever it is called.

    convolution -> batch_norm           a batch norm that alone reads what a convolution gives
    convolution|linear -> batch_norm?   one of several operations; a step that may be missing
    relu => convolution                 others may read what the ReLU gives as well
    softmax -> matmul.self              read through the argument of this name

An operation is a name of ATen (``gelu``; in place, ``relu_``, is the same), another library's (``mylib::scale``), or a
role, see ``ROLES``. A result is read through the inputs of an operation, not as a weight, unless an argument is named.
"""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from netsurgery.analysis.network import Network
from netsurgery.arguments import near_names
from netsurgery.capture.program import Program
from netsurgery.errors import InputError
from netsurgery.notation import Operation

__all__ = ["ROLES", "Match", "Pattern"]

#: Operations by what they are for.
ROLES: dict[str, frozenset[str]] = {
    "linear": frozenset(["addmm", "mm", "linear"]),
    "batch_norm": frozenset(["native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit_no_training"]),
    "layer_norm": frozenset(["native_layer_norm"]),
    "group_norm": frozenset(["native_group_norm"]),
    "rms_norm": frozenset(["_fused_rms_norm", "rms_norm"]),
    "relu6": frozenset(["hardtanh"]),
    "activation": frozenset([
        *("relu", "hardtanh", "leaky_relu", "_prelu_kernel", "elu", "celu", "gelu", "silu", "mish", "sigmoid", "tanh"),
        *("hardswish", "hardsigmoid", "softplus", "log_sigmoid_forward", "rrelu_with_noise_functional"),
    ]),
}  # fmt: skip
_INPUTS = {"addmm": (1,), "add": (0, 1), "mul": (0, 1), "sub": (0, 1), "cat": (0,), "matmul": (0, 1), "bmm": (0, 1)}
_VIEWS = ("view", "_unsafe_view", "alias", "detach", "expand")
_STEP = re.compile(r"([A-Za-z_][\w:]*(?:\|[A-Za-z_][\w:]*)*)(?:\.(\w+))?(\?)?")


@dataclass(frozen=True)
class _Step:
    names: frozenset[str]
    argument: str | None
    optional: bool
    alone: bool  # whether nothing else reads what it is given


@dataclass(frozen=True)
class Match:
    """One place in a graph.

    Attributes:
        nodes: the operation of each step, None where a step is missing.
        modules: the paths of the modules that ran them, likewise.
    """

    nodes: tuple[fx.Node | None, ...]

    @property
    def modules(self) -> tuple[str | None, ...]:
        return tuple(None if node is None else str(node.meta["module"]) for node in self.nodes)


@dataclass(frozen=True)
class Pattern:
    """A series of operations, each of which reads what the one before it gives; see the module's docstring.

    Args:
        text: in the notation.

    Raises:
        InputError: an unknown operation, or a text that is no series of steps.

    Example:
        >>> import torch, netsurgery
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
        >>> network = netsurgery.trace(model, torch.zeros(1, 3, 8, 8))
        >>> [match.modules for match in netsurgery.Pattern("convolution -> batch_norm -> gelu?").find(network)]
        [('0', '1', None)]
    """

    text: str

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise InputError(f"Pattern({self.text!r}): a text, such as 'convolution -> batch_norm'")
        if self._steps[0].optional or self._steps[0].argument:
            raise InputError(f"Pattern({self.text!r}): the first step is an operation, neither optional nor read")

    @functools.cached_property
    def _steps(self) -> tuple[_Step, ...]:
        parts = [part.strip() for part in re.split(r"(->|=>)", self.text)]
        found = []
        for arrow, part in zip(["->", *parts[1::2]], parts[::2], strict=True):
            read = _STEP.fullmatch(part)
            if read is None:
                raise InputError(
                    f"Pattern({self.text!r}): '{part}' is no step: an operation, or several (a|b), with the argument "
                    "that it reads through (matmul.self) and ? where it may be missing"
                )
            names = frozenset(name for one in read[1].split("|") for name in self._operations(one))
            found.append(_Step(names, read[2], bool(read[3]), arrow == "->"))
        return tuple(found)

    def _operations(self, name: str) -> frozenset[str]:
        """The operations that are meant by a name."""
        if name in ROLES:
            return ROLES[name]
        if "::" not in name and not hasattr(torch.ops.aten, name):
            near = near_names(name, [*ROLES, *dir(torch.ops.aten)])
            raise InputError(f"Pattern({self.text!r}): '{name}' is no operation{near or ' of ATen, nor a role'}")
        return frozenset([name])

    def find(self, network: Network) -> list[Match]:
        """The places in the run in eval mode, in order."""
        return self.find_in(network.programs[0])

    def find_in(self, program: Program) -> list[Match]:
        """The places in one recorded run."""
        first, *rest = self._steps
        starts = [node for node in program.operations if _name(node) in first.names]
        return [Match((node, *others)) for node in starts for others in _go_on(node, node, tuple(rest))]


def _go_on(node: fx.Node, last: fx.Node, steps: tuple[_Step, ...]) -> Iterator[tuple[fx.Node | None, ...]]:
    """The ways in which the remaining steps follow an operation.

    Args:
        node: whose result is read.
        last: the same.
    """
    if not steps:
        yield ()
        return
    step, rest = steps[0], steps[1:]
    readers = list(_readers(node, last))
    fits = [user for user, given in readers if _name(user) in step.names and _reads(user, given, step.argument)]
    if step.alone and len(readers) > 1:
        fits = []
    for user in dict.fromkeys(fits):
        yield from ((user, *others) for others in _go_on(user, user, rest))
    if not fits and step.optional:
        yield from ((None, *others) for others in _go_on(node, last, rest))


def _readers(node: fx.Node, step: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The operations that read a result, and as which node: views that modules put around their work are passed."""
    for user in node.users:
        whole = user.target is operator.getitem and user.args[1] == 0
        if whole or ((_is_view(user) or _is_bias(user, step)) and user.meta["module"] == step.meta["module"]):
            yield from _readers(user, step)
            continue
        reader = next(iter(user.users)) if _is_view(user) and len(user.users) == 1 else None
        if reader is not None and reader.op == "call_function" and reader.meta["module"] == user.meta["module"]:
            yield reader, user
        else:
            yield user, node


def _is_view(node: fx.Node) -> bool:
    """True if a result has the same elements as its argument."""
    if _name(node) not in _VIEWS:
        return False
    return bool(math.prod(node.meta["shape"]) == math.prod(node.all_input_nodes[0].meta["shape"]))


def _is_bias(node: fx.Node, step: fx.Node) -> bool:
    """True if an addition is that of a linear layer's bias, which is apart where its input is no contiguous matrix."""
    return _name(node) == "add" and _name(step) == "mm" and any(one.op == "get_attr" for one in node.all_input_nodes)


def _reads(user: fx.Node, given: fx.Node, argument: str | None) -> bool:
    """True if an operation reads a result through the argument, or as an input and not as a weight."""
    if argument is not None:
        return Operation(user).arguments.get(argument) is given
    leaves: list[Any] = [user.args[place] for place in _INPUTS.get(_name(user), (0,)) if place < len(user.args)]
    return any(given is one or (isinstance(one, list | tuple) and given in one) for one in leaves)


def _name(node: fx.Node) -> str:
    """The name of an operation: of ATen without its library."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return ""
    library, _, name = str(schema.name).partition("::")
    return name.rstrip("_") if library == "aten" else f"{library}::{name}"
