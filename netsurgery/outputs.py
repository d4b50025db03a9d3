"""Folders for results: tried before the work, with one clear line where they cannot be written."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from netsurgery.errors import InputError, NetsurgeryError

__all__ = ["check_writable", "writing"]

_ARCHIVE = "inline_container"  # where torch.save raises a RuntimeError when a file cannot be written to its end


def check_writable(folder: Path, files: Sequence[str] = (), advice: str = "pass another folder by --out") -> None:
    """Make sure that files can be written to a folder. It is left as it was: a new one is removed again.

    Args:
        files: the names of those that will be.
        advice: what to do where they cannot.

    Raises:
        InputError: they cannot.
    """
    made: list[Path] = []  # the innermost first
    try:
        made = [one for one in (folder, *folder.parents) if not one.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        for path in (folder / name for name in files):
            if path.exists():
                path.open("ab").close()
    except OSError as error:
        raise InputError(f"{_said(folder, error)}: {advice}") from error
    finally:
        for one in made:
            with contextlib.suppress(OSError):
                one.rmdir()


@contextlib.contextmanager
def writing(path: Path, advice: str) -> Iterator[None]:
    """Turn the error of a failed write into one line that says what to do.

    Raises:
        NetsurgeryError: the disk is full, the file system went away, or the like.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and _ARCHIVE not in str(error):
            raise
        raise NetsurgeryError(f"{_said(path, error)}: {advice}") from error


def _said(path: Path, error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).partition("\n")[0][:150]
    reason = "the disk is full, or failed" if _ARCHIVE in reason else reason.removeprefix("Error while serializing: ")
    return f"{path} cannot be written to ({reason})"
