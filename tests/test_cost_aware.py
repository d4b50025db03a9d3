"""Budgets of all layers together: units go by their score for what they cost, and what is nearly emptied is said."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import netsurgery
from netsurgery.errors import InputError
from netsurgery.passes import MagnitudeScore, PruneChannels, RandomScore

IMAGE = torch.zeros(1, 3, 12, 12)


@dataclass(frozen=True)
class Scores(netsurgery.Pass):
    """Scores of some groups as a test wants them; those of the others are random in [0.5, 1.5)."""

    given: dict[str, Any] = field(default_factory=dict)
    comparable: bool = True
    gives: ClassVar[frozenset[str]] = frozenset({"scores"})

    def run(self, network: netsurgery.Network) -> netsurgery.Network:
        drawn = RandomScore().run(network).scores
        scores = {name: torch.as_tensor(self.given.get(name, one + 0.5)) for name, one in drawn.items()}
        return network.with_scores(scores, self.comparable)


def net(*widths: int, stride: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for before, after in pairwise((3, *widths)):
        parts += [nn.Conv2d(before, after, 3, padding=1, stride=stride), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 4))


def kept(model: nn.Module, *passes: netsurgery.Pass, x: Any = IMAGE) -> dict[str, int]:
    edit = netsurgery.plan(model, list(passes), x)
    return {group.name: edit.counts.get(group.name, group.size) for group in edit.network.prunable}


# Score for cost ------------------------------------------------------------------------------------------------------


def best(network: netsurgery.Network, what: str, limit: int) -> dict[str, int]:
    """What a loop over single removals chooses: the unit that is worth least for what it costs in the whole network."""
    price = {
        g.name: getattr(network.cost(), what) - getattr(network.cost({g.name: g.size - 1}), what)
        for g in network.prunable
    }
    left = {g.name: sorted(network.scores[g.name].tolist()) for g in network.prunable}
    sizes = {name: len(units) for name, units in left.items()}
    while getattr(network.cost({name: len(units) for name, units in left.items()}), what) > limit:
        open_ = [name for name, units in left.items() if len(units) > sizes[name] - int(0.9 * sizes[name] + 1e-9)]
        name = min(open_, key=lambda name: left[name][0] / price[name])
        left[name].pop(0)
    return {name: len(units) for name, units in left.items()}


@pytest.mark.parametrize("what", ["macs", "params"])
@pytest.mark.parametrize("share", [0.8, 0.5, 0.2])
def test_the_unit_that_is_worth_least_for_its_cost_goes_next(what: str, share: float) -> None:
    model = net(16, 32, 64)
    network = Scores().run(netsurgery.trace(model, IMAGE))
    limit = int(share * getattr(network.cost(), what))
    assert kept(model, Scores(), PruneChannels(scope="global", **{what: limit})) == best(network, what, limit)


def test_per_unit_is_the_score_alone() -> None:
    cheap = {"6": torch.linspace(0.4, 0.49, 64)}  # the last layer has the lowest scores, and saves least
    alone = kept(net(16, 32, 64), Scores(cheap), PruneChannels(macs=0.8, scope="global", per="unit"))
    assert alone == {"0": 16, "3": 32, "6": 41}
    assert kept(net(16, 32, 64), Scores(cheap), PruneChannels(macs=0.8, scope="global")) == {"0": 13, "3": 27, "6": 64}


@pytest.mark.parametrize("what", ["macs", "params"])
@pytest.mark.parametrize("share", [0.75, 0.5])
def test_ranks_are_not_divided_by_costs(what: str, share: float) -> None:
    """LAMP's scores are shares of what is left of a layer, made to be ranked, in later rounds too."""
    model = net(16, 32, 64)
    lamp, budget = MagnitudeScore(lamp=True), {what: share}
    auto, unit, cost = (
        kept(model, lamp, PruneChannels(scope="global", per=per, **budget))  # type: ignore[arg-type]
        for per in ("auto", "unit", "cost")
    )
    assert auto == unit != cost
    rounds = [PruneChannels(0.1), PruneChannels(scope="global", **budget)]  # type: ignore[arg-type]
    by_unit = [rounds[0], PruneChannels(scope="global", per="unit", **budget)]  # type: ignore[arg-type]
    assert kept(model, lamp, *rounds) == kept(model, lamp, *by_unit)


def test_the_cost_is_that_of_the_budget() -> None:
    model = net(8, 32, stride=3)
    even = {"0": torch.linspace(0.1, 0.2, 8), "3": torch.linspace(0.1, 0.2, 32)}
    price = {"macs": {"0": 4 * 4 * 27 + 2 * 2 * 9 * 32, "3": 2 * 2 * 72 + 4}, "params": {"0": 30 + 288, "3": 75 + 4}}
    network = netsurgery.trace(model, IMAGE)
    for what, prices in price.items():
        whole = getattr(network.cost(), what)
        for name, one in prices.items():
            assert whole - getattr(network.cost({name: network[name].size - 1}), what) == one
        counts = kept(model, Scores(even), PruneChannels(scope="global", **{what: 0.7}))
        ratios = sorted((score / prices[n], n) for n, scores in even.items() for score in scores.tolist())
        gone = 40 - sum(counts.values())
        assert {n: even[n].numel() - sum(m == n for _, m in ratios[:gone]) for n in even} == counts


def test_scores_that_are_negative_go_first_and_most_for_their_cost() -> None:
    # Units of "0" cost more than those of "3": at equal negative scores the cheap ones go first, at positive ones last.
    model = net(8, 32)
    scores = {"0": [-1.0] * 4 + [1.0] * 4, "3": [-1.0] * 16 + [1.0] * 16}
    seen = [
        kept(model, Scores(scores), PruneChannels(macs=m, scope="global")) for m in (0.9, 0.7, 0.5, 0.35, 0.3, 0.25)
    ]
    assert seen[0]["0"] == 8 and 16 <= seen[0]["3"] < 32
    for one in seen:
        assert one["0"] == 8 or one["3"] <= 16
        assert one["3"] >= 16 or one["0"] == 1  # one stays
    assert sorted(map(tuple, (one.values() for one in seen)), reverse=True) == [tuple(one.values()) for one in seen]


def test_what_saves_nothing_stays() -> None:
    class Looked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.shift, self.read = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.read(self.shift(self.table(x)).relu())

    class Scaled(nn.Module):  # the scale costs parameters, and no multiply-accumulates of a product
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.scale = nn.Linear(6, 8), nn.Linear(8, 3), nn.Parameter(torch.ones(5, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu()) + (self.scale * self.scale).mean()

    ids = torch.zeros(2, 4, dtype=torch.int64)
    assert kept(Looked(), Scores(), PruneChannels(macs=0.5, scope="global"), x=ids)
    network = netsurgery.trace(Scaled(), torch.zeros(2, 6))
    free = [g.name for g in network.prunable if network.cost({g.name: g.size - 1}).macs == network.cost().macs]
    scores = {name: torch.full((network[name].size,), -1.0) for name in free}
    counts = kept(Scaled(), Scores(scores), PruneChannels(macs=0.5, scope="global"), x=torch.zeros(2, 6))
    assert all(counts[name] == network[name].size for name in free) and counts["a"] < 8


def test_steps_ties_and_rounds() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.one, self.other = nn.Linear(12, 32), nn.Linear(16, 24), nn.Linear(16, 24)
            self.head = nn.Linear(24, 3)

        def forward(self, x: Tensor) -> Tensor:
            one, other = self.both(x).relu().chunk(2, 1)
            return self.head((self.one(one) + self.other(other)).relu())

    x = torch.zeros(1, 12)
    counts = kept(Split(), Scores(), PruneChannels(params=0.6, scope="global"), x=x)
    assert counts["both"] == counts["both:2"] < 16
    assert all(
        n % 8 == 0
        for n in kept(Split(), Scores(), PruneChannels(params=0.6, scope="global", multiple_of=8), x=x).values()
    )
    model = net(16, 32)
    first = netsurgery.plan(model, [Scores(), PruneChannels(macs=0.8, scope="global")], IMAGE)
    small = netsurgery.rewrite(model, first)
    second = netsurgery.plan(small, [Scores(), PruneChannels(macs=0.5, scope="global", of=first)], IMAGE)
    assert 0.42 * first.before.macs < second.after.macs <= 0.5 * first.before.macs
    both = first.then(second)
    assert netsurgery.verify(model.eval(), netsurgery.rewrite(small, second).eval(), both, IMAGE + 1) < 1e-5


def test_tied_groups_are_weighed_together() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.one, self.other = nn.Linear(6, 16), nn.Linear(8, 12), nn.Linear(8, 16)
            self.head = nn.Linear(12, 16)

        def forward(self, x: Tensor) -> Tensor:
            one, other = self.both(x).relu().chunk(2, 1)
            return self.head(self.one(one).relu()) + self.other(other)

    # Units of the tied pair cost 6 + 1 + 12 and 6 + 1 + 16 parameters, 21 at the mean; one of "one" 8 + 1 + 16 = 25.
    def left(pair: float, limit: int) -> dict[str, int]:
        scores = {"both": [pair] * 8, "both:2": [pair] * 8, "one": [1.0] * 12}
        return kept(Tied(), Scores(scores), PruneChannels(params=limit, scope="global"), x=torch.zeros(1, 6))

    whole = netsurgery.cost(Tied(), torch.zeros(1, 6)).params
    assert left(0.85, whole - 25) == {"both": 8, "both:2": 8, "one": 11}
    assert left(0.83, whole - 42) == {"both": 7, "both:2": 7, "one": 12}


def test_scores_of_groups_that_cannot_be_compared() -> None:
    model, given = net(16, 32, 64), {"0": torch.linspace(100, 300, 16)}
    alone = kept(model, Scores(given, comparable=False), PruneChannels(macs=0.5, scope="global"))
    assert alone == kept(model, Scores(given, comparable=False), PruneChannels(macs=0.5, scope="global", per="unit"))
    shares = kept(model, Scores(given, comparable=False), PruneChannels(macs=0.5, scope="global", per="cost"))
    assert shares != alone
    for scale in (1e-3, 10):
        other = {"0": given["0"] * scale}
        assert (
            kept(model, Scores(other, comparable=False), PruneChannels(macs=0.5, scope="global", per="cost")) == shares
        )
    assert shares == kept(
        model, Scores(given, comparable=True), PruneChannels(macs=0.5, scope="global", per="cost", normalize="sum")
    )


def test_where_cost_has_no_meaning() -> None:
    for settings in (
        {"ratio": 0.5, "scope": "global"},
        {"macs": 0.5},
        {"threshold": 0.1},
        {"params": 0.5, "scope": "layer"},
    ):
        with pytest.raises(
            InputError, match=r"per='cost'\) ranks all units for what they cost: it goes with params= or"
        ):
            PruneChannels(per="cost", **settings)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"per='mac'\): 'auto', 'unit' or 'cost'"):
        PruneChannels(0.5, per="mac")  # type: ignore[arg-type]
    assert repr(PruneChannels(macs=0.5, scope="global", per="unit")).endswith("scope='global', per='unit')")


# What is nearly emptied ----------------------------------------------------------------------------------------------

LOW = {"3": torch.linspace(1e-6, 2e-6, 40)}


def test_what_is_nearly_emptied_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = net(16, 40, 16)
    with caplog.at_level(logging.INFO, "netsurgery"):
        for settings in ({"macs": 0.2}, {"params": 0.1}, {"macs": 0.2, "per": "unit"}):
            edit = netsurgery.plan(model, [Scores(LOW), PruneChannels(scope="global", **settings)], IMAGE)
            first, *rest = edit.summary().splitlines()
            assert "; few units stay: 3: 4 of 40 (max_ratio=0.9)" in first
            assert "  3: few units stay, 4 of 40 (max_ratio=0.9)" in rest
        netsurgery.apply(model, [Scores(LOW), PruneChannels(macs=0.2, scope="global")], IMAGE)
        netsurgery.apply(model, [Scores(), PruneChannels(macs=0.7, scope="global")], IMAGE)
    assert [(r.levelname, "few units stay" in r.getMessage()) for r in caplog.records] == [
        ("WARNING", True),
        ("INFO", False),
    ]


def test_a_limit_that_holds_units_back_is_named() -> None:
    def few(**settings: Any) -> dict[str, str]:
        edit = netsurgery.plan(net(16, 40, 16), [Scores(LOW), PruneChannels(scope="global", **settings)], IMAGE)
        return dict(edit.outcomes[0].few)

    assert few(macs=0.6, max_ratio=0.5) == {"3": "20 of 40 (max_ratio=0.5)"}
    assert few(macs=0.2, max_ratio=1.0)["3"] == "1 of 40 (max_ratio=1)"
    assert few(params=0.5, min_channels=12) == {}  # said by the user, in numbers
    assert few(ratio=0.4) == {}  # 28.8 of 72 units: 36 could go, and 28 do
    assert few(ratio=0.55) == {"3": "4 of 40 (max_ratio=0.9)"}
    assert few(params=0.2, multiple_of=8) == {}  # 8 of 40, as the next step is none
    assert few(macs=0.25, max_ratio=1.0) == {"3": "3 of 40"}


def test_rounds_count_from_the_original() -> None:
    model = net(16, 40, 16)
    first = netsurgery.plan(model, [Scores(LOW), PruneChannels(macs=0.75, scope="global")], IMAGE)
    small = netsurgery.rewrite(model, first)
    left = {"3": torch.linspace(1e-6, 2e-6, first.counts["3"])}
    second = netsurgery.plan(small, [Scores(left), PruneChannels(macs=0.2, scope="global", of=first)], IMAGE)
    assert second.outcomes[0].few["3"] == "4 of 40 (max_ratio=0.9)"


def test_nothing_is_said_of_equal_shares_and_of_small_cuts() -> None:
    model = net(16, 40, 16)
    for removal in (PruneChannels(0.95), PruneChannels(macs=0.05), PruneChannels(macs=0.9, scope="global")):
        edit = netsurgery.plan(model, [Scores(), removal], IMAGE)
        assert not edit.outcomes[0].few and "few" not in edit.summary()
