"""Remove units of the lowest scores: by ratio, or until a budget of parameters or MACs is met."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, ClassVar, Literal

from netsurgery.analysis.network import Network
from netsurgery.arguments import is_count, is_real, require_counts
from netsurgery.edit import Edit
from netsurgery.errors import InputError
from netsurgery.passes.bundles import Bundle, Choice, RemovalSettings, call_of
from netsurgery.passes.compensation import Compensate, Method, check_ridge
from netsurgery.passes.patterns import Modules, as_patterns
from netsurgery.passes.selection import sorts_of

__all__ = ["PruneChannels"]

Event = tuple[float, int, int]  # score of the unit, its bundle, and how many of the bundle are then gone


@dataclass(frozen=True, repr=False)
class PruneChannels(RemovalSettings):
    """Remove the units with the lowest scores.

    Args:
        ratio: share of the units to remove, in [0, 1): of every group (scope "layer") or of all together ("global").
            Or shares by modules, as for ``include``: ``{"layer3.*": 0.7, "layer4.*": 0.3}``; the first that a group
            belongs to holds, other groups stay whole.
        params: instead of a ratio, the parameters to keep: a float is a share, an int a number.
        macs: instead of a ratio, the multiply-accumulates to keep: likewise.
        threshold: instead of a ratio, remove the units with scores, as they are, of at most this.
        scope: "layer" removes the same share from each group; "global" ranks all units together.
        per: what the ranking of all units goes by: the score of a "unit", or its score for its "cost": divided by the
            parameters (``params=``) or multiply-accumulates (``macs=``) that go with one unit of its group from the
            network as it is, so that what matters least for what it saves goes first. "auto" is "cost" where the budget
            is one of all layers and scores are comparable amounts; LAMP's, which only rank, go by the "unit".
        of: the original that ratio, budget and limits are shares of, where this is one of several rounds: the Edit that
            began with it (``first``, or ``first.then(second)``), or its Network. The next round removes units that
            rounding has left in one. By default the network as it is.
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
        exclude: likewise; no unit goes that a matching module produces or carries. Modules inside one that matches,
            match too.
        protect: likewise; nor does a unit that a matching module consumes or is given.
        normalize: how scores of different groups are made comparable when the scope is global: divided by the "mean",
            "max" or "sum" of their sizes in the group, or "none"; "auto" is "none" for scores that are comparable as
            they are (rises of the loss, Taylor, Fisher, LAMP), else "sum" where they are ranked for their cost (a share
            of the group's importance for a share of its cost), else "mean".
        compensate: make up for what the removal loses in the layers that read it: "bias" by a constant for each output;
            "least-squares" also refits their weights so that the outputs stay as near as they can. A change that does
            not help on samples that are held back is not made. This is the pass ``Compensate``, run right after the
            removal.
        data: as for ``Compensate``.
        samples: likewise.
        ridge: likewise.
        memory: likewise.

    Budgets are met within one unit of the last group touched (one ``multiple_of`` step), priced from the expressions.
    ``edit.summary()`` says what was asked and what was removed, and which groups lost less or are locked, and why.

    Source: Liu et al., "Group Fisher Pruning", arXiv 2108.00708, divide the importance of coupled channels by the
    memory that they free; Shen et al., "Structural Pruning via Latency-Saliency Knapsack", arXiv 2210.06659, choose by
    saliency for latency. Prices of the whole network, for units whose prices depend on each other, are our choice:
    prices half-way to the target chose no better networks.

    Raises:
        InputError: a number out of range, data that can be read once, both or neither of ratio and budget, a pattern
            that matches no module, scores that are not finite, nothing that can be pruned, a budget that cannot be met,
            or another original.

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
    per: Literal["auto", "unit", "cost"] = "auto"
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
    data: object = field(default=None, repr=False, compare=False)
    samples: int = 512
    ridge: float = 1e-2
    memory: int = 1 << 30

    needs: ClassVar[frozenset[str]] = frozenset({"scores"})
    gives: ClassVar[frozenset[str]] = frozenset({"edit"})

    def __repr__(self) -> str:
        return call_of(self)

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("ratio", "params", "macs", "threshold") if getattr(self, name) is not None]
        if len(given) != 1:
            raise InputError(
                f"PruneChannels takes one of ratio, params, macs and threshold, got {' and '.join(given) or 'none'}"
            )
        self._check_ratio()
        for name in ("params", "macs", "threshold"):
            value = getattr(self, name)
            if value is not None and not is_real(value):
                raise InputError(f"PruneChannels({name}={value!r}): expected a number")
        for name in ("params", "macs"):
            value = getattr(self, name)
            if value is not None and not (value > 0 if is_count(value) else 0 < value <= 1):
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
            if not is_real(share):
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
        if self.per not in ("auto", "unit", "cost"):
            raise InputError(f"PruneChannels(per={self.per!r}): 'auto', 'unit' or 'cost'")
        if self.per == "cost" and (self.scope != "global" or self.params is self.macs is None):
            raise InputError(
                "PruneChannels(per='cost') ranks all units for what they cost: it goes with params= or macs=, and with "
                "scope='global'"
            )
        sorts_of("PruneChannels", self.unit)
        if self.normalize not in ("auto", "mean", "max", "sum", "none"):
            raise InputError(f"PruneChannels(normalize='{self.normalize}'): 'auto', 'mean', 'max', 'sum' or 'none'")
        most = 0.0 if self.max_ratio is None else self.max_ratio
        require_counts(self, "multiple_of", "min_channels")
        if not is_real(most) or not 0 <= most <= 1:
            raise InputError(f"PruneChannels(max_ratio={most!r}): a share in [0, 1]")
        if not isinstance(self.of, Edit | Network | None):
            raise InputError(
                f"PruneChannels(of={type(self.of).__name__}): the Edit that began with the original, or its Network"
            )

    def _check_compensation(self) -> None:
        if self.compensate not in (None, "bias", "least-squares"):
            raise InputError(f"PruneChannels(compensate='{self.compensate}'): 'bias', 'least-squares' or None")
        if self.compensate is not None and self.data is None:
            raise InputError(f"PruneChannels(compensate='{self.compensate}') needs data=..., which it is measured on")
        check_ridge("PruneChannels", self.ridge)

    def run(self, network: Network) -> Edit:
        """Choose the units that stay, and compensate for the others if that is asked for."""
        choice = Choice(self, network)
        edit = choice.edit(self._removed(choice))
        if self.compensate is None:
            return edit
        return Compensate(self.compensate, self.data, self.samples, self.ridge, self.memory).run(edit)

    def _removed(self, choice: Choice) -> list[int]:
        """The number of units to remove from each bundle."""
        bundles = choice.bundles
        if self.threshold is not None:
            return [bundle.allowed(int((bundle.scores <= self.threshold).sum())) for bundle in bundles]
        if self.ratio is not None and self.scope == "layer":
            return [bundle.allowed(bundle.due(bundle.ratio or 0)) for bundle in bundles]
        if is_real(self.ratio):
            ranked, wanted = _ranked(bundles, [1.0] * len(bundles)), choice.wanted(float(self.ratio))
            return _after(bundles, ranked, _first(ranked, lambda n: _units(bundles, ranked, n) >= wanted))
        return self._within_budget(choice)

    def _within_budget(self, choice: Choice) -> list[int]:
        bundles, network = choice.bundles, choice.network
        what = "params" if self.params is not None else "macs"
        ranked = _ranked(bundles, _prices(choice, what) if self.by_cost(network) else [1.0] * len(bundles))
        whole = getattr(choice.original.cost(), what)
        limit = getattr(self, what)
        limit = limit if is_count(limit) else limit * whole

        def price(n: int) -> int:
            return int(getattr(network.cost(_counts(bundles, _after(bundles, ranked, n))), what))

        if price(len(ranked)) > limit:
            raise InputError(
                f"PruneChannels({what}={getattr(self, what)}): {network.model_name} keeps at least "
                f"{price(len(ranked)):,} of {whole:,} {what} with these settings: "
                "raise the budget or loosen exclude, min_channels and max_ratio (by default a tenth of a layer stays)"
            )
        return _after(bundles, ranked, _first(ranked, lambda n: price(n) <= limit))


def _ranked(bundles: list[Bundle], prices: list[float]) -> list[Event]:
    """The removals in reach, by score relative to what they save; those that save nothing come last."""
    return sorted(
        (float(bundle.scores[k - 1]) / price if price else inf, index, k)
        for index, (bundle, price) in enumerate(zip(bundles, prices, strict=True))
        for k in range(1, bundle.most + 1)
    )


def _prices(choice: Choice, what: str) -> list[float]:
    """For each bundle the cost that goes, per unit, when each of its groups loses one unit."""
    network = choice.network
    whole = getattr(network.cost(), what)
    fewer = [{group.name: group.size - 1 for group in bundle.groups} for bundle in choice.bundles]
    return [(whole - getattr(network.cost(counts), what)) / len(counts) for counts in fewer]


def _after(bundles: list[Bundle], ranked: list[Event], n: int) -> list[int]:
    """The number of units that the first ``n`` removals take from each bundle."""
    removed = [0] * len(bundles)
    for _, index, k in ranked[:n]:
        removed[index] = k
    return [bundle.allowed(k) for bundle, k in zip(bundles, removed, strict=True)]


def _units(bundles: list[Bundle], ranked: list[Event], n: int) -> int:
    return sum(k * len(bundle.groups) for bundle, k in zip(bundles, _after(bundles, ranked, n), strict=True))


def _first(ranked: Sequence[object], enough: Callable[[int], bool]) -> int:
    """The smallest number of removals that is enough (all of them if none is)."""
    low, high = 0, len(ranked)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low


def _counts(bundles: list[Bundle], removed: list[int]) -> dict[str, int]:
    return {g.name: g.size - k for bundle, k in zip(bundles, removed, strict=True) for g in bundle.groups}
