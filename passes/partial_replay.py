"""Outputs of a network without some units, at the price of the operations that follow them.

The recorded graph is run once on a batch, and what is needed of it is kept. For a group every operation is then in one
of four states when units go:

    clean     its result is what it was
    masked    its result is what it was, but zero where the units are: nothing is computed
    shifted   it contracts over the units, and its result lacks just their contribution: that alone is computed
    changed   it is run again

Everything before the group is clean, what carries its units to the first consumer is masked, and the consumer itself is
shifted; so a removal costs one thin product and what follows. As in ``verification.silenced``, units that are gone
contribute zero, and statistics are taken over what stays. Where units of other groups are gone already, the graph is
run without these first: the results that are kept lack them, and in what is run again they contribute nothing, too.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from netsurgery.analysis.replay_without import is_view
from netsurgery.analysis.statistics import STATISTICS
from netsurgery.axes import Axis
from netsurgery.capture.inputs import Inputs, tensors_in
from netsurgery.passes.functional_graph import CONTRACTED, Dims, FunctionalGraph, Results, Step
from netsurgery.passes.removed_units import NOTHING, Removal, RemovedUnits

__all__ = ["PartialReplay", "Run", "Suffix"]

aten = torch.ops.aten
_BIASED = {aten.addmm: aten.mm.default, aten.baddbmm: aten.bmm.default}


@dataclass
class Run:
    """An operation that is run when units go.

    Attributes:
        state: "changed", it is run again, or "shifted", only the contribution of the units is computed.
        mixes: whether its result at one unit depends on others.
        zeroes: whether its result has the units, which are set to zero there.
    """

    step: Step
    state: str
    mixes: bool
    zeroes: bool


@dataclass
class Suffix:
    """The operations that are run when units of some groups go."""

    runs: list[Run]
    reads: list[fx.Node]  # results of the whole network that they need
    last: list[list[fx.Node]]  # after each step: results that nothing needs any more
    outputs: list[tuple[fx.Node, str]]
    blocks: bool  # whether several removals can go through together


@dataclass
class PartialReplay(FunctionalGraph):
    """The parts of a network that follow its groups.

    Args:
        whole_products: compute products anew, without the units, rather than what each removal takes from them: more
            arithmetic, in fewer calls, where several removals go through together.
    """

    whole_products: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.suffix = functools.cache(self._suffix)
        self._all = functools.cache(self._everything)

    def mixes_any(self, step: Step, channels: Iterable[Axis]) -> bool:
        """True if an operation mixes units of any of some channels."""
        met = [channel for channel in channels if any(self.carries(self.dims[node], channel) for node in step.inputs)]
        return any(self.mixes(step, channel) for channel in met)

    def mixes(self, step: Step, channel: Axis) -> bool:
        """True if a result of an operation at one unit depends on its arguments at others."""
        if step.packet is operator.getitem or self.is_whole(step.node, channel):
            return False
        if (along := self.normalised(step)) is not None:
            return bool(self.carries(along, channel))
        if step.packet in CONTRACTED:
            return bool(self.carries(step.names[CONTRACTED[step.packet]], channel))
        if is_view(step.node):
            return False
        most = max((self.carries(self.dims[node], channel) for node in step.inputs), default=0)
        return most > self.carries(step.dims, channel)

    def is_whole(self, node: fx.Node, channel: Axis) -> bool:
        """True if a node is a part of the computation of a weight that sees all units of a channel."""
        return any(self.carries(axis, channel) for axis in node.meta.get("whole", ()))

    def normalised(self, step: Step) -> tuple[Axis, ...] | None:
        """The dimensions over which an operation takes statistics that every entry of its result depends on."""
        if step.packet in (aten._softmax, aten._log_softmax, aten._safe_softmax):
            return (self.dims[step.inputs[0]][step.args[1]],)
        if step.packet is aten.native_layer_norm:
            return tuple(self.dims[step.inputs[0]][-len(step.args[1]) :])
        if step.packet is aten.native_group_norm:
            return tuple(self.dims[step.inputs[0]][1:])
        if step.packet is aten._weight_norm_interface:
            kept = step.args[2] if len(step.args) > 2 else 0
            return tuple(axis for dim, axis in enumerate(self.dims[step.inputs[0]]) if dim != kept)
        if step.packet is aten.native_batch_norm:
            dims = self.dims[step.inputs[0]]
            return (dims[0], *dims[2:]) if step.args[5] else ()
        return None

    def _suffix(self, names: tuple[str, ...], before: frozenset[str] = frozenset()) -> Suffix:
        """The operations to run when units of some groups go, where units of others, ``before``, are gone already."""
        channels, states = self.channels(names), self.states(names)
        missing = (*channels, *self.channels(sorted(before)))
        steps = [step for step in self.steps if states[step.node] in ("changed", "shifted")]
        runs = [self._run(step, states[step.node], missing) for step in steps]
        ran = {step.node for step in steps}
        outputs = [(node, states[node]) for node in self.outputs]
        reads = {n: None for step in steps for n in step.inputs if n not in ran}
        reads.update((run.step.node, None) for run in runs if run.state == "shifted")
        reads.update((node, None) for node, _ in outputs if node not in ran)
        kept = [node for node in reads if node not in self.constants]
        results = [*(dims for step in steps for dims in _each(step.dims)), *(self.dims[node] for node in self.outputs)]
        blocks = all(self.row(dims) is not None for step in steps for dims in _each(step.dims))
        blocks = blocks and all(self.carries(dims, row) < 2 for dims in results for row in self.rows)
        blocks = blocks and not any(self.mixes(step, row) for step in steps for row in self.rows)
        return Suffix(runs, kept, _last_uses(steps), outputs, blocks)

    def _run(self, step: Step, state: str, missing: Collection[Axis]) -> Run:
        zeroes = self.touches(step.dims, missing) and not is_view(step.node)
        return Run(step, state, self.mixes_any(step, missing), zeroes)

    def states(self, names: Iterable[str]) -> dict[fx.Node, str]:
        """The state of each operation when units of some groups go: clean, masked, shifted or changed."""
        channels = self.channels(names)
        states: dict[fx.Node, str] = {
            node: "masked" if self.touches(self.dims[node], channels) else "clean" for node in self.constants
        }
        states.update((node, "clean") for node in self.inputs)
        for step in self.steps:
            states[step.node] = self.state(step, {states[node] for node in step.inputs}, channels)
        return states

    def state(self, step: Step, inputs: set[str], channels: tuple[Axis, ...]) -> str:
        """The state of an operation when units of some channels go, given the states of its arguments."""
        if inputs & {"changed", "shifted"}:
            return "changed"
        carries = self.touches(step.dims, channels)
        if "masked" in inputs and self.mixes_any(step, channels):
            simple = step.packet in CONTRACTED and not carries and not step.kwargs
            dense = step.node not in self.constants and (step.packet is not aten.convolution or step.args[8] == 1)
            return "shifted" if simple and dense else "changed"
        return "masked" if carries else "clean"

    def whole(self, inputs: Inputs, keep: Iterable[fx.Node], before: Removal = NOTHING) -> Results:
        """Run the network on a batch, without some units, and return the results that are to be kept."""
        values: dict[fx.Node, object] = dict(zip(self.inputs, tensors_in(inputs), strict=True))
        gone = RemovedUnits.once(self, before)
        runs = self._all(tuple(sorted(before)))
        keep = {*keep, *self.outputs, *(run.step.node for run in runs if run.step.node in self.constants)}
        done = self._released
        with torch.no_grad():
            for run in runs:
                values[run.step.node] = self._changed(run, values, {}, gone)
                for node in done[run.step.node]:
                    if node not in keep:
                        values.pop(node, None)
        return {node: value for node, value in values.items() if node in keep}

    def _everything(self, names: tuple[str, ...]) -> list[Run]:
        """All operations, where units of some groups are gone; on constants only those whose results change."""
        states, missing = self.states(names), self.channels(names)
        constant = {node for node in self.constants if states[node] in ("clean", "masked")}
        return [self._run(step, "changed", missing) for step in self.steps if step.node not in constant]

    @functools.cached_property
    def _released(self) -> dict[fx.Node, list[fx.Node]]:
        return dict(zip((step.node for step in self.steps), _last_uses(self.steps), strict=True))

    def repeated(self, small: PartialReplay, whole: Results, reads: Iterable[fx.Node]) -> Results | None:
        """Results of this network on copies of samples, from the results on the samples once.

        Args:
            small: the same network, traced on the samples once.
            whole: the results of its ``whole``.

        Returns:
            What ``whole`` would return, or None where it cannot be told from that.
        """
        twins = self.twins(small)
        if twins is None:
            return None
        found = {}
        for node in dict.fromkeys([*reads, *(node for node in self.constants if twins[node] in whole)]):
            value, dims = whole[twins[node]], self.dims[node]
            if not isinstance(value, Tensor):
                return None
            row, shape = self.row(dims), tuple(axis.size for axis in dims)
            if tuple(value.shape) != shape:
                if row is None or shape[row] % value.shape[row]:
                    return None
                value = torch.cat([value] * (shape[row] // value.shape[row]), row)
            if tuple(value.shape) != shape:
                return None
            found[node] = value
        return found

    def twins(self, other: PartialReplay) -> dict[fx.Node, fx.Node] | None:
        """The nodes of the same network traced on other samples; None where it is another."""
        nodes, others = ([*one.program.graph.nodes] for one in (self, other))
        if [(n.op, n.target) for n in nodes] != [(n.op, n.target) for n in others]:
            return None
        return dict(zip(nodes, others, strict=True))

    def without(self, removals: Sequence[Removal], whole: Results, before: Removal = NOTHING) -> list[Tensor]:
        """The outputs where each of several equal parts of the batch lacks other units, all of the same groups.

        Args:
            removals: as many as the batch has equal parts; all alike unless ``suffix(groups, before).blocks``.
            whole: the results of ``whole`` on this batch, without the units of ``before``.
            before: the units of other groups that are gone.
        """
        suffix = self.suffix(tuple(removals[0]), frozenset(before))
        gone = RemovedUnits(self, [{self.network[n].channel: units for n, units in one.items()} for one in removals])
        gone = gone.beside(before)
        values: dict[fx.Node, object] = {}
        last = set(self.outputs)
        with torch.no_grad():
            for run, done in zip(suffix.runs, suffix.last, strict=True):
                if run.state == "shifted" and not (self.whole_products and len(gone.units) > 1):
                    values[run.step.node] = self._shifted(run, whole, gone)
                else:
                    values[run.step.node] = self._changed(run, values, whole, gone)
                for node in done:
                    if node not in last:
                        values.pop(node, None)
            found = []
            for node, state in suffix.outputs:
                value = self.arguments(node, values, whole)
                found.append(gone.zeroed(value.clone(), self.dims[node]) if state == "masked" else value)
        return found

    def _changed(self, run: Run, values: Results, whole: Results, gone: RemovedUnits) -> object:
        step, gone = run.step, gone.seen_by(run.step.node)
        args = list(self.arguments(step.args, values, whole))
        if run.mixes:
            special = STATISTICS.get(step.packet)
            if special is not None:
                return gone.statistics(step, special, args)
            for place, (node, value) in enumerate(zip(step.args, args, strict=True)):
                if isinstance(node, fx.Node) and node not in values and not self._suffices(step, place):
                    missing = gone.going if node in whole else gone  # what was gone before is missing there already
                    if self.touches(self.dims[node], missing.channels):
                        args[place] = missing.zeroed(value.clone(), self.dims[node])
        out = step.call(*args, **(self.arguments(step.kwargs, values, whole) if step.kwargs else {}))
        if run.zeroes and isinstance(out, Tensor):
            out = gone.zeroed(out.clone() if step.packet is aten.expand else out, step.dims)
        return out

    def _suffices(self, step: Step, place: int) -> bool:
        """True if an argument may keep units that are gone: it is enough that one factor of a product lacks them."""
        weight = step.packet in CONTRACTED and step.args[place] in self.constants
        return weight and any(other not in self.constants for other in step.inputs)

    def _shifted(self, run: Run, whole: Results, gone: RemovedUnits) -> Tensor:
        """The result in the whole network without the contribution of the units."""
        step, gone = run.step, gone.seen_by(run.step.node)
        axis = step.names[CONTRACTED[step.packet]]
        if step.packet is aten.convolution:
            operands, places = step.args[:2], (1, 0 if step.args[6] else 1)
            call: Callable[..., Tensor] = functools.partial(_convolved, step.call, step.args[3:])
        else:
            operands, places = step.args[-2:], (-1, -2)
            call = self.product(_BIASED[step.packet]) if step.packet in _BIASED else step.call
        factors = [self.arguments(node, whole) for node in operands]
        base: Tensor = whole[step.node]
        parts = []
        for index in range(len(gone.units)):
            where = gone.going.positions(axis, index)
            thin = [
                _taken(
                    factor if node in self.constants else gone.block(factor, self.row(self.dims[node]), index),
                    place,
                    where,
                )
                for node, factor, place in zip(operands, factors, places, strict=True)
            ]
            part = call(*thin)
            parts.append(torch.sub(gone.block(base, self.row(step.dims), index), part, out=part))
        out = parts[0] if len(parts) == 1 else torch.cat(parts, self.row(step.dims) or 0)
        return gone.zeroed(out, step.dims) if run.zeroes else out


def _each(dims: Dims) -> list[tuple[Axis, ...]]:
    """The dimensions of each result of an operation that has some."""
    results = [dims] if isinstance(dims, tuple) else dims
    return [one for one in results if one is not None and all(axis.size for axis in one)]


def _last_uses(steps: Sequence[Step]) -> list[list[fx.Node]]:
    """After each step: the nodes whose results no later step reads."""
    last: dict[fx.Node, int] = {}
    for index, step in enumerate(steps):
        last.update(dict.fromkeys((step.node, *step.inputs), index))
    found: list[list[fx.Node]] = [[] for _ in steps]
    for node, index in last.items():
        found[index].append(node)
    return found


def _convolved(call: Callable[..., Tensor], settings: tuple[object, ...], x: Tensor, weight: Tensor) -> Tensor:
    return call(x, weight, None, *settings)


def _taken(tensor: Tensor, dim: int, positions: Tensor) -> Tensor:
    if len(positions) == 1:
        return tensor.narrow(dim, int(positions[0]), 1)
    return tensor.index_select(dim, positions.to(tensor.device))
