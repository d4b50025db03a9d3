"""One run of a variant: train, choose and remove, fine-tune. Stages hand each other files: any of them can resume."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import netsurgery
from netsurgery.demo import widths
from netsurgery.edit import Edit
from netsurgery.errors import InputError, NetsurgeryError
from netsurgery.model_lookup import build
from netsurgery.passes import HGSR, MagnitudeScore, SoftPruning
from netsurgery.rewriting.stages import read
from netsurgery.training import checkpoints
from netsurgery.training.data import Images
from netsurgery.training.engine import Figures, Fit, Worker, derived, optimizer_for, schedule_of
from netsurgery.training.options import parameters
from netsurgery.training.recipe import PASSES, Model, Variant

__all__ = ["Job", "fresh", "smaller"]

TOLERANCE = 1e-3  # float32 rounding stays far below, a wrong unit far above
Tell = Callable[[str], Callable[[Figures], None]]


@dataclass(frozen=True)
class Job:
    """A variant with a seed.

    Attributes:
        folder: of this variant and seed.
        trained: the checkpoint of the training, which variants may share.
        tell: given a stage, a function that is called with the figures of each epoch.
    """

    variant: Variant
    seed: int
    images: Images
    folder: Path
    trained: Path
    tell: Tell

    def run(self, worker: Worker) -> dict[str, Any]:
        """All stages; those that are done already are read from their files.

        Returns:
            Accuracies in percent, costs, widths, and the figures of each epoch.
        """
        training = worker.fit(fresh(self.variant.model, self.seed), self.fit("train", self.trained), self.tell("train"))
        if worker.leads and not self.small.exists():
            self.remove(worker.device)
        worker.wait()
        model, figures = smaller(self.variant.model, self.images.example, self.small)
        removed = worker.accuracy(model, self.images.test)
        self.tell("remove")({"accuracy": removed, **{k: figures[k] for k in ("parameters", "macs", "verify")}})
        tuning = worker.fit(model, self.fit("finetune", self.folder / "finetune.safetensors"), self.tell("finetune"))
        return {
            "seed": self.seed,
            "trained": training[-1]["accuracy"] if training else None,
            "removed": removed,
            "finetuned": tuning[-1]["accuracy"] if tuning else None,
            **figures,
            "training": training,
            "finetuning": tuning,
        }

    @property
    def small(self) -> Path:
        """Where the smaller network is kept."""
        return self.folder / "small.safetensors"

    def fit(self, name: str, checkpoint: Path) -> Fit:
        """The settings of a stage of training."""
        variant, trains = self.variant, name == "train"
        return Fit(
            stage=variant.train if trains else variant.finetune,
            images=self.images,
            data=variant.data,
            seed=derived(self.seed, name),
            checkpoint=checkpoint,
            penalty=self.penalty if trains and variant.penalty else None,
            soft=self.soft if trains and variant.soft else None,
        )

    def penalty(self, model: nn.Module) -> HGSR:
        """The penalty of a model."""
        return HGSR(model, self.images.example, **options(self.variant.penalty))

    def soft(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> SoftPruning:
        """The soft pruning of a model."""
        given = {"epochs": self.variant.train.epochs, "optimizer": optimizer, **options(self.variant.soft)}
        return SoftPruning(model, self.images.example, **given)

    def check(self, worker: Worker) -> None:
        """Make everything once, so that what cannot be made is known before anything runs."""
        worker.check(self.variant.data, self.images)
        model = fresh(self.variant.model, self.seed)
        self.check_outputs(model)
        for stage in (self.variant.train, self.variant.finetune):
            optimizer_for(model, stage), schedule_of(stage)
        if self.variant.penalty:
            self.penalty(model)
        if self.variant.soft:
            self.soft(model, torch.optim.SGD(model.parameters()))
        self.passes()
        self.check_removal(model)

    def check_removal(self, model: nn.Module) -> None:
        """Raise InputError where the removal cannot be made, or takes nothing, whatever the scores will be."""
        table = self.variant.removal
        if not table or "threshold" in table:
            return
        removal = PASSES[table["name"]](**{key: value for key, value in options(table).items() if key != "compensate"})
        edit = netsurgery.plan(model, [MagnitudeScore(), removal], self.images.example)
        if not edit.keep:
            given = ", ".join(f"{key} = {value!r}" for key, value in table.items() if key != "name")
            raise InputError(f"[removal] with {given} takes nothing away from {edit.before.params:,} parameters")

    def check_outputs(self, model: nn.Module) -> None:
        """Raise a NetsurgeryError unless the model runs on an image and has an output for every class."""
        netsurgery.trace(model, self.images.example)  # its error says where the model does not run
        with torch.no_grad():
            model.eval()
            shape = tuple(model(self.images.example).shape)
        if len(shape) != 2 or shape[1] < self.images.classes:
            raise InputError(
                f"{self.variant.model.name} gives outputs of shape {shape} for one image of {self.variant.data.name}: "
                f"(1, {self.images.classes}) is needed, which model.arguments may say"
            )

    def passes(self) -> list[netsurgery.Pass]:
        """The selection and the removal, with what they take of the run."""
        given = {
            "data": self.images.plain,
            "seed": self.seed,
            "file": self.folder / "scores.safetensors",  # what takes long goes on from there
            "progress": False,  # there is a bar already
        }
        made = []
        for table in filter(None, (self.variant.selection, self.variant.removal)):
            cls = PASSES[table["name"]]
            supplied = {key: value for key, value in given.items() if key in parameters(cls)}
            made.append(cls(**{**supplied, **options(table)}))
        return made

    def remove(self, device: torch.device) -> None:
        """Choose the units that go, cut, compare with the silenced network, and keep the result."""
        model = fresh(self.variant.model, self.seed).to(device)
        state = checkpoints.read(self.trained) if self.trained.exists() else {"model": model.state_dict()}
        model.load_state_dict(state["model"])
        model.eval()
        edit, small = self.cut(model, state)
        model.cpu(), small.cpu()
        x, error = (self.images.test[0][0][None],), 0.0
        if edit is not None:
            error = netsurgery.verify(model, small, edit, x)
            checkpoints.replace(self.folder / "edit.json", edit.to_json())
        if not error < TOLERANCE:
            raise NetsurgeryError(f"the smaller network differs from the silenced one by {error:.1e} (relative)")
        before, after = netsurgery.cost(model, x), netsurgery.cost(small, x)
        figures = {
            "parameters": [before.params, after.params],
            "macs": [before.macs, after.macs],
            "verify": error,
            "widths": [widths(model), widths(small)],
        }
        text = edit.to_json() if edit is not None else None
        checkpoints.write(self.small, {"edit": text, "figures": figures, "model": small.state_dict()})

    def cut(self, model: nn.Module, state: dict[str, Any]) -> tuple[Edit | None, nn.Module]:
        """The edit and what it leaves; no edit where nothing is to go."""
        if self.variant.soft:
            soft = self.soft(model, torch.optim.SGD(model.parameters()))  # what some methods ask for; it does nothing
            soft.load_state_dict(state["soft"])
            edit = soft.plan()
        elif self.variant.selection:
            edit = netsurgery.plan(model, self.passes(), self.images.example)
        else:
            return None, model
        return edit, netsurgery.rewrite(model, edit)


def options(table: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments in a table that names a class; lists as tuples, which can be hashed."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in table.items() if key != "name"}


def fresh(model: Model, seed: int) -> nn.Module:
    """The whole network with the initial weights of a seed."""
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.manual_seed(derived(seed, "weights"))
        return build(model.name, **model.arguments)


def smaller(model: Model, example: Any, path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The smaller network that was kept, and its figures: the edit is made again, then the weights are read.

    Args:
        example: one image `(1, channels, height, width)`.
        path: a `small.safetensors`.
    """
    state, whole = checkpoints.read(path), fresh(model, 0)
    if state["edit"] is not None:
        whole = netsurgery.rewrite(whole, read(state["edit"], netsurgery.trace(whole, example)))
    whole.load_state_dict(state["model"])
    return whole, state["figures"]
