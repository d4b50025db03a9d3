"""Watch code while it runs for effects that a graph of torch functions cannot express.

Such effects are gradients that are switched off or replaced, autocast, checkpoints and hooks. However the code spells
them, they call the same functions of torch, and a profiler sees these. Writes to objects that others can see are found
by comparing the objects before and after (``Reach``).
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Iterator, Mapping
from types import CodeType, FrameType, TracebackType
from typing import Any

import torch
import torch.amp.autocast_mode
import torch.autograd.forward_ad
import torch.autograd.functional
import torch.autograd.graph
import torch.utils.checkpoint
from torch.autograd import grad_mode

from netsurgery.capture.reachable import Reach
from netsurgery.capture.source_locations import format_where, is_library, is_python, location

__all__ = ["Effects"]

_FILES = {
    module.__file__
    for module in (
        grad_mode, torch.amp.autocast_mode, torch.utils.checkpoint, torch.autograd.graph, torch.autograd.functional,
        torch.autograd.forward_ad, torch.autograd,
    )
}  # fmt: skip
_QUERIES = {
    function
    for name, function in vars(torch._C).items()
    if any(word in name for word in ("autocast", "grad_enabled", "inference_mode_enabled")) and callable(function)
}
_RAN: weakref.WeakKeyDictionary[CodeType, set[CodeType]] = weakref.WeakKeyDictionary()


class Effects:
    """Watches code while it runs.

    Args:
        roots: the objects that the code is given, by name.
        start: the code that is called.

    Attributes:
        found: the effects, and where the code has them.
    """

    def __init__(self, roots: Mapping[str, object], start: CodeType):
        self.ran: set[CodeType] = set()
        self.known = _RAN.setdefault(start, {start})
        self.found: list[str] = []
        self.missed = False  # True if unexpected functions ran: nothing that they can reach was noted before
        self.reach = Reach(roots, frozenset(self.known))

    def __enter__(self) -> Effects:
        self.before = sys.getprofile()
        sys.setprofile(self.see)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        before: Any = self.before  # Python's own profiler, written in C, is no function: it enables itself
        before.enable() if hasattr(before, "enable") else sys.setprofile(before)
        self.missed = not self.ran <= self.known
        self.known |= self.ran
        if kind is None:
            self.found += self.reach.changes(self.ran)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not watch what runs inside of this context."""
        sys.setprofile(None)
        try:
            yield
        finally:
            sys.setprofile(self.see)

    def see(self, frame: FrameType, event: str, called: Any) -> None:
        """Note a call that has one of these effects, and the code of each function that runs."""
        if event == "call":
            code = frame.f_code
            if code.co_filename in _FILES and not code.co_name.startswith("is_"):  # such as is_autocast_available
                self.note(f"uses {_named(code)}", frame)
            elif not (is_library(code.co_filename) or is_python(code.co_filename)):
                self.ran.add(code)
                if (first := _autograd_function(frame)) is not None:
                    self.note(f"runs the torch.autograd.Function '{first}', whose gradient is its own", frame.f_back)
        elif event == "c_call" and called in _QUERIES and not is_library(frame.f_code.co_filename):
            self.note(f"uses {called.__name__}", frame)

    def note(self, effect: str, frame: FrameType | None) -> None:
        self.found.append(f"{effect} {format_where(location(frame))}".rstrip())

    @contextlib.contextmanager
    def of(self, part: object) -> Iterator[None]:
        """Let a submodule run: it may write to itself, but the code around it may not."""
        with self.paused():
            self.found += self.reach.changes(self.ran, part)
            yield
            self.reach.note(part)


def _named(code: CodeType) -> str:
    """The name that users know a function of torch by: the class that it is a method of, or its own name."""
    return "checkpoint" if code.co_filename == torch.utils.checkpoint.__file__ else code.co_qualname.partition(".")[0]


def _autograd_function(frame: FrameType) -> str | None:
    """The name of the autograd function that a frame runs, whose first argument is the context; None for other code."""
    code = frame.f_code
    context = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    if not isinstance(context, torch._C._FunctionBase) or isinstance(context, type):
        return None
    return type(context).__name__.removesuffix("Backward")
