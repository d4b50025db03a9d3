"""Epochs of training and measuring. Device, precision, accumulation and processes are Hugging Face accelerate's.

Everything random in an epoch (order, augmentation, dropout) follows from the seed, the stage, the epoch and the rank;
so a checkpoint needs no state of random generators, and what follows it is what would have followed.
"""

from __future__ import annotations

import hashlib
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from netsurgery.capture.meta_run import RAISED_BY_MODELS
from netsurgery.capture.randomness import torch_seeded
from netsurgery.errors import InputError
from netsurgery.passes import HGSR, SoftPruning
from netsurgery.training import checkpoints
from netsurgery.training.data import Images, Pairs
from netsurgery.training.recipe import OPTIMIZERS, Data, Engine, Stage
from netsurgery.training.schedules import SCHEDULES

__all__ = ["Fit", "Worker", "derived", "optimizer_for", "schedule_of"]

Figures = dict[str, Any]  # of an epoch
OnEpoch = Callable[[Figures], None]
State = dict[str, Any]  # of all that is trained
EVALUATED = 512  # images in a step without gradients
PATIENCE = timedelta(hours=24)  # of processes that wait while one scores


def derived(*parts: object) -> int:
    """A seed that follows from these parts and from nothing else."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


def optimizer_for(model: nn.Module, stage: Stage) -> torch.optim.Optimizer:
    """The optimizer of a stage; settings that it does not take raise an InputError."""
    options = {key: value for key, value in stage.optimizer.items() if key != "name"}
    try:
        return OPTIMIZERS[stage.optimizer["name"]](model.parameters(), **options)
    except RAISED_BY_MODELS as error:
        given = ", ".join(f"{key}={value}" for key, value in options.items())
        raise InputError(f"{stage.optimizer['name']}({given}): {error}") from error


def schedule_of(stage: Stage) -> Callable[[float], float]:
    """The schedule of a stage."""
    options = {key: value for key, value in stage.schedule.items() if key != "name"}
    schedule: Callable[[float], float] = SCHEDULES[stage.schedule["name"]](**options)
    return schedule


@dataclass(frozen=True)
class Fit:
    """A stage of one run.

    Attributes:
        stage: epochs, optimizer, schedule.
        images: the images to learn from and to measure on.
        data: batch and workers.
        seed: of all that is random.
        checkpoint: where the state is kept after each epoch.
        soft: makes the soft pruning of a model, given its optimizer.
        penalty: makes the penalty of a model.
    """

    stage: Stage
    images: Images
    data: Data
    seed: int
    checkpoint: Path
    penalty: Callable[[nn.Module], HGSR] | None = None
    soft: Callable[[nn.Module, torch.optim.Optimizer], SoftPruning] | None = None


class Worker:
    """One process among those that accelerate started.

    Args:
        engine: precision and accumulation.

    Raises:
        InputError: accelerate was told to shard the parameters.
    """

    def __init__(self, engine: Engine) -> None:
        from accelerate import Accelerator, DataLoaderConfiguration, DistributedType
        from accelerate.utils import InitProcessGroupKwargs

        if engine.accumulate < 1:
            raise InputError(f"engine.accumulate = {engine.accumulate}: at least 1")
        try:
            self.accelerator = Accelerator(
                cpu=not torch.accelerator.is_available(),  # or several processes on CPUs would not know of each other
                mixed_precision=engine.mixed_precision,
                gradient_accumulation_steps=engine.accumulate,
                dataloader_config=DataLoaderConfiguration(split_batches=True),
                kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
            )
        except ValueError as error:  # a precision that this device, or what runs already, does not have
            raise InputError(f"engine.mixed_precision = {engine.mixed_precision}: {error}") from error
        kind = self.accelerator.distributed_type
        if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
            raise InputError(f"accelerate is set to {kind.value}: surgery needs whole parameters in every process")
        scaler = self.accelerator.scaler
        self.unscaled = scaler.state_dict() if scaler is not None else {}
        self.interrupted = self.in_training = False
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """In training Ctrl-C takes effect at the next batch, where it cannot get lost; pressed again, at once.

        Python drops what is raised while it starts processes or deletes objects, as data loaders do all the time.
        """

        def note(number: int, frame: FrameType | None) -> None:
            again, self.interrupted = self.interrupted, True
            if again or not self.in_training:
                raise KeyboardInterrupt

        ours = threading.current_thread() is threading.main_thread()
        if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield  # another handler is installed
            return
        signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def go_on(self) -> None:
        """Raise KeyboardInterrupt if Ctrl-C was pressed."""
        if self.interrupted:
            raise KeyboardInterrupt

    @property
    def leads(self) -> bool:
        """True in the process that writes."""
        return bool(self.accelerator.is_main_process)

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.accelerator.wait_for_everyone()

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        device: torch.device = self.accelerator.device
        return device

    def accuracy(self, model: nn.Module, pairs: Pairs) -> float:
        """Percentage of images whose largest output is the label's; on every process the same."""
        loader = DataLoader(pairs, EVALUATED * self.accelerator.num_processes)
        right, total = 0, 0
        model.to(self.device).eval()
        with torch.no_grad(), self.accelerator.autocast():
            for x, y in self.accelerator.prepare_data_loader(loader):
                self.go_on()
                hits = self.accelerator.gather_for_metrics(model(x).argmax(1) == y)
                right, total = right + int(hits.sum()), total + len(hits)
        return 100 * right / total

    def check(self, data: Data, images: Images) -> None:
        """Raise InputError for fewer images than in a batch, or processes that do not divide it."""
        count, processes = len(images.train), self.accelerator.num_processes  # type: ignore[arg-type]
        if count < data.batch or data.batch % processes:
            raise InputError(
                f"data.batch = {data.batch}: at most the {count} training images, and a multiple of the {processes} "
                "processes"
            )

    def fit(self, model: nn.Module, fit: Fit, on_epoch: OnEpoch) -> list[Figures]:
        """Train a model in place, from its checkpoint on if there is one.

        Args:
            model: as it is before the stage.
            on_epoch: called with the figures of each epoch.

        Returns:
            Loss, penalty, learning rate and accuracy of each epoch of the stage.
        """
        run = Run(self, model, fit)
        history: list[Figures] = []
        if fit.checkpoint.exists():
            history = run.restore(checkpoints.read(fit.checkpoint))
        elif run.soft is not None and run.soft.before_training:
            run.soft.step(-1)
        self.in_training = True
        try:
            for epoch in range(len(history), fit.stage.epochs):
                history.append(run.epoch(epoch))
                on_epoch(history[-1])
                if self.leads:
                    checkpoints.write(fit.checkpoint, run.state(history))
                self.wait()
        finally:
            self.in_training = False
        self.go_on()
        self.accelerator.free_memory()
        return history


def not_interrupted(_: int) -> None:
    """Ignore Ctrl-C, which a terminal sends to every process: the main one ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Run:
    """A model that is being trained."""

    def __init__(self, worker: Worker, model: nn.Module, fit: Fit) -> None:
        self.worker, self.model, self.of = worker, model, fit
        self.accelerator = worker.accelerator
        model.to(worker.device)
        self.optimizer = optimizer_for(model, fit.stage)
        self.penalty = fit.penalty(model) if fit.penalty else None
        self.soft = fit.soft(model, self.optimizer) if fit.soft else None
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.rate())
        self.parts: dict[str, Any] = {"model": model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        if self.soft is not None:
            self.parts["soft"] = self.soft
        if self.accelerator.scaler is not None:
            self.parts["scaler"] = self.accelerator.scaler
            self.accelerator.scaler.load_state_dict(worker.unscaled)
        self.prepared, self.stepper, self.loader, self.schedule = self.accelerator.prepare(
            model, self.optimizer, self.batches(), self.scheduler
        )

    def batches(self) -> DataLoader[tuple[Tensor, int]]:
        """The training images in a new order in every epoch; an incomplete batch is left out."""
        from accelerate.data_loader import SeedableRandomSampler

        data, images = self.of.data, self.of.images.train
        order = SeedableRandomSampler(images, data_seed=derived(self.of.seed, "order"), generator=torch.Generator())
        return DataLoader(
            images, data.batch, sampler=order, num_workers=data.workers, drop_last=True, worker_init_fn=not_interrupted
        )

    def rate(self) -> Callable[[int], float]:
        """The factor of the learning rate at each step of the optimizer."""
        schedule = schedule_of(self.of.stage)
        batches = len(self.of.images.train) // self.of.data.batch  # type: ignore[arg-type]
        steps = self.of.stage.epochs * -(-batches // self.accelerator.gradient_accumulation_steps)
        return lambda step: schedule(min(step / max(steps, 1), 1.0))

    def epoch(self, epoch: int) -> Figures:
        """Train for an epoch and measure, with random numbers from the seed; the caller's random state stays."""
        with torch_seeded(derived(self.of.seed, epoch, self.accelerator.process_index), self.worker.device):
            return self._epoch(epoch)

    def _epoch(self, epoch: int) -> Figures:
        self.loader.set_epoch(epoch)
        rate = self.scheduler.get_last_lr()[0]
        self.prepared.train()
        losses, penalties = [], []
        for x, y in self.loader:
            self.worker.go_on()
            with self.accelerator.accumulate(self.prepared):
                loss, penalty = self.step(x, y)
            losses.append(loss)
            penalties.extend(penalty)
        if self.soft is not None:
            self.soft.step(epoch)
        self.agree()
        loss = torch.stack(losses).mean()
        return {
            "epoch": epoch,
            "lr": rate,
            "loss": float(self.accelerator.reduce(loss, "mean")),
            "penalty": float(torch.stack(penalties).mean()) if penalties else 0.0,
            "accuracy": self.worker.accuracy(self.model, self.of.images.test),
        }

    def step(self, x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        """One batch; the loss, and the penalty where the gradients are complete."""
        loss = F.cross_entropy(self.prepared(x), y)
        self.accelerator.backward(loss)
        penalty = []
        if self.penalty is not None and self.accelerator.sync_gradients:
            scaler = self.accelerator.scaler
            penalty.append(self.penalty.add_gradient(1.0 if scaler is None else scaler.get_scale()))
        self.stepper.step()
        self.schedule.step()
        self.stepper.zero_grad()
        return loss.detach(), penalty

    def agree(self) -> None:
        """Copy the buffers of the main process to all: each has seen other images, and so other statistics."""
        from accelerate.utils import broadcast

        if self.accelerator.num_processes == 1:
            return
        for buffer in self.model.buffers():
            buffer.copy_(broadcast(buffer))

    def state(self, history: list[Figures]) -> State:
        """All that the next epoch depends on."""
        return {"history": history, **{name: part.state_dict() for name, part in self.parts.items()}}

    def restore(self, state: State) -> list[Figures]:
        """Go back to a state, and return the figures of the epochs so far."""
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        history: list[Figures] = state["history"]
        return history
