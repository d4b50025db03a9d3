"""Incremental width search: layers widen without a change of outputs while that pays, then the widths are trained."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torch.optim import AdamW, Optimizer

from netsurgery.analysis.network import Network
from netsurgery.arguments import is_count
from netsurgery.capture.copies import named_modules
from netsurgery.capture.meta_run import home
from netsurgery.capture.randomness import seeded
from netsurgery.edit import Edit
from netsurgery.errors import InputError
from netsurgery.passes.growing import WidenChannels
from netsurgery.passes.losses import Loss
from netsurgery.passes.parameters import own_module
from netsurgery.passes.patterns import Modules
from netsurgery.passes.progress import Report
from netsurgery.pipeline import apply, cost, trace
from netsurgery.search.candidates import as_names
from netsurgery.search.fitting import Fitting
from netsurgery.search.growing import carried_out, outside_inference_mode, prepared
from netsurgery.search.outcome import Growth
from netsurgery.search.rounds import trial_seed
from netsurgery.search.trials import copied, threads_of_torch
from netsurgery.tables import columns

__all__ = ["Trained", "WidthSearch", "Widths", "uniform"]

_WIDEST = 2.0**20
_STEPS = 40  # halvings of the interval in which the factor of uniform widths is looked for


@dataclass(frozen=True)
class Trained:
    """A network that was trained from new weights.

    Attributes:
        loss: the mean loss on held-out samples.
        accuracy: in percent, on held-out samples; None where targets are no classes.
    """

    model: nn.Module = field(repr=False)
    params: int
    macs: int
    loss: float
    accuracy: float | None


@dataclass(frozen=True)
class Widths:
    """The result of a width search.

    Attributes:
        growth: the rounds, and the network that they led to, with the weights that it has from them.
        found: its widths, trained from new weights.
        uniform: your network with the same factor on all widths and at most as many parameters, trained likewise.
    """

    growth: Growth
    found: Trained
    uniform: Trained

    @property
    def widths(self) -> dict[str, int]:
        """Units of each group that could grow."""
        return dict(self.growth.best.widths)

    def __str__(self) -> str:
        rows = [("from new weights", "parameters", "MACs", "held-out loss", "accuracy %")]
        for name, one in (("found widths", self.found), ("uniform widths", self.uniform)):
            accuracy = "-" if one.accuracy is None else f"{one.accuracy:.2f}"
            rows.append((name, f"{one.params:,}", f"{one.macs:,}", f"{one.loss:.4f}", accuracy))
        return f"{self.growth}\n\n{columns(rows, (1, 2, 3, 4))}"

    def plot(self, path: str | Path) -> None:
        """Write a picture (PNG) of the rounds, as ``Growth.plot`` does."""
        self.growth.plot(path)


class WidthSearch:
    """Search the widths of a network under a budget: widen where it pays most, then train what was found anew.

    In each round every layer's channels are a candidate: they are widened by copies, which changes no output, all of
    the network is trained for some epochs, and the loss on held-out samples is measured. The candidate that lowers it
    most for each added parameter stays. At the budget, or after ``patience`` rounds without a lower loss, the widths
    found are trained from new weights, beside uniform widths of at most as many parameters.

    Args:
        net: the network to begin with; any module that returns logits ``(n, classes, ...)``.
        data: samples with targets, as for ``netsurgery.grow``.
        example_inputs: as for ``netsurgery.grow``.
        budget: the most that it may have: ``dict(params=...)``, ``dict(macs=...)``, or both in one.
        factor: by which a layer widens in a round.
        multiple_of: channels are rounded up to a multiple of this.
        noise: how much the shares differ that consumers take from copies, as for ``WidenChannels``.
        epochs: that a candidate is trained; the learning rate falls to 0 along a cosine.
        retrain: epochs from new weights.
        reset: gives a network new weights, ``reset(model)``; by default ``reset_parameters`` of every module.
        by: as for ``netsurgery.grow``.
        patience: likewise.
        candidates: likewise.
        include: modules that may widen, as for ``WidenChannels``.
        exclude: modules that may not.
        optimizer: of all parameters, as for ``netsurgery.grow``.
        lr: learning rate at the start of each training.
        batch_size: samples in a step.
        loss: as for ``netsurgery.grow``.
        validation: likewise.
        log: likewise; it holds the rounds. Training from new weights is done again after an interruption.
        executor: likewise, for candidates.
        threads: likewise.
        seed: likewise.
        progress: likewise.

    Raises:
        InputError: as for ``netsurgery.grow``; and modules that hold weights without ``reset_parameters``.

    Example:
        >>> import torch
        >>> from netsurgery.search import WidthSearch
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(120, 4), torch.arange(120) % 3
        >>> x[:, 0] += y
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
        >>> search = WidthSearch(net, (x, y), budget=dict(params=70), multiple_of=2, log=None, progress=False)
        >>> result = search.run()
        >>> [one.params for one in result.growth.history], result.uniform.params <= result.found.params
        ([35, 51, 67], True)

    Source: FIS, functionally incremental search, arXiv 1909.01861: widen without a change
    of the function, and search nothing but the numbers of channels, under a budget of parameters. Widening is
    Net2WiderNet, arXiv 1511.05641. Not given by the source, and ours: the factor of 1.25 and multiples of 8, gain for
    each parameter as the score, the length of all trainings, and the comparison with uniform widths.
    """

    def __init__(
        self,
        net: nn.Module,
        data: Any,
        example_inputs: Any = None,
        *,
        budget: Mapping[str, int],
        factor: float = 1.25,
        multiple_of: int = 8,
        noise: float = 0.3,
        epochs: int = 3,
        retrain: int = 30,
        reset: Callable[[nn.Module], object] | None = None,
        by: Literal["loss", "gain"] = "gain",
        patience: int = 3,
        candidates: int | None = None,
        include: Modules = (),
        exclude: Modules = (),
        optimizer: Callable[..., Optimizer] = AdamW,
        lr: float = 3e-3,
        batch_size: int = 64,
        loss: Loss | None = None,
        validation: Any = 0.2,
        log: str | Path | None = None,
        executor: Executor | None = None,
        threads: int = 1,
        seed: int = 0,
        progress: bool = True,
    ):
        fitting = Fitting(epochs, batch_size, optimizer, lr, loss)
        if not is_count(retrain, 1):
            raise InputError(f"retrain={retrain!r}: a whole number of at least 1")
        self._longer = Fitting(retrain, batch_size, optimizer, lr, loss)
        self._reset = reset_all if reset is None else reset
        self._search = prepared(
            "WidthSearch",
            net,
            data,
            example_inputs,
            teacher=None,
            budget=budget,
            growth=functools.partial(_widens, factor, multiple_of, noise, include, exclude),
            only_new=False,
            fitting=fitting,
            validation=validation,
            patience=patience,
            by=by,
            candidates=candidates,
            threads=threads,
            seed=seed,
        )
        self._log, self._executor, self._progress = log, executor, progress
        self._renewed(own_module(net))  # whether it can be is known before any work

    @outside_inference_mode()
    def run(self) -> Widths:
        """Search, or go on with it, and train what was found.

        Raises:
            InputError: as for ``netsurgery.grow``.
            NetsurgeryError: likewise.
        """
        report = Report(self._progress, "width search")
        growth = carried_out(self._search, self._log, self._executor, report)
        net, inputs, widen = self._search.setting.net, self._search.inputs, self._search.growth(0)
        assert isinstance(widen, WidenChannels)
        wider = uniform(widen, trace(net, inputs, try_sizes=False), growth.best.params)
        other = net if wider is None else apply(net, [wider], inputs)
        return Widths(growth, self._trained(growth.model), self._trained(other))

    @outside_inference_mode()
    def _renewed(self, model: nn.Module) -> nn.Module:
        """A copy with new weights."""
        fresh = copied(model)
        with seeded(trial_seed(self._search.seed, "weights"), home(fresh)):
            self._reset(fresh)
        return fresh

    def _trained(self, model: nn.Module) -> Trained:
        setting, found = self._search.setting, self._renewed(model)
        with threads_of_torch(setting.threads):
            self._longer.fit(found, setting.split, trial_seed(self._search.seed, "retrain"))
            measured = self._longer.measure(found, setting.split.held)
        price = cost(found, self._search.inputs)
        return Trained(found, price.params, price.macs, measured.loss, measured.accuracy)


def uniform(growth: WidenChannels, network: Network, most: int) -> WidenChannels | None:
    """The same factor for all widths: the largest with at most so many parameters; None where it adds no unit.

    Args:
        growth: says which modules are meant; its factor does not count.
        network: that is widened.
    """

    def of(factor: float) -> WidenChannels:
        return replace(growth, factor=factor, multiple_of=1, noise=0.0)

    def priced(factor: float) -> int:
        return Edit(network, widened(of(factor), network)).after.params

    low, high = 1.0, 2.0
    while priced(high) <= most and high < _WIDEST:
        low, high = high, 2 * high
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if priced(middle) <= most else (low, middle)
    return of(low) if widened(of(low), network) else None


def _widens(
    factor: float, multiple_of: int, noise: float, include: Modules, exclude: Modules, net: nn.Module
) -> Callable[[int], WidenChannels]:
    """The pass that widens every group, by its seed; modules are named, so that it holds for copies."""
    WidenChannels(factor, multiple_of=multiple_of, noise=noise)
    if factor <= 1 and multiple_of <= 1:
        raise InputError(f"factor={factor!r}: a number above 1")
    return functools.partial(_widening, factor, multiple_of, noise, as_names(net, include), as_names(net, exclude))


def _widening(
    factor: float, multiple_of: int, noise: float, include: Modules, exclude: Modules, seed: int
) -> WidenChannels:
    return WidenChannels(factor, multiple_of=multiple_of, noise=noise, include=include, exclude=exclude, seed=seed)


def widened(growth: WidenChannels, network: Network) -> Any:
    """The units of groups that a pass would widen; none where the factor adds less than one to each."""
    names = [group.name for group in network.prunable]
    if all(len(units) == network[name].size for name, units in growth.units(network, names).items()):
        return {}
    try:
        return growth.run(network).keep
    except InputError:  # what is meant by include and exclude is too small for the factor
        return {}


def reset_all(model: nn.Module) -> None:
    """Give every module the weights that its constructor draws.

    Raises:
        InputError: a module holds weights of its own, and has no ``reset_parameters``.
    """
    for path, module in named_modules(model).items():
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if reset is not None:
            reset()
        elif module._parameters or module._buffers:
            raise InputError(
                f"'{path or 'the network itself'}' ({type(module).__name__}) has no reset_parameters, by which weights "
                "are drawn anew: "
                "pass reset=f(model)"
            )
