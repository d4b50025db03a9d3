"""Entries of parameters that stay zero while they are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from netsurgery.passes.filter_positions import scale

__all__ = ["HeldZeros"]

Places = Sequence[tuple[int, Tensor]]  # axes of a tensor, and positions along them


class HeldZeros:
    """Holds entries of parameters at zero: they have no gradient and no momentum."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def hold(
        self,
        tensors: Mapping[str, Tensor],
        places: Mapping[tuple[str, int], Tensor],
        optimizers: Sequence[Optimizer],
        *,
        only_watch: bool = False,
    ) -> None:
        """Set entries to zero and keep them so, instead of those that were held before.

        Args:
            tensors: parameters, by name.
            places: which positions, bool, along an axis of a parameter.
            optimizers: the optimizers of the parameters.
            only_watch: leave the entries and the optimizers as they are now.
        """
        self.release()
        held: dict[int, list[tuple[int, Tensor]]] = {}
        for (name, axis), positions in places.items():
            tensor = tensors[name]
            if not only_watch:
                scale(tensor, axis, positions, 0)
            held.setdefault(id(tensor), []).append((axis, positions.nonzero().flatten().to(tensor.device)))
        if not held:
            return
        for parameter in (p for p in tensors.values() if id(p) in held and p.requires_grad):
            self._handles.append(parameter.register_hook(partial(_without, places=held[id(parameter)])))
            if parameter.grad is not None:
                _fill(parameter.grad, held[id(parameter)])
        for optimizer in optimizers:
            if not only_watch:
                _fill_all(optimizer, held)
            self._handles.append(optimizer.register_step_post_hook(lambda one, *_: _fill_all(one, held)))

    def release(self) -> None:
        """Let go of the parameters and the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _without(gradient: Tensor, places: Places) -> Tensor:
    """A gradient with zeros at some places, also where it was infinite, as under a GradScaler."""
    for axis, index in places:
        gradient = gradient.index_fill(axis, index.to(gradient.device), 0)
    return gradient


@torch.no_grad()
def _fill(tensor: Tensor, places: Places) -> None:
    for axis, index in places:
        tensor.index_fill_(axis, index.to(tensor.device), 0)


def _fill_all(optimizer: Optimizer, held: Mapping[int, Places]) -> None:
    """Set entries of parameters, and of states of their shape such as momentum, to zero."""
    for parameter in (p for group in optimizer.param_groups for p in group["params"] if id(p) in held):
        state = optimizer.state[parameter].values() if parameter in optimizer.state else ()
        kept = [value for value in state if isinstance(value, Tensor) and value.shape == parameter.shape]
        for tensor in (parameter, *kept):
            _fill(tensor, held[id(parameter)])
