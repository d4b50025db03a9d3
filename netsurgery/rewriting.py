"""The one room where tensors change: carry an Edit out on a copy of the model, or on the model itself."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from netsurgery.attributes import follow
from netsurgery.axes import Axis
from netsurgery.check import adapt
from netsurgery.copying import copy_with, like, named_tensors
from netsurgery.edit import Edit
from netsurgery.errors import RewriteError

__all__ = ["rewrite"]

Model = TypeVar("Model", bound=nn.Module)
_log = logging.getLogger("netsurgery")


def rewrite(model: Model, edit: Edit, *, inplace: bool = False) -> Model:
    """Carry an edit out.

    Args:
        model: the model the edit was planned for, or one of the same shapes.
        inplace: change ``model`` itself; its Parameter objects stay the same objects. Losses computed before must be
            gone (``del loss``): their graphs remember the old shapes.

    Returns:
        The model's own class with the same module names and state_dict keys, its tensors cut, attributes such as
        ``in_channels`` in step. Training mode, hooks, requires_grad, dtype, device, memory format and ties stay.
        A module whose code hard-codes a size gets a rewritten ``forward``, in a subclass of its own class: the logger
        ``netsurgery`` names these, ``edit.replaced`` says why.

    Raises:
        RewriteError: the model's tensors are not those of the edit's network, or its code does not follow the new sizes
            (an edit that ``plan`` made has been checked already).

    Example:
        >>> import torch, netsurgery
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> edit = netsurgery.Edit(netsurgery.trace(model, (torch.randn(1, 4),)), {"0": (0, 2, 5)})
        >>> netsurgery.rewrite(model, edit)[0]
        Linear(in_features=4, out_features=3, bias=True)
    """
    network = edit.network
    tensors = dict(named_tensors(model))
    for name, axes in network.axes.items():
        if name not in tensors or tuple(tensors[name].shape) != tuple(axis.size for axis in axes):
            found = tuple(tensors[name].shape) if name in tensors else "missing"
            raise RewriteError(f"the edit is for another model: {name} is {[a.size for a in axes]} there, {found} here")
    adaptation, refused = edit.adaptation_for(model), dict[str, str]()
    if adaptation is None:
        adaptation, refused = adapt(model, network, edit.counts)
    if refused:
        group, why = next(iter(refused.items()))
        raise RewriteError(f"group '{group}' cannot have {edit.counts[group]} units: {why}")
    places = _Positions({network[name].channel: units for name, units in edit.keep.items()})
    if inplace:
        cut = {name: _cut(tensors[name], axes, places) for name, axes in network.axes.items() if places.changes(axes)}
        for name, tensor in cut.items():
            old = tensors[name]
            old.grad, grad = None, old.grad
            old.data = tensor
            if grad is not None:
                old.grad = _cut(grad, network.axes[name], places)
        result = model
    else:
        result = copy_with(model, {id(t): _copy(t, network.axes[name], places) for name, t in tensors.items()})
    follow(result, network, network.sizes(edit.counts))
    adaptation.carry_out(result)
    if adaptation.reasons:
        first, more = list(adaptation.reasons)[:3], len(adaptation.reasons) - 3
        listed = ", ".join(first) + (f" and {more} more" if more > 0 else "")
        _log.warning(
            "rewrote the forward of %d modules whose code hard-codes a size: %s", len(adaptation.reasons), listed
        )
    return result


def _copy(tensor: Tensor, axes: tuple[Axis, ...], places: _Positions) -> Tensor:
    new = like(tensor, _cut(tensor, axes, places))
    if tensor.grad is not None:
        new.grad = _cut(tensor.grad, axes, places)
    return new


def _cut(tensor: Tensor, axes: tuple[Axis, ...], places: _Positions) -> Tensor:
    """A new tensor with the positions that stay along every axis, in the memory format of the old one."""
    with torch.no_grad():
        new = tensor.detach()
        for dim, axis in enumerate(axes):
            if (positions := places(axis)) is not None:
                new = new.index_select(dim, positions.to(tensor.device))
        last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(new.dim())
        if last is not None and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=last):
            new = new.contiguous(memory_format=last)
        return new.clone() if new.data_ptr() == tensor.data_ptr() else new


class _Positions:
    """Positions that stay along an axis, or None where all do."""

    def __init__(self, keep: Mapping[Axis, tuple[int, ...]]):
        self.memo: dict[Axis, Tensor | None] = {channel: torch.tensor(units) for channel, units in keep.items()}

    def __call__(self, axis: Axis) -> Tensor | None:
        if axis not in self.memo:
            self.memo[axis] = self.compound(axis)
        return self.memo[axis]

    def changes(self, axes: tuple[Axis, ...]) -> bool:
        return any(self(axis) is not None for axis in axes)

    def compound(self, axis: Axis) -> Tensor | None:
        terms = [self(term) for term in axis.terms]
        if all(term is None for term in terms):
            return None
        full = [torch.arange(part.size) if term is None else term for part, term in zip(axis.terms, terms, strict=True)]
        if axis.op == "concat":
            starts = torch.tensor([0, *(part.size for part in axis.terms[:-1])]).cumsum(0)
            return torch.cat([start + part for start, part in zip(starts, full, strict=True)])
        out = full[0]
        for part, places in zip(axis.terms[1:], full[1:], strict=True):
            out = (out[:, None] * part.size + places).flatten()
        return out
