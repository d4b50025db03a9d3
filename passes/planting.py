"""Planting in a training loop: units that an Edit adds are trained, and nothing else changes by a bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from netsurgery.arguments import expect
from netsurgery.capture.copies import named_modules, named_tensors
from netsurgery.capture.inputs import tensors_in
from netsurgery.edit import Edit
from netsurgery.errors import InputError
from netsurgery.passes.growing import PlantChannels
from netsurgery.passes.held_buffers import HeldBuffers
from netsurgery.passes.held_states import HeldStates
from netsurgery.passes.parameters import own_module
from netsurgery.passes.patterns import Modules
from netsurgery.passes.split_tensors import is_split, join, split
from netsurgery.pipeline import plan
from netsurgery.rewriting.optimizers import as_list, averaged
from netsurgery.rewriting.surgery import rewrite
from netsurgery.units import Copy, New

__all__ = ["Planting"]


class Planting:
    """Add new units to a model and train these alone: every old entry stays bitwise as it is until ``finish``.

    The model itself grows, and no output changes at that moment. From then on its parameters are the new entries: the
    weights that make new units or read them, their biases, scales and shifts. Everything else is in buffers: no
    optimizer, weight decay, momentum or gradient scaler can reach it, whatever it does to the parameters that it holds.
    The model's own code reads ``module.weight`` as ever, which is assembled from both at each access.

    ======================  ======================================  ========================================
    tensor ``conv.weight``  parameters                              in ``state_dict`` until ``finish``
    ======================  ======================================  ========================================
    old and new entries     new ones, flat: a vector ``(new,)``     ``conv.weight_new``, ``conv.weight_old``
    old entries alone       none                                    ``conv.weight``
    ======================  ======================================  ========================================

    Save the ``state_dict`` to resume (plant the same Edit, then load it); the model itself cannot be pickled meanwhile.
    A parameter that has new entries stays the same object, and is trained even where it was not. Buffers, such as
    running statistics and the number of batches that they have seen, get their old entries back after each forward
    pass; those of new units follow their batches.

    So that training sees old units as they will be used, batch norms normalise them by their running statistics in
    training mode, too, and new units by those of the batch: at first they give in either mode what they gave in eval
    mode before. With ``statistics="batch"`` they give in training mode what they gave before in that mode, but
    statistics that no longer move do not fit what old units get from new ones: on the digits (three channels planted in
    each of three layers of three, four seeds) a mean accuracy of 0.87 fell to 0.80 with "batch", and rose to 0.95 with
    "running".

    Args:
        model: any module; it is changed in place. In torch.compile's wrapper it is compiled anew. Losses computed
            before must be differentiated before.
        example_inputs: as for ``trace``, for ``amount``.
        amount: new channels of each layer, as ``PlantChannels`` counts them; or by modules.
        include: the modules that get them, as for ``PlantChannels``; by default all that can grow.
        edit: in place of an amount any Edit of ``New`` units. Copies and removals are refused: they change old entries.
        optimizer: the optimizer of the model, or several. Each goes on with the new entries, in the same groups with
            the same settings, and begins with them; momentum and the like of old ones is kept aside. Optimizers that
            look at a weight's shape see a vector. One that is made after planting needs nothing, but ends with it.
        ema: averages of the weights, one or several, as for ``netsurgery.rewrite``: they grow, new entries are
            averaged, and at ``finish`` their old ones are as they were, whatever the averaging made of them.
        statistics: by which modules of torch's batch norms normalise old units in training mode: "running" or "batch".

    Raises:
        InputError: an edit that adds nothing, or that copies, removes or changes units; a model that is being planted
            already, or in DistributedDataParallel, or that holds trained tensors outside its parameters; an optimizer
            that does not hold tensors with new entries.
        RewriteError: as for ``netsurgery.rewrite``. Whatever is raised, nothing has been changed.

    Example:
        >>> import torch, netsurgery
        >>> from netsurgery.passes import Planting
        >>> x = torch.randn(16, 4)
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> old = net[0].weight.detach().clone()
        >>> optimizer = torch.optim.AdamW(net.parameters(), 0.1)
        >>> plant = Planting(net, x, amount=2, optimizer=optimizer)
        >>> print(plant)
        2 new units in 1 group: 14 of 37 parameters are trained
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     net(x).square().mean().backward()
        ...     optimizer.step()
        >>> net = plant.finish()
        >>> net[0], torch.equal(net[0].weight[:3], old)
        (Linear(in_features=4, out_features=5, bias=True), True)

    Source: channel planting, Mitsuno and Kurita, arXiv 2011.02390: parameters trained before are fixed while planted
    channels are trained. Ours: that entries of a parameter are held apart, how optimizers, averages and running
    statistics are treated.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: object = None,
        *,
        amount: int | Mapping[Any, int] | None = None,
        include: Modules = (),
        edit: Edit | None = None,
        optimizer: Optimizer | Sequence[Optimizer] = (),
        ema: nn.Module | Sequence[nn.Module] = (),
        statistics: Literal["running", "batch"] = "running",
    ):
        if statistics not in ("running", "batch"):
            raise InputError(f"Planting(statistics={statistics!r}): 'running' or 'batch'")
        self.model = _own(model)
        if (edit is None) == (amount is None) or (edit is not None and include):
            raise InputError("Planting takes either amount=... (and include=...) or edit=...")
        if edit is None:
            edit = plan(self.model, [PlantChannels(amount or 0, include=include)], example_inputs)
        self.edit = edit
        _check_edit(edit)
        optimizers, averages = as_list(optimizer, Optimizer, "optimizer"), as_list(ema, nn.Module, "ema")
        axes, positions = edit.network.axes, edit.positions
        found = {name: positions.new_entries(own) for name, own in axes.items()}
        self._new = {name: entries for name, entries in found.items() if entries is not None}
        _check_model(self.model, self._new, optimizers)
        shapes = {name: tuple(axis.size for axis in own) for name, own in axes.items()}
        inner = [averaged(one, self.model, shapes) for one in averages]
        rewrite(self.model, edit, inplace=True, optimizer=optimizers, ema=averages)
        whole = list(self.model.parameters())
        self._size = sum(one.numel() for one in whole)
        self._buffers = HeldBuffers(self.model, self._new)
        places = split(self.model, self._new)
        self._buffers.watch(self.model, normalise=statistics == "running")
        self._states = HeldStates(optimizers, {id(one) for one in whole if id(one) not in places}, places)
        for one in inner:
            split(one, self._new)
        self._averages = [(one, HeldBuffers(one, self._new)) for one in inner]  # old weights are buffers, too
        self._finished = False

    def finish(self, *, ema: nn.Module | Sequence[nn.Module] = ()) -> nn.Module:
        """The model with ordinary parameters again, which are trained from here on as they were before planting.

        Optimizers hold the whole parameters again; their state is that of before for old entries, and that of now for
        new ones. Gradients are gone, and losses that were computed before can no longer be differentiated.

        Args:
            ema: copies of the model that were made after planting, such as averages of it: they become ordinary, too.

        Returns:
            The model that was passed: its own class, with the names that ``netsurgery.rewrite`` leaves.

        Raises:
            InputError: it was called before, or ``ema`` is no copy of the planted model.
        """
        if self._finished:
            raise InputError("Planting.finish: it was called before; make another Planting to add more units")
        copies = [_copy_in(one, self.model) for one in as_list(ema, nn.Module, "ema")]
        self._finished = True
        self._buffers.put_back(self.model)
        held = HeldBuffers(self.model, self._new)
        restored = [(self.model, self._buffers), *((one, held) for one in copies), *self._averages]
        for one, own in restored:
            own.put_back(one)
            own.forget(one)
            join(one)
        self._states.put_back()
        return self.model

    def __str__(self) -> str:
        added = [sum(isinstance(unit, New) for unit in self.edit.keep[name]) for name in self.edit.grown]
        groups = f"{len(added)} group" + ("s" if len(added) > 1 else "")
        if self._finished:
            return f"{sum(added)} new units in {groups}: finished"
        count = sum(one.numel() for one in self.model.parameters())
        return f"{sum(added)} new units in {groups}: {count:,} of {self._size:,} parameters are trained"


def _own(model: nn.Module) -> nn.Module:
    """The user's own module, which can be changed in place."""
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise InputError(f"Planting: plant into the module in {type(model).__name__}, and wrap it again after that")
    expect("Planting(model, edit=...)", "a torch.nn.Module", (model, nn.Module))
    own = own_module(model)
    if any(map(is_split, own.modules())):
        raise InputError("Planting: the model is being planted already: call finish() of that Planting first")
    return own


def _check_edit(edit: Edit) -> None:
    expect("Planting(model, edit=...)", "an Edit that adds units", (edit, Edit))
    if any(stage.modules for stage in edit.stages):
        raise InputError("Planting: the edit rewrites modules: carry it out with netsurgery.rewrite first")
    for name, units in edit.keep.items():
        if any(isinstance(unit, Copy) for unit in units):
            raise InputError(
                f"Planting: the edit copies units of '{name}', whose consumers share what they read of the old ones: "
                "plant New() units, or carry it out with netsurgery.rewrite first"
            )
        if len(edit.sources(name)) < edit.network[name].size:
            raise InputError(
                f"Planting: the edit removes units of '{name}': carry it out with netsurgery.rewrite first"
            )
    if edit.dropped:
        raise InputError(f"Planting: the edit removes the block '{edit.dropped[0]}': carry it out first")
    if not edit.grown:
        raise InputError("Planting: the edit adds no units: give New() units, as PlantChannels does")
    if edit.values:
        raise InputError("Planting: the edit has new values of old weights: carry it out with netsurgery.rewrite first")


def _check_model(model: nn.Module, new: Mapping[str, Tensor], optimizers: Sequence[Optimizer]) -> None:
    """Raise InputError where old entries could not be held, or new ones would not be trained."""
    for path, key in _trained_outside(model):
        raise InputError(
            f"Planting: attribute '{key}' of module '{path}' holds tensors that are trained, which is found for "
            "parameters only: register it with register_parameter or nn.ParameterList"
        )
    for optimizer in optimizers:
        if isinstance(optimizer, _OF_WHOLE):
            raise InputError(
                f"Planting: {type(optimizer).__name__} works on matrices, or on all parameters at once, and cannot go "
                "on with new entries, which are vectors: do not pass it, and train them by another, such as AdamW"
            )
    owned = {id(one) for optimizer in optimizers for group in optimizer.param_groups for one in group["params"]}
    for path, module in named_modules(model).items():
        for key, one in module._parameters.items():
            name = f"{path}.{key}".lstrip(".")
            if one is None or name not in new:
                continue
            if getattr(module, "sparse", False):
                raise InputError(f"Planting: '{name}' has sparse gradients: set sparse=False on '{path}'")
            if optimizers and id(one) not in owned:
                raise InputError(
                    f"Planting: the optimizer does not hold '{name}', which gets new entries: pass all optimizers, or "
                    "none, and make one of model.parameters() after planting"
                )


_OF_WHOLE = tuple(getattr(torch.optim, name) for name in ("LBFGS", "Muon") if hasattr(torch.optim, name))


def _trained_outside(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Modules and their plain attributes that hold leaves of autograd."""
    for path, module in named_modules(model).items():
        for key, value in module.__dict__.items():
            if key in _INTERNAL or (isinstance(module, nn.RNNBase) and key == "_flat_weights"):
                continue
            if isinstance(value, Tensor | list | tuple | dict) and any(
                one.is_leaf and one.requires_grad for one in tensors_in(value)
            ):
                yield path or type(model).__name__, key


_INTERNAL = frozenset(nn.Module().__dict__)


def _copy_in(average: nn.Module, model: nn.Module) -> nn.Module:
    """The copy of a planted model that is inside a module."""
    names = [name for name, _ in named_tensors(model)]
    found = next((one for one in average.modules() if [name for name, _ in named_tensors(one)] == names), None)
    if found is None or found is model or not any(map(is_split, found.modules())):
        raise InputError(
            f"Planting.finish(ema={type(average).__name__}): it is no copy of the planted model; "
            "pass averages that are older to Planting(ema=...)"
        )
    return found
