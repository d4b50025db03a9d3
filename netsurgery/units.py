"""Units of a group after an edit: kept, copied or new. An Edit has a list of these for each group."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from netsurgery.errors import InputError

__all__ = ["Copy", "New", "Planned", "adds_up", "keyed", "listed", "read", "sources", "then", "written"]


@dataclass(frozen=True)
class Copy:
    """A copy of a unit: producers make both alike, and consumers take a share from each.

    Args:
        unit: index of the unit.
        share: what consumers take from this copy, of 1. By default the unit and its copies take equal shares of what
            other shares leave. Unequal shares let equal copies part in training without noise.

    Wei et al., "Network Morphism", arXiv 1603.01670, and Chen et al., "Net2Net", arXiv 1511.05641, widen so.

    Example:
        >>> import torch, netsurgery
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> edit = netsurgery.Edit(netsurgery.trace(model), {"0": (0, 1, 2, netsurgery.Copy(2))})
        >>> x = torch.randn(5, 4)
        >>> torch.allclose(netsurgery.rewrite(model, edit)(x), model(x), atol=1e-6)
        True
    """

    unit: int
    share: float | None = None

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "unit", operator.index(self.unit))
            object.__setattr__(self, "share", None if self.share is None else float(self.share))
        except (TypeError, ValueError):
            raise InputError(f"Copy({self.unit!r}, share={self.share!r}): the index of a unit, and a number") from None
        if self.share is not None and not math.isfinite(self.share):
            raise InputError(f"Copy({self.unit}, share={self.share}): a share is a finite number")

    def __repr__(self) -> str:
        return f"Copy({self.unit})" if self.share is None else f"Copy({self.unit}, share={self.share:g})"


@dataclass(frozen=True)
class New:
    """A new unit: consumers read it by zeros, so that it changes no output yet.

    Args:
        init: how the weights that make it start. ``"he"``: normally distributed with a variance of 2 over the number
            of inputs (He et al., arXiv 1502.01852); biases start at 0, norms at the identity, tables of embeddings
            with the spread that they have, and what is neither added nor a factor (slopes, exponents) with its mean.
        seed: fixes the random numbers.
    """

    init: str = "he"
    seed: int = 0

    def __repr__(self) -> str:
        return f"New({self.init!r}, seed={self.seed})"

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int):
            raise InputError(f"New(seed={self.seed!r}): a whole number")
        if self.init != "he":
            raise InputError(
                f"New(init={self.init!r}): 'he' is the only initialisation, and what reads new units always begins at "
                "zero; the pass GradMax(data) behind PlantChannels chooses among draws by gradients"
            )


Planned = int | Copy | New  # an integer is a unit that is kept


def listed(name: str, given: Iterable[Planned], size: int, whole: bool = True) -> tuple[Planned, ...]:
    """The planned units of a group, with shares as numbers; a unit that stays without copies is an integer.

    Args:
        whole: whether the shares of each unit must add up to 1; they do not where one of its copies was removed.

    Raises:
        InputError: no list of these, indices out of range, units kept twice, or shares that do not add up to 1.
    """
    try:
        units = [unit if isinstance(unit, Copy | New) else operator.index(unit) for unit in given]
    except TypeError:
        raise InputError(
            f"group '{name}': the units that stay must be a list of whole numbers, got {given!r}"
        ) from None
    if units == list(range(size)):
        return tuple(units)
    if not units:
        raise InputError(f"group '{name}' would lose all of its {size} units; at least one must stay")
    kept = [unit for unit in units if isinstance(unit, int)]
    indices = [*kept, *(unit.unit for unit in units if isinstance(unit, Copy))]
    if len(set(kept)) < len(kept) or not all(0 <= index < size for index in indices):
        raise InputError(
            f"group '{name}': units that stay must be distinct and in 0..{size - 1}, got {_start(units)}; "
            "Copy(unit) makes another of a unit"
        )
    if len(kept) == len(indices):
        return tuple(units)
    shares = _shares(name, units, whole)
    return tuple(shares.get(place, unit) for place, unit in enumerate(units))


def _shares(name: str, units: Sequence[Planned], whole: bool) -> dict[int, int | Copy]:
    """The units at places whose unit has copies, with their shares; an integer where one keeps its whole share."""
    places: dict[int, list[int]] = {unit.unit: [] for unit in units if isinstance(unit, Copy)}
    for place, unit in enumerate(units):
        index = unit.unit if isinstance(unit, Copy) else unit
        if index in places:
            places[index].append(place)
    found: dict[int, int | Copy] = {}
    for unit, own in places.items():
        given = {p: one.share for p in own if isinstance(one := units[p], Copy) and one.share is not None}
        left = 1.0 - sum(given.values())
        if whole and len(given) == len(own) and abs(left) > 1e-6:
            raise InputError(f"group '{name}': the shares of unit {unit} add up to {1 - left:g}, not to 1")
        equal = left / max(1, len(own) - len(given))
        for place in own:
            share = given.get(place, equal)
            if share == 1.0 and len(own) == 1:
                found[place] = unit
            elif place not in given:
                found[place] = Copy(unit, share)
    return found


def _taken(unit: int | Copy) -> tuple[int, float]:
    """The old unit of a kept or copied unit, and the share that consumers take of it."""
    return (unit.unit, unit.share or 0.0) if isinstance(unit, Copy) else (unit, 1.0)


def sources(units: Iterable[Planned]) -> list[int]:
    """The old unit that each unit comes from; -1 for a new one."""
    return [-1 if isinstance(unit, New) else unit.unit if isinstance(unit, Copy) else unit for unit in units]


def keyed(units: Iterable[Planned]) -> list[object]:
    """A key for each unit: the old unit, or of a new one its seed and how many with this seed come before it."""
    seen: Counter[int] = Counter()
    keys: list[object] = []
    for unit in units:
        if isinstance(unit, New):
            keys.append((unit.seed, seen[unit.seed]))
            seen[unit.seed] += 1
        else:
            keys.append(unit.unit if isinstance(unit, Copy) else unit)
    return keys


def adds_up(units: Iterable[Planned]) -> bool:
    """True if consumers take all of each unit that is left."""
    taken: dict[int, float] = {}
    for unit in units:
        if not isinstance(unit, New):
            index, share = _taken(unit)
            taken[index] = taken.get(index, 0.0) + share
    return all(abs(share - 1) <= 1e-6 for share in taken.values())


def then(first: Sequence[Planned], later: Iterable[Planned]) -> tuple[Planned, ...]:
    """The units after two edits, one on the result of the other."""
    found: list[Planned] = []
    for one in later:
        if isinstance(one, New):
            found.append(one)
            continue
        index, share = _taken(one)
        was = first[index]
        if isinstance(was, New):
            if share != 1.0:
                raise InputError("the later edit copies a unit that the earlier one makes: carry this one out first")
            found.append(was)
        else:
            unit, before = _taken(was)
            found.append(Copy(unit, before * share))
    return tuple(found)


def written(unit: Planned) -> int | dict[str, object]:
    """Convert a unit to JSON."""
    if isinstance(unit, Copy):
        return {"copy": unit.unit, "share": unit.share}
    return {"new": unit.init, "seed": unit.seed} if isinstance(unit, New) else unit


def read(value: int | Mapping[str, Any]) -> Planned:
    """Convert JSON to a unit."""
    if not isinstance(value, Mapping):
        return value
    return Copy(value["copy"], value["share"]) if "copy" in value else New(value["new"], value["seed"])


def _start(units: Sequence[Planned], most: int = 10) -> str:
    shown = ", ".join(map(str, units[:most]))
    return f"[{shown}]" if len(units) <= most else f"[{shown}, ... {len(units)} in all]"
