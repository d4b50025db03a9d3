"""Work in portions that fit into a memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

__all__ = ["portions"]

Item = TypeVar("Item")


def portions(sized: Iterable[tuple[Item, int]], memory: int) -> Iterator[list[Item]]:
    """Things in their order, as many together as fit; what does not fit comes alone.

    Args:
        sized: the things, each with the bytes that it takes.
        memory: bytes.

    Example:
        >>> list(portions([("a", 2), ("b", 3), ("c", 9), ("d", 1)], 5))
        [['a', 'b'], ['c'], ['d']]
    """
    portion: list[Item] = []
    used = 0
    for item, size in sized:
        if portion and used + size > memory:
            yield portion
            portion, used = [], 0
        portion.append(item)
        used += size
    if portion:
        yield portion
