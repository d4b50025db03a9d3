"""Facts about a model's code that are found once: they hold at all sizes that it is tried at."""

from __future__ import annotations

import functools
from collections.abc import Container

from torch import nn

from netsurgery.adaptation.module_tracer import ModuleTrace
from netsurgery.adaptation.size_checker import channels_of
from netsurgery.axes import Axis
from netsurgery.capture.copies import named_modules
from netsurgery.capture.operations import target_of, writes
from netsurgery.capture.program import Program

__all__ = ["ModelCode"]


class ModelCode:
    """The code of a model.

    Attributes:
        kinds: the class of each module, by path.
        traces: traces of the calls of a module, or the reason why there are none; by program, path and training mode.
        differences: a difference between gradients of a rewritten module and the code's; by program, class and code.
        channels_of: the function of that name, which looks at each operation once.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.kinds: dict[str, type] = {path: type(module) for path, module in named_modules(model).items()}
        self.traces: dict[tuple[Program, str, bool], list[ModuleTrace] | str] = {}
        self.differences: dict[object, str | None] = {}
        self.channels_of = functools.cache(channels_of)

    def relevant_operations(self, program: Program, changed: Container[Axis]) -> list[int]:
        """For each position the number of operations before it that concern a changed group or write to a tensor."""
        count = [0]
        for node in program.operations:
            matters = writes(target_of(node)) or any(axis in changed for axis in self.channels_of(node))
            count.append(count[-1] + matters)
        return count
