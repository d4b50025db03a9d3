"""Scores from one backward pass: how the loss changes when a gate on each unit begins to close."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from netsurgery.axes import Axis, resolve
from netsurgery.errors import InputError
from netsurgery.network import Network
from netsurgery.passes.layers import units_of
from netsurgery.passes.loss_increase import LossIncreaseScore
from netsurgery.passes.samples import draw
from netsurgery.passes.suffixes import Step, Suffixes
from netsurgery.passes.trials import Loss, Trials
from netsurgery.pipeline import Pass
from netsurgery.tracing import tensors_in

__all__ = ["FisherScore", "TaylorScore"]


@dataclass(frozen=True)
class _GateScore(Pass):
    data: Any = field(repr=False, compare=False)
    loss: Loss | None = None
    samples: int = 1000
    seed: int = 0
    rows: int | None = None

    gives: ClassVar[frozenset[str]] = frozenset({"scores"})

    def run(self, network: Network) -> Network:
        """Lay the scores on the network."""
        samples = draw(self.data, self.samples, self.seed)
        settings = LossIncreaseScore(None, self.loss, rows=self.rows)
        slopes = gate_slopes(Trials(settings, network, samples))
        return network.with_scores({name: self.score(slope) for name, slope in slopes.items()})

    def score(self, slopes: Tensor) -> Tensor:
        """Scores ``(units,)`` from the slopes ``(samples, units)``."""
        raise NotImplementedError


@dataclass(frozen=True)
class TaylorScore(_GateScore):
    """The rise of the loss on removal as a Taylor expansion predicts it, from one backward pass.

    A gate multiplies each unit wherever it is read; a_n is the derivative of the loss of sample n by it. First order:
    mean_n |a_n|. Second order: mean_n (a_n²/2 - a_n), the predicted rise itself, which may be negative.

    Args:
        data: as for ``LossIncreaseScore``.
        loss: likewise.
        samples: likewise.
        seed: likewise.
        rows: likewise.
        order: 1 or 2.

    Source: Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference", arXiv 1611.06440
    (first order), and "Importance Estimation for Neural Network Pruning", arXiv 1906.10771 (second order). The gate on
    coupled units at all their readers, and the Fisher information a_n² in the place of the second derivative, are our
    choice.

    Example:
        >>> import torch, netsurgery
        >>> from netsurgery.passes import TaylorScore
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> data = torch.randn(64, 4), torch.randint(3, (64,))
        >>> TaylorScore(data).run(netsurgery.trace(model)).scores["0"].shape
        torch.Size([8])
    """

    order: Literal[1, 2] = 1

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise InputError(f"TaylorScore(order={self.order!r}): 1 or 2")

    def score(self, slopes: Tensor) -> Tensor:
        """Scores ``(units,)`` from the slopes ``(samples, units)``."""
        return slopes.abs().mean(0) if self.order == 1 else (slopes.square() / 2 - slopes).mean(0)


@dataclass(frozen=True)
class FisherScore(_GateScore):
    """Half the Fisher information of a gate on each unit, from one backward pass: mean_n a_n²/2, as in ``TaylorScore``.

    Args:
        data: as for ``LossIncreaseScore``.
        loss: likewise.
        samples: likewise.
        seed: likewise.
        rows: likewise.

    Source: Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", arXiv 1801.05787; the gate on
    coupled units at all their readers as in Liu et al., "Group Fisher Pruning", arXiv 2108.00708.

    Example:
        >>> import torch, netsurgery
        >>> from netsurgery.passes import FisherScore
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> data = torch.randn(64, 4), torch.randint(3, (64,))
        >>> bool((FisherScore(data).run(netsurgery.trace(model)).scores["0"] >= 0).all())
        True
    """

    def score(self, slopes: Tensor) -> Tensor:
        """Scores ``(units,)`` from the slopes ``(samples, units)``."""
        return slopes.square().mean(0) / 2


def gate_slopes(trials: Trials) -> dict[str, Tensor]:
    """For each group the derivative of each sample's loss by a gate on each unit: ``(samples, units)`` float64.

    Raises:
        InputError: the network cannot be run in parts: its code decides by values.
    """
    found: dict[str, list[Tensor]] = {group.name: [] for group in trials.network.prunable}
    count, step = trials.samples.count, trials.chunk()
    for start in range(0, count, step):
        rows = min(step, count - start)
        engine = trials.engine(rows, 1)
        if engine is None:
            raise InputError(
                f"{trials.network.model_name} cannot be run with gates, as its code decides by values or writes into "
                "views: use LossIncreaseScore, which can cut each unit out"
            )
        for name, slopes in _slopes(trials, engine, start, start + rows).items():
            found[name].append(slopes.double().cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def _slopes(trials: Trials, engine: Suffixes, start: int, stop: int) -> dict[str, Tensor]:
    inputs, targets = trials.batch(start, stop, 1)
    kind = next((t.dtype for t in engine.constants.values() if t.is_floating_point()), torch.float32)
    gates = {
        name: torch.ones(stop - start, trials.network[name].size, dtype=kind, device=trials.device, requires_grad=True)
        for name in trials.everything()
    }
    channels = {engine.network[name].channel: gate for name, gate in gates.items()}
    values: dict[fx.Node, Any] = dict(zip(engine.inputs, tensors_in(inputs), strict=True))
    with torch.enable_grad():
        for step in engine.steps:
            if step.node not in engine.constants:
                args = list(engine.arguments(step.args, values))
                for place, channel in _readers(engine, step, channels):
                    args[place] = args[place] * _spread(engine, step.args[place], channel, channels[channel])
                values[step.node] = step.call(*args, **engine.arguments(step.kwargs, values))
        outputs = [values[node] for node in engine.outputs]
        loss = trials.loss(trials.filled(outputs), targets).sum()
        found = torch.autograd.grad(loss, list(gates.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(gates, found, strict=True))


def _readers(engine: Suffixes, step: Step, channels: Iterable[Axis]) -> Iterator[tuple[int, Axis]]:
    """Arguments of an operation at which units of a channel are read for the last time."""
    for channel in channels:
        places = [
            place
            for place, node in enumerate(step.args)
            if isinstance(node, fx.Node) and node not in engine.constants and engine.carries(engine.dims[node], channel)
        ]
        if places and engine.mixes(step, channel):
            yield places[0], channel  # of a product, a gate on one factor is a gate on it


def _spread(engine: Suffixes, node: fx.Node, channel: Axis, gate: Tensor) -> Tensor:
    """A gate ``(rows, units)`` laid out as the result of a node; one where there are other units."""
    dims = engine.dims[node]
    row, rows = next((dim, rows) for dim, axis in enumerate(dims) if (rows := _within(axis, engine.rows)) is not None)
    padded = torch.cat([gate, gate.new_ones(len(gate), 1)], 1)  # the last column is for other units
    whole = gate.new_ones(())
    for at, axis in enumerate(dims):
        for leaf, units in units_of(resolve(axis, {})):
            if leaf is not channel:
                continue
            sizes = [one.size if dim in (row, at) else 1 for dim, one in enumerate(dims)]
            laid = padded[rows, units] if row == at else padded[rows][:, units]
            whole = whole * (laid.T if row > at else laid).reshape(sizes)
    return whole


def _within(axis: Axis, rows: set[Axis]) -> Tensor | None:
    """Which row of the batch each position of an axis belongs to."""
    return next((units for leaf, units in units_of(resolve(axis, {})) if leaf in rows), None)
