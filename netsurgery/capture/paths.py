"""Paths of modules and names of tensors: tell what lies inside of a module, and rename once modules are gone."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from netsurgery.errors import InputError

__all__ = ["is_within", "modules_around", "renumbered", "renumbered_lists"]


def is_within(module: str, path: str) -> bool:
    """True if a module, or a tensor by its name, is in the module at ``path``, or is that module."""
    return not path or module == path or module.startswith(f"{path}.")


def modules_around(path: str) -> list[str]:
    """The paths of all modules around a module, the innermost last; the outermost is ``""``."""
    parts = path.split(".") if path else []
    return [".".join(parts[:n]) for n in range(len(parts))]


def renumbered(name: str, gone: Collection[str], lists: Collection[str]) -> str | None:
    """The name of a tensor or the path of a module once some modules are gone; None where it goes with one of them.

    Args:
        gone: paths of modules.
        lists: paths of the lists that close the gaps: modules after one that is gone move up.

    Example:
        >>> from netsurgery.capture.paths import renumbered
        >>> renumbered("layers.3.weight", {"layers.1"}, {"layers"})
        'layers.2.weight'
    """
    if any(is_within(name, path) for path in gone):
        return None
    parts = name.split(".")
    found = list(parts)
    for place in range(len(parts)):
        around = ".".join(parts[:place])
        if around in lists and parts[place].isdigit():
            before = [path for path in gone if _parent(path) == around and int(_last(path)) < int(parts[place])]
            found[place] = str(int(parts[place]) - len(before))
    return ".".join(found)


def renumbered_lists(names: Iterable[str], gone: Collection[str], left: Collection[str]) -> frozenset[str]:
    """The lists that have closed the gaps, from the names of tensors before and after.

    Raises:
        InputError: the names that are left are others.
    """
    lists: frozenset[str] = frozenset()
    known = list(names)
    for around in sorted({_parent(path) for path in gone}, key=lambda path: path.count(".")):
        own = [name for name in known if is_within(name, around)]
        for tried in (lists, lists | {around}):
            if {renumbered(name, gone, tried) for name in own} - {None} <= set(left):
                lists = tried
                break
        else:
            raise InputError(f"'{around}' has other tensors than the removal of {', '.join(sorted(gone))} leaves")
    return lists


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _last(path: str) -> str:
    last = path.rpartition(".")[2]
    return last if last.isdigit() else "0"
