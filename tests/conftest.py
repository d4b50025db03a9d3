"""Tests that take long, by ``heavy.txt``, are slow ones; where faults are planted all are run."""

import os
from pathlib import Path

import pytest

HEAVY = Path(__file__).with_name("heavy.txt")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    heavy = set(HEAVY.read_text(encoding="utf-8").splitlines())
    for item in items:
        if item.nodeid in heavy and "NETSURGERY_HEAVY" not in os.environ:
            item.add_marker("slow")
