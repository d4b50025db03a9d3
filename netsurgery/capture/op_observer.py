"""A mode that sees each ATen operation of a run on tensors without data."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from netsurgery.capture.inputs import Args, Kwargs, Tree
from netsurgery.capture.known_values import ConcreteValues
from netsurgery.capture.operations import OpCall, Target, argument_names
from netsurgery.capture.source_locations import format_where, location
from netsurgery.errors import TraceError

__all__ = ["TRANSPARENT", "OpObserver"]

_COPY = torch.ops.aten._to_copy.default
TRANSPARENT = {torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.lift_fresh.default}


class OpObserver(TorchDispatchMode):
    """Sees each ATen operation of a run without data.

    Attributes:
        modules: the paths of the modules that run, the innermost last.
    """

    def __init__(self, values: ConcreteValues | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values = values
        self.reads = False  # True while an operation makes a copy that Python can read
        self.modules: list[str] = []
        self.constants: dict[int, tuple[Tensor, Tensor]] = {}  # by id: a real tensor, and its stand-in without data
        self.reals: dict[int, Tensor] = {}  # by id of the stand-in

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch.compile never sees these modes, and its wrapper costs more than the dispatch

    def stand_in(self, value: Tree) -> Tree:
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

    def __torch_dispatch__(self, func: Target, types: object, args: Args = (), kwargs: Kwargs | None = None) -> Tree:
        call = OpCall(func, args, kwargs or {})
        if _is_label(func):
            return call.run()
        with torch._C.DisableTorchFunction():  # scripted functions come here inside of FakeDevice
            return self.dispatch(call)

    def dispatch(self, call: OpCall) -> Tree:
        """Answer one operation: real tensors get stand-ins, and aliases that torch inserts are no operations."""
        call = call.mapped(self.stand_in)
        if "device" in argument_names(call.target) and not any(isinstance(a, Tensor) for a in call.args):
            call.kwargs["device"] = torch.device("meta")
        if call.target in TRANSPARENT:  # torch inserts these or not as it likes
            return self.alias(call.args[0], call.run())
        out = self.see(call)
        return self.readable(out) if self.reads else out

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

    def readable(self, meta: Tensor) -> Tensor:
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

        Where shapes and dtypes agree, a copy is run too, though nothing reads it: by the rule of a copy, the parameter
        and its new value have the same dimensions, so that both are cut alike.
        """
        with torch.no_grad():
            meta: Tensor = self.stand_in(value)
            if meta.shape == tensor.shape and meta.dtype == tensor.dtype:
                torch.ops.aten.copy.default(tensor, meta)
        self.alias(meta, tensor)
        return meta

    def see(self, call: OpCall) -> Tree:
        """Answer one operation, its arguments without data."""
        raise NotImplementedError

    def call(self, path: str, forward: Callable[..., Tree], args: Args, kwargs: Kwargs) -> Tree:
        """Run a module."""
        self.modules.append(path)
        try:
            return forward(*args, **kwargs)
        finally:
            self.modules.pop()


@functools.cache
def _is_label(target: Target) -> bool:
    """True if an operation only marks for the profiler which code runs."""
    return bool(target._schema.name.startswith("profiler::"))
