"""Split parameters: old entries are a buffer, which nothing trains, new ones a parameter of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from netsurgery.capture.copies import named_modules, named_tensors
from netsurgery.positions import laid_out_as
from netsurgery.rewriting.data import set_data

__all__ = ["assembled", "is_split", "join", "split"]

_REFUSED = "is being planted: call finish() of its Planting first"
_RECORD = "_split"  # attribute of a module whose parameters are split


@dataclass
class _Record:
    """The class and the parameters that a module had before."""

    kind: type[nn.Module]
    parameters: dict[str, nn.Parameter]  # in order; those that are held are empty meanwhile
    trained: dict[str, bool]
    places: dict[str, Tensor] = field(default_factory=dict)  # of new entries in the flattened tensor: int64

    def places_on(self, key: str, device: torch.device) -> Tensor:
        places = self.places[key]
        if places.device != device:
            self.places[key] = places = places.to(device)
        return places


def assembled(old: Tensor, places: Tensor, new: Tensor) -> Tensor:
    """A tensor of the shape and memory format of ``old``, with other values at places of the flattened tensor."""
    return laid_out_as(old, old.flatten().index_copy(0, places, new).view(old.shape))


def split(model: nn.Module, new: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """Make new entries a model's only parameters: flat, the same objects as before, as ``{name}_new`` of the module.

    Its own code reads ``module.weight`` as ever, and gets a tensor made of both. Old entries are the buffer
    ``{name}_old``; a parameter without new entries is a buffer of its own name.

    Args:
        new: which entries are new, bool, by the tensor's name.

    Returns:
        By ``id`` of the parameters that were split, the places of new entries in the flattened tensor.
    """
    names = {id(tensor): name for name, tensor in named_tensors(model)}
    held: dict[int, Tensor] = {}  # by id of the parameter, so that tied ones are split once
    places: dict[int, Tensor] = {}
    for module in named_modules(model).values():
        own = {key: one for key, one in module._parameters.items() if one is not None}
        for one in own.values():
            if id(one) not in held:
                held[id(one)] = one.data
                where = new.get(names[id(one)])
                if where is not None and (one.is_floating_point() or one.is_complex()):
                    places[id(one)] = where.flatten().nonzero().flatten().to(one.device)
        if own:
            _split_module(module, own, held, places)
    for module in named_modules(model).values():
        for one in module.__dict__[_RECORD].parameters.values() if is_split(module) else ():
            one.grad = None
            at = places.get(id(one))
            set_data(one, held[id(one)].new_empty(0) if at is None else held[id(one)].flatten()[at])
            one.requires_grad_(at is not None)
    return places


def _split_module(
    module: nn.Module, own: dict[str, nn.Parameter], held: Mapping[int, Tensor], places: Mapping[int, Tensor]
) -> None:
    kind = type(module)
    record = _Record(kind, own, {key: one.requires_grad for key, one in own.items()})
    properties: dict[str, property] = {}
    for key, one in own.items():
        del module._parameters[key]
        if id(one) not in places:
            module._buffers[key] = held[id(one)]
            continue
        record.places[key] = places[id(one)]
        module._parameters[f"{key}_new"] = one
        module._buffers[f"{key}_old"] = held[id(one)]
        properties[key] = property(_reader(key))
    if isinstance(module, nn.RNNBase):
        properties["_flat_weights"] = property(_flat_weights, lambda *_: None)
    module.__dict__[_RECORD] = record
    module.__class__ = type(
        kind.__name__, (kind,), {"__module__": kind.__module__, "surgery_refused": _REFUSED, **properties}
    )


def _reader(key: str) -> Callable[[nn.Module], Tensor]:
    def read(module: nn.Module) -> Tensor:
        old, new = module._buffers[f"{key}_old"], module._parameters[f"{key}_new"]
        assert old is not None and new is not None
        return assembled(old, module.__dict__[_RECORD].places_on(key, old.device), new)

    return read


def _flat_weights(module: nn.RNNBase) -> list[Any]:
    """The list of weights that a recurrent network keeps for itself."""
    return [getattr(module, name) for name in module._flat_weights_names]


def is_split(module: nn.Module) -> bool:
    """True if a module's parameters are split."""
    return _RECORD in module.__dict__


def _split_modules(model: nn.Module) -> Iterator[tuple[nn.Module, _Record]]:
    return ((one, one.__dict__[_RECORD]) for one in named_modules(model).values() if is_split(one))


@torch.no_grad()
def join(model: nn.Module) -> None:
    """Make the parameters of a model, or of a copy of it, whole again: the same objects, in the same order."""
    found = list(_split_modules(model))
    whole = {
        id(one): getattr(module, key).detach() for module, record in found for key, one in record.parameters.items()
    }
    for module, record in found:
        module.__class__ = record.kind
        del module.__dict__[_RECORD]
        for key in record.parameters:
            for store in (module._parameters, module._buffers):
                for name in (key, f"{key}_new", f"{key}_old"):
                    store.pop(name, None)
        others = dict(module._parameters)
        module._parameters.clear()
        for key, one in record.parameters.items():
            one.grad = None
            set_data(one, whole[id(one)])
            one.requires_grad_(record.trained[key])
            module._parameters[key] = one
        module._parameters.update(others)
        if isinstance(module, nn.RNNBase):
            module._flat_weights = _flat_weights(module)
