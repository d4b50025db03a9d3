"""Let a tensor, the same object, hold other numbers."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["set_data"]


def set_data(tensor: Tensor, data: Tensor) -> None:
    """Let a tensor hold other data, of any shape; graphs of losses that were computed before do not disturb later ones.

    While such a graph lives, autograd keeps the node that gathers the tensor's gradient, with the old shape. It lets go
    of this node where the type of the data changes, so an empty tensor of another type comes in between.
    """
    if tensor.shape != data.shape and (tensor.is_floating_point() or tensor.is_complex()):
        other = torch.float32 if tensor.dtype == torch.float64 else torch.float64
        tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = data
