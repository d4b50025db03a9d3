"""Learning rates over a stage: pure functions from the share of it that is done, in [0, 1], to a factor of the rate."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, pi

from netsurgery.errors import InputError

__all__ = ["SCHEDULES", "Constant", "Cosine", "OneCycle", "Steps"]


@dataclass(frozen=True)
class Constant:
    """The rate as it is."""

    def __call__(self, done: float) -> float:
        return 1.0


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from 1 down to `floor`."""

    floor: float = 0.0

    def __call__(self, done: float) -> float:
        return self.floor + (1 - self.floor) * (1 + cos(pi * done)) / 2


@dataclass(frozen=True)
class Steps:
    """Multiplied by `factor` when each of the shares `at` of the stage is done.

    The default is that of Mitsuno, Miyao, Kurita, arXiv 2004.04394: x0.2 at epochs 33, 66 and 99 of 100.
    """

    factor: float = 0.2
    at: Sequence[float] = (0.33, 0.66, 0.99)

    def __call__(self, done: float) -> float:
        return self.factor ** bisect_right(sorted(self.at), done + 1e-9)


@dataclass(frozen=True)
class OneCycle:
    """Up along half a cosine from `start` to 1 in the share `rise`, then down to `end`; the momentum stays."""

    rise: float = 0.3
    start: float = 0.04
    end: float = 4e-6

    def __post_init__(self) -> None:
        if not 0 <= self.rise < 1:
            raise InputError(f"rise = {self.rise}: a share of the stage in [0, 1)")

    def __call__(self, done: float) -> float:
        first = done < self.rise
        way = done / self.rise if first else (done - self.rise) / (1 - self.rise)
        a, b = (self.start, 1.0) if first else (1.0, self.end)
        return b + (a - b) * (1 + cos(pi * way)) / 2


SCHEDULES = {"constant": Constant, "cosine": Cosine, "steps": Steps, "onecycle": OneCycle}
