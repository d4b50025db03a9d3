"""Run a model's code at new sizes in lockstep with its recorded run, and compare each operation with the prediction.

Code may hard-code a size (``view(b, 2, 58, h, w)``, ``x[:, :32]``), or compute a number from one
(``x / x.shape[1]``). Such an operation is found here, before anything is changed, with the groups that it concerns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from netsurgery.analysis.costs import Sizes
from netsurgery.analysis.groups import Group
from netsurgery.analysis.network import Network
from netsurgery.analysis.rules import SIZED
from netsurgery.axes import Axis, Dims, axes_in, leaves
from netsurgery.capture.copies import named_tensors
from netsurgery.capture.custom_modules import Shape
from netsurgery.capture.inputs import Args, Inputs, Kwargs, Tree, is_namedtuple, tensors_in
from netsurgery.capture.known_values import KnownValues, draw, is_number, select
from netsurgery.capture.lockstep import Lockstep, PathDiverged, Source, source_of
from netsurgery.capture.meta_run import RAISED_BY_MODELS, bind_inputs
from netsurgery.capture.meta_shapes import empty_as, infer
from netsurgery.capture.operations import OpCall, argument_names, target_of
from netsurgery.capture.paths import is_within, modules_around
from netsurgery.capture.program import Call, Program
from netsurgery.capture.source_locations import format_where, raised_at
from netsurgery.errors import InputError, RewriteError
from netsurgery.notation import Operation

__all__ = ["Failure", "SizeChecker", "channels_of", "is_in", "known_values"]


@dataclass
class Failure:
    """Code of a module that does not follow the new sizes.

    Attributes:
        reasons: for each group that must not change: the reason.
        suspected_in: the module that holds these groups, where it is not known which of them the code cannot follow;
            None where an operation tells.
    """

    reasons: dict[str, str] = field(default_factory=dict)
    suspected_in: str | None = None


def _first_units(sizes: Sizes) -> Callable[[Axis], Tensor]:
    """Units that stay, for a run at other sizes: the first ones of each channel."""
    return lambda channel: torch.arange(sizes(channel))


def known_values(
    network: Network, sizes: Sizes, meta: nn.Module, names: Mapping[int, str], inputs: Inputs
) -> KnownValues:
    """The known values of a model's tensors at other sizes, and of its inputs: integers."""
    values = KnownValues(next((t.device for t in network.tensors.values()), torch.device("cpu")))
    for _, tensor in named_tensors(meta):
        if (name := names.get(id(tensor), "")) in network.tensors and not is_number(tensor):
            values.bind(tensor, select(network.tensors[name].detach(), network.axes[name], _first_units(sizes)))
    bind_inputs(values, inputs, draw(network.inputs, values.device))
    return values


_LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)


class SizeChecker(Lockstep):
    """Compares the operations of a run at new sizes with the recorded ones, and collects ``failures`` by module."""

    def __init__(
        self,
        program: Program,
        network: Network,
        kinds: Mapping[str, type],
        sizes: Sizes,
        changed: Mapping[Axis, str],
        known: KnownValues | None,
    ):
        super().__init__(program, known)
        self.known = known
        self.calls = 0  # module runs so far
        self.sources: dict[int, Source] = {}  # by id of a tensor: its source in the recorded run
        self.alive: list[object] = []  # ids are only good while their tensors live
        self.network, self.kinds = network, kinds
        self.sizes, self.changed = sizes, changed
        self.failures: dict[str, Failure] = {}  # by module path
        self.branching: set[str] = set()  # paths where the code does more with sizes than to write them down
        self.relevant: list[int] | None = None  # if known, how many operations before each place need to run

    def call(self, path: str, forward: Callable[..., Tree], args: Args, kwargs: Kwargs) -> Tree:
        index, self.calls = self.calls, self.calls + 1
        call = self.program.calls[index] if index < len(self.program.calls) else None
        if call is None or call.path != path:
            raise PathDiverged(f"{path} runs where {call.path if call else 'nothing'} ran when it was traced")
        self.arrive(call.begin)
        if self.relevant is not None and self.relevant[call.begin] == self.relevant[call.end]:
            return self.passed_over(call)
        try:
            out = super().call(path, forward, args, kwargs)
            self.arrive(call.end)
        except (*RAISED_BY_MODELS, InputError) as error:
            # An error that follows from a size already found wrong says nothing new.
            if path not in self.failures and not self.reads_the_predicted(call, args):
                self.attribute_error(error, path)
            out = self.passed_over(call)
        return out

    def attribute_error(self, error: Exception, path: str) -> None:
        """Note that the code of a module raised an error, or ran another operation."""
        first = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        diverged = isinstance(error, PathDiverged)
        does = "does other things at" if diverged else "refuses"
        shapes = isinstance(error, RuntimeError) and not diverged  # as torch raises where shapes do not fit
        place = f" {format_where(raised_at(error))}".rstrip()
        self.attribute_to_module(f"the code {does} other sizes ({first}){place}", path, branching=not shapes)

    def reads_the_predicted(self, call: Call, args: Args) -> bool:
        """True if a linear layer reads the predicted tensor: memory layout decides which operations it runs."""
        given = call.args[0] if self.kinds[call.path] in _LINEAR and len(call.args) == 1 and not call.kwargs else None
        if not isinstance(given, fx.Node) or self.sources.get(id(args[0])) != self.origin(given):
            return False
        return tuple(args[0].shape) == tuple(map(self.sizes, given.meta["dims"]))

    def passed_over(self, call: Call) -> Tree:
        """The predicted result of a run of a module; the recorded run goes on after it, too."""
        with _disable_current_modes():
            out = self.predicted(call.out)
        self.position, self.calls = call.end, call.next
        return out

    def arrive(self, position: int) -> None:
        """Make sure that all operations before this one have run."""
        while self.position < position and self.leave_out(self.program.operations[self.position]):
            pass
        if self.position != position:
            raise PathDiverged(f"{self.program.operations[min(self.position, position)].target} is left out")

    def predicted(self, out: Tree) -> Tree:
        """A predicted result, without data, with which the run goes on to find all obstacles at once."""
        if isinstance(out, fx.Node):
            tensor = empty_as(out, self.sizes)
            self.sources[id(tensor)] = source_of(out)
            self.alive.append(tensor)
            return tensor
        if type(out) in (tuple, list):
            return type(out)([self.predicted(item) for item in out])
        if is_namedtuple(out):
            return out._make(map(self.predicted, out))
        return {key: self.predicted(item) for key, item in out.items()} if type(out) is dict else out

    def failure(self, path: str) -> Failure:
        """The failure of a module, empty at first."""
        return self.failures.setdefault(path, Failure())

    def attribute_failure(self, axes: Iterable[Axis], node: fx.Node, why: str) -> None:
        """Note a failure of the changed groups in some axes, or else of those in the module that runs."""
        path = self.modules[-1] if self.modules else ""
        names = [self.changed[leaf] for axis in axes for leaf in leaves(axis) if leaf in self.changed]
        reason = Operation(node).reason(why)
        if names:
            self.failure(path).reasons.update(dict.fromkeys(names, reason))
        else:
            self.attribute_to_module(reason, path, branching=False)

    def attribute_to_module(self, reason: str, path: str, branching: bool = True) -> None:
        """Note a failure of the changed groups in the innermost module around a path that holds any.

        Args:
            branching: the code does more with sizes than to write them down.

        Raises:
            RewriteError: no module holds any.
        """
        if branching:
            self.branching.add(path)
        groups = [group for group in self.network.groups if group.channel in self.changed]
        for around in (path, *reversed(modules_around(path))):
            if names := [group.name for group in groups if is_in(group, around)]:
                self.failure(path).reasons.update(dict.fromkeys(names, f"{reason} in {around or 'the model'}"))
                self.failure(path).suspected_in = around
                return
        raise RewriteError(f"the model's code does not follow the new sizes: {reason}")

    def begin(self, names: Mapping[int, str], inputs: Inputs, model: nn.Module) -> None:
        """Note the recorded tensors that inputs and parameters stand for."""
        self.sources.update(names)
        placeholders = [node for node in self.program.graph.nodes if node.op == "placeholder"]
        self.sources.update((id(t), node) for t, node in zip(tensors_in(inputs), placeholders, strict=True))
        self.alive.extend((inputs, model))

    def finish(self, outputs: Tree) -> None:
        """Compare the outputs with the recorded ones."""
        *_, output = self.program.graph.nodes
        results = [self.sources.get(id(self.stand_in(tensor))) for tensor in tensors_in(outputs)]
        if not self.failures and results != [*map(self.origin, output.args[0])]:
            self.attribute_to_module("the code does other things at other sizes", "")

    def note_alias(self, tensor: Tensor, other: Tensor) -> Tensor:
        self.alive.append(other)
        if id(tensor) in self.reals:
            self.reals[id(other)] = self.reals[id(tensor)]
        elif id(tensor) in self.sources:
            self.sources[id(other)] = self.sources[id(tensor)]
        return other

    def see(self, call: OpCall) -> Tree:
        node = self.expected(call.target)
        if node is None:
            source = self.sources.get(id(call.args[0]))
            source = source[0] if isinstance(source, tuple) else source
            if isinstance(source, fx.Node) and self.written_later(source):
                raise PathDiverged("a copy is made that was not made when it was traced")
            out = infer(call) if self.known is None else self.known.infer(call)[0]
            return self.note_alias(call.args[0], out)
        out = self.answer(node, call)
        parts = out if isinstance(out, list | tuple) else [out]
        self.sources.update((id(t), (node, i) if parts is out else node) for i, t in enumerate(parts))
        self.alive.append(out)
        return out

    def answer(self, node: fx.Node, call: OpCall) -> Tree:
        """The result of an operation; where it is another than predicted, the predicted one."""
        dims: list[Dims | None] = node.meta["dims"] if isinstance(node.meta["shape"], list) else [node.meta["dims"]]
        predicted = [None if axes is None else tuple(map(self.sizes, axes)) for axes in dims]
        if self.tensors_differ(node, call.args) or self.arguments_differ(node, call):
            return self.substitute(node, call.args, predicted)
        try:
            out = infer(call) if self.known is None else self.known.replay(node, call, _first_units(self.sizes))
        except (RuntimeError, ValueError, IndexError) as error:
            asked = next((v for v in call.args if isinstance(v, list | tuple) and _is_number(list(v))), None)
            hard_coded = [] if asked is None or dims[0] is None else self.wrong([(dims[0], asked)], only_old=True)
            axes = hard_coded or _touched(node, *node.all_input_nodes)
            self.attribute_failure(axes, node, f"fails at other sizes ({str(error).splitlines()[0]})")
            return self.substitute(node, call.args, predicted)
        return self.substitute(node, call.args, predicted) if self.shapes_differ(node, dims, out) else out

    def shapes_differ(self, node: fx.Node, dims: list[Dims | None], out: Tree) -> bool:
        """True if a result has another shape than predicted; this is noted as a failure of the groups."""
        actual = [t.shape if isinstance(t, Tensor) else None for t in (out if isinstance(out, list | tuple) else [out])]
        if len(actual) != len(dims):
            self.attribute_failure(axes_in(dims), node, "returns another number of parts")
            return True
        pairs = [
            (axes, shape) for axes, shape in zip(dims, actual, strict=True) if axes is not None and shape is not None
        ]
        if any(len(axes) != len(shape) for axes, shape in pairs):
            self.attribute_failure(axes_in(dims), node, "returns another number of dimensions")
            return True
        if wrong := self.wrong(pairs):
            size = next(n for axes, shape in pairs for a, n in zip(axes, shape, strict=True) if a is wrong[0])
            self.attribute_failure(wrong, node, f"size {size} is fixed by the code")
            return True
        return False

    def wrong(self, pairs: Sequence[tuple[Dims, Sequence[int]]], only_old: bool = False) -> list[Axis]:
        """The axes with another size than predicted: those that have their old size, or else all of them."""
        found = [
            (axis, n)
            for axes, shape in pairs
            if len(axes) == len(shape)
            for axis, n in zip(axes, shape, strict=True)
            if n != self.sizes(axis)
        ]
        old = [axis for axis, n in found if n == axis.size]
        return old if old or only_old else [axis for axis, _ in found]

    def tensors_differ(self, node: fx.Node, args: Args) -> bool:
        """True if an operation reads a constant with other values; this is noted as a failure of its groups.

        Raises:
            PathDiverged: it reads other results than when it was traced.
        """
        for now, then in zip(_tensors(args), _tensors(node.args), strict=False):
            source = self.origin(then)
            constant = self.program.constants.get(source) if isinstance(source, str) else None
            if constant is None:
                if self.sources.get(id(now)) != source:
                    raise PathDiverged(f"{node.target} reads something else than when it was traced")
                continue
            real = self.reals.get(id(now))
            if real is None or constant.is_meta:  # its values cannot be seen without data
                differs = target_of(node).overloadpacket is not torch.ops.aten.index
            else:
                differs = real.shape != constant.shape or not torch.equal(real, constant)
            if differs:
                touched = _touched(node, *node.all_input_nodes)
                self.attribute_failure(touched, node, "a tensor that the code makes may follow a size")
                self.branching.add(self.modules[-1] if self.modules else "")
                return True
        return False

    def arguments_differ(self, node: fx.Node, call: OpCall) -> bool:
        """True if an argument is not the predicted one; this is noted as a failure of the groups that it concerns."""
        expected: dict[str, Axis] = node.meta.get("expected", {})
        sized = SIZED.get(target_of(node).overloadpacket, frozenset())
        values: list[tuple[str, Tree, Tree]] = [*zip(argument_names(call.target), call.args, node.args, strict=False)]
        for name, now, then in values + [(name, now, node.kwargs.get(name)) for name, now in call.kwargs.items()]:
            if isinstance(now, Tensor) or now is None:
                continue
            if name in expected:
                if name == "start" and isinstance(now, int):  # as slicing reads it
                    length = call.args[0].shape[Operation(node)["dim"]]
                    now = min(max(now + length if now < 0 else now, 0), length)
                if isinstance(now, int) and now != self.sizes(expected[name]):
                    self.attribute_failure([expected[name]], node, f"{name}={now} is fixed by the code")
                    return True
            elif name not in sized and now != then and _is_number(now):
                reason = Operation(node).reason(f"the code computes {name}={then} from a size")
                self.attribute_to_module(reason, self.modules[-1] if self.modules else "")
                return True
        return False

    def substitute(self, node: fx.Node, args: Args, predicted: list[Shape | None]) -> Tree:
        """Results of the predicted sizes, with which the run goes on to find all obstacles."""
        given = next((value.dtype for value in pytree.tree_leaves(args) if isinstance(value, Tensor)), torch.float32)
        dtype = node.meta.get("dtype", given)
        out = [None if shape is None else torch.empty(shape, dtype=dtype, device="meta") for shape in predicted]
        return out if isinstance(node.meta["shape"], list) else out[0]


def channels_of(node: fx.Node) -> dict[Axis, None]:
    """The channels in the dimensions of an operation's arguments and results."""
    return dict.fromkeys(leaf for axis in _touched(node, *node.all_input_nodes) for leaf in leaves(axis))


def _tensors(value: Iterable[Tree]) -> Iterator[Tree]:
    """Tensors, or nodes in their place, among arguments."""
    for item in value:
        if isinstance(item, Tensor | fx.Node):
            yield item
        elif isinstance(item, list | tuple):
            yield from _tensors(item)


def is_in(group: Group, path: str) -> bool:
    """True if a group has a member in a module."""
    return any(is_within(member.module, path) for member in group.members)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) or (
        isinstance(value, list) and all(isinstance(item, int | float) for item in value)
    )


def _touched(*nodes: fx.Node) -> list[Axis]:
    return [axis for node in nodes for axis in axes_in(node.meta["dims"])]
