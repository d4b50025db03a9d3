"""Channel planting as it was published: a network grows in rounds, and only what is new is trained."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

import netsurgery
from netsurgery.arguments import expect, is_count, is_real
from netsurgery.capture.inputs import as_inputs
from netsurgery.errors import InputError
from netsurgery.passes.calibration import Samples
from netsurgery.passes.distillation import Distillation
from netsurgery.passes.growing import PlantChannels
from netsurgery.passes.losses import Loss, check_targets
from netsurgery.passes.parameters import own_module
from netsurgery.passes.patterns import Modules
from netsurgery.passes.progress import Report
from netsurgery.search.candidates import Budget, as_names
from netsurgery.search.fitting import Fitting
from netsurgery.search.journal import Journal
from netsurgery.search.outcome import Growth
from netsurgery.search.rounds import Rounds, Search, check_settings, parcel
from netsurgery.search.split import Split, logits_of, read
from netsurgery.search.trials import Setting, copied

__all__ = ["carried_out", "grow", "outside_inference_mode", "prepared"]


def grow(
    net: nn.Module,
    data: Any,
    teacher: nn.Module | None = None,
    example_inputs: Any = None,
    *,
    budget: Mapping[str, int],
    amount: int | Mapping[Any, int] = 8,
    epochs: int = 3,
    patience: int = 3,
    by: Literal["loss", "gain"] = "loss",
    candidates: int | None = None,
    include: Modules = (),
    exclude: Modules = (),
    optimizer: Callable[..., Optimizer] = AdamW,
    lr: float = 3e-3,
    batch_size: int = 64,
    loss: Loss | None = None,
    distillation: Distillation | None = None,
    validation: Any = 0.2,
    log: str | Path | None = None,
    executor: Executor | None = None,
    threads: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> Growth:
    """Grow a network in rounds: plant channels, train these alone, keep the planting that helps most.

    In each round every group of channels that can grow is a candidate, or some that are drawn: new channels are planted
    in a copy (``Planting``), only these are trained for some epochs, and the loss on samples held out is measured. The
    best stays for good: its entries are fixed in later rounds. That ends at the budget, or after ``patience`` rounds
    that have not lowered the loss.

    The network, the teacher, the data and the state of random number generators stay as they were. On a CPU the result
    follows from the arguments bit by bit, whatever executes it and however often it was interrupted.

    Args:
        net: the network to begin with, trained already; any module that returns logits ``(n, classes, ...)``.
        data: samples with targets, as ``LossIncreaseScore`` takes them. All are read once, into memory: random
            transforms of a dataset are applied once, and a teacher is asked once.
        teacher: a larger network for the same classes; its logits take part in the loss of the candidates.
        example_inputs: as for ``trace``; by default the first sample. MACs are those of one run on them.
        budget: the most that the grown network may have: ``dict(params=200_000)``, ``dict(macs=...)``, or both in one.
        amount: new channels of each candidate, or by modules, as for ``PlantChannels``.
        epochs: that a candidate is trained. The learning rate falls to 0 along a cosine.
        patience: rounds without a lower loss on held-out samples, after which the search stops.
        by: what decides: the lowest "loss" on held-out samples, or the highest "gain", which is how much lower it is
            for each parameter that is added.
        candidates: how many groups are tried in a round, drawn anew in each; None: all.
        include: modules that may grow, as for ``PlantChannels``.
        exclude: modules that may not.
        optimizer: makes an optimizer of the new entries, called as ``optimizer(parameters, lr=lr)``: a class, or
            ``functools.partial(torch.optim.SGD, momentum=0.9)``. They are vectors: what works on matrices is refused.
        lr: learning rate at the start of each candidate.
        batch_size: samples in a step.
        loss: ``loss(outputs, targets)`` in place of the cross-entropy, on held-out samples and where no teacher is.
        distillation: the loss with a teacher, without hints; by default ``Distillation()``.
        validation: the share of each class of the data that is held out, or other samples to compare candidates on.
            Let them be samples that ``net`` has not been trained on: of others it knows the answers already.
        log: file for a line of JSON for each candidate and round, such as ``growth.jsonl``. Weights lie beside it,
            ``growth.weights/``, one file for each round. Where it is there, the search goes on from there: what it
            lacks is worked out. The log of a search with other settings, data or code of ``loss`` and ``optimizer`` is
            refused.
        executor: where candidates are trained: ``concurrent.futures.ProcessPoolExecutor(4, context)`` with the
            ``multiprocessing.get_context("spawn")``, or a cluster's (``dask.distributed.Client(...).get_executor()``);
            None: here, one after the other. In threads of one process they take turns, since random numbers are the
            process's.
        threads: of torch, for each candidate: the last bits of sums depend on them.
        seed: fixes the split, the draws of candidates, new weights and the order of samples.
        progress: show how far the search is, on a terminal or through the logger ``netsurgery``.

    Returns:
        The network with the lowest held-out loss (``.model``, a copy in the mode of ``net``), the rounds
        (``.history``), and why it stopped. ``print`` shows a table; ``.plot("widths.png")`` draws it.

    Raises:
        InputError: a budget under the present size, or with no room for any candidate; a teacher of other classes; data
            without labels; nothing that can grow, with the reasons; a number out of range; a log that cannot be
            written, or that is of another search; what cannot be sent to the executor's processes.
        NetsurgeryError: a worker of the executor died, or the disk is full: the same call goes on.

    Example:
        >>> import torch, netsurgery
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(120, 4), torch.arange(120) % 3
        >>> x[:, 0] += y  # so that there is something to learn
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.ReLU(), torch.nn.Linear(2, 3))
        >>> result = netsurgery.grow(net, (x, y), budget=dict(params=45), amount=1, log=None, progress=False)
        >>> [one.params for one in result.history], result.why
        ([19, 27, 35, 43], 'every further growth is over the budget')

    Source: channel planting with knowledge distillation, Mitsuno and Kurita, arXiv 2011.02390: channels are added step
    by step while earlier ones stay fixed, new ones learn from a teacher, and the growth searches the architecture. Not
    given by the source, and ours: new channels begin with consumers at zero, what is a candidate, held-out loss or gain
    as the judge, budget and patience, the learning rate's cosine, and all defaults.
    """
    search = prepared(
        "grow",
        net,
        data,
        example_inputs,
        teacher=teacher,
        budget=budget,
        growth=functools.partial(_plants, amount, include, exclude),
        only_new=True,
        fitting=Fitting(epochs, batch_size, optimizer, lr, loss, distillation),
        validation=validation,
        patience=patience,
        by=by,
        candidates=candidates,
        threads=threads,
        seed=seed,
    )
    return carried_out(search, log, executor, Report(progress, "grow"))


def _plants(amount: Any, include: Modules, exclude: Modules, net: nn.Module) -> Callable[[int], PlantChannels]:
    """The pass that plants in every group, by its seed; modules are named, so that it holds for copies."""
    if isinstance(amount, Mapping):
        amount = {(as_names(net, key) if isinstance(key, nn.Module) else key): count for key, count in amount.items()}
    elif not is_count(amount, 1):
        raise InputError(f"amount={amount!r}: a whole number of at least 1, or one by modules")
    return functools.partial(_planting, amount, as_names(net, include), as_names(net, exclude))


def _planting(amount: Any, include: Modules, exclude: Modules, seed: int) -> PlantChannels:
    return PlantChannels(amount, include=include, exclude=exclude, seed=seed)


@contextlib.contextmanager
def outside_inference_mode() -> Iterator[None]:
    """In inference mode nothing can be trained."""
    with torch.inference_mode(False):
        yield


@outside_inference_mode()
def prepared(
    caller: str,
    net: nn.Module,
    data: Any,
    example_inputs: Any,
    *,
    teacher: nn.Module | None,
    budget: Any,
    growth: Callable[[nn.Module], Callable[[int], Any]],
    only_new: bool,
    fitting: Fitting,
    validation: Any,
    patience: int,
    by: Literal["loss", "gain"],
    candidates: int | None,
    threads: int,
    seed: int,
) -> Search:
    """A search whose arguments have been checked.

    Args:
        caller: name of the public function.
        growth: given a network, what makes the pass of a round from a seed.

    Raises:
        InputError: as for ``grow``.
    """
    expect(f"{caller}(net, data)", "a torch.nn.Module and samples with labels", (net, nn.Module))
    if teacher is not None:
        expect(f"{caller}(net, data, teacher)", "a torch.nn.Module as its teacher", (teacher, nn.Module))
    elif fitting.distillation is not None:
        raise InputError(f"{caller}(distillation=...): there is no teacher: pass teacher=")
    limits = Budget.of(budget)
    own = copied(own_module(net))
    passes = growth(own_module(net))
    split = read(data, validation, seed)
    held = "" if is_real(validation) else "validation: "
    _check_outputs(own, split.train, fitting.loss, "")
    _check_outputs(own, split.held, fitting.loss, held)
    if teacher is not None:
        split = _taught(own, split, own_module(teacher))
        fitting = fitting if fitting.distillation is not None else fitting.towards(Distillation(loss=fitting.loss))
    fitting.check(own, split, held)
    if example_inputs is None:
        example_inputs = split.train.rows(slice(0, 1), torch.device("cpu"))[0]
        example_inputs = example_inputs[0] or example_inputs[1]
    setting = Setting(own, as_inputs(example_inputs), split, fitting, only_new, threads)
    search = Search(setting, passes, limits, by, patience, candidates, seed)
    check_settings(search)
    return search


def _check_outputs(net: nn.Module, samples: Samples, loss: Loss | None, where: str) -> None:
    """Raise InputError unless the network runs on the samples and targets are its classes."""
    first = samples.of(torch.arange(min(16, samples.count)))
    try:
        logits = logits_of(net, first)
        if loss is None:
            check_targets(logits, first.targets, samples.targets)
    except InputError as error:
        raise InputError(f"{where}{error}") from error


def _taught(net: nn.Module, split: Split, teacher: nn.Module) -> Split:
    first = split.train.of(torch.arange(min(16, split.train.count)))
    own, wanted = logits_of(net, first), logits_of(teacher, first)
    if own.shape != wanted.shape:
        raise InputError(
            f"the teacher's logits are {tuple(wanted.shape)} for {len(own)} samples and the network's "
            f"{tuple(own.shape)}: a teacher of the same classes is needed"
        )
    return split.taught(teacher)


@outside_inference_mode()
def carried_out(search: Search, log: str | Path | None, executor: Executor | None, report: Report) -> Growth:
    """Carry a search out, or go on with it.

    Raises:
        InputError: as for ``grow``.
    """
    if executor is not None and not isinstance(executor, Executor):
        raise InputError(f"executor={executor!r}: a concurrent.futures.Executor, or None")
    parcel(search, executor)  # whether it can be sent is known before any work
    network = search.check()
    header = {
        "event": "settings",
        "netsurgery": netsurgery.__version__,
        "torch": torch.__version__,
        **({} if log is None else search.identity()),
        "settings": search.settings(),
    }
    journal = Journal(None if log is None else Path(log), header)
    return Rounds(search, network, journal, executor, report).run()
