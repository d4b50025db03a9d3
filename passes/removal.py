"""Which units to remove, given scores: by ratio, or until a budget of parameters or MACs is met."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import ceil, gcd
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from netsurgery.edit import Edit, Outcome, counterparts
from netsurgery.errors import InputError
from netsurgery.network import Group, Network, Unit
from netsurgery.passes.compensation import Method, compensate
from netsurgery.passes.patterns import Chosen, Modules, Pattern, as_patterns
from netsurgery.passes.selection import (
    ANY,
    belongs,
    channels_per_unit,
    is_touched,
    one_of_each_product,
    others_made_by,
    protected,
    stands_still,
)
from netsurgery.pipeline import Pass

__all__ = ["PruneChannels"]

_EPSILON = 1e-9  # 0.3 of 10 units are 3


@dataclass(frozen=True)
class _Bundle:
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
        """Units that there are."""
        return self.groups[0].size

    def due(self, ratio: float) -> int:
        """Units to remove now, so that a share of the original's is gone."""
        return max(0, int(self.whole * ratio + _EPSILON) - (self.whole - self.size))

    def allowed(self, removed: int) -> int:
        """The largest number of removals up to ``removed`` that leaves an allowed number of units."""
        removed = min(removed, self.most)
        while removed > 0 and (self.size - removed) % self.step:
            removed -= 1
        return removed


@dataclass(frozen=True, repr=False)
class PruneChannels(Pass):
    """Remove the units with the lowest scores.

    Args:
        ratio: share of the units to remove, in [0, 1): of every group (scope "layer") or of all together ("global").
            Or shares by modules, as for ``include``: ``{"layer3.*": 0.7, "layer4.*": 0.3}``; the first that a group
            belongs to holds, other groups stay whole.
        params: instead of a ratio, the parameters to keep: a float is a share, an int a number.
        macs: instead of a ratio, the multiply-accumulates to keep: likewise.
        threshold: instead of a ratio, remove the units with scores, as they are, of at most this.
        scope: "layer" removes the same share from each group; "global" ranks all units together.
        of: the original that ratio, budget and limits are shares of, where this is one of several rounds: the Edit that
            began with it (``first``, or ``first.then(second)``), or its Network. What rounding leaves in one round, the
            next removes. By default the network as it is.
        multiple_of: the number of channels that stay in a layer is a multiple of this, or the group stays whole.
        min_channels: at least so many channels stay in each layer.
        max_ratio: at most this share of each group is removed. By default 0.9, so that no layer is emptied because its
            scores are lower than others' (a tenth stays), or the ratio if that is higher and of each layer.
        unit: which sort of units may go, one or several: "channel", "head" (whole attention heads), "head_dim"
            (dimensions within heads), "group" (groups of a convolution or a group norm), "rank" (of a low-rank product
            such as LoRA's). "any" is the first three. A ratio is a share of a layer's channels, so where these are a
            product, "any" cuts one factor: dimensions within heads rather than heads.
        include: modules, by name patterns (``layer3.*``), classes or themselves. Only units go that matching modules
            alone produce, or whose group is named: a residual stream that others write to stays.
        exclude: likewise; no unit goes that a matching module produces or carries. What is inside of a module that
            matches, matches too.
        protect: likewise; nor does a unit that a matching module consumes or is given.
        normalize: how scores of different groups are made comparable when the scope is global: divided by the "mean",
            "max" or "sum" of their sizes in the group, or "none"; "auto" is "none" for scores that are comparable as
            they are (rises of the loss, Taylor, Fisher, LAMP), else "mean".
        compensate: make up for what the removal loses in the layers that read it: "bias" lets their outputs keep their
            mean over the data; "least-squares" also refits their weights so that the outputs stay as near as they can.
        data: what this is measured on, in eval mode: a DataLoader, Dataset, tensor or pair of tensors, as for
            ``netsurgery.passes.samples.draw_inputs``; it needs no labels.
        samples: how many samples of it, drawn at random whatever their classes.
        ridge: of the refit, relative to the mean square of a layer's inputs: holds weights near what they were where
            the data says little.

    Budgets are met within one unit of the last group touched (one ``multiple_of`` step), priced from the expressions.
    ``edit.summary()`` says what was asked and what was removed, and which groups lost less or are locked, and why.

    Raises:
        InputError: a number out of range, both or neither of ratio and budget, a pattern that matches no module, scores
            that are not finite, nothing that can be pruned, a budget that cannot be met, or another original.

    Example:
        >>> import torch, netsurgery
        >>> from netsurgery.passes import MagnitudeScore, PruneChannels
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> netsurgery.plan(model, [MagnitudeScore(), PruneChannels(params=0.6)]).after.params
        30
    """

    ratio: float | Mapping[Any, float] | None = None
    params: float | int | None = None
    macs: float | int | None = None
    threshold: float | None = None
    scope: Literal["layer", "global"] = "layer"
    of: Edit | Network | None = None
    multiple_of: int = 1
    min_channels: int = 1
    max_ratio: float | None = None
    unit: str | Sequence[str] = "any"
    include: Modules = ()
    exclude: Modules = ()
    protect: Modules = ()
    normalize: Literal["auto", "mean", "max", "sum", "none"] = "auto"
    compensate: Method | None = None
    data: Any = field(default=None, repr=False, compare=False)
    samples: int = 512
    ridge: float = 1e-2

    needs: ClassVar[frozenset[str]] = frozenset({"scores"})
    gives: ClassVar[frozenset[str]] = frozenset({"edit"})

    def __repr__(self) -> str:
        given = [one for one in fields(self) if getattr(self, one.name) != one.default and one.repr]
        return f"PruneChannels({', '.join(f'{one.name}={_brief(getattr(self, one.name))}' for one in given)})"

    def __post_init__(self) -> None:
        given = [name for name in ("ratio", "params", "macs", "threshold") if getattr(self, name) is not None]
        if len(given) != 1:
            raise InputError(
                f"PruneChannels takes one of ratio, params, macs and threshold, got {' and '.join(given) or 'none'}"
            )
        self._check_ratio()
        for name in ("params", "macs", "threshold"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Real):
                raise InputError(f"PruneChannels({name}={value!r}): expected a number")
        for name in ("params", "macs"):
            value = getattr(self, name)
            if value is not None and not (value > 0 if _is_count(value) else 0 < value <= 1):
                raise InputError(
                    f"PruneChannels({name}={value}): a share to keep in (0, 1], or a positive whole number"
                )
        self._check_choices()
        self._check_compensation()
        for name in ("include", "exclude", "protect"):
            object.__setattr__(self, name, as_patterns(getattr(self, name)))

    def _check_ratio(self) -> None:
        shares = self.ratio.values() if isinstance(self.ratio, Mapping) else [self.ratio]
        for share in [share for share in shares if self.ratio is not None]:
            if not isinstance(share, Real):
                raise InputError(f"PruneChannels(ratio={share!r}): expected a number")
            if not 0 <= share < 1:
                raise InputError(f"PruneChannels(ratio={share}): the share to remove must be in [0, 1)")
        if isinstance(self.ratio, Mapping):
            as_patterns(tuple(self.ratio))
            if not self.ratio or self.scope != "layer":
                raise InputError("PruneChannels: shares by modules, one or more, are of each layer (scope='layer')")

    def _check_choices(self) -> None:
        if self.scope not in ("layer", "global"):
            raise InputError(f"PruneChannels(scope='{self.scope}'): 'layer' or 'global'")
        units = (self.unit,) if isinstance(self.unit, str) else tuple(self.unit)
        if not units or not set(units) <= {"any", *get_args(Unit)}:
            known = ", ".join(map(repr, ("any", *get_args(Unit))))
            raise InputError(f"PruneChannels(unit={self.unit!r}): one or several of {known}")
        if self.normalize not in ("auto", "mean", "max", "sum", "none"):
            raise InputError(f"PruneChannels(normalize='{self.normalize}'): 'auto', 'mean', 'max', 'sum' or 'none'")
        most = 0.0 if self.max_ratio is None else self.max_ratio
        if self.multiple_of < 1 or self.min_channels < 1 or not 0 <= most <= 1:
            raise InputError("PruneChannels: multiple_of and min_channels are at least 1, max_ratio is in [0, 1]")
        if not isinstance(self.of, Edit | Network | None):
            raise InputError(
                f"PruneChannels(of={type(self.of).__name__}): the Edit that began with the original, or its Network"
            )

    def _check_compensation(self) -> None:
        if self.compensate not in (None, "bias", "least-squares"):
            raise InputError(f"PruneChannels(compensate='{self.compensate}'): 'bias', 'least-squares' or None")
        if self.compensate is not None and self.data is None:
            raise InputError(f"PruneChannels(compensate='{self.compensate}') needs data=..., which it is measured on")
        if not _is_count(self.samples) or self.samples < 1:
            raise InputError(f"PruneChannels(samples={self.samples}): at least 1")
        if not self.ridge > 0:
            raise InputError(f"PruneChannels(ridge={self.ridge}): must be positive")

    def run(self, network: Network) -> Edit:
        """Choose the units that stay, and make up for what goes if that is asked for."""
        choice = _Choice(self, network)
        edit = choice.edit(self._removed(choice))
        if self.compensate is None:
            return edit
        return compensate(edit, self.compensate, self.data, self.samples, self.ridge)

    def _removed(self, choice: _Choice) -> list[int]:
        """Units to remove from each bundle."""
        bundles = choice.bundles
        if self.threshold is not None:
            return [bundle.allowed(int((bundle.scores <= self.threshold).sum())) for bundle in bundles]
        if self.ratio is not None and self.scope == "layer":
            return [bundle.allowed(bundle.due(bundle.ratio or 0)) for bundle in bundles]
        ranked = sorted(_events(bundles))
        if isinstance(self.ratio, Real):
            wanted = choice.wanted(float(self.ratio))
            return _after(bundles, ranked, _first(ranked, lambda n: _units(bundles, ranked, n) >= wanted))
        return self._within_budget(choice, ranked)

    def _within_budget(self, choice: _Choice, ranked: list[Event]) -> list[int]:
        bundles, network = choice.bundles, choice.network
        what = "params" if self.params is not None else "macs"
        whole = getattr(choice.original.cost(), what)
        limit = getattr(self, what)
        limit = limit if _is_count(limit) else limit * whole

        def price(n: int) -> int:
            return int(getattr(network.cost(_counts(bundles, _after(bundles, ranked, n))), what))

        if price(len(ranked)) > limit:
            raise InputError(
                f"PruneChannels({what}={getattr(self, what)}): {network.model_name} keeps at least "
                f"{price(len(ranked)):,} of {whole:,} {what} with these settings: "
                "raise the budget or loosen exclude, min_channels and max_ratio (by default a tenth of a layer stays)"
            )
        return _after(bundles, ranked, _first(ranked, lambda n: price(n) <= limit))


class _Choice:
    """The groups of a network that a pass may cut, in bundles, and what it says of the others."""

    def __init__(self, settings: PruneChannels, network: Network):
        self.settings, self.network = settings, network
        self.original: Network = network
        if settings.of is not None:
            self.original = settings.of.network if isinstance(settings.of, Edit) else settings.of
        self.names = None if settings.of is None else counterparts(self.original, network)
        self.ratios = self._ratios()
        self.short: dict[str, str] = {}
        self.missing = False  # whether fewer units go than are asked of all together
        self.groups = self._groups()
        self.bundles = self._bundles()

    def _ratios(self) -> list[tuple[tuple[Pattern, ...], Chosen, float]]:
        """Modules that shares are given for."""
        shares = self.settings.ratio if isinstance(self.settings.ratio, Mapping) else {}
        return [((one,), Chosen(self.network, (one,)), share) for one, share in shares.items()]

    def ratio(self, group: Group) -> float | None:
        """The share of a group that is asked for; None where none is."""
        if isinstance(self.settings.ratio, Mapping):
            return next((share for patterns, held, share in self.ratios if belongs(group, held, patterns)), None)
        return None if self.settings.ratio is None else float(self.settings.ratio)

    def _groups(self) -> dict[str, Group]:
        """What may be cut, by name: of what was asked for, that which can be; one factor of each dimension."""
        settings, network = self.settings, self.network
        include, exclude = as_patterns(settings.include), as_patterns(settings.exclude)
        included, excluded = Chosen(network, include), Chosen(network, exclude)
        kept = protected(network, Chosen(network, as_patterns(settings.protect), empty=True))
        asked = []
        for group in network.groups:
            if group.name in kept or is_touched(group, excluded):
                continue
            held = [(include, included)] if include else [(patterns, chosen) for patterns, chosen, _ in self.ratios]
            if not held or any(belongs(group, chosen, patterns) for patterns, chosen in held):
                asked.append(group)
            elif group.frozen is None and (near := [chosen for _, chosen in held if is_touched(group, chosen)]):
                others = others_made_by(group, near[0]) or "others"
                self.short[group.name] = (
                    f"0 of {group.size} (also produced by {others}: include '{group.name}' to cut it)"
                )
        if isinstance(settings.ratio, Mapping):
            asked = [group for group in asked if self.ratio(group) is not None]
        units = (settings.unit,) if isinstance(settings.unit, str) else tuple(settings.unit)
        found: dict[str, Group] = {}
        for unit in units:
            sorts = ANY if unit == "any" else (unit,)
            open_ = [group for group in asked if group.frozen is None and group.unit in sorts]
            found.update(one_of_each_product(network, open_))
        self.locked = stands_still(network, [group for group in asked if group.frozen is not None], found)
        return {name: group for name, group in network.by_name.items() if name in found}

    def _bundles(self) -> list[_Bundle]:
        network, free = self.network, self.groups
        tied = {name: names for names in network.ties for name in names}
        bundles, done = [], set[str]()
        for name in free:
            together = tuple(tied.get(name, (name,)))
            if name not in done and all(other in free for other in together):
                done.update(together)
                bundles.append(self._bundle(tuple(network[other] for other in together)))
        if not any(bundle.most for bundle in bundles):
            locked = "; ".join(f"{g.name}: {g.frozen}" for g in network.groups if g.frozen)[:500]
            shared = "".join(f" {name}: {why}." for name, why in self.short.items())[:500]
            raise InputError(
                f"nothing of {network.model_name} can be pruned with these settings.{shared} Locked: {locked}"
            )
        return bundles

    def _bundle(self, groups: tuple[Group, ...]) -> _Bundle:
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
        return _Bundle(groups, order, joint, whole, channels, max(0, size - max(1, least)), step, ratio)

    def most(self, ratio: float | None) -> float:
        """The largest share of a group that may be removed."""
        if self.settings.max_ratio is not None:
            return self.settings.max_ratio
        return max(_MOST, ratio) if ratio is not None and self.settings.scope == "layer" else _MOST

    def _whole(self, group: Group) -> int:
        """Units of a group in the original."""
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
        how = settings.normalize if settings.normalize != "auto" else "none" if self.network.comparable else "mean"
        size = score.abs()
        scale = {"mean": size.mean(), "max": size.max(), "sum": size.sum(), "none": torch.ones(())}[how]
        return score / scale if scale > 0 else score

    def wanted(self, ratio: float) -> int:
        """Units of all groups together to remove now."""
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
        if settings.scope == "global" and isinstance(settings.ratio, Real):
            got = sum(k * len(bundle.groups) for bundle, k in zip(self.bundles, removed, strict=True))
            self.missing = got < self.wanted(float(settings.ratio))
        for bundle, k in zip(self.bundles, removed, strict=True):
            if why := self._shortfall(bundle, k):
                self.short.update((group.name, why) for group in bundle.groups)
        for group in self.locked:
            self.short[group.name] = f"0 of {group.size} (locked: {group.frozen})"
        budget = next((name for name in ("params", "macs") if getattr(settings, name) is not None), None)
        if budget is None:
            return Outcome(self._asked(), self._got(removed), self.short)
        whole, left = (getattr(cost, budget) for cost in (self.original.cost(), edit.after))
        limit = getattr(settings, budget)
        asked = f"{whole - limit:,}" if _is_count(limit) else f"{100 * (1 - limit):.1f}%"
        word = {"params": "parameters", "macs": "MACs"}[budget]
        return Outcome(f"{asked} of the {word}", f"{100 * (1 - left / whole):.1f}%", {})

    def _asked(self) -> str:
        settings = self.settings
        of = "the original's channels" if settings.of is not None else "the channels"
        if settings.threshold is not None:
            return f"the units with scores of at most {settings.threshold:g}"
        if isinstance(settings.ratio, Mapping):
            first, *others = [(f"{100 * share:.1f}%", _brief(one)) for one, share in settings.ratio.items()]
            return f"{first[0]} of {of} in {first[1]}" + "".join(f", {share} in {one}" for share, one in others)
        return f"{100 * float(settings.ratio or 0):.1f}% of {of}" + (
            " of each layer" if settings.scope == "layer" else ""
        )

    def _got(self, removed: list[int]) -> str:
        """Channels that are gone, of those of the layers that are meant."""
        whole = sum(bundle.whole * bundle.channels * len(bundle.groups) for bundle in self.bundles)
        left = sum(
            (bundle.size - k) * bundle.channels * len(bundle.groups)
            for bundle, k in zip(self.bundles, removed, strict=True)
        )
        whole += (locked := sum(group.size for group in self.locked))
        gone = whole - left - locked
        return f"{100 * gone / whole:.1f}% ({gone:,} of {whole:,})"

    def _shortfall(self, bundle: _Bundle, removed: int) -> str | None:
        """Why a group loses fewer units than asked, if it does."""
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

    def _limit(self, bundle: _Bundle, due: int) -> str:
        """The setting that keeps units which were due."""
        settings = self.settings
        if bundle.most >= due:
            return f"multiple_of={settings.multiple_of}"
        if settings.min_channels > 1 and bundle.size - bundle.most == ceil(settings.min_channels / bundle.channels):
            return f"min_channels={settings.min_channels}"
        return f"max_ratio={self.most(bundle.ratio):g}"


_MOST = 0.9
Event = tuple[float, int, int]  # score of the unit, its bundle, and how many of the bundle are then gone


def _checked(network: Network, group: Group) -> Tensor:
    score = network.scores.get(group.name)
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


def _events(bundles: list[_Bundle]) -> list[Event]:
    """Removals in reach."""
    return [
        (float(bundle.scores[k - 1]), index, k)
        for index, bundle in enumerate(bundles)
        for k in range(1, bundle.most + 1)
    ]


def _after(bundles: list[_Bundle], ranked: list[Event], n: int) -> list[int]:
    """Units removed from each bundle by the first ``n`` removals."""
    removed = [0] * len(bundles)
    for _, index, k in ranked[:n]:
        removed[index] = k
    return [bundle.allowed(k) for bundle, k in zip(bundles, removed, strict=True)]


def _units(bundles: list[_Bundle], ranked: list[Event], n: int) -> int:
    return sum(k * len(bundle.groups) for bundle, k in zip(bundles, _after(bundles, ranked, n), strict=True))


def _is_count(value: object) -> bool:
    return isinstance(value, Integral)


def _first(ranked: Sequence[object], enough: Callable[[int], bool]) -> int:
    """The smallest number of removals that is enough (all of them if none is)."""
    low, high = 0, len(ranked)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low


def _counts(bundles: list[_Bundle], removed: list[int]) -> dict[str, int]:
    return {g.name: g.size - k for bundle, k in zip(bundles, removed, strict=True) for g in bundle.groups}


def _brief(value: Any) -> str:
    """A setting in one line: modules and networks by their class."""
    if isinstance(value, nn.Module | Edit | Network):
        return type(value).__name__
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_brief(one)}: {share}" for one, share in value.items()) + "}"
    return f"[{', '.join(map(_brief, value))}]" if isinstance(value, tuple | list) else repr(value)
