"""Trace a module's own code as a graph of torch functions.

The module runs alone on tensors without data, in lockstep with one of its recorded calls. Where an argument is the size
of a dimension, the node names this dimension (``node.meta["sizes"]``), so that the size can be computed again.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import operator
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import CodeType

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from netsurgery.adaptation.function_recorder import FunctionRecorder, LockstepExecutor, MetaExecutor, Untraceable
from netsurgery.adaptation.input_guards import expect_tensor
from netsurgery.adaptation.traced_numbers import SizeEvaluator, TracedInt
from netsurgery.analysis.costs import Sizes
from netsurgery.analysis.network import Network
from netsurgery.axes import Axis, leaves_in
from netsurgery.capture.caches import caches_kept, caches_passed_by
from netsurgery.capture.copies import named_modules, named_tensors, on_meta
from netsurgery.capture.custom_modules import CUSTOM_MODULES
from netsurgery.capture.inputs import Kwargs, Tree
from netsurgery.capture.meta_run import RAISED_BY_MODELS, meta_copy, track
from netsurgery.capture.meta_shapes import empty_as
from netsurgery.capture.program import Call, Named, Program

__all__ = ["ModuleTrace", "trace_module"]


@dataclass
class ModuleTrace:
    """One run of a module's own code, recorded in one mode.

    Attributes:
        recorded: the graph as it was recorded; it shows the attributes that sizes come from.
        doubts: reasons why the graph acts otherwise than the code, whatever the sizes.
        rerun: records the code once more, in other dtypes or at other sizes.
        free: channels of the inputs that may be of any size.
        attributes: those of the module, by name.
        code: the functions that ran.
    """

    recorded: fx.Graph
    doubts: list[str]
    rerun: Callable[..., FunctionRecorder]
    free: list[Axis]
    attributes: Kwargs
    code: frozenset[CodeType] = frozenset()

    @functools.cached_property
    def graph(self) -> fx.Graph:
        """The graph that does the same as the code, in the mode in which it was recorded.

        Raises:
            Untraceable: there is none; the message says why.
        """
        if self.doubts:
            raise Untraceable(self.doubts[0])
        self.try_other_inputs()
        graph = copy.deepcopy(self.recorded)
        if any(map(_reads_dtype, graph.nodes)) and not self.follows_dtypes(graph):
            _keep_dtypes(graph)
        return graph

    def follows_dtypes(self, graph: fx.Graph) -> bool:
        """Write named dtypes into a graph as constants. True if the code does the same in other dtypes."""
        try:
            return _separate_dtypes(graph, self.rerun(other_dtypes=True).graph)
        except Untraceable:
            return False

    def try_other_inputs(self) -> None:
        """Make sure that the graph does the same as the code for inputs of other sizes, where the code takes these.

        Raises:
            Untraceable: it acts otherwise: a loop runs once for each position, say.
        """
        for chosen in (self.free, *([axis] for axis in self.free if len(self.free) > 1)):
            sizes = Sizes({axis: 2 * axis.size for axis in chosen})
            try:
                other = self.rerun(sizes=sizes).graph
            except Untraceable:  # the code does not run so; one size at a time may do
                continue
            values = SizeEvaluator(sizes, self.attributes, ())
            held = all(values(node.args[0]) for node in self.recorded.nodes if node.meta.get("guard"))
            if held and not _alike(self.recorded, other):
                raise Untraceable("does other things for inputs of other sizes")
            if chosen is self.free:
                return


def _keep_dtypes(graph: fx.Graph) -> None:
    """Accept only the dtypes that were traced: with others the code may do something else."""
    for node in graph.nodes:
        if node.target is expect_tensor:
            node.args = (*node.args[:2], node.meta["dtype"], node.args[3])


def trace_module(module: nn.Module, program: Program, call: Call, network: Network, training: bool) -> ModuleTrace:
    """Record one call of a module, in eval mode or in training.

    In training, a program that was recorded in eval mode serves, too, where only dropout and the like differ.

    Raises:
        Untraceable: the code cannot be expressed as a graph; the message says why.
    """
    if type(module) in CUSTOM_MODULES:
        raise Untraceable("is one operation")
    device = next((t.device for t in network.tensors.values()), torch.device("cpu"))
    original = meta_copy(module, program.mode)
    other_mode = at_rest = training and not original[0].training

    def record(other_dtypes: bool = False, sizes: Sizes | None = None) -> FunctionRecorder:
        meta, names = _in_other_dtypes(*meta_copy(module, program.mode)) if other_dtypes else original
        alone = other_dtypes or sizes is not None
        executor = MetaExecutor() if alone else LockstepExecutor(program, call, other_mode)
        track(meta, executor)
        recorder = FunctionRecorder(meta, names, executor, device, at_rest)
        _run(meta, recorder, call, network, training, other_dtypes, sizes)
        missed = recorder.effects is not None and recorder.effects.missed and not recorder.doubts
        return record(other_dtypes, sizes) if missed else recorder

    try:
        found = record()
    except Untraceable as reason:
        if not at_rest:
            raise
        at_rest = False  # dropout that the code always turns on was recorded in eval mode, too
        try:
            found = record()
        except Untraceable:
            raise reason from None
    if found.written and not _stores_again(original[0], found, record):
        found.doubts.append(f"sets its attribute {next(iter(found.written))}")
    given = [leaf for leaf in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(leaf, fx.Node)]
    free = [leaf for node in given for leaf in leaves_in(node.meta["dims"])]
    free = list(dict.fromkeys(leaf for leaf in free if leaf not in network.by_channel))
    code = frozenset(found.effects.ran if found.effects else ())
    return ModuleTrace(found.graph, found.doubts, record, free, dict(module.__dict__), code)


def _stores_again(meta: nn.Module, found: FunctionRecorder, record: Callable[[], FunctionRecorder]) -> bool:
    """True if the code does the same once the sizes that it stores are there."""
    before = dict(meta.__dict__)
    meta.__dict__.update(found.written)
    second = record()
    meta.__dict__.clear()
    meta.__dict__.update(before)
    return second.written == found.written and _alike(found.graph, second.graph)


def _in_other_dtypes(meta: nn.Module, names: dict[int, str]) -> tuple[nn.Module, dict[int, str]]:
    """A copy on meta with float tensors of another dtype each."""
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
    other_dtypes: bool,
    sizes: Sizes | None,
) -> None:
    attributes, executor = [(part, dict(part.__dict__)) for part in named_modules(module).values()], recorder.executor
    given: dict[fx.Node | Named, Tensor] = {}

    def stand_in(value: object) -> object:
        if not isinstance(value, fx.Node | Named):
            return value
        if value not in given:
            if isinstance(value, Named):
                given[value], dims = on_meta(network.tensors[value]).detach(), network.axes[value]
            else:
                (shape, strides), dims = value.meta["layout"], value.meta["dims"]
                given[value] = torch.empty_strided(shape, strides, dtype=value.meta["dtype"], device="meta")
                if sizes is not None:
                    given[value] = empty_as(value, sizes)
            given[value] = given[value].to(_other(given[value].dtype)) if other_dtypes else given[value]
            executor.place(given[value], dims if isinstance(executor, LockstepExecutor) else None)
        return given[value]

    try:
        args, kwargs = pytree.tree_map(stand_in, (call.args, call.kwargs))
        args, kwargs = recorder.inputs(inspect.signature(module.forward), args, kwargs)
        recorder.integers(module)
        recorder.floats(module)
        module.training = training
        placed = dict(module.__dict__)
        watched: AbstractContextManager[object] = contextlib.nullcontext()
        with caches_kept(module), caches_passed_by(module, TracedInt), torch.no_grad():
            if not other_dtypes and sizes is None:
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


def _separate_dtypes(graph: fx.Graph, other: fx.Graph) -> bool:
    """Find the dtypes that the code names: they are the same where the inputs have another dtype.

    Returns:
        True if the code does the same for the other dtype.
    """
    left, right = ([n for n in _live(each) if not _reads_dtype(n)] for each in (graph, other))
    pair = (left, right)
    if [(n.op, n.target) for n in left] != [(n.op, n.target) for n in right]:
        return False
    numbers = [[v for n in each for v in pytree.tree_leaves((n.args, n.kwargs)) if type(v) is float] for each in pair]

    def named(value: Tree, twin: Tree) -> Tree:
        if isinstance(value, tuple | list) and len(value) == len(twin):
            return type(value)([named(*pair) for pair in zip(value, twin, strict=True)])
        return twin if isinstance(twin, torch.dtype) else value

    for node, twin in zip(left, right, strict=True):
        node.args = named(node.args, twin.args)
        node.kwargs = {key: named(value, twin.kwargs.get(key)) for key, value in node.kwargs.items()}
    return numbers[0] == numbers[1]


def _alike(one: fx.Graph, other: fx.Graph) -> bool:
    """True if two graphs do the same; each may read the sizes that it needs at other places."""
    left, right = _live(one), _live(other)
    twin = dict(zip(right, left, strict=False))

    def same(x: object, y: object) -> bool:
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
    """The nodes that do something: all but checks, and the numbers that only checks need."""
    live: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        idle = "value" in node.meta or node.op == "get_attr" or node.target in (operator.getitem, getattr)
        if not node.meta.get("guard") and (not idle or any(user in live for user in node.users)):
            live.add(node)
    return [node for node in graph.nodes if node in live]
