"""The training of a candidate, and its loss on samples held out."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from netsurgery.arguments import is_count, is_real
from netsurgery.capture.meta_run import RAISED_BY_MODELS, home
from netsurgery.capture.randomness import seeded
from netsurgery.errors import InputError
from netsurgery.passes.calibration import Samples, in_eval_mode
from netsurgery.passes.distillation import Distillation
from netsurgery.passes.losses import Loss, cross_entropy, ignored_by, logits_in
from netsurgery.search.identity import fingerprint, is_plain
from netsurgery.search.split import Split

__all__ = ["Fitting", "Measured", "name_of"]

_ROWS = 256


@dataclass(frozen=True)
class Measured:
    """Mean loss on held-out samples, and the percentage of labels that the largest logit names (None without any)."""

    loss: float
    accuracy: float | None


@dataclass(frozen=True)
class Fitting:
    """The training of candidates: some epochs, in which the learning rate falls to 0 along a cosine.

    Attributes:
        epochs: of each candidate.
        batch_size: samples in a step, at most; all steps have equally many, but for one.
        optimizer: called as ``optimizer(parameters, lr=lr)``.
        lr: learning rate at the start.
        loss: of outputs and targets, where there is no teacher, and on held-out samples; None: the cross-entropy.
        distillation: the loss where there is a teacher.
    """

    epochs: int
    batch_size: int
    optimizer: Callable[..., Optimizer]
    lr: float
    loss: Loss | None = None
    distillation: Distillation | None = None

    def __post_init__(self) -> None:
        for name, value in (("epochs", self.epochs), ("batch_size", self.batch_size)):
            if not is_count(value, 1):
                raise InputError(f"{name}={value!r}: a whole number of at least 1")
        if not is_real(self.lr) or not 0 < self.lr < math.inf:
            raise InputError(f"lr={self.lr!r}: a number above 0")
        if not callable(self.optimizer):
            raise InputError(f"optimizer={self.optimizer!r}: a class of torch.optim, or what makes one of parameters")
        if self.distillation is not None and self.distillation.hints is not None:
            raise InputError("distillation has hints, which are bound to one student: use temperature and alpha alone")

    def towards(self, distillation: Distillation) -> Fitting:
        """With another loss where there is a teacher."""
        return dataclasses.replace(self, distillation=distillation)

    def settings(self) -> dict[str, Any]:
        """All that the result depends on, for JSON."""
        towards = self.distillation
        return {
            "epochs": int(self.epochs),
            "batch_size": int(self.batch_size),
            "optimizer": name_of(self.optimizer),
            "lr": float(self.lr),
            "loss": _named(self.loss),
            "distillation": None if towards is None else f"{towards!r} of {_named(towards.loss)}, dim={towards.dim}",
        }

    def identity(self) -> dict[str, str]:
        """Fingerprints of what users pass as functions and objects.

        Raises:
            InputError: something that cannot be told from another.
        """
        given: dict[str, Any] = {"optimizer": self.optimizer, "loss": self.loss}
        if self.distillation is not None:
            state = {**vars(self.distillation), "_labels_checked": False}  # noted by its first call
            given["distillation"] = (type(self.distillation), state)
        return {name: fingerprint(f"{name}={name_of(getattr(self, name))}", one) for name, one in given.items()}

    def check(self, model: nn.Module, split: Split, held: str) -> None:
        """Try the loss on some samples of both kinds, and the optimizer on a vector.

        Args:
            held: begins a message about samples that are held out.

        Raises:
            InputError: as ``fit``; or a loss that fails, or is neither the mean nor one number for each sample.
        """
        rows, others = self._telling(split.train), self._telling(split.held)
        with torch.no_grad(), in_eval_mode(model), seeded(0, home(model)):
            distillation = copy.deepcopy(self.distillation)
            _check_loss("", len(rows), lambda: self._trained_by(model, split, rows, distillation))
            _check_loss(held, len(others), lambda: self._compared_by(model, split.held, others))
        self._optimizer([nn.Parameter(torch.zeros(3))])

    def _telling(self, samples: Samples) -> Tensor:
        """The first samples, and those of the least and the greatest label."""
        rows, targets = torch.arange(min(16, samples.count)), samples.targets
        if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.is_complex():
            return rows
        said = targets != ignored_by(self.loss)
        for limit in targets[said].aminmax() if said.any() else ():
            has = (said & (targets == limit)).reshape(samples.count, -1).any(1)
            rows = rows if has[rows].any() else torch.cat([rows, has.nonzero()[0]])
        return rows

    def _compared_by(self, model: nn.Module, samples: Samples, rows: Tensor) -> Tensor:
        """The loss of some samples that are held out."""
        inputs, targets = samples.rows(rows, home(model))
        return self._of(model(*inputs[0], **inputs[1]), targets)

    def _trained_by(self, model: nn.Module, split: Split, rows: Tensor, distillation: Distillation | None) -> Tensor:
        """The loss of some samples."""
        device = home(model)
        inputs, targets = split.train.rows(rows, device)
        outputs = model(*inputs[0], **inputs[1])
        if distillation is None or split.teacher is None:
            return self._of(outputs, targets)
        found: Tensor = distillation(outputs, split.teacher[rows].to(device), targets)
        return found

    def fit(self, model: nn.Module, split: Split, seed: int) -> None:
        """Train what a model has of parameters that need gradients, in place; global random numbers stay as they were.

        Raises:
            InputError: an optimizer that does not take the parameters, or that wants a closure.
        """
        device, count = home(model), split.train.count
        steps = -(-count // self.batch_size)
        optimizer = self._optimizer([one for one in model.parameters() if one.requires_grad])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs * steps)
        order, distillation = torch.Generator().manual_seed(seed), copy.deepcopy(self.distillation)
        model.train()
        with seeded(seed, device), torch.enable_grad():
            for _ in range(self.epochs):
                for rows in torch.randperm(count, generator=order).tensor_split(steps):
                    optimizer.zero_grad()
                    self._trained_by(model, split, rows, distillation).mean().backward()
                    optimizer.step()
                    schedule.step()

    def _optimizer(self, parameters: list[nn.Parameter]) -> Optimizer:
        try:
            made = self.optimizer(parameters, lr=self.lr)
        except (TypeError, ValueError) as error:
            raise InputError(f"optimizer={name_of(self.optimizer)}: {error}") from error
        if not isinstance(made, Optimizer) or isinstance(made, torch.optim.LBFGS):
            raise InputError(f"optimizer={name_of(self.optimizer)}: an optimizer that steps without a closure")
        return made

    def _of(self, outputs: Any, targets: Any) -> Tensor:
        return cross_entropy(_logits(outputs), targets) if self.loss is None else self.loss(outputs, targets)

    @torch.no_grad()
    def measure(self, model: nn.Module, samples: Samples) -> Measured:
        """The mean loss, summed up in float64; NaN or infinite where training has diverged."""
        device, total, right, named = home(model), 0.0, 0, 0
        with in_eval_mode(model), seeded(0, device):
            for inputs, targets in samples.batches(_ROWS, device):
                outputs = model(*inputs[0], **inputs[1])
                rows = len(next(iter((*inputs[0], *inputs[1].values()))))
                total += float(self._of(outputs, targets).double().mean()) * rows
                logits = logits_in(outputs)
                if logits is not None and isinstance(targets, Tensor) and targets.shape == logits[:, 0].shape:
                    counted = targets != ignored_by(self.loss)
                    right, named = right + int((logits.argmax(1) == targets)[counted].sum()), named + int(counted.sum())
        return Measured(total / samples.count, 100 * right / named if named else None)


def _check_loss(where: str, count: int, run: Callable[[], Any]) -> None:
    """Raise InputError unless a loss is a mean, or one number for each sample."""
    try:
        found = run()
    except InputError:
        raise
    except RAISED_BY_MODELS as error:
        raise InputError(f"{where}the loss does not take these outputs and targets: {error}") from error
    if not isinstance(found, Tensor) or found.shape not in ((), (count,)):
        form = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InputError(f"{where}the loss of {count} samples is {form}: return the mean, or one number for each")


def _logits(outputs: Any) -> Tensor:
    found = logits_in(outputs)
    if found is None:
        raise InputError(f"the network returns {type(outputs).__name__}, no logits: pass loss=f(outputs, targets)")
    return found


def name_of(value: Any) -> str:
    """A callable by its name and the arguments that are bound to it."""
    if isinstance(value, functools.partial):
        pairs = [*(("", one) for one in value.args), *((f"{key}=", one) for key, one in value.keywords.items())]
        given = [f"{key}{one!r}" if is_plain(one) else f"{key}{name_of(one)}" for key, one in pairs]
        return f"{name_of(value.func)}({', '.join(given)})"
    one = value if hasattr(value, "__qualname__") else type(value)  # no repr, which may hold an address
    return f"{one.__module__}.{one.__qualname__}"


def _named(loss: Loss | None) -> str | None:
    return None if loss is None else name_of(loss)
