"""New units that learn fastest: of several draws those whose readers get the largest gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from netsurgery.arguments import require_counts
from netsurgery.axes import Axis
from netsurgery.capture.meta_run import home
from netsurgery.edit import Edit
from netsurgery.errors import InputError
from netsurgery.fidelity import Measured
from netsurgery.passes.calibration import in_eval_mode, outputs_of
from netsurgery.passes.losses import Loss, check_targets, loss_of
from netsurgery.passes.reporting import DataPass
from netsurgery.positions import multiplied
from netsurgery.rewriting.surgery import rewrite
from netsurgery.units import New, Planned

__all__ = ["GradMax"]


@dataclass(frozen=True)
class GradMax(DataPass):
    """Begin new units where the weights that read them get the largest gradients: they learn at once.

    It stands behind ``PlantChannels`` and draws each new unit several times, by other seeds. All of them are planted in
    a copy, read by zeros, and the loss of samples is derived by the weights that read them: units whose gradients have
    the largest norm are kept. Outputs stay as they are, and so does the number of units.

    Args:
        data: samples with labels, as for ``TaylorScore``.
        candidates: draws for each unit.
        loss: of outputs and targets; None for the cross-entropy.
        samples: how many are drawn.
        seed: fixes the samples.
        rows: samples that go through at once.

    Source: GradMax of Evci et al., arXiv 2201.05125, which maximises the same norm. They keep what makes a unit at zero
    and solve for what reads it; below a norm or a ReLU, whose derivative at 0 is 0 here, such units would never learn.
    Here readers are at zero, and what makes a unit is chosen among random draws (their experiments call this choice
    by random search); that works for every layer and activation, and an Edit says it by seeds.

    Raises:
        InputError: a number out of range, an edit without new units, data without labels, or gradients that are not
            finite.

    Example:
        >>> import torch, netsurgery
        >>> from netsurgery.passes import GradMax, PlantChannels
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> data = torch.randn(64, 4), torch.randint(3, (64,))
        >>> netsurgery.plan(model, [PlantChannels(2), GradMax(data)]).keep["0"][8:]  # doctest: +ELLIPSIS
        (New('he', seed=...), New('he', seed=...))
    """

    data: object = field(repr=False, compare=False)
    candidates: int = 8
    loss: Loss | None = field(default=None, repr=False)
    samples: int = 256
    seed: int = 0
    rows: int = 64

    needs: ClassVar[frozenset[str]] = frozenset({"edit"})
    gives: ClassVar[frozenset[str]] = frozenset({"edit"})
    advice: ClassVar[str] = "PlantChannels(8)"
    labelled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "candidates")
        if self.data is None:
            raise InputError("GradMax(data=None): pass the samples, with labels, that gradients are taken on")

    def measure(self, model: nn.Module, edit: Edit) -> Measured | None:
        """Nothing: outputs are the same."""
        return None

    def run(self, network: Edit) -> Edit:
        """The edit with other seeds of its new units."""
        edit = network
        planted = [name for name in edit.grown if any(isinstance(unit, New) for unit in edit.keep[name])]
        if not planted:
            raise InputError(
                "GradMax chooses among new units, and the edit before it adds none: put PlantChannels there"
            )
        edit.network.require_weights(self)
        keep = {name: self._drawn_often(units) if name in planted else units for name, units in edit.keep.items()}
        pool = replace(edit, keep=keep, adaptation=None)
        norms = self._norms(pool, planted)
        chosen = {name: _best(edit.keep[name], keep[name], norms[name]) for name in planted}
        return replace(edit, keep={**edit.keep, **chosen})

    def _drawn_often(self, units: Sequence[Planned]) -> tuple[Planned, ...]:
        """The same units, with several draws of those that are new; each has a seed of its own."""
        new = [unit for unit in units if isinstance(unit, New)]
        first = min(unit.seed for unit in new)
        draws = [replace(new[0], seed=first + index) for index in range(self.candidates * len(new))]
        return (*(unit for unit in units if not isinstance(unit, New)), *draws)

    def _norms(self, pool: Edit, planted: Sequence[str]) -> dict[str, Tensor]:
        """By planted group the squared norms of the gradients of what reads each unit: ``(units,)``."""
        model = rewrite(pool.network.model, pool)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        readers = {name: list(_readers(pool, pool.network[name].channel)) for name in planted}
        names = list(dict.fromkeys(name for places in readers.values() for name, _ in places))
        _forget_each_other(pool, parameters)
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in names)
            parameter.grad = None
        with in_eval_mode(model):
            for weight, loss in self._losses(model):
                (loss * weight).backward()
        squares = {name: _square(parameters[name]) for name in names}
        norms = {}
        for name, places in readers.items():
            channel = pool.network[name].channel
            norms[name] = torch.stack([_by_unit(squares[p], pool, p, dim, channel) for p, dim in places]).sum(0)
            if not bool(norms[name].isfinite().all()):
                raise InputError(f"GradMax: gradients at group '{name}' are not finite: look for NaN in the data")
        return norms

    def _losses(self, model: nn.Module) -> Iterator[tuple[float, Tensor]]:
        """The loss of each batch of samples, and its part of the mean."""
        drawn, device = self.drawn(), home(model)
        for index, (inputs, targets) in enumerate(drawn.batches(self.rows, device)):
            count = min(self.rows, drawn.count - index * self.rows)
            with torch.enable_grad():
                outputs = outputs_of(model, inputs, device)
                if self.loss is None:
                    check_targets(outputs, targets, drawn.targets)
                yield count / drawn.count, loss_of(outputs, targets, self.loss).mean()


def _best(units: Sequence[Planned], pool: Sequence[Planned], norms: Tensor) -> tuple[Planned, ...]:
    """The units with the best draws in the places of the new ones, best first."""
    draws = [index for index, unit in enumerate(pool) if isinstance(unit, New)]
    order = norms[draws].argsort(descending=True, stable=True).tolist()
    best = iter([pool[draws[index]] for index in order])
    return tuple(next(best) if isinstance(unit, New) else unit for unit in units)


def _readers(edit: Edit, channel: Axis) -> Iterator[tuple[str, int]]:
    """The places where parameters read a channel's units, or hide new ones from products."""
    yield from ((name, dim) for name, dim, leaf in sorted(edit.readers, key=lambda one: one[:2]) if leaf is channel)
    yield from (place for place, found in edit.hidden.items() if any(leaf is channel for leaf, _ in found))


def _forget_each_other(edit: Edit, parameters: dict[str, nn.Parameter]) -> None:
    """Let what makes new units read old units alone: else draws are judged by those of other groups."""
    for name, axes in edit.network.axes.items():
        new = [edit.positions.new(axis) for axis in axes]
        places = [(dim, one.nonzero().flatten()) for dim, one in enumerate(new) if one is not None]
        if name in parameters and len(places) > 1:
            (one, mine), (other, theirs) = places[:2]
            with torch.no_grad():
                parameters[name].movedim((one, other), (0, 1))[mine[:, None], theirs] = 0


def _square(parameter: nn.Parameter) -> Tensor:
    grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.to_dense()
    return grad.detach().abs().double().square().cpu()


def _by_unit(squares: Tensor, edit: Edit, name: str, dim: int, channel: Axis) -> Tensor:
    """The sum of squares at each unit of a channel that a dimension of a parameter reads: ``(units,)``."""
    counts = edit.network.sizes(edit.counts)

    def held(leaf: Axis) -> Tensor:
        size = counts(leaf)
        return torch.eye(size, dtype=torch.bool) if leaf is channel else torch.ones(1, size, dtype=torch.bool)

    along = squares.movedim(dim, 0).flatten(1).sum(1)
    return multiplied(edit.network.axes[name][dim], held).double() @ along
