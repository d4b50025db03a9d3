"""Record a model's own run, on tensors without data, as a torch.fx graph of ATen operations.

Nothing of the user's model is touched or run: a copy without weights is. Every node knows the module and the
line of source it came from (``node.meta``: ``shape``, ``module``, ``where``). Where the code looks at values, it is
run again with them behind the tensors without data, and what it decided is noted (see ``known_values``).
"""

from __future__ import annotations

import contextlib
import functools
import operator
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode

from netsurgery.capture.caches import caches_kept
from netsurgery.capture.copies import copy_with, named_modules, named_tensors, on_meta
from netsurgery.capture.custom_modules import CUSTOM_MODULES, CustomModule, operation_of
from netsurgery.capture.fake_device import FakeDevice
from netsurgery.capture.known_values import ConcreteValues, KnownValues, TensorMap, draw, needs_values
from netsurgery.capture.meta_shapes import infer
from netsurgery.capture.randomness import seeded
from netsurgery.errors import TraceError

__all__ = [
    "RAISED_BY_MODELS",
    "Call",
    "Inputs",
    "Mode",
    "Named",
    "OpObserver",
    "Program",
    "as_inputs",
    "bind",
    "bind_inputs",
    "home",
    "is_library",
    "is_namedtuple",
    "location",
    "meta_copy",
    "meta_inputs",
    "names_used",
    "raised_at",
    "record",
    "run_guarded",
    "tensors_in",
    "track",
    "without_fast_path",
]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword inputs of a model
Mode = Literal["eval", "train"]

RAISED_BY_MODELS = (
    RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError, ArithmeticError,
)  # fmt: skip
_LIBRARY = (
    os.path.dirname(torch.__file__) + os.sep,
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep,
)


@dataclass
class Program:
    """One recorded run.

    ``graph`` has a placeholder for each input tensor, a get_attr for each parameter, buffer or constant it
    uses, and one call_function for each ATen operation. ``constants`` are the tensors the code made itself;
    ``calls`` are the runs of its modules, in the order in which they began; ``values`` says which values the code
    looked at: none, such as are known without running the network, or all.
    """

    graph: fx.Graph
    mode: Mode
    constants: dict[str, Tensor] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    values: Literal["none", "known", "all"] = "none"
    module_traces: dict[Any, Any] = field(default_factory=dict)  # what adaptation has traced of modules, by path

    def __repr__(self) -> str:
        return f"Program(mode={self.mode!r}, {len(self.operations)} operations, values={self.values!r})"

    @functools.cached_property
    def operations(self) -> list[fx.Node]:
        """The ATen operations in order, without those that only pick one result of several."""
        return [n for n in self.graph.nodes if n.op == "call_function" and n.target is not operator.getitem]


@dataclass
class Call:
    """One run of a module: operations ``begin`` to ``end``, and what went in and came out, nodes for tensors.

    A parameter or buffer that was handed over stands there as ``Named``.
    """

    path: str
    begin: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any = None
    end: int = -1
    next: int = -1  # the first call that began after this one ended


class Named(str):
    """A parameter or buffer by its name, where it was handed over as an argument."""


def as_inputs(example_inputs: Any) -> Inputs:
    """Positional and keyword inputs from what a user passes: a tuple, a list, a dictionary or one tensor."""
    if isinstance(example_inputs, Mapping):  # a tokenizer's result is one, too
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in an input or output: nested tuples, dictionaries, registered and plain objects."""
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, nn.Module | type) and not callable(leaf):
            found.extend(tensors_in(list(vars(leaf).values())))
    return found


def is_namedtuple(value: Any) -> bool:
    """Whether a value is a named tuple, such as a packed sequence."""
    return isinstance(value, tuple) and hasattr(value, "_fields")


#: Packages that stand between the user's code and torch, whose own lines say nothing of the user's.
_BETWEEN = tuple(f"{os.sep}{name}{os.sep}" for name in ("einops", "opt_einsum", "jaxtyping", "beartype", "typeguard"))


@functools.cache
def is_library(filename: str) -> bool:
    """Whether code is in a file of torch, of packages like it, or of ours."""
    return filename.startswith(_LIBRARY) or any(name in filename for name in _BETWEEN)


def location(frame: FrameType | None = None) -> tuple[str, int] | None:
    """File and line of the innermost frame, from this one outwards, of code that is no library's, as above."""
    frame = sys._getframe(1) if frame is None else frame
    while frame is not None:
        if not is_library(frame.f_code.co_filename):
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back
    return None


_COPY = torch.ops.aten._to_copy.default
TRANSPARENT = {torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.lift_fresh.default}


class OpObserver(TorchDispatchMode):
    """Sees each ATen operation of a run without data; ``modules`` is the stack of the paths of modules that run."""

    def __init__(self, values: ConcreteValues | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values = values
        self.reads = False  # whether the operation makes a copy that Python can read
        self.modules: list[str] = []
        self.constants: dict[int, tuple[Tensor, Tensor]] = {}  # by id: a real tensor, and its stand-in without data
        self.reals: dict[int, Tensor] = {}  # by id of the stand-in

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch.compile never sees these modes, and its wrapper costs more than the dispatch

    def stand_in(self, value: Any) -> Any:
        """Arguments with each real tensor replaced by one without data, and each device by meta."""
        if isinstance(value, Tensor):
            if value.device.type == "meta":
                return value
            if id(value) not in self.constants:
                stand_in = torch.empty_like(value, device="meta")
                self.constants[id(value)], self.reals[id(stand_in)] = (value, stand_in), value
                if self.values is not None:
                    self.values.of[stand_in] = value.detach().to(self.values.device, copy=True)
            return self.constants[id(value)][1]
        if isinstance(value, list | tuple):
            return type(value)([self.stand_in(item) for item in value])
        return torch.device("meta") if isinstance(value, torch.device) else value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_label(func):
            return func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():  # scripted functions come here inside of FakeDevice
            return self.dispatch(func, args, kwargs)

    def dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Answer one operation: tensors that torch inserts are the same tensors, real ones get stand-ins."""
        kwargs = {key: self.stand_in(value) for key, value in kwargs.items()} if kwargs else {}
        args = tuple([self.stand_in(value) for value in args])
        if "device" in _arguments(func) and not any(isinstance(a, Tensor) for a in args):
            kwargs["device"] = torch.device("meta")
        if func in TRANSPARENT:  # torch inserts these or not as it likes
            return self.alias(args[0], func(*args, **kwargs))
        out = self.see(func, args, kwargs)
        return self.legible(out) if self.reads else out

    def read(self, meta: Tensor) -> Tensor:
        """A copy of a tensor that Python can read.

        Raises:
            TraceError: its value is not known in this run.
        """
        if self.values is None:
            raise TraceError(f"the code reads values {format_where(location())}")
        self.reads = True
        try:
            copied: Tensor = _COPY(meta)
            return copied
        finally:
            self.reads = False

    def legible(self, meta: Tensor) -> Tensor:
        """The value of a tensor without data, where it is known, to be used in its place."""
        value = self.values.of.get(meta) if self.values is not None else None
        if value is None:
            return meta
        value = value.to("cpu", copy=True)
        self.constants[id(value)] = value, meta
        return value

    def note_alias(self, tensor: Tensor, other: Tensor) -> Tensor:
        """Note that ``other`` is ``tensor`` under another name."""
        return other

    def alias(self, tensor: Tensor, other: Tensor) -> Tensor:
        """Note that ``other`` is ``tensor`` under another name, with the same value."""
        other = self.note_alias(tensor, other)
        if self.values is not None and (value := self.values.of.get(tensor)) is not None:
            self.values.of[other] = value
        return other

    def assign(self, tensor: Tensor, value: Tensor) -> Tensor:
        """Note that ``tensor`` will stand for ``value``, as after ``tensor.data = value``.

        Where it can be, it is copied too, though nothing reads the copy: what a parameter is overwritten with has the
        dimensions of the parameter, so that both are cut alike.
        """
        with torch.no_grad():
            meta: Tensor = self.stand_in(value)
            if meta.shape == tensor.shape and meta.dtype == tensor.dtype:
                torch.ops.aten.copy.default(tensor, meta)
        self.alias(meta, tensor)
        return meta

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer one operation, its arguments without data."""
        raise NotImplementedError

    def call(self, path: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a module."""
        self.modules.append(path)
        try:
            return forward(*args, **kwargs)
        finally:
            self.modules.pop()


def _run_custom_module(operation: CustomModule, meta: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Show the observer the run of a module as one operation."""
    observer = _get_current_dispatch_mode()
    if not isinstance(observer, OpObserver):
        raise TraceError(f"{operation!r} has no data to run on")
    with torch._C.DisableTorchFunction(), _disable_current_modes():  # the module sees that its tensors are on meta
        return observer.see(operation, observer.stand_in(operation.bind(meta, args, kwargs)), {})


@functools.cache
def _is_label(func: Any) -> bool:
    """Whether an operation only marks, for the profiler, what runs."""
    return func._schema.name.startswith("profiler::")  # type: ignore[no-any-return]


@functools.cache
def _arguments(func: Any) -> frozenset[str]:
    return frozenset(argument.name for argument in func._schema.arguments)


class NeedsValues(BaseException):
    """The code looks at values, and there are none. No Exception, so that the code does not catch it."""


class _Recorder(OpObserver):
    def __init__(self, program: Program, names: dict[int, str], values: ConcreteValues | None):
        super().__init__(values)
        self.program, self.names = program, names
        self.nodes: TensorMap[fx.Node] = TensorMap()
        self.parts: TensorMap[tuple[fx.Node, int]] = TensorMap()  # results among several: a node once they are used
        self.count = 0  # operations so far
        self.memory: dict[int, int] = {}  # by id of the model's tensors: the memory that they are in
        self.need: NeedsValues | None = None

    def remember(self, tensor: Tensor, node: fx.Node) -> fx.Node:
        self.nodes[tensor] = node
        node.meta.setdefault("dtype", tensor.dtype)
        return node

    def read(self, meta: Tensor) -> Tensor:
        copied = None if self.values is None else super().read(meta)
        if copied is None or (copied.is_meta and self.program.values != "all"):
            raise self.needed(format_where(location()))
        return copied

    def needed(self, place: str) -> NeedsValues:
        """What to raise where the code looks at values that are not there; a scripted function makes another error."""
        self.need = NeedsValues(place)
        return self.need

    def note_alias(self, tensor: Tensor, other: Tensor) -> Tensor:
        self.remember(other, self.node_of(tensor))
        return other

    def call(self, path: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        calls = self.program.calls
        call = Call(path, self.count, self.known(args), self.known(kwargs))
        calls.append(call)
        out = super().call(path, forward, args, kwargs)
        call.out, call.end, call.next = self.known(out), self.count, len(calls)
        return out

    def known(self, value: Any) -> Any:
        """Nodes in the place of tensors."""
        if isinstance(value, Tensor):
            found = self.nodes.get(value) or self.part(value)
            name = self.names.get(id(value))
            return found if found is not None or name is None else Named(name)
        if type(value) in (tuple, list):
            return type(value)([self.known(item) for item in value])
        if is_namedtuple(value):
            return value._make(map(self.known, value))
        if type(value) is dict:
            return {key: self.known(item) for key, item in value.items()}
        return value

    def describe(self, node: fx.Node) -> fx.Node:
        node.meta["module"] = self.modules[-1] if self.modules else ""
        node.meta["where"] = location()
        return node

    def assign(self, tensor: Tensor, value: Tensor) -> Tensor:
        meta = super().assign(tensor, value)
        self.memory[id(tensor)] = _memory(meta)
        return meta

    def node_of(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if self.memory.get(id(value)) not in (None, _memory(value)):  # something that nobody sees has moved it
                del self.memory[id(value)], self.names[id(value)]
                return self.attribute(value)
            return self.nodes.get(value) or self.part(value) or self.attribute(value)
        if isinstance(value, list | tuple):
            return [self.node_of(item) for item in value]
        return value

    def part(self, tensor: Tensor) -> fx.Node | None:
        found = self.parts.get(tensor)
        if found is None:
            return None
        whole, index = found
        node = self.program.graph.create_node("call_function", operator.getitem, (whole, index))
        node.meta.update(
            shape=tensor.shape,
            dtype=tensor.dtype,
            layout=(tensor.shape, tensor.stride()),
            module=whole.meta["module"],
            where=whole.meta["where"],
        )
        return self.remember(tensor, node)

    def attribute(self, tensor: Tensor) -> fx.Node:
        name = self.names.get(id(tensor))
        if name is None:
            name = f"constant:{len(self.program.constants)}"
            self.program.constants[name] = self.reals.get(id(tensor), tensor)
        node = self.describe(self.program.graph.get_attr(name))
        node.meta.update(shape=tensor.shape, dtype=tensor.dtype, layout=(tensor.shape, tensor.stride()))
        return self.remember(tensor, node)

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nodes = tuple([self.node_of(value) for value in args]), {k: self.node_of(v) for k, v in kwargs.items()}
        decided = None
        try:
            if self.values is None:
                out = infer(func, args, kwargs)
            else:
                out, decided = self.values.infer(func, args, kwargs, self.reads)
        except RuntimeError as error:
            place = f"{func} in module '{self.modules[-1] if self.modules else ''}' {format_where(location())}"
            if self.program.values != "all" and needs_values(func, error):
                raise self.needed(place) from error
            data = "" if self.program.values == "all" else "tensors without data of "
            raise TraceError(
                f"{place} cannot run on {data}shapes {_shapes((args, kwargs))}: {str(error).splitlines()[0]}"
            ) from error
        self.count += 1
        graph = self.program.graph
        node = self.describe(graph.create_node("call_function", func, *nodes))
        node.meta["shape"] = None
        if decided is not None:
            node.meta["decided"] = decided
        if isinstance(out, Tensor):
            node.meta.update(shape=out.shape, layout=(out.shape, out.stride()), dtype=out.dtype)
            self.remember(out, node)
        elif isinstance(out, list | tuple):
            node.meta["shape"] = [o.shape if isinstance(o, Tensor) else None for o in out]
            for index, item in enumerate(out):
                if isinstance(item, Tensor):
                    self.parts[item] = node, index
        return out


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def format_where(where: tuple[str, int] | None) -> str:
    """``at torchvision/models/resnet.py:146``, shortened to what a reader needs."""
    if where is None:
        return ""
    path, line = where
    if "site-packages" + os.sep in path:
        path = path.split("site-packages" + os.sep, 1)[1]
    elif not os.path.relpath(path).startswith(".."):
        path = os.path.relpath(path)
    return f"at {path}:{line}"


def _shapes(value: Any) -> str:
    return ", ".join("x".join(map(str, tensor.shape)) or "()" for tensor in tensors_in(value))


def _tracked(forward: Callable[..., Any], path: str, observer: OpObserver) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return observer.call(path, forward, args, kwargs)

    run.__wrapped__ = run.untracked = forward  # type: ignore[attr-defined]  # what inspect.signature looks at
    return run


@functools.cache
def _is_foreign(kind: Any) -> bool:
    """Whether a class is the user's own, and not one of torch's whose training mode is known (dropout, norms)."""
    library = kind.__module__.startswith(("torch.", "torchvision.ops."))
    return not library and not issubclass(kind, nn.modules.batchnorm._NormBase)


def reads_training(module: nn.Module) -> bool:
    """Whether the code of a module of the user's own mentions ``training``."""
    kind: Any = type(module)
    return _reads_training(kind)


@functools.cache
def _reads_training(kind: Any) -> bool:
    methods = [f for base in kind.__mro__ if _is_foreign(base) for f in vars(base).values() if hasattr(f, "__code__")]
    return _is_foreign(kind) and any("training" in method.__code__.co_names for method in methods)


def trains_otherwise(module: nn.Module) -> bool:
    """Whether a module is put into training mode to record it: those with parts, and those of the user's own."""
    return (bool(module._modules) or reads_training(module)) and not isinstance(module, nn.modules.batchnorm._NormBase)


def meta_copy(
    model: nn.Module, mode: Mode, shapes: dict[str, tuple[int, ...]] | None = None
) -> tuple[nn.Module, dict[int, str]]:
    """A copy of a model without weights, in eval or train mode, and the name of each of its tensors by id.

    In train mode torch's own layers stay in eval (no dropout, no batch statistics): what counts is the code that
    only runs in training, such as auxiliary heads.
    """
    shapes = shapes or {}
    tensors = {id(tensor): (name, on_meta(tensor, shapes.get(name))) for name, tensor in named_tensors(model)}
    meta = copy_with(model, {key: tensor for key, (_, tensor) in tensors.items()})
    originals = named_modules(model)
    for path, module in named_modules(meta).items():
        if type(module) in CUSTOM_MODULES:
            module.__dict__["forward"] = functools.partial(_run_custom_module, operation_of(originals[path]), module)
        module.training = mode == "train" and trains_otherwise(module)
    return meta, {id(tensor): name for name, tensor in tensors.values()}


def home(model: nn.Module) -> torch.device:
    """The device of a model."""
    return next((tensor.device for _, tensor in named_tensors(model)), torch.device("cpu"))


def track(meta: nn.Module, observer: OpObserver) -> None:
    """Let an observer know of each run of the modules of a copy on meta."""
    for path, module in named_modules(meta).items():
        forward = module.__dict__.get("forward", module.forward)
        module.__dict__["forward"] = _tracked(getattr(forward, "untracked", forward), path, observer)


def run_meta_copy(meta: nn.Module, observer: OpObserver, inputs: Inputs, device: torch.device) -> Any:
    """Run a copy on meta under an observer, with tensors without data that say they are on ``device``."""
    track(meta, observer)
    with torch.no_grad(), caches_kept(meta), without_fast_path(), contextlib.ExitStack() as stack:
        stack.enter_context(seeded(0, device))
        if "torch._dynamo" in sys.modules:  # functions under @torch.compile by their own operations
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(FakeDevice(observer.read, device, observer.alias, observer.assign))
        stack.enter_context(observer)
        return meta(*inputs[0], **inputs[1])


@contextlib.contextmanager
def without_fast_path() -> Iterator[None]:
    """Attention by its own operations: torch's fused encoder hides the network, and zeroes what a mask pads."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def record(model: nn.Module, inputs: Inputs, mode: Mode = "eval") -> Program:
    """Record one run of a model on inputs of the shapes of ``inputs``.

    Their values, and those of the model, are only looked at where its code does; inputs on the meta device are then
    drawn at random.

    Raises:
        TraceError: the model does not run on such inputs; the message names the module.
    """
    with contextlib.suppress(NeedsValues):
        return _record(model, inputs, mode, None)
    known, values = KnownValues(home(model)), ConcreteValues(home(model))
    inputs = draw(inputs, known.device)
    try:
        return _record(model, inputs, mode, known)
    except NeedsValues as need:
        if absent := [name for name, tensor in named_tensors(model) if tensor.is_meta]:
            raise TraceError(
                f"the code looks at values ({need}), but '{absent[0]}' has none: it is on the meta device"
            ) from need
    return _record(model, inputs, mode, values)


def _record(model: nn.Module, inputs: Inputs, mode: Mode, values: ConcreteValues | None) -> Program:
    meta, names = meta_copy(model, mode)
    looks: Any = "none" if values is None else "known" if isinstance(values, KnownValues) else "all"
    program = Program(fx.Graph(), mode, values=looks)
    recorder = _Recorder(program, names, values)
    recorder.memory = {id(tensor): _memory(tensor) for _, tensor in named_tensors(meta)}
    on_meta_inputs = meta_inputs(inputs)
    if values is not None:
        bind(values, model, meta, names)
        bind_inputs(values, on_meta_inputs, inputs)
    given = tensors_in(on_meta_inputs)
    for index, tensor in enumerate(given):
        node = program.graph.placeholder(f"input_{index}")
        layout = tensor.shape, tensor.stride()
        node.meta.update(shape=tensor.shape, dtype=tensor.dtype, layout=layout, module="", where=None)
        recorder.remember(tensor, node)
    try:
        out = run_guarded(meta, recorder, on_meta_inputs, home(model))
    except TraceError as error:
        if recorder.need is not None:
            raise recorder.need from error
        raise
    results = [recorder.node_of(recorder.stand_in(tensor)) for tensor in tensors_in(out)]
    if not results:
        raise TraceError(
            f"{type(model).__name__} returned no tensor ({type(out).__name__}): nothing holds its outputs fixed"
        )
    program.graph.output(tuple(results))
    _drop_unused(program)
    return program


def _drop_unused(program: Program) -> None:
    """Forget decisions that nothing follows from, such as where the largest of a pooling window is."""
    for node in program.operations:
        if isinstance(decided := node.meta.get("decided"), list):
            used = {user.args[1] for user in node.users}
            kept = [part if index in used else None for index, part in enumerate(decided)]
            if any(part is not None for part in kept):
                node.meta["decided"] = kept
            else:
                del node.meta["decided"]


def meta_inputs(inputs: Inputs) -> Inputs:
    """Inputs without data; one that is given twice stays one."""
    made: dict[int, Tensor] = {}

    def meta(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = torch.empty_like(tensor, device="meta")
        return made[id(tensor)]

    return pytree.tree_map_only(Tensor, meta, inputs)  # type: ignore[no-any-return]


def bind(values: ConcreteValues, model: nn.Module, meta: nn.Module, names: dict[int, str]) -> None:
    """Give the tensors of a copy on meta the values of the model's own."""
    tensors = dict(named_tensors(model))
    for _, tensor in named_tensors(meta):
        own = tensors.get(names.get(id(tensor), ""))
        if isinstance(own, nn.Parameter):
            values.bind(tensor, own)
        elif own is not None:  # norms write to their statistics without saying so
            values.bind(tensor, own.detach().clone())


def bind_inputs(values: ConcreteValues, meta: Inputs, inputs: Inputs) -> None:
    """Give inputs without data their values."""
    for tensor, value in zip(tensors_in(meta), tensors_in(inputs), strict=True):
        values.bind(tensor, value)


def run_guarded(meta: nn.Module, observer: OpObserver, inputs: Inputs, device: torch.device) -> Any:
    """Run a copy on meta; an error that its own code raises becomes a TraceError that says where."""
    try:
        return run_meta_copy(meta, observer, inputs, device)
    except RAISED_BY_MODELS as error:
        raise TraceError(_explain(meta, error, inputs)) from error


def raised_at(error: Exception) -> tuple[str, int] | None:
    """File and line of the user's code that raised an error."""
    traceback, where = error.__traceback__, None
    while traceback is not None:
        if not is_library(traceback.tb_frame.f_code.co_filename):
            where = traceback.tb_frame.f_code.co_filename, traceback.tb_lineno
        traceback = traceback.tb_next
    return where


def _explain(meta: nn.Module, error: Exception, inputs: Inputs) -> str:
    where = raised_at(error)
    first = str(error).strip().splitlines()[0] if str(error).strip() else ""
    if any(inputs) and not tensors_in(inputs):
        return (
            f"{type(meta).__name__} does not run on example_inputs that hold no tensor "
            f"({type(error).__name__}: {first}): pass tensors, such as example_inputs=torch.zeros(1, 3, 224, 224)"
        )
    return (
        f"{type(meta).__name__} does not run on inputs of shape {_shapes(inputs)}: "
        f"{type(error).__name__}: {first} {format_where(where)}. Pass example_inputs that fit the model"
    )


def names_used(programs: Iterable[Program]) -> set[str]:
    """The parameters, buffers and constants that the programs read."""
    return {str(node.target) for program in programs for node in program.graph.nodes if node.op == "get_attr"}
