"""Run a recorded graph on real tensors, with the decisions of the recorded run."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from netsurgery.analysis.network import Network
from netsurgery.axes import Axis
from netsurgery.capture.inputs import Args, Inputs, Kwargs, Tree, tensors_in
from netsurgery.capture.known_values import any_layout, flat, is_number, remapped, replay_decision
from netsurgery.capture.meta_run import trains_otherwise, without_fast_path
from netsurgery.capture.op_observer import TRANSPARENT
from netsurgery.capture.operations import OpCall, Target, argument_names
from netsurgery.capture.program import Program
from netsurgery.capture.source_locations import format_where
from netsurgery.errors import InputError
from netsurgery.notation import Operation

__all__ = ["Drawn", "Numbers", "Units", "Values", "draws", "inputs_read", "replay", "run", "units_in", "with_constants"]

Units = Callable[[Axis], Tensor]  # the units of a channel, in order


Drawn = dict[torch.fx.Node, Tree]  # by operation: the random numbers that it drew


Numbers = list[tuple[torch.fx.Node, Tensor]]  # results that decisions are taken from


Values = dict[torch.fx.Node, Tree]  # results, by node


def units_in(lists: Mapping[Axis, Tensor]) -> Units:
    """The units of a channel that a list names, in its order; all of them where there is none."""
    return lambda leaf: lists[leaf] if leaf in lists else torch.arange(leaf.size)


def run(
    model: nn.Module, program: Program, inputs: Inputs, observer: AbstractContextManager[object] | None = None
) -> list[Tensor]:
    """The outputs of a model in the mode a program was recorded in; its own mode is put back.

    Args:
        observer: a mode that sees the operations of the model, and no others.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = program.mode == "train" and trains_otherwise(module)
        positional, keyword = pytree.tree_map_only(Tensor, Tensor.clone, inputs)  # code may write to them
        with torch.no_grad(), without_fast_path(), observer or contextlib.nullcontext():
            return tensors_in(model(*positional, **keyword))
    finally:
        for module, training in modes.items():
            module.training = training


def draws(node: torch.fx.Node) -> bool:
    """True if an operation draws random numbers, as it was called; dropout without a rate does not."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    given = Operation(node).arguments
    rate, trains = given.get("dropout_p", given.get("p")), given.get("train", given.get("training"))
    return not (isinstance(rate, int | float) and rate == 0) and trains is not False


def inputs_read(call: OpCall) -> list[Tree]:
    """The arguments of an operation but those that it only writes to."""
    named = [*zip(argument_names(call.target), call.args, strict=False), *call.kwargs.items()]
    if torch.Tag.nondeterministic_seeded not in call.target.tags:
        return [value for _, value in named]
    written = (a for a in call.target._schema.arguments if a.alias_info is not None and a.alias_info.is_write)
    filled = {argument.name for argument in written}
    return [value for name, value in named if name not in filled]


class _Observer(TorchDispatchMode):
    """Looks up the values of tensors that the code makes, where the run without data could not see them."""

    def __init__(self, program: Program):
        super().__init__()  # type: ignore[no-untyped-call]
        self.constants = dict(program.constants)
        self.nodes = program.operations
        self.position = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Target, types: object, args: Args = (), kwargs: Kwargs | None = None) -> Tree:
        if func not in TRANSPARENT and self.position < len(self.nodes):
            node = self.nodes[self.position]
            self.position += 1
            if node.target is func:
                pairs = zip(pytree.tree_leaves(list(node.args)), pytree.tree_leaves(list(args)), strict=False)
                self.constants.update(
                    (str(wanted.target), value.detach().clone())
                    for wanted, value in pairs
                    if isinstance(wanted, torch.fx.Node) and wanted.target in self.constants
                )
        return func(*args, **(kwargs or {}))


def with_constants(model: nn.Module, network: Network, inputs: Inputs) -> Network:
    """The network with the value of every constant in its recorded programs.

    Raises:
        InputError: the model does other operations on real tensors than on tensors without data.
    """
    programs = tuple(_with_constants(model, program, inputs) for program in network.programs)
    return dataclasses.replace(network, programs=programs)


def _with_constants(model: nn.Module, program: Program, inputs: Inputs) -> Program:
    if not any(value.is_meta for value in program.constants.values()):
        return program
    observer = _Observer(program)
    run(model, program, inputs, observer)
    for node in program.graph.nodes:
        if node.op == "get_attr" and (value := observer.constants.get(node.target)) is not None and value.is_meta:
            raise InputError(
                "cannot replay the model: the values of a tensor that its code makes "
                f"{format_where(node.meta['where'])} are not known"
            )
    return dataclasses.replace(program, constants=observer.constants)


def replay(
    program: Program,
    tensors: Mapping[str, Tensor],
    inputs: Inputs,
    after: Callable[[torch.fx.Node, Values, Tree], Tree] | None = None,
    units: Units | None = None,
    numbers: Numbers | None = None,
) -> list[Tensor]:
    """Run a recorded program on real tensors, with the decisions of the recorded run.

    Args:
        after: called with each node, the results so far and its own; returns the result to go on with.
        units: the order in which ``tensors`` have the units of a channel; by default as they were.
        numbers: gets the floating-point numbers that decisions are taken from, with their nodes.
    """
    given = iter(tensors_in(inputs))
    values: Values = {}
    device = next((t.device for t in tensors_in(inputs)), torch.device("cpu"))
    with torch.no_grad():
        for node in program.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(given).clone()
            elif node.op == "get_attr":
                source = tensors[node.target] if node.target in tensors else program.constants[node.target]
                source = source.to(device)
                values[node] = source.detach().clone()
            elif node.op == "output":
                return [values[result] for result in node.args[0]]
            else:
                stand_in = functools.partial(_value, values, device)
                args, kwargs = torch.fx.node.map_aggregate((node.args, node.kwargs), stand_in)
                if numbers is not None and ("decided" in node.meta or draws(node)):
                    read = flat(inputs_read(OpCall(node.target, node.args, node.kwargs)))
                    numbers.extend(
                        (s, values[s].clone()) for s in read if isinstance(s, torch.fx.Node) and is_number(values[s])
                    )
                if "decided" in node.meta:
                    call = OpCall(node.target, args, kwargs)
                    values[node] = replay_decision(call, remapped(node, units or units_in({})))
                else:
                    values[node] = any_layout(node.target)(*args, **kwargs)
            if after is not None and node.op != "output":
                values[node] = after(node, values, values[node])
    raise AssertionError("a recorded graph ends in its output")


def _value(values: Values, device: torch.device, item: Tree) -> Tree:
    if isinstance(item, torch.fx.Node):
        return values[item]
    return device if isinstance(item, torch.device) else item
