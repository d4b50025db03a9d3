"""The JSON of an edit: its formats, and the check that nothing is missing."""

from __future__ import annotations

import json
from typing import Any

import torch

from netsurgery.capture.saved_inputs import made
from netsurgery.errors import InputError

__all__ = ["FORMAT", "inputs_in", "stages_in"]

#: Of the JSON. The first had no number, and inputs of positional tensors only; the second removes alone; the third adds
#: units and drops blocks; the fourth rewrites modules, in stages.
FORMAT = 4


def inputs_in(text: str) -> Any:
    """Inputs like those that an edit was made with, from its JSON: as ``trace`` takes them, None if it has none.

    Raises:
        InputError: the text holds no edit, or one of a newer version.
    """
    inputs = _read(text)["inputs"]
    try:
        if isinstance(inputs, list):  # shapes and types alone, as they were written at first
            return tuple(torch.zeros(shape, dtype=getattr(torch, kind)) for shape, kind in inputs)
        return made(inputs)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(f"the inputs of the edit cannot be read ({error}): pass example_inputs") from error


def stages_in(text: str) -> list[dict[str, Any]]:
    """The stages of the JSON of an edit.

    Raises:
        InputError: the text holds no edit, or one of a newer version.
    """
    found = _read(text)
    return [found, *found.get("then", [])]


def _read(text: str) -> dict[str, Any]:
    """Read the JSON of an edit and make sure that nothing is missing."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise InputError(f"the text is no edit: {error}; pass what edit.to_json() gave") from error
    if isinstance(found, dict) and isinstance(number := found.get("format", 1), int) and number > FORMAT:
        raise InputError(
            f"the edit was written by a newer netsurgery (format {number}; this one reads up to {FORMAT}): "
            "update netsurgery"
        )
    more = found.get("then", []) if isinstance(found, dict) and "inputs" in found else None
    if not isinstance(more, list) or not all(map(_is_stage, (found, *more))):
        raise InputError(
            "the text is no edit: it has no groups with units, or no inputs; pass what edit.to_json() gave"
        )
    return dict(found)


def _is_stage(found: Any) -> bool:
    groups = found.get("groups") if isinstance(found, dict) else None
    if not isinstance(groups, dict) or not all(map(_is_entry, groups.values())):
        return False
    return _are_paths(found) and _are_rewrites(found.get("modules", {}))


def _are_rewrites(modules: Any) -> bool:
    return isinstance(modules, dict) and all(
        isinstance(one, dict) and "kind" in one and isinstance(one.get("fields"), dict) for one in modules.values()
    )


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and "size" in entry and isinstance(entry.get("keep"), list)


def _are_paths(found: dict[str, Any]) -> bool:
    dropped = found.get("dropped", [])
    return isinstance(dropped, list) and all(isinstance(path, str) for path in dropped)
