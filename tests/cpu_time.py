"""Pytest plugin: `-p tests.cpu_time --cpu-times FILE` writes the CPU seconds of each test, with those of its processes.

``python tests/cpu_time.py FILE`` lists in ``heavy.txt`` the tests that took too long: these are slow (``conftest.py``).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SECONDS = 1.5
ALWAYS = {"tests/test_readme.py::test_examples"}  # the examples of the README are tried before each change lands
HEAVY = Path(__file__).with_name("heavy.txt")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu-times", metavar="FILE", default="cpu_times.json", help="where to write them")


def spent() -> float:
    """CPU seconds of this process and of those that have ended below it."""
    found = os.times()
    return found.user + found.system + found.children_user + found.children_system


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    start = spent()
    yield
    item.user_properties.append(("cpu", spent() - start))


class Times:
    """Gathers what all workers report."""

    def __init__(self, file: str) -> None:
        self.file, self.found = Path(file), dict[str, float]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.found[report.nodeid] = dict(report.user_properties).get("cpu", 0.0)

    def pytest_sessionfinish(self) -> None:
        self.file.write_text(json.dumps(self.found, indent=0))


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Times(config.getoption("--cpu-times")))


def heavy(times: dict[str, float]) -> list[str]:
    """The tests that are too long, but for the shortest with the arguments of each."""
    functions: dict[str, list[str]] = {}
    for name in sorted(times, key=times.__getitem__):
        functions.setdefault(name.partition("[")[0], []).append(name)
    kept = ALWAYS | {names[0] for names in functions.values() if len(names) > 1}
    return sorted(name for name, taken in times.items() if taken > SECONDS and name not in kept)


if __name__ == "__main__":
    found = heavy(json.loads(Path(sys.argv[1]).read_text()))
    HEAVY.write_text("".join(f"{name}\n" for name in found))
    print(f"{len(found)} tests are heavy")
