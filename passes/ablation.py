"""Ablation: the loss on samples without some units, run in parts where the network allows it, else cut out."""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from torch import Tensor, fx

from netsurgery.analysis.network import Network
from netsurgery.analysis.replay import with_constants
from netsurgery.analysis.replay_without import replay_without
from netsurgery.capture.copies import named_tensors
from netsurgery.capture.inputs import tensors_in
from netsurgery.capture.randomness import seeded
from netsurgery.edit import Edit
from netsurgery.errors import InputError, RewriteError
from netsurgery.passes.calibration import Samples
from netsurgery.passes.functional_graph import Results, Unsuited
from netsurgery.passes.partial_replay import PartialReplay
from netsurgery.passes.progress import Report, without_log
from netsurgery.passes.removed_units import Removal
from netsurgery.passes.sample_losses import AblationSettings, SampleLosses, finite, nearly_equal
from netsurgery.passes.score_checkpoint import ScoreCheckpoint
from netsurgery.passes.series import Series
from netsurgery.pipeline import trace
from netsurgery.rewriting.surgery import rewrite

__all__ = ["Ablation", "AblationSettings", "Terms"]

_log = logging.getLogger("netsurgery")


Key = tuple[int, ...]  # rows, copies of these, the first sample; for engines also whether decisions are held
Active = Mapping[str, list[int]]  # names of series, and which removals of each are to be tried
Terms = Callable[[str, list[int], Tensor, int], Tensor]


def _sums(name: str, units: list[int], loss_deltas: Tensor, start: int) -> Tensor:
    return loss_deltas.sum(1)[None]


class Ablation(SampleLosses):
    """Runs a network without some of its units on a set of samples.

    Attributes:
        series: the removals that can be tried, by name.
        bases: losses of samples where nothing is removed.
        by_batch: whether the code may take another path for each batch.
        by_sample: whether the loss of a sample is the same whatever goes through beside it; None if not known.
        unsuited: why the network cannot be run in parts.
    """

    def __init__(self, settings: AblationSettings, network: Network, samples: Samples):
        super().__init__(settings, network, samples)
        self.series = {group.name: Series({group.name: range(group.size)}) for group in network.prunable}
        self.bases: dict[Key, Tensor] = {}
        self.by_batch = False
        self.engines: dict[Key, PartialReplay | None] = {}
        self.traced: dict[Key, Network] = {}
        self.steady: dict[Key, bool] = {}
        self.by_sample: bool | None = None
        self.unsuited = ""
        self.report = Report(settings.progress)

    def everything(self) -> dict[str, list[int]]:
        """Every unit of every group that may lose some."""
        return {group.name: list(range(group.size)) for group in self.network.prunable}

    def add_series(self, series: Mapping[str, Series]) -> None:
        """Let more removals be tried, or others under the same names."""
        self.series.update(series)

    def rows_left(self, checkpoint: ScoreCheckpoint, wanted: Active) -> dict[str, int]:
        """The number of rows that the wanted removals of each series are still to be tried on."""
        found = {}
        for name, units in wanted.items():
            seen = checkpoint.entries[name][1][units] if name in checkpoint.entries else torch.zeros(len(units))
            found[name] = int((self.samples.count - seen).clamp_min(0).sum())
        return {name: rows for name, rows in found.items() if rows}

    def fingerprint(self, *choices: object) -> str:
        """A digest of all that scores depend on.

        Args:
            choices: settings of the caller beside these.
        """
        said = repr((self.network.model_name, *choices, self.settings.autocast, self.losses_as_text()))
        digest = hashlib.sha256(said.encode())
        tensors = [*named_tensors(self.model)]
        tensors += [(str(i), t) for i, t in enumerate(tensors_in((self.samples.inputs, self.samples.targets)))]
        for name, tensor in tensors:
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def extend(
        self,
        checkpoint: ScoreCheckpoint,
        wanted: Active,
        count: int,
        terms: Terms = _sums,
        sums: int = 1,
        at_once: int | None = None,
    ) -> None:
        """Try the wanted removals on the samples up to ``count`` that they were not tried on.

        Args:
            terms: the numbers that the checkpoint adds up, ``(sums, units)``, from changes of the loss ``(units,
                rows)`` and the first of their samples.
            sums: how many numbers these are for each removal.
            at_once: the number of samples that go through together at most.
        """
        for name in wanted:
            checkpoint.open(name, sums, self.series[name].size)
        known = {n for name, units in wanted.items() for n in checkpoint.entries[name][1][units].tolist()}
        edges = sorted({n for n in known if n < count} | {count})
        for low, high in itertools.pairwise(edges):
            step = min(self.step(), at_once or self.step())
            for start in range(low, high, step):
                stop = min(start + step, high)
                seen = {name: checkpoint.entries[name][1].tolist() for name in wanted}
                due = {name: [u for u in units if seen[name][u] == start] for name, units in wanted.items()}
                for name, units, loss_deltas in self.loss_deltas(
                    {n: units for n, units in due.items() if units}, start, stop
                ):
                    checkpoint.add(name, units, terms(name, units, loss_deltas, start), stop - start)
                    checkpoint.save_now_and_then()
                    self.report.advance(name, len(units), stop - start)

    def copies(self, rows: int) -> int:
        """The number of copies of some samples that go through at once: at most the size of the largest group."""
        units = max((group.size for group in self.network.prunable), default=1)
        return max(1, min(self.chunk() // rows, units))

    def loss_deltas(self, due: Active, start: int, stop: int) -> Iterator[tuple[str, list[int], Tensor]]:
        """The changes of the loss ``(removals, rows)`` for some removals of a series at a time."""
        rows = stop - start
        copies = self.copies(rows)
        engine = self.engine(rows, copies, start)
        if engine is None:
            yield from (self.by_silencing if self.random else self.by_surgery)(due, start, stop)
            return
        apart = copies > 1 and not self.alike(engine, rows, copies, start)
        alone = {
            n: units for n, units in due.items() if copies > 1 and (apart or not self.series[n].suffix(engine).blocks)
        }
        together = {n: units for n, units in due.items() if n not in alone}
        for times, some in ((copies, together), (1, alone)):
            if some and (runner := self.engine(rows, times, start)) is not None:
                yield from self.in_parts(runner, times, some, start, stop)

    def key(self, rows: int, copies: int, start: int) -> Key:
        """The batch that a trace holds for: its size, and its first sample where the code looks at values."""
        if self.by_batch:
            for known in (self.engines, self.traced, self.steady):
                for other in [other for other in known if other[2] != start]:
                    del known[other]
        return rows, copies, start if self.by_batch else 0

    def reorder(self, order: Tensor) -> None:
        """Put the samples into another order."""
        self.samples = self.samples.of(order)
        for known in (self.engines, self.traced, self.steady, self.bases):
            known.clear()

    def trace(self, rows: int, copies: int, start: int) -> Network:
        """The network as it runs on some samples.

        Raises:
            Unsuited: it is another than the one that was traced.
        """
        found = self.traced.get(self.key(rows, copies, start))
        if found is None:
            inputs, _ = self.batch(start, start + rows, copies)
            with seeded(0, self.device):
                found = with_constants(self.model, trace(self.model, inputs[0] or inputs[1], try_sizes=False), inputs)
            self.by_batch = self.by_batch or found.programs[0].values != "none"
            for group in self.network.prunable:
                other = found.by_name.get(group.name)
                if other is None or (other.size, other.members) != (group.size, group.members):
                    raise Unsuited(f"group '{group.name}' is another on these samples, {rows * copies} at once")
            self.traced[self.key(rows, copies, start)] = found
        return found

    def engine(self, rows: int, copies: int, start: int = 0, decisions: bool = False) -> PartialReplay | None:
        """The network traced on ``copies`` times ``rows`` rows, or None where it cannot be run in parts.

        Args:
            decisions: whether what the code decides by values may be held as it is for each batch.
        """
        key = *self.key(rows, copies, start), decisions
        if key not in self.engines:
            tensors = dict(named_tensors(self.model))
            try:
                network, dtype = self.trace(rows, copies, start), self.settings.autocast
                made = PartialReplay(network, tensors, dtype, decisions, whole_products=self.dear)
            except Unsuited as reason:
                self.unsuited, made = str(reason), None
                _log.info("each unit is cut out in turn, which is slow: %s", reason)
            key = *self.key(rows, copies, start), decisions
            self.engines[key] = made
        engine = self.engines[key]
        if engine is not None:
            engine.seed = start
        return engine

    def alike(self, engine: PartialReplay, rows: int, copies: int, start: int) -> bool:
        """True if copies of a sample give the same outputs, wherever they stand in the batch."""
        key = self.key(rows, copies, start)
        if key not in self.steady:
            whole = engine.whole(self.batch(start, start + rows, copies)[0], [])
            parts = [
                whole[node].unflatten(row, (copies, -1)).movedim(row, 0)
                for node in engine.outputs
                if (row := engine.row(engine.dims[node])) is not None and whole[node].is_floating_point()
            ]
            self.steady[key] = all(nearly_equal(part) for part in parts)
            if self.steady[key]:
                once = self.engine(rows, 1, start)
                self.steady[key] = once is not None and self.same_as_once(engine, once, whole, start, rows)
        return self.steady[key]

    def same_as_once(self, engine: PartialReplay, once: PartialReplay, whole: Results, start: int, rows: int) -> bool:
        """True if copies of samples in one batch give the outputs that the samples give alone."""
        alone = once.whole(self.batch(start, start + rows, 1)[0], [])
        spread = engine.repeated(once, alone, engine.outputs)
        return spread is not None and all(nearly_equal(torch.stack([value, whole[n]])) for n, value in spread.items())

    def in_parts(
        self, engine: PartialReplay, copies: int, due: Active, start: int, stop: int
    ) -> Iterator[tuple[str, list[int], Tensor]]:
        """Run the operations that follow each removal; results that do not fit into the memory are computed again."""
        targets = self.batch(start, stop, 1)[1]
        for names in self.portions(engine, due):
            before = self.series[names[0]].before
            reads = {node: None for name in names for node in self.series[name].suffix(engine).reads}
            whole = self.whole(engine, copies, start, stop, reads, before)
            base = self.base(engine, copies, start, stop, {} if before else whole)
            for name in names:
                for first in range(0, len(due[name]), copies):
                    units = due[name][first : first + copies]
                    removals = [self.series[name].removal(unit) for unit in units]
                    removals += removals[-1:] * (copies - len(removals))
                    outputs = engine.without(removals, whole, before)
                    found = self.losses(outputs, targets, engine, len(units), copies)
                    yield name, units, (found - base).cpu()

    def whole(
        self, engine: PartialReplay, copies: int, start: int, stop: int, reads: Collection[fx.Node], before: Removal
    ) -> Results:
        """Results of the network without some units; those of copies of samples come from one run on the samples."""
        once = self.engine(stop - start, 1, start) if copies > 1 else None
        twins = None if once is None else engine.twins(once)
        if once is not None and twins is not None:
            small = once.whole(self.batch(start, stop, 1)[0], [twins[node] for node in reads], before)
            if (found := engine.repeated(once, small, [*reads, *engine.outputs])) is not None:
                return found
        return engine.whole(self.batch(start, stop, copies)[0], reads, before)

    def base(self, engine: PartialReplay, copies: int, start: int, stop: int, whole: Results) -> Tensor:
        """Losses ``(rows,)`` of the network as it is, given its results where they are known."""
        key = stop - start, copies, start
        if key not in self.bases:
            inputs, targets = self.batch(start, stop, copies)
            whole = whole or engine.whole(inputs, [])
            outputs = [whole[node] for node in engine.outputs]
            self.bases[key] = finite(self.losses(outputs, targets, engine, 1, copies)[0])
        return self.bases[key]

    def portions(self, engine: PartialReplay, due: Active) -> Iterator[list[str]]:
        """Series of one network whose suffixes read no more than fits into the memory, at least one at a time."""
        portion: list[str] = []
        held: dict[fx.Node, int] = {}
        for name in due:
            reads = {node: _bytes(node) for node in self.series[name].suffix(engine).reads}
            full = sum({**held, **reads}.values()) > self.settings.memory
            if portion and (full or self.series[name].before != self.series[portion[0]].before):
                yield portion
                portion, held = [], {}
            portion.append(name)
            held.update(reads)
        yield portion

    def losses(self, outputs: list[Tensor], targets: object, engine: PartialReplay, used: int, copies: int) -> Tensor:
        """Losses ``(used, rows)`` of the parts of a batch."""
        together = self.losses_together(outputs, targets, copies) if self.by_sample is not False else None
        if self.by_sample and together is not None:
            return together[:used]
        found = []
        for index in range(used):
            parts = []
            for output, node in zip(outputs, engine.outputs, strict=True):
                row = engine.row(engine.dims[node])
                if row is not None:
                    size = output.shape[row] // copies
                    output = output.narrow(row, index * size, size)
                parts.append(output)
            with torch.no_grad():
                found.append(self.loss(self.filled(parts), targets))
        apart = torch.stack(found)
        if self.by_sample is None and used > 1:
            self.by_sample = together is not None and nearly_equal(torch.stack([apart, together[:used]]))
        return apart

    def by_surgery(self, due: Active, start: int, stop: int) -> Iterator[tuple[str, list[int], Tensor]]:
        """Cut the units out, and equally many of groups of equal size, and run the smaller network."""
        inputs, targets = self.batch(start, stop, 1)
        base = finite(self.loss(self.outputs(self.model, inputs), targets))
        for name, indices in due.items():
            for tried, index in enumerate(indices):
                try:
                    with without_log():
                        small = rewrite(self.model, self.edit(name, index))
                except RewriteError as reason:  # this number of units cannot be cut out, but others may
                    _log.info("units of '%s' are silenced instead: %s", name, reason)
                    yield from self.by_silencing({name: indices[tried:]}, start, stop)
                    break
                found = self.loss(self.outputs(small, inputs), targets)
                yield name, [index], (found - base)[None].cpu()

    def edit(self, name: str, index: int) -> Edit:
        """A removal as an edit of the network."""
        return Edit(self.network, self.kept(name, index))

    def kept(self, name: str, index: int) -> dict[str, tuple[int, ...]]:
        """The units that a removal leaves, by group."""
        series, keep = self.series[name], dict[str, tuple[int, ...]]()
        for group, units in {**series.before, **series.removal(index)}.items():
            gone = {*units}
            keep[group] = tuple(unit for unit in range(self.network[group].size) if unit not in gone)
        for group in tuple(keep):
            keep.update({tied: keep[group] for tied in self.network.equal_to(group) if tied not in keep})
        return keep

    def by_silencing(self, due: Active, start: int, stop: int) -> Iterator[tuple[str, list[int], Tensor]]:
        """Silence the units in a replay, which takes the decisions and random numbers of the original run."""
        inputs, targets = self.batch(start, stop, 1)
        try:
            network = self.trace(stop - start, 1, start)
        except Unsuited as reason:
            raise InputError(f"{self.network.model_name} cannot lose single units: {reason}") from reason
        tensors = dict(named_tensors(self.model))

        def loss(keep: Mapping[str, tuple[int, ...]]) -> Tensor:
            channels = {network[name].channel: stay for name, stay in keep.items()}
            with seeded(start, self.device):
                outputs = replay_without(network.programs[0], tensors, inputs, channels)
            return self.loss(self.filled(outputs), targets)

        base = finite(loss({}))
        for name, indices in due.items():
            for index in indices:
                yield name, [index], (loss(self.kept(name, index)) - base)[None].cpu()


def _bytes(node: fx.Node) -> int:
    shape, dtype = node.meta["shape"], node.meta.get("dtype", torch.float32)
    shapes = [shape] if isinstance(shape, torch.Size) else [one for one in shape or () if one is not None]
    return sum(math.prod(one) * dtype.itemsize for one in shapes)
