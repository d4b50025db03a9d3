"""Give runs that are compared the same random numbers, wherever a model draws them from."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy
import torch

__all__ = ["seeded", "torch_seeded"]


@contextlib.contextmanager
def torch_seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw torch's random numbers from a seed; put the state of its generators back afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw random numbers of torch, Python and numpy from a seed; put the states of the generators back afterwards."""
    python, arrays = random.getstate(), numpy.random.get_state()  # noqa: NPY002
    with torch_seeded(seed, device):
        try:
            random.seed(seed)
            numpy.random.seed(seed % 2**32)  # noqa: NPY002
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(arrays)  # noqa: NPY002
