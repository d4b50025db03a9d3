"""The log of a search on disk: a line of JSON for each candidate and round, and weights beside them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from netsurgery.errors import InputError
from netsurgery.outputs import check_writable, writing

__all__ = ["Journal"]

_ADVICE = "what was written before is kept; put that right, and the same call goes on"
_ELSE = "pass another file as log, or None"
_BEGIN = b'{"event": "settings"'
Entry = dict[str, Any]


class Journal:
    """A log of one search; with no path nothing is kept.

    The first line says what the search was asked for; ``{log without suffix}.weights/round-3.safetensors`` are the
    tensors of the network that round 3 left.

    Args:
        path: of the log; it is read where there is one.
        header: all that the results depend on.

    Raises:
        InputError: the file cannot be written, is no log of a search, or of one that was asked for something else.
    """

    def __init__(self, path: Path | None, header: Entry):
        self.path = path
        self.entries: list[Entry] = []
        if path is None:
            return
        self.folder = path.with_name(f"{path.stem}.weights")
        check_writable(path.parent, (path.name,), _ELSE)
        check_writable(self.folder, (), _ELSE)
        text = path.read_bytes() if path.exists() else b""
        whole = text.rfind(b"\n") + 1  # a line that a kill cut short does not count
        lines = self._lines(text, whole)
        self.header = json.loads(json.dumps(header))  # as it is read back
        if lines:
            _compare(path, lines[0], self.header)
        self.begun = bool(lines)
        if text:
            self._cut(whole)
        self.entries = [one for one in lines[1:] if one.get("event") != "end"]
        self._forget_what_has_no_weights()

    def _lines(self, text: bytes, whole: int) -> list[Entry]:
        """The first bytes of a text, as many as whole lines have."""
        if not whole and not (text.startswith(_BEGIN) or _BEGIN.startswith(text)):
            raise InputError(f"{self.path} is no log of a search: {_ELSE}")
        try:
            lines = [json.loads(line) for line in text[:whole].splitlines()]
        except ValueError as error:
            raise InputError(f"{self.path} is no log of a search ({error}): {_ELSE}") from error
        if not all(isinstance(line, dict) for line in lines) or (lines and lines[0].get("event") != "settings"):
            raise InputError(f"{self.path} is no log of a search: {_ELSE}")
        return lines

    def _cut(self, size: int) -> None:
        assert self.path is not None
        with self.path.open("rb+") as file:
            file.truncate(size)

    def _forget_what_has_no_weights(self) -> None:
        """Rounds, and candidates after them, from the first on whose weights are gone or damaged."""
        for index, entry in enumerate(self.entries):
            if entry["event"] == "round" and not self._is_whole(entry):
                self.entries = self.entries[:index]
                assert self.path is not None
                lines = self.path.read_bytes().splitlines(keepends=True)
                self._cut(sum(map(len, lines[: index + 1])))
                return

    def _is_whole(self, entry: Entry) -> bool:
        path = self.folder / entry["weights"]
        return path.is_file() and _digest(path.read_bytes()) == entry.get("digest")

    def add(self, **entry: Any) -> None:
        """Write a line, which is on the disk when this returns; the settings come before the first one."""
        self.entries.append(entry)
        if self.path is None:
            return
        lines = [entry] if self.begun else [self.header, entry]
        with writing(self.path, _ADVICE):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
                file.flush()
                os.fsync(file.fileno())
        self.begun = True

    def add_round(self, weights: bytes, **entry: Any) -> None:
        """Write what a round left: the weights first, then the line that names them."""
        name = f"round-{entry['number']}.safetensors"
        if self.path is not None:
            with writing(self.folder, _ADVICE):
                self.folder.mkdir(parents=True, exist_ok=True)
                new = self.folder / f"{name}.new"
                with new.open("wb") as file:
                    file.write(weights)
                    file.flush()
                    os.fsync(file.fileno())
                new.replace(self.folder / name)
        self.add(event="round", weights=name, digest=_digest(weights), **entry)

    def rounds(self) -> list[Entry]:
        """Those that were finished."""
        return [one for one in self.entries if one["event"] == "round"]

    def weights(self, entry: Mapping[str, Any]) -> bytes:
        """The result of a round."""
        path: Path = self.folder / entry["weights"]
        return path.read_bytes()

    def candidates(self, number: int) -> dict[str, Entry]:
        """Those of a round that were tried, by name."""
        return {one["group"]: one for one in self.entries if one["event"] == "candidate" and one["round"] == number}


def _digest(weights: bytes) -> str:
    return hashlib.sha256(weights).hexdigest()[:16]


def _compare(path: Path, there: Entry, here: Entry) -> None:
    """Raise InputError where a log is of another search; the sentence names what differs."""
    if there == here:
        return
    pairs = [(key, there.get("settings", {}).get(key), value) for key, value in here["settings"].items()]
    differs = [f"{key} was {was!r} and is {value!r}" for key, was, value in pairs if was != value]
    for key in ("torch", "netsurgery"):
        if there.get(key) != here[key]:
            differs.append(f"it was made by {key} {there.get(key)}, and this is {here[key]}")
    for key, value in here.items():
        if key not in ("event", "settings", "torch", "netsurgery") and there.get(key) != value:
            differs.append("other example_inputs" if key == "example_inputs" else f"the {key} is another")
    said = "; ".join(differs[:4]) or "its settings have other names"
    raise InputError(f"{path} is the log of another search ({said}): remove it, or pass another file as log")
