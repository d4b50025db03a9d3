"""Cut the state of optimizers, and averages of the weights, with a model.

An optimizer stays the same object (schedulers, hooks and gradient scalers hold it): its groups point to the smaller
model's parameters, and its state tensors are cut as the parameters are. All is prepared before anything changes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from netsurgery.axes import Axis
from netsurgery.capture.copies import named_tensors
from netsurgery.capture.inputs import tensors_in
from netsurgery.edit import Edit
from netsurgery.errors import InputError, RewriteError
from netsurgery.rewriting.added import filled

__all__ = ["OF_ELEMENTS", "OF_WEIGHTS", "OptimizerStates", "State", "as_list", "averaged", "within"]

Axes = tuple[Axis, ...]
State = MutableMapping[str, Any]  # of one parameter, or the settings of a group of them
Kind = TypeVar("Kind")
_BASE = frozenset(["state", "param_groups", "defaults"])
_QUANTISED = (torch.uint8, torch.int8)


def as_list(given: object, kind: type[Kind], name: str) -> list[Kind]:
    """An argument as a list: it is None, one object of a kind, or several.

    Raises:
        InputError: it is something else.
    """
    listed = [] if given is None else list(given) if isinstance(given, list | tuple) else [given]
    for one in listed:
        if not isinstance(one, kind):
            found = type(one).__name__ if isinstance(one, nn.Module | Optimizer) else repr(one)
            raise InputError(f"{name}=... takes a torch {kind.__name__} or a list of them, got {found}")
    return [one for one in listed if isinstance(one, kind)]


def averaged(ema: nn.Module, model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """The module in an average of weights that has the model's names and shapes: the average itself, or one inside.

    Args:
        ema: such a module, or one around it: ``torch.optim.swa_utils.AveragedModel``, timm's ``ModelEmaV3``.
        shapes: of the model's tensors, by name.

    Raises:
        InputError: there is none, or it shares tensors with the model.
    """
    found: nn.Module | None = ema
    while found is not None:
        tensors = dict(named_tensors(found))
        if all(name in tensors and tuple(tensors[name].shape) == shape for name, shape in shapes.items()):
            break
        children = list(found.children())
        found = children[0] if len(children) == 1 else None
    if found is None:
        raise InputError(
            f"ema={type(ema).__name__} holds no module with the names and shapes of {type(model).__name__}"
        )
    mine = {id(tensor) for _, tensor in named_tensors(model)}
    if shared := next((name for name, tensor in named_tensors(found) if id(tensor) in mine), None):
        raise InputError(f"ema={type(ema).__name__} is not a copy: '{shared}' is the model's own tensor")
    return found


class OptimizerStates:
    """The states of optimizers, cut and ready to be put in place.

    Args:
        optimizers: any; parameters in them that are not the model's stay.
        tensors: of the model, by name.
        edit: the edit; its new values go into the copies of the weights that a state may hold ("master").
        moved: whether the parameters become other objects.
        renamed: the name of a tensor afterwards; None where it goes with a block: then its state does.

    Raises:
        InputError: an optimizer holds none of the model's parameters.
        RewriteError: a state that cannot be cut; nothing has been changed.
    """

    def __init__(
        self,
        optimizers: Iterable[Optimizer],
        tensors: Mapping[str, Tensor],
        edit: Edit,
        moved: bool,
        renamed: Callable[[str], str | None] = str,
    ):
        self.renamed = renamed
        self.edit, self.axes, self.positions, self.values = edit, edit.network.axes, edit.positions, edit.values
        self.names = {id(tensor): name for name, tensor in tensors.items()}
        self.groups: list[State] = []
        self.lists: list[list[Tensor]] = []
        self.states: list[MutableMapping[Tensor, State]] = []
        self.entries: list[tuple[State, dict[str, Tensor]]] = []
        for optimizer in optimizers:
            inside = [one for one in within(optimizer) if any(map(self._is_ours, _params(one)))]
            if not inside:
                raise InputError(
                    f"{type(optimizer).__name__} holds none of the model's parameters: "
                    "pass the optimizer that was made of model.parameters()"
                )
            for one in inside:
                self._add(one, moved)

    def carry_out(self, new: Mapping[int, Tensor]) -> None:
        """Put the states in place.

        Args:
            new: parameters by ``id`` of those they stand for; the others stay.
        """
        for entry, cut in self.entries:
            entry.update(cut)
        for group in self.groups:
            if "param_names" in group:
                pairs = zip(group["param_names"], group["params"], strict=True)
                group["param_names"] = [self._named(name, param) for name, param in pairs if self._stays(param)]
        for params in self.lists:
            params[:] = [new.get(id(param), param) for param in params if self._stays(param)]
        for state in self.states:
            items = list(state.items())
            state.clear()
            state.update((new.get(id(key), key), entry) for key, entry in items if self._stays(key))

    def _stays(self, param: object) -> bool:
        name = self.names.get(id(param))
        return name is None or self.renamed(name) is not None

    def _named(self, given: str, param: Tensor) -> str:
        """The name of a parameter after the removal, where the given one is the model's own."""
        return str(self.renamed(given)) if given == self.names.get(id(param)) else given

    def _add(self, optimizer: Optimizer, moved: bool) -> None:
        lists = [group["params"] for group in optimizer.param_groups]
        if moved:
            self._check_attributes(optimizer, lists)
        self.groups.extend(one for one in optimizer.param_groups if not any(one is other for other in self.groups))
        self.lists.extend(one for one in lists if not any(one is other for other in self.lists))
        if any(optimizer.state is state for state in self.states):
            return
        self.states.append(optimizer.state)
        names = [self.names[id(param)] for param in filter(self._is_ours, _params(optimizer))]
        if any(name in self.values or self.positions.changes(self.axes[name]) for name in names):
            for key, entry in optimizer.state.items():
                self._prepare(optimizer, key, entry)

    def _is_ours(self, param: Tensor) -> bool:
        return id(param) in self.names

    def _check_attributes(self, optimizer: Optimizer, lists: list[list[Tensor]]) -> None:
        """Refuse an optimizer that holds parameters outside its groups: they would stay the old ones."""
        known = {id(one) for one in lists}
        for attribute, value in vars(optimizer).items():
            if attribute not in _BASE and any(map(self._is_ours, _held(value, known))):
                raise RewriteError(
                    f"{type(optimizer).__name__}.{attribute} holds parameters of the model outside param_groups: "
                    "rewrite with inplace=True, which keeps them, or make a new optimizer for the smaller model"
                )

    def _prepare(self, optimizer: Optimizer, key: object, entry: State) -> None:
        if not isinstance(key, Tensor) or id(key) not in self.names:  # of another model, or of no parameter
            if not isinstance(key, Tensor) and any(tensor.dim() for tensor in tensors_in(entry)):
                raise self._refusal(optimizer, f"'{key}'", "belongs to no parameter")
            return
        name = self.names[id(key)]
        cut: dict[str, Tensor] = {}
        for what, value in entry.items():
            where = f"'{what}' of {name}"
            if not isinstance(value, Tensor):
                if any(tensor.dim() for tensor in tensors_in(value)):
                    raise self._refusal(optimizer, where, f"is a {type(value).__name__} of tensors")
            elif value.dim():
                if type(value) not in (Tensor, nn.Parameter, type(key.data)) or value.dtype in _QUANTISED:
                    raise self._refusal(optimizer, where, f"is packed ({type(value).__name__}, {value.dtype})")
                axes = self._axes_of(what, value, name, key)
                if axes is None or not (self._unambiguous(value, axes) or self._is_usual(optimizer, what, value, key)):
                    shapes = f"has shape {tuple(value.shape)}, the parameter has {tuple(key.shape)}"
                    raise self._refusal(
                        optimizer, where, f"{shapes}, and it is not clear which dimensions are the same"
                    )
                weights = value.shape == key.shape and ("master" in what or what in OF_WEIGHTS)
                if name in self.values and "master" in what and weights:
                    value = self.values[name].to(value)
                elif not self.positions.changes(tuple(axis for axis in axes if axis is not None)):
                    continue
                cut[what] = self.positions.cut(value, axes)
                if weights:
                    filled(cut[what], value, name, self.edit)
                elif what in _STARTS:
                    self._start(optimizer, what, cut[what], name, key)
        self.entries.append((entry, cut))

    def _start(self, optimizer: Optimizer, what: str, state: Tensor, name: str, param: Tensor) -> None:
        """Set the state of new units to the value that the optimizer begins with, where that is not zero."""
        group = next(group for group in optimizer.param_groups if any(one is param for one in group["params"]))
        start = group.get(_STARTS[what], 0.0)
        for dim, axis in enumerate(self.axes[name]):
            if start and (new := self.positions.new(axis)) is not None:
                state.index_fill_(dim, new.nonzero().flatten().to(state.device), float(start))

    def _axes_of(self, what: str, value: Tensor, name: str, param: Tensor) -> tuple[Axis | None, ...] | None:
        """The dimensions of a state tensor in those of its parameter; None where that is not clear."""
        axes, shape, own = self.axes[name], tuple(param.shape), tuple(value.shape)
        if len(own) == len(shape):  # of each element, or reduced along dimensions that have size one then
            fits = all(n in (1, size) for n, size in zip(own, shape, strict=True))
            return tuple(axis if n > 1 else None for n, axis in zip(own, axes, strict=True)) if fits else None
        if what in _FACTORS and own == tuple(_FACTORS[what](shape)):
            return tuple(_FACTORS[what](axes))
        choices = [
            tuple(axes[dim] for dim in dims)
            for dims in itertools.combinations(range(len(shape)), len(own))
            if tuple(shape[dim] for dim in dims) == own
        ]
        alike = all(self._same_positions(choice, choices[0]) for choice in choices)
        return choices[0] if choices and alike else None

    def _unambiguous(self, value: Tensor, axes: tuple[Axis | None, ...]) -> bool:
        """True if dimensions of equal size lose the same; else a matrix may be of the rows alone (a preconditioner)."""
        pairs = itertools.combinations(zip(value.shape, axes, strict=True), 2)
        return all(n != m or self._same_positions((one,), (other,)) for (n, one), (m, other) in pairs)

    def _is_usual(self, optimizer: Optimizer, what: str, value: Tensor, param: Tensor) -> bool:
        """True if a state surely has a number for each element: by its name, or as for a parameter not square."""
        if value.shape == param.shape and (what in OF_ELEMENTS or "master" in what):
            return True
        return any(
            self._is_ours(other)
            and other.dim() == param.dim()
            and isinstance(found := entry.get(what), Tensor)
            and found.dim() == value.dim()
            and found.shape[0] != found.shape[1]
            for other, entry in optimizer.state.items()
            if isinstance(other, Tensor)
        )

    def _same_positions(self, one: tuple[Axis | None, ...], other: tuple[Axis | None, ...]) -> bool:
        """True if the same positions stay."""
        found = ([None if axis is None else self.positions(axis) for axis in axes] for axes in (one, other))
        pairs = zip(*found, strict=True)
        return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)

    def _refusal(self, optimizer: Optimizer, where: str, why: str) -> RewriteError:
        return RewriteError(
            f"the state of {type(optimizer).__name__} cannot be cut with the weights: {where} {why}. Nothing was "
            "changed. Make a new optimizer for the smaller model, or clear this one's state (optimizer.state.clear())"
        )


# Names under which torch.optim, and others after it, keep a number for each element of a parameter.
OF_ELEMENTS = frozenset((
    "momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "grad_avg", "acc_delta",
    "sum", "ax", "prev", "step_size", "slow_buffer", "z",
))  # fmt: skip
#: The names among these whose values are weights: averages, and copies that are trained.
OF_WEIGHTS = frozenset(("ax", "slow_buffer", "z"))
#: And those that do not begin with zeros: the setting that they begin with (Adagrad, Rprop).
_STARTS = {"sum": "initial_accumulator_value", "step_size": "lr"}
# Adafactor, as fairseq, transformers and timm name it: averages over the last dimension, and over the one before.
_FACTORS: dict[str, Callable[[tuple[Any, ...]], tuple[Any, ...]]] = {
    "exp_avg_sq_row": lambda of: of[:-1],
    "exp_avg_sq_col": lambda of: (*of[:-2], *of[-1:]),
}


def within(optimizer: Optimizer) -> Iterator[Optimizer]:
    """An optimizer and those it is built around, such as the base of a lookahead."""
    found, left = [optimizer], [optimizer]
    while left:
        for value in vars(left.pop()).values():
            if isinstance(value, Optimizer) and not any(value is one for one in found):
                found.append(value)
                left.append(value)
    return iter(found)


def _params(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _held(value: object, known: set[int]) -> Iterator[Tensor]:
    """Tensors in an attribute: nested lists and dictionaries, but for the lists that are known."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _held(key, known)
            yield from _held(item, known)
    elif isinstance(value, list | tuple | set) and id(value) not in known:
        for item in value:
            yield from _held(item, known)
