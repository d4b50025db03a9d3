"""Outputs of a network without some units, at the price of what comes after them.

The recorded graph is run once on a batch, and what is needed of it is kept. For a group every operation is then one of
four things when units go:

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
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from netsurgery.analysis.computed_weights import ancestors, worked_across, writers
from netsurgery.analysis.network import Network
from netsurgery.analysis.replay import draws
from netsurgery.axes import Axis, find, leaves
from netsurgery.capture.known_values import any_layout, replay_decision
from netsurgery.capture.randomness import torch_seeded
from netsurgery.capture.recorder import Inputs, home, tensors_in
from netsurgery.passes.statistics import STATISTICS
from netsurgery.positions import masked

__all__ = ["PartialReplay", "Removal", "Unsuited"]

aten = torch.ops.aten
NOTHING: Removal = MappingProxyType({})
Removal = Mapping[str, tuple[int, ...]]  # the units that go, by group
Dims = Any  # of a node: a tuple of axes, or one for each result

_PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm}
_CONTRACTED = {**dict.fromkeys(_PRODUCTS, "k"), aten.convolution: "i"}
_BIASED = {aten.addmm: aten.mm.default, aten.baddbmm: aten.bmm.default}


class Unsuited(Exception):
    """The recorded graph cannot be run in parts; the message says why."""


@dataclass
class Step:
    """One operation, or the constant result of some: what to call, and the nodes whose results it takes."""

    node: fx.Node
    call: Callable[..., Any]
    packet: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dims: Dims
    inputs: tuple[fx.Node, ...] = ()

    def __post_init__(self) -> None:
        found: dict[fx.Node, None] = {}
        fx.node.map_arg((self.args, self.kwargs), lambda node: found.setdefault(node))
        self.inputs = tuple(found)


@dataclass
class Run:
    """An operation that is run when units go: how, whether it mixes them, and whether its result has such."""

    step: Step
    state: str  # "changed" or "shifted"
    mixes: bool
    zeroes: bool


@dataclass
class Suffix:
    """What is run when units of some groups go."""

    runs: list[Run]
    reads: list[fx.Node]  # results of the whole network that they need
    last: list[list[fx.Node]]  # after each step: results that nothing needs any more
    outputs: list[tuple[fx.Node, str]]
    blocks: bool  # whether several removals can go through together


@dataclass
class PartialReplay:
    """The parts of a network that follow its groups.

    Args:
        network: traced on as many rows as are to go through at once.
        tensors: the tensors of the model, by name.
        autocast: the type in which convolutions and matrix products are computed.
        decisions: whether what the code decided by values in the recorded run may be taken as it was; else a network
            whose code looks at numbers that depend on its weights is unsuited.
        whole_products: compute products anew, without the units, rather than what each removal takes from them: more
            arithmetic, in fewer calls, where several removals go through together.
        seed: of random numbers: an operation draws the same in every run.

    Raises:
        Unsuited: the graph decides by values, or writes into what is read elsewhere.
    """

    network: Network
    tensors: Mapping[str, Tensor]
    autocast: torch.dtype | None = None
    decisions: bool = False
    whole_products: bool = False
    seed: int = 0
    steps: list[Step] = field(init=False)
    constants: dict[fx.Node, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.program = self.network.programs[0]
        if self.program.values == "all" and not self.decisions:
            raise Unsuited("its code decides by values")
        self.dims: dict[fx.Node, Dims] = {n: n.meta.get("dims") for n in self.program.graph.nodes}
        self.inputs = [node for node in self.program.graph.nodes if node.op == "placeholder"]
        *_, output = self.program.graph.nodes
        self.outputs: list[fx.Node] = list(output.args[0])
        self.rows = {find(node.meta["dims"][0]) for node in self.inputs if node.meta["dims"]}
        self.occurrences: dict[Axis, dict[Axis, int]] = {}
        with torch.no_grad():
            _Builder(self, home(self.network.model)).build()
        self.suffix = functools.cache(self._suffix)
        self._all = functools.cache(self._everything)

    def product(self, target: Callable[..., Any]) -> Callable[..., Any]:
        """A convolution or matrix product, computed in the type that was asked for."""
        return target if self.autocast is None else functools.partial(_lowered, target, self.autocast)

    def carries(self, dims: Dims, channel: Axis) -> int:
        """How often a channel occurs in the dimensions of a result (of several: in all of them)."""
        if isinstance(dims, Axis):
            if dims not in self.occurrences:
                counts = self.occurrences[dims] = {}
                for leaf in leaves(dims):
                    counts[leaf] = counts.get(leaf, 0) + 1
            return self.occurrences[dims].get(channel, 0)
        return sum(self.carries(one, channel) for one in dims or () if one is not None)

    def touches(self, dims: Dims, channels: Iterable[Axis]) -> bool:
        """Whether any of some channels occurs in the dimensions of a result."""
        return any(self.carries(dims, channel) for channel in channels)

    def channels(self, names: Iterable[str]) -> tuple[Axis, ...]:
        """The channels of some groups."""
        return tuple(self.network[name].channel for name in names)

    def mixes_any(self, step: Step, channels: Iterable[Axis]) -> bool:
        """Whether an operation mixes units of any of some channels."""
        met = [channel for channel in channels if any(self.carries(self.dims[node], channel) for node in step.inputs)]
        return any(self.mixes(step, channel) for channel in met)

    def mixes(self, step: Step, channel: Axis) -> bool:
        """Whether a result of an operation at one unit depends on its arguments at others."""
        if step.packet is operator.getitem or self.is_whole(step.node, channel):
            return False
        if (along := self.normalised(step)) is not None:
            return bool(self.carries(along, channel))
        if step.packet in _CONTRACTED:
            names = step.node.meta["names"]
            return bool(self.carries(names[_CONTRACTED[step.packet]], channel))
        if is_view(step.node):
            return False
        most = max((self.carries(self.dims[node], channel) for node in step.inputs), default=0)
        return most > self.carries(step.dims, channel)

    def is_whole(self, node: fx.Node, channel: Axis) -> bool:
        """Whether a node is a part of the computation of a weight that sees all units of a channel."""
        return any(self.carries(axis, channel) for axis in node.meta.get("whole", ()))

    def normalised(self, step: Step) -> tuple[Axis, ...] | None:
        """The dimensions over which statistics are taken that every entry of the result depends on."""
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
        """What is run when units of some groups go, where units of others, ``before``, are gone already."""
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
        """What each operation is when units of some groups go."""
        channels = self.channels(names)
        states: dict[fx.Node, str] = {
            node: "masked" if self.touches(self.dims[node], channels) else "clean" for node in self.constants
        }
        states.update((node, "clean") for node in self.inputs)
        for step in self.steps:
            states[step.node] = self.state(step, {states[node] for node in step.inputs}, channels)
        return states

    def state(self, step: Step, inputs: set[str], channels: tuple[Axis, ...]) -> str:
        """What an operation is when units of some channels go, given what its arguments are."""
        if inputs & {"changed", "shifted"}:
            return "changed"
        carries = self.touches(step.dims, channels)
        if "masked" in inputs and self.mixes_any(step, channels):
            simple = step.packet in _CONTRACTED and not carries and not step.kwargs
            dense = step.node not in self.constants and (step.packet is not aten.convolution or step.args[8] == 1)
            return "shifted" if simple and dense else "changed"
        return "masked" if carries else "clean"

    def row(self, dims: tuple[Axis, ...]) -> int | None:
        """The dimension of a result in which the rows of the batch are outermost."""
        for dim, axis in enumerate(dims):
            axis = find(axis)
            if (find(axis.terms[0]) if axis.op == "product" else axis) in self.rows:
                return dim
        return None

    def whole(self, inputs: Inputs, keep: Iterable[fx.Node], before: Removal = NOTHING) -> dict[fx.Node, Any]:
        """Run the network on a batch, without some units, and return the results that are to be kept."""
        values: dict[fx.Node, Any] = dict(zip(self.inputs, tensors_in(inputs), strict=True))
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
        """All operations, where units of some groups are gone; of constant results those that are others then."""
        states, missing = self.states(names), self.channels(names)
        constant = {node for node in self.constants if states[node] in ("clean", "masked")}
        return [self._run(step, "changed", missing) for step in self.steps if step.node not in constant]

    @functools.cached_property
    def _released(self) -> dict[fx.Node, list[fx.Node]]:
        return dict(zip((step.node for step in self.steps), _last_uses(self.steps), strict=True))

    def arguments(self, args: Any, *values: Mapping[fx.Node, Any]) -> Any:
        """Arguments with each node replaced by its value."""

        def look(node: fx.Node) -> Any:
            for known in (*values, self.constants):
                if node in known:
                    return known[node]
            raise KeyError(node)

        return fx.node.map_arg(args, look)

    def repeated(
        self, small: PartialReplay, whole: Mapping[fx.Node, Any], reads: Iterable[fx.Node]
    ) -> dict[fx.Node, Any] | None:
        """Results of this network on samples that come several times over, from those on the samples once.

        Args:
            small: the same network, traced on the samples once.
            whole: what its ``whole`` returned.

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

    def without(
        self, removals: Sequence[Removal], whole: Mapping[fx.Node, Any], before: Removal = NOTHING
    ) -> list[Tensor]:
        """The outputs where each of several equal parts of the batch lacks other units, all of the same groups.

        Args:
            removals: as many as the batch has equal parts; all alike unless ``suffix(groups, before).blocks``.
            whole: what ``whole`` returned on this batch, without the units of ``before``.
            before: the units of other groups that are gone.
        """
        suffix = self.suffix(tuple(removals[0]), frozenset(before))
        gone = RemovedUnits(self, [{self.network[n].channel: units for n, units in one.items()} for one in removals])
        gone = gone.beside(before)
        values: dict[fx.Node, Any] = {}
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

    def _changed(
        self, run: Run, values: Mapping[fx.Node, Any], whole: Mapping[fx.Node, Any], gone: RemovedUnits
    ) -> Any:
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
        """Whether an argument may keep units that are gone: of a product, one factor without these is enough."""
        weight = step.packet in _CONTRACTED and step.args[place] in self.constants
        return weight and any(other not in self.constants for other in step.inputs)

    def _shifted(self, run: Run, whole: Mapping[fx.Node, Any], gone: RemovedUnits) -> Tensor:
        """The result of the whole network less what the units contribute."""
        step, gone = run.step, gone.seen_by(run.step.node)
        axis = step.node.meta["names"][_CONTRACTED[step.packet]]
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


@dataclass
class RemovedUnits:
    """Units that are gone, by channel, in each of several equal parts of a batch.

    Attributes:
        going: those that go now; others were gone before.
    """

    suffixes: PartialReplay
    units: list[dict[Axis, tuple[int, ...]]]
    memo: dict[Axis, Tensor] = field(default_factory=dict)
    places: dict[tuple[Axis, torch.device], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if all(units == self.units[0] for units in self.units):
            self.units = self.units[:1]
        self.going = self
        self.channels = tuple(self.units[0])

    @classmethod
    def once(cls, suffixes: PartialReplay, removal: Removal) -> RemovedUnits:
        """Units that are gone in all of a batch."""
        return cls(suffixes, [{suffixes.network[name].channel: units for name, units in removal.items()}])

    def beside(self, before: Removal) -> RemovedUnits:
        """These units, and some that were gone before."""
        if not before:
            return self
        (earlier,) = RemovedUnits.once(self.suffixes, before).units
        both = RemovedUnits(self.suffixes, [{**units, **earlier} for units in self.units])
        both.going = self
        return both

    def seen_by(self, node: fx.Node) -> RemovedUnits:
        """The units that a node lacks: the computation of a weight sees all units of some channels."""
        seen = {leaf for axis in node.meta.get("whole", ()) for leaf in leaves(axis)}
        if not seen & {*self.channels}:
            return self
        left = RemovedUnits(self.suffixes, [{c: u for c, u in units.items() if c not in seen} for units in self.units])
        left.going = left if self.going is self else self.going.seen_by(node)
        return left

    def stays(self, axis: Axis) -> Tensor:
        """Which positions along an axis stay in each block: ``(blocks, size)``, ``(1, size)`` if in all the same."""
        axis = find(axis)
        if axis not in self.memo:
            self.memo[axis] = masked(axis, self._stays)
        return self.memo[axis]

    def _stays(self, channel: Axis) -> Tensor:
        if channel not in self.channels:
            return torch.ones(1, channel.size, dtype=torch.bool)
        left = torch.ones(len(self.units), channel.size, dtype=torch.bool)
        sizes = torch.tensor([len(units[channel]) for units in self.units])
        blocks = torch.arange(len(sizes)).repeat_interleave(sizes)
        left[blocks, torch.tensor([u for units in self.units for u in units[channel]], dtype=torch.int64)] = False
        return left

    def stay(self, axis: Axis, index: int) -> Tensor:
        """Which positions along an axis stay in one block."""
        stays = self.stays(axis)
        return stays[index if len(stays) > 1 else 0]

    def positions(self, axis: Axis, index: int) -> Tensor:
        """The positions along an axis that go in one block."""
        blocks, positions = self.pairs(axis, torch.device("cpu"))
        return positions if len(self.units) == 1 else positions[blocks == index]

    def pairs(self, axis: Axis, device: torch.device) -> tuple[Tensor, Tensor]:
        """Blocks, and the positions along an axis that go in them."""
        key = find(axis), device
        if key not in self.places:
            stays = self.stays(axis).expand(len(self.units), -1)
            self.places[key] = (~stays).nonzero().T.contiguous().to(device)
        blocks, positions = self.places[key]
        return blocks, positions

    def block(self, tensor: Tensor, row: int | None, index: int) -> Tensor:
        """The part of a batch that lacks the units of one removal."""
        if len(self.units) == 1:
            return tensor
        assert row is not None
        size = tensor.shape[row] // len(self.units)
        return tensor.narrow(row, index * size, size)

    def zeroed(self, tensor: Tensor, dims: tuple[Axis, ...]) -> Tensor:
        """A tensor whose entries at the units are set to zero in place."""
        row = self.suffixes.row(dims)
        for dim, axis in enumerate(dims):
            if self.suffixes.touches(axis, self.channels):
                if len(self.units) == 1:
                    _fill(tensor, dim, self.positions(axis, 0))
                elif dim == row:
                    tensor.index_fill_(dim, self.in_blocks(axis).to(tensor.device), 0)
                else:
                    self.zero_apart(tensor, row, dim, axis)
        return tensor

    def zero_apart(self, tensor: Tensor, row: int | None, dim: int, axis: Axis) -> None:
        """Set the entries along a dimension to zero that each block of the batch lacks."""
        assert row is not None
        places: list[Tensor | None] = [None] * (tensor.dim() + 1)
        places[row], places[dim + (dim > row)] = self.pairs(axis, tensor.device)
        blocks = tensor.unflatten(row, (len(self.units), -1))
        aten.index_put_(blocks, places, tensor.new_zeros(()))

    def in_blocks(self, axis: Axis) -> Tensor:
        """Positions along an axis that holds the batch, too: of each block those that go in it."""
        size, found = axis.size // len(self.units), []
        for index in range(len(self.units)):
            positions = self.positions(axis, index)
            found.append(positions[positions // size == index])
        return torch.cat(found)

    def statistics(self, step: Step, special: Callable[..., Any], args: Sequence[Any]) -> Any:
        """The result of an operation that takes statistics, over what stays."""
        target: Any = step.node.target
        names = [argument.name for argument in target._schema.arguments]
        first = step.inputs[0]
        dims, row, rows = self.suffixes.dims[first], self.suffixes.row(self.suffixes.dims[first]), []
        for index in range(len(self.units)):
            masks = [self.stay(axis, index) for axis in dims]
            if len(self.units) > 1 and row is not None:
                size = dims[row].size // len(self.units)
                masks[row] = masks[row][index * size : (index + 1) * size]
            kept = [None if bool(one.all()) else one.nonzero().flatten().to(args[0].device) for one in masks]
            given = {**dict(zip(names, args, strict=False)), **step.kwargs, names[0]: self.block(args[0], row, index)}
            rows.append(special(target, given, kept))
        if len(rows) == 1:
            return rows[0]
        return torch.cat(rows, row or 0) if isinstance(rows[0], Tensor) else _joined(rows, row or 0)


def _fill(tensor: Tensor, dim: int, positions: Tensor) -> None:
    """Set the entries at some positions to zero."""
    if len(positions) == 1:
        tensor.select(dim, int(positions[0])).zero_()
    else:
        tensor.index_fill_(dim, positions.to(tensor.device), 0)


def _joined(rows: Sequence[Sequence[Tensor | None]], dim: int) -> list[Tensor | None]:
    return [None if column[0] is None else torch.cat(column, dim) for column in zip(*rows, strict=True)]


def _each(dims: Dims) -> list[tuple[Axis, ...]]:
    """The dimensions of each result of an operation that has some."""
    results = [dims] if isinstance(dims, tuple) else dims
    return [one for one in results if one is not None and all(axis.size for axis in one)]


def _convolved(call: Callable[..., Tensor], settings: tuple[Any, ...], x: Tensor, weight: Tensor) -> Tensor:
    return call(x, weight, None, *settings)


def _taken(tensor: Tensor, dim: int, positions: Tensor) -> Tensor:
    if len(positions) == 1:
        return tensor.narrow(dim, int(positions[0]), 1)
    return tensor.index_select(dim, positions.to(tensor.device))


def _last_uses(steps: Sequence[Step]) -> list[list[fx.Node]]:
    """After each step: the nodes whose results no later step reads."""
    last: dict[fx.Node, int] = {}
    for index, step in enumerate(steps):
        last.update(dict.fromkeys((step.node, *step.inputs), index))
    found: list[list[fx.Node]] = [[] for _ in steps]
    for node, index in last.items():
        found[index].append(node)
    return found


class _Builder:
    """Turns a recorded graph into steps that overwrite nothing; constants and batch norms are folded."""

    def __init__(self, suffixes: PartialReplay, device: torch.device):
        self.of, self.device = suffixes, device
        self.order = {node: index for index, node in enumerate(suffixes.program.graph.nodes)}
        self.several: dict[fx.Node, Sequence[Tensor]] = {}  # results of operations on constants that return several

    def build(self) -> None:
        """Fill in the steps and constants."""
        of = self.of
        of.steps, of.constants = [], {}
        for node in of.program.graph.nodes:
            if node.op == "get_attr":
                source = of.tensors[node.target] if node.target in of.tensors else of.program.constants[node.target]
                if source.is_meta:
                    raise Unsuited(f"the values of '{node.target}' are not known")
                value = source.detach().to(self.device)
                of.constants[node] = value.clone() if writers(node) else value
            elif node.op == "call_function":
                self.add(node)
        self.prune()
        self.lay_out()

    def add(self, node: fx.Node) -> None:
        of = self.of
        if self.writes_constants(node):
            of.constants[node] = node.target(*of.arguments(node.args), **of.arguments(node.kwargs))  # type: ignore[operator]
            return
        if node.target is operator.getitem:
            step = Step(node, operator.getitem, operator.getitem, node.args, {}, node.meta["dims"])
        else:
            step = self.operation(node)
        if step.inputs and all(n in of.constants for n in step.inputs) and step.packet is not operator.getitem:
            made = step.call(*of.arguments(step.args), **of.arguments(step.kwargs))
            if isinstance(made, Tensor):
                of.constants[node] = made  # and a step, for where it lacks units
            else:
                self.several[node] = made
        if step.packet is operator.getitem and step.args[0] in self.several:
            of.constants[node] = self.several[step.args[0]][step.args[1]]
        if not (step.packet is operator.getitem and self.fold(step)):
            of.steps.append(step)

    def operation(self, node: fx.Node) -> Step:
        target: Any = node.target
        call, packet = any_layout(target), target.overloadpacket
        if any(a.alias_info is not None and a.alias_info.is_write for a in target._schema.arguments):
            call, packet = self.functional(node)
        if packet in _CONTRACTED:
            call = self.of.product(target)
        kwargs = {k: self.device if isinstance(v, torch.device) else v for k, v in node.kwargs.items()}
        if draws(node):
            if "generator" in kwargs:
                kwargs["generator"] = None  # the default one, which is seeded
            call = functools.partial(self.drawn, call, self.order[node])
        if "decided" in node.meta:
            call = functools.partial(_decided, target, node.meta["decided"])
        return Step(node, call, packet, node.args, kwargs, node.meta["dims"])

    def writes_constants(self, node: fx.Node) -> bool:
        """Whether an operation overwrites a constant with others, unit by unit: so it is done, once."""
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable or not all(n in self.of.constants for n in node.all_input_nodes):
            return False
        if "decided" in node.meta or draws(node):
            return False
        return all(
            leaf in one.meta.get("whole", ())
            for one in ancestors(node)
            if one.op == "call_function"
            for leaf in worked_across(one)
        )

    def drawn(self, call: Callable[..., Any], place: int, *args: Any, **kwargs: Any) -> Any:
        """The result of an operation that draws random numbers: those of its place and the seed."""
        with torch_seeded(self.of.seed + 7919 * place, self.device):
            return call(*args, **kwargs)

    def functional(self, node: fx.Node) -> tuple[Callable[..., Any], Any]:
        """What returns what an operation in place writes, where nothing else shows what was written; and its packet."""
        target: Any = node.target
        written: Any = node.args[0]
        packet = getattr(aten, target.overloadpacket.__name__.removesuffix("_"), None)
        own = isinstance(written, fx.Node) and written.op == "call_function" and not is_view(written)
        if not own or any(is_view(n) or self.order[n] > self.order[node] for n in written.users):
            raise Unsuited(f"{target} writes into what is read elsewhere")
        overload = getattr(packet, target._overloadname, None)
        if overload is None:
            return functools.partial(_on_a_copy, target), target.overloadpacket
        return overload, packet

    def fold(self, step: Step) -> bool:
        """Make a convolution and the batch norm in eval mode that alone reads it one convolution."""
        of = self.of
        norm = next((s for s in reversed(of.steps) if s.node is step.args[0]), None)
        if norm is None or norm.packet is not aten.native_batch_norm or norm.args[5] or step.args[1] != 0:
            return False
        conv = next((s for s in reversed(of.steps) if s.node is norm.args[0]), None)
        if conv is None or conv.packet is not aten.convolution or conv.args[6] or len(conv.node.users) > 1:
            return False
        kernel, bias = conv.args[1:3]
        numbers = [kernel, *norm.args[1:5], *([] if bias is None else [bias])]
        if any(isinstance(n, fx.Node) and n.op != "get_attr" for n in numbers) or norm.args[3] is None:
            return False
        weight, gamma, beta, mean, var = (None if n is None else of.constants[n].double() for n in numbers[:5])
        assert weight is not None and mean is not None and var is not None
        scale = torch.rsqrt(var + norm.args[7]) * (1 if gamma is None else gamma)
        shift = (0 if beta is None else beta) + ((0 if bias is None else of.constants[bias].double()) - mean) * scale
        dtype = of.constants[kernel].dtype
        of.constants[conv.node] = (weight * scale.reshape(-1, *[1] * (weight.dim() - 1))).to(dtype)
        of.constants[norm.node] = shift.to(dtype)
        of.dims[conv.node], of.dims[norm.node] = of.dims[kernel], (of.dims[kernel][0],)
        of.steps.remove(norm)
        of.steps.remove(conv)
        args = (conv.args[0], conv.node, norm.node, *conv.args[3:])
        folded = Step(step.node, conv.call, conv.packet, args, {}, step.dims)
        folded.node.meta["names"] = conv.node.meta["names"]
        of.steps.append(folded)
        return True

    def prune(self) -> None:
        """Forget steps whose results nothing needs."""
        of, needed = self.of, set(self.of.outputs)
        kept = []
        for step in reversed(of.steps):
            if step.node in needed:
                needed.update(step.inputs)
                kept.append(step)
        of.steps = kept[::-1]
        of.constants = {node: value for node, value in of.constants.items() if node in needed}

    def lay_out(self) -> None:
        """Let kernels of two dimensions lie with their channels last, and by them all results: a CPU is faster so."""
        for step in self.of.steps:
            weight = self.of.constants.get(step.args[1]) if step.packet is aten.convolution else None
            if weight is not None and weight.dim() == 4 and weight.dtype is torch.float32 and self.device.type == "cpu":
                self.of.constants[step.args[1]] = weight.contiguous(memory_format=torch.channels_last)


def is_view(node: fx.Node) -> bool:
    """Whether a result is memory of an argument: what is zero there is zero here, but for units that expand makes."""
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, fx.Node) and is_view(source)
    schema = getattr(node.target, "_schema", None)
    shared = [one.alias_info for one in schema.arguments if one.alias_info is not None] if schema is not None else []
    written = any(one.is_write for one in shared)
    return bool(shared) and not written and node.target.overloadpacket is not aten.expand  # type: ignore[union-attr]


def _on_a_copy(target: Callable[..., Any], written: Tensor, *args: Any, **kwargs: Any) -> Any:
    return target(written.clone(), *args, **kwargs)


def _decided(target: Any, decided: Any, *args: Any, **kwargs: Any) -> Any:
    """The result of an operation as the recorded run decided it."""
    if target._schema.is_mutable:
        args = (args[0].clone(), *args[1:])
    return replay_decision(target, args, kwargs, decided)


def _lowered(target: Any, dtype: torch.dtype, *args: Any, **kwargs: Any) -> Any:
    """A product computed in a shorter type, returned in the type of its arguments."""
    own = next(value.dtype for value in args if isinstance(value, Tensor))
    if not own.is_floating_point:
        return target(*args, **kwargs)
    short = [value.to(dtype) if isinstance(value, Tensor) else value for value in args]
    return target(*short, **kwargs).to(own)
