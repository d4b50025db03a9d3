"""Run a model's code with the decisions and the random numbers of a recorded run."""

from __future__ import annotations

from torch import Tensor, nn

from netsurgery.analysis.replay import Drawn, Units, inputs_read
from netsurgery.capture.inputs import Inputs, Tree, meta_inputs, tensors_in
from netsurgery.capture.known_values import ConcreteValues, flat, is_number, remapped, replay_decision, selected
from netsurgery.capture.lockstep import Lockstep, PathDiverged
from netsurgery.capture.meta_run import bind, bind_inputs, home, meta_copy, run_meta_copy
from netsurgery.capture.operations import OpCall
from netsurgery.capture.program import Program
from netsurgery.capture.source_locations import format_where, location
from netsurgery.errors import InputError

__all__ = ["run_with_decisions"]


class _DecisionReplay(Lockstep):
    """Runs a model's code with the decisions of a recorded run, and notes the numbers that these are taken from.

    Its random numbers are the ones that the same operations drew in another run: ``drawn``.
    """

    def __init__(self, program: Program, values: ConcreteValues, units: Units, drawn: Drawn):
        super().__init__(program, values)
        self.own, self.units, self.drawn = values, units, drawn
        self.numbers: list[Tensor] = []

    def see(self, call: OpCall) -> Tree:
        try:
            node = self.expected(call.target)
        except PathDiverged as error:
            raise InputError(
                f"the small model does not do what the original did {format_where(location())}: {error}"
            ) from error
        if node is None or not ("decided" in node.meta or node in self.drawn):
            return self.own.keep(call, self.own.run(call))
        real = call.mapped(self.own.real)
        self.numbers.extend(value.clone() for value in flat(inputs_read(real)) if is_number(value))
        if node in self.drawn:
            found = selected(self.drawn[node], node.meta["dims"], self.units)
            in_place = call.target._schema.returns[0].alias_info is not None
            found = real.args[0].copy_(found) if in_place else found
        else:
            found = replay_decision(real, remapped(node, self.units))
        return self.own.keep(call, found)


def run_with_decisions(
    model: nn.Module, program: Program, inputs: Inputs, units: Units, drawn: Drawn
) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of a model whose code runs with the decisions of a recorded run.

    Returns:
        The outputs, and the numbers that the decisions are taken from.
    """
    device = home(model)
    meta, names = meta_copy(model, program.mode)
    values, given = ConcreteValues(device), meta_inputs(inputs)
    bind(values, model, meta, names)
    bind_inputs(values, given, inputs)
    observer = _DecisionReplay(program, values, units, drawn)
    outputs = run_meta_copy(meta, observer, given, device)
    return [values.real(observer.stand_in(tensor)) for tensor in tensors_in(outputs)], observer.numbers
