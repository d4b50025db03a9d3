"""Run a model's code without data: a copy on meta of the model, and the surroundings that its code needs.

Nothing of the user's model is touched or run. The copy has the model's modules, hooks and attributes, but no weights.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode

from netsurgery.capture.caches import caches_kept
from netsurgery.capture.copies import copy_with, named_modules, named_tensors, on_meta
from netsurgery.capture.custom_modules import CUSTOM_MODULES, CustomModule, operation_of
from netsurgery.capture.fake_device import FakeDevice
from netsurgery.capture.inputs import Inputs, Tree, shapes_text, tensors_in
from netsurgery.capture.known_values import ConcreteValues
from netsurgery.capture.op_observer import OpObserver
from netsurgery.capture.operations import OpCall
from netsurgery.capture.program import Mode
from netsurgery.capture.randomness import seeded
from netsurgery.capture.source_locations import format_where, raised_at
from netsurgery.errors import TraceError

__all__ = [
    "RAISED_BY_MODELS",
    "bind",
    "bind_inputs",
    "home",
    "meta_copy",
    "reads_training",
    "run_guarded",
    "run_meta_copy",
    "track",
    "trains_otherwise",
    "without_fast_path",
]

RAISED_BY_MODELS = (
    RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError, ArithmeticError,
)  # fmt: skip


def home(model: nn.Module) -> torch.device:
    """The device of a model."""
    return next((tensor.device for _, tensor in named_tensors(model)), torch.device("cpu"))


def _run_custom_module(operation: CustomModule, meta: nn.Module, *args: object, **kwargs: object) -> Tree:
    """Show the observer the run of a module as one operation."""
    observer = _get_current_dispatch_mode()
    if not isinstance(observer, OpObserver):
        raise TraceError(f"{operation!r} has no data to run on")
    with torch._C.DisableTorchFunction(), _disable_current_modes():  # the module sees that its tensors are on meta
        return observer.see(OpCall(operation, observer.stand_in(operation.bind(meta, args, kwargs)), {}))


def meta_copy(
    model: nn.Module, mode: Mode, shapes: dict[str, tuple[int, ...]] | None = None
) -> tuple[nn.Module, dict[int, str]]:
    """A copy of a model without weights, in eval or train mode, and the name of each of its tensors by id.

    In train mode torch's own layers stay in eval mode (no dropout, no batch statistics). The mode is there to record
    code that only runs in training, such as auxiliary heads.
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


def _tracked(forward: Callable[..., Tree], path: str, observer: OpObserver) -> Callable[..., Tree]:
    def run(*args: object, **kwargs: object) -> Tree:
        return observer.call(path, forward, args, kwargs)

    run.__wrapped__ = run.untracked = forward  # type: ignore[attr-defined]  # what inspect.signature looks at
    return run


def track(meta: nn.Module, observer: OpObserver) -> None:
    """Tell an observer when modules of a copy on meta run."""
    for path, module in named_modules(meta).items():
        forward = module.__dict__.get("forward", module.forward)
        module.__dict__["forward"] = _tracked(getattr(forward, "untracked", forward), path, observer)


@functools.cache
def _import_dynamo() -> None:
    """Import what operations on meta tensors import when they first run: before torch 2.9 that fails under a mode."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9):
        importlib.import_module("torch._dynamo")


def run_meta_copy(meta: nn.Module, observer: OpObserver, inputs: Inputs, device: torch.device) -> Tree:
    """Run a copy on meta under an observer, with tensors without data that say they are on ``device``."""
    track(meta, observer)
    _import_dynamo()
    with torch.no_grad(), caches_kept(meta), without_fast_path(), contextlib.ExitStack() as stack:
        stack.enter_context(seeded(0, device))
        if "torch._dynamo" in sys.modules:  # functions under @torch.compile by their own operations
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(FakeDevice(observer.read, device, observer.alias, observer.assign))
        stack.enter_context(observer)
        return meta(*inputs[0], **inputs[1])


@contextlib.contextmanager
def without_fast_path() -> Iterator[None]:
    """Run attention as single operations: torch's fused encoder hides the network, and zeroes padded positions."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


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


def run_guarded(meta: nn.Module, observer: OpObserver, inputs: Inputs, device: torch.device) -> Tree:
    """Run a copy on meta; an error that its own code raises becomes a TraceError that says where."""
    try:
        return run_meta_copy(meta, observer, inputs, device)
    except RAISED_BY_MODELS as error:
        raise TraceError(_explain(meta, error, inputs)) from error


def _explain(meta: nn.Module, error: Exception, inputs: Inputs) -> str:
    where = raised_at(error)
    first = str(error).strip().splitlines()[0] if str(error).strip() else ""
    if any(inputs) and not tensors_in(inputs):
        return (
            f"{type(meta).__name__} does not run on example_inputs that hold no tensor "
            f"({type(error).__name__}: {first}): pass tensors, such as example_inputs=torch.zeros(1, 3, 224, 224)"
        )
    return (
        f"{type(meta).__name__} does not run on inputs of shape {shapes_text(inputs)}: "
        f"{type(error).__name__}: {first} {format_where(where)}. Pass example_inputs that fit the model"
    )


def reads_training(module: nn.Module) -> bool:
    """True if a module has a class of the user's own whose code mentions ``training``."""
    kind: type = type(module)
    return _reads_training(kind)


def trains_otherwise(module: nn.Module) -> bool:
    """True if a module is recorded in training mode: it has parts, or its class is the user's own."""
    return (bool(module._modules) or reads_training(module)) and not isinstance(module, nn.modules.batchnorm._NormBase)


@functools.cache
def _is_foreign(kind: type) -> bool:
    """True if a class is the user's own, and not one of torch's whose training mode is known (dropout, norms)."""
    library = kind.__module__.startswith(("torch.", "torchvision.ops."))
    return not library and not issubclass(kind, nn.modules.batchnorm._NormBase)


@functools.cache
def _reads_training(kind: type) -> bool:
    methods = [f for base in kind.__mro__ if _is_foreign(base) for f in vars(base).values() if hasattr(f, "__code__")]
    return _is_foreign(kind) and any("training" in method.__code__.co_names for method in methods)
