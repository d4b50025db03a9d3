"""Keep a pruned model as a state dict and the edit that made it, and read it back: no pickled classes."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

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
        folder: one that ``save`` or ``netsurgery prune --out`` wrote, or of a run of ``netsurgery train``:
            ``runs/digits/sfp/seed-0``, whose network is as it was after the last epoch done.
        example_inputs: as for ``trace``; by default inputs of the shapes that the saved edit was made with.

    Raises:
        NetsurgeryError: the folder holds no saved model, or one of another architecture.
    """
    text, weights = _kept(Path(folder))
    if text is None:  # nothing was removed
        small = copy.deepcopy(model)
    else:
        if example_inputs is None and (inputs := json.loads(text)["inputs"]) is not None:
            example_inputs = tuple(torch.zeros(shape, dtype=getattr(torch, dtype)) for shape, dtype in inputs)
        edit = Edit.from_json(text, trace(model, example_inputs))
        small = rewrite(model, edit)
    small.load_state_dict(weights)
    return small


def _kept(folder: Path) -> tuple[str | None, Mapping[str, Tensor]]:
    """The edit, as JSON, and the state dict in a folder that ``save`` or a run of a recipe wrote."""
    if (folder / "small.safetensors").is_file():
        from netsurgery.training import checkpoints  # stands above this module, and is heavy

        small = checkpoints.read(folder / "small.safetensors")
        tuned = folder / "finetune.safetensors"
        return small["edit"], (checkpoints.read(tuned) if tuned.is_file() else small)["model"]
    for name in ("edit.json", "weights.pt"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} holds no {name}: {_advice(folder)}")
    text = (folder / "edit.json").read_text(encoding="utf-8")
    return text, torch.load(folder / "weights.pt", weights_only=True)


def _advice(folder: Path) -> str:
    if (folder / "recipe.json").is_file():
        runs = sorted(str(path.parent) for path in folder.glob("*/seed-*/small.safetensors"))
        return (
            f"pass the folder of one of its runs, such as {runs[0]}" if runs else "no run has come to its removal yet"
        )
    if (folder / "train.safetensors").is_file():
        return "its run has not come to the removal yet; netsurgery train goes on with it"
    return "pass a folder that netsurgery.save, netsurgery prune --out or a run of netsurgery train wrote"
