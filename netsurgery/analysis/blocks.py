"""Residual blocks: modules whose output is their input plus something, so that the network works without them.

They are found on the recorded graph, not by names. Such a module runs once. Its output is the sum of its first input
and of branches computed from this input, whatever norms and activations come between and after. Nothing but the output
is read outside of the run.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import fx, nn

from netsurgery.axes import Axis, find
from netsurgery.capture.copies import named_modules
from netsurgery.capture.inputs import Tree
from netsurgery.capture.operations import aliased
from netsurgery.capture.paths import is_within, modules_around
from netsurgery.capture.program import Call, Program

__all__ = ["Block", "Place", "at", "constant_outputs", "places", "residual_blocks", "shortened"]

aten = torch.ops.aten


Place = tuple[Hashable, ...]  # indices and keys that lead to a part of nested tuples, lists and dictionaries


def places(value: Tree) -> dict[fx.Node, Place]:
    """The first place of each node in nested tuples, lists and dictionaries, in order."""
    found: dict[fx.Node, Place] = {}

    def visit(value: object, place: Place) -> None:
        if isinstance(value, fx.Node):
            found.setdefault(value, place)
        elif isinstance(value, tuple | list | dict):
            for step, item in value.items() if isinstance(value, dict) else enumerate(value):
                visit(item, (*place, step))

    visit(value, ())
    return found


def at(place: Place, value: Tree) -> Tree:
    """The part of a nested value that stands at a place."""
    for step in place:
        value = value[step]
    return value


@dataclass(frozen=True)
class Block:
    """One residual block.

    Attributes:
        path: of its module.
        call: its recorded run.
        source: the tensor that it adds to.
        result: the tensor that it gives.
    """

    path: str
    call: Call = field(repr=False, compare=False)
    source: fx.Node = field(repr=False, compare=False)
    result: fx.Node = field(repr=False, compare=False)

    @property
    def given(self) -> Place:
        """The place of the source in ``(args, kwargs)``."""
        return places((self.call.args, self.call.kwargs))[self.source]

    @property
    def returned(self) -> Place:
        """The place of the result in the value that the module returns."""
        return places(self.call.out)[self.result]


class _Run:
    """One recorded program, and the places of its nodes among the operations."""

    def __init__(self, program: Program):
        self.program = program
        self.place = {node: index for index, node in enumerate(program.operations)}
        self.calls: dict[str, list[Call]] = {}
        for call in program.calls:
            self.calls.setdefault(call.path, []).append(call)

    def position(self, node: fx.Node) -> int:
        """The index of the operation that gives a node; -1 for inputs and parameters."""
        while node.target is operator.getitem and node.op == "call_function":
            node = node.args[0]  # type: ignore[assignment]
        return self.place.get(node, -1)

    @cached_property
    def nodes(self) -> list[list[fx.Node]]:
        """For each operation its node and those that pick one of its results."""
        found: list[list[fx.Node]] = [[] for _ in self.place]
        for node in self.program.graph.nodes:
            if (place := self.position(node)) >= 0:
                found[place].append(node)
        return found

    def inside(self, call: Call) -> dict[fx.Node, None]:
        """The nodes of the operations of a call."""
        return {node: None for nodes in self.nodes[call.begin : call.end] for node in nodes}

    def block(self, path: str) -> Block | None:
        """The residual block that a module is in this run, if it is one."""
        calls = self.calls.get(path, [])
        if len(calls) != 1 or calls[0].end <= calls[0].begin:
            return None
        call = calls[0]
        inside = self.inside(call)
        source = next(iter(places((call.args, call.kwargs))), None)
        if source is None or self.position(source) >= call.begin:
            return None
        stream = _Stream(source, inside)
        result = next((node for node in places(call.out) if _alike(source, node) and stream.sums(node)), None)
        if result is None or self._escapes(call, inside, result) or self._clash(call, inside, source, result):
            return None
        return Block(path, call, source, result)

    def _escapes(self, call: Call, inside: Mapping[fx.Node, None], result: fx.Node) -> bool:
        """True if more than the result of a call is read outside of it, or if it writes where others read."""
        kept = {node for node in call.kept if isinstance(node, fx.Node)}
        for node in inside:
            outside = [user for user in node.users if user not in inside]
            if node is not result and outside and not (node in kept and all(user.op == "output" for user in outside)):
                return True
            if any(self._read_later(root, call, inside) for root in _written(node) if root not in inside):
                return True
        return False

    def _read_later(self, root: fx.Node, call: Call, inside: Mapping[fx.Node, None]) -> bool:
        """True if memory from outside that a call writes to is read later, otherwise than through its result."""
        if root.op == "get_attr":
            return not is_within(str(root.target), call.path)
        return any(True for _ in self._users(root, call.begin, inside))

    def _users(self, root: fx.Node, begin: int, inside: Mapping[fx.Node, None]) -> Iterator[tuple[fx.Node, bool]]:
        """Operations outside of a call that later read a tensor or a view of it, and whether they write to it."""
        seen, left = {root: None}, [root]
        while left:
            given = left.pop()
            for user in given.users:
                if user in inside:
                    continue
                views = [written for base, written in aliased(user) if base is given]
                if user.op == "output" or self.position(user) >= begin:
                    yield user, any(views)
                if views and user not in seen:
                    seen[user] = None
                    left.append(user)

    def _clash(self, call: Call, inside: Mapping[fx.Node, None], source: fx.Node, result: fx.Node) -> bool:
        """True if later code writes to the source or the result and reads the other: without the block they are one."""
        users = [[*self._users(node, call.end, inside)] for node in (source, result)]
        return all(users) and any(written for some in users for _, written in some)


def _alike(one: fx.Node, other: fx.Node) -> bool:
    """True if two tensors have the same dimensions."""
    a, b = one.meta["dims"], other.meta["dims"]
    same_type = one.meta.get("dtype") == other.meta.get("dtype")
    return same_type and len(a) == len(b) and all(map(_same, a, b))


def _same(one: Axis, other: Axis) -> bool:
    one, other = find(one), find(other)
    if one is other or (one.size == other.size == 1):
        return True
    return (
        bool(one.op)
        and one.op == other.op
        and len(one.terms) == len(other.terms)
        and all(map(_same, one.terms, other.terms))
    )


def _written(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes whose memory an operation writes to."""
    left = [base for base, written in aliased(node) if written]
    while left:
        base = left.pop()
        yield base
        left.extend(one for one, _ in aliased(base))


_SUMS = (aten.add, aten.add_)
_NORMS = (aten.native_layer_norm, aten.native_batch_norm, aten.native_group_norm, aten._fused_rms_norm)
_COPIES = (
    aten.clone, aten._to_copy, aten.detach, aten.alias, aten.view, aten._unsafe_view, aten.native_dropout,
    aten.permute, aten.transpose,
)  # fmt: skip


class _Stream:
    """Follows the residual stream from the result of a call back to its source."""

    def __init__(self, source: fx.Node, inside: Mapping[fx.Node, None]):
        self.source, self.inside = source, inside
        self.counts: dict[fx.Node, int] = {source: 0}
        self.computed: dict[fx.Node, None] = {source: None}
        for node in inside:
            if any(given in self.computed for given in node.all_input_nodes):
                self.computed[node] = None

    def sums(self, node: fx.Node) -> int:
        """The number of branches that are added to the source to give a node; 0 for a node that is no such sum."""
        return max(0, self._count(node))

    def _count(self, node: fx.Node) -> int:
        """The number of branches; -1 where the way back from a node does not lead to the source."""
        if node not in self.counts:
            self.counts[node] = self._counted(node) if node in self.inside else -1
        return self.counts[node]

    def _counted(self, node: fx.Node) -> int:
        kind = getattr(node.target, "overloadpacket", None)
        given = [one for one in node.all_input_nodes if "params" not in one.meta]
        if kind in _SUMS and len(given) == 2:
            for one, other in (given, given[::-1]):
                if other in self.computed and (count := self._count(one)) >= 0:
                    return count + 1
            return -1
        whole = node.target is operator.getitem and node.args[1] == 0
        passes = whole or kind in _NORMS or kind in _COPIES or torch.Tag.pointwise in getattr(node.target, "tags", ())
        return self._count(given[0]) if passes and len(given) == 1 else -1


def residual_blocks(model: nn.Module, programs: Sequence[Program]) -> tuple[Block, ...]:
    """The blocks of a model that can be left out, in the order in which they run.

    Among nested candidates, the outermost that repeat are taken: a decoder layer, and not its attention. Modules that
    only run a series of such blocks are no blocks. Nor are modules that run several times, that share parameters with
    others, or of which more than the output is read elsewhere.

    Example:
        >>> import torch, netsurgery
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> encoder = torch.nn.TransformerEncoder(layer, 3)
        >>> [block.path for block in netsurgery.trace(encoder, torch.zeros(1, 4, 8)).blocks]
        ['layers.0', 'layers.1', 'layers.2']
    """
    runs = [_Run(program) for program in programs]
    alone = _unshared(model)
    found: dict[str, Block] = {}
    for path in runs[0].calls:
        if path and path in alone:
            in_each = [run.block(path) for run in runs if path in run.calls]
            if in_each and all(in_each) and in_each[0] is not None:
                found[path] = in_each[0]
    chosen = _Choice(model, runs[0], found).outermost()
    return tuple(sorted((found[path] for path in chosen), key=lambda block: block.call.begin))


def _unshared(model: nn.Module) -> dict[str, None]:
    """The modules of which no part, parameter or buffer is anywhere else in the model too."""
    places: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(path)
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    places.setdefault(id(tensor), []).append(f"{path}.{name}" if path else name)
    shared = [own for own in places.values() if len(own) > 1]
    return {
        path: None
        for path in named_modules(model)
        if not any(any(is_within(p, path) for p in own) and not all(is_within(p, path) for p in own) for own in shared)
    }


class _Choice:
    """Chooses among nested candidates."""

    def __init__(self, model: nn.Module, run: _Run, found: Mapping[str, Block]):
        self.run, self.found = run, found
        self.modules = named_modules(model)
        self.kinds = {path: _kind(self.modules[path]) for path in found}
        counts: dict[Kind, int] = {}
        for kind in self.kinds.values():
            counts[kind] = counts.get(kind, 0) + 1
        self.repeated = {path for path, kind in self.kinds.items() if counts[kind] > 1}
        self.classes = {type(self.modules[path]) for path in self.repeated}
        self.within: dict[str | None, list[str]] = {}
        for path in found:
            around = [other for other in found if other != path and is_within(path, other)]
            self.within.setdefault(max(around, key=len, default=None), []).append(path)

    def outermost(self, around: str | None = None) -> list[str]:
        """The blocks to offer inside of a candidate, or of the model."""
        return [chosen for path in self.within.get(around, []) for chosen in self._chosen(path)]

    def _chosen(self, path: str) -> list[str]:
        if self._is_part(path):
            return []
        if path in self.repeated and not self._is_series(path):
            return [path]
        inner = self.outermost(path)
        if inner and (self._adds_nothing(path) or any(one in self.repeated for one in inner)):
            return inner
        return [] if self._runs_again(path) else [path]

    def _is_part(self, path: str) -> bool:
        """True if a module around a candidate is no block itself, but modules of its class are."""
        around = [one for one in modules_around(path) if one and one not in self.found]
        return any(_is_own(self.modules[one]) and type(self.modules[one]) in self.classes for one in around)

    def _is_series(self, path: str) -> bool:
        """True if a module only runs blocks that are alike: several, or one in a container."""
        inner = self.within.get(path, [])
        if len({self.kinds[one] for one in inner}) != 1 or not self._adds_nothing(path):
            return False
        return len(inner) > 1 or not _is_own(self.modules[path])

    def _adds_nothing(self, path: str) -> bool:
        """True if all operations of a module are operations of candidates in it."""
        calls = [self.found[one].call for one in self.within.get(path, [])]
        call = self.found[path].call
        return sum(one.end - one.begin for one in calls) == call.end - call.begin

    def _runs_again(self, path: str) -> bool:
        """True if a part with parameters runs several times in a module: shared blocks."""
        return any(
            is_within(one, path) and len(calls) > 1 and any(True for _ in self.modules[one].parameters())
            for one, calls in self.run.calls.items()
        )


Kind = tuple[object, ...]  # the class of a module, and the kinds of its parts


def _kind(module: nn.Module) -> Kind:
    """The classes of a module and its parts, but those without parameters (dropout of one rate is none at zero)."""
    parts = [child for child in module.children() if any(True for _ in child.parameters())]
    return type(module), tuple(map(_kind, parts))


def _is_own(module: nn.Module) -> bool:
    """True if a module is not one of torch's containers, whose class does not tell what it does."""
    return type(module) not in (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def constant_outputs(program: Program) -> list[bool]:
    """For each output of a program, True if its code makes that tensor, such as the length of a cache of each layer."""
    outputs: Tree = program.graph.output_node().args[0]
    return [one.op == "get_attr" and one.target in program.constants for one in outputs]


def shortened(program: Program, paths: Iterable[str]) -> Program:
    """A recorded program without some blocks: their operations go, and their input stands for their output.

    Constants are no outputs of it: their number may depend on the number of blocks.
    """
    run = _Run(program)
    blocks = [block for path in paths if (block := run.block(path)) is not None]
    graph = fx.Graph()
    renamed: dict[fx.Node, fx.Node] = {}
    gone = {node: None for block in blocks for node in run.inside(block.call)}
    stands = {block.result: block.source for block in blocks}
    for node in program.graph.nodes:
        if node in stands:
            renamed[node] = renamed[stands[node]]
        elif node.op == "output":
            left = [one for one, fixed in zip(node.args[0], constant_outputs(program), strict=True) if not fixed]
            graph.output(tuple(renamed[one] for one in left if one in renamed))  # a cache keeps less
        elif node not in gone and not (node.op == "get_attr" and node.users and all(u in gone for u in node.users)):
            renamed[node] = graph.node_copy(node, renamed.__getitem__)
            renamed[node].meta = copy.copy(node.meta)
    return replace(program, graph=graph, calls=[])
