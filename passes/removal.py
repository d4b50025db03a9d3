"""Which units to remove, given scores: by ratio, or until a budget of parameters or MACs is met."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from netsurgery.edit import Edit
from netsurgery.errors import InputError
from netsurgery.network import Group, Network
from netsurgery.passes.compensation import Method, compensate
from netsurgery.passes.patterns import as_patterns, check_patterns, matches
from netsurgery.pipeline import Pass

__all__ = ["PruneChannels"]


@dataclass(frozen=True)
class _Bundle:
    """Groups that lose equally many units at once: usually one, several where the code splits into equal parts."""

    groups: tuple[Group, ...]
    order: tuple[list[int], ...]  # of each group, its units from the least important to the most
    scores: Tensor  # of the k-th removal, ascending: normalised, averaged over the groups (threshold: the highest)
    most: int  # units that may be removed
    step: int  # removed counts leave a multiple of this


@dataclass(frozen=True)
class PruneChannels(Pass):
    """Remove the units with the lowest scores.

    Args:
        ratio: share of the units to remove, in [0, 1): of every group (scope "layer") or of all together ("global").
        params: instead of a ratio, the parameters to keep: a float is a share, an int a number.
        macs: instead of a ratio, the multiply-accumulates to keep: likewise.
        threshold: instead of a ratio, remove the units with scores, as they are, of at most this.
        scope: "layer" removes the same share from each group; "global" ranks all units together.
        multiple_of: the number of units that stay in a group is a multiple of this, or the group stays whole.
        min_channels: at least so many units stay in each group.
        max_ratio: at most this share of each group is removed.
        unit: which sort of units may go: "head" (whole attention heads), "head_dim" (dimensions within heads),
            "channel" (all others), or "any".
        include: name patterns of modules (``layer3.*``); only units that a matching module produces or carries go.
        exclude: likewise; no unit goes that a matching module produces or carries. Patterns match what is inside too.
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

    Raises:
        InputError: a number out of range, both or neither of ratio and budget, a pattern that matches no module, scores
            that are not finite, nothing that can be pruned, or a budget that cannot be met.

    Example:
        >>> import torch, netsurgery
        >>> from netsurgery.passes import MagnitudeScore, PruneChannels
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> netsurgery.plan(model, [MagnitudeScore(), PruneChannels(params=0.6)]).after.params
        30
    """

    ratio: float | None = None
    params: float | int | None = None
    macs: float | int | None = None
    threshold: float | None = None
    scope: Literal["layer", "global"] = "layer"
    multiple_of: int = 1
    min_channels: int = 1
    max_ratio: float = 1.0
    unit: Literal["any", "channel", "head", "head_dim"] = "any"
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    normalize: Literal["auto", "mean", "max", "sum", "none"] = "auto"
    compensate: Method | None = None
    data: Any = field(default=None, repr=False, compare=False)
    samples: int = 512
    ridge: float = 1e-2

    needs: ClassVar[frozenset[str]] = frozenset({"scores"})
    gives: ClassVar[frozenset[str]] = frozenset({"edit"})

    def __post_init__(self) -> None:
        given = [name for name in ("ratio", "params", "macs", "threshold") if getattr(self, name) is not None]
        if len(given) != 1:
            raise InputError(
                f"PruneChannels takes one of ratio, params, macs and threshold, got {' and '.join(given) or 'none'}"
            )
        for name in given:
            if not isinstance(getattr(self, name), Real):
                raise InputError(f"PruneChannels({name}={getattr(self, name)!r}): expected a number")
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise InputError(f"PruneChannels(ratio={self.ratio}): the share to remove must be in [0, 1)")
        for name in ("params", "macs"):
            value = getattr(self, name)
            if value is not None and not (value > 0 if _is_count(value) else 0 < value <= 1):
                raise InputError(
                    f"PruneChannels({name}={value}): a share to keep in (0, 1], or a positive whole number"
                )
        if self.scope not in ("layer", "global"):
            raise InputError(f"PruneChannels(scope='{self.scope}'): 'layer' or 'global'")
        if self.unit not in ("any", "channel", "head", "head_dim"):
            raise InputError(f"PruneChannels(unit='{self.unit}'): 'any', 'channel', 'head' or 'head_dim'")
        if self.normalize not in ("auto", "mean", "max", "sum", "none"):
            raise InputError(f"PruneChannels(normalize='{self.normalize}'): 'auto', 'mean', 'max', 'sum' or 'none'")
        if self.multiple_of < 1 or self.min_channels < 1 or not 0 <= self.max_ratio <= 1:
            raise InputError("PruneChannels: multiple_of and min_channels are at least 1, max_ratio is in [0, 1]")
        self._check_compensation()
        for name in ("include", "exclude"):
            object.__setattr__(self, name, as_patterns(getattr(self, name)))

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
        edit = self._chosen(network)
        if self.compensate is None:
            return edit
        return compensate(edit, self.compensate, self.data, self.samples, self.ridge)

    def _chosen(self, network: Network) -> Edit:
        bundles = self._bundles(network)
        if self.ratio is not None and self.scope == "layer":
            removed = [self._allowed(bundle, int(bundle.groups[0].size * self.ratio + 1e-9)) for bundle in bundles]
            return _edit(network, bundles, removed)
        if self.threshold is not None:
            removed = [self._allowed(bundle, int((bundle.scores <= self.threshold).sum())) for bundle in bundles]
            return _edit(network, bundles, removed)
        ranked = sorted(self._events(bundles))
        if self.ratio is not None:
            units = sum(group.size for bundle in bundles for group in bundle.groups)
            wanted = int(units * self.ratio + 1e-9)
            return _edit(
                network,
                bundles,
                self._after(bundles, ranked, _first(ranked, lambda n: self._units(bundles, ranked, n) >= wanted)),
            )
        return self._budget(network, bundles, ranked)

    def _budget(self, network: Network, bundles: list[_Bundle], ranked: list[tuple[float, int, int]]) -> Edit:
        what = "params" if self.params is not None else "macs"
        limit = getattr(self, what)
        whole = getattr(network.cost(), what)
        limit = limit if _is_count(limit) else limit * whole

        def price(n: int) -> int:
            counts = _counts(bundles, self._after(bundles, ranked, n))
            return int(getattr(network.cost(counts), what))

        if price(len(ranked)) > limit:
            raise InputError(
                f"PruneChannels({what}={getattr(self, what)}): {network.model_name} keeps at least "
                f"{price(len(ranked)):,} of {whole:,} {what} with these settings: "
                "raise the budget or loosen exclude, min_channels and max_ratio"
            )
        return _edit(network, bundles, self._after(bundles, ranked, _first(ranked, lambda n: price(n) <= limit)))

    def _bundles(self, network: Network) -> list[_Bundle]:
        free = self._selected(network)
        tied = {name: names for names in network.ties for name in names}
        bundles, done = [], set[str]()
        for name in free:
            together = tuple(tied.get(name, (name,)))
            if name in done or not all(other in free for other in together):
                continue
            done.update(together)
            groups = tuple(network[other] for other in together)
            scores = [self._checked(network, group) for group in groups]
            ordered = [score.sort(stable=True) for score in scores]
            found = torch.stack([self._normalised(sorted_, network.comparable) for sorted_, _ in ordered])
            joint = found.mean(0) if self.threshold is None else found.amax(0)  # a threshold holds for each of them
            most = min(groups[0].size - self.min_channels, int(groups[0].size * self.max_ratio + 1e-9))
            order = tuple(indices.tolist() for _, indices in ordered)
            bundles.append(_Bundle(groups, order, joint, max(0, most), self.multiple_of))
        if not any(bundle.most for bundle in bundles):
            locked = "; ".join(f"{g.name}: {g.frozen}" for g in network.groups if g.frozen)[:500]
            raise InputError(f"nothing of {network.model_name} can be pruned with these settings. Locked: {locked}")
        return bundles

    def _selected(self, network: Network) -> dict[str, Group]:
        check_patterns(network, (*self.include, *self.exclude))

        def hit(group: Group, patterns: Sequence[str]) -> bool:
            return any(matches(patterns, member.module) for member in group.members if member.role != "consumes")

        return {
            group.name: group
            for group in network.prunable
            if self.unit in ("any", group.unit)
            and (not self.include or hit(group, self.include))
            and not hit(group, self.exclude)
        }

    def _checked(self, network: Network, group: Group) -> Tensor:
        score = network.scores.get(group.name)
        if not isinstance(score, Tensor) or score.shape != (group.size,):
            found = "none" if score is None else f"shape {tuple(torch.as_tensor(score).shape)}, {type(score).__name__}"
            raise InputError(
                f"group '{group.name}' has {group.size} units but scores of {found}: "
                "the scoring pass must score every unit"
            )
        score = score.detach().to("cpu", torch.float64)
        if not bool(torch.isfinite(score).all()):
            where = ", ".join(f"{m.parameter}" for m in group.members[:3])
            bad = torch.where(~torch.isfinite(score))[0][:5].tolist()
            raise InputError(f"scores of group '{group.name}' are NaN or infinite at units {bad}: look at {where}")
        return score

    def _normalised(self, score: Tensor, comparable: bool) -> Tensor:
        if self.threshold is not None:
            return score
        if self.scope == "layer":
            return torch.arange(1, len(score) + 1, dtype=torch.float64) / len(score)
        how = self.normalize if self.normalize != "auto" else "none" if comparable else "mean"
        size = score.abs()
        scale = {"mean": size.mean(), "max": size.max(), "sum": size.sum(), "none": torch.ones(())}[how]
        return score / scale if scale > 0 else score

    def _events(self, bundles: list[_Bundle]) -> list[tuple[float, int, int]]:
        """Removals in reach: score of the unit, its bundle, and how many of the bundle are then gone."""
        return [
            (float(bundle.scores[k - 1]), index, k)
            for index, bundle in enumerate(bundles)
            for k in range(1, bundle.most + 1)
        ]

    def _after(self, bundles: list[_Bundle], ranked: list[tuple[float, int, int]], n: int) -> list[int]:
        """Units removed from each bundle by the first ``n`` removals."""
        removed = [0] * len(bundles)
        for _, index, k in ranked[:n]:
            removed[index] = k
        return [self._allowed(bundle, k) for bundle, k in zip(bundles, removed, strict=True)]

    def _allowed(self, bundle: _Bundle, removed: int) -> int:
        """The largest number of removals up to ``removed`` that leaves an allowed number of units."""
        size = bundle.groups[0].size
        removed = min(removed, bundle.most)
        while removed > 0 and (size - removed) % bundle.step:
            removed -= 1
        return removed

    def _units(self, bundles: list[_Bundle], ranked: list[tuple[float, int, int]], n: int) -> int:
        return sum(k * len(bundle.groups) for bundle, k in zip(bundles, self._after(bundles, ranked, n), strict=True))


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


def _edit(network: Network, bundles: list[_Bundle], removed: list[int]) -> Edit:
    keep: Mapping[str, tuple[int, ...]] = {
        group.name: tuple(sorted(order[k:]))
        for bundle, k in zip(bundles, removed, strict=True)
        for group, order in zip(bundle.groups, bundle.order, strict=True)
    }
    return Edit(network, keep)
