"""State as one safetensors file: tensors by their place, everything else as JSON in the header; nothing is pickled."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from netsurgery.errors import InputError
from netsurgery.outputs import writing

__all__ = ["read", "replace", "write"]

ADVICE = "what was written before is kept; put that right, and the same command goes on"


def write(path: Path, state: object) -> None:
    """Write nested dictionaries, lists, numbers, texts and tensors in one step: readers find all or the old file.

    Raises:
        InputError: the state holds something else.
        NetsurgeryError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(encode(state, "", tensors))
    new = path.with_name(path.name + ".new")
    with writing(path, ADVICE):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, new, metadata={"state": text})
        settle(new, path)


def replace(path: Path, text: str) -> None:
    """Write a text file likewise."""
    new = path.with_name(path.name + ".new")
    with writing(path, ADVICE):
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(text, encoding="utf-8")
        settle(new, path)


def settle(new: Path, path: Path) -> None:
    """Put a complete file in the place of another, after its bytes are on the disk."""
    with new.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(new, path)


def read(path: Path) -> Any:
    """Read a file that ``write`` wrote; tensors are on the CPU."""
    with safe_open(path, "pt") as file:
        return decode(json.loads(file.metadata()["state"]), file)


def encode(value: object, place: str, tensors: dict[str, Tensor]) -> object:
    """JSON for a value, in which dictionaries are lists of pairs and tensors are names."""
    if isinstance(value, Tensor):
        while place in tensors:  # 0 and "0", or "a/b" and "b" inside of "a"
            place += "'"
        tensors[place] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return {"tensor": place}
    if isinstance(value, dict):
        return {"dict": [[encode_key(k, place), encode(v, inside(place, k), tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        items = [encode(one, inside(place, index), tensors) for index, one in enumerate(value)]
        return {type(value).__name__: items} if type(value) in (list, tuple) else {"list": items}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise InputError(f"a checkpoint cannot hold {place}, a {type(value).__name__}")


def inside(place: str, key: object) -> str:
    """The place of a part."""
    return f"{place}/{key}" if place else str(key)


def encode_key(key: object, place: str) -> object:
    """Texts and whole numbers are told apart; other keys are refused."""
    if type(key) in (str, int):
        return key
    raise InputError(f"a checkpoint cannot hold the key {key!r} of {place or 'the state'}")


def decode(value: object, file: Any) -> Any:
    """The value that was encoded."""
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return file.get_tensor(inner)
    if kind == "dict":
        return {k: decode(v, file) for k, v in inner}
    items = [decode(one, file) for one in inner]
    return tuple(items) if kind == "tuple" else items
