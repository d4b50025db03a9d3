"""Random numbers that are the same in every run that is compared, wherever a model draws them from."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from netsurgery.network import Network
from netsurgery.tracing import format_where

__all__ = ["draws_at", "is_random", "seeded", "torch_seeded"]


@contextlib.contextmanager
def torch_seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers of torch from a seed; its state is as before afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers of torch, Python and numpy from a seed; their states are as before afterwards."""
    numpy: Any = sys.modules.get("numpy")
    python, other = random.getstate(), numpy.random.get_state() if numpy else None
    with torch_seeded(seed, device):
        try:
            random.seed(seed)
            if numpy:
                numpy.random.seed(seed % 2**32)
            yield
        finally:
            random.setstate(python)
            if numpy:
                numpy.random.set_state(other)


def is_random(node: fx.Node) -> bool:
    """Whether an operation draws random numbers; attention does so only with dropout."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    given = {
        **{a.name: a.default_value for a in arguments},
        **dict(zip([a.name for a in arguments], node.args, strict=False)),
    }
    return bool({**given, **node.kwargs}.get("dropout_p", True))


def draws_at(network: Network) -> list[str]:
    """The lines of code at which a network in eval mode draws random numbers."""
    nodes = [node for node in network.programs[0].operations if is_random(node)]
    return list(dict.fromkeys(format_where(node.meta["where"]) for node in nodes))
