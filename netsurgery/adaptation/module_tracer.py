"""Hear what a module's own code does, call by call, with integers that remember where they come from.

The module is run alone on tensors without data. Calls of torch functions in its own code become nodes of a
``torch.fx`` graph; its submodules stay whole. An integer read from a shape or from an attribute of the module is
a ``TracedInt``: a node of the graph too, whatever is computed from it. Where an argument is the size of a dimension,
the node says of which (``node.meta["sizes"]``), so that it can be worked out anew for other sizes.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import math
import operator
import sys
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import _pytree as pytree

from netsurgery.adaptation.input_guards import expect_keys, expect_same, expect_tensor, expect_value
from netsurgery.analysis.costs import Sizes
from netsurgery.analysis.network import Network
from netsurgery.axes import Axis, channel, concat, leaves
from netsurgery.capture.caches import caches_kept, caches_passed_by
from netsurgery.capture.copies import named_modules, named_tensors, on_meta
from netsurgery.capture.custom_modules import CUSTOM_MODULES
from netsurgery.capture.fake_device import FakeDevice
from netsurgery.capture.meta_run import RAISED_BY_MODELS, meta_copy, track
from netsurgery.capture.meta_shapes import infer
from netsurgery.capture.op_observer import OpObserver
from netsurgery.capture.program import Call, Named, Program
from netsurgery.capture.side_effects import Effects
from netsurgery.capture.source_locations import format_where, is_library, location

__all__ = ["DiffersInTraining", "ModuleTrace", "SizeEvaluator", "Untraceable", "trace_module"]


class Untraceable(Exception):
    """The code of a module does something that a graph of torch functions cannot express."""


class DiffersInTraining(Untraceable):
    """The code of a module computes other things in training."""


class TracedInt(int):
    """An integer, and the node of the graph that computes it."""

    node: fx.Node

    def __hash__(self) -> int:
        return int.__hash__(self)

    def __getnewargs__(self) -> tuple[int]:
        return (int(self),)


def _number(value: int, node: fx.Node) -> TracedInt:
    number = TracedInt(value)
    number.node = node
    node.meta["value"] = int(value)
    return number


def _nodes(value: Any) -> Any:
    return value.node if isinstance(value, TracedInt) else value


def _computed(function: Callable[..., Any], reverse: bool = False) -> Callable[..., Any]:
    """Arithmetic: the result of integers remembers how it came about; one with a fraction is settled."""

    def compute(self: TracedInt, *others: Any) -> Any:
        operands = (*others, self) if reverse else (self, *others)
        if not all(isinstance(o, int) for o in others):
            return NotImplemented if others and not isinstance(others[0], float) else _settle(function, operands)
        value = function(*[int(o) for o in operands])
        if not isinstance(value, int):
            return _settle(function, operands)
        return _number(value, self.node.graph.call_function(function, tuple(map(_nodes, operands))))

    return compute


def _settle(function: Callable[..., Any], operands: tuple[Any, ...]) -> Any:
    plain = [int(o) if isinstance(o, TracedInt) else o for o in operands]
    for operand in operands:
        if isinstance(operand, TracedInt):
            _guard(operator.eq, operand, int(operand))
    return function(*plain)


def _compared(function: Callable[..., bool]) -> Callable[..., Any]:
    """Comparison: the way the code then takes holds only while the answer stays."""

    def compare(self: TracedInt, other: Any) -> Any:
        if not isinstance(other, int | float):
            return NotImplemented
        return _guard(function, self, other)

    return compare


_OTHER_WAY = (
    "netsurgery rewrote this module as it ran when it was traced; at these other sizes its code would take another "
    "way: trace with inputs of such sizes"
)
_OPPOSITE = {
    operator.eq: operator.ne, operator.lt: operator.ge, operator.le: operator.gt,
    operator.ne: operator.eq, operator.ge: operator.lt, operator.gt: operator.le,
}  # fmt: skip


def _guard(function: Callable[..., bool], number: Any, other: Any) -> bool:
    answer = bool(function(int(number), int(other) if isinstance(other, TracedInt) else other))
    graph = number.node.graph
    condition = graph.call_function(function if answer else _OPPOSITE[function], (number.node, _nodes(other)))
    condition.meta["value"] = True
    check = graph.call_function(torch._assert, (condition, _OTHER_WAY))
    check.meta["guard"] = True
    return answer


for _name in ("add", "sub", "mul", "floordiv", "mod", "truediv", "pow"):
    setattr(TracedInt, f"__{_name}__", _computed(getattr(operator, _name)))
    setattr(TracedInt, f"__r{_name}__", _computed(getattr(operator, _name), reverse=True))
for _name in ("neg", "pos", "abs"):
    setattr(TracedInt, f"__{_name}__", _computed(getattr(operator, _name)))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(TracedInt, f"__{_name}__", _compared(getattr(operator, _name)))
TracedInt.__bool__ = lambda self: _guard(operator.ne, self, 0)  # type: ignore[method-assign]
TracedInt.__float__ = lambda self: float(_settle(int, (self,)))  # type: ignore[method-assign]
TracedInt.__int__ = int.__int__  # type: ignore[method-assign]


class TracedFloat(float):
    """A number with a fraction that is an attribute, such as a rate of dropout, and the node that reads it there.

    What is computed from it is a plain number.
    """

    node: fx.Node


class Shape(tuple[int, ...]):
    """The sizes of a tensor, as ``torch.Size`` has them, but numbers that remember."""

    __slots__ = ()

    def numel(self) -> int:
        return math.prod(self)


# What is a size ------------------------------------------------------------------------------------------------

Size = tuple[
    tuple[int, ...], Axis
]  # where among a node's arguments an integer stands, and the dimension it is the size of
Slot = tuple["_FunctionRecorder", list[Any], dict[str, Any], Any]

_NEW = {"new_zeros", "new_ones", "new_empty", "zeros", "ones", "empty", "rand", "randn"}


def _listed(args: list[Any], kwargs: dict[str, Any], first: int, *keys: str) -> list[Any]:
    """Sizes given as one list, one by one, or by keyword."""
    given = next((kwargs.pop(key) for key in keys if key in kwargs), args[first:])
    return list(given[0]) if len(given) == 1 and isinstance(given[0], tuple | list) else list(given)


def _sized(name: str, args: list[Any], kwargs: dict[str, Any], axes: _Axes, out: Any) -> tuple[list[Any], list[Size]]:
    """The arguments of a call in one fixed order, and which of its integers are sizes of dimensions."""
    if name in ("view", "reshape", "expand") and not isinstance(args[-1], torch.dtype):
        sizes = _listed(args, kwargs, 1, "size", "shape")
        return [args[0], *sizes], [((1 + i,), axis) for i, axis in enumerate(axes.of(out))]
    if name in _NEW:
        first = 1 if name.startswith("new_") else 0
        sizes = _listed(args, kwargs, first, "size")
        return [*args[:first], sizes], [((first, i), axis) for i, axis in enumerate(axes.of(out))]
    if name == "unflatten":
        dim, sizes = (
            kwargs.pop(key, args[1 + i] if len(args) > 1 + i else None) for i, key in enumerate(("dim", "sizes"))
        )
        at = dim % args[0].dim()
        return [args[0], dim, list(sizes or ())], [((2, i), axes.of(out)[at + i]) for i in range(len(sizes or ()))]
    if name in ("split", "split_with_sizes"):
        keys = ("split_size", "split_size_or_sections", "split_sizes")
        given: Any = next((kwargs.pop(key) for key in keys if key in kwargs), args[1] if len(args) > 1 else None)
        dim = kwargs.pop("dim", args[2] if len(args) > 2 else 0)
        parts = [axes.of(part)[dim] for part in out]
        if isinstance(given, int):
            return [args[0], given, dim], [((1,), parts[0])]
        return [args[0], list(given), dim], [((1, i), part) for i, part in enumerate(parts)]
    if name == "__getitem__":
        index = list(args[1]) if isinstance(args[1], tuple) else [args[1]]
        return [args[0], tuple(index)], _bounds(args[0], index, axes)
    if name == "narrow":
        before = next((node.meta.get("expected", {}).get("start") for node in axes.operations), None)
        sizes = [((3,), axes.of(out)[args[1]])] + ([((2,), before)] if before is not None else [])
        return args, sizes
    if name in ("layer_norm", "rms_norm"):
        shape = list(kwargs.pop("normalized_shape", args[1] if len(args) > 1 else ()))
        own = axes.of(args[0])[-len(shape) :]
        return [args[0], shape, *args[2:]], [((1, i), axis) for i, axis in enumerate(own)]
    if name == "group_norm":
        groups = [node.meta["names"]["g"] for node in axes.operations if "g" in node.meta.get("names", {})]
        return args, [((1,), groups[0])] if groups and len(args) > 1 else []
    return args, []


def _bounds(x: Tensor, index: list[Any], axes: _Axes) -> list[Size]:
    """The bounds of slices: they are those of the slices that torch has then done, in the same order."""
    done = [node for node in axes.operations if node.target is torch.ops.aten.slice.Tensor]
    sizes: list[Size] = []
    taken = sum(1 for item in index if item is not None and item is not Ellipsis)
    dim = 0
    for place, item in enumerate(index):
        if item is Ellipsis:
            dim += x.dim() - taken
        elif isinstance(item, slice):
            start, stop, step = item.indices(x.shape[dim])
            if (start, stop, step) != (0, x.shape[dim], 1) and done:
                node = done.pop(0)
                before = node.meta.get("expected", {}).get("start")
                if before is not None:
                    end = concat([before, node.meta["dims"][node.args[1] if len(node.args) > 1 else 0]])
                    bounds = [((1, place, 0), before, item.start), ((1, place, 1), end, item.stop)]
                    sizes += [(where, axis) for where, axis, bound in bounds if bound is not None]
            dim += 1
        elif item is not None:
            dim += 1
    return sizes


_INLINE: dict[Any, Callable[..., Any]] = {}


def _inlined(function: Any) -> Callable[..., Any]:
    """A function of torch whose body is heard instead of the call: the same code, but never handed over whole."""
    if function not in _INLINE:
        scope = {**function.__globals__, "has_torch_function": lambda _: False}
        copied = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
        copied.__kwdefaults__ = function.__kwdefaults__
        _INLINE[function] = copied
    return _INLINE[function]


class _Axes:
    """The dimensions of the tensors of one call, and the recorded operations that it came to."""

    def __init__(self, dims: dict[int, Any], operations: list[fx.Node]):
        self.dims, self.operations = dims, operations

    def of(self, tensor: Tensor) -> tuple[Axis, ...]:
        return self.dims[id(tensor)]  # type: ignore[no-any-return]


# The ears --------------------------------------------------------------------------------------------------------


def _reads_attribute(node: fx.Node) -> bool:
    """Whether a number is worked out from an attribute of the module."""
    sources = [source for source in node.all_input_nodes if "value" in source.meta]
    return "attribute" in node.meta or any(map(_reads_attribute, sources))


class _MetaExecutor(OpObserver):
    """Answers operations, and lets the ears know which submodules run."""

    def __init__(self) -> None:
        super().__init__()
        self.recorder: _FunctionRecorder | None = None
        self.dims: dict[int, Any] = {}
        self.alive: list[Any] = []
        self.done: list[fx.Node] = []

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = infer(func, args, kwargs)
        self.place(out, None)
        self.record_scripted(func, args, kwargs, out)
        return out

    def record_scripted(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Scripted functions run operations without calling torch functions: the ears hear these here."""
        if self.recorder is not None and not self.recorder.paused and not self.recorder.busy:
            self.recorder.bind(out, self.recorder.emit(func, func._opname, list(args), kwargs, out, self.done[-1:]))

    def note_alias(self, tensor: Tensor, other: Tensor) -> Tensor:
        self.alive.append(other)
        if id(tensor) in self.dims:
            self.dims[id(other)] = self.dims[id(tensor)]
        return other

    def place(self, out: Any, dims: Any) -> None:
        """Note the dimensions of results; without any, they are nobody's."""
        for i, tensor in enumerate(out) if isinstance(out, list | tuple) else [(None, out)]:
            if isinstance(tensor, Tensor):
                own = dims if i is None or dims is None else dims[i]
                self.dims[id(tensor)] = tuple(map(channel, tensor.shape)) if own is None else own
        self.alive.append(out)

    def call(self, path: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not path or self.recorder is None or self.recorder.paused:
            return super().call(path, forward, args, kwargs)
        with self.recorder.pause(path):
            out = super().call(path, forward, _plain(args), _plain(kwargs))
        return self.recorder.record_module(path, args, kwargs, out)


class _Follower(_MetaExecutor):
    """Runs beside the recorded operations of one call, and knows the dimensions of every tensor."""

    def __init__(self, program: Program, call: Call):
        super().__init__()
        self.operations = iter(program.operations[call.begin : call.end])

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        node = next(self.operations, None)
        if node is None or node.target is not func:
            raise Untraceable(f"{func} runs where {node.target if node else 'nothing'} ran before")
        out = infer(func, args, kwargs)
        self.place(out, node.meta["dims"])
        self.done.append(node)
        self.record_scripted(func, args, kwargs, out)
        return out


_STARS: dict[Any, tuple[str, Any]] = {
    inspect.Parameter.VAR_POSITIONAL: ("*", ()),
    inspect.Parameter.VAR_KEYWORD: ("**", {}),
}
_OF_MEMORY = {"is_contiguous", "stride", "storage_offset", "data_ptr"}
_OF_GRADIENTS = {"register_hook", "register_post_accumulate_grad_hook", "retain_grad", "backward"}
_OF_RECORDING = {
    "requires_grad",
    "grad_fn",
    "grad",
    "is_leaf",
    "retains_grad",
    "output_nr",
    "_version",
    "_backward_hooks",
}
_SETTLED = (bool, int, float, str, type(None), type(Ellipsis), torch.layout, torch.memory_format, complex)


class _FunctionRecorder(TorchFunctionMode):
    """Hears each call of a torch function in a module's own code."""

    def __init__(self, module: nn.Module, names: dict[int, str], watcher: _MetaExecutor, device: torch.device):
        super().__init__()
        self.module = module
        self.answers = FakeDevice(_illegible, device).answers
        self.graph = fx.Graph()
        self.names, self.watcher = names, watcher
        self.known: dict[int, fx.Node] = {}
        self.read: dict[str, fx.Node] = {}
        self.dtypes: dict[torch.dtype, fx.Node] = {}
        self.doubts: list[str] = []
        self.written: dict[str, Any] = {}  # attributes that keep sizes
        self.paused = False
        self.busy = False  # inside of a torch function that is heard
        self.arguments: dict[str, Any] = {}
        self.effects: Effects | None = None  # what the code does beside computing, where this is watched

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """What runs now is part of a torch function."""
        before, self.busy = self.busy, True
        try:
            yield
        finally:
            self.busy = before

    @contextlib.contextmanager
    def pause(self, path: str) -> Iterator[None]:
        """Not to listen for a while: inside of a submodule."""
        self.paused, part = True, self.module.get_submodule(path)
        try:
            with torch._C.DisableTorchFunction(), self.effects.of(part) if self.effects else contextlib.nullcontext():
                yield
        finally:
            self.paused = False

    def attribute(self, name: str) -> fx.Node:
        if name not in self.read:
            self.read[name] = self.graph.get_attr(name)
        return self.read[name]

    def contained(self, tensor: Tensor, name: str) -> fx.Node:
        """A tensor in a dictionary or list that is an attribute."""
        attribute = name.partition("[")[0]
        owner, _, key = attribute.rpartition(".")
        node = self.attribute(attribute)
        for step in _keys(self.module.get_submodule(owner).__dict__[key], tensor) or ():
            if not isinstance(step, str | int):
                raise Untraceable(f"keeps a tensor under a {type(step).__name__}")
            node = self.graph.call_function(operator.getitem, (node, step))
        return node

    def node_of(self, value: Any) -> Any:
        """What stands in the graph for an argument."""
        if isinstance(value, Tensor):
            if id(value) in self.known:
                return self.known[id(value)]
            if id(value) not in self.names:
                raise Untraceable("uses a tensor from outside")
            name = self.names[id(value)]
            return self.contained(value, name) if "[" in name else self.attribute(name)
        if isinstance(value, TracedInt | TracedFloat):
            return value.node
        if isinstance(value, torch.dtype):
            return self.dtypes.get(value, value)
        if isinstance(value, torch.device):
            if not self.known:
                raise Untraceable("makes a tensor on a device before it has seen an input")
            return self.graph.call_function(getattr, (next(iter(self.known.values())), "device"))
        if isinstance(value, slice):
            return slice(*map(self.node_of, (value.start, value.stop, value.step)))
        if isinstance(value, tuple | list):
            return (list if type(value) is list else tuple)([self.node_of(item) for item in value])
        if type(value) is dict:
            return {key: self.node_of(item) for key, item in value.items()}
        if isinstance(value, _SETTLED):
            plain: Any = next((kind for kind in (float, complex, str) if isinstance(value, kind)), None)
            return value if plain is None else plain(value)  # numpy has subclasses of these
        raise Untraceable(f"hands over a {type(value).__name__}")

    def inputs(self, signature: inspect.Signature, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Placeholders for what the module is given; integers among it remember so."""
        bound = signature.bind(*args, **kwargs)
        nodes = {}
        for name, parameter in signature.parameters.items():
            default = () if parameter.default is parameter.empty else (parameter.default,)
            if not all(isinstance(value, _SETTLED) for value in default):
                if name not in bound.arguments:
                    raise Untraceable(f"has an argument {name} with a default that is no plain value")
                default = (...,)  # what was traced is refused where this is left out
            stars, absent = _STARS.get(parameter.kind, ("", parameter.default))
            nodes[name] = self.graph.placeholder(stars + name, None, *default)
            bound.arguments.setdefault(name, absent)
        for name, node in nodes.items():
            bound.arguments[name] = self.given(bound.arguments[name], node, name)
        self.arguments = dict(bound.arguments)
        return bound.args, bound.kwargs

    def watch(self) -> Effects:
        """What sees the effects of the module's own code."""
        kind: Any = type(self.module)
        start = getattr(kind.forward, "__code__", _run.__code__)
        return Effects({"self": self.module, **self.arguments}, start)

    def given(self, value: Any, node: fx.Node, name: str) -> Any:
        """An input of the module, and what the graph makes sure of: that it is of the kind that was traced."""
        if isinstance(value, Tensor):
            kind = "floating" if value.is_floating_point() else "complex" if value.is_complex() else str(value.dtype)
            check = self.graph.call_function(expect_tensor, (node, value.dim(), kind, name))
            check.meta["dtype"] = str(value.dtype)
            if id(value) in self.known:  # code may ask whether two inputs are one
                self.graph.call_function(expect_same, (node, self.known[id(value)], name))
            self.known.setdefault(id(value), node)
        elif type(value) is int:
            return _number(value, node)
        elif type(value) in (tuple, list, dict):
            keys = list(value) if isinstance(value, dict) else len(value)
            self.graph.call_function(expect_keys, (node, keys, name))
            items = value.items() if isinstance(value, dict) else enumerate(value)
            made = {k: self.given(v, self.graph.call_function(operator.getitem, (node, k)), name) for k, v in items}
            return made if isinstance(value, dict) else type(value)(made.values())
        elif isinstance(value, _SETTLED):
            self.graph.call_function(expect_value, (node, value, name))  # type: ignore[arg-type]
        else:
            raise Untraceable(f"is given a {type(value).__name__} ({name})")
        return value

    def integers(self, module: nn.Module) -> None:
        """Let the integer attributes of a module remember that they are its attributes."""
        for name, value in list(module.__dict__.items()):
            if name.startswith("_"):
                continue
            if type(value) is int:
                module.__dict__[name] = self.integer(value, name, None, self.attribute(name))
            elif type(value) in (tuple, list) and value and all(type(item) is int for item in value):
                whole = self.attribute(name)
                items = [self.graph.call_function(operator.getitem, (whole, i)) for i in range(len(value))]
                made = [self.integer(v, name, i, node) for i, (v, node) in enumerate(zip(value, items, strict=True))]
                module.__dict__[name] = type(value)(made)

    def fractions(self, module: nn.Module) -> None:
        """The same for attributes with a fraction, also those of its submodules (``self.drop.p``)."""
        for path, part in named_modules(module).items():
            for name, value in part.__dict__.items():
                if type(value) is float and not name.startswith("_"):
                    part.__dict__[name] = fraction = TracedFloat(value)
                    fraction.node = self.attribute(f"{path}.{name}" if path else name)

    def integer(self, value: int, name: str, index: int | None, node: fx.Node) -> TracedInt:
        node.meta["attribute"] = name, index
        return _number(value, node)

    def writes_size(self, name: str, before: Any) -> bool:
        """Write a size of the inputs that the code keeps in an attribute, unless it has looked at the one before."""
        value = self.module.__dict__[name]
        sizes = value if type(value) in (tuple, list) else [value]
        earlier = before if type(before) in (tuple, list) else [] if before is None else [before]
        if not all(isinstance(size, TracedInt) and not _reads_attribute(size.node) for size in sizes):
            return False
        if not all(isinstance(size, TracedInt) and not size.node.users for size in earlier):
            return False
        self.written[name] = _plain(value)
        self.graph.call_function(operator.setitem, (self.graph.get_attr("__dict__"), name, self.node_of(value)))
        return True

    def take_back(self, placed: dict[str, Any]) -> None:
        """Write down the sizes that the code has kept in attributes, and leave these as they were."""
        own = self.module.__dict__
        for name in [name for name, value in own.items() if placed.get(name, placed) is not value]:
            if self.writes_size(name, placed.get(name)):
                if name in placed:
                    own[name] = placed[name]
                else:
                    del own[name]

    def bind(self, out: Any, node: fx.Node) -> None:
        """Note that a node stands for a result."""
        if isinstance(out, Tensor):
            self.known[id(out)] = node
            self.watcher.alive.append(out)
        elif isinstance(out, tuple | list | dict):
            for key, item in out.items() if isinstance(out, dict) else enumerate(out):
                if isinstance(item, Tensor | tuple | list | dict):
                    self.bind(item, self.graph.call_function(operator.getitem, (node, key)))
        elif out is not None:
            raise Untraceable(f"gets a {type(out).__name__}")

    def record_module(self, target: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """A submodule has run."""
        node = self.graph.call_module(target, self.node_of(args), self.node_of(kwargs))
        self.bind(out, node)
        return out

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self.effects.aside() if self.effects else contextlib.nullcontext():
            return self.trace_module(func, args, dict(kwargs or {}))

    def trace_module(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The result of a torch function, noted."""
        if func is F.multi_head_attention_forward:
            with self:
                return _inlined(func)(*args, **kwargs)
        name = func.__name__
        if name in _OF_GRADIENTS:
            raise Untraceable(_placed(f"calls {name}"))
        if func in self.answers:
            return self.answers[func]
        if func in _LIKE:
            with self:
                return _LIKE[func](args[0], args[1].shape)
        if name == "__get__":
            return self.attribute_of(args[0], func.__self__.__name__)
        if func in (Tensor.size, Tensor.numel, Tensor.nelement, Tensor.__len__):
            return self.size(name, args, kwargs)
        start = len(self.watcher.done)
        with self.inside():
            out = func(*_plain(args), **_plain(kwargs))
        if name in _OF_MEMORY or (out is None and name != "__setitem__" and any(isinstance(a, Tensor) for a in args)):
            self.doubts.append(_placed(f"calls {name}"))
        tensors = isinstance(out, Tensor) or any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(out))
        if tensors or name == "__setitem__":
            self.bind(out, self.emit(func, name, list(args), kwargs, out, self.watcher.done[start:]))
        return out

    def attribute_of(self, x: Tensor, name: str) -> Any:
        if name in _OF_RECORDING and not _is_asked_by_torch():
            self.doubts.append(_placed(f"asks for {name}"))
        with self.inside():
            value = getattr(x, name)
        if name == "shape":
            return self.shape(x)
        if name == "dtype":
            self.dtypes[value] = self.graph.call_function(getattr, (self.node_of(x), "dtype"))
        elif isinstance(value, Tensor):
            self.bind(value, self.graph.call_function(getattr, (self.node_of(x), name)))
        return value

    def shape(self, x: Tensor) -> Shape:
        axes = self.watcher.dims.get(id(x), (None,) * x.dim())
        source = self.node_of(x)

        def read(dim: int) -> TracedInt:
            node = self.graph.call_method("size", (source, dim))
            node.meta["axis"] = axes[dim]
            return _number(x.shape[dim], node)

        return Shape([read(dim) for dim in range(x.dim())])

    def size(self, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        shape = self.shape(args[0])
        if name == "size":
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            return shape if dim is None else shape[dim]
        if name == "__len__":
            _guard(operator.eq, shape[0], int(shape[0]))
            return int(shape[0])
        return shape.numel()

    def emit(
        self, func: Any, name: str, args: list[Any], kwargs: dict[str, Any], out: Any, operations: list[fx.Node]
    ) -> fx.Node:
        axes = _Axes(self.watcher.dims, operations)
        args, sizes = _sized(name, args, kwargs, axes, out)
        given = tuple([self.node_of(a) for a in args]), {key: self.node_of(value) for key, value in kwargs.items()}
        if name.startswith("__") and hasattr(operator, name):
            node = self.graph.call_function(getattr(operator, name), *given)
        elif getattr(Tensor, name, None) is func or (name in _AS_METHODS and isinstance(args[0], Tensor)):
            node = self.graph.call_method(name, *given)
        elif isinstance(func, OpOverload) or (resolve_name(func) or "").startswith("torch."):
            node = self.graph.call_function(func, *given)
        else:
            raise Untraceable(f"calls {func}")
        node.meta["sizes"] = sizes
        if name in ("chunk", "tensor_split") and isinstance(out, tuple | list):
            node.meta["parts"] = [axes.of(part)[kwargs.get("dim", args[2] if len(args) > 2 else 0)] for part in out]
        if name == "scaled_dot_product_attention" and kwargs.get("scale") is None:
            node.meta["scale"] = axes.of(args[0])[-1]
        return node


_LIKE: dict[Any, Callable[..., Any]] = {
    Tensor.view_as: Tensor.view, Tensor.reshape_as: Tensor.reshape, Tensor.expand_as: Tensor.expand,
}  # fmt: skip
_AS_METHODS = ("reshape", "view", "expand", "unflatten")


def _illegible(tensor: Tensor) -> Tensor:
    raise Untraceable(_placed("looks at values"))


def _placed(what: str) -> str:
    """What the code does, and where."""
    return f"{what} {format_where(location())}".rstrip()


def _is_asked_by_torch() -> bool:
    """Whether the code that asks is torch's own, which asks to choose among ways to the same result."""
    frame: Any = sys._getframe(2)
    while frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return is_library(frame.f_code.co_filename)


def _keys(value: Any, tensor: Tensor) -> list[Any] | None:
    """Where a tensor is in nested dictionaries and lists."""
    if value is tensor:
        return []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, item in items:
        if (found := _keys(item, tensor)) is not None:
            return [key, *found]
    return None


def _plain(value: Any) -> Any:
    """Arguments with plain integers."""
    if isinstance(value, TracedInt):
        return int(value)
    if isinstance(value, TracedFloat):
        return float(value)
    if isinstance(value, slice):
        return slice(*map(_plain, (value.start, value.stop, value.step)))
    if type(value) is dict:
        return {key: _plain(item) for key, item in value.items()}
    if type(value) in (tuple, list, Shape):
        return (list if type(value) is list else tuple)([_plain(item) for item in value])
    return value


# Hearing ---------------------------------------------------------------------------------------------------------


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
    again: Callable[..., _FunctionRecorder]  # in training? with other dtypes? at which sizes?
    free: list[Axis]  # channels of the inputs that may be of any size
    attributes: dict[str, Any]
    training: bool = False
    code: frozenset[CodeType] = frozenset()

    @functools.cached_property
    def alone(self) -> fx.Graph:
        """The graph that stands for the code in the mode in which it was heard.

        Raises:
            Deaf: there is none; the message says why.
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
            Deaf: there is none; the message says why.
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
            Deaf: it does not: a loop runs once for each position, say.
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
        Deaf: the code cannot be expressed as a graph; the message says why.
    """
    if type(module) in CUSTOM_MODULES:
        raise Untraceable("is one operation")
    device = next((t.device for t in network.tensors.values()), torch.device("cpu"))
    usual = meta_copy(module, program.mode)

    def listen(training: bool, other: bool, sizes: Sizes | None = None) -> _FunctionRecorder:
        meta, names = _in_other_dtypes(*meta_copy(module, program.mode)) if other else usual
        watcher = _MetaExecutor() if training != in_training or other or sizes else _Follower(program, call)
        track(meta, watcher)
        recorder = _FunctionRecorder(meta, names, watcher, device)
        _run(meta, recorder, call, network, training, other, sizes)
        missed = recorder.effects is not None and recorder.effects.missed and not recorder.doubts
        return listen(training, other, sizes) if missed else recorder

    heard = listen(training=in_training, other=False)
    if heard.written and not _writes_again(usual[0], heard, functools.partial(listen, in_training, False)):
        heard.doubts.append(f"sets its attribute {next(iter(heard.written))}")
    given = [leaf for leaf in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(leaf, fx.Node)]
    free = [leaf for node in given for axis in node.meta["dims"] for leaf in leaves(axis)]
    free = list(dict.fromkeys(leaf for leaf in free if leaf not in network.by_channel))
    code = frozenset(heard.effects.ran if heard.effects else ())
    return ModuleTrace(heard.graph, heard.doubts, listen, free, dict(module.__dict__), in_training, code)


def _writes_again(meta: nn.Module, heard: _FunctionRecorder, listen: Callable[[], _FunctionRecorder]) -> bool:
    """Whether the code does the same where it finds the sizes that it has kept."""
    before = dict(meta.__dict__)
    meta.__dict__.update(heard.written)
    second = listen()
    meta.__dict__.clear()
    meta.__dict__.update(before)
    return second.written == heard.written and _alike(heard.graph, second.graph)


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
    recorder: _FunctionRecorder,
    call: Call,
    network: Network,
    training: bool,
    other: bool,
    sizes: Sizes | None,
) -> None:
    attributes, watcher = [(part, dict(part.__dict__)) for part in named_modules(module).values()], recorder.watcher
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
            watcher.place(given[value], dims if isinstance(watcher, _Follower) else None)
        return given[value]

    try:
        args, kwargs = pytree.tree_map(stand_in, (call.args, call.kwargs))
        args, kwargs = recorder.inputs(inspect.signature(module.forward), args, kwargs)
        recorder.integers(module)
        recorder.fractions(module)
        module.training = training
        placed = dict(module.__dict__)
        watched: Any = contextlib.nullcontext()
        with caches_kept(module), caches_passed_by(module, TracedInt), torch.no_grad():
            if not other and sizes is None:
                watched = recorder.effects = recorder.watch()
            with watcher, recorder, watched:
                watcher.recorder = recorder
                out = module.forward(*args, **kwargs)
                recorder.take_back(placed)
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


class SizeEvaluator:
    """What the numbers of a graph are at other sizes, given the attributes of its module.

    Dimensions of channels that are not among ``units`` (batch, space, time) may be of any size.
    """

    def __init__(self, sizes: Sizes, attributes: Mapping[str, Any], units: Container[Axis]):
        self.sizes, self.attributes, self.units = sizes, attributes, units
        self.memo: dict[fx.Node, Any] = {}

    def free(self, axis: Axis) -> bool:
        """Whether a dimension has other sizes for other inputs: batch, space, time."""
        return any(leaf not in self.units for leaf in leaves(axis))

    def depends(self, value: Any) -> bool:
        """Whether a number depends on what the module is given."""
        if not isinstance(value, fx.Node):
            return False
        axis = value.meta.get("axis")
        if value.op == "placeholder" or (axis is not None and self.free(axis)):
            return True
        return any(map(self.depends, value.args))

    def __call__(self, value: Any) -> Any:
        if not isinstance(value, fx.Node):
            return value
        if value not in self.memo:
            self.memo[value] = self.work_out(value)
        return self.memo[value]

    def work_out(self, node: fx.Node) -> Any:
        """The value of one node."""
        if node.meta.get("axis") is not None:
            return self.sizes(node.meta["axis"])
        if "attribute" in node.meta:
            name, index = node.meta["attribute"]
            return self.attributes[name] if index is None else self.attributes[name][index]
        if node.op == "call_function" and all("value" in a.meta for a in node.all_input_nodes):
            return node.target(*map(self, node.args))  # type: ignore[operator]
        return node.meta["value"]


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
