"""Compensation of a removal in the layers that read the units: in their biases, or in their weights."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from netsurgery.adaptation.fit_code import fit_code
from netsurgery.adaptation.model_code import ModelCode
from netsurgery.arguments import is_real
from netsurgery.compensated import Compensation
from netsurgery.edit import Edit
from netsurgery.errors import InputError
from netsurgery.passes.calibration import draw_inputs, in_eval_mode
from netsurgery.passes.fits import LEVELS, Fit
from netsurgery.passes.in_order import InOrder
from netsurgery.passes.least_squares import POSITIONS, Change, Sums, bytes_of
from netsurgery.passes.lost import Lost
from netsurgery.passes.portions import portions
from netsurgery.passes.readers import Reader, readers_of
from netsurgery.passes.reporting import DataPass
from netsurgery.rewriting.surgery import rewrite

__all__ = ["Compensate", "Method", "check_ridge", "compensate"]

Method = Literal["bias", "least-squares"]
_log = logging.getLogger("netsurgery")


@dataclass(frozen=True)
class Compensate(DataPass):
    """Compensate for a removal in the layers that read the removed units: see ``compensate`` below.

    Args:
        method: "bias" changes a constant for each output of such a layer; "least-squares" also refits its weights.
        data: what this is measured on, in eval mode: a DataLoader, Dataset, tensor or pair of tensors, as for
            ``netsurgery.passes.calibration.draw_inputs``; it needs no labels. ``edit.measured`` is measured on it too.
        samples: how many samples of it, drawn at random whatever their classes.
        ridge: of the refit, relative to the mean square of a layer's inputs: holds weights near what they were where
            the data says little; ten and a hundred times as much are tried too.
        memory: bytes that the sums for the refit take at most.

    ``PruneChannels(..., compensate=method, data=data)`` does the same in one.

    Raises:
        InputError: a number out of range, no data, or data that can be read once.

    Source: He, Zhang and Sun, arXiv 1707.06168, and ThiNet (Luo, Wu and Lin), arXiv 1707.06342, as for ``compensate``.

    Example:
        >>> import torch, netsurgery
        >>> from netsurgery.passes import Compensate, MagnitudeScore, PruneChannels
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> passes = [MagnitudeScore(), PruneChannels(0.5), Compensate("least-squares", torch.randn(200, 4))]
        >>> (found,) = netsurgery.plan(model, passes).compensations
        >>> found.after < found.before
        True
    """

    method: Method
    data: object = field(repr=False, compare=False)
    samples: int = 512
    ridge: float = 1e-2
    memory: int = 1 << 30

    needs: ClassVar[frozenset[str]] = frozenset({"edit"})
    gives: ClassVar[frozenset[str]] = frozenset({"edit"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in get_args(Method):
            raise InputError(f"Compensate({self.method!r}): 'bias' or 'least-squares'")
        if self.data is None:
            raise InputError("Compensate(data=None): pass the inputs that it is measured on")
        check_ridge("Compensate", self.ridge)

    def run(self, network: Edit) -> Edit:
        """The edit with new values."""
        return compensate(network, self.method, self.data, self.samples, self.ridge, self.seed, self.memory)


def check_ridge(who: str, ridge: float) -> None:
    """Make sure that the ridge is positive."""
    if not is_real(ridge) or not ridge > 0:
        raise InputError(f"{who}(ridge={ridge!r}): must be positive")


def compensate(
    edit: Edit,
    method: Method,
    data: object,
    samples: int = 512,
    ridge: float = 1e-2,
    seed: int = 0,
    memory: int = 1 << 30,
) -> Edit:
    """An edit with new values for the layers that read the removed units; values that it has are replaced.

    One run of the original network over the data, in eval mode, serves all layers (a few more of both networks compare
    their outputs, and fit layers in order). For each of these layers, X are those of its inputs that
    stay, and R are the parts of its outputs, in the original, that come from the others.

    Args:
        method: "bias" adds the mean of R to every output of such a layer, by its bias or else by the running mean of
            the batch norm that follows. "least-squares" also refits its weights: the changes W' and b' minimise
            ``|R - X W' - b'|^2 + ridge * mean(X^2) * |W'|^2``, summed over the data.
        data: as for ``netsurgery.passes.calibration.draw_inputs``: inputs, with targets or without. They are drawn as
            they come, not class-balanced: the means are those over the data.
        samples: how many are drawn.
        ridge: positive; keeps weights that the data says nothing of as they are.
        memory: bytes that the sums over the data take at most; where those of all layers do not fit, the network runs
            several times. A layer whose sums alone do not fit gets a constant only.

    A fifth of the samples is held back. On these, the error of each layer decides between weights (with the ridge, or
    ten or a hundred times that), a constant, and nothing; what is taken is then fitted to all samples. The outputs of
    the whole network, fitted without them, must be nearer to the original's than without compensation: else constants
    alone are tried, and then nothing is changed. In large outputs of a layer, 128 positions of each sample are looked
    at, drawn at random. ``edit.compensations`` has the errors.

    Where all samples fit into the memory at once, layers are also fitted one after the other, X being their inputs in
    the smaller network and R what their outputs then lack; this is taken if it brings the network nearer. It is not
    always better: losses in earlier layers make outputs vary less, and with their means brought back all the same,
    units that fire by their spread (below a ReLU most do) fall silent, until all samples have the same outputs.

    Where a layer cannot be compensated in this way, ``edit.uncompensated`` says why, and the logger ``netsurgery`` too.
    An edit that the model's code does not follow has no new values, and ``uncompensated`` names the groups.

    Source: the least squares of He, Zhang and Sun (Channel Pruning for Accelerating Very Deep Neural Networks, arXiv
    1707.06168) and of ThiNet (Luo, Wu and Lin, arXiv 1707.06342), which fit layer after layer. The original's inputs,
    the ridges and what is held back are our choice.
    """
    network = edit.network
    if edit.grown:
        raise InputError(
            f"'{edit.grown[0]}' gets more units, which needs no compensation: compensate the removal alone"
        )
    if not edit.keep:
        return edit
    if (adaptation := edit.adaptation_for(network.model)) is None:
        adaptation, refused = fit_code(ModelCode(network.model), network, edit.counts)
        if refused:  # plan locks these groups, and asks for this again
            whys = (f"group '{name}' cannot have {edit.counts[name]} units: {why}" for name, why in refused.items())
            return dataclasses.replace(edit, uncompensated={**edit.uncompensated, network.model_name: "; ".join(whys)})
    edit = dataclasses.replace(edit, adaptation=adaptation, values={}, uncompensated={}, compensations=())
    readers, left = readers_of(edit, refit=method == "least-squares")
    small = rewrite(network.model, edit)
    lost = Lost(edit, small, draw_inputs(data, samples, seed))
    with in_eval_mode(network.model), in_eval_mode(small), torch.no_grad():
        fits = [Fit.of(reader, *sums, ridge) for reader, sums in _measured(lost, readers, left, memory)]
        values, gains = _best(lost, fits, left, memory) if fits else ({}, ())
    if left:
        _log.warning("not compensated: %s", "; ".join(f"{name}: {why}" for name, why in left.items()))
    places = edit.positions
    values = {name: places.put(network.tensors[name], network.axes[name], value) for name, value in values.items()}
    return dataclasses.replace(edit, values=values, uncompensated=left, compensations=gains)


def _measured(
    lost: Lost, readers: list[Reader], left: dict[str, str], memory: int
) -> Iterable[tuple[Reader, tuple[Sums, Sums]]]:
    """The sums of each layer over fitted and held-back samples; the reasons for layers without finite sums."""
    for portion in portions(_sized(lost, readers, left, memory), memory):
        for reader, both in zip(portion, lost.sums(portion), strict=True):
            some = [one for one in both if one is not None]
            if not some:
                left[reader.path] = "it does not run as a module in eval mode"
            elif not all(one.finite for one in some):
                left[reader.path] = "its inputs or outputs are not finite on the data"
            else:
                yield reader, (some[0], some[-1])


def _sized(lost: Lost, readers: list[Reader], left: dict[str, str], memory: int) -> Iterable[tuple[Reader, int]]:
    """Layers with the bytes of their sums; where the sums of a refit do not fit, those of a constant."""
    for reader in readers:
        module = lost.layer(reader)
        size = bytes_of(module, refit=reader.weight is not None)
        if reader.weight and size > memory:
            only = "only a constant was compensated" if reader.shift else "and it takes no constant"
            left[reader.path] = f"its refit needs {size:,} bytes, more than memory={memory:,}: {only}"
            if reader.shift is None:
                continue
            reader, size = dataclasses.replace(reader, weight=None), bytes_of(module, refit=False)
        yield reader, size


def _best(
    lost: Lost, fits: Sequence[Fit], left: dict[str, str], memory: int
) -> tuple[dict[str, Tensor], tuple[Compensation]]:
    """The values that bring the network's outputs nearest to the original's, and their distance."""
    levels = [level for level in LEVELS if level == "nothing" or any(fit.level(level) == level for fit in fits)]
    trials = {level: _values(lost, [fit.trial[fit.level(level)] for fit in fits], fits) for level in levels}
    gaps = dict(zip(levels, lost.gaps([trials[level] for level in levels]), strict=True))
    known = not any(math.isnan(gap) for gap in gaps.values())
    taken = min(levels, key=lambda level: gaps[level]) if known else levels[-1]
    after, in_order = gaps[taken], False
    values = _values(lost, [fit.final[fit.level(taken)] for fit in fits], fits)
    if known and taken != "nothing" and lost.count > 1 and _bytes(lost, fits) <= memory:
        chosen = {fit.reader.path: fit.chosen(taken) for fit in fits if fit.level(taken) != "nothing"}
        with contextlib.suppress(InputError):  # not every model takes all samples at once
            order = InOrder(lost, chosen)
            gap = lost.gaps([{**trials[taken], **order.fit(trials[taken], order.fitted)}])[0]
            if gap < after:
                values, after, in_order = {**values, **order.fit(values, order.all)}, gap, True
    if taken != levels[-1]:
        only = "nothing was changed" if taken == "nothing" else "only constants were compensated"
        left[lost.name] = f"its outputs are no nearer to the original's on samples that were held back: {only}"
    left.update({fit.reader.path: why for fit in fits if (why := fit.left)})
    layers = tuple(fit.error(taken) for fit in fits)
    return values, (Compensation(layers, taken, gaps["nothing"], after, lost.drawn.count, in_order),)


def _bytes(lost: Lost, fits: Sequence[Fit]) -> int:
    """An estimate of the bytes of all samples at once: wanted outputs of layers, and a few of the largest tensors."""
    most, outputs = lost.drawn.count * POSITIONS, 0
    for fit in fits:
        outputs += min(fit.rows, most) * len(lost.layer(fit.reader).weight)
    return 4 * (outputs + lost.drawn.count * lost.largest)


def _values(lost: Lost, changes: Sequence[Change], fits: Sequence[Fit]) -> dict[str, Tensor]:
    """New values of the smaller network's tensors."""
    found: dict[str, Tensor] = {}
    for fit, change in zip(fits, changes, strict=True):
        found.update(fit.reader.changed(lost.tensors, change))
    return found
