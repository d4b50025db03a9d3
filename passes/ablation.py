"""Trials of removals on samples: in parts where the network allows it, else by cutting the units out."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import itertools
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from netsurgery.analysis.network import Network
from netsurgery.analysis.replay import look_up_constants
from netsurgery.analysis.tracing import trace_untried
from netsurgery.capture.copies import named_tensors
from netsurgery.capture.inputs import Inputs, tensors_in
from netsurgery.capture.meta_run import home
from netsurgery.capture.randomness import seeded
from netsurgery.edit import Edit
from netsurgery.errors import InputError, RewriteError
from netsurgery.passes.calibration import Samples, in_eval_mode
from netsurgery.passes.draws import drawn_at
from netsurgery.passes.losses import Loss, check_mean, check_targets, cross_entropy, twice_over
from netsurgery.passes.partial_replay import PartialReplay, Removal, Unsuited
from netsurgery.passes.progress import Report
from netsurgery.passes.score_checkpoint import ScoreCheckpoint
from netsurgery.passes.series import Series
from netsurgery.rewriting.surgery import rewrite
from netsurgery.verification.silencing import silenced

if TYPE_CHECKING:
    from netsurgery.passes.loss_increase import LossIncreaseScore

__all__ = ["Ablation", "Loss", "Terms"]

_log = logging.getLogger("netsurgery")


Key = tuple[int, int, int]  # rows, copies of these, and the first sample
Active = Mapping[str, list[int]]  # names of series, and which removals of each are to be tried
Terms = Callable[[str, list[int], Tensor, int], Tensor]


def _sums(name: str, units: list[int], loss_deltas: Tensor, start: int) -> Tensor:
    return loss_deltas.sum(1)[None]


def calls_are_dear(device: torch.device) -> bool:
    """Whether a call of an operation costs more than its arithmetic, as on a GPU."""
    return device.type == "cuda"


def _fitting(device: torch.device) -> int:
    """Bytes that the largest result of a run may have: what suits the caches of a CPU, a part of a GPU's memory."""
    if device.type != "cuda":
        return 4 << 20
    return max(256 << 20, torch.cuda.get_device_properties(device).total_memory // 32)


class Ablation:
    """Runs a network without some of its units on a set of samples."""

    def __init__(self, settings: LossIncreaseScore, network: Network, samples: Samples):
        self.settings, self.network, self.samples = settings, network, samples
        self.model = network.model
        self.device = home(self.model)
        self.series = {group.name: Series({group.name: range(group.size)}) for group in network.prunable}
        self.bases: dict[Key, Tensor] = {}  # losses of samples without a removal
        self.decisions = False  # whether what the code decides by values may be held as it is for each batch
        self.by_batch = False  # whether the way the code takes may be another for each batch
        self.random = self.random_loss = False  # whether the model draws random numbers, and whether its loss does
        self.engines: dict[Key, PartialReplay | None] = {}
        self.traced: dict[Key, Network] = {}
        self.steady: dict[Key, bool] = {}
        self.dear = calls_are_dear(self.device)
        self.block: int | None = None  # at most so many samples go through, several times over
        self.by_sample: bool | None = None  # whether the loss of a sample is the same whatever goes through beside it
        self.unsuited = ""  # why the network cannot be run in parts
        self.report = Report(settings.progress)

    def everything(self) -> dict[str, list[int]]:
        """Every unit of every group that may lose some."""
        return {group.name: list(range(group.size)) for group in self.network.prunable}

    def rows_left(self, checkpoint: ScoreCheckpoint, wanted: Active) -> dict[str, int]:
        """Rows that the wanted removals were not tried on yet, in all, by series."""
        found = {}
        for name, units in wanted.items():
            seen = checkpoint.entries[name][1][units] if name in checkpoint.entries else torch.zeros(len(units))
            found[name] = int((self.samples.count - seen).clamp_min(0).sum())
        return {name: rows for name, rows in found.items() if rows}

    def fingerprint(self) -> str:
        """A digest of all that the scores depend on."""
        s = self.settings
        race = (s.share, s.confidence, [*self.everything()]) if s.racing else None
        steps = s.tolerance if s.mode != "score" else None
        said = repr((self.network.model_name, s.mode, race, steps, s.autocast, self.losses_as_text()))
        digest = hashlib.sha256(said.encode())
        tensors = [*named_tensors(self.model)]
        tensors += [(str(i), t) for i, t in enumerate(tensors_in((self.samples.inputs, self.samples.targets)))]
        for name, tensor in tensors:
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def losses_as_text(self) -> list[str]:
        """What tells a loss from others, whatever it is made of: its values at outputs of the model and near these."""
        inputs, targets = self.batch(0, min(16, self.samples.count), 1)
        outputs = self.outputs(self.model, inputs)
        found = []
        for factor in (1.0, 0.5):
            with torch.no_grad():
                filled = _filled(outputs, _scaled(tensors_in(outputs), factor))
                found.append(f"{float(self.loss(filled, targets).mean()):.4g}")
        return found

    def extend(
        self, checkpoint: ScoreCheckpoint, wanted: Active, count: int, terms: Terms = _sums, sums: int = 1
    ) -> None:
        """Try the wanted removals on the samples up to ``count`` that they were not tried on.

        Args:
            terms: what is added to the ledger, ``(sums, units)``, for rises ``(units, rows)`` from a sample on.
        """
        for name in wanted:
            checkpoint.open(name, sums, self.series[name].size)
        known = {n for name, units in wanted.items() for n in checkpoint.entries[name][1][units].tolist()}
        edges = sorted({n for n in known if n < count} | {count})
        for low, high in itertools.pairwise(edges):
            step = self.step()
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

    def step(self) -> int:
        """Samples that go through at once, each several times over where these are fewer than rows may be."""
        return min(self.chunk(), self.block or self.chunk())

    def chunk(self) -> int:
        """Rows that go through at once."""
        if self.settings.rows is not None:
            return self.settings.rows
        program = self.network.programs[0]
        given = next(n.meta["shape"] for n in program.graph.nodes if n.op == "placeholder")
        shapes = [n.meta["shape"] for n in program.operations if isinstance(n.meta["shape"], torch.Size)]
        largest = max((math.prod(shape) for shape in shapes), default=1) / max(1, given[0] if given else 1)
        most = 15 if self.dear else 12
        return 1 << max(4, min(most, math.floor(math.log2(_fitting(self.device) / (4 * largest)) + 0.5)))

    def loss_deltas(self, due: Active, start: int, stop: int) -> Iterator[tuple[str, list[int], Tensor]]:
        """The rise of the loss ``(removals, rows)`` for some removals of a series at a time."""
        rows = stop - start
        copies = max(1, self.chunk() // rows)
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
        """What a trace is for: so many rows, and these very samples where the code looks at their values."""
        if self.by_batch:
            for known in (self.engines, self.traced, self.steady):
                for other in [other for other in known if other[2] != start]:
                    del known[other]
        return rows, copies, start if self.by_batch else 0

    def reorder(self, order: Tensor) -> None:
        """Put the samples into another order."""
        self.samples = self.samples.ordered(order)
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
                found = trace_untried(self.model, inputs[0] or inputs[1])
                look_up_constants(self.model, found, inputs)
            self.by_batch = self.by_batch or found.programs[0].values != "none"
            for group in self.network.prunable:
                other = found.by_name.get(group.name)
                if other is None or (other.size, other.members) != (group.size, group.members):
                    raise Unsuited(f"group '{group.name}' is another on these samples, {rows * copies} at once")
            self.traced[self.key(rows, copies, start)] = found
        return found

    def engine(self, rows: int, copies: int, start: int = 0) -> PartialReplay | None:
        """The network traced on ``copies`` times ``rows`` rows, or None where it cannot be run in parts."""
        key = self.key(rows, copies, start)
        if key not in self.engines:
            tensors = dict(named_tensors(self.model))
            try:
                network, dtype = self.trace(rows, copies, start), self.settings.autocast
                made = PartialReplay(network, tensors, dtype, self.decisions, whole_products=self.dear)
            except Unsuited as reason:
                self.unsuited, made = str(reason), None
                _log.info("each unit is cut out in turn, which is slow: %s", reason)
            key = self.key(rows, copies, start)
            self.engines[key] = made
        engine = self.engines[key]
        if engine is not None:
            engine.seed = start
        return engine

    def alike(self, engine: PartialReplay, rows: int, copies: int, start: int) -> bool:
        """Whether samples that go through several times give the same each time, wherever they stand in the batch."""
        key = self.key(rows, copies, start)
        if key not in self.steady:
            whole = engine.whole(self.batch(start, start + rows, copies)[0], [])
            parts = [
                whole[node].unflatten(row, (copies, -1)).movedim(row, 0)
                for node in engine.outputs
                if (row := engine.row(engine.dims[node])) is not None and whole[node].is_floating_point()
            ]
            self.steady[key] = all(_alike(part) for part in parts)
            if self.steady[key]:
                once = self.engine(rows, 1, start)
                self.steady[key] = once is not None and self.same_as_once(engine, once, whole, start, rows)
        return self.steady[key]

    def same_as_once(
        self, engine: PartialReplay, once: PartialReplay, whole: Mapping[fx.Node, Any], start: int, rows: int
    ) -> bool:
        """Whether samples that go through several times give what they give alone."""
        alone = once.whole(self.batch(start, start + rows, 1)[0], [])
        spread = engine.repeated(once, alone, engine.outputs)
        return spread is not None and all(_alike(torch.stack([value, whole[n]])) for n, value in spread.items())

    def batch(self, start: int, stop: int, copies: int) -> tuple[Inputs, Any]:
        """Some samples, several times over; the targets once."""
        which = torch.arange(start, stop)
        inputs, _ = self.samples.rows(which.repeat(copies), self.device)
        return inputs, self.samples.rows(which, self.device)[1]

    def in_parts(
        self, engine: PartialReplay, copies: int, due: Active, start: int, stop: int
    ) -> Iterator[tuple[str, list[int], Tensor]]:
        """Run what comes after each removal; results that do not fit into the memory are computed again."""
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
    ) -> dict[fx.Node, Any]:
        """Results of the network without some units; of samples that come several times from a run on them once."""
        once = self.engine(stop - start, 1, start) if copies > 1 else None
        twins = None if once is None else engine.twins(once)
        if once is not None and twins is not None:
            small = once.whole(self.batch(start, stop, 1)[0], [twins[node] for node in reads], before)
            if (found := engine.repeated(once, small, [*reads, *engine.outputs])) is not None:
                return found
        return engine.whole(self.batch(start, stop, copies)[0], reads, before)

    def base(self, engine: PartialReplay, copies: int, start: int, stop: int, whole: Mapping[fx.Node, Any]) -> Tensor:
        """Losses ``(rows,)`` of the network as it is, given its results where they are known."""
        key = stop - start, copies, start
        if key not in self.bases:
            inputs, targets = self.batch(start, stop, copies)
            whole = whole or engine.whole(inputs, [])
            outputs = [whole[node] for node in engine.outputs]
            self.bases[key] = _finite(self.losses(outputs, targets, engine, 1, copies)[0])
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

    @functools.cached_property
    def template(self) -> Any:
        """What the model returns, to put other tensors into."""
        inputs, _ = self.batch(0, min(self.chunk(), self.samples.count), 1)
        return self.outputs(self.model, inputs)

    def filled(self, outputs: Sequence[Tensor]) -> Any:
        """What the model returns, with other tensors in it."""
        return _filled(self.template, outputs)

    def outputs(self, model: nn.Module, inputs: Inputs, seed: int = 0) -> Any:
        """What a model returns in eval mode."""
        with in_eval_mode(model), torch.no_grad(), seeded(seed, self.device):
            return model(*inputs[0], **inputs[1])

    def losses(self, outputs: list[Tensor], targets: Any, engine: PartialReplay, used: int, copies: int) -> Tensor:
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
            self.by_sample = together is not None and _alike(torch.stack([apart, together[:used]]))
        return apart

    def losses_together(self, outputs: list[Tensor], targets: Any, copies: int) -> Tensor | None:
        """Losses ``(copies, rows)`` by one call; None where the loss is a mean, or draws random numbers."""
        if copies == 1 or self.random_loss:
            return None
        rows = len(pytree.tree_leaves(targets)[0])
        several = pytree.tree_map_only(Tensor, lambda t: torch.cat([t] * copies), targets)
        with torch.no_grad():
            found = self.own_loss(self.filled(outputs), several)
        return found.double().unflatten(0, (copies, rows)) if found.shape == (copies * rows,) else None

    def own_loss(self, outputs: Any, targets: Any) -> Any:
        """What the loss that was asked for returns."""
        own = self.settings.loss
        return cross_entropy(outputs, targets) if own is None else own(outputs, targets)

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """The loss of each row in float64, ``(rows,)``; all alike where the loss is the mean."""
        rows = len(pytree.tree_leaves(targets)[0])
        with seeded(0, self.device) if self.random_loss else contextlib.nullcontext():
            found = self.own_loss(outputs, targets)
        if not isinstance(found, Tensor) or found.shape not in ((), (rows,)):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(f"the loss of {rows} samples is {shape}: return the mean, or one number for each")
        if self.settings.racing and found.dim() == 0 and rows > 1:
            raise InputError("racing compares samples: let the loss return one number for each, (n,), not the mean")
        return found.double().expand(rows)

    def by_surgery(self, due: Active, start: int, stop: int) -> Iterator[tuple[str, list[int], Tensor]]:
        """Cut the units out and run what is left; with tied groups, as many of these."""
        inputs, targets = self.batch(start, stop, 1)
        base = _finite(self.loss(self.outputs(self.model, inputs), targets))
        for name, indices in due.items():
            for tried, index in enumerate(indices):
                try:
                    with _quiet():
                        small = rewrite(self.model, self.edit(name, index))
                except RewriteError as reason:  # so many may not be cut out, which says nothing of other numbers
                    _log.info("units of '%s' are silenced instead: %s", name, reason)
                    yield from self.by_silencing({name: indices[tried:]}, start, stop)
                    break
                found = self.loss(self.outputs(small, inputs), targets)
                yield name, [index], (found - base)[None].cpu()

    def edit(self, name: str, index: int) -> Edit:
        """A removal as an edit of the network."""
        series, keep = self.series[name], dict[str, tuple[int, ...]]()
        for group, units in {**series.before, **series.removal(index)}.items():
            gone = {*units}
            keep[group] = tuple(unit for unit in range(self.network[group].size) if unit not in gone)
        for group in tuple(keep):
            keep.update({tied: keep[group] for tied in self.network.equal_to(group) if tied not in keep})
        return Edit(self.network, keep)

    def by_silencing(self, due: Active, start: int, stop: int) -> Iterator[tuple[str, list[int], Tensor]]:
        """Let the units contribute nothing, where the code decides and draws what it did with them."""
        inputs, targets = self.batch(start, stop, 1)
        try:
            network = self.trace(stop - start, 1, start)
        except Unsuited as reason:
            raise InputError(f"{self.network.model_name} cannot lose single units: {reason}") from reason
        tensors = dict(named_tensors(self.model))

        def loss(keep: Mapping[str, tuple[int, ...]]) -> Tensor:
            channels = {network[name].channel: torch.tensor(stay) for name, stay in keep.items()}
            with seeded(start, self.device):
                outputs = silenced(network, network.programs[0], tensors, inputs, channels)
            return self.loss(self.filled(outputs), targets)

        base = _finite(loss({}))
        for name, indices in due.items():
            for index in indices:
                yield name, [index], (loss(self.edit(name, index).keep) - base)[None].cpu()

    def check(self) -> None:
        """Make sure, before anything is tried, that targets and loss can be used, and look for random numbers.

        Raises:
            InputError: see ``netsurgery.passes.losses``.
        """
        count = min(16, self.samples.count)
        (inputs, targets), own = self.batch(0, count, 1), self.settings.loss
        once = self.outputs(self.model, inputs)
        if not _same(once, self.outputs(self.model, inputs, seed=1)):
            self.random = True
            places = drawn_at(self.network, lambda seed: self.outputs(self.model, inputs, seed))
            self.warn(self.network.model_name, places)
        if own is None:
            check_targets(once, targets, self.samples.targets)
            return
        losses = []
        for seed in (0, 1):
            with seeded(seed, self.device):
                losses.append(self.loss(once, targets))
        if not _same(*losses):
            self.random_loss = True
            self.warn("the loss", [])
        self.check_loss(own, once, targets)

    def warn(self, who: str, places: list[str]) -> None:
        """Say that something draws random numbers."""
        _log.warning(
            "%s draws random numbers in eval mode too%s: scores are those of one draw, the same with and without "
            "each unit", who, "".join(f", {place}" for place in places),
        )  # fmt: skip

    def check_loss(self, own: Loss, once: Any, targets: Any) -> None:
        """Make sure that a loss of the user's is a mean over samples, or one number for each."""
        count = min(16, self.samples.count)
        which = torch.arange(count).repeat(2)
        inputs, more = self.samples.rows(which, self.device)
        doubled = twice_over(tensors_in(once), tensors_in(self.outputs(self.model, inputs)))
        for factor in (1.0, 0.5) if doubled is not None else ():
            pairs = (tensors_in(once), targets), (doubled or [], more)
            with seeded(0, self.device):
                one, two = (float(own(_filled(once, _scaled(t, factor)), y).double().mean()) for t, y in pairs)
            if not self.random_loss:
                check_mean(one, two, several=self.samples.count > self.step())


def _finite(losses: Tensor) -> Tensor:
    if not bool(losses.isfinite().all()):
        raise InputError(
            "the loss of the model as it is, is NaN or infinite: look at its weights, the data and the loss"
        )
    return losses


def _scaled(tensors: Sequence[Tensor], factor: float) -> list[Tensor]:
    return [tensor * factor if tensor.is_floating_point() else tensor for tensor in tensors]


def _same(one: Any, other: Any) -> bool:
    """Whether two results of a model are the same but for rounding."""
    pairs = [*zip(tensors_in(one), tensors_in(other), strict=True)]
    return all(a.shape == b.shape and _alike(torch.stack([a, b])) for a, b in pairs)


def _alike(parts: Tensor) -> bool:
    """Whether parts ``(parts, ...)`` are the same but for rounding."""
    if not parts.is_floating_point():
        return torch.equal(parts, parts[:1].expand_as(parts))
    eps = torch.finfo(parts.dtype).eps
    largest = float(parts[0].nan_to_num(0, 0, 0).abs().amax()) if parts.numel() else 0.0
    return torch.allclose(parts, parts[:1], min(1e3 * eps, 0.05), 1e2 * eps * largest, equal_nan=True)


def _bytes(node: fx.Node) -> int:
    shape, dtype = node.meta["shape"], node.meta.get("dtype", torch.float32)
    shapes = [shape] if isinstance(shape, torch.Size) else [one for one in shape or () if one is not None]
    return sum(math.prod(one) * dtype.itemsize for one in shapes)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Cuts that only serve a trial log nothing."""
    level = _log.level
    _log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        _log.setLevel(level)


def _filled(template: Any, tensors: Sequence[Tensor]) -> Any:
    """What a model returned, with other tensors in it."""
    left = iter(tensors)

    def fill(value: Any) -> Any:
        leaves, form = pytree.tree_flatten(value)
        new = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                new.append(next(left))
            elif tensors_in(leaf):
                twin = copy.copy(leaf)
                vars(twin).update({key: fill(item) for key, item in vars(leaf).items()})
                new.append(twin)
            else:
                new.append(leaf)
        return pytree.tree_unflatten(new, form)

    return fill(template)
