"""The groups of units that can grow in a round, each alone, with its price."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from netsurgery.analysis.costs import Cost
from netsurgery.analysis.growth import obstacles
from netsurgery.arguments import is_count, near_names
from netsurgery.capture.copies import named_modules
from netsurgery.edit import Edit
from netsurgery.errors import InputError
from netsurgery.passes.patterns import Modules, as_patterns
from netsurgery.pipeline import Pass, plan

__all__ = ["Budget", "Candidate", "as_names", "offered"]

_COSTS = ("params", "macs")


class Priced(Protocol):
    """Anything with a price: a cost, a round."""

    @property
    def params(self) -> int:
        """Parameters."""

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""


@dataclass(frozen=True)
class Budget:
    """The most parameters, MACs of a run on the example inputs, or both, that a network may have."""

    most: Mapping[str, int]

    @classmethod
    def of(cls, given: Any) -> Budget:
        """The budget that a user passed.

        Raises:
            InputError: no dictionary, an unknown key, or a value that is no whole number of at least 1.
        """
        if not isinstance(given, Mapping) or not given:
            raise InputError(f"budget={given!r}: pass dict(params=...), dict(macs=...), or both in one")
        for key, value in given.items():
            if key not in _COSTS:
                raise InputError(f"budget has no key {key!r}: there are params and macs{near_names(str(key), _COSTS)}")
            if not is_count(value, 1):
                raise InputError(f"budget={given!r}: {key} is a whole number of at least 1")
        return cls({key: int(given[key]) for key in _COSTS if key in given})

    def over(self, cost: Cost) -> str:
        """By what something is too large, in words; empty where it fits."""
        return " and ".join(
            f"{getattr(cost, key):,} {key} where {most:,} are allowed"
            for key, most in self.most.items()
            if getattr(cost, key) > most
        )

    def share(self, start: Priced, now: Priced) -> float:
        """The share that has been added of all that may be."""
        done: list[float] = [
            (getattr(now, key) - getattr(start, key)) / max(1, most - getattr(start, key))
            for key, most in self.most.items()
        ]
        return max(done)


@dataclass(frozen=True)
class Candidate:
    """A group that may grow in a round, with those that grow along.

    Attributes:
        name: of its group of units, the first of those that must keep equal sizes.
        edit: for the network as it is in that round.
        cost: of the network that it leads to.
    """

    name: str
    edit: Edit
    cost: Cost


def offered(model: nn.Module, inputs: Any, growth: Pass) -> list[Candidate]:
    """Each group that a pass would grow, alone.

    Raises:
        InputError: none can grow; the message has the reasons.
    """
    whole = plan(model, [growth], inputs)
    network, found, seen = whole.network, list[Candidate](), set[str]()
    for name in whole.keep:
        together = [one for one in network.equal_to(name) if one in whole.keep and one not in seen]
        seen.update(together)
        keep = {one: whole.keep[one] for one in together}
        if keep and not obstacles(network, keep):
            edit = Edit(network, keep)
            found.append(Candidate(together[0], edit, edit.after))
    return found


def as_names(model: nn.Module, given: Modules) -> Modules:
    """Patterns of modules, in which modules themselves are names: these hold for copies, too.

    Raises:
        InputError: a module that is none of the model's.
    """
    names = {id(module): path for path, module in named_modules(model).items()}
    found = []
    for one in as_patterns(given):
        if isinstance(one, nn.Module) and not names.get(id(one)):
            raise InputError(f"the {type(one).__name__} that is given is no module in {type(model).__name__}")
        found.append(names[id(one)] if isinstance(one, nn.Module) else one)
    return tuple(found)
