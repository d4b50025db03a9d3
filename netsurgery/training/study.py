"""A recipe carried out: every variant with every seed, resumed where it was left, and the results."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

import netsurgery
from netsurgery.demo import progress_bar
from netsurgery.errors import InputError, NetsurgeryError
from netsurgery.outputs import check_writable, writing
from netsurgery.training import checkpoints, summary
from netsurgery.training.data import SPLIT_HERE, Images, load
from netsurgery.training.engine import Figures, OnEpoch, Worker
from netsurgery.training.recipe import Recipe
from netsurgery.training.stages import Job
from netsurgery.training.summary import Results

__all__ = ["run"]

Advance = Callable[[], None]  # after each run
Tell = Callable[[str, int, str], OnEpoch]  # by variant, seed and stage, for each epoch


@dataclass(frozen=True)
class Study:
    """A recipe and the folder of its results."""

    recipe: Recipe
    out: Path
    download: bool

    def jobs(self, tell: Tell) -> Iterator[tuple[str, Job]]:
        """A run for each variant and seed. Variants with equal training share that of the first."""
        for name, variant in self.recipe.variants.items():
            variants = self.recipe.variants.items()
            owner = next(one for one, other in variants if other.training == variant.training)
            school = next(one for one, other in variants if other.teaching == variant.teaching)
            for seed in self.recipe.seeds:
                yield (
                    name,
                    Job(
                        variant=variant,
                        seed=seed,
                        images=self.images(name, seed),
                        folder=self.folder(name, seed),
                        trained=self.folder(owner, seed) / "train.safetensors",
                        taught=self.folder(school, seed) / "teacher.safetensors",
                        tell=functools.partial(tell, name, seed),
                    ),
                )

    def folder(self, name: str, seed: int) -> Path:
        """The folder of a variant and a seed."""
        return self.out / name / f"seed-{seed}"

    def images(self, name: str, seed: int) -> Images:
        """The data of a variant."""
        data = self.recipe.variants[name].data
        return load(data, seed if data.name in SPLIT_HERE else 0, self.download)

    @property
    def kept(self) -> Path:
        """The recipe, as the folder has it."""
        return self.out / "recipe.json"

    def claim(self) -> None:
        """Make sure that the folder is empty, or holds this recipe.

        Raises:
            InputError: it holds the results of another recipe, or other things.
        """
        check_writable(self.out)
        if not self.kept.exists():
            if self.out.is_dir() and any(path.suffix != ".new" for path in self.out.iterdir()):
                raise InputError(f"{self.out} holds other files: pass another folder by --out")
        elif changed := list(differences(json.loads(self.kept.read_text(encoding="utf-8")), self.recipe.fixed)):
            raise InputError(
                f"{self.out} holds the results of another recipe, which differs in {', '.join(changed[:5])}: "
                "go on with that one, or pass another folder by --out"
            )

    @property
    def left(self) -> str:
        """The results that an interruption leaves, in words."""
        if not self.kept.exists():
            return "nothing had been done yet"
        return f"{self.out} keeps all runs and epochs that were finished; the same command goes on from there"


def run(recipe: Recipe, out: Path, console: Console, download: bool = False) -> Results:
    """Carry a recipe out, or go on with it, and write the results to a folder.

    Args:
        recipe: as `read` makes it.
        out: folder for checkpoints, `log.jsonl`, `results.json`, `table.md` and pictures, which all processes see.
        console: where the progress and the table go.
        download: fetch the data where they are missing.

    Returns:
        For each variant and seed: accuracies in percent, costs, widths, and the figures of each epoch.

    Raises:
        InputError: the folder holds the results of another recipe, or a variant cannot be carried out.
        KeyboardInterrupt: as it was interrupted; the text says what is kept.
    """
    study, worker = Study(recipe, out, download), Worker(recipe.engine)
    try:
        with worker.interruptible():
            return carry_out(study, worker, console)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(*[study.left] * worker.leads) from stop


def carry_out(study: Study, worker: Worker, console: Console) -> Results:
    """Carry out the runs that are not done yet."""
    recipe = study.recipe
    if worker.leads:
        study.claim()
        fetch(study, worker)
        checkpoints.replace(study.kept, json.dumps(recipe.fixed, indent=1) + "\n")
    worker.wait()
    results: Results = {name: [] for name in recipe.variants}
    with torch.random.fork_rng(devices=[]), shown(study, worker, console) as (tell, advance):
        for name, job in study.jobs(tell):
            results[name].append(job.run(worker))
            advance()
    if worker.leads:
        write(recipe, results, study.out, console)
    worker.wait()
    return results


def fetch(study: Study, worker: Worker) -> None:
    """Make sure that all data are there and everything can be made, before anything runs."""
    for name, job in study.jobs(lambda *_: lambda _: None):
        if job.seed == study.recipe.seeds[0]:
            try:
                job.check(worker)
            except NetsurgeryError as error:
                raise InputError(f"variant '{name}': {error}") from error


@contextmanager
def shown(study: Study, worker: Worker, console: Console) -> Iterator[tuple[Tell, Advance]]:
    """A bar for all runs and one for the stage; the functions that log an epoch and a finished run."""
    if not worker.leads:
        yield (lambda *_: lambda _: None), (lambda: None)
        return
    log = Log(study.out / "log.jsonl")
    versions = {"torch": torch.__version__, "netsurgery": netsurgery.__version__}
    log.add(event="start", **versions, device=str(worker.device), processes=worker.accelerator.num_processes)
    with progress_bar(console) as progress:
        yield log.telling(study, progress)
    log.add(event="end")


class Log:
    """One JSON object on each line, with the time. A line that a kill cut short goes when the file is opened again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists():
            whole = path.read_bytes().rfind(b"\n") + 1
            with path.open("rb+") as file:
                file.truncate(whole)

    def add(self, **entry: object) -> None:
        """Write a line."""
        line = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **entry})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def telling(self, study: Study, progress: Progress) -> tuple[Tell, Advance]:
        """Functions to call for each epoch, and after each run."""
        whole = progress.add_task("runs", total=len(study.recipe.variants) * len(study.recipe.seeds))
        bar = progress.add_task("", total=1)

        def tell(variant: str, seed: int, stage: str) -> OnEpoch:
            settings = study.recipe.variants[variant]
            teaching = 0 if settings.teacher is None else settings.teacher.train.epochs
            epochs = {"train": settings.train.epochs, "teacher": teaching, "finetune": settings.finetune.epochs}.get(
                stage
            )
            progress.update(bar, description=f"{variant}, seed {seed}: {stage}", completed=0, total=epochs)

            def add(figures: Figures) -> None:
                self.add(variant=variant, seed=seed, stage=stage, **figures)
                progress.update(bar, completed=figures.get("epoch", -1) + 1)

            return add

        def advance() -> None:
            progress.advance(whole)

        return tell, advance


def write(recipe: Recipe, results: Results, out: Path, console: Console) -> None:
    """The results as JSON, as a table and as pictures."""
    from netsurgery.training.pictures import draw

    lines = summary.lines(results)
    found = {"torch": torch.__version__, "recipe": recipe.fixed, "summary": lines, "runs": results}
    checkpoints.replace(out / "results.json", json.dumps(found, indent=1) + "\n")
    checkpoints.replace(out / "table.md", summary.markdown(lines))
    with writing(out, checkpoints.ADVICE):
        draw(results, out)
    console.print(summary.table(recipe.name, lines, console.width), crop=False)
    one = out / next(iter(results)) / f"seed-{recipe.seeds[0]}"
    wrote = f"Wrote results.json, table.md, log.jsonl and pictures to {out}"
    console.print(
        f'{wrote}; netsurgery.load("{one}", model) reads a network.', markup=False, highlight=False, soft_wrap=True
    )


def differences(old: object, new: object, place: str = "") -> Iterator[str]:
    """The places where two nested tables differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from differences(old.get(key), new.get(key), f"{place}.{key}" if place else key)
    elif old != new:
        yield f"{place} ({old} there, {new} here)"
