"""More units, and the same outputs: widen by copies, or plant new ones."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any, ClassVar

from netsurgery.analysis.groups import Group
from netsurgery.analysis.growth import obstacles
from netsurgery.analysis.network import Network
from netsurgery.analysis.units import Unit
from netsurgery.arguments import is_count, is_real, require_counts
from netsurgery.edit import Edit
from netsurgery.errors import InputError
from netsurgery.outcome import Outcome
from netsurgery.passes.bundles import brief, call_of
from netsurgery.passes.patterns import Chosen, Modules, Pattern, as_patterns
from netsurgery.passes.selection import (
    belongs,
    channels_beside,
    channels_per_unit,
    is_touched,
    one_of_each_product,
    others_made_by,
    sorts_of,
    stands_still,
)
from netsurgery.pipeline import Pass
from netsurgery.units import Copy, New, Planned, listed

__all__ = ["PlantChannels", "WidenChannels"]


_WHOLE_FIRST: tuple[Unit, ...] = ("channel", "head", "head_dim", "group", "rank")  # more heads, not larger ones
_FEW = "The factor adds less than one unit to each group"
_NONE = "They leave no group with open units: network.prunable lists these, network.groups the reasons of others"


@dataclass(frozen=True, repr=False)
class _Growth(Pass):
    """The base of passes that add units: it finds the groups that are meant, and says which of them cannot grow."""

    include: Modules = dataclasses.field(default=(), kw_only=True)
    exclude: Modules = dataclasses.field(default=(), kw_only=True)
    unit: str | Sequence[str] = dataclasses.field(default="any", kw_only=True)
    seed: int = dataclasses.field(default=0, kw_only=True)

    gives: ClassVar[frozenset[str]] = frozenset({"edit"})

    def __repr__(self) -> str:
        return call_of(self)

    def __post_init__(self) -> None:
        sorts_of(type(self).__name__, self.unit)
        for name in ("include", "exclude"):
            object.__setattr__(self, name, as_patterns(getattr(self, name)))

    def run(self, network: Network) -> Edit:
        """Add units to every group that is meant and can grow."""
        keep, refused = self._possible(network)
        others = channels_beside(network, keep)  # where another factor of the same dimension grows, nothing is missing
        short = {
            name: f"0 of {network[name].size} ({why})"
            for name, why in refused.items()
            if not any(network[one].channel in others for one in network.equal_to(name))
        }
        locked = [group for group in network.groups if group.locked is not None]
        still = stands_still(network, self._meant(network, locked), keep)
        named = [(patterns, Chosen(network, patterns)) for patterns in map(as_patterns, self._named())]
        for group in (*still, *_named_in_vain(network, keep, named)):
            short[group.name] = f"0 of {group.size} (locked: {group.locked})"
        short.update(_made_elsewhere(network, keep, named, self._excluded(network)))
        if not keep:
            listed = "; ".join(f"{name}: {why}" for name, why in short.items())[:500]
            listed = listed or (_FEW if self._meant(network, network.prunable) else _NONE)
            raise InputError(f"nothing of {network.model_name} can grow with these settings. {listed}")
        before = sum(network[name].size for name in keep)
        added = sum(map(len, keep.values())) - before
        got = f"{added:,} units to the {before:,} of {len(keep)} groups"
        return Edit(network, keep, outcomes=(Outcome(self.asked(), got, short, does="add"),))

    def _named(self) -> list[Modules]:
        """The patterns that are to match something that grows, each."""
        return [*as_patterns(self.include)]

    def _excluded(self, network: Network) -> Chosen:
        return Chosen(network, as_patterns(self.exclude))

    def _meant(self, network: Network, among: Iterable[Group]) -> list[Group]:
        sorts = {one for together in sorts_of(type(self).__name__, self.unit) for one in together}
        include, excluded = as_patterns(self.include), self._excluded(network)
        included = Chosen(network, include)
        return [
            group
            for group in among
            if group.unit in sorts
            and not is_touched(group, excluded)
            and (not include or belongs(group, included, include))
        ]

    def _possible(self, network: Network) -> tuple[dict[str, tuple[Planned, ...]], dict[str, str]]:
        """The units of groups that can grow together, one factor of each dimension; and reasons why others cannot."""
        names, refused = dict[str, None](), dict[str, str]()
        for group in self._meant(network, network.prunable):
            together = network.equal_to(group.name)
            if locked := [name for name in together if network[name].locked]:
                refused[group.name] = (
                    f"keeps as many units as '{locked[0]}', which is locked: {network[locked[0]].locked}"
                )
            else:
                names.update(dict.fromkeys(together))
        wanted = {name: own for name, own in self.units(network, names).items() if len(own) > network[name].size}
        units = {name: listed(name, own, network[name].size) for name, own in wanted.items()}
        while True:
            chosen = one_of_each_product(network, [network[name] for name in units], _WHOLE_FIRST)
            keep = {name: units[name] for name in chosen if all(one in chosen for one in network.equal_to(name))}
            found = obstacles(network, keep)
            if not found:
                return keep, refused
            for name, why in found.items():
                refused.update({one: why for one in network.equal_to(name) if units.pop(one, None)})

    def units(self, network: Network, names: Iterable[str]) -> dict[str, tuple[Planned, ...]]:
        """The units that some groups will have, by name."""
        raise NotImplementedError

    def asked(self) -> str:
        """The growth that is asked for, in words."""
        raise NotImplementedError


_Named = Sequence[tuple[Sequence[Pattern], Chosen]]  # patterns, and the modules that they match


def _named_in_vain(network: Network, keep: Iterable[str], named: _Named) -> Iterator[Group]:
    """The locked groups, such as the network's outputs, that a pattern names which matches nothing that grows."""
    for patterns, chosen in named:
        if not any(belongs(network[name], chosen, patterns) for name in keep):
            yield from (one for one in network.groups if one.locked and belongs(one, chosen, patterns))


def _made_elsewhere(network: Network, keep: Iterable[str], named: _Named, excluded: Chosen) -> dict[str, str]:
    """The groups that stay since modules which are not named produce their units, too; and which do."""
    found: dict[str, str] = {}
    still = [group for group in network.prunable if group.name not in keep and not is_touched(group, excluded)]
    for patterns, chosen in named:
        for group in still:
            made = any(chosen.holds(member.parameter) for member in group.members if member.role == "produces")
            if made and not belongs(group, chosen, patterns):
                others = f"also produced by {others_made_by(group, chosen)}: include '{group.name}' to grow it"
                found[group.name] = f"0 of {group.size} ({others})"
    return found


@dataclass(frozen=True, repr=False)
class WidenChannels(_Growth):
    """Widen each group by copies of its units; outputs stay as they are.

    Args:
        factor: how many times as many units there will be, at least 1; rounded to whole units. Each unit gets as many
            copies as others, or one more: which, is drawn. Units that statistics are taken over (a layer norm) grow
            by whole factors only.
        multiple_of: the number of channels of a layer that grows is rounded up to a multiple of this.
        noise: how much the shares that consumers take from the copies of a unit differ: each is drawn from 1 - noise
            to 1 + noise times an equal share. Copies whose shares are equal get equal gradients and stay equal in
            training; outputs are the same with any.
        include: modules, by name patterns, classes or themselves, as for ``PruneChannels``.
        exclude: likewise.
        unit: which sorts of units, as for ``PruneChannels``.
        seed: fixes what is drawn.

    Source: Net2WiderNet of Chen, Goodfellow and Shlens, arXiv 1511.05641. They add noise to the weights of copies; here
    the shares differ instead, so that the function stays exactly the same.

    Raises:
        InputError: a number out of range, a pattern that matches nothing, or nothing that can grow.

    Example:
        >>> import torch, netsurgery
        >>> from netsurgery.passes import WidenChannels
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> netsurgery.apply(model, [WidenChannels(1.5)])[0]
        Linear(in_features=4, out_features=12, bias=True)
    """

    factor: float
    multiple_of: int = dataclasses.field(default=1, kw_only=True)
    noise: float = dataclasses.field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_real(self.factor) or not 1 <= self.factor < float("inf"):
            raise InputError(
                f"WidenChannels(factor={self.factor!r}): a number of at least 1, of the layers that include= names; "
                "PruneChannels removes"
            )
        require_counts(self, "multiple_of")
        if not is_real(self.noise) or not 0 <= self.noise < 1:
            raise InputError(f"WidenChannels(noise={self.noise!r}): a number in [0, 1)")

    def units(self, network: Network, names: Iterable[str]) -> dict[str, tuple[Planned, ...]]:
        """The units of each group and, behind them, the copies in the order of their originals."""
        return {name: self._widened(network, network[name]) for name in names}

    def _widened(self, network: Network, group: Group) -> tuple[Planned, ...]:
        size, channels = group.size, channels_per_unit(network, group)
        step = self.multiple_of // gcd(self.multiple_of, channels)
        count = max(size, -(-round(size * self.factor) // step) * step)
        draw = random.Random(f"{self.seed} {size} {count}")  # groups of equal sizes alike
        rest = draw.sample(range(size), count % size) if count > size else []
        copies = sorted([*list(range(size)) * (count // size - 1), *rest])
        if not self.noise:
            return (*range(size), *(Copy(unit) for unit in copies))
        many = Counter(copies)
        return (*range(size), *(Copy(u, (1 + self.noise * draw.uniform(-1, 1)) / (many[u] + 1)) for u in copies))

    def asked(self) -> str:
        """The growth that is asked for, in words."""
        return f"{100 * (self.factor - 1):g}% of the channels of each layer"


@dataclass(frozen=True, repr=False)
class PlantChannels(_Growth):
    """Add new units to each group; consumers read them by zeros, so that outputs stay as they are.

    Args:
        amount: new channels of each layer, or by modules, as for ``include``: ``{"layer3.*": 8, "layer4.*": 16}``.
            A layer whose units are several channels, such as heads, gets enough units for at least these.
        init: how the weights that make new units begin, see ``netsurgery.New``.
        include: modules, by name patterns, classes or themselves, as for ``PruneChannels``.
        exclude: likewise.
        unit: which sorts of units, as for ``PruneChannels``.
        seed: fixes the random numbers.

    Source: channel planting, arXiv 2011.02390. Zeros in the consumers are our choice where the source is silent.

    Raises:
        InputError: a number out of range, a pattern that matches nothing, or nothing that can grow.

    Example:
        >>> import torch, netsurgery
        >>> from netsurgery.passes import PlantChannels
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> larger = netsurgery.apply(model, [PlantChannels(3)])
        >>> larger[0], larger[2].weight[:, 8:].any().item()
        (Linear(in_features=4, out_features=11, bias=True), False)
    """

    amount: int | Mapping[Any, int]
    init: str = dataclasses.field(default="he", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        amounts = list(self.amount.values()) if isinstance(self.amount, Mapping) else [self.amount]
        if not amounts or not all(is_count(one, 1) for one in amounts):
            raise InputError(f"PlantChannels(amount={self.amount!r}): a whole number of at least 1, or one by modules")
        if isinstance(self.amount, Mapping):
            as_patterns(tuple(self.amount))
        New(self.init)

    def _named(self) -> list[Modules]:
        return [*super()._named(), *(self.amount if isinstance(self.amount, Mapping) else ())]

    def _meant(self, network: Network, among: Iterable[Group]) -> list[Group]:
        amounts = self._amounts(network)
        return [group for group in super()._meant(network, among) if amounts[group.name]]

    def _amounts(self, network: Network) -> dict[str, int]:
        """The new channels that are asked for, by group."""
        if not isinstance(self.amount, Mapping):
            return dict.fromkeys(network.by_name, self.amount)
        given = [(as_patterns(one), count) for one, count in self.amount.items()]
        found = [(Chosen(network, patterns), patterns, count) for patterns, count in given]  # each matches something
        return {
            group.name: next((count for chosen, patterns, count in found if belongs(group, chosen, patterns)), 0)
            for group in network.groups
        }

    def units(self, network: Network, names: Iterable[str]) -> dict[str, tuple[Planned, ...]]:
        """The units of each group and, behind them, the new ones."""
        amounts = self._amounts(network)
        new = New(self.init, self.seed)

        def more(name: str) -> int:
            return -(-amounts[name] // channels_per_unit(network, network[name]))

        return {name: (*range(network[name].size), *[new] * max(map(more, network.equal_to(name)))) for name in names}

    def asked(self) -> str:
        """The growth that is asked for, in words."""
        if not isinstance(self.amount, Mapping):
            return f"{self.amount} channels to each layer"
        return ", ".join(f"{count} in {brief(one)}" for one, count in self.amount.items())
