"""Pytest plugin: `-p tests.slices --slice K/N` keeps every N-th of the chosen tests, from the K-th on (K from 0).

`--always TEXT` keeps those whose id has the text in it, too.
"""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slice", metavar="K/N", default="0/1", help="keep every N-th test, from the K-th on")
    parser.addoption("--always", metavar="TEXT", action="append", default=[], help="keep all with this in their id")


@pytest.hookimpl(trylast=True)  # after -m and -k have chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    k, n = map(int, config.getoption("--slice").split("/"))
    always = config.getoption("--always")
    kept = [i % n == k % n or any(text in item.nodeid for text in always) for i, item in enumerate(items)]
    config.hook.pytest_deselected(items=[item for item, keep in zip(items, kept, strict=True) if not keep])
    items[:] = [item for item, keep in zip(items, kept, strict=True) if keep]
