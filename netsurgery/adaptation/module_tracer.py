"""Trace a module's own code as a graph of torch functions.

The module runs alone on tensors without data, in lockstep with one of its recorded calls. Where an argument is the size
of a dimension, its node says of which (``node.meta["sizes"]``), so that the size can be computed again.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from netsurgery.adaptation.function_recorder import FunctionRecorder, LockstepExecutor, MetaExecutor, Untraceable
from netsurgery.adaptation.input_guards import expect_tensor
from netsurgery.adaptation.traced_numbers import SizeEvaluator, TracedInt
from netsurgery.analysis.costs import Sizes
from netsurgery.analysis.network import Network
from netsurgery.axes import Axis, leaves
from netsurgery.capture.caches import caches_kept, caches_passed_by
from netsurgery.capture.copies import named_modules, named_tensors, on_meta
from netsurgery.capture.custom_modules import CUSTOM_MODULES
from netsurgery.capture.recorder import RAISED_BY_MODELS, Call, Named, Program, meta_copy, track

__all__ = ["DiffersInTraining", "ModuleTrace", "trace_module"]


class DiffersInTraining(Untraceable):
    """The code of a module computes other things in training."""


@dataclass
class ModuleTrace:
    """One run of a module's own code, as it was recorded.

    Attributes:
        usual: its graph outside of training, good to find which attributes its sizes come from.
        doubts: why the graph does not stand for the code, whatever the sizes.
        code: the functions that ran.
    """

    usual: fx.Graph
    doubts: list[str]
    again: Callable[..., FunctionRecorder]  # in training? with other dtypes? at which sizes?
    free: list[Axis]  # channels of the inputs that may be of any size
    attributes: dict[str, Any]
    training: bool = False
    code: frozenset[CodeType] = frozenset()

    @functools.cached_property
    def alone(self) -> fx.Graph:
        """The graph that stands for the code in the mode in which it was found.

        Raises:
            Untraceable: there is none; the message says why.
        """
        if self.doubts:
            raise Untraceable(self.doubts[0])
        self.try_other_inputs()
        graph, told = copy.deepcopy(self.usual), True
        if any(map(_reads_dtype, graph.nodes)):
            try:
                told = _tell_dtypes_apart(graph, self.again(self.training, True).graph)
            except Untraceable:
                told = False
        if not told:
            _keep_dtypes(graph)
        return graph

    @functools.cached_property
    def whole(self) -> fx.Graph:
        """The graph that stands for the code, in training too.

        Raises:
            Untraceable: there is none; the message says why.
        """
        if self.doubts:
            raise Untraceable(self.doubts[0])
        self.try_other_inputs()
        trained = self.again(True, False)
        if trained.doubts:
            raise Untraceable(trained.doubts[0])
        told = True
        for training, graph in ((False, self.usual), (True, trained.graph)):
            if any(map(_reads_dtype, graph.nodes)):
                try:
                    told &= _tell_dtypes_apart(graph, self.again(training, True).graph)
                except Untraceable:
                    told = False
        merged = _merged(copy.deepcopy(self.usual), trained.graph)
        if not told:
            _keep_dtypes(merged)
        return merged

    def try_other_inputs(self) -> None:
        """Make sure that the graph does what the code does for inputs of other sizes, where these run at all.

        Raises:
            Untraceable: it does not: a loop runs once for each position, say.
        """
        for chosen in (self.free, *([axis] for axis in self.free if len(self.free) > 1)):
            sizes = Sizes({axis: 2 * axis.size for axis in chosen})
            try:
                other = self.again(self.training, False, sizes).graph
            except Untraceable:  # the code does not run so; one size at a time may do
                continue
            worth = SizeEvaluator(sizes, self.attributes, ())
            held = all(worth(node.args[0]) for node in self.usual.nodes if node.meta.get("guard"))
            if held and not _alike(self.usual, other):
                raise Untraceable("does other things for inputs of other sizes")
            if chosen is self.free:
                return


def _keep_dtypes(graph: fx.Graph) -> None:
    """Other dtypes may take another way: those that were traced are made sure of."""
    for node in graph.nodes:
        if node.target is expect_tensor:
            node.args = (*node.args[:2], node.meta["dtype"], node.args[3])


def trace_module(
    module: nn.Module, program: Program, call: Call, network: Network, in_training: bool = False
) -> ModuleTrace:
    """What one run of a module's own code did, as it was recorded.

    Raises:
        Untraceable: the code cannot be expressed as a graph; the message says why.
    """
    if type(module) in CUSTOM_MODULES:
        raise Untraceable("is one operation")
    device = next((t.device for t in network.tensors.values()), torch.device("cpu"))
    usual = meta_copy(module, program.mode)

    def record(training: bool, other: bool, sizes: Sizes | None = None) -> FunctionRecorder:
        meta, names = _in_other_dtypes(*meta_copy(module, program.mode)) if other else usual
        executor = MetaExecutor() if training != in_training or other or sizes else LockstepExecutor(program, call)
        track(meta, executor)
        recorder = FunctionRecorder(meta, names, executor, device)
        _run(meta, recorder, call, network, training, other, sizes)
        missed = recorder.effects is not None and recorder.effects.missed and not recorder.doubts
        return record(training, other, sizes) if missed else recorder

    found = record(training=in_training, other=False)
    if found.written and not _stores_again(usual[0], found, functools.partial(record, in_training, False)):
        found.doubts.append(f"sets its attribute {next(iter(found.written))}")
    given = [leaf for leaf in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(leaf, fx.Node)]
    free = [leaf for node in given for axis in node.meta["dims"] for leaf in leaves(axis)]
    free = list(dict.fromkeys(leaf for leaf in free if leaf not in network.by_channel))
    code = frozenset(found.effects.ran if found.effects else ())
    return ModuleTrace(found.graph, found.doubts, record, free, dict(module.__dict__), in_training, code)


def _stores_again(meta: nn.Module, found: FunctionRecorder, record: Callable[[], FunctionRecorder]) -> bool:
    """Whether the code does the same where it finds the sizes that it has kept."""
    before = dict(meta.__dict__)
    meta.__dict__.update(found.written)
    second = record()
    meta.__dict__.clear()
    meta.__dict__.update(before)
    return second.written == found.written and _alike(found.graph, second.graph)


def _in_other_dtypes(meta: nn.Module, names: dict[int, str]) -> tuple[nn.Module, dict[int, str]]:
    """A skeleton with float tensors of another dtype each."""
    known = list(named_tensors(meta))  # they stay alive, and their ids good
    meta._apply(lambda tensor: tensor.to(_other(tensor.dtype)))
    own = {name: names[id(tensor)] for name, tensor in known}
    return meta, {id(tensor): own[name] for name, tensor in named_tensors(meta)}


def _other(dtype: torch.dtype) -> torch.dtype:
    if not dtype.is_floating_point:
        return dtype
    return torch.bfloat16 if dtype == torch.float32 else torch.float32


def _run(
    module: nn.Module,
    recorder: FunctionRecorder,
    call: Call,
    network: Network,
    training: bool,
    other: bool,
    sizes: Sizes | None,
) -> None:
    attributes, executor = [(part, dict(part.__dict__)) for part in named_modules(module).values()], recorder.executor
    given: dict[Any, Tensor] = {}

    def stand_in(value: Any) -> Any:
        if not isinstance(value, fx.Node | Named):
            return value
        if value not in given:
            if isinstance(value, Named):
                given[value], dims = on_meta(network.tensors[value]).detach(), network.axes[value]
            else:
                (shape, strides), dims = value.meta["layout"], value.meta["dims"]
                given[value] = torch.empty_strided(shape, strides, dtype=value.meta["dtype"], device="meta")
                if sizes is not None:
                    order = sorted(range(len(shape)), key=lambda dim: -strides[dim])
                    shape = tuple(map(sizes, dims))
                    given[value] = torch.empty_permuted(shape, order, dtype=value.meta["dtype"], device="meta")
            given[value] = given[value].to(_other(given[value].dtype)) if other else given[value]
            executor.place(given[value], dims if isinstance(executor, LockstepExecutor) else None)
        return given[value]

    try:
        args, kwargs = pytree.tree_map(stand_in, (call.args, call.kwargs))
        args, kwargs = recorder.inputs(inspect.signature(module.forward), args, kwargs)
        recorder.integers(module)
        recorder.floats(module)
        module.training = training
        placed = dict(module.__dict__)
        watched: Any = contextlib.nullcontext()
        with caches_kept(module), caches_passed_by(module, TracedInt), torch.no_grad():
            if not other and sizes is None:
                watched = recorder.effects = recorder.watch(_run.__code__)
            with executor, recorder, watched:
                executor.recorder = recorder
                out = module.forward(*args, **kwargs)
                recorder.record_stored_sizes(placed)
        recorder.graph.output(recorder.node_of(out))
        recorder.doubts += recorder.effects.found if recorder.effects is not None else []
    except RAISED_BY_MODELS as error:  # it looks at values, or needs what runs around it
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Untraceable(f"does not run on its own without data: {first}") from error
    finally:
        for part, own in attributes:
            part.__dict__.clear()
            part.__dict__.update(own)


def _reads_dtype(node: fx.Node) -> bool:
    return node.target is getattr and node.args[1:] == ("dtype",)


def _tell_dtypes_apart(graph: fx.Graph, other: fx.Graph) -> bool:
    """A dtype that the code names stays the same where the inputs have another; one that it reads does not.

    Returns:
        Whether the code does the same for the other dtype.
    """
    left, right = ([n for n in _live(each) if not _reads_dtype(n)] for each in (graph, other))
    pair = (left, right)
    if [(n.op, n.target) for n in left] != [(n.op, n.target) for n in right]:
        return False
    numbers = [[v for n in each for v in pytree.tree_leaves((n.args, n.kwargs)) if type(v) is float] for each in pair]

    def named(value: Any, twin: Any) -> Any:
        if isinstance(value, tuple | list) and len(value) == len(twin):
            return type(value)([named(*pair) for pair in zip(value, twin, strict=True)])
        return twin if isinstance(twin, torch.dtype) else value

    for node, twin in zip(left, right, strict=True):
        node.args = named(node.args, twin.args)
        node.kwargs = {key: named(value, twin.kwargs.get(key)) for key, value in node.kwargs.items()}
    return numbers[0] == numbers[1]


def _guards(graph: fx.Graph) -> set[Any]:
    """What the code asks of sizes, and the numbers it asks about."""
    asked = [node.args[0] for node in graph.nodes if node.meta.get("guard")]
    return {(a.target, tuple(x if not isinstance(x, fx.Node) else x.meta.get("value") for x in a.args)) for a in asked}


def _alike(one: fx.Graph, other: fx.Graph) -> bool:
    """Whether two graphs do the same, but for sizes that they read where they need them."""
    left, right = _live(one), _live(other)
    twin = dict(zip(right, left, strict=False))

    def same(x: Any, y: Any) -> bool:
        if isinstance(x, fx.Node):
            return isinstance(y, fx.Node) and twin.get(y) is x
        if isinstance(x, tuple | list):
            return isinstance(y, tuple | list) and len(x) == len(y) and all(map(same, x, y))
        if isinstance(x, slice):
            return isinstance(y, slice) and all(map(same, (x.start, x.stop, x.step), (y.start, y.stop, y.step)))
        return bool(type(x) is type(y) and x == y)

    return len(left) == len(right) and all(
        (x.op, x.target) == (y.op, y.target) and same(x.args, y.args) and same([*x.kwargs.items()], [*y.kwargs.items()])
        for x, y in zip(left, right, strict=True)
    )


def _live(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that do something: without checks, and the numbers that only these need."""
    live: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        idle = "value" in node.meta or node.op == "get_attr" or node.target in (operator.getitem, getattr)
        if not node.meta.get("guard") and (not idle or any(user in live for user in node.users)):
            live.add(node)
    return [node for node in graph.nodes if node in live]


def _merged(usual: fx.Graph, training: fx.Graph) -> fx.Graph:
    """One graph of two that differ only in ``training`` and in rates of dropout that are zero without it."""
    twin: dict[fx.Node, fx.Node] = {}  # of nodes in training
    with usual.inserting_before(next(iter(usual.nodes))):
        mode = usual.get_attr("training")

    def settled(y: Any) -> Any:
        return twin[y] if isinstance(y, fx.Node) else y

    def same(x: Any, y: Any) -> Any:
        if isinstance(x, fx.Node) and y in twin:
            return twin[y]
        if isinstance(x, tuple | list) and isinstance(y, tuple | list) and len(x) == len(y):
            return type(x)([same(a, b) for a, b in zip(x, y, strict=True)])
        if isinstance(x, slice) and isinstance(y, slice):
            return slice(*[same(a, b) for a, b in zip(*[(v.start, v.stop, v.step) for v in (x, y)], strict=True)])
        if x is False and y is True:
            return mode
        if type(x) is type(y) and not isinstance(x, fx.Node) and x == y:
            return x
        if isinstance(x, float) and x == 0 and isinstance(y, fx.Node | float):
            with usual.inserting_after(twin[y] if isinstance(y, fx.Node) else mode):
                return usual.call_function(operator.mul, (settled(y), mode))
        raise DiffersInTraining("computes other things in training")

    if _guards(training) - _guards(usual):
        raise Untraceable("asks for other sizes in training")
    left, last = _live(usual)[::-1], mode
    for other in _live(training):
        node = left[-1] if left else None
        if node is None or (other.op, other.target) != (node.op, node.target):
            if other.op == "get_attr":
                with usual.inserting_after(mode):
                    twin[other] = usual.get_attr(str(other.target))
                continue
            if other.target is not F.dropout or other.args[0] not in twin:
                raise DiffersInTraining("runs other code in training")
            rate = settled(other.kwargs.get("p", other.args[1] if len(other.args) > 1 else 0.5))
            with usual.inserting_after(last):
                last = twin[other] = usual.call_function(F.dropout, (twin[other.args[0]], rate, mode))  # type: ignore[index]
            continue
        if node.kwargs.keys() != other.kwargs.keys():
            raise DiffersInTraining("runs other code in training")
        last = twin[other] = left.pop()
        node.args = same(node.args, other.args)
        node.kwargs = {key: same(value, other.kwargs[key]) for key, value in node.kwargs.items()}
    if left:
        raise DiffersInTraining("runs other code in training")
    return usual
