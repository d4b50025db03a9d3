"""Run a model's code with the decisions and the random numbers of a recorded run."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from netsurgery.analysis.replay import Drawn, Units, inputs_read
from netsurgery.capture.inputs import Inputs, meta_inputs, tensors_in
from netsurgery.capture.known_values import ConcreteValues, flat, is_number, remapped, replay_decision, select
from netsurgery.capture.lockstep import Lockstep, PathDiverged
from netsurgery.capture.meta_run import bind, bind_inputs, home, meta_copy, run_meta_copy
from netsurgery.capture.program import Program
from netsurgery.capture.source_locations import format_where, location
from netsurgery.errors import InputError

__all__ = ["run_with_decisions"]


class _DecisionReplay(Lockstep):
    """Runs a model's code with the decisions of a recorded run, and notes the numbers that these are taken from.

    Random numbers are those that were ``drawn`` in another run, by the operation that drew them.
    """

    def __init__(self, program: Program, values: ConcreteValues, units: Units, drawn: Drawn):
        super().__init__(program, values)
        self.own, self.units, self.drawn = values, units, drawn
        self.numbers: list[Tensor] = []

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            node = self.expected(func)
        except PathDiverged as error:
            raise InputError(
                f"the small model does not do what the original did {format_where(location())}: {error}"
            ) from error
        if node is None or not ("decided" in node.meta or node in self.drawn):
            return self.own.keep(func, args, kwargs, self.own.run(func, args, kwargs))
        positional, keyword = self.own.reals(args, kwargs)
        self.numbers.extend(t.clone() for t in flat(inputs_read(func, positional, keyword)) if is_number(t))
        if node in self.drawn:
            found = _drawn_again(func, positional, _selected(self.drawn[node], node.meta["dims"], self.units))
        else:
            found = replay_decision(func, positional, keyword, remapped(node, self.units))
        return self.own.keep(func, args, kwargs, found)


def run_with_decisions(
    model: nn.Module, program: Program, inputs: Inputs, units: Units, drawn: Drawn
) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of a model whose code is run with the decisions of a recorded run, and the numbers these rest on."""
    device = home(model)
    meta, names = meta_copy(model, program.mode)
    values, given = ConcreteValues(device), meta_inputs(inputs)
    bind(values, model, meta, names)
    bind_inputs(values, given, inputs)
    observer = _DecisionReplay(program, values, units, drawn)
    outputs = run_meta_copy(meta, observer, given, device)
    return [values.real(observer.stand_in(tensor)) for tensor in tensors_in(outputs)], observer.numbers


def _drawn_again(func: Any, args: Any, drawn: Any) -> Any:
    """The result of an operation that draws random numbers, when it draws these."""
    (first, *_) = func._schema.returns
    return args[0].copy_(drawn) if first.alias_info is not None else drawn


def _selected(value: Any, dims: Any, units: Units) -> Any:
    """The units that stay of one result, or of each of several."""
    if isinstance(value, list):
        return [_selected(part, axes, units) for part, axes in zip(value, dims, strict=True)]
    return select(value, dims, units) if isinstance(value, Tensor) else value
