"""A forecast of the time that trials take, from a few of them."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Size

from netsurgery.axes import Axis
from netsurgery.passes.ablation import Ablation
from netsurgery.passes.progress import span

__all__ = ["Forecast", "time_trials"]

_log = logging.getLogger("netsurgery")
_MEASURED = 4  # groups that are tried
_WORTH = 5e9  # results to compute, from which on a forecast is worth while
_LONG = 600.0  # seconds, from which on cheaper settings are named


@dataclass(frozen=True)
class Forecast:
    """The time that trials take.

    Attributes:
        works: numbers that are computed for a row of a trial, by group.
        seconds: seconds for a row, of groups that were measured; of others in proportion to the next one's numbers.
    """

    works: Mapping[str, float]
    seconds: Mapping[str, float]

    def rate(self, name: str) -> float:
        """Seconds for a row of a trial."""
        if name in self.seconds:
            return self.seconds[name]
        near = min(self.seconds, key=lambda other: abs(self.works[other] - self.works[name]))
        return self.seconds[near] * self.works[name] / self.works[near]

    def total(self, rows: Mapping[str, int]) -> float:
        """Seconds for so many rows of trials of each group."""
        return sum(n * self.rate(name) for name, n in rows.items())


def time_trials(ablation: Ablation, rows: Mapping[str, int], *, could_race: bool = False) -> Forecast | None:
    """Time a few trials and log a forecast for so many rows of each group; None where that is little.

    Args:
        could_race: whether all these rows are tried, so that racing would save some; else it is the most that may be.
    """
    works = {name: _work(ablation, name) for name in rows}
    if not works or sum(rows[name] * work for name, work in works.items()) < _WORTH:
        return None
    ordered = sorted(works, key=works.__getitem__)
    picked = dict.fromkeys(ordered[i * (len(ordered) - 1) // (_MEASURED - 1)] for i in range(_MEASURED))
    forecast = Forecast(works, _measured(ablation, [*picked]))
    _say(ablation, rows, forecast.total(rows), len(picked), could_race)
    return forecast


def _work(ablation: Ablation, name: str) -> float:
    """The number of results that are computed for a row without units of a group."""
    rows = min(ablation.chunk(), ablation.samples.count)
    copies = ablation.copies(rows)
    engine = ablation.engine(rows, copies)
    if engine is None:
        operations = ablation.network.programs[0].operations
        shapes = [node.meta["shape"] for node in operations]
        return float(sum(math.prod(shape) for shape in shapes if isinstance(shape, Size)))
    runs = ablation.series[name].suffix(engine).runs
    each: Iterable[tuple[Axis, ...] | None] = itertools.chain.from_iterable(
        [run.step.dims] if isinstance(run.step.dims, tuple) else run.step.dims for run in runs
    )
    return 1.0 + sum(math.prod(axis.size for axis in dims) for dims in each if dims) / (rows * copies)


def _measured(ablation: Ablation, names: list[str]) -> dict[str, float]:
    """Seconds for a row in the last of a few trials, for each of some groups."""
    rows = min(ablation.chunk(), ablation.samples.count)
    copies = ablation.copies(rows)
    units = 2 * copies if ablation.engine(rows, copies) is not None else 2
    wanted = {name: [*range(min(units, ablation.series[name].size))] for name in names}
    found: dict[str, float] = {}
    last = time.perf_counter()
    for name, tried, _ in ablation.loss_deltas(wanted, 0, rows):
        now = time.perf_counter()
        found[name], last = (now - last) / (len(tried) * rows), now
    return found


def _say(ablation: Ablation, rows: Mapping[str, int], seconds: float, measured: int, could_race: bool) -> None:
    most = "" if could_race else "at most "
    advice = []
    if seconds > _LONG:
        racing = ["racing=True"] if could_race else []
        advice = [*racing, "fewer samples", "include, exclude or removal where not every group will be cut"]
    _log.info(
        "LossIncreaseScore: %s units in %d groups on %d samples will take %sabout %s, by trials of %d groups%s",
        f"{sum(ablation.series[name].size for name in rows):,}", len(rows), ablation.samples.count, most, span(seconds),
        measured, f"; cheaper: {', '.join(advice)}" if advice else "",
    )  # fmt: skip
