"""Optimizers while only parts of parameters are trained: the states of the other entries are kept aside meanwhile."""

from __future__ import annotations

from collections.abc import Container, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor
from torch.optim import Adagrad, Optimizer

from netsurgery.capture.inputs import tensors_in
from netsurgery.passes.split_tensors import assembled
from netsurgery.rewriting.optimizers import OF_ELEMENTS, OF_WEIGHTS, State, within

__all__ = ["HeldStates"]


class HeldStates:
    """Let optimizers go on with new entries, as if these had just come, in the same groups with the same settings.

    Args:
        optimizers: the optimizers of the whole model.
        held: ids of the parameters that are held; they leave the optimizers.
        places: by ``id`` of a parameter that has been split the places of new entries in the flattened tensor.
    """

    def __init__(self, optimizers: Sequence[Optimizer], held: Container[int], places: Mapping[int, Tensor]):
        self._places = dict(places)
        self._lists: list[tuple[list[Tensor], list[Tensor]]] = []
        self._states: list[tuple[Optimizer, MutableMapping[Tensor, State], dict[Tensor, State]]] = []
        inside = {id(one): one for optimizer in optimizers for one in within(optimizer)}.values()
        for optimizer in inside:
            for group in optimizer.param_groups:
                params = group["params"]
                if not any(params is known for known, _ in self._lists):
                    self._lists.append((params, list(params)))
                    params[:] = [one for one in params if id(one) not in held]
            if any(optimizer.state is state for _, state, _ in self._states):
                continue
            ours = [one for one in optimizer.state if id(one) in held or id(one) in places]
            kept = {one: optimizer.state.pop(one) for one in ours}
            self._states.append((optimizer, optimizer.state, kept))
            if isinstance(optimizer, Adagrad):  # it makes its state when it is built, others at their first step
                for one in (one for one in ours if id(one) in places):
                    optimizer.state[one] = _begun(kept[one], places[id(one)])

    def put_back(self) -> None:
        """Give optimizers the whole parameters again, with states that hold the latest numbers of new entries."""
        for params, before in self._lists:
            known = {id(one) for one in before}
            params[:] = [*before, *(one for one in params if id(one) not in known)]
        for optimizer, state, kept in self._states:
            late = {one: state.pop(one) for one in list(state) if id(one) in self._places}
            for one in dict.fromkeys([*kept, *late]):
                entry = kept.get(one, {})
                if one in late:
                    entry = _merged(optimizer, entry, late[one], one, self._places[id(one)])
                if entry:
                    state[one] = entry


def _begun(entry: State, places: Tensor) -> State:
    """The part of a whole parameter's state that new entries begin with."""
    return {
        key: value.flatten()[places.to(value.device)] if value.dim() else torch.zeros_like(value)
        for key, value in entry.items()
    }


@torch.no_grad()
def _merged(optimizer: Optimizer, entry: State, late: State, param: Tensor, places: Tensor) -> State:
    """A state of the whole parameter, with the numbers that an optimizer has kept for each new entry.

    Args:
        entry: the state of before, at the new size; empty if there was none.
        late: the state of new entries.
        param: whole.
    """
    merged = dict(entry)
    of_each = {k: v for k, v in late.items() if isinstance(v, Tensor) and v.shape == places.shape and v.dim()}
    others = {k: v for k, v in late.items() if k not in of_each and v is not None}
    if not entry:
        known = of_each.keys() <= OF_ELEMENTS and not any(one.dim() for one in tensors_in(list(others.values())))
        if not (known and _is_usual(optimizer)):
            return {}  # it is not known what belongs to old entries: the optimizer begins anew
        merged = {**others, **{key: _blank(key, value, param) for key, value in of_each.items()}}
    for key, value in of_each.items():
        base = merged.get(key)
        if base is None and key in merged and key in OF_ELEMENTS:
            base = _blank(key, value, param)
        if isinstance(base, Tensor) and base.shape == param.shape:
            merged[key] = assembled(base.to(value.device), places.to(value.device), value)
    return merged


def _blank(key: str, value: Tensor, param: Tensor) -> Tensor:
    """The state of a whole parameter before its first step."""
    like = param if key in OF_WEIGHTS else torch.zeros_like(param)
    return like.detach().to(value.dtype, copy=True)


def _is_usual(optimizer: Optimizer) -> bool:
    """True if an optimizer is torch's, or derived from one: these keep the same for a vector and for a matrix."""
    return any(kind.__module__.startswith("torch.optim") and kind is not Optimizer for kind in type(optimizer).__mro__)
