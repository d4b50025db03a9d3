"""What a removal loses is made up for where it was read: in the biases of those layers, or in their weights."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from netsurgery.check import adapt
from netsurgery.compensated import Compensation, LayerError, Taken
from netsurgery.copying import named_tensors
from netsurgery.cutting import Positions
from netsurgery.edit import Edit
from netsurgery.passes.least_squares import Change, Sums, bytes_of
from netsurgery.passes.lost import Lost
from netsurgery.passes.readers import Reader, readers_of
from netsurgery.passes.samples import draw_inputs, in_eval_mode
from netsurgery.rewriting import rewrite

__all__ = ["Method", "compensate"]

Method = Literal["bias", "least-squares"]
_log = logging.getLogger("netsurgery")
_LEVELS: tuple[Taken, ...] = ("nothing", "constant", "weights")
_FACTORS = 1, 10, 100  # of the ridge, that are tried


def compensate(
    edit: Edit,
    method: Method,
    data: Any,
    samples: int = 512,
    ridge: float = 1e-2,
    seed: int = 0,
    memory: int = 1 << 30,
) -> Edit:
    """An edit with new values (made anew, if it has some) for the layers that read what it removes.

    The original network runs over the data once, in eval mode. For each of these layers, X are those of its inputs that
    stay and R is what its outputs lack without the others, in the original. Damage that was done further up is not made
    up for: it makes outputs vary less, and with their means brought back all the same, units that fire by their spread
    (below a ReLU most do) fall silent, layer after layer, until the network answers alike to every sample.

    Args:
        method: "bias" adds the mean of R to every output of such a layer, by its bias or else by the running mean of
            the batch norm that follows. "least-squares" also refits its weights: the changes W' and b' minimise
            ``|R - X W' - b'|^2 + ridge * mean(X^2) * |W'|^2``, summed over the data.
        data: as for ``netsurgery.passes.samples.draw_inputs``: inputs, with targets or without. They are drawn as they
            come, not class-balanced: the means are those over the data.
        samples: how many are drawn.
        ridge: positive; keeps weights that the data says nothing of as they are.
        memory: bytes that the sums over the data take at most; where those of all layers do not fit, the network runs
            several times. A layer whose sums alone do not fit gets a constant only.

    A fifth of the samples is held back. On these, the error of each layer decides between weights (with the ridge, or
    ten or a hundred times that), a constant, and nothing; what is taken is then fitted to all samples. If the outputs
    of the whole network, fitted without them, are no nearer to the original's, constants alone are tried, and else
    nothing is changed. ``edit.compensations`` has these errors. Of a layer with large outputs, 128 positions of each
    sample are looked at, drawn at random.

    Where a layer cannot be compensated in this way, ``edit.uncompensated`` says why, and the logger ``netsurgery`` too.

    Source: the least squares of He, Zhang and Sun (Channel Pruning for Accelerating Very Deep Neural Networks, arXiv
    1707.06168) and of ThiNet (Luo, Wu and Lin, arXiv 1707.06342), which fit layer after layer; the original's inputs,
    the ridge's ladder and what is held back are our choice.
    """
    network = edit.network
    adaptation, refused = adapt(network.model, network, edit.counts)
    if refused or not edit.keep:  # what the code does not follow is frozen by plan, and this asked for again
        return edit
    edit = dataclasses.replace(edit, adaptation=adaptation, values={}, uncompensated={}, compensations=())
    readers, left = readers_of(edit, refit=method == "least-squares")
    small = rewrite(network.model, edit)
    lost = Lost(edit, small, draw_inputs(data, samples, seed))
    with in_eval_mode(network.model), in_eval_mode(small), torch.no_grad():
        fits = [_Fit.of(reader, *sums, ridge) for reader, sums in _measured(lost, readers, left, memory)]
        taken, before, after = _compared(lost, fits)
    values, places = _changed(small, fits, taken, final=True), Positions(edit)
    values = {name: places.put(network.tensors[name], network.axes[name], value) for name, value in values.items()}
    if fits:
        left.update({fit.reader.path: why for fit in fits if (why := fit.left(taken))})
        gain = Compensation(tuple(fit.error(taken) for fit in fits), taken, before, after, lost.drawn.count)
        edit = dataclasses.replace(edit, compensations=(gain,))
    if left:
        _log.warning("not compensated: %s", "; ".join(f"{name}: {why}" for name, why in left.items()))
    return dataclasses.replace(edit, values=values, uncompensated=left)


# Layers ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Fit:
    """What one layer lacks, and the changes that make up for it.

    Attributes:
        trial: by level, what is added to it as the samples say that are not held back.
        final: likewise, as all samples say.
        errors: by level, what outputs lack on the samples that were held back after the trial's change.
        ridge: of the refit.
    """

    reader: Reader
    trial: Mapping[Taken, Change]
    final: Mapping[Taken, Change]
    errors: Mapping[Taken, float]
    ridge: float | None

    @classmethod
    def of(cls, reader: Reader, fit: Sums, held: Sums, ridge: float) -> _Fit:
        """Fit to some sums, choose the ridge by others, and fit to both."""
        both, shift = fit + held, reader.shift is not None
        trial: dict[Taken, Change] = {"nothing": Change()}
        final = dict(trial)
        if shift:
            trial["constant"], final["constant"] = fit.constant(), both.constant()
        chosen: float | None = None
        if reader.weight:
            chosen, trial["weights"] = _refit(fit, held, ridge, shift)
            final["weights"] = both.refit(chosen, shift)
        scale = held.variance or 1.0
        return cls(reader, trial, final, {level: held.error(one) / scale for level, one in trial.items()}, chosen)

    def level(self, most: Taken) -> Taken:
        """What leaves the smallest error of all that is not above what the network as a whole gains by."""
        allowed = [level for level in self.errors if _LEVELS.index(level) <= _LEVELS.index(most)]
        return min(allowed, key=lambda level: self.errors[level])

    def error(self, most: Taken) -> LayerError:
        """The layer's errors before and after."""
        level = self.level(most)
        ridge = self.ridge if level == "weights" else None
        return LayerError(self.reader.path, self.errors["nothing"], self.errors[level], level, ridge)

    def left(self, most: Taken) -> str:
        """Why the layer is left as it is, if it is."""
        if self.level(most) != "nothing" or not self.errors["nothing"]:
            return ""
        if self.level("weights") == "nothing":
            return "its outputs are no nearer to the original's on samples that were held back"
        return "the network's outputs are no nearer to the original's on samples that were held back"


def _refit(fit: Sums, held: Sums, ridge: float, shift: bool) -> tuple[float, Change]:
    """The ridge after which the error on samples that were held back no longer falls, and the change it leads to."""
    best, found = ridge * _FACTORS[0], fit.refit(ridge * _FACTORS[0], shift)
    for factor in _FACTORS[1:]:
        other = fit.refit(factor * ridge, shift)
        if held.error(other) >= held.error(found):
            break
        best, found = factor * ridge, other
    return best, found


def _measured(
    lost: Lost, readers: list[Reader], left: dict[str, str], memory: int
) -> Iterable[tuple[Reader, tuple[Sums, Sums]]]:
    """The sums of each layer, by samples that are fitted to and held back; what has none is left, with the reason."""
    for portion in _portions(lost.small, readers, left, memory):
        for reader, both in zip(portion, lost.sums(portion), strict=True):
            some = [one for one in both if one is not None]
            if not some:
                left[reader.path] = "it does not run as a module in eval mode"
            elif not all(one.finite for one in some):
                left[reader.path] = "its inputs or outputs are not finite on the data"
            else:
                yield reader, (some[0], some[-1])


def _portions(small: nn.Module, readers: list[Reader], left: dict[str, str], memory: int) -> Iterable[list[Reader]]:
    """Layers whose sums fit into the memory together."""
    portion: list[Reader] = []
    used = 0
    for reader in readers:
        module = small.get_submodule(reader.path)
        size = bytes_of(module, refit=reader.weight is not None)
        if reader.weight and size > memory:
            only = "only a constant was compensated" if reader.shift else "and it takes no constant"
            left[reader.path] = f"its refit needs {size:,} bytes, more than memory={memory:,}: {only}"
            if reader.shift is None:
                continue
            reader, size = dataclasses.replace(reader, weight=None), bytes_of(module, refit=False)
        if portion and used + size > memory:
            yield portion
            portion, used = [], 0
        portion.append(reader)
        used += size
    if portion:
        yield portion


# The network -------------------------------------------------------------------------------------------------------


def _changed(small: nn.Module, fits: list[_Fit], most: Taken, final: bool) -> dict[str, Tensor]:
    """The new values of the smaller network's tensors."""
    tensors, found = dict(named_tensors(small)), {}
    for fit in fits:
        change = (fit.final if final else fit.trial)[fit.level(most)]
        if change.weights is not None and fit.reader.weight:
            old = tensors[fit.reader.weight]
            found[fit.reader.weight] = (old.double() + change.weights.mT.reshape(old.shape)).to(old.dtype)
        if change.constant is not None and fit.reader.shift:
            name, sign = fit.reader.shift
            old = tensors[name]
            found[name] = (old.double() + sign * change.constant.flatten()).to(old.dtype)
    return found


def _compared(lost: Lost, fits: list[_Fit]) -> tuple[Taken, float, float]:
    """What brings the network's outputs nearest to the original's, and how far they are before and after."""
    levels = [level for level in _LEVELS if level == "nothing" or any(fit.level(level) == level for fit in fits)]
    gaps = dict(
        zip(levels, lost.gaps([_changed(lost.small, fits, level, final=False) for level in levels]), strict=True)
    )
    if any(math.isnan(gap) for gap in gaps.values()):
        return levels[-1], math.nan, math.nan
    best = min(levels, key=lambda level: gaps[level])
    return best, gaps["nothing"], gaps[best]
