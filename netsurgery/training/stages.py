"""One run of a variant: train, choose and remove, or grow, then fine-tune. Stages hand each other files: all resume."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import netsurgery
from netsurgery.demo import widths
from netsurgery.edit import Edit
from netsurgery.errors import InputError, NetsurgeryError
from netsurgery.model_lookup import build
from netsurgery.passes import HGSR, MagnitudeScore, PlantChannels, SoftPruning, WidenChannels
from netsurgery.rewriting.stages import read
from netsurgery.search import WidthSearch
from netsurgery.search.candidates import Budget, offered
from netsurgery.training import checkpoints
from netsurgery.training.data import Images, Pairs
from netsurgery.training.engine import Figures, Fit, OnEpoch, Worker, derived, optimizer_for, schedule_of
from netsurgery.training.options import Arguments, Table, parameters
from netsurgery.training.recipe import PASSES, Model, Variant
from netsurgery.training.summary import Result

__all__ = ["Job", "fresh", "smaller"]

TOLERANCE = 1e-3  # float32 rounding stays far below, a wrong unit far above
Tell = Callable[[str], OnEpoch]


@dataclass(frozen=True)
class Job:
    """A variant with a seed.

    Attributes:
        folder: of this variant and seed.
        trained: the checkpoint of the training, which variants may share.
        taught: that of the teacher, likewise.
        tell: given a stage, a function that is called with the figures of each epoch.
    """

    variant: Variant
    seed: int
    images: Images
    folder: Path
    trained: Path
    taught: Path
    tell: Tell

    def run(self, worker: Worker) -> Result:
        """Run all stages; those that are done already are read from their files.

        Returns:
            Accuracies in percent, costs, widths, and the figures of each epoch.
        """
        training = worker.fit(fresh(self.variant.model, self.seed), self.fit("train", self.trained), self.tell("train"))
        teacher = self.teacher(worker)
        if worker.leads and not self.small.exists():
            if self.variant.growth:
                self.grow(worker.device, teacher)
            else:
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

    @functools.cached_property
    def parts(self) -> tuple[Images, Pairs | None]:
        """The images to learn from, and those by which candidates of a growth are compared."""
        return self.images.held_out(self.seed) if self.variant.growth else (self.images, None)

    @property
    def learnt(self) -> Images:
        """The images to learn from."""
        return self.parts[0]

    def teacher(self, worker: Worker) -> nn.Module | None:
        """The teacher, trained, where there is one."""
        found = self.variant.teacher
        if found is None:
            return None
        model = fresh(found.model, self.seed)
        data, seed = self.variant.data, derived(self.seed, "teacher")
        worker.fit(model, Fit(found.train, self.learnt, data, seed, self.taught), self.tell("teacher"))
        return model

    @property
    def small(self) -> Path:
        """The file of the smaller network."""
        return self.folder / "small.safetensors"

    def fit(self, name: str, checkpoint: Path) -> Fit:
        """The settings of a stage of training."""
        variant, trains = self.variant, name == "train"
        return Fit(
            stage=variant.train if trains else variant.finetune,
            images=self.learnt,
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
        worker.check(self.variant.data, self.learnt)
        model = fresh(self.variant.model, self.seed)
        self.check_outputs(model, self.variant.model.name)
        for stage in (self.variant.train, self.variant.finetune):
            optimizer_for(model, stage), schedule_of(stage)
        if self.variant.teacher is not None:
            teacher = fresh(self.variant.teacher.model, self.seed)
            self.check_outputs(teacher, self.variant.teacher.model.name)
            optimizer_for(teacher, self.variant.teacher.train), schedule_of(self.variant.teacher.train)
        if self.variant.growth:
            self.check_growth(model)
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

    def check_growth(self, model: nn.Module) -> None:
        """Raise InputError where nothing can grow, or the budget leaves no room."""
        table = options(self.variant.growth)
        if self.variant.growth["name"] == "planting":
            growth: netsurgery.Pass = PlantChannels(table.get("amount", 8), include=table.get("include", ()))
        else:
            growth = WidenChannels(table.get("factor", 1.25), multiple_of=table.get("multiple_of", 8))
        budget, before = Budget.of(table["budget"]), netsurgery.cost(model, self.images.example)
        if over := budget.over(before):
            raise InputError(f"[growth] budget = {table['budget']} is under the present size: the network has {over}")
        if all(budget.over(one.cost) for one in offered(model, self.images.example, growth)):
            raise InputError(f"[growth] budget = {table['budget']} leaves no room for more units in any layer")

    def check_outputs(self, model: nn.Module, name: str) -> None:
        """Raise a NetsurgeryError unless the model runs on an image and has an output for every class."""
        netsurgery.trace(model, self.images.example)  # its error says where the model does not run
        with torch.no_grad():
            model.eval()
            shape = tuple(model(self.images.example).shape)
        if len(shape) != 2 or shape[1] < self.images.classes:
            raise InputError(
                f"{name} gives outputs of shape {shape} for one image of {self.variant.data.name}: "
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
        self.keep(model.cpu(), small.cpu(), edit, {})

    def keep(
        self, model: nn.Module, small: nn.Module, edit: Edit | None, more: Figures, *, grown: bool = False
    ) -> None:
        """Make sure that an edit is exact, and write what it has left.

        Args:
            more: figures.
            grown: whether what it has added was trained since, so that its outputs are others by now.
        """
        x, error = (self.images.test[0][0][None],), 0.0
        if edit is not None:
            error = netsurgery.verify(model, netsurgery.rewrite(model, edit) if grown else small, edit, x)
            checkpoints.replace(self.folder / "edit.json", edit.to_json())
        if not error < TOLERANCE:
            which = (
                "network with new units differs from the one before"
                if grown
                else "smaller network differs from the silenced one"
            )
            raise NetsurgeryError(f"the {which} by {error:.1e} (relative)")
        before, after = netsurgery.cost(model, x), netsurgery.cost(small, x)
        figures = {
            "parameters": [before.params, after.params],
            "macs": [before.macs, after.macs],
            "verify": error,
            "widths": [widths(model), widths(small)],
            **more,
        }
        text = edit.to_json() if edit is not None else None
        checkpoints.write(self.small, {"edit": text, "figures": figures, "model": small.state_dict()})

    def grow(self, device: torch.device, teacher: nn.Module | None) -> None:
        """Grow the trained network, and keep what comes out."""
        model = fresh(self.variant.model, self.seed).to(device)
        model.load_state_dict(checkpoints.read(self.trained)["model"] if self.trained.exists() else model.state_dict())
        (learnt, held), say = self.parts, self.tell("growth")
        given: Arguments = {
            "validation": held,
            "log": self.folder / "growth.jsonl",  # an interrupted search goes on from there
            "seed": derived(self.seed, "growth"),
            "progress": False,  # there is a bar already
            **options(self.variant.growth),
        }
        if self.variant.growth["name"] == "planting":
            found, more = netsurgery.search.grow(model, learnt.plain, teacher, self.images.example, **given), {}
            grown = found.model
        else:
            search = WidthSearch(model, learnt.plain, self.images.example, **given).run()
            found, grown = search.growth, search.found.model
            more = {"uniform": {"parameters": search.uniform.params, "held_out": search.uniform.accuracy}}
        rounds = [one.entry() for one in found.history]
        for one in rounds:
            say({key: one[key] for key in ("number", "group", "loss", "accuracy", "params")})
        self.keep(model.cpu(), grown.cpu(), found.edit, {"rounds": rounds, "why": found.why, **more}, grown=True)

    def cut(self, model: nn.Module, state: Table) -> tuple[Edit | None, nn.Module]:
        """The edit and what it leaves; no edit where nothing is to go."""
        if self.variant.soft:
            soft = self.soft(model, torch.optim.SGD(model.parameters()))  # some methods ask for one; it does nothing
            soft.load_state_dict(state["soft"])
            edit = soft.plan()
        elif self.variant.selection:
            edit = netsurgery.plan(model, self.passes(), self.images.example)
        else:
            return None, model
        return edit, netsurgery.rewrite(model, edit)


def options(table: Table) -> Arguments:
    """The arguments in a table that names a class, with lists as tuples, which can be hashed."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in table.items() if key != "name"}


def fresh(model: Model, seed: int) -> nn.Module:
    """The whole network with the initial weights of a seed."""
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.manual_seed(derived(seed, "weights"))
        return build(model.name, **model.arguments)


def smaller(model: Model, example: object, path: Path) -> tuple[nn.Module, Result]:
    """Read the smaller network and its figures: the edit is carried out again, then the weights are loaded.

    Args:
        example: one image `(1, channels, height, width)`.
        path: a `small.safetensors`.
    """
    state, whole = checkpoints.read(path), fresh(model, 0)
    if state["edit"] is not None:
        whole = netsurgery.rewrite(whole, read(state["edit"], netsurgery.trace(whole, example)))
    whole.load_state_dict(state["model"])
    return whole, state["figures"]
