"""The lines of code at which a network draws random numbers in eval mode."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from netsurgery.analysis.network import Network
from netsurgery.analysis.replay import draws
from netsurgery.capture.inputs import tensors_in
from netsurgery.capture.source_locations import format_where, location

__all__ = ["drawn_at"]


def drawn_at(network: Network, run: Callable[[int], object]) -> list[str]:
    """The operations that draw random numbers; else the first line whose results depend on the seed.

    Args:
        run: runs the model with random numbers from a seed.
    """
    nodes = [node for node in network.programs[0].operations if draws(node)]
    if nodes:
        return list(dict.fromkeys(format_where(node.meta["where"]) for node in nodes))
    runs = []
    for seed in (0, 1):
        with _Sums() as sums:
            run(seed)
        runs.append(sums.found)
    pairs = zip(*runs, strict=False)
    return [format_where(place) for (place, one), (_, other) in pairs if not math.isclose(one, other)][:1]


class _Sums(TorchDispatchMode):
    """The line of code and the sum of the results of each operation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[tuple[tuple[str, int] | None, float]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        for tensor in tensors_in(out):
            if not tensor.is_complex():
                self.found.append((location(), float(tensor.double().nan_to_num().sum())))
        return out
