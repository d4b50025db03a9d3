"""Scores by the error that layers are left with when they lose inputs and their weights are refitted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from netsurgery.adaptation.fit_code import fit_code
from netsurgery.adaptation.model_code import ModelCode
from netsurgery.analysis.groups import Group
from netsurgery.analysis.network import Network
from netsurgery.arguments import require_counts
from netsurgery.axes import leaves
from netsurgery.edit import Edit
from netsurgery.errors import InputError
from netsurgery.passes.agreement import outputs_by_batch, reported
from netsurgery.passes.calibration import HELD_BACK, Samples, draw_inputs
from netsurgery.passes.layers import positions_of
from netsurgery.passes.least_squares import POSITIONS, Layer, layer_at, spatial
from netsurgery.passes.portions import portions
from netsurgery.passes.progress import waiting
from netsurgery.passes.readers import Reader, hooked, readers_of
from netsurgery.passes.reporting import DataPass
from netsurgery.passes.scores import MagnitudeScore

__all__ = ["ReconstructionScore"]

_LITTLE = 0.01  # of what groups do to the outputs
_STEPS = 64  # a step of the elimination takes this part of the units that are left


@dataclass(frozen=True)
class ReconstructionScore(DataPass):
    """The change of outputs when units go and the layers that read them are refitted: the score to try first.

    Units are eliminated from each group one after the other (a 64th of what is left at a time), always those without
    which its readers, least squares refitted, lack least: with inputs X, ``H = cov(X) + ridge * mean(var(X)) * I`` and
    weights W, unit u costs ``|W_u|^2 / (H^-1)_uu``, relative to the variance of the reader's outputs, summed over
    readers; then W and H^-1 are those of what is left. So of units that say the same all but one are free. How much a
    group matters is measured: shares of it are removed (``probes``), its readers refitted, and the Kullback-Leibler
    divergence of the network's classes from the original's (where outputs are no logits ``(n, classes)``: the squared
    relative difference) on samples that are held back is dealt to these units in proportion to their costs. Scores of
    different groups are compared as they are. No labels, no loss and no gradients are needed.

    Use it with ``PruneChannels(macs=..., scope="global", compensate="least-squares", data=...)``, which refits.

    Args:
        data: inputs, as for ``netsurgery.passes.calibration.draw_inputs``; labels play no part.
        held_back: inputs that groups are measured on, likewise. By default a fifth of the samples. Pass some where
            samples belong together, such as crops of the same pictures: of those that are like the others, units seem
            free that are not.
        samples: how many are drawn.
        ridge: relative to the mean variance of a reader's inputs.
        probes: the shares of each group that may be removed to measure how much it matters: the first of each; of
            groups that matter less than a hundredth of the median there, the others too.
        classes: whether outputs ``(n, d)`` are logits of d classes. Pass False where they are other numbers, such as
            those of a regression or an embedding: they are compared by their relative difference, by ``plan`` too.
        seed: fixes the samples.
        memory: bytes that the matrices of readers take at most; where those of all groups do not fit, the network runs
            several times, for some of the groups each time.

    Raises:
        InputError: no samples, data that can be read once, the model does not run on it, or what it computes there is
            not finite; or the matrices of one group alone do not fit into the memory.

    For each layer that reads a group two float64 matrices ``(units, units)`` are held. Units that no linear layer or
    convolution reads (as where attention is a function, or the convolution a transposed one) go in the order of their
    weights' norms. The inputs of a convolution larger than one position are taken position by position.

    Source: the elimination is Optimal Brain Surgeon's (Hassibi and Stork, 1993) on the least squares of each layer, as
    in Frantar and Alistarh, "Optimal Brain Compression", arXiv 2208.11580, and for structures in Kurtic et al.,
    "ZipLM", arXiv 2302.04089. Whole units of several readers, relative errors, and the measured share are our choice.

    Example:
        >>> import torch, netsurgery
        >>> from netsurgery.passes import PruneChannels, ReconstructionScore
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
        >>> model[0].weight.data[5], model[0].bias.data[5] = model[0].weight.data[0], model[0].bias.data[0]
        >>> scores = ReconstructionScore(torch.randn(64, 4)).run(netsurgery.trace(model)).scores["0"]
        >>> int(scores.argmin()) in (0, 5)  # they say the same: one of them is free
        True
    """

    data: object = field(repr=False, compare=False)
    held_back: object = field(default=None, repr=False, compare=False)
    samples: int = 256
    ridge: float = 1e-2
    probes: Sequence[float] = (0.3, 0.6, 0.9)
    classes: bool = True
    seed: int = 0
    memory: int = 1 << 30

    gives: ClassVar[frozenset[str]] = frozenset({"scores"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_rereadable("held_back")
        require_counts(self, "samples", least=2)
        if not self.ridge > 0 or not all(0 < one < 1 for one in self.probes or [0]):
            raise InputError("ReconstructionScore: ridge is positive, probes are in (0, 1)")

    def run(self, network: Network) -> Network:
        """Lay the scores on the network."""
        if not (groups := network.prunable):
            return network
        network.require_weights(self)
        fitted = self.drawn()
        if self.held_back is None:
            fitted, rest = _apart(fitted)
        else:
            rest = draw_inputs(self.held_back, self.samples, self.seed)
        sections = _sections(network, groups)
        norms: Mapping[str, Tensor] = {}
        orders = {}
        for portion in portions([*self._sized(sections)], self.memory):
            _add_inputs(network, {name: sections[name] for name in portion}, fitted)
            for name in portion:
                counts = _counts(network[name].size, self.probes)
                some = [section for section in sections.pop(name) if section.rows]  # others do not run as modules
                norms = norms if some or norms else MagnitudeScore().run(network).scores
                orders[name] = _eliminated(some, self.ridge, counts) if some else _by_norm(norms[name], counts)
        return _weighed(network, orders, rest, self.classes)

    def _sized(self, sections: Mapping[str, list[_Section]]) -> Iterator[tuple[str, int]]:
        """Groups, and the bytes of the matrices of their readers."""
        for name, some in sections.items():
            size = sum(section.bytes for section in some)
            if size > self.memory:
                raise InputError(
                    f"ReconstructionScore(memory={self.memory:,}): the matrices of the layers that read group '{name}' "
                    f"take {size:,} bytes: pass memory={size}, or score by TaylorScore(data)"
                )
            yield name, size


def _apart(drawn: Samples) -> tuple[Samples, Samples]:
    """Four fifths of some samples, and the fifth that is held back."""
    if drawn.count < 2:
        raise InputError("ReconstructionScore: one sample is not enough, as some are held back: pass more data")
    order, held = torch.arange(drawn.count), max(1, drawn.count // HELD_BACK)
    return drawn.of(order[held:]), drawn.of(order[:held])


# What layers are given ---------------------------------------------------------------------------------------------


@dataclass
class _Section:
    """The units of a group among the inputs of a layer.

    Attributes:
        reader: the layer.
        module: likewise.
        at: the channels of the inputs that each unit is, ``(units, r)``.
        gram: ``X'X`` over rows, each of the r channels of a unit a row of its own, ``(units, units)`` float64.
        sums: the sum of each of these channels, ``(units, r)``.
        rows: how many positions of samples there are.
        spread: how many outputs, their sums and those of their squares, ``(3, outputs)``.
    """

    reader: Reader
    module: Layer
    at: Tensor
    gram: Tensor = field(default_factory=lambda: torch.zeros(()))
    sums: Tensor = field(default_factory=lambda: torch.zeros(()))
    rows: int = 0
    spread: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, x: Tensor, out: Tensor) -> None:
        """Add inputs ``(n, channels)`` and outputs ``(n, outputs)`` of the layer to the sums."""
        rows = x[:, self.at]  # (n, units, r)
        self.sums = self.sums + rows.sum(0, dtype=torch.float64).cpu()
        flat = rows.movedim(2, 1).flatten(0, 1)
        self.gram = self.gram + (flat.mT @ flat).double().cpu()
        self.rows += len(x)
        out = out.double()
        self.spread = self.spread + torch.stack([torch.ones_like(out).sum(0), out.sum(0), out.square().sum(0)]).cpu()

    @property
    def bytes(self) -> int:
        """Bytes of the sums and of their inverse."""
        return 2 * 8 * len(self.at) ** 2

    @property
    def groups(self) -> int:
        """The number of groups of a convolution; 1 for a linear layer."""
        return getattr(self.module, "groups", 1)

    def place(self) -> tuple[Tensor, Tensor]:
        """The group of the layer that each channel ``(units, r)`` belongs to, and its number there."""
        width = self.module.weight.shape[1]
        return self.at // width, self.at % width

    @property
    def deviation(self) -> float:
        """The root of the variances of the layer's outputs, summed."""
        count, sums, squares = self.spread
        return float((squares / count - (sums / count).square()).clamp_min(0).sum().sqrt()) or 1.0

    def weight(self) -> Tensor:
        """The layer's weights, ``(groups, channels of a group, outputs of a group, *kernel)`` float64."""
        own = self.module.weight.detach().to("cpu", torch.float64, copy=True)
        found: Tensor = own.reshape(self.groups, -1, *own.shape[1:]).movedim(2, 1)
        return found

    def columns(self) -> Tensor:
        """The weights of each unit relative to the outputs' deviation, ``(r * outputs of a group * kernel, units)``."""
        return self.weight()[self.place()].flatten(1).mT / self.deviation

    def curvature(self, ridge: float) -> Tensor:
        """Second moments of the inputs, ``(units, units)``: their covariance, where the layer takes a constant."""
        count = self.rows * self.at.shape[1]
        found = self.gram / count
        if self.reader.shift is not None:
            means = self.sums.sum(1) / count
            found = found - torch.outer(means, means)
        which, _ = self.place()
        found = torch.where(which[:, :1] == which[:, 0], found, 0.0)  # weights of other groups cannot take over
        scale = found.diagonal().mean().clamp_min(1e-30)
        return found + ridge * scale * torch.eye(len(found), dtype=torch.float64)

    def changes(self, columns: Tensor, gone: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Changes of the model's tensors, by name, with which the layer does without units.

        Args:
            columns: those that an elimination has left, as ``columns`` gives them.
            gone: which units are no more, bool.
        """
        before, after, place = self.weight(), self.weight(), self.place()
        if self.reader.weight is not None:
            after[place] = (columns * self.deviation).mT.reshape(after[place].shape)
            own = self.module.weight
            yield self.reader.weight, (after - before).movedim(1, 2).reshape(own.shape)
        after[place[0][gone], place[1][gone]] = 0.0
        if self.reader.shift is not None:
            name, sign = self.reader.shift
            means = torch.zeros(before.shape[:2], dtype=torch.float64)
            means[place] = self.sums / self.rows
            lost = (before - after).reshape(*before.shape[:3], -1).sum(3) * means[..., None]
            yield name, sign * lost.sum(1).flatten()


def _sections(network: Network, groups: Sequence[Group]) -> dict[str, list[_Section]]:
    """For each group the layers that read it."""
    some = Edit(network, {group.name: tuple(range(1, group.size)) for group in groups})
    readers, _ = readers_of(some, refit=True)  # whichever units go
    found: dict[str, list[_Section]] = {group.name: [] for group in groups}
    by_channel = {network[name].channel: name for name in found}
    for reader in readers:
        for channel in dict.fromkeys(leaf for leaf in leaves(reader.axis) if leaf in by_channel):
            at = torch.cat(positions_of(reader.axis, channel), 1)
            found[by_channel[channel]].append(_Section(reader, layer_at(network.model, reader.path), at))
    return found


def _add_inputs(network: Network, sections: Mapping[str, list[_Section]], drawn: Samples) -> None:
    """Run the network on samples and add up the sums of each section."""
    by_path: dict[str, list[_Section]] = {}
    for section in [section for some in sections.values() for section in some]:
        by_path.setdefault(section.reader.path, []).append(section)
    generators = {path: torch.Generator().manual_seed(0) for path in by_path}  # whatever layers run beside
    if not by_path:
        return

    def add(reader: Reader, x: Tensor, out: Tensor) -> None:
        path, module = reader.path, by_path[reader.path][0].module
        x, out = (_rows(module, t, generators[path]) for t in (x, out))
        if not bool(x.isfinite().all()):
            raise InputError(f"what '{path}' of {network.model_name} is given on the data is not finite")
        for section in by_path[path]:
            section.add(x, out)

    with hooked(network.model, [some[0].reader for some in by_path.values()], add):
        for _ in outputs_by_batch(network.model, drawn):
            pass


def _rows(module: Layer, t: Tensor, generator: torch.Generator) -> Tensor:
    """Inputs or outputs of a layer at some places, ``(n, channels)``, 32 bits or more."""
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    if not spatial(module):
        return t.reshape(-1, t.shape[-1])
    t = t.reshape(-1, *t.shape[-1 - spatial(module) :]).flatten(2).mT
    if t.shape[1] > POSITIONS:
        t = t[:, torch.randperm(t.shape[1], generator=generator)[:POSITIONS].to(t.device)]
    return t.flatten(0, 1)


# Elimination -------------------------------------------------------------------------------------------------------


@dataclass
class _Eliminated:
    """The units of a group in the order in which they go, and the error of their readers after each.

    Attributes:
        order: units.
        costs: the cost of each unit, in this order.
        counts: how many are gone where the group is measured.
        changes: for each of these counts the changes of the model's tensors, by name.
    """

    order: Tensor
    costs: Tensor
    counts: list[int]
    changes: list[list[tuple[str, Tensor]]]

    def scores(self, effects: Sequence[float]) -> Tensor:
        """Each unit's part of the change of the network's outputs, given the changes at the counts.

        Parts grow along the order: stretches on which they would fall are taken together.
        """
        stretches: list[list[float]] = []  # how many units, and their effect
        done, before = 0, 0.0
        for count, effect in zip(self.counts, effects, strict=False):  # the others were not measured
            stretches.append([count - done, max(0.0, effect - before)])
            done, before = count, max(before, effect)
            while len(stretches) > 1 and stretches[-1][1] * stretches[-2][0] < stretches[-2][1] * stretches[-1][0]:
                units, more = stretches.pop()
                stretches[-1] = [stretches[-1][0] + units, stretches[-1][1] + more]
        stretches[-1][0] += len(self.order) - done  # beyond the last count the last stretch goes on
        found, start = torch.empty_like(self.costs), 0
        for units, effect in stretches:
            stop = start + int(units)
            costs = self.costs[start:stop].clamp_min(0)
            if not float(costs[: min(stop, done) - start].sum()):  # equal for all that is known
                costs = torch.ones_like(costs)
            found[start:stop] = costs * effect / costs[: min(stop, done) - start].sum()
            start = stop
        scores = torch.empty_like(found)
        scores[self.order] = found.cummax(0).values
        return scores


def _counts(size: int, shares: Sequence[float]) -> list[int]:
    """The numbers of units that shares of a group are: at least one, and not all."""
    return sorted({min(max(1, round(share * size)), size - 1) for share in shares})


def _by_norm(norms: Tensor, counts: list[int]) -> _Eliminated:
    """The order of elimination of units that no layer reads."""
    squares = norms.double().square().sort(stable=True)
    return _Eliminated(squares.indices, squares.values, counts, [[] for _ in counts])


def _eliminated(sections: list[_Section], ridge: float, counts: list[int]) -> _Eliminated:
    """The order of elimination of units that some layers read."""
    size = len(sections[0].at)
    inverses = [torch.linalg.inv(section.curvature(ridge)) for section in sections]
    columns = [section.columns() for section in sections]
    gone = torch.zeros(size, dtype=torch.bool)
    order, costs = list[Tensor](), list[Tensor]()
    changes: list[list[tuple[str, Tensor]]] = []
    done = 0
    while done < size:
        each = torch.zeros(size, dtype=torch.float64)
        for inverse, weights in zip(inverses, columns, strict=True):
            each += weights.square().sum(0) / inverse.diagonal()
        each[gone] = math.inf
        until = next((count for count in counts if count > done), size)
        some = each.topk(min(until - done, max(1, (size - done) // _STEPS)), largest=False).indices
        for inverse, weights in zip(inverses, columns, strict=True):
            _eliminate(inverse, weights, some)
        gone[some] = True
        order.append(some)
        costs.append(each[some])
        done += len(some)
        if done in counts:
            pairs = zip(sections, columns, strict=True)
            changes.append([change for section, weights in pairs for change in section.changes(weights, gone)])
    return _Eliminated(torch.cat(order), torch.cat(costs), counts, changes)


def _eliminate(inverse: Tensor, weights: Tensor, some: Tensor) -> None:
    """Update weights ``(rows, units)`` and an inverse ``(units, units)``, in place, to those without some units."""
    rows = inverse[some]
    share = torch.linalg.solve(rows[:, some], rows)
    weights -= weights[:, some] @ share
    inverse -= rows.mT @ share
    weights[:, some] = 0.0
    inverse[some, some] = 1.0


# How much groups matter --------------------------------------------------------------------------------------------


def _weighed(network: Network, found: Mapping[str, _Eliminated], held: Samples, classes: bool) -> Network:
    """Scores: the change of outputs without parts of each group, dealt to units in proportion to their errors."""
    before = list(outputs_by_batch(network.model, held))
    measure = partial(_effect, ModelCode(network.model), network, held=held, before=before, classes=classes)
    bundles = {network.equal_to(name): {o: found[o] for o in network.equal_to(name) if o in found} for name in found}
    effects: dict[tuple[str, ...], list[float]] = {}
    refused: dict[str, str] = {}
    with waiting("reconstruction: groups", len(bundles)) as step:
        for names, together in bundles.items():
            effect, why = measure(together, 0)
            refused.update(why)
            effects[names] = [effect]
            step()
    median = sorted(first for first, *_ in effects.values())[len(effects) // 2]
    scores: dict[str, Tensor] = {}
    for names, together in bundles.items():
        known = effects[names]
        if known[0] <= _LITTLE * median:  # what is free says nothing of what comes after it
            counts = range(1, len(next(iter(together.values())).counts))
            known += [measure(together, place)[0] for place in counts]
        scores.update((name, one.scores([each / len(together) for each in known])) for name, one in together.items())
    scored = network.with_scores(scores, comparable=True)
    return scored.with_locked(refused) if refused else scored


def _effect(
    code: ModelCode,
    network: Network,
    gone: Mapping[str, _Eliminated],
    place: int,
    *,
    held: Samples,
    before: Sequence[object],
    classes: bool,
) -> tuple[float, dict[str, str]]:
    """The change of the network's outputs without some units; or groups whose sizes its code does not follow."""
    keep = {name: tuple(sorted(one.order[one.counts[place] :].tolist())) for name, one in gone.items()}
    edit = Edit(network, keep)
    adaptation, refused = fit_code(code, network, edit.counts)
    if refused:
        return 0.0, refused
    values: dict[str, Tensor] = {}
    for name, change in [change for one in gone.values() for change in one.changes[place]]:
        own = network.tensors[name].detach()
        values[name] = values.get(name, own.double()) + change.to(own.device)
    values = {name: value.to(network.tensors[name].dtype) for name, value in values.items()}
    edit = replace(edit, adaptation=adaptation, values=values)
    found = reported(code.model, edit, held, before=before, classes=classes)
    if found.error is None:
        raise InputError(f"the outputs of {network.model_name} cannot be compared: {found.why}")
    effect = found.error**2 if found.kl is None else found.kl
    if not math.isfinite(effect):
        raise InputError(
            f"the outputs of {network.model_name} are infinite without units of '{next(iter(gone))}' where they were "
            "finite, as if other classes were masked: how much units matter cannot be told; let the model return "
            "logits before they are masked"
        )
    return effect, {}
