"""Trials of removals on samples: in parts where the network allows it, else by cutting the units out."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from netsurgery.copying import named_tensors
from netsurgery.edit import Edit
from netsurgery.errors import InputError
from netsurgery.network import Network
from netsurgery.passes.ledger import Ledger
from netsurgery.passes.samples import Samples, in_eval_mode
from netsurgery.passes.suffixes import Removal, Suffixes, Unsuited
from netsurgery.pipeline import trace_untried
from netsurgery.rewriting import rewrite
from netsurgery.tracing import Inputs, home, tensors_in
from netsurgery.verification import look_up_constants

if TYPE_CHECKING:
    from netsurgery.passes.loss_increase import LossIncreaseScore

__all__ = ["Loss", "Trials"]

Loss = Callable[[Any, Any], Tensor]
_log = logging.getLogger("netsurgery")


Active = Mapping[str, list[int]]  # groups, and the removals of each that are to be tried
Terms = Callable[[str, list[int], Tensor, int], Tensor]


def _sums(name: str, units: list[int], rises: Tensor, start: int) -> Tensor:
    return rises.sum(1)[None]


class Trials:
    """Runs a network without some of its units on a set of samples."""

    def __init__(self, settings: LossIncreaseScore, network: Network, samples: Samples):
        self.settings, self.network, self.samples = settings, network, samples
        self.model = network.model
        self.device = home(self.model)
        self.order: dict[str, list[int]] = {}  # in mode "cumulative"
        self.engines: dict[tuple[int, int], Suffixes | None] = {}
        self.steady: dict[tuple[int, int], bool] = {}
        self.advance: Callable[[int], None] = lambda n: None
        self.begin: Callable[[int | None], None] = lambda n: None

    def size(self, name: str) -> int:
        """How many removals a group has: one for each unit, or for each prefix that leaves a unit."""
        return self.network[name].size - bool(self.order)

    def everything(self) -> dict[str, list[int]]:
        """Every unit of every group that may lose some."""
        return {group.name: list(range(group.size)) for group in self.network.prunable}

    def removal(self, name: str, index: int) -> Removal:
        """What goes: one unit, or a prefix of the order."""
        return name, tuple(sorted(self.order[name][: index + 1])) if self.order else (index,)

    def fingerprint(self) -> str:
        """A digest of all that the scores depend on."""
        s = self.settings
        race = (s.share, s.confidence) if s.racing else None
        steps = s.tolerance if s.mode == "cumulative" else None
        said = repr((self.network.model_name, s.mode, race, steps, s.autocast, self.told_losses()))
        digest = hashlib.sha256(said.encode())
        tensors = [*named_tensors(self.model)]
        tensors += [(str(i), t) for i, t in enumerate(tensors_in((self.samples.inputs, self.samples.targets)))]
        for name, tensor in tensors:
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def told_losses(self) -> list[str]:
        """What tells a loss from others, whatever it is made of: its values at outputs of the model and near these."""
        inputs, targets = self.batch(0, min(16, self.samples.count), 1)
        outputs = self.outputs(self.model, inputs)
        found = []
        for factor in (1.0, 0.5):
            tensors = [t * factor if t.is_floating_point() else t for t in tensors_in(outputs)]
            with torch.no_grad():
                found.append(f"{float(self.loss(_filled(outputs, tensors), targets).mean()):.4g}")
        return found

    @contextlib.contextmanager
    def bar(self) -> Iterator[Callable[[int], None]]:
        """A progress bar, where there is a terminal to show it on."""
        columns = (TextColumn("loss increase"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, transient=True, disable=not self.settings.progress) as progress:
            progress.disable = progress.disable or not progress.console.is_terminal
            task = progress.add_task("", total=None)
            self.begin = lambda total: progress.update(task, total=total)
            yield lambda n: progress.advance(task, n)

    def extend(self, ledger: Ledger, wanted: Active, count: int, terms: Terms = _sums, sums: int = 1) -> None:
        """Try the wanted removals on the samples up to ``count`` that they were not tried on.

        Args:
            terms: what is added to the ledger, ``(sums, units)``, for rises ``(units, rows)`` from a sample on.
        """
        for name in wanted:
            ledger.open(name, sums, self.size(name))
        known = {int(n) for name, units in wanted.items() for n in ledger.entries[name][1][units]}
        edges = sorted({n for n in known if n < count} | {count})
        for low, high in itertools.pairwise(edges):
            for start in range(low, high, self.chunk()):
                stop = min(start + self.chunk(), high)
                due = {n: [u for u in units if ledger.entries[n][1][u] == start] for n, units in wanted.items()}
                for name, units, rises in self.rises({n: units for n, units in due.items() if units}, start, stop):
                    ledger.add(name, units, terms(name, units, rises, start), stop - start)
                    ledger.save_now_and_then()
                    self.advance(len(units) * (stop - start))

    def chunk(self) -> int:
        """Rows that go through at once."""
        if self.settings.rows is not None:
            return self.settings.rows
        program = self.network.programs[0]
        given = next(n.meta["shape"] for n in program.graph.nodes if n.op == "placeholder")
        shapes = [n.meta["shape"] for n in program.operations if isinstance(n.meta["shape"], torch.Size)]
        largest = max((math.prod(shape) for shape in shapes), default=1) / max(1, given[0] if given else 1)
        fits = (256 << 20 if self.device.type == "cuda" else 4 << 20) / (4 * largest)
        return 1 << max(4, min(12, round(math.log2(fits))))

    def rises(self, due: Active, start: int, stop: int) -> Iterator[tuple[str, list[int], Tensor]]:
        """The rise of the loss ``(removals, rows)`` for some removals of a group at a time."""
        rows = stop - start
        copies = max(1, self.chunk() // rows)
        engine = self.engine(rows, copies)
        if engine is None:
            yield from self.by_surgery(due, start, stop)
            return
        apart = copies > 1 and not self.alike(engine, rows, copies)
        alone = {n: units for n, units in due.items() if copies > 1 and (apart or not engine.suffix(n).blocks)}
        together = {n: units for n, units in due.items() if n not in alone}
        for times, some in ((copies, together), (1, alone)):
            if some and (runner := self.engine(rows, times)) is not None:
                yield from self.in_parts(runner, times, some, start, stop)

    def engine(self, rows: int, copies: int) -> Suffixes | None:
        """The network traced on ``copies`` times ``rows`` rows, or None where it cannot be run in parts."""
        key = rows, copies
        if key not in self.engines:
            inputs, _ = self.batch(0, rows, copies)
            network = trace_untried(self.model, inputs[0] or inputs[1])
            try:
                for group in self.network.prunable:
                    other = network.by_name.get(group.name)
                    if other is None or (other.size, other.members) != (group.size, group.members):
                        raise Unsuited(f"group '{group.name}' is another on {rows * copies} rows")
                look_up_constants(self.model, network, inputs)
                self.engines[key] = Suffixes(network, dict(named_tensors(self.model)), self.settings.autocast)
            except Unsuited as reason:
                _log.info("each unit is cut out in turn, which is slow: %s", reason)
                self.engines[key] = None
        return self.engines[key]

    def alike(self, engine: Suffixes, rows: int, copies: int) -> bool:
        """Whether samples that go through several times give the same each time, wherever they stand in the batch."""
        if (rows, copies) not in self.steady:
            whole = engine.whole(self.batch(0, rows, copies)[0], [])
            parts = [
                whole[node].unflatten(row, (copies, -1)).movedim(row, 0)
                for node in engine.outputs
                if (row := engine.row(engine.dims[node])) is not None and whole[node].is_floating_point()
            ]
            self.steady[rows, copies] = all(_alike(part) for part in parts)
        return self.steady[rows, copies]

    def batch(self, start: int, stop: int, copies: int) -> tuple[Inputs, Any]:
        """Some samples, several times over; the targets once."""
        which = torch.arange(start, stop)
        inputs, _ = self.samples.rows(which.repeat(copies), self.device)
        return inputs, self.samples.rows(which, self.device)[1]

    def in_parts(
        self, engine: Suffixes, copies: int, due: Active, start: int, stop: int
    ) -> Iterator[tuple[str, list[int], Tensor]]:
        """Run what comes after each removal; results that do not fit into the memory are computed again."""
        inputs, targets = self.batch(start, stop, copies)
        for names in self.portions(engine, due):
            reads: dict[fx.Node, None] = {}
            for name in names:
                reads.update(dict.fromkeys(engine.suffix(name).reads))
            whole = engine.whole(inputs, reads)
            base = _finite(self.losses([whole[node] for node in engine.outputs], targets, engine, 1, copies)[0])
            for name in names:
                for first in range(0, len(due[name]), copies):
                    units = due[name][first : first + copies]
                    removals = [self.removal(name, unit) for unit in units]
                    removals += removals[-1:] * (copies - len(removals))
                    outputs = engine.without(removals, whole)
                    found = self.losses(outputs, targets, engine, len(units), copies)
                    yield name, units, (found - base).cpu()

    def portions(self, engine: Suffixes, due: Active) -> Iterator[list[str]]:
        """Groups whose suffixes read no more than fits into the memory, at least one at a time."""
        portion: list[str] = []
        held: dict[fx.Node, int] = {}
        for name in due:
            reads = {node: _bytes(node) for node in engine.suffix(name).reads}
            if portion and sum({**held, **reads}.values()) > self.settings.memory:
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

    def outputs(self, model: nn.Module, inputs: Inputs) -> Any:
        """What a model returns in eval mode."""
        with in_eval_mode(model), torch.no_grad():
            return model(*inputs[0], **inputs[1])

    def losses(self, outputs: list[Tensor], targets: Any, engine: Suffixes, used: int, copies: int) -> Tensor:
        """Losses ``(used, rows)`` of the parts of a batch."""
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
        return torch.stack(found)

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """The loss of each row in float64, ``(rows,)``; all alike where the loss is the mean."""
        rows, own = len(pytree.tree_leaves(targets)[0]), self.settings.loss
        found = _cross_entropy(outputs, targets).reshape(rows, -1).mean(1) if own is None else own(outputs, targets)
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
        tied = {name: names for names in self.network.ties for name in names}
        for name, indices in due.items():
            for index in indices:
                units = self.removal(name, index)[1]
                stay = tuple(u for u in range(self.network[name].size) if u not in units)
                edit = Edit(self.network, dict.fromkeys(tied.get(name, (name,)), stay))
                with _quiet():
                    small = rewrite(self.model, edit)
                found = self.loss(self.outputs(small, inputs), targets)
                yield name, [index], (found - base)[None].cpu()


def _cross_entropy(logits: Any, targets: Any) -> Tensor:
    """The cross-entropy of logits ``(n, classes, ...)``, not averaged."""
    if not isinstance(logits, Tensor):
        raise InputError(f"the model returns {type(logits).__name__}, not logits: pass loss=f(outputs, targets)")
    whole = isinstance(targets, Tensor) and not targets.is_floating_point()
    wanted = (logits.shape[0], *logits.shape[2:]) if whole else logits.shape
    if not isinstance(targets, Tensor) or logits.dim() < 2 or targets.shape != wanted:
        found = f"{targets.dtype} {tuple(targets.shape)}" if isinstance(targets, Tensor) else type(targets).__name__
        raise InputError(
            f"the model returns {tuple(logits.shape)} and targets are {found}, neither classes nor their shares: "
            "pass loss=f(outputs, targets)"
        )
    logits = logits if logits.dtype.itemsize >= 4 else logits.float()
    return F.cross_entropy(logits, targets.long() if whole else targets.to(logits.dtype), reduction="none")


def _finite(losses: Tensor) -> Tensor:
    if not bool(losses.isfinite().all()):
        raise InputError(
            "the loss of the model as it is, is NaN or infinite: look at its weights, the data and the loss"
        )
    return losses


def _alike(parts: Tensor) -> bool:
    """Whether parts ``(parts, ...)`` are the same but for rounding."""
    eps = torch.finfo(parts.dtype).eps
    largest = float(parts[0].nan_to_num(0, 0, 0).abs().amax()) if parts.numel() else 0.0
    return torch.allclose(parts, parts[:1], min(1e3 * eps, 0.05), 1e2 * eps * largest, equal_nan=True)


def _bytes(node: fx.Node) -> int:
    shape, dtype = node.meta["shape"], node.meta.get("dtype", torch.float32)
    shapes = [shape] if isinstance(shape, torch.Size) else [one for one in shape or () if one is not None]
    return sum(math.prod(one) * dtype.itemsize for one in shapes)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What is cut out only to try it is nothing to be told of."""
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
