"""Modules are replaced or wrapped, and what a training loop keeps beside the model follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from netsurgery.capture.copies import copy_with, like, named_modules
from netsurgery.edit import Edit
from netsurgery.errors import RewriteError
from netsurgery.module_rewrites import built, put
from netsurgery.rewriting.optimizers import OptimizerStates, within

__all__ = ["with_modules"]

Model = TypeVar("Model", bound=nn.Module)


def with_modules(
    model: Model,
    edit: Edit,
    tensors: Mapping[str, Tensor],
    inplace: bool,
    optimizers: Sequence[Optimizer],
    averages: Sequence[nn.Module],
) -> Model:
    """Carry out the stage of an edit that rewrites modules.

    Args:
        tensors: of the model, by name.
        averages: modules of the model's names and shapes.

    Raises:
        RewriteError: a module cannot be built anew, or an optimizer or an average cannot follow. Nothing has been
            changed then.
    """
    if averages and (rewrite := next((one for one in edit.modules.values() if not one.averages), None)):
        raise RewriteError(
            f"an average cannot go on after {rewrite!r}: what that makes of averaged weights is no average of what it "
            "makes of the weights. Rewrite without ema=..., and begin a new average"
        )
    renamed = edit.names_after(())
    states = OptimizerStates(optimizers, tensors, edit, not inplace, renamed.get)
    copies = {} if inplace else {id(tensor): _copy(tensor) for tensor in tensors.values()}
    result = model if inplace else copy_with(model, copies)
    new = built(result, edit.modules)
    joining = _Joining(model, result, new, optimizers)
    averaged = [built(average, edit.modules) for average in averages]
    put(result, new)
    for average, modules in zip(averages, averaged, strict=True):
        put(average, modules)
    states.carry_out(copies)
    joining.carry_out(result)
    return result


def _copy(tensor: Tensor) -> Tensor:
    new = like(tensor, tensor.detach().clone())
    if tensor.is_leaf and tensor.grad is not None:
        new.grad = tensor.grad.clone()
    return new


@dataclass
class _Place:
    """Where new parameters join: a group of an optimizer, and the optimizer."""

    optimizer: Optimizer
    group: dict[str, Any]


class _Joining:
    """New parameters join the group that holds those of the module that they come from.

    Args:
        before: the model whose parameters the optimizers hold.
        result: the model to be; ``before`` itself, or its copy.
        new: the new modules of ``result``, which are not in their places yet.

    Raises:
        RewriteError: it is not clear which group.
    """

    def __init__(
        self, before: nn.Module, result: nn.Module, new: Mapping[str, nn.Module], optimizers: Sequence[Optimizer]
    ):
        self.before = [id(parameter) for parameter in before.parameters()]
        self.places: list[tuple[_Place, nn.Parameter]] = []
        own = {id(parameter) for parameter in result.parameters()}
        modules = named_modules(before)
        groups = [
            _Place(one, group)
            for one in _each([one for optimizer in optimizers for one in within(optimizer)])
            for group in one.param_groups
        ]
        places = list({id(place.group["params"]): place for place in groups}.values())  # wrappers share them
        for path, module in new.items():
            fresh = [parameter for parameter in module.parameters() if id(parameter) not in own]
            old = list(modules[path].parameters())
            for parameter in fresh if places else ():
                place = _place(parameter, old, places, path)
                if place is not None:
                    self.places.append((place, parameter))

    def carry_out(self, model: nn.Module) -> None:
        """Let them join, in the order of the model's parameters where the group is in that order."""
        after = {id(parameter): (index, name) for index, (name, parameter) in enumerate(model.named_parameters())}
        for place, parameter in self.places:
            params = place.group["params"]
            index = _index(params, parameter, {key: number for key, (number, _) in after.items()})
            params.insert(index, parameter)
            if "param_names" in place.group:
                place.group["param_names"].insert(index, after[id(parameter)][1])
            if isinstance(place.optimizer, torch.optim.Adagrad):  # its state is made with the optimizer
                _begin(place, parameter)


def _begin(place: _Place, parameter: nn.Parameter) -> None:
    start = place.group["initial_accumulator_value"]
    place.optimizer.state[parameter] = {
        "step": torch.zeros((), dtype=torch.float32),
        "sum": torch.full_like(parameter, start, memory_format=torch.preserve_format).detach(),
    }


def _each(optimizers: Sequence[Optimizer]) -> list[Optimizer]:
    return list({id(one): one for one in optimizers}.values())


def _index(params: Sequence[Tensor], parameter: nn.Parameter, order: Mapping[int, int]) -> int:
    """Where a parameter joins others: in order where these are in order, else behind them."""
    numbers = [order.get(id(one), -1) for one in params]
    if -1 in numbers or numbers != sorted(numbers):
        return len(params)
    return sum(number < order[id(parameter)] for number in numbers)


def _place(parameter: Tensor, old: Sequence[Tensor], places: Sequence[_Place], path: str) -> _Place | None:
    """The group that a new parameter joins; None where those of the old module are in none."""
    vector = parameter.dim() <= 1
    for alike in ([one for one in old if (one.dim() <= 1) == vector], old):
        keys = {id(one) for one in alike}
        found = [place for place in places if any(id(one) in keys for one in place.group["params"])]
        if found:
            return found[0]
    if old:
        return None
    if len(places) > 1:
        raise RewriteError(
            f"the new parameters of '{path}' come from a module that has none, and it is not clear which of "
            f"{len(places)} param groups they join: rewrite without optimizer=..., and make a new one"
        )
    return places[0]
