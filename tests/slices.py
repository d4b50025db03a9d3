"""Pytest plugin: `-p tests.slices --slice K/N` keeps every N-th of the chosen tests, from the K-th on (K from 0)."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slice", metavar="K/N", default="0/1", help="keep every N-th test, from the K-th on")


@pytest.hookimpl(trylast=True)  # after -m and -k have chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    k, n = map(int, config.getoption("--slice").split("/"))
    kept = items[k % n :: n]
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % n != k % n])
    items[:] = kept
