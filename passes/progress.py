"""Progress of long work and the time that is left: a bar on a terminal, lines on the logger elsewhere."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["Report", "span", "waiting", "without_log"]

_log = logging.getLogger("netsurgery")
_EVERY = 30.0  # seconds between two lines


def span(seconds: float) -> str:
    """A time in words, such as ``40 s``, ``12 min`` or ``3.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


@contextlib.contextmanager
def without_log() -> Iterator[None]:
    """Log no warnings for a while: a cut that only serves a trial has nothing to say."""
    level = _log.level
    _log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        _log.setLevel(level)


class Report:
    """Reports the progress of work.

    Args:
        shown: whether anything is said.
        who: the work.
    """

    def __init__(self, shown: bool, who: str = "loss increase"):
        self.shown, self.who = shown, who
        self.draw: Callable[[], None] = self.line
        self.begin("trials")

    def begin(
        self, what: str, rows: Mapping[str, int] | None = None, rate: Callable[[str], float] | None = None
    ) -> None:
        """Begin a part of the work.

        Args:
            what: its name.
            rows: how many rows are to go through, by series; None where it is not known.
            rate: the cost of a row of a trial of each series, in any unit; None where it is not known: all alike.
        """
        self.what, self.rate, self.tried, self.done = what, rate or (lambda name: 1.0), 0, 0.0
        self.total = None if rows is None else sum(n * self.rate(name) for name, n in rows.items())
        self.started = self.said = time.monotonic()

    def advance(self, name: str, units: int, rows: int) -> None:
        """Count units that were tried on some rows."""
        self.tried += units
        self.done += units * rows * self.rate(name)
        self.draw()

    def line(self) -> None:
        """Log the progress, if the last line is a while ago."""
        now = time.monotonic()
        if not self.shown or now - self.said < _EVERY:
            return
        self.said, taken = now, now - self.started
        if self.total:
            share = min(1.0, self.done / self.total)
            left = f"{share:.0%} done, about {span(taken * (1 - share) / share)} left"
        else:
            left = f"{self.tried:,} trials done"
        _log.info("%s: %s after %s", self.name, left, span(taken))

    @property
    def name(self) -> str:
        """The names of the work and of its present part."""
        return ", ".join(filter(None, (self.who, self.what)))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Show a bar while the work goes on, where there is a terminal to show it on."""
        columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
        with Progress(*columns, transient=True, disable=not self.shown) as bar:
            bar.disable = bar.disable or not bar.console.is_terminal
            task = bar.add_task(self.name, total=None)
            if not bar.disable:
                self.draw = lambda: bar.update(
                    task, description=self.name, total=self.total, completed=self.done, refresh=False
                )
            yield


@contextlib.contextmanager
def waiting(who: str, total: int) -> Iterator[Callable[[], None]]:
    """Report the progress of work of equal steps: the context gives a function to call after each step."""
    report = Report(True, who)
    report.begin("", {"": total})
    with report.running():
        yield lambda: report.advance("", 1, 1)
