"""Find the file and line of the user's code that runs, or that raised an error."""

from __future__ import annotations

import functools
import os
import sys
from types import FrameType

import torch

__all__ = ["format_where", "is_library", "is_python", "location", "raised_at"]

_LIBRARY = (
    os.path.dirname(torch.__file__) + os.sep,
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep,
)
_PYTHON = os.path.dirname(os.__file__) + os.sep
#: Packages between the user's code and torch: their lines do not tell where the user's code is.
_BETWEEN = tuple(f"{os.sep}{name}{os.sep}" for name in ("einops", "opt_einsum", "jaxtyping", "beartype", "typeguard"))


@functools.cache
def is_library(filename: str) -> bool:
    """True if a file belongs to torch, to a package between torch and the user's code, or to netsurgery."""
    return filename.startswith(_LIBRARY) or any(name in filename for name in _BETWEEN)


@functools.cache
def is_python(filename: str) -> bool:
    """True if code is in a file of Python's standard library."""
    own = filename.startswith(_PYTHON) and "site-packages" not in filename
    return own or filename.startswith("<frozen ")


def location(frame: FrameType | None = None) -> tuple[str, int] | None:
    """File and line of the innermost frame, from this one outwards, whose code is not in a library."""
    frame = sys._getframe(1) if frame is None else frame
    while frame is not None:
        if not is_library(frame.f_code.co_filename):
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back
    return None


def raised_at(error: Exception) -> tuple[str, int] | None:
    """File and line of the user's code that raised an error."""
    traceback, where = error.__traceback__, None
    while traceback is not None:
        if not is_library(traceback.tb_frame.f_code.co_filename):
            where = traceback.tb_frame.f_code.co_filename, traceback.tb_lineno
        traceback = traceback.tb_next
    return where


def format_where(where: tuple[str, int] | None) -> str:
    """``at torchvision/models/resnet.py:146``, shortened to what a reader needs."""
    if where is None:
        return ""
    path, line = where
    if "site-packages" + os.sep in path:
        path = path.split("site-packages" + os.sep, 1)[1]
    elif not os.path.relpath(path).startswith(".."):
        path = os.path.relpath(path)
    return f"at {path}:{line}"
