"""Recipes carried out: what is written, that a run which was stopped goes on as if it had not been, what is refused."""

import contextlib
import io
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from torch import nn

import netsurgery
from netsurgery import demo
from netsurgery.errors import InputError, NetsurgeryError
from netsurgery.models import DigitsResNet
from netsurgery.passes import HGSR, SoftPruning
from netsurgery.training import checkpoints, read, run
from netsurgery.training.data import Images, load
from netsurgery.training.engine import Fit, Run, Worker, derived
from netsurgery.training.recipe import Data, Engine, Stage
from netsurgery.training.stages import fresh, smaller
from netsurgery.training.study import Study, fetch
from netsurgery.training.summary import lines, markdown, spread, table
from test_training_data import WRITERS, write_cifar10

RECIPE = """
seeds = [0]
data = { name = "digits", batch = 16, limit = 400 }
model = { name = "netsurgery.models:DigitsResNet", arguments = { widths = [4, 8] } }
train = { epochs = 2, optimizer = { name = "SGD", lr = 0.1, momentum = 0.9 }, schedule = { name = "cosine" } }
finetune = { epochs = 1, optimizer = { name = "AdamW", lr = 0.01 } }
removal = { params = 0.5, scope = "global" }

[variants.penalised]
penalty = { grouping = "coupled", strength = 1e-3 }
selection = { name = "LossIncreaseScore", samples = 50 }

[variants.norm]
penalty = { grouping = "coupled", strength = 1e-3 }
selection = { name = "MagnitudeScore" }

[variants.soft]
soft = { method = "ghfp", ratio = 0.3, grouping = "coupled" }
removal = false

[variants.whole]
removal = false
"""


def silent() -> Console:
    return Console(file=io.StringIO(), width=80)


def recipe(folder: Path, *changes: str, first: int = 4) -> Any:
    """The recipe with its first variants alone."""
    (folder / "mini.toml").write_text("\n[variants.".join(RECIPE.split("\n[variants.")[: first + 1]))
    return read(str(folder / "mini.toml"), changes)


def bytes_of(out: Path) -> dict[str, bytes]:
    """All that a run leaves, but the log, which says when, the pictures, and the file that the selection keeps."""
    skipped = (".jsonl", ".png")
    paths = [p for p in out.rglob("*") if p.is_file() and p.suffix not in skipped and p.name != "scores.safetensors"]
    return {str(p.relative_to(out)): p.read_bytes() for p in paths}


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take longer than all else here."""
    monkeypatch.setattr("netsurgery.training.pictures.draw", lambda *_: None)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    """What one short run returned, where it wrote, and what it printed."""
    folder, text = tmp_path_factory.mktemp("training"), io.StringIO()
    before = torch.random.get_rng_state()
    found = run(recipe(folder), folder / "out", Console(file=text, width=80))
    assert torch.equal(torch.random.get_rng_state(), before)
    return found, folder / "out", text.getvalue()


def test_what_is_written(ran: tuple[dict[str, Any], Path, str]) -> None:
    found, out, _ = ran
    assert {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()} == {
        *("recipe.json", "log.jsonl", "results.json", "table.md", "tradeoff.png", "widths.png", "losses.png"),
        *(
            f"penalised/seed-0/{n}"
            for n in ("train.safetensors", "scores.safetensors", "edit.json", "small.safetensors")
        ),
        *(f"norm/seed-0/{n}" for n in ("edit.json", "small.safetensors")),  # it shares what was trained
        *(f"soft/seed-0/{n}" for n in ("train.safetensors", "edit.json", "small.safetensors")),
        *(f"whole/seed-0/{n}" for n in ("train.safetensors", "small.safetensors")),
        *(f"{variant}/seed-0/finetune.safetensors" for variant in found),
    }
    assert json.loads((out / "results.json").read_text())["runs"] == found


def test_half_of_the_parameters_go_and_the_rest_computes_the_same(ran: tuple[dict[str, Any], Path, str]) -> None:
    for name, (one,) in ran[0].items():
        before, after = one["parameters"]
        assert before == sum(p.numel() for p in fresh(recipe(ran[1].parent).variants[name].model, 0).parameters())
        assert (after == before) if name == "whole" else (0.35 * before < after < 0.7 * before)
        assert (one["macs"][1] < one["macs"][0]) == (name != "whole")
        assert 0 <= one["verify"] < 1e-5
        assert all(after <= one["widths"][0][k] for k, after in one["widths"][1].items())
        assert one["trained"] == one["training"][-1]["accuracy"] > 25  # chance is 10
        assert one["finetuned"] == one["finetuning"][-1]["accuracy"]
    assert ran[0]["soft"][0]["removed"] == ran[0]["soft"][0]["trained"]  # what was pruned was gone before
    assert ran[0]["whole"][0]["removed"] == ran[0]["whole"][0]["trained"]


def test_epochs_are_logged_in_order_with_the_time(ran: tuple[dict[str, Any], Path, str]) -> None:
    entries = [json.loads(line) for line in (ran[1] / "log.jsonl").read_text().splitlines()]
    assert [(e.get("event"), e.get("variant"), e.get("stage"), e.get("epoch")) for e in entries[:5]] == [
        ("start", None, None, None),
        (None, "penalised", "train", 0),
        (None, "penalised", "train", 1),
        (None, "penalised", "remove", None),
        (None, "penalised", "finetune", 0),
    ]
    assert all(time.strptime(e["time"], "%Y-%m-%dT%H:%M:%S%z") for e in entries)
    figures = {k: v for k, v in entries[1].items() if k not in ("time", "variant", "seed", "stage")}
    assert figures == ran[0]["penalised"][0]["training"][0]
    assert figures["penalty"] > 0
    assert ran[0]["whole"][0]["training"][0]["penalty"] == 0
    assert ran[0]["penalised"][0]["finetuning"][0]["penalty"] == 0  # the regulariser is for the training alone


def test_the_terminal_and_the_page_show_the_table(ran: tuple[dict[str, Any], Path, str]) -> None:
    found, out, text = ran
    page = (out / "table.md").read_text()
    for name, (one,) in found.items():
        for value in (one["trained"], one["removed"], one["finetuned"], 100 * one["macs"][1] / one["macs"][0]):
            assert f"{value:.2f}" in next(line for line in text.splitlines() if line.lstrip().startswith(name))
            assert f"{value:.2f}" in next(line for line in page.splitlines() if line.startswith(f"| {name}"))


def test_the_pictures_open_and_are_not_blank(ran: tuple[dict[str, Any], Path, str]) -> None:
    from matplotlib.image import imread

    for name in ("tradeoff", "widths", "losses"):
        pixels = imread(ran[1] / f"{name}.png")
        assert pixels.shape[0] > 300
        assert len({tuple(p) for p in pixels.reshape(-1, pixels.shape[2])[::7]}) > 20  # colours


def test_the_smaller_network_is_rebuilt_from_its_edit_and_weights(ran: tuple[dict[str, Any], Path, str]) -> None:
    variant, out = recipe(ran[1].parent).variants["norm"], ran[1] / "norm" / "seed-0"
    images = load(variant.data, 0)
    small, figures = smaller(variant.model, images.example, out / "small.safetensors")
    whole = fresh(variant.model, 0)
    whole.load_state_dict(checkpoints.read(ran[1] / "penalised" / "seed-0" / "train.safetensors")["model"])
    edit = netsurgery.Edit.from_json((out / "edit.json").read_text(), netsurgery.trace(whole, images.example))
    assert netsurgery.verify(whole, small, edit, images.test[0][0][None]) < 1e-5
    assert sum(p.numel() for p in small.parameters()) == figures["parameters"][1]


def test_checkpoints_hold_tensors_and_json_alone(ran: tuple[dict[str, Any], Path, str]) -> None:
    paths = [p for p in ran[1].rglob("*.safetensors") if p.name != "scores.safetensors"]  # that is the pass's own
    assert paths
    for path in paths:
        with safe_open(path, "pt") as file:
            assert list(file.metadata()) == ["state"]
            assert json.loads(file.metadata()["state"])
    assert not [p for p in ran[1].rglob("*") if p.suffix in (".pt", ".pth", ".pkl", ".bin")]


@pytest.mark.usefixtures("undrawn")
def test_what_is_done_is_not_done_again(ran: tuple[dict[str, Any], Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = bytes_of(ran[1])
    monkeypatch.setattr(Run, "epoch", None)  # calling it would fail
    assert run(recipe(ran[1].parent), ran[1], silent()) == ran[0]
    assert bytes_of(ran[1]) == before


@pytest.mark.usefixtures("undrawn")
def test_the_same_recipe_gives_the_same_elsewhere_and_another_seed_does_not(
    ran: tuple[dict[str, Any], Path, str], tmp_path: Path
) -> None:
    found = run(recipe(tmp_path, "seeds=[1, 0]", first=1), tmp_path / "out", silent())["penalised"]
    assert found[1] == ran[0]["penalised"][0]
    assert found[0]["training"] != found[1]["training"]
    small = "penalised/seed-0/finetune.safetensors"
    assert (tmp_path / "out" / small).read_bytes() == (ran[1] / small).read_bytes()


def stopped(monkeypatch: pytest.MonkeyPatch, name: str, count: int) -> None:
    """Stop the program when a function of the engine has been called so often."""
    calls = iter(range(count))
    target: Any = {"epoch": Run, "write": checkpoints, "step": Run}[name]
    inner: Callable[..., Any] = getattr(target, name)

    def call(*args: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return inner(*args)

    monkeypatch.setattr(target, name, call)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    "where",
    [
        ("step", 37),
        *(
            pytest.param(one, marks=pytest.mark.slow)
            for one in [("epoch", 1), ("write", 1), ("write", 2), ("write", 6)]
        ),
        pytest.param(("epoch", 5), marks=pytest.mark.slow),
    ],
)
def test_what_was_stopped_goes_on_as_if_it_had_not_been(
    where: tuple[str, int], ran: tuple[dict[str, Any], Path, str], tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stopped(patch, *where)
        with pytest.raises(KeyboardInterrupt):
            run(recipe(tmp_path), tmp_path / "out", silent())
    with (tmp_path / "out" / "log.jsonl").open("a") as file:
        file.write('{"time": "20')  # as a kill may leave it
    assert run(recipe(tmp_path), tmp_path / "out", silent()) == ran[0]
    assert bytes_of(tmp_path / "out") == bytes_of(ran[1])
    assert all(json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines())


AUGMENTED = """
data = { name = "cifar10", batch = 10, workers = WORKERS, folder = "FOLDER" }
model = { name = "netsurgery.models:resnet20", arguments = { widths = [2, 2, 2] } }
train = { epochs = 3, optimizer = { name = "SGD", lr = 0.1 } }
"""


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("workers", [0, 1])
def test_augmentation_goes_on_as_if_nothing_had_been(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar10(tmp_path / "data", monkeypatch)
    load.cache_clear()
    text = AUGMENTED.replace("FOLDER", str(tmp_path / "data")).replace("WORKERS", str(workers))
    (tmp_path / "mini.toml").write_text(text)
    found = [run(read(str(tmp_path / "mini.toml")), tmp_path / "a", silent())]
    with pytest.MonkeyPatch.context() as patch:
        stopped(patch, "epoch", 2)
        with pytest.raises(KeyboardInterrupt):
            run(read(str(tmp_path / "mini.toml")), tmp_path / "b", silent())
    found.append(run(read(str(tmp_path / "mini.toml")), tmp_path / "b", silent()))
    assert found[0] == found[1]
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    plain = run(read(str(tmp_path / "mini.toml"), ["data.augment=false"]), tmp_path / "c", silent())
    assert plain != found[0]


def test_a_changed_recipe_is_refused_in_the_same_folder(ran: tuple[dict[str, Any], Path, str]) -> None:
    before = bytes_of(ran[1])
    with pytest.raises(InputError) as caught:
        run(recipe(ran[1].parent, "train.epochs=3", "variants.norm.removal.params=0.4"), ran[1], silent())
    text = str(caught.value)
    assert text.startswith(f"{ran[1]} holds the results of another recipe, which differs in ")
    assert "variants.penalised.train.epochs (2 there, 3 here)" in text
    assert text.endswith("go on with that one, or pass another folder by --out")
    assert bytes_of(ran[1]) == before


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match=r"holds other files: pass another folder by --out$"):
        run(recipe(tmp_path), tmp_path / "out", silent())
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("model.name=netsurgery.models:Nothing", "variant 'penalised': netsurgery.models has no 'Nothing'"),
        ("model.arguments.depth=3", "variant 'penalised': netsurgery.models:DigitsResNet with the arguments widths, "),
        ("variants.soft.soft.ratio=1.5", "variant 'soft': SoftPruning(ratio=1.5)"),
        ("variants.norm.removal.params=1.5", "variant 'norm': PruneChannels(params=1.5): a share to keep in (0, 1]"),
        ("variants.norm.penalty.exclude=['no.such']", "variant 'norm': "),
        (
            "model.arguments.classes=7",
            "variant 'penalised': netsurgery.models:DigitsResNet gives outputs of ",
        ),
        ("model={name='torchvision:resnet18'}", "variant 'penalised': aten.convolution.default in module 'conv1' at "),
        ("finetune.optimizer.lr=-1", "variant 'penalised': AdamW(lr=-1): Invalid learning rate: -1"),
        ("finetune.optimizer={name='Muon'}", "variant 'penalised': Muon(): Muon only supports 2D parameters"),
        (
            "finetune.schedule={name='onecycle', rise=1.0}",
            "variant 'penalised': rise = 1.0: a share of ",
        ),
        (
            "variants.norm.removal.multiple_of=7000",
            "variant 'norm': PruneChannels(params=0.5): DigitsResNet keeps at least ",
        ),
        (
            "variants.norm.removal.params=1.0",
            "variant 'norm': [removal] with params = 1.0, scope = 'global' takes nothing away",
        ),
        (
            "removal.params=99999",
            "variant 'penalised': [removal] with params = 99999, scope = 'global' takes nothing away ",
        ),
        ("variants.norm.removal.samples=0", "variant 'norm': PruneChannels(samples=0): a whole number of at least 1"),
        (
            "data.batch=401",
            "variant 'penalised': data.batch = 401: at most the 400 training images, and a multiple of the 1 processes",
        ),
        ("engine.accumulate=0", "engine.accumulate = 0: at least 1"),
        ("engine.mixed_precision=bf16", "engine.mixed_precision = bf16: AcceleratorState has already been initialized"),
    ],
)
def test_what_cannot_be_made_is_known_before_anything_runs(change: str, text: str, tmp_path: Path) -> None:
    Worker(Engine())  # one process has one precision
    with pytest.raises(InputError) as caught:
        run(recipe(tmp_path, change), tmp_path / "out", silent())
    assert str(caught.value).startswith(text)
    assert not (tmp_path / "out").exists()  # put right, it may go there


@pytest.mark.parametrize(("removal", "fails"), [
    ("ratio = 0.5, multiple_of = 7000", True), ("ratio = 0.0", True), ("macs = 10_000_000_000", True),
    ("threshold = -1.0", False), ("ratio = 0.5, compensate = 'bias'", False),
])  # fmt: skip
def test_a_removal_that_takes_nothing_is_known_before_anything_runs(removal: str, fails: bool, tmp_path: Path) -> None:
    """What a threshold takes depends on the scores."""
    text = "\n[variants.".join(RECIPE.split("\n[variants.")[:2])
    (tmp_path / "mini.toml").write_text(text.replace("params = 0.5", removal))
    study = Study(read(str(tmp_path / "mini.toml")), tmp_path / "out", False)
    message = r"^variant 'penalised': \[removal\] with .* takes nothing away from 1,382 parameters$"
    with pytest.raises(InputError, match=message) if fails else contextlib.nullcontext():
        fetch(study, Worker(Engine()))


def test_a_cut_that_is_not_exact_is_refused_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("netsurgery.verify", lambda *_: math.nan)
    with pytest.raises(
        NetsurgeryError, match=r"^the smaller network differs from the silenced one by nan \(relative\)"
    ):
        run(recipe(tmp_path, first=1), tmp_path / "out", silent())
    assert not list((tmp_path / "out").rglob("small.safetensors"))


@pytest.mark.usefixtures("undrawn")
def test_the_penalty_is_added_once_where_gradients_are_accumulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    inner = HGSR.add_gradient
    monkeypatch.setattr(HGSR, "add_gradient", lambda self, scale: (calls.append(scale), inner(self, scale))[1])
    run(recipe(tmp_path, "engine.accumulate=2", "data.limit=48", first=1), tmp_path / "out", silent())
    assert calls == [1.0] * 4  # three batches in each of two epochs: two steps in each
    state = checkpoints.read(tmp_path / "out" / "penalised" / "seed-0" / "train.safetensors")
    assert state["scheduler"]["last_epoch"] == 4
    assert state["scheduler"]["_last_lr"] == [pytest.approx(0.0)]  # the cosine has come to its end


def test_the_schedule_and_the_optimizer_are_those_of_the_recipe(ran: tuple[dict[str, Any], Path, str]) -> None:
    training = ran[0]["whole"][0]["training"]
    assert [e["lr"] for e in training] == [0.1, pytest.approx(0.1 * (1 + math.cos(math.pi / 2)) / 2)]
    state = checkpoints.read(ran[1] / "whole" / "seed-0" / "train.safetensors")
    assert state["optimizer"]["param_groups"][0]["momentum"] == 0.9
    assert set(checkpoints.read(ran[1] / "whole" / "seed-0" / "finetune.safetensors")["optimizer"]["state"][0]) == {
        *("step", "exp_avg", "exp_avg_sq")
    }


def test_accuracy_counts_every_image_once(tmp_path: Path) -> None:
    class First(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)

    x = torch.eye(4)[torch.arange(1030) % 4][:, None]
    y = torch.arange(1030) % 4
    y[:103] = (y[:103] + 1) % 4
    pairs = torch.utils.data.TensorDataset(x, y)
    assert Worker(recipe(tmp_path).engine).accuracy(First(), pairs) == pytest.approx(90)


def test_spread_over_seeds() -> None:
    assert spread([1.0, 3.0]) == {"mean": 2.0, "std": pytest.approx(math.sqrt(2)), "min": 1.0, "max": 3.0}
    assert spread([None, None]) is None
    one = {"trained": 90.0, "removed": 50.0, "finetuned": None, "parameters": [200, 50], "macs": [8, 6]}
    other = {**one, "trained": 91.0}
    assert markdown(lines({"a": [one, other]})).splitlines()[2] == (
        "| a | 90.50 ± 0.71 | 50.00 ± 0.00 | - | 25.00 ± 0.00 | 75.00 ± 0.00 |"
    )


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", WRITERS)
def test_what_is_shipped_runs_on_files_of_the_published_format(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything of every variant can be made, and one variant runs with a tiny part of everything."""
    WRITERS[name][0](tmp_path / "data", monkeypatch)
    load.cache_clear()
    small = ["seeds=[0]", "data.batch=4", "data.workers=0", "train.epochs=1", "finetune.epochs=1"]
    found = read(
        name, [*small, f"data.folder={tmp_path / 'data'}", "variants.hgsr + loss-increase.selection.samples=4"]
    )
    fetch(Study(found, tmp_path / "none", False), Worker(found.engine))
    chosen = {"hgsr + loss-increase": found.variants["hgsr + loss-increase"]}
    ((one,),) = run(replace(found, variants=chosen), tmp_path / "out", silent()).values()
    assert one["parameters"][1] <= found.variants["one-shot"].removal["params"] * one["parameters"][0]
    assert one["verify"] < 1e-3


COMMAND = [sys.executable, "-m", "netsurgery.cli", "train"]


@pytest.mark.slow
def test_killed_at_any_moment(ran: tuple[dict[str, Any], Path, str], tmp_path: Path) -> None:
    """SIGKILL at random moments, also while files are written, until the run comes to its end."""
    (tmp_path / "mini.toml").write_text(RECIPE)
    command = [*COMMAND, str(tmp_path / "mini.toml"), "--out", str(tmp_path / "out")]
    draw, kills = random.Random(0), 0
    log = tmp_path / "out" / "log.jsonl"
    for _ in range(40):
        size = log.stat().st_size if log.exists() else 0
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            while process.poll() is None and (not log.exists() or log.stat().st_size == size):
                time.sleep(0.01)  # until it has begun
            time.sleep(draw.uniform(0, 1.0))
            if process.poll() is None and kills < 6:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
            errors = process.communicate()[1]
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors
    assert kills >= 3
    assert bytes_of(tmp_path / "out") == bytes_of(ran[1])


@pytest.mark.slow
def test_two_processes_choose_and_hold_the_same(tmp_path: Path) -> None:
    (tmp_path / "mini.toml").write_text(RECIPE)
    ranks = Path(__file__).with_name("training_ranks.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(ranks)]
    done = subprocess.run([*launch, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert [one["processes"] for one in found] == [2, 2]
    assert found[0]["results"] == found[1]["results"]
    assert len(found[0]["weights"]) == 8  # of every stage of every variant: one training is shared, all are fine-tuned
    assert found[0]["weights"] == found[1]["weights"]
    assert found[0]["seen"] != found[1]["seen"]  # other images
    for (one,) in found[0]["results"].values():  # of 450 images, each counted once
        assert one["removed"] * 4.5 == pytest.approx(round(one["removed"] * 4.5))


@pytest.mark.usefixtures("undrawn")
def test_soft_pruning_before_training_is_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner, calls = SoftPruning.step, []
    monkeypatch.setattr(SoftPruning, "step", lambda self, epoch: (calls.append(epoch), inner(self, epoch))[1])
    (tmp_path / "mini.toml").write_text(RECIPE.split("[variants.")[0].replace("removal =", "# removal ="))
    given = ["soft={method='sfp', ratio=0.3, grouping='coupled', before_training=true}"]
    found = read(str(tmp_path / "mini.toml"), given)
    whole = run(found, tmp_path / "whole", silent())
    assert calls == [-1, 0, 1]
    with pytest.MonkeyPatch.context() as patch:
        stopped(patch, "epoch", 1)
        with pytest.raises(KeyboardInterrupt):
            run(found, tmp_path / "out", silent())
    assert run(found, tmp_path / "out", silent()) == whole
    assert calls == [-1, 0, 1, -1, 0, 1]  # what goes on does not begin again
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    without = run(read(str(tmp_path / "mini.toml"), [given[0].replace("true", "false")]), tmp_path / "no", silent())
    assert without["mini"][0]["training"] != whole["mini"][0]["training"]


def order_of(seed: int, epoch: int = 0, stage: str = "train", count: int = 40, batch: int = 8) -> list[int]:
    """The images, by number, in the order in which a run of a seed learns from them."""
    pairs = torch.utils.data.TensorDataset(torch.arange(count).float()[:, None], torch.zeros(count).long())
    images = Images(pairs, pairs, pairs, 1)  # type: ignore[arg-type]
    fit = Fit(Stage(2, {"name": "SGD", "lr": 0.0}, {"name": "constant"}), images, Data("digits", batch),
              derived(seed, stage), Path("none"))  # fmt: skip
    started = Run(Worker(Engine()), nn.Linear(1, 1), fit)
    started.loader.set_epoch(epoch)
    return [int(one) for x, _ in started.loader for one in x[:, 0]]


def test_the_order_of_the_images_differs_by_seed_stage_and_epoch() -> None:
    """A seed that changed the weights alone would make the spread over seeds too small."""
    orders = {
        "first": order_of(0),
        "seeds": order_of(1),
        "stages": order_of(0, stage="finetune"),
        "epochs": order_of(0, epoch=1),
        "other": order_of(2),
    }
    assert all(sorted(order) == list(range(40)) for order in orders.values())
    assert len(set(map(tuple, orders.values()))) == len(orders)
    assert orders["first"] != sorted(orders["first"])
    assert order_of(0) == orders["first"]
    torch.manual_seed(5)  # what the program drew before makes no difference
    torch.rand(3)
    assert order_of(0) == orders["first"]


def test_what_is_drawn_in_an_epoch_differs_by_seed_and_epoch() -> None:
    """Dropout and augmentation follow the seed too."""

    class Noted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.drawn = nn.Parameter(torch.zeros(1, 1)), []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.drawn.append(float(torch.rand(())))
            return x @ self.weight

    pairs = torch.utils.data.TensorDataset(torch.zeros(4, 1), torch.zeros(4).long())
    seen = []
    for seed in (0, 1):
        images, model = Images(pairs, pairs, pairs, 1), Noted()  # type: ignore[arg-type]
        stage = Stage(1, {"name": "SGD", "lr": 0.0}, {"name": "constant"})
        started = Run(Worker(Engine()), model, Fit(stage, images, Data("digits", 4), seed, Path("none")))
        for epoch in (0, 1):
            model.drawn.clear()
            before = torch.random.get_rng_state()
            started.epoch(epoch)
            assert torch.equal(torch.random.get_rng_state(), before)  # the caller goes on as if nothing had been drawn
            seen.append(model.drawn[0])
    assert len(set(seen)) == 4


def test_the_demo_learns_in_the_order_of_its_seed() -> None:
    """From the same weights and the same images."""
    x, y = torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(200) % 10
    found = []
    for seed in (0, 1, 0):
        torch.manual_seed(3)
        model = DigitsResNet((2, 2))
        demo.fit(model, (x, y), 1, 1e-3, seed, lambda: None)
        found.append(model.head.weight.detach().clone())
    assert found[0].equal(found[2]) and not found[0].equal(found[1])


@pytest.mark.parametrize(("count", "accumulate", "steps"), [(48, 2, 2), (64, 3, 2), (80, 2, 3), (80, 4, 2), (48, 1, 3)])
def test_the_rate_in_the_middle_of_a_stage_with_accumulation(count: int, accumulate: int, steps: int) -> None:
    """Batches of 16: what is left at the end of an epoch makes a step of its own, so numbers are rounded up."""
    pairs = torch.utils.data.TensorDataset(torch.zeros(count, 1), torch.zeros(count).long())
    images = Images(pairs, pairs, pairs, 1)  # type: ignore[arg-type]
    stage = Stage(4, {"name": "SGD", "lr": 1.0}, {"name": "cosine"})
    started = Run(
        Worker(Engine(accumulate=accumulate)), nn.Linear(1, 1), Fit(stage, images, Data("digits", 16), 0, Path())
    )
    for epoch in range(4):
        figures = started.epoch(epoch)
        assert figures["lr"] == pytest.approx((1 + math.cos(math.pi * epoch / 4)) / 2)
        assert started.scheduler.last_epoch == steps * (epoch + 1)
    assert started.scheduler.get_last_lr() == [pytest.approx(0.0, abs=1e-12)]


# First contact -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["penalised", "norm", "soft", "whole"])
def test_load_reads_what_a_run_leaves(name: str, ran: tuple[dict[str, Any], Path, str]) -> None:
    variant, out, (one,) = recipe(ran[1].parent).variants[name], ran[1] / name / "seed-0", ran[0][name]
    whole = fresh(variant.model, 7)
    before = {key: value.clone() for key, value in whole.state_dict().items()}
    small = netsurgery.load(out, whole)
    assert type(small) is type(whole)
    assert sum(p.numel() for p in small.parameters()) == one["parameters"][1]
    assert Worker(Engine()).accuracy(small, load(variant.data, 0).test) == one["finetuned"]
    assert all(value.equal(before[key]) for key, value in whole.state_dict().items())
    expected = checkpoints.read(out / "finetune.safetensors")["model"]
    assert all(value.equal(expected[key]) for key, value in small.cpu().state_dict().items())


def test_load_reads_what_was_not_fine_tuned(ran: tuple[dict[str, Any], Path, str], tmp_path: Path) -> None:
    shutil.copy(ran[1] / "norm" / "seed-0" / "small.safetensors", tmp_path)
    small = netsurgery.load(tmp_path, fresh(recipe(ran[1].parent).variants["norm"].model, 7))
    assert small.head.weight.equal(checkpoints.read(tmp_path / "small.safetensors")["model"]["head.weight"])


def test_load_says_where_runs_are(ran: tuple[dict[str, Any], Path, str], tmp_path: Path) -> None:
    out, whole = ran[1], fresh(recipe(ran[1].parent).variants["norm"].model, 0)
    (tmp_path / "begun" / "norm" / "seed-0").mkdir(parents=True)
    shutil.copy(out / "recipe.json", tmp_path / "begun")
    shutil.copy(out / "penalised" / "seed-0" / "train.safetensors", tmp_path / "begun" / "norm" / "seed-0")
    for folder, advice in {
        out: f"pass the folder of one of its runs, such as {out}/norm/seed-0",
        tmp_path / "begun": "no run has come to its removal yet",
        tmp_path
        / "begun"
        / "norm"
        / "seed-0": "its run has not come to the removal yet; netsurgery train goes on with it",
        tmp_path: "pass a folder that netsurgery.save, netsurgery prune --out or a run of netsurgery train wrote",
    }.items():
        with pytest.raises(InputError) as caught:
            netsurgery.load(folder, whole)
        assert str(caught.value) == f"{folder} holds no edit.json: {advice}"


def test_load_refuses_a_model_of_other_sizes(ran: tuple[dict[str, Any], Path, str]) -> None:
    with pytest.raises(InputError, match=r"^the edit is for another model: group 'stem.0' has 4 units there, 6 here$"):
        netsurgery.load(ran[1] / "norm" / "seed-0", DigitsResNet((6, 8)))


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as in the foreground: processes in the background ignore it, and so do those that they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    ("where", "text"),
    [("step", "keeps all runs and epochs that were finished; the same command goes on from there"), ("claim", "")],
)
def test_an_interruption_says_what_is_kept(where: str, text: str, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if where == "step":
            stopped(patch, "step", 37)
        else:
            patch.setattr(Study, "claim", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt) as caught:
            run(recipe(tmp_path), tmp_path / "out", silent())
    assert str(caught.value) == (f"{tmp_path / 'out'} {text}" if text else "nothing had been done yet")
    assert (tmp_path / "out" / "penalised" / "seed-0" / "train.safetensors").exists() == (where == "step")


@pytest.mark.usefixtures("interruptible")
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("times", "steps"), [(1, 30), (2, 29)])
def test_control_c_is_not_lost_in_training(
    times: int, steps: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Python drops exceptions in the ``__del__`` of iterators; pressed twice, it takes effect at once."""

    class Dropped:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0)  # where the signal is dealt with

    inner, calls = Run.step, []

    def step(self: Run, *batch: torch.Tensor) -> Any:
        if len(calls) == 29:
            Dropped()
            if times == 2:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
        calls.append(len(calls))
        return inner(self, *batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "step", step)
        with pytest.raises(KeyboardInterrupt, match="keeps all runs and epochs that were finished"):
            run(recipe(tmp_path), tmp_path / "out", silent())
    assert len(calls) == steps and capfd.readouterr().err == ""
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("undrawn")
def test_handlers_of_others_are_left_alone(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        found = threading.Thread(target=lambda: run(recipe(tmp_path, first=1), tmp_path / "a", silent()))
        found.start(), found.join()
        run(recipe(tmp_path, first=1), tmp_path / "b", silent())
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_control_c_prints_one_line(workers: int, tmp_path: Path) -> None:
    text = RECIPE.replace("epochs = 2", "epochs = 2000").replace("batch = 16", f"batch = 16, workers = {workers}")
    (tmp_path / "mini.toml").write_text(text)
    log = tmp_path / "out" / "log.jsonl"
    command = [*COMMAND, "mini.toml", "--out", "out"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        while process.poll() is None and not (log.exists() and '"epoch": 1' in log.read_text()):
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        output, errors = process.communicate(timeout=120)
    assert (process.returncode, output.strip()) == (130, "")
    assert errors == (
        "interrupted: out keeps all runs and epochs that were finished; the same command goes on from there\n"
    )
    assert checkpoints.read(tmp_path / "out" / "penalised" / "seed-0" / "train.safetensors")["history"]


@pytest.mark.parametrize("width", [40, 49, 60, 79, 100, 200])
@pytest.mark.parametrize("seeds", [1, 3])
def test_the_table_is_whole_in_any_terminal(width: int, seeds: int) -> None:
    names = ["hgsr + loss-increase", "one-shot", "a_name_of_a_single_word_that_is_long"]
    one = {"trained": 98.96, "removed": 24.31, "finetuned": None, "parameters": [200, 200], "macs": [900, 613]}
    runs = [{**one, "removed": one["removed"] + 33 * index} for index in range(seeds)]
    found = lines(dict.fromkeys(names, runs))
    text = io.StringIO()
    Console(file=text, width=width).print(table("digits", found, width), crop=False)
    rows = text.getvalue().splitlines()
    assert "…" not in text.getvalue()
    assert width < 49 or max(map(len, rows)) <= width
    start = min(row.find("trained") for row in rows if "trained" in row and "accuracy" not in row)
    first = "".join(row[:start].strip() for row in rows[1:])
    assert all(name.replace(" ", "") in first.replace(" ", "") for name in names)  # broken over lines, but whole
    for figure in (
        "98.96",
        f"{24.31 + 33 * (seeds - 1) / 2:.2f}",
        "100.00",
        "68.11",
        *(["±33.00"] if seeds > 1 else []),
    ):
        assert text.getvalue().count(figure) == len(names), figure
