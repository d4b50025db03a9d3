"""The slope of the loss by a gate on each unit, for each sample: one run and one backward pass."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, fx

from netsurgery.axes import Axis
from netsurgery.capture.inputs import tensors_in
from netsurgery.capture.source_locations import format_where
from netsurgery.errors import InputError
from netsurgery.passes.ablation import Ablation
from netsurgery.passes.functional_graph import Step
from netsurgery.passes.partial_replay import PartialReplay
from netsurgery.positions import units_at

__all__ = ["gate_slopes"]

_log = logging.getLogger("netsurgery")


def gate_slopes(ablation: Ablation) -> dict[str, Tensor]:
    """For each group the derivative of each sample's loss by a gate on each unit: ``(samples, units)`` float64.

    Decisions of the code by values are held as they are for each batch. Where the rows of a result cannot be assigned
    to samples, as with tokens that go to experts, each sample goes through alone.

    Raises:
        InputError: the network cannot be run in parts: its code writes into views.
    """
    try:
        return _in_batches(ablation, ablation.chunk())
    except _Mingled as place:
        _log.info("each sample goes through alone, which is slow: rows of the batch are mingled %s", place)
        return _in_batches(ablation, 1)


class _Mingled(Exception):
    """It is not known to which samples the rows of a result belong."""


def _in_batches(ablation: Ablation, step: int) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {group.name: [] for group in ablation.network.prunable}
    count = ablation.samples.count
    for start in range(0, count, step):
        rows = min(step, count - start)
        engine = ablation.engine(rows, 1, start, True)
        if engine is None:
            raise InputError(
                f"{ablation.network.model_name} cannot be run with gates, as {ablation.unsuited}: use "
                "LossIncreaseScore, which can cut each unit out"
            )
        for name, slopes in _slopes(ablation, engine, start, start + rows).items():
            found[name].append(slopes.double().cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def _slopes(ablation: Ablation, engine: PartialReplay, start: int, stop: int) -> dict[str, Tensor]:
    inputs, targets = ablation.batch(start, stop, 1)
    kind = next((t.dtype for t in engine.constants.values() if t.is_floating_point()), torch.float32)
    rows, device, sizes = stop - start, ablation.device, {g.name: g.size for g in ablation.network.prunable}
    gates = {n: torch.ones(rows, size, dtype=kind, device=device, requires_grad=True) for n, size in sizes.items()}
    channels = {engine.network[name].channel: gate for name, gate in gates.items()}
    values: dict[fx.Node, Tensor] = dict(zip(engine.inputs, tensors_in(inputs), strict=True))
    with torch.enable_grad():
        for step in engine.steps:
            if step.node not in engine.constants:
                args = list(engine.arguments(step.args, values))
                for place, channel in _readers(engine, step, channels):
                    gate = _broadcast(engine, step.args[place], channel, channels[channel])
                    args[place] = args[place] * gate.to(args[place].dtype)
                values[step.node] = step.call(*args, **engine.arguments(step.kwargs, values))
        outputs = [values[node] for node in engine.outputs]
        loss = ablation.loss(ablation.filled(outputs), targets).sum()
        found = torch.autograd.grad(loss, list(gates.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(gates, found, strict=True))


def _readers(engine: PartialReplay, step: Step, channels: Iterable[Axis]) -> Iterator[tuple[int, Axis]]:
    """The arguments of an operation that mixes units of a channel: the places where gates go."""
    for channel in channels:
        places = [
            place
            for place, node in enumerate(step.args)
            if isinstance(node, fx.Node) and node not in engine.constants and engine.carries(engine.dims[node], channel)
        ]
        if places and engine.mixes(step, channel):
            yield places[0], channel  # a gate on one factor of a product is a gate on the product


def _broadcast(engine: PartialReplay, node: fx.Node, channel: Axis, gate: Tensor) -> Tensor:
    """A gate ``(rows, units)`` laid out as the result of a node, with ones at other units."""
    dims = engine.dims[node]
    padded = torch.cat([gate, gate.new_ones(len(gate), 1)], 1)  # the last column is for other units
    found = ((dim, rows) for dim, axis in enumerate(dims) if (rows := _within(axis, engine.rows)) is not None)
    alone = -1, torch.zeros(1, dtype=torch.int64)
    row, rows = alone if len(gate) == 1 else next(found, alone)
    if len(gate) > 1 and row < 0:
        raise _Mingled(format_where(node.meta["where"]))
    whole = gate.new_ones(())
    for at, axis in enumerate(dims):
        for leaf, units in units_at(axis):
            if leaf is not channel:
                continue
            sizes = [one.size if dim in (row, at) else 1 for dim, one in enumerate(dims)]
            laid = padded[rows, units] if row == at else padded[rows][:, units]
            whole = whole * (laid.T if row > at else laid).reshape(sizes)
    return whole


def _within(axis: Axis, rows: set[Axis]) -> Tensor | None:
    """The row of the batch that each position of an axis belongs to; an axis may hold the batch several times."""
    found = [units for leaf, units in units_at(axis) if leaf in rows]
    return torch.stack(found).amax(0) if found else None
