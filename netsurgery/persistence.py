"""Keep a pruned model as a state dict and the edit that made it: no pickled classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from netsurgery.edit import Edit
from netsurgery.errors import InputError
from netsurgery.pipeline import trace
from netsurgery.rewriting import rewrite

__all__ = ["load", "save"]

Model = TypeVar("Model", bound=nn.Module)


def save(folder: str | Path, small: nn.Module, edit: Edit) -> None:
    """Write ``weights.pt`` (the state dict) and ``edit.json`` into a folder, which is made if need be."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    torch.save(small.state_dict(), path / "weights.pt")
    (path / "edit.json").write_text(edit.to_json(), encoding="utf-8")


def load(folder: str | Path, model: Model, example_inputs: Any = None) -> Model:
    """The saved smaller model, from a fresh full-size model of the same constructor, which stays as it is.

    Args:
        example_inputs: as for ``trace``; by default inputs of the shapes that the saved edit was made with.

    Raises:
        NetsurgeryError: the folder holds no saved model, or one of another architecture.
    """
    path = Path(folder)
    for name in ("edit.json", "weights.pt"):
        if not (path / name).is_file():
            raise InputError(f"{path} holds no {name}: pass a folder that netsurgery.save wrote")
    text = (path / "edit.json").read_text(encoding="utf-8")
    if example_inputs is None and (inputs := json.loads(text)["inputs"]) is not None:
        example_inputs = tuple(torch.zeros(shape, dtype=getattr(torch, dtype)) for shape, dtype in inputs)
    edit = Edit.from_json(text, trace(model, example_inputs))
    small = rewrite(model, edit)
    small.load_state_dict(torch.load(path / "weights.pt", weights_only=True))
    return small
