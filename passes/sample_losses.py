"""Outputs and losses of a model on samples, a batch at a time."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from netsurgery.analysis.network import Network
from netsurgery.capture.inputs import Inputs, tensors_in
from netsurgery.capture.meta_run import home
from netsurgery.capture.randomness import seeded
from netsurgery.errors import InputError
from netsurgery.passes.calibration import Samples, in_eval_mode, outputs_of
from netsurgery.passes.draws import drawn_at
from netsurgery.passes.losses import Loss, check_mean, check_targets, cross_entropy, loss_of, twice_over

__all__ = ["SampleLosses", "calls_are_dear", "finite", "nearly_equal"]

_log = logging.getLogger("netsurgery")


def calls_are_dear(device: torch.device) -> bool:
    """True if a call of an operation costs more than its arithmetic, as on a GPU."""
    return device.type == "cuda"


def _fitting(device: torch.device) -> int:
    """Bytes that the largest result of a run may have: what suits the caches of a CPU, a part of a GPU's memory."""
    if device.type != "cuda":
        return 4 << 20
    return max(256 << 20, torch.cuda.get_device_properties(device).total_memory // 32)


@dataclass(frozen=True)
class AblationSettings:
    """Settings of the runs without units.

    Attributes:
        loss: of outputs and targets: their mean, or one number for each sample; None for the cross-entropy.
        rows: how many go through the network at once; None for as many as suit the device.
        memory: bytes of results that may be kept of a run.
        autocast: the type in which convolutions and matrix products are computed; None for the model's own.
        progress: whether to report how far the work is.
        each: whether the loss of each sample is needed: where the loss is a mean, samples go through one at a time.
        compared: whether samples are compared, so that a loss that is a mean is refused.
    """

    loss: Loss | None = None
    rows: int | None = None
    memory: int = 2 << 30
    autocast: torch.dtype | None = None
    progress: bool = True
    each: bool = False
    compared: bool = False


class SampleLosses:
    """Runs a model on samples, and takes its loss.

    Attributes:
        random: whether the model draws random numbers.
        random_loss: whether the loss does.
        dear: whether a call of an operation costs more than its arithmetic.
        block: the number of samples that go through at most, several times over where more rows may.
    """

    def __init__(self, settings: AblationSettings, network: Network, samples: Samples):
        self.settings, self.network, self.samples = settings, network, samples
        self.model = network.model
        self.device = home(self.model)
        self.random = self.random_loss = False
        self.dear = calls_are_dear(self.device)
        self.block: int | None = None

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

    def batch(self, start: int, stop: int, copies: int) -> tuple[Inputs, object]:
        """Some samples, several times over; the targets once."""
        which = torch.arange(start, stop)
        inputs, _ = self.samples.rows(which.repeat(copies), self.device)
        return inputs, self.samples.rows(which, self.device)[1]

    @functools.cached_property
    def template(self) -> object:
        """An output of the model, to put other tensors into."""
        inputs, _ = self.batch(0, min(self.chunk(), self.samples.count), 1)
        return self.outputs(self.model, inputs)

    def filled(self, outputs: Sequence[Tensor]) -> object:
        """An output of the model that holds other tensors."""
        return _filled(self.template, outputs)

    def outputs(self, model: nn.Module, inputs: Inputs, seed: int = 0) -> object:
        """The outputs of a model in eval mode."""
        with in_eval_mode(model), torch.no_grad():
            return outputs_of(model, inputs, self.device, seed)

    def losses_together(self, outputs: list[Tensor], targets: object, copies: int) -> Tensor | None:
        """Losses ``(copies, rows)`` by one call; None where the loss is a mean, or draws random numbers."""
        if copies == 1 or self.random_loss:
            return None
        rows = len(pytree.tree_leaves(targets)[0])
        several = pytree.tree_map_only(Tensor, lambda t: torch.cat([t] * copies), targets)
        with torch.no_grad():
            found = self.own_loss(self.filled(outputs), several)
        return found.double().unflatten(0, (copies, rows)) if found.shape == (copies * rows,) else None

    def own_loss(self, outputs: object, targets: object) -> Tensor:
        """The loss as the user's function returns it; by default the cross-entropy."""
        loss: Loss = cross_entropy if self.settings.loss is None else self.settings.loss
        return loss(outputs, targets)

    def loss(self, outputs: object, targets: object) -> Tensor:
        """The loss of each row in float64, ``(rows,)``; all alike where the loss is the mean."""
        rows = len(pytree.tree_leaves(targets)[0])
        with seeded(0, self.device) if self.random_loss else contextlib.nullcontext():
            found = loss_of(outputs, targets, self.settings.loss)
        if self.settings.compared and found.dim() == 0 and rows > 1:
            raise InputError("racing compares samples: let the loss return one number for each, (n,), not the mean")
        return found.double().expand(rows)

    def is_mean(self) -> bool:
        """True if the loss returns one number for several samples."""
        if self.settings.loss is None or self.samples.count < 2:
            return False
        inputs, targets = self.batch(0, 2, 1)
        found = self.own_loss(self.outputs(self.model, inputs), targets)
        return isinstance(found, Tensor) and found.dim() == 0

    def check(self) -> None:
        """Make sure, before anything is tried, that targets and loss can be used, and look for random numbers.

        Raises:
            InputError: see ``netsurgery.passes.losses``.
        """
        if self.settings.each and self.is_mean():
            self.block = 1
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

    def check_loss(self, own: Loss, once: object, targets: object) -> None:
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

    def losses_as_text(self) -> list[str]:
        """The values of the loss at outputs of the model and near these, which tell it from other losses."""
        inputs, targets = self.batch(0, min(16, self.samples.count), 1)
        outputs = self.outputs(self.model, inputs)
        found = []
        for factor in (1.0, 0.5):
            with torch.no_grad():
                filled = _filled(outputs, _scaled(tensors_in(outputs), factor))
                found.append(f"{float(self.loss(filled, targets).mean()):.4g}")
        return found


def finite(losses: Tensor) -> Tensor:
    if not bool(losses.isfinite().all()):
        raise InputError(
            "the loss of the model as it is, is NaN or infinite: look at its weights, the data and the loss"
        )
    return losses


def _scaled(tensors: Sequence[Tensor], factor: float) -> list[Tensor]:
    return [tensor * factor if tensor.is_floating_point() else tensor for tensor in tensors]


def _same(one: object, other: object) -> bool:
    """True if two results of a model are the same but for rounding."""
    pairs = [*zip(tensors_in(one), tensors_in(other), strict=True)]
    return all(a.shape == b.shape and nearly_equal(torch.stack([a, b])) for a, b in pairs)


def nearly_equal(parts: Tensor) -> bool:
    """True if all parts ``(parts, ...)`` are the same but for rounding."""
    if not parts.is_floating_point():
        return torch.equal(parts, parts[:1].expand_as(parts))
    eps = torch.finfo(parts.dtype).eps
    largest = float(parts[0].nan_to_num(0, 0, 0).abs().amax()) if parts.numel() else 0.0
    return torch.allclose(parts, parts[:1], min(1e3 * eps, 0.05), 1e2 * eps * largest, equal_nan=True)


def _filled(template: object, tensors: Sequence[Tensor]) -> object:
    """An output of a model that holds other tensors."""
    left = iter(tensors)

    def fill(value: object) -> object:
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
