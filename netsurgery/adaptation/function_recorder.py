"""Record the torch functions that a module's own code calls as nodes of a ``torch.fx`` graph.

The code runs on tensors without data. Its submodules run whole and become one ``call_module`` node each. The executor
below computes shapes, and knows the dimensions of each tensor where it runs in lockstep with a recorded run.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import _pytree as pytree

from netsurgery.adaptation.input_guards import expect_keys, expect_same, expect_tensor, expect_value
from netsurgery.adaptation.size_arguments import TorchCall, size_arguments
from netsurgery.adaptation.traced_numbers import Shape, TracedFloat, TracedInt, guard, plain, traced
from netsurgery.adaptation.training_arguments import call_in_eval
from netsurgery.axes import Dims, channel, find
from netsurgery.capture.copies import named_modules
from netsurgery.capture.fake_device import FakeDevice
from netsurgery.capture.inputs import Args, Inputs, Kwargs, Tree
from netsurgery.capture.meta_shapes import infer
from netsurgery.capture.op_observer import OpObserver
from netsurgery.capture.operations import OpCall
from netsurgery.capture.program import Call, Program
from netsurgery.capture.side_effects import Effects
from netsurgery.capture.source_locations import format_where, is_library, location

__all__ = ["FunctionRecorder", "LockstepExecutor", "MetaExecutor", "Untraceable"]


Function = Callable[..., Tree]  # of torch


class Untraceable(Exception):
    """The code of a module does something that a graph of torch functions cannot express."""


@functools.cache
def _inlined(function: FunctionType) -> Function:
    """A copy of a function of torch whose body is recorded, call by call, instead of the function as a whole."""
    scope = {**function.__globals__, "has_torch_function": lambda _: False}
    copied = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def _reads_attribute(node: fx.Node) -> bool:
    """True if a number is computed from an attribute of the module."""
    sources = [source for source in node.all_input_nodes if "value" in source.meta]
    return "attribute" in node.meta or any(map(_reads_attribute, sources))


class MetaExecutor(OpObserver):
    """Runs operations without data, and tells the recorder which submodules run."""

    def __init__(self) -> None:
        super().__init__()
        self.recorder: FunctionRecorder | None = None
        self.dims: dict[int, Dims] = {}
        self.alive: list[object] = []
        self.done: list[fx.Node] = []

    def see(self, call: OpCall) -> Tree:
        out = infer(call)
        self.place(out, None)
        self.record_scripted(call, out)
        return out

    def record_scripted(self, call: OpCall, out: Tree) -> None:
        """Record the operations that scripted functions run without calling torch functions."""
        if self.recorder is not None and not self.recorder.paused and not self.recorder.busy:
            assert isinstance(call.target, OpOverload)
            made = TorchCall(list(call.args), call.kwargs, out, self.dims, self.done[-1:])
            self.recorder.bind(out, self.recorder.emit(call.target, call.target._opname, made))

    def note_alias(self, tensor: Tensor, other: Tensor) -> Tensor:
        self.alive.append(other)
        if id(tensor) in self.dims:
            self.dims[id(other)] = self.dims[id(tensor)]
        return other

    def place(self, out: Tree, dims: Dims | list[Dims | None] | None) -> None:
        """Note the dimensions of results. Without any, each dimension is a new channel that nothing else has."""
        for i, tensor in enumerate(out) if isinstance(out, list | tuple) else [(None, out)]:
            if isinstance(tensor, Tensor):
                own: Tree = dims if i is None or dims is None else dims[i]
                self.dims[id(tensor)] = tuple(map(channel, tensor.shape)) if own is None else own
        self.alive.append(out)

    def call(self, path: str, forward: Callable[..., Tree], args: Args, kwargs: Kwargs) -> Tree:
        if not path or self.recorder is None or self.recorder.paused:
            return super().call(path, forward, args, kwargs)
        with self.recorder.pause(path):
            out = super().call(path, forward, plain(args), plain(kwargs))
        return self.recorder.record_module(path, args, kwargs, out)


class LockstepExecutor(MetaExecutor):
    """Runs in lockstep with the recorded operations of one call, and so knows the dimensions of each tensor.

    Args:
        other_mode: the run is in training, and the recorded one was in eval mode. Then each operation must read the
            same dimensions and numbers, and not only be the same.
    """

    def __init__(self, program: Program, call: Call, other_mode: bool = False):
        super().__init__()
        self.operations = iter(program.operations[call.begin : call.end])
        self.path, self.other_mode = call.path, other_mode

    def see(self, call: OpCall) -> Tree:
        node = next(self.operations, None)
        same = node is not None and node.target is call.target
        if self.other_mode and not (node is not None and same and self.reads_alike(node, call.args)):
            raise Untraceable("runs other code in training, and that run is not recorded")
        if node is None or not same:
            raise Untraceable(f"{call.target} runs where {node.target if node else 'nothing'} ran before")
        out = infer(call)
        self.place(out, node.meta["dims"])
        self.done.append(node)
        self.record_scripted(call, out)
        return out

    def reads_alike(self, node: fx.Node, args: Args) -> bool:
        """True if the dimensions and numbers that an operation reads are those of the recorded one."""

        def alike(now: Tree, then: Tree) -> bool:
            if isinstance(now, Tensor):
                return isinstance(then, fx.Node) and self.dims_of(now, then) == _standing_for(then)
            if isinstance(now, list | tuple):
                return len(now) == len(then) and all(map(alike, now, then))
            return not isinstance(now, int | float) or now == then

        return len(args) == len(node.args) and all(map(alike, args, node.args))

    def dims_of(self, tensor: Tensor, node: fx.Node) -> Dims | None:
        """The dimensions of a tensor; those of the recorded node for the parameter that this node names."""
        if id(tensor) in self.dims:
            return tuple(map(find, self.dims[id(tensor)]))
        name = self.recorder.names.get(id(tensor)) if self.recorder is not None else None
        whole = f"{self.path}.{name}" if self.path else name
        same = node.op == "get_attr" and (name is None or node.target == whole)
        return _standing_for(node) if same and tensor.shape == node.meta["shape"] else None


def _standing_for(node: fx.Node) -> Dims:
    return tuple(map(find, node.meta["dims"]))


_STARS: dict[object, tuple[str, object]] = {
    inspect.Parameter.VAR_POSITIONAL: ("*", ()),
    inspect.Parameter.VAR_KEYWORD: ("**", {}),
}
_MEMORY_LAYOUT = {"is_contiguous", "stride", "storage_offset", "data_ptr"}
_GRADIENT_HOOKS = {"register_hook", "register_post_accumulate_grad_hook", "retain_grad", "backward"}
_AUTOGRAD_STATE = {
    "requires_grad",
    "grad_fn",
    "grad",
    "is_leaf",
    "retains_grad",
    "output_nr",
    "_version",
    "_backward_hooks",
}
_CONSTANTS = (bool, int, float, str, type(None), type(Ellipsis), torch.layout, torch.memory_format, complex)


class FunctionRecorder(TorchFunctionMode):
    """Records each call of a torch function in a module's own code as a node of a graph."""

    def __init__(
        self, module: nn.Module, names: dict[int, str], executor: MetaExecutor, device: torch.device, at_rest: bool
    ):
        super().__init__()
        self.module = module
        self.answers = FakeDevice(_refuse_values, device).answers
        self.graph = fx.Graph()
        self.names, self.executor = names, executor
        self.at_rest = at_rest  # dropout and the like run as in eval mode, and are recorded as in training
        self.known: dict[int, fx.Node] = {}
        self.read: dict[str, fx.Node] = {}
        self.dtypes: dict[torch.dtype, fx.Node] = {}
        self.doubts: list[str] = []
        self.written: Kwargs = {}  # attributes that keep sizes
        self.paused = False
        self.busy = False  # inside of a torch function that is recorded
        self.arguments: Kwargs = {}
        self.effects: Effects | None = None  # side effects of the code, if they are observed

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Take the operations that run in this context as parts of a torch function."""
        before, self.busy = self.busy, True
        try:
            yield
        finally:
            self.busy = before

    @contextlib.contextmanager
    def pause(self, path: str) -> Iterator[None]:
        """Record nothing in this context: a submodule runs."""
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
        """The node of a tensor in a dictionary or list that is an attribute."""
        attribute = name.partition("[")[0]
        owner, _, key = attribute.rpartition(".")
        node = self.attribute(attribute)
        for step in _keys_to(self.module.get_submodule(owner).__dict__[key], tensor) or ():
            if not isinstance(step, str | int):
                raise Untraceable(f"keeps a tensor under a key of type {type(step).__name__}")
            node = self.graph.call_function(operator.getitem, (node, step))
        return node

    def node_of(self, value: Tree) -> Tree:
        """An argument as it stands in the graph, with nodes for tensors and traced numbers."""
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
        if isinstance(value, _CONSTANTS):
            plain: type | None = next((kind for kind in (float, complex, str) if isinstance(value, kind)), None)
            return value if plain is None else plain(value)  # numpy has subclasses of these
        raise Untraceable(f"passes a {type(value).__name__} to a function of torch")

    def inputs(self, signature: inspect.Signature, args: Args, kwargs: Kwargs) -> Inputs:
        """Placeholders for the inputs of the module; integers among them are traced."""
        bound = signature.bind(*args, **kwargs)
        nodes = {}
        for name, parameter in signature.parameters.items():
            default = () if parameter.default is parameter.empty else (parameter.default,)
            if not all(isinstance(value, _CONSTANTS) for value in default):
                if name not in bound.arguments:
                    raise Untraceable(f"has an argument {name} with a default that is no plain value")
                default = (...,)  # a call that leaves this out is refused
            stars, absent = _STARS.get(parameter.kind, ("", parameter.default))
            nodes[name] = self.graph.placeholder(stars + name, None, *default)
            bound.arguments.setdefault(name, absent)
        for name, node in nodes.items():
            bound.arguments[name] = self.guarded_input(bound.arguments[name], node, name)
        self.arguments = dict(bound.arguments)
        return bound.args, bound.kwargs

    def watch(self, caller: CodeType) -> Effects:
        """An observer of the side effects of the module's own code."""
        start = getattr(type(self.module).forward, "__code__", caller)
        return Effects({"self": self.module, **self.arguments}, start)

    def guarded_input(self, value: Tree, node: fx.Node, name: str) -> Tree:
        """An input of the module; a check that later inputs are of the same kind is added to the graph."""
        if isinstance(value, Tensor):
            kind = "floating" if value.is_floating_point() else "complex" if value.is_complex() else str(value.dtype)
            check = self.graph.call_function(expect_tensor, (node, value.dim(), kind, name))
            check.meta["dtype"] = str(value.dtype)
            if id(value) in self.known:  # code may ask whether two inputs are one
                self.graph.call_function(expect_same, (node, self.known[id(value)], name))
            self.known.setdefault(id(value), node)
        elif type(value) is int:
            return traced(value, node)
        elif type(value) in (tuple, list, dict):
            keys = list(value) if isinstance(value, dict) else len(value)
            self.graph.call_function(expect_keys, (node, keys, name))
            items = value.items() if isinstance(value, dict) else enumerate(value)
            made = {
                k: self.guarded_input(v, self.graph.call_function(operator.getitem, (node, k)), name) for k, v in items
            }
            return made if isinstance(value, dict) else type(value)(made.values())
        elif isinstance(value, _CONSTANTS):
            self.graph.call_function(expect_value, (node, value, name))  # type: ignore[arg-type]
        else:
            raise Untraceable(f"has an input of type {type(value).__name__} ({name})")
        return value

    def integers(self, module: nn.Module) -> None:
        """Put traced integers in place of the integer attributes of a module."""
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

    def floats(self, module: nn.Module) -> None:
        """Put traced floats in place of float attributes, also those of submodules (``self.drop.p``)."""
        for path, part in named_modules(module).items():
            for name, value in part.__dict__.items():
                if type(value) is float and not name.startswith("_"):
                    part.__dict__[name] = number = TracedFloat(value)
                    number.node = self.attribute(f"{path}.{name}" if path else name)

    def integer(self, value: int, name: str, index: int | None, node: fx.Node) -> TracedInt:
        node.meta["attribute"] = name, index
        return traced(value, node)

    def record_stored(self, name: str, before: Tree) -> bool:
        """Record that the code stores a size of its inputs in an attribute. False if it has read the earlier value."""
        value = self.module.__dict__[name]
        sizes = value if type(value) in (tuple, list) else [value]
        earlier = before if type(before) in (tuple, list) else [] if before is None else [before]
        if not all(isinstance(size, TracedInt) and not _reads_attribute(size.node) for size in sizes):
            return False
        if not all(isinstance(size, TracedInt) and not size.node.users for size in earlier):
            return False
        self.written[name] = plain(value)
        self.graph.call_function(operator.setitem, (self.graph.get_attr("__dict__"), name, self.node_of(value)))
        return True

    def record_stored_sizes(self, placed: Kwargs) -> None:
        """Record the sizes that the code has stored in attributes, and put the earlier values back."""
        own = self.module.__dict__
        for name in [name for name, value in own.items() if placed.get(name, placed) is not value]:
            if self.record_stored(name, placed.get(name)):
                if name in placed:
                    own[name] = placed[name]
                else:
                    del own[name]

    def bind(self, out: Tree, node: fx.Node) -> None:
        """Note which node computes a result."""
        if isinstance(out, Tensor):
            self.known[id(out)] = node
            self.executor.alive.append(out)
        elif isinstance(out, tuple | list | dict):
            for key, item in out.items() if isinstance(out, dict) else enumerate(out):
                if isinstance(item, Tensor | tuple | list | dict):
                    self.bind(item, self.graph.call_function(operator.getitem, (node, key)))
        elif out is not None:
            raise Untraceable(f"calls a function of torch that returns a {type(out).__name__}")

    def record_module(self, target: str, args: Args, kwargs: Kwargs, out: Tree) -> Tree:
        """Record that a submodule has run."""
        node = self.graph.call_module(target, self.node_of(args), self.node_of(kwargs))
        self.bind(out, node)
        return out

    def __torch_function__(self, func: Function, types: object, args: Args = (), kwargs: Kwargs | None = None) -> Tree:
        with self.effects.paused() if self.effects else contextlib.nullcontext():
            return self.record_call(func, args, dict(kwargs or {}))

    def record_call(self, func: Any, args: Args, kwargs: Kwargs) -> Tree:
        """Call a torch function, record it, and return its result."""
        if func is F.multi_head_attention_forward:
            with self:
                return _inlined(func)(*args, **kwargs)
        name = func.__name__
        if name in _GRADIENT_HOOKS:
            raise Untraceable(_with_location(f"calls {name}"))
        if func in self.answers:
            return self.answers[func]
        if func in _AS_OTHER:
            with self:
                return _AS_OTHER[func](args[0], args[1].shape)
        if name == "__get__":
            return self.attribute_of(args[0], func.__self__.__name__)
        if func in (Tensor.size, Tensor.numel, Tensor.nelement, Tensor.__len__):
            return self.size(name, args, kwargs)
        start = len(self.executor.done)
        with self.inside():
            given = plain(args), plain(kwargs)
            out = call_in_eval(func, *given) if self.at_rest else func(*given[0], **given[1])
        if name in _MEMORY_LAYOUT or (
            out is None and name != "__setitem__" and any(isinstance(a, Tensor) for a in args)
        ):
            self.doubts.append(_with_location(f"calls {name}"))
        tensors = isinstance(out, Tensor) or any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(out))
        if tensors or name == "__setitem__":
            call = TorchCall(list(args), kwargs, out, self.executor.dims, self.executor.done[start:])
            self.bind(out, self.emit(func, name, call))
        return out

    def attribute_of(self, x: Tensor, name: str) -> object:
        if name in _AUTOGRAD_STATE and not _called_by_torch():
            self.doubts.append(_with_location(f"asks for {name}"))
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
        axes = self.executor.dims.get(id(x), (None,) * x.dim())
        source = self.node_of(x)

        def read(dim: int) -> TracedInt:
            node = self.graph.call_method("size", (source, dim))
            node.meta["axis"] = axes[dim]
            return traced(x.shape[dim], node)

        return Shape([read(dim) for dim in range(x.dim())])

    def size(self, name: str, args: Args, kwargs: Kwargs) -> Shape | int:
        shape = self.shape(args[0])
        if name == "size":
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            return shape if dim is None else shape[dim]
        if name == "__len__":
            guard(operator.eq, shape[0], int(shape[0]))
            return int(shape[0])
        return shape.numel()

    def emit(self, func: Function, name: str, call: TorchCall) -> fx.Node:
        """Add the node of a call to the graph."""
        call.args, sizes = size_arguments(name, call)
        given = tuple(map(self.node_of, call.args)), {key: self.node_of(value) for key, value in call.kwargs.items()}
        if name.startswith("__") and hasattr(operator, name):
            node = self.graph.call_function(getattr(operator, name), *given)
        elif getattr(Tensor, name, None) is func or (name in _AS_METHODS and isinstance(call.args[0], Tensor)):
            node = self.graph.call_method(name, *given)
        elif isinstance(func, OpOverload) or (resolve_name(func) or "").startswith("torch."):
            node = self.graph.call_function(func, *given)
        else:
            raise Untraceable(f"calls {func}")
        node.meta["sizes"] = sizes
        if name in ("chunk", "tensor_split") and isinstance(call.out, tuple | list):
            node.meta["parts"] = call.parts()
        if name == "scaled_dot_product_attention" and call.kwargs.get("scale") is None:
            node.meta["scale"] = call.dims(call.args[0])[-1]
        return node


_AS_OTHER: dict[Function, Function] = {
    Tensor.view_as: Tensor.view, Tensor.reshape_as: Tensor.reshape, Tensor.expand_as: Tensor.expand,
}  # fmt: skip
_AS_METHODS = ("reshape", "view", "expand", "unflatten")


def _refuse_values(tensor: Tensor) -> Tensor:
    raise Untraceable(_with_location("looks at values"))


def _with_location(action: str) -> str:
    """The text for an action of the code, with its file and line."""
    return f"{action} {format_where(location())}".rstrip()


def _called_by_torch() -> bool:
    """True if torch's own code asks: it chooses among implementations with the same result."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return frame is not None and is_library(frame.f_code.co_filename)


def _keys_to(value: object, tensor: Tensor) -> list[object] | None:
    """The keys and indices that lead to a tensor in nested dictionaries and lists."""
    if value is tensor:
        return []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, item in items:
        if (found := _keys_to(item, tensor)) is not None:
            return [key, *found]
    return None
