"""Checkpoints: what goes in comes out bit for bit, nothing is pickled, and a file is there whole or not at all."""

import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from netsurgery.errors import InputError
from netsurgery.training.checkpoints import read, replace, write


def same(a: Any, b: Any) -> bool:
    """Equal in type, order of keys, and every bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.cpu().numpy().tobytes() == b.cpu().numpy().tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return struct.pack("d", a) == struct.pack("d", b) if isinstance(a, float) else a == b


def trained(optimizer: type[torch.optim.Optimizer], **options: Any) -> dict[str, Any]:
    """A state as it comes: whole-number keys, tuples, None, tensors of no dimension."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)).to(memory_format=torch.channels_last)
    chosen = optimizer(model.parameters(), **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(chosen, lambda step: 1 / (1 + step))
    for _ in range(3):
        model(torch.randn(2, 1, 5, 5)).square().mean().backward()
        chosen.step()
        schedule.step()
    return {"model": model.state_dict(), "optimizer": chosen.state_dict(), "schedule": schedule.state_dict()}


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.AdamW, {"lr": 0.1, "amsgrad": True}),
        (torch.optim.Adafactor, {"lr": 0.1}),
    ],
)
def test_states_of_training(optimizer: type[torch.optim.Optimizer], options: dict[str, Any], tmp_path: Path) -> None:
    state = trained(optimizer, **options)
    write(tmp_path / "a" / "state.safetensors", state)
    found = read(tmp_path / "a" / "state.safetensors")
    state["model"] = dict(state["model"])  # torch's OrderedDict
    assert list(found["model"]) == list(state["model"])
    assert all(same(found["model"][k], v) for k, v in state["model"].items())
    assert same(found["optimizer"], {k: dict(v) if k == "state" else v for k, v in state["optimizer"].items()})
    assert same(found["schedule"], state["schedule"])


def test_values_of_every_kind(tmp_path: Path) -> None:
    values = {
        "floats": [0.1, 1e-320, -0.0, float("inf"), float("nan")],
        "others": (True, None, 2**70, "ä\n", ()),
        0: {"0": torch.tensor([True, False]), "deep": [{"a/b": torch.tensor(3, dtype=torch.uint8)}]},
        "empty": torch.empty(0, 3),
        "alike": {0: torch.zeros(1), "0": torch.ones(2), "a": {"b": torch.ones(3)}, "a/b": torch.ones(4)},
        "half": torch.randn(3).half(),
        "view": torch.arange(6.0).reshape(2, 3).t(),
    }
    write(tmp_path / "v", values)
    assert same(read(tmp_path / "v"), values)


def test_tensors_that_share_memory_and_a_state_without_tensors(tmp_path: Path) -> None:
    x = torch.randn(4)
    write(tmp_path / "v", {"a": x, "b": x[:2], "c": x})
    assert same(read(tmp_path / "v"), {"a": x, "b": x[:2].clone(), "c": x})
    write(tmp_path / "v", {"a": 1})
    assert read(tmp_path / "v") == {"a": 1}


def test_names_that_other_programs_find(tmp_path: Path) -> None:
    write(tmp_path / "v", {"model": {"conv.weight": torch.ones(2)}})
    with safe_open(tmp_path / "v", "pt") as file:
        assert list(file.keys()) == ["model/conv.weight"]


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({"a": {"b": {1}}}, "a checkpoint cannot hold a/b, a set"),
        ({"a": [nn.ReLU()]}, "a checkpoint cannot hold a/0, a ReLU"),
        ({"a": {1.5: 0}}, "a checkpoint cannot hold the key 1.5 of a"),
    ],
)
def test_what_is_refused(state: Any, text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^{text}$"):
        write(tmp_path / "v", state)
    assert not (tmp_path / "v").exists()


@pytest.mark.parametrize("kind", ["state", "text"])
def test_what_was_there_stays_until_the_new_file_is_whole(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put(value: Any) -> None:
        write(tmp_path / "v", value) if kind == "state" else replace(tmp_path / "v", value)

    put("old")
    before = (tmp_path / "v").read_bytes()

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        put("new")
    assert (tmp_path / "v").read_bytes() == before
    monkeypatch.undo()
    put("new")  # what the kill left behind is in nobody's way
    assert (tmp_path / "v").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["v"]
