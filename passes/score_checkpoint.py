"""Results of removals so far, kept in a file so that long work can be interrupted and continued."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from netsurgery.errors import InputError
from netsurgery.outputs import check_writable

__all__ = ["ScoreCheckpoint"]

_SECONDS = 5.0  # between two writes


@dataclass
class ScoreCheckpoint:
    """Results of removals so far: sums over changes of the loss, and the number of rows that these are of."""

    key: str
    file: Path | None
    entries: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # (sums, units) float64, (units,) int64
    written: float = 0.0

    def open(self, name: str, sums: int, size: int) -> None:
        """Make room for a group, where there is none."""
        empty = torch.zeros(sums, size, dtype=torch.float64), torch.zeros(size, dtype=torch.int64)
        self.entries.setdefault(name, empty)

    def add(self, name: str, units: Sequence[int], terms: Tensor, rows: int) -> None:
        """Add ``(sums, units)`` over some rows in one step, so that an interruption falls before or after it."""
        sums, seen = (tensor.clone() for tensor in self.entries[name])
        sums[:, list(units)] += terms
        seen[list(units)] += rows
        self.entries[name] = sums, seen

    def means(self, name: str) -> Tensor:
        """Mean rise of each removal, NaN where it was not tried."""
        sums, seen = self.entries[name]
        return sums[0] / seen

    def load(self) -> None:
        """Read the file, where there is one."""
        if self.file is None:
            return
        check_writable(self.file.parent, (self.file.name,), "name another file")
        if not self.file.exists():
            return
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(self.file), "pt") as opened:
                said = opened.metadata() or {}
                found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no dictionary
        except SafetensorError as error:
            raise InputError(f"{self.file} cannot be read ({error}): remove it, or name another file") from error
        known = json.loads(said.get("netsurgery", "{}"))
        if known.get("key") != self.key:
            raise InputError(
                f"{self.file} holds scores of another model, other samples or other settings: "
                "remove it, or name another file"
            )
        self.entries = {name: (found[f"{i}.sums"], found[f"{i}.rows"]) for i, name in enumerate(known["groups"])}

    def save(self) -> None:
        """Write the file in one step."""
        if self.file is None:
            return
        from safetensors.torch import save_file

        listed = enumerate(self.entries.values())
        tensors = {f"{i}.{what}": t for i, pair in listed for what, t in zip(("sums", "rows"), pair, strict=True)}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.file.with_name(self.file.name + ".part")
        save_file(tensors, unfinished, {"netsurgery": json.dumps({"key": self.key, "groups": list(self.entries)})})
        os.replace(unfinished, self.file)
        self.written = time.monotonic()

    def save_now_and_then(self) -> None:
        """Write the file if that was more than a few seconds ago."""
        if time.monotonic() - self.written > _SECONDS:
            self.save()

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Write the file at the end, also after an error or an interruption."""
        try:
            yield
        finally:
            self.save()
