"""What a run without data leaves in the caches of the code that ran is taken out again."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

__all__ = ["caches_kept"]


@contextlib.contextmanager
def caches_kept(model: nn.Module) -> Iterator[None]:
    """Leave the caches of the modules that a model's code is in as they were.

    Those are functions with ``functools.lru_cache``, and dictionaries and lists that are global; a tensor without data
    that stays in one would meet the user's own run.
    """
    places = {base.__module__ for module in model.modules() for base in type(module).__mro__}
    names = sorted(name for name in places if name in sys.modules and not name.startswith(("torch.", "builtins")))
    found = [value for name in names for value in vars(sys.modules[name]).values()]
    cached: list[Any] = [value for value in found if isinstance(value, functools._lru_cache_wrapper)]
    before = [wrapper.cache_info().currsize for wrapper in cached]
    tables = [(value, set(value)) for value in found if type(value) is dict]
    rows = [(value, len(value)) for value in found if type(value) is list]
    try:
        yield
    finally:
        for wrapper, size in zip(cached, before, strict=True):
            if wrapper.cache_info().currsize > size:
                wrapper.cache_clear()
        for table, keys in tables:
            for key in [key for key in table if key not in keys and _is_bare(table[key])]:
                del table[key]
        for row, length in rows:
            row[length:] = [item for item in row[length:] if not _is_bare(item)]


def _is_bare(value: Any) -> bool:
    leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    return any(leaf.is_meta or isinstance(leaf, FakeTensor) for leaf in leaves)
