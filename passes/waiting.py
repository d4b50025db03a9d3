"""How far work on data is: a bar on a terminal, lines on the logger elsewhere."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["waiting"]

_log = logging.getLogger("netsurgery")
_EVERY = 30.0  # seconds between two lines


@contextlib.contextmanager
def waiting(what: str, total: int) -> Iterator[Callable[[], None]]:
    """Say how far some work is.

    Args:
        what: its name.
        total: how many steps it has.

    Returns:
        What is called after each step.
    """
    started, done = time.monotonic(), itertools.count(1)
    said = started
    bar = Progress(TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), transient=True)
    bar.disable = not bar.console.is_terminal
    with bar:
        task = bar.add_task("", total=total)

        def step() -> None:
            nonlocal said
            n, now = next(done), time.monotonic()
            bar.advance(task)
            if bar.disable and now - said > _EVERY:
                said = now
                left = (now - started) * (total - n) / n
                _log.info("%s: %d of %d batches, about %.0f s left", what, n, total, left)

        yield step
