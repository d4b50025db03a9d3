"""Run a recorded graph without some units: they contribute nothing, and statistics are taken over the other units.

The oracle of ``netsurgery.verification`` computes the same by other code, on purpose; neither uses the other.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from netsurgery.analysis.computed_weights import packet_of
from netsurgery.analysis.replay import Values, replay
from netsurgery.analysis.statistics import STATISTICS
from netsurgery.axes import Axis, leaves
from netsurgery.capture.inputs import Inputs, Tree
from netsurgery.capture.operations import aliased, schema_of, target_of
from netsurgery.capture.program import Program
from netsurgery.notation import Operation
from netsurgery.positions import Positions

__all__ = ["is_view", "replay_without"]

aten = torch.ops.aten


def replay_without(
    program: Program, tensors: Mapping[str, Tensor], inputs: Inputs, keep: Mapping[Axis, Sequence[int]]
) -> list[Tensor]:
    """The outputs of a recorded program, of full size, where some channels have only some of their units.

    The computation of a weight from others sees all units of some channels, so that what stays keeps its values.

    Args:
        tensors: of the model, by name.
        keep: by channel the units that stay, ascending; other channels have all of theirs.
    """
    places = {frozenset[Axis](): Positions(keep)}

    def positions(node: fx.Node) -> Positions:
        seen = frozenset(leaf for axis in node.meta.get("whole", ()) for leaf in leaves(axis) if leaf in keep)
        if seen not in places:
            places[seen] = Positions({channel: units for channel, units in keep.items() if channel not in seen})
        return places[seen]

    def after(node: fx.Node, values: Values, out: Tree) -> Tree:
        at = positions(node)
        special = STATISTICS.get(packet_of(node)) if "decided" not in node.meta else None
        if special is not None:
            op = Operation(node)
            source, fixed = op.inputs[0], packet_of(node) is aten.native_batch_norm and not op["training"]
            if not fixed and at.changes(op.dims(source)):
                given = {name: values.get(v, v) if isinstance(v, fx.Node) else v for name, v in op.arguments.items()}
                out = special(target_of(node), given, _on(values[source].device, at, op.dims(source)))
        if isinstance(out, Tensor) and out.numel() and not is_view(node) and at.changes(node.meta["dims"]):
            schema = schema_of(node)
            written = schema is not None and schema.is_mutable
            return _zeroed(out if written else out.clone(), _on(out.device, at, node.meta["dims"]))
        return out

    return replay(program, tensors, inputs, after)


def _on(device: torch.device, at: Positions, dims: tuple[Axis, ...]) -> list[Tensor | None]:
    """The positions that stay along each dimension, None for all."""
    return [None if (found := at(axis)) is None else found.to(device) for axis in dims]


def _zeroed(tensor: Tensor, kept: Sequence[Tensor | None]) -> Tensor:
    """A tensor in which all entries but those that stay are set to zero, in place."""
    for dim, where in enumerate(kept):
        if where is not None:
            gone = torch.ones(tensor.shape[dim], dtype=torch.bool, device=tensor.device).index_fill(0, where, False)
            tensor.index_fill_(dim, gone.nonzero().flatten(), 0)
    return tensor


def is_view(node: fx.Node) -> bool:
    """True if a result shares the memory of an argument, so that zeros there are zeros here; expand makes new units."""
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, fx.Node) and is_view(source)
    shared = [written for _, written in aliased(node)]
    return bool(shared) and not any(shared) and packet_of(node) is not aten.expand
