"""Example inputs for a model that is given without any: its first layer tells them, a run without data confirms."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from netsurgery.capture.inputs import Inputs
from netsurgery.capture.program import Program
from netsurgery.capture.recorder import record
from netsurgery.errors import TraceError

__all__ = ["infer_inputs"]

_SIDES = (224, 299, 64, 32, 28, 16, 8)


def infer_inputs(model: nn.Module) -> tuple[Inputs, Program]:
    """Inputs that the model takes, and the program recorded with them.

    The first layer tells the number of channels and dimensions; images are tried with sides of 224, 299, 64, 32, 28,
    16 and 8.

    Raises:
        TraceError: no such input fits; the message asks for ``example_inputs``.
    """
    error: TraceError | None = None
    for candidate in _candidates(model):
        try:
            return ((candidate,), {}), record(model, ((candidate,), {}))
        except TraceError as problem:
            error = error or problem
    tried = f" The first that was tried failed: {error}" if error else ""
    raise TraceError(
        f"no example input could be inferred for {type(model).__name__}: "
        f"pass example_inputs=(tensor, ...) of the shapes it takes.{tried}"
    ) from error


def _candidates(model: nn.Module) -> Iterator[Tensor]:
    reference = next(model.parameters(), torch.empty(0))
    factory = {"dtype": reference.dtype, "device": "meta"}  # values are drawn where the code looks at some
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            for side in _SIDES:
                spatial = [side] * len(module.kernel_size)
                yield torch.empty(1, module.in_channels, *spatial, **factory)  # type: ignore[call-overload]
            return
        if isinstance(module, nn.Linear):
            yield torch.empty(1, module.in_features, **factory)  # type: ignore[call-overload]
            return
        if isinstance(module, nn.Embedding):
            yield torch.empty(1, 16, dtype=torch.int64, device="meta")
            return
