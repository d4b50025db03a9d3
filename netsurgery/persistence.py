"""Keep a pruned model as a state dict and the edit that made it, and read it back: no pickled classes."""

from __future__ import annotations

import copy
import importlib
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from netsurgery.arguments import expect
from netsurgery.capture.copies import named_tensors
from netsurgery.edit import Edit
from netsurgery.edit_json import inputs_in
from netsurgery.errors import InputError, NetsurgeryError
from netsurgery.outputs import check_writable, writing
from netsurgery.pipeline import trace
from netsurgery.rewriting.stages import read
from netsurgery.rewriting.surgery import rewrite
from netsurgery.tables import first_of

__all__ = ["load", "save"]

Model = TypeVar("Model", bound=nn.Module)
_ADVICE = "free the space that is missing, or pass another folder"


def save(folder: str | Path, small: nn.Module, edit: Edit) -> None:
    """Write ``weights.pt`` (the state dict) and ``edit.json`` into a folder, which is made if need be.

    Args:
        folder: where they go.
        small: the model that the edit led to, trained on or not.
        edit: the one that ``plan`` made for the full-size model.

    Raises:
        InputError: other arguments, or in another order; a model of other sizes than the edit leads to, such as the
            full-size one; or a folder that cannot be written to.
        NetsurgeryError: the disk is full, or failed.

    Example:
        >>> import tempfile, torch, netsurgery
        >>> from netsurgery.passes import MagnitudeScore, PruneChannels
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> edit = netsurgery.plan(model, [MagnitudeScore(), PruneChannels(0.5)])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     netsurgery.save(folder, netsurgery.rewrite(model, edit), edit)
        ...     netsurgery.load(folder, model)[0]
        Linear(in_features=4, out_features=4, bias=True)
    """
    kinds = (folder, (str, os.PathLike)), (small, nn.Module), (edit, Edit)
    expect("save(folder, small, edit)", "a path, the smaller model and its Edit", *kinds)
    _check_sizes(small, edit)
    path = Path(folder)
    check_writable(path, ("weights.pt", "edit.json"), "pass another folder")
    with writing(path, _ADVICE):
        path.mkdir(parents=True, exist_ok=True)
        torch.save(small.state_dict(), path / "weights.pt")
        (path / "edit.json").write_text(edit.to_json(), encoding="utf-8")


def _check_sizes(small: nn.Module, edit: Edit) -> None:
    sizes, own = edit.network.sizes(edit.counts), dict(named_tensors(small))
    if edit.rewritten is not None:
        axes_of = dict(edit.rewritten.network.axes)
    else:
        axes_of = {new: edit.network.axes[name] for name, new in edit.names_after(own).items()}
    foreign = sorted(own.keys() ^ axes_of.keys())
    if foreign:
        raise InputError(
            "save(folder, small, edit) takes the model that the edit leads to: "
            f"'{foreign[0]}' is in one of the two only; of a wrapped model pass the module inside"
        )
    for name, axes in axes_of.items():
        want = tuple(map(sizes, axes))
        if tuple(own[name].shape) != want:
            raise InputError(
                f"save(folder, small, edit) takes the model that the edit leads to: there '{name}' is {list(want)}, "
                f"here it is {list(own[name].shape)}"
            )


def load(folder: str | Path, model: Model, example_inputs: object = None) -> Model:
    """Load a saved smaller model, given a fresh full-size model of the same constructor, which stays as it is.

    Args:
        folder: one that ``save`` or ``netsurgery prune --out`` wrote, or of a run of ``netsurgery train``:
            ``runs/digits/sfp/seed-0``, whose network is as it was after the last epoch done.
        example_inputs: as for ``trace``; by default inputs like those that the saved edit was made with, keyword
            inputs among them: of their shapes and types, with their values where these are whole numbers or constant.

    Raises:
        NetsurgeryError: the folder holds no saved model, one of another architecture, weights of other names or
            shapes, or files that are damaged or of a newer version.
    """
    expect("load(folder, model)", "a path and the full-size model", (folder, (str, os.PathLike)), (model, nn.Module))
    importlib.import_module("netsurgery.passes")  # registers the rewrites that it has
    text, weights = _kept(Path(folder))
    if text is None:  # nothing was removed
        small = copy.deepcopy(model)
    else:
        if example_inputs is None:
            example_inputs = inputs_in(text)
        edit = read(text, trace(model, example_inputs, try_sizes=False))  # rewrite tries these
        small = rewrite(model, edit)
    try:
        small.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(_difference(Path(folder), small, weights)) from error
    return small


def _difference(folder: Path, small: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """The names that a model has and its saved weights lack, and the reverse."""
    own = small.state_dict()
    missing = [name for name in own if name not in weights]
    unknown = [name for name in weights if name not in own]
    other = [
        f"{name} {list(found.shape)} for {list(tensor.shape)}"
        for name, tensor in own.items()
        if isinstance(tensor, Tensor) and isinstance(found := weights.get(name), Tensor) and found.shape != tensor.shape
    ]
    verbs = {"lack": missing, "have besides": unknown, "have other shapes": other}
    said = "; ".join(f"they {verb} {first_of(names, 5)}" for verb, names in verbs.items() if names)
    return (
        f"the weights in {folder} are not those of this {type(small).__name__}"
        f"{f': {said}' if said else ', which refuses them'}: pass a model of the constructor that was saved"
    )


def _kept(folder: Path) -> tuple[str | None, Mapping[str, Tensor]]:
    """Read the edit, as JSON, and the state dict from a folder that ``save`` or a run of a recipe wrote."""
    if (folder / "small.safetensors").is_file():
        small = _checkpoint(folder / "small.safetensors")
        tuned = folder / "finetune.safetensors"
        return small["edit"], (_checkpoint(tuned) if tuned.is_file() else small)["model"]
    for name in ("edit.json", "weights.pt"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} holds no {name}: {_advice(folder)}")
    try:
        text = (folder / "edit.json").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(folder / "edit.json", error) from error
    return text, _weights(folder / "weights.pt")


def _checkpoint(path: Path) -> dict[str, Any]:
    """Read a file that a run of a recipe wrote."""
    from safetensors import SafetensorError

    from netsurgery.training import checkpoints  # stands above this module, and is heavy

    try:
        state = checkpoints.read(path)
    except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(state, dict) or "model" not in state:
        raise InputError(f"{path} holds no model: pass the folder of a run that netsurgery train wrote")
    return state


def _weights(path: Path) -> Mapping[str, Tensor]:
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, LookupError, pickle.UnpicklingError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(weights, Mapping) or not all(isinstance(name, str) for name in weights):
        raise InputError(f"{path} holds a {type(weights).__name__}, not a state dict: pass a folder that save wrote")
    return weights


def _unreadable(path: Path, error: Exception) -> NetsurgeryError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).strip().partition("\n")[0]
    return InputError(f"{path} cannot be read ({reason[:150] or type(error).__name__}): it is damaged; save anew")


def _advice(folder: Path) -> str:
    if (folder / "recipe.json").is_file():
        runs = sorted(str(path.parent) for path in folder.glob("*/seed-*/small.safetensors"))
        return (
            f"pass the folder of one of its runs, such as {runs[0]}" if runs else "no run has come to its removal yet"
        )
    if (folder / "train.safetensors").is_file():
        return "its run has not come to the removal yet; netsurgery train goes on with it"
    return "pass a folder that netsurgery.save, netsurgery prune --out or a run of netsurgery train wrote"
