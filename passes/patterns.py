"""Name patterns that say which modules are meant."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence

from netsurgery.errors import InputError
from netsurgery.network import Network

__all__ = ["as_patterns", "check_patterns", "matches"]


def as_patterns(patterns: str | Sequence[str]) -> tuple[str, ...]:
    """One pattern or several, as a tuple."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def matches(patterns: Iterable[str], module: str) -> bool:
    """Whether a pattern (``layer3.*``) matches a module's path, or the path of a module that it is inside of."""
    return any(fnmatch.fnmatchcase(prefix, pattern) for pattern in patterns for prefix in _prefixes(module))


def check_patterns(network: Network, patterns: Iterable[str]) -> None:
    """Make sure that every pattern matches something.

    Raises:
        InputError: one matches no module with parameters.
    """
    modules = {module for name in network.tensors for module in _prefixes(name.rpartition(".")[0])}
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(module, pattern) for module in modules):
            raise InputError(f"pattern '{pattern}' matches no module with parameters in {network.model_name}")


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
