"""The groups that a removal may cut, in bundles that lose equally many units, and reports on those that lose fewer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import ceil, gcd
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from netsurgery.analysis.counterparts import counterparts
from netsurgery.analysis.groups import Group
from netsurgery.analysis.network import Network
from netsurgery.arguments import is_count, is_real
from netsurgery.edit import Edit
from netsurgery.errors import InputError
from netsurgery.outcome import Outcome
from netsurgery.passes.patterns import Chosen, Modules, Pattern, as_patterns
from netsurgery.passes.reporting import DataPass
from netsurgery.passes.selection import (
    belongs,
    channels_per_unit,
    is_touched,
    one_of_each_product,
    others_made_by,
    protected,
    sorts_of,
    stands_still,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["Bundle", "Choice", "RemovalSettings", "brief", "call_of"]

_EPSILON = 1e-9  # 0.3 of 10 units are 3
_MOST = 0.9  # share of a layer that may go


class RemovalSettings(DataPass):
    """The settings of a removal that bundles depend on: fields of ``PruneChannels``, which describes them."""

    ratio: float | Mapping[Any, float] | None
    params: float | None
    macs: float | None
    threshold: float | None
    scope: Literal["layer", "global"]
    per: Literal["auto", "unit", "cost"]
    of: Edit | Network | None
    multiple_of: int
    min_channels: int
    max_ratio: float | None
    unit: str | Sequence[str]
    include: Modules
    exclude: Modules
    protect: Modules
    normalize: Literal["auto", "mean", "max", "sum", "none"]

    def by_cost(self, network: Network) -> bool:
        """True if units are ranked by their scores relative to their costs."""
        budget = self.scope == "global" and (self.params is not None or self.macs is not None)
        return self.per == "cost" or (self.per == "auto" and budget and network.comparable and not network.ordinal)


@dataclass(frozen=True)
class Bundle:
    """Groups that lose equally many units at once: usually one, several where the code splits into equal parts."""

    groups: tuple[Group, ...]
    order: tuple[list[int], ...]  # of each group, its units from the least important to the most
    scores: Tensor  # of the k-th removal, ascending: normalised, averaged over the groups (threshold: the highest)
    whole: int  # units in the original
    channels: int  # channels of a layer that a unit is
    most: int  # units that may be removed
    step: int  # removed counts leave a multiple of this
    ratio: float | None = None  # of the units of the original, to be removed

    @property
    def size(self) -> int:
        """The number of units now."""
        return self.groups[0].size

    def due(self, ratio: float) -> int:
        """The number of units to remove now, so that a share of the original's is gone."""
        return max(0, int(self.whole * ratio + _EPSILON) - (self.whole - self.size))

    def allowed(self, removed: int) -> int:
        """The largest number of removals up to ``removed`` that leaves an allowed number of units."""
        removed = min(removed, self.most)
        while removed > 0 and (self.size - removed) % self.step:
            removed -= 1
        return removed


class Choice:
    """The groups of a network that a removal may cut, in bundles, and the reports on the others."""

    def __init__(self, settings: RemovalSettings, network: Network):
        self.settings, self.network = settings, network
        self.original: Network = network
        if isinstance(settings.of, Edit) and any(stage.modules for stage in settings.of.stages):
            raise InputError("PruneChannels(of=...): the edit rewrites modules: pass the Network that it leads to")
        if settings.of is not None:
            self.original = settings.of.network if isinstance(settings.of, Edit) else settings.of
        left = settings.of.names_after(network.tensors) if isinstance(settings.of, Edit) else None
        self.names = None if settings.of is None else counterparts(self.original, network, tensors=left)
        self.units = sorts_of("PruneChannels", settings.unit)
        self.sorts = {unit for sorts in self.units for unit in sorts}
        self.ratios = self._ratios()
        self.short: dict[str, str] = {}
        self.few: dict[str, str] = {}
        self.missing = False  # whether fewer units go than are asked of all together
        self.groups = self._groups()
        self.bundles = self._bundles()

    def _ratios(self) -> list[tuple[tuple[Pattern, ...], Chosen, float]]:
        """The modules that shares are given for, with these."""
        shares = self.settings.ratio if isinstance(self.settings.ratio, Mapping) else {}
        return [((one,), Chosen(self.network, (one,)), share) for one, share in shares.items()]

    def ratio(self, group: Group) -> float | None:
        """The share of a group that is asked for; None where none is."""
        if isinstance(self.settings.ratio, Mapping):
            return next((share for patterns, held, share in self.ratios if belongs(group, held, patterns)), None)
        return None if self.settings.ratio is None else float(self.settings.ratio)

    def _meant(self) -> list[Group]:
        """The groups that are meant, locked ones too."""
        settings, network = self.settings, self.network
        include, exclude = as_patterns(settings.include), as_patterns(settings.exclude)
        included, excluded = Chosen(network, include), Chosen(network, exclude)
        kept = protected(network, Chosen(network, as_patterns(settings.protect), empty=True))
        wanted = [(include, included)] if include else [(patterns, chosen) for patterns, chosen, _ in self.ratios]
        asked = []
        for group in network.groups:
            if group.name in kept or is_touched(group, excluded) or group.unit not in self.sorts:
                continue
            if not wanted or any(belongs(group, chosen, patterns) for patterns, chosen in wanted):
                asked.append(group)
            elif group.locked is None and (near := [chosen for _, chosen in wanted if is_touched(group, chosen)]):
                others = others_made_by(group, near[0]) or "others"
                self.short[group.name] = (
                    f"0 of {group.size} (also produced by {others}: include '{group.name}' to cut it)"
                )
        return [group for group in asked if not self.ratios or self.ratio(group) is not None]

    def _groups(self) -> dict[str, Group]:
        """The groups that are asked for and can be cut, by name; one factor of each dimension."""
        asked, network = self._meant(), self.network
        open_ = [group for group in asked if group.locked is None]
        found: dict[str, Group] = {}
        for sorts in self.units:
            found.update(one_of_each_product(network, [group for group in open_ if group.unit in sorts]))
        self.locked = stands_still(network, [group for group in asked if group.locked is not None], found)
        return {name: group for name, group in network.by_name.items() if name in found}

    def _bundles(self) -> list[Bundle]:
        network, free = self.network, self.groups
        bundles, done = [], set[str]()
        for name in free:
            together = network.equal_to(name)
            if name in done:
                continue
            done.update(together)
            if still := [other for other in together if other not in free]:
                self.short[name] = f"0 of {network[name].size} (keeps as many units as '{still[0]}', which stays)"
            else:
                bundles.append(self._bundle(tuple(network[other] for other in together)))
        if not network.groups:
            raise InputError(f"nothing of {network.model_name} can be pruned: it has no parameters with units")
        if not bundles or (self.settings.of is None and not any(bundle.most for bundle in bundles)):
            locked = "; ".join(f"{g.name}: {g.locked}" for g in network.groups if g.locked)[:500]
            shared = "".join(f" {name}: {why}." for name, why in self.short.items())[:500]
            raise InputError(
                f"nothing of {network.model_name} can be pruned with these settings.{shared} Locked: {locked}"
            )
        return bundles

    def _bundle(self, groups: tuple[Group, ...]) -> Bundle:
        settings, size = self.settings, groups[0].size
        whole = max(self._whole(group) for group in groups)
        found = [_checked(self.network, group).sort(stable=True) for group in groups]
        scores = torch.stack([self._normalised(ordered) for ordered, _ in found])
        joint = scores.mean(0) if settings.threshold is None else scores.amax(0)  # a threshold holds for each of them
        cut = [group.channel for group in self.groups.values()]
        channels = min(channels_per_unit(self.network, group, cut) for group in groups)
        ratio = self.ratio(groups[0])
        least = max(ceil(settings.min_channels / channels), whole - int(whole * self.most(ratio) + _EPSILON))
        step = settings.multiple_of // gcd(settings.multiple_of, channels)
        order = tuple(indices.tolist() for _, indices in found)
        return Bundle(groups, order, joint, whole, channels, max(0, size - max(1, least)), step, ratio)

    def most(self, ratio: float | None) -> float:
        """The largest share of a group that may be removed."""
        if self.settings.max_ratio is not None:
            return self.settings.max_ratio
        return max(_MOST, ratio) if ratio is not None and self.settings.scope == "layer" else _MOST

    def _whole(self, group: Group) -> int:
        """The number of units of a group in the original."""
        if self.names is None:
            return group.size
        if group.name not in self.names or self.original[self.names[group.name]].size < group.size:
            raise InputError(
                f"PruneChannels(of=...): group '{group.name}' of {self.network.model_name} is none of the original, "
                f"{self.original.model_name}: pass the Edit that began with it"
            )
        return self.original[self.names[group.name]].size

    def _normalised(self, score: Tensor) -> Tensor:
        settings = self.settings
        if settings.threshold is not None:
            return score
        if settings.scope == "layer":
            return torch.arange(1, len(score) + 1, dtype=torch.float64) / len(score)
        how: str = settings.normalize
        if how == "auto":
            how = "none" if self.network.comparable else "sum" if settings.by_cost(self.network) else "mean"
        size = score.abs()
        scale = {"mean": size.mean(), "max": size.max(), "sum": size.sum(), "none": torch.ones(())}[how]
        return score / scale if scale > 0 else score

    def wanted(self, ratio: float) -> int:
        """The number of units of all groups together to remove now."""
        whole = sum(bundle.whole * len(bundle.groups) for bundle in self.bundles)
        gone = sum((bundle.whole - bundle.size) * len(bundle.groups) for bundle in self.bundles)
        return max(0, int(whole * ratio + _EPSILON) - gone)

    def edit(self, removed: list[int]) -> Edit:
        """The edit that removes so many units of each bundle, those of the lowest scores."""
        keep: Mapping[str, tuple[int, ...]] = {
            group.name: tuple(sorted(order[k:]))
            for bundle, k in zip(self.bundles, removed, strict=True)
            for group, order in zip(bundle.groups, bundle.order, strict=True)
        }
        edit = Edit(self.network, keep)
        return replace(edit, outcomes=(self._outcome(edit, removed),))

    def _outcome(self, edit: Edit, removed: list[int]) -> Outcome:
        settings = self.settings
        if settings.scope == "global" and is_real(settings.ratio):
            got = sum(k * len(bundle.groups) for bundle, k in zip(self.bundles, removed, strict=True))
            self.missing = got < self.wanted(float(settings.ratio))
        for bundle, k in zip(self.bundles, removed, strict=True):
            if why := self._shortfall(bundle, k):
                self.short.update((group.name, why) for group in bundle.groups)
            elif few := self._few(bundle, k):
                self.few.update((group.name, few) for group in bundle.groups)
        for group in self.locked:
            self.short[group.name] = f"0 of {group.size} (locked: {group.locked})"
        budget = next((name for name in ("params", "macs") if getattr(settings, name) is not None), None)
        if budget is None:
            return Outcome(self._asked(), self._got(removed), self.short, self.few)
        whole, left = (getattr(cost, budget) for cost in (self.original.cost(), edit.after))
        limit = getattr(settings, budget)
        asked = f"{max(0, whole - limit):,}" if is_count(limit) else f"{100 * (1 - limit):.1f}%"
        word = {"params": "parameters", "macs": "MACs"}[budget]
        return Outcome(f"{asked} of the {word}", f"{100 * (1 - left / whole):.1f}%", {}, self.few)

    def _asked(self) -> str:
        settings = self.settings
        of = "the original's channels" if settings.of is not None else "the channels"
        if settings.threshold is not None:
            return f"the units with scores of at most {settings.threshold:g}"
        if isinstance(settings.ratio, Mapping):
            first, *others = [(f"{100 * share:.1f}%", brief(one)) for one, share in settings.ratio.items()]
            return f"{first[0]} of {of} in {first[1]}" + "".join(f", {share} in {one}" for share, one in others)
        return f"{100 * float(settings.ratio or 0):.1f}% of {of}" + (
            " of each layer" if settings.scope == "layer" else ""
        )

    def _got(self, removed: list[int]) -> str:
        """The share and number of channels that are gone, in the layers that are meant."""
        whole = sum(bundle.whole * bundle.channels * len(bundle.groups) for bundle in self.bundles)
        left = sum(
            (bundle.size - k) * bundle.channels * len(bundle.groups)
            for bundle, k in zip(self.bundles, removed, strict=True)
        )
        whole += (locked := sum(group.size for group in self.locked))
        gone = whole - left - locked
        return f"{100 * gone / whole:.1f}% ({gone:,} of {whole:,})"

    def _shortfall(self, bundle: Bundle, removed: int) -> str | None:
        """The reason why a group loses fewer units than asked; None if it does not."""
        settings = self.settings
        gone = bundle.whole - bundle.size + removed
        if settings.threshold is not None:
            due = int((bundle.scores <= settings.threshold).sum())
        elif settings.scope == "layer" and bundle.ratio is not None:
            due = bundle.due(bundle.ratio)
            if bundle.ratio and not gone and not due:
                return f"0 of {bundle.whole} ({100 * bundle.ratio:g}% of these is less than one)"
        else:  # of all together
            due = bundle.size if self.missing else 0
        return f"{gone} of {bundle.whole} ({self._limit(bundle, due)})" if removed < due else None

    def _few(self, bundle: Bundle, removed: int) -> str | None:
        """The number of units that stay, in words, where a ranking of all groups has nearly emptied this one."""
        stay = bundle.size - removed
        held = removed >= bundle.most and self._limit(bundle, bundle.most + 1)
        if (
            self.settings.scope == "layer"
            or stay == bundle.whole
            or not (10 * stay <= bundle.whole or (held and held.startswith("max_ratio")))
        ):
            return None
        return f"{stay:,} of {bundle.whole:,}" + (f" ({held})" if held else "")

    def _limit(self, bundle: Bundle, due: int) -> str:
        """The setting that keeps units which were due."""
        settings = self.settings
        if bundle.most >= due:
            return f"multiple_of={settings.multiple_of}"
        if settings.min_channels > 1 and bundle.size - bundle.most == ceil(settings.min_channels / bundle.channels):
            return f"min_channels={settings.min_channels}"
        return f"max_ratio={self.most(bundle.ratio):g}"


def _checked(network: Network, group: Group) -> Tensor:
    score = network.scores.get(group.name)
    if score is None and network.scores:
        raise InputError(
            f"group '{group.name}' has no scores, which other groups have: let the scoring pass score it too "
            f"(its include, exclude and removal), or keep the removal from it, PruneChannels(exclude='{group.name}')"
        )
    if not isinstance(score, Tensor) or score.shape != (group.size,):
        found = "none" if score is None else f"shape {tuple(torch.as_tensor(score).shape)}, {type(score).__name__}"
        raise InputError(
            f"group '{group.name}' has {group.size} units but scores of {found}: the scoring pass must score every unit"
        )
    score = score.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(score).all()):
        where = ", ".join(f"{m.parameter}" for m in group.members[:3])
        bad = torch.where(~torch.isfinite(score))[0][:5].tolist()
        raise InputError(f"scores of group '{group.name}' are NaN or infinite at units {bad}: look at {where}")
    return score


def call_of(one: DataclassInstance) -> str:
    """The call that makes a pass, with the settings that are not its defaults."""
    given = [field for field in fields(one) if getattr(one, field.name) != field.default and field.repr]
    return f"{type(one).__name__}({', '.join(f'{field.name}={brief(getattr(one, field.name))}' for field in given)})"


def brief(value: object) -> str:
    """A setting in one line: modules and networks by their class."""
    if isinstance(value, nn.Module | Edit | Network):
        return type(value).__name__
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{brief(one)}: {share}" for one, share in value.items()) + "}"
    return f"[{', '.join(map(brief, value))}]" if isinstance(value, tuple | list) else repr(value)
