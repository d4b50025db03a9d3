"""Which weights a model has: random ones are known as such, files are read safely, and `prune` says which."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import netsurgery
from netsurgery.cli import app
from netsurgery.errors import InputError
from netsurgery.models import DigitsResNet
from netsurgery.training import checkpoints
from netsurgery.training.recipe import Model
from netsurgery.training.stages import fresh
from netsurgery.weight_sources import Draws, fill, prepared, read_weights

MODELS = """
import torch
from torch import nn


def net():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3))


def seeded():
    torch.manual_seed(5)
    return net()


def trained():
    model = net()
    model.load_state_dict(torch.load("weights.pt", weights_only=True))
    return model


def new_head():
    model = trained()
    model[2] = nn.Conv2d(8, 2, 1)
    return model


def mostly_new():
    model = trained()
    model[2] = nn.Conv2d(8, 60, 3)
    return model


def constant():
    return nn.Sequential(nn.BatchNorm2d(1))


ready = net()
"""


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3))


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Sequential:
    """A module `own` in the current directory, and a file of weights beside it; the network that these are of."""
    (tmp_path / "own.py").write_text(MODELS)
    torch.manual_seed(3)
    model = net()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own", raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    return model


def prune(*arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `netsurgery prune ... --ratio 0.5`."""
    result = CliRunner().invoke(app, ["prune", *arguments, "--ratio", "0.5"], catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


def first_line(*arguments: str) -> str:
    code, output, errors = prune(*arguments)
    assert (code, errors) == (0, "")
    return output.splitlines()[0]


def refused(*arguments: str) -> str:
    """The message, which is all that is printed, in one line."""
    code, output, errors = prune(*arguments)
    assert (code, output, errors.count("\n")) == (1, "", 1)
    return errors.removeprefix("error: ").rstrip("\n")


# What is random ------------------------------------------------------------------------------------------------------

STATE = nn.Linear(3, 4).state_dict()


def filled(**options: Any) -> nn.Module:
    layer = nn.Linear(3, 4)
    layer.load_state_dict(STATE, **options)
    return layer


def by_data() -> nn.Module:
    layer = nn.Linear(3, 4)
    layer.weight.data = STATE["weight"].clone()
    return layer


def by_slice() -> nn.Module:
    layer = nn.Linear(3, 4)
    with torch.no_grad():
        layer.weight[:2] = STATE["weight"][:2]
        layer.bias.copy_(STATE["bias"])
    return layer


def on_meta() -> nn.Module:
    with torch.device("meta"):
        layer = nn.Linear(3, 4)
    layer.load_state_dict(STATE, assign=True)
    return layer


def emptied() -> nn.Module:
    with torch.device("meta"):
        layer = nn.Linear(3, 4)
    return layer.to_empty(device="cpu")


def sparse() -> nn.Module:
    layer = nn.Linear(3, 4)
    layer.register_buffer("mask", torch.eye(3).to_sparse())
    layer.mask.copy_(torch.eye(3).to_sparse())
    return layer


def pickled() -> nn.Module:
    file = io.BytesIO()
    torch.save(nn.Linear(3, 4), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded, nn.Module)
    return loaded


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scaled = nn.Parameter(torch.randn(3) * 0.02)
        self.zero, self.one = nn.Parameter(torch.zeros_like(self.scaled)), nn.Parameter(torch.ones(3))
        self.unset = nn.Parameter(torch.empty(3))
        self.ramp = nn.Parameter(torch.linspace(0, 1, 3))
        nn.init.trunc_normal_(self.one, std=0.1)


@pytest.mark.parametrize(
    ("make", "random"),
    [
        (lambda: nn.Linear(3, 4), ["weight", "bias"]),
        (lambda: nn.Linear(3, 4).half(), ["weight", "bias"]),
        (lambda: nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)), ["0.weight", "0.bias"]),
        (lambda: nn.Embedding(5, 4, padding_idx=0), ["weight"]),
        (lambda: copy.deepcopy(nn.Linear(3, 4, bias=False)), ["weight"]),
        (lambda: nn.MultiheadAttention(8, 2), ["in_proj_weight", "out_proj.weight"]),
        (Own, ["scaled", "one", "unset"]),
        (filled, []),
        (lambda: filled(assign=True), []),
        (lambda: filled().double(), []),
        (by_data, ["bias"]),
        (by_slice, ["weight"]),
        (on_meta, []),
        (emptied, ["weight", "bias"]),
        (pickled, []),
        (sparse, ["weight", "bias"]),
    ],
)
def test_what_is_random(make: Callable[[], nn.Module], random: list[str]) -> None:
    with Draws() as draws:
        model = make()
    assert draws.random(model) == random


def test_the_model_is_the_one_that_is_made_without_looking() -> None:
    torch.manual_seed(1)
    expected = DigitsResNet((4, 8)).state_dict()
    torch.manual_seed(1)
    with Draws():
        found = DigitsResNet((4, 8)).state_dict()
    assert all(found[name].equal(value) for name, value in expected.items())


# What `prune` says ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["own:net", "own:seeded", "own:ready", "own:mostly_new"])
def test_random_weights_are_asked_for(name: str) -> None:
    assert refused(name) == (f"{name} has random weights: pass --weights FILE, or --random-weights if these are meant")
    del sys.modules["own"]  # what is imported already was made unseen
    assert first_line(name, "--random-weights") == "weights: random, as asked for"


@pytest.mark.parametrize("name", ["torchvision:squeezenet1_0", "timm:resnet10t", "torchvision.models:squeezenet1_0"])
def test_so_they_are_of_published_models(name: str) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm")
    choice = {"torchvision": f"{name}@DEFAULT, ", "timm": f"{name}@pretrained, "}.get(name.partition(":")[0], "")
    assert refused(name, "--input", "1x3x64x64", "--dry-run") == (
        f"{name} has random weights: pass {choice}--weights FILE, or --random-weights if these are meant"
    )


def test_what_a_callable_loads_is_left_to_it() -> None:
    assert first_line("own:trained") == "weights: as own:trained returns them"
    assert first_line("own:new_head") == "weights: as own:new_head returns them; random: 2.weight, 2.bias"


def test_a_network_of_constants_is_not_random() -> None:
    model, said = prepared("own:constant")
    assert (type(model), said) == (nn.Sequential, "as own:constant returns them")


def test_a_file_is_loaded_and_pruned(models: nn.Sequential) -> None:
    assert first_line("own:net", "--weights", "weights.pt", "--out", "small") == "weights: weights.pt"
    edit = netsurgery.plan(models, [netsurgery.passes.HGSRScore(), netsurgery.passes.PruneChannels(0.5)])
    assert Path("small/edit.json").read_text() == edit.to_json()
    small = netsurgery.load("small", net())
    assert small[0].weight.equal(models[0].weight[list(edit.keep["0"])])


@pytest.mark.parametrize(
    "arguments",
    [
        ("torchvision:resnet18@DEFAULT", "--random-weights"),
        ("timm:resnet18@pretrained", "--weights", "weights.pt"),
        ("own:net", "--weights", "weights.pt", "--random-weights"),
    ],
)
def test_weights_are_named_in_one_way(arguments: tuple[str, ...]) -> None:
    assert refused(*arguments) == "name the weights in one way: MODEL@WEIGHTS, --weights FILE or --random-weights"


# Published weights ---------------------------------------------------------------------------------------------------


def test_torchvision_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the cache, where torch.hub would put what it fetches."""
    from torchvision import models

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    torch.manual_seed(0)
    model = models.squeezenet1_1()
    weights = models.SqueezeNet1_1_Weights.DEFAULT
    folder = tmp_path / "home" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(model.state_dict(), folder / Path(weights.url).name)
    for name in ("DEFAULT", "IMAGENET1K_V1"):
        found, said = prepared(f"torchvision:squeezenet1_1@{name}")
        assert found.classifier[1].weight.equal(model.classifier[1].weight)
        assert said == f"published, torchvision:squeezenet1_1@{name}"
    for seed in (0, 1):  # a recipe may begin with them, whatever its seeds
        begun = fresh(Model("torchvision:squeezenet1_1@DEFAULT"), seed)
        assert begun.classifier[1].weight.equal(model.classifier[1].weight)
    with pytest.raises(InputError, match=r"^torchvision:squeezenet1_1@DEFAULT: .*num_classes"):
        netsurgery.model_lookup.build("torchvision:squeezenet1_1@DEFAULT", num_classes=7)


def test_timm_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    model, asked = timm.create_model("resnet10t"), []

    def fetch(*where: Any, **_: Any) -> dict[str, torch.Tensor]:
        asked.append(where)
        state: dict[str, torch.Tensor] = model.state_dict()
        return state

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fetch)
    for name in ("resnet10t@pretrained", "resnet10t@c3_in1k", "resnet10t.c3_in1k@pretrained"):
        found, said = prepared(f"timm:{name}")
        assert found.fc.weight.equal(model.fc.weight)
        assert said == f"published, timm:{name}"
    assert {str(where[0]) for where in asked} == {"timm/resnet10t.c3_in1k"}
    head = netsurgery.model_lookup.build("timm:resnet10t@pretrained", num_classes=7)
    assert head.fc.weight.shape == (7, 512)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision:resnet18@DEFAUL", "torchvision has no weights 'DEFAUL' of resnet18; did you mean DEFAULT?"),
        ("torchvision:resnet18@x", "torchvision has no weights 'x' of resnet18; there are IMAGENET1K_V1, DEFAULT"),
        ("timm:resnet10t@c3_in1", "timm has no weights 'c3_in1' of resnet10t; did you mean c3_in1k?"),
        ("timm:resnet10t.zzz@pretrained", "timm has no weights 'zzz' of resnet10t; there are pretrained, c3_in1k"),
        (
            "timm:botnet50ts_256@pretrained",
            "timm has no weights 'pretrained' of botnet50ts_256; there are none",
        ),
        (
            "own:net@best",
            "own:net@best: only torchvision: and timm: have weights by name; let the callable load them, or pass the "
            "file by --weights",
        ),
        (
            "torchvision:resnet18@",
            "'torchvision:resnet18@' names no model; write torchvision:NAME, timm:NAME, either with @WEIGHTS, or "
            "package.module:callable",
        ),
    ],
)
def test_weights_that_there_are_not(name: str, message: str) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm")
    assert refused(name) == message


@pytest.mark.parametrize("error", [OSError("no network"), RuntimeError("invalid hash value")])
def test_weights_that_cannot_be_fetched(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    assert refused("torchvision:resnet18@DEFAULT") == (
        f"torchvision:resnet18@DEFAULT: the weights cannot be fetched ({error}): fetch them elsewhere and pass the "
        "file by --weights"
    )


# Files ---------------------------------------------------------------------------------------------------------------


def test_what_files_may_hold(models: nn.Sequential, tmp_path: Path) -> None:
    state = dict(models.state_dict())
    save_file(state, "plain.safetensors")
    save_file(state, "no_suffix")
    torch.save(state, "old.pth", _use_new_zipfile_serialization=False)
    torch.save({"epoch": 3, "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}, "loop.ckpt")
    torch.save({f"module.{name}": value for name, value in state.items()}, "ddp.pt")
    torch.save({"model": {f"_orig_mod.model.{name}": value for name, value in state.items()}}, "compiled.pt")
    checkpoints.write(tmp_path / "train.safetensors", {"model": state, "history": [], "scheduler": {"last_epoch": 1}})
    said = {
        "weights.pt": "weights.pt",
        "plain.safetensors": "plain.safetensors",
        "no_suffix": "no_suffix",
        "old.pth": "old.pth",
        "loop.ckpt": "'state_dict' in loop.ckpt",
        "ddp.pt": "ddp.pt",
        "compiled.pt": "'model' in compiled.pt",
        "train.safetensors": "'model' in train.safetensors",
    }
    for file, words in said.items():
        found, source = prepared("own:net", Path(file))
        assert all(value.equal(state[name]) for name, value in found.state_dict().items()), file
        assert source == words


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


def written(content: bytes) -> str:
    Path("file").write_bytes(content)
    return "file"


def saved(value: Any) -> str:
    torch.save(value, "file")
    return "file"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: "nowhere.pt", "nowhere.pt: there is no such file"),
        (lambda: ".", ".: there is no such file"),
        (
            lambda: saved(nn.Linear(2, 2)),
            "file cannot be read (it holds Python objects, whose code is not run): pass a ",
        ),
        (
            lambda: saved({"state_dict": Evil()}),
            "file cannot be read (it holds Python objects, whose code is not run): ",
        ),
        (lambda: written(pickle.dumps(Evil())), "file cannot be read ("),
        (lambda: written(b""), "file cannot be read ("),
        (lambda: written(b"\x89PNG\r\n\x1a\n" + bytes(40)), "file cannot be read ("),
        (lambda: written(b"weights of a network"), "file cannot be read ("),
        (lambda: written(Path("weights.pt").read_bytes()[:300]), "file cannot be read ("),
        (lambda: written(b'\x10\0\0\0\0\0\0\0{"broken": tensor'), "file cannot be read ("),
        (lambda: saved([torch.zeros(2)]), "file holds no state dict: save the one that is meant alone, by torch.save("),
        (
            lambda: saved({"model": {"a": torch.zeros(2)}, "ema": {"a": torch.zeros(2)}}),
            "file holds several state dicts ",
        ),
    ],
)
def test_files_that_hold_no_weights(make: Callable[[], str], message: str) -> None:
    assert refused("own:net", "--weights", make()).startswith(message)
    assert not Path("ran").exists()


def test_files_of_other_models(models: nn.Sequential) -> None:
    state = dict(models.state_dict())
    cases = {
        "0.weight is 8x1x5x5 there and 8x1x3x3 here": {**state, "0.weight": torch.zeros(8, 1, 5, 5)},
        "2.bias is missing": {name: value for name, value in state.items() if name != "2.bias"},
        "4.weight has no place": {**state, "4.weight": torch.zeros(2)},
        "0.weight is missing, 0.bias is missing, 2.weight is missing and 2 more": {"fc": torch.zeros(1)},
    }
    for message, other in cases.items():
        torch.save(other, "other.pt")
        assert refused("own:net", "--weights", "other.pt") == (
            f"other.pt is for another model than this Sequential: {message}"
        )
        before = copy.deepcopy(models.state_dict())
        with pytest.raises(InputError):
            fill(models, other, "other.pt")
        assert all(value.equal(before[name]) for name, value in models.state_dict().items())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize("kept", ["embedding.weight", "head.weight"])
def test_of_tied_weights_one_is_enough(kept: str) -> None:
    """Files of safetensors hold them once."""
    model = Tied()
    fill(model, {kept: torch.full((5, 3), 7.0)}, "tied")
    assert model.head.weight is model.embedding.weight and bool((model.head.weight == 7).all())
    untied = Tied()
    untied.head.weight = nn.Parameter(torch.zeros(5, 3))
    with pytest.raises(InputError, match=r"weight is missing$"):
        fill(untied, {kept: torch.ones(5, 3)}, "tied")


def test_files_from_before_batches_were_counted() -> None:
    norm = nn.BatchNorm2d(3)
    old = {name: value + 1 for name, value in norm.state_dict().items() if name != "num_batches_tracked"}
    fill(norm, old, "old.pt")
    assert norm.weight.tolist() == [2, 2, 2]


def test_a_state_dict_that_is_read_is_the_one_that_was_saved() -> None:
    torch.save(net().state_dict(), "x.pt")
    state, said = read_weights(Path("x.pt"))
    assert (list(state), said) == (["0.weight", "0.bias", "2.weight", "2.bias"], "x.pt")
