"""A notation for series of operations in a recorded graph: passes find by it what they rewrite, whatever it is called.

    convolution -> batch_norm           a batch norm that alone reads what a convolution gives
    convolution|linear -> batch_norm?   one of several operations; a step that may be missing
    relu => convolution                 others may read what the ReLU gives as well
    _softmax -> bmm.self                read through the argument of this name

An operation is a name of ATen (``gelu``, or ``aten.gelu``; in place, ``relu_``, is the same), another library's
(``mylib::scale``), or a role, see ``ROLES``. A result is read through the inputs of an operation, not as a weight,
unless an argument is named.
"""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from netsurgery.analysis.network import Network
from netsurgery.analysis.rules import RULES
from netsurgery.arguments import near_names
from netsurgery.capture.paths import is_within
from netsurgery.capture.program import Call, Program
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
_AROUND = (*_VIEWS, "clone")
_ATEN = re.compile(r"\baten(?:\.|::)(\w+)(?:\.(\w+))?")
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
        modules: by step the path of a module that runs this operation and nothing else, so that it can be replaced;
            None where a step is missing, or stands in the code of a module that does more, such as ``F.silu`` in the
            ``forward`` of a block.
    """

    nodes: tuple[fx.Node | None, ...]
    modules: tuple[str | None, ...]

    @property
    def forwards(self) -> tuple[str | None, ...]:
        """By step the path of the module in whose ``forward`` it stands, whatever else that does."""
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
            read = _STEP.fullmatch(_ATEN.sub(_without_library, part))
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
            near = near_names(name, [*ROLES, *sorted(_recorded())])
            raise InputError(f"Pattern({self.text!r}): '{name}' is no operation{near or ' of ATen, nor a role'}")
        return frozenset([name.rstrip("_")])

    def find(self, network: Network) -> list[Match]:
        """The places in the run in eval mode, in order.

        Raises:
            InputError: it is no network, but a model.
        """
        if not isinstance(network, Network):
            raise InputError(
                f"Pattern({self.text!r}).find takes a Network, got {type(network).__name__}: "
                "netsurgery.trace(model, example_inputs) makes one of a model"
            )
        return self._found(network.programs[0], network.programs)

    def find_in(self, program: Program) -> list[Match]:
        """The places in one recorded run."""
        return self._found(program, [program])

    def _found(self, program: Program, programs: Sequence[Program]) -> list[Match]:
        """The places in one recorded run; a module is named where it does the same in all."""
        first, *rest = self._steps
        starts = [node for node in program.operations if _name(node) in first.names]
        series = [(node, *others) for node in starts for others in _go_on(node, node, tuple(rest))]
        own = {
            node: str(node.meta["module"]) if all(_runs_alone(one, node) for one in programs) else None
            for node in dict.fromkeys(node for nodes in series for node in nodes if node is not None)
        }
        return [Match(nodes, tuple(None if node is None else own[node] for node in nodes)) for nodes in series]


def _without_library(found: re.Match[str]) -> str:
    """The name of an ATen operation as its nodes print it (``aten.add.Tensor``) without library and overload."""
    name, more = found[1], found[2]
    packet = getattr(torch.ops.aten, name, None)
    return f"{name}.{more}" if more and (packet is None or more not in packet.overloads()) else name


@functools.cache
def _recorded() -> frozenset[str]:
    """The operations that recorded graphs can hold: those with rules, those of roles, and those of single elements."""
    named = [one if isinstance(one, str) else str(getattr(one, "_qualified_op_name", one)) for one in RULES]
    ruled = {name.removeprefix("aten::").partition(".")[0].rstrip("_") for name in named if "::" in name}
    return frozenset(ruled.union(*ROLES.values(), filter(_is_elementwise, dir(torch))))


def _is_elementwise(name: str) -> bool:
    packet = getattr(torch.ops.aten, name, None) if name[0] != "_" and name[-1] != "_" else None
    overloads = [getattr(packet, one) for one in packet.overloads()] if packet is not None else []
    return any(torch.Tag.pointwise in one.tags for one in overloads)


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


def _runs_alone(program: Program, step: fx.Node) -> bool:
    """True if the module that runs an operation of this name does nothing else in a run, whenever it is called."""
    path = step.meta["module"]
    for index, call in enumerate(program.calls):
        if call.path != path:
            continue
        inside = program.calls[index + 1 : call.next if call.next > 0 else None]
        if any(not is_within(one.path, f"{path}.parametrizations" if path else "parametrizations") for one in inside):
            return False
        work = _on_inputs(program.operations[call.begin : call.end])
        steps = [node for node in work if _name(node) == _name(step)]
        if len(steps) != 1 or not _is_all(steps[0], [node for node in work if node is not steps[0]], call):
            return False
    return True


def _is_all(step: fx.Node, others: Sequence[fx.Node], call: Call) -> bool:
    """True if a call gives what an operation does, and its other operations are views, copies, paddings and a bias."""
    given: Any = call.out
    while isinstance(given, fx.Node) and given is not step:
        whole = given.target is operator.getitem and given.args[1] == 0
        if not (whole or (given in others and (_name(given) in _AROUND or _is_bias(given, step)))):
            return False
        given = next((one for one in given.all_input_nodes if one.op != "get_attr"), None)
    if given is not step or not all(_name(one) in _AROUND or _pads(one) or _is_bias(one, step) for one in others):
        return False
    if not any(_name(one) in _VIEWS for one in others):
        return True
    taken = [one for one in (*call.args, *call.kwargs.values()) if isinstance(one, fx.Node)]
    return len(taken) == 1 and taken[0].meta["shape"][:-1] == call.out.meta["shape"][:-1]


def _pads(node: fx.Node) -> bool:
    return "_pad" in _name(node)


def _on_inputs(operations: Sequence[fx.Node]) -> list[fx.Node]:
    """Those of a module's operations that read something else than parameters, buffers and constants."""
    fixed: set[fx.Node] = set()
    for node in operations:
        if all(one.op == "get_attr" or one in fixed for one in node.all_input_nodes):
            fixed.update([node, *(user for user in node.users if user.target is operator.getitem)])
    return [node for node in operations if node not in fixed]


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
