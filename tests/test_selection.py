"""What PruneChannels chooses: ratios, budgets, limits, patterns, and its errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import netsurgery
from netsurgery.errors import InputError
from netsurgery.passes import MagnitudeScore, PruneChannels, RandomScore


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 24, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(24 * 36, 10),
    )  # fmt: skip


X = torch.zeros(1, 3, 6, 6)


@dataclass(frozen=True)
class Given(netsurgery.Pass):
    """Scores as a test wants them."""

    values: tuple[tuple[str, tuple[float, ...]], ...]
    comparable: bool = False
    gives: ClassVar[frozenset[str]] = frozenset({"scores"})

    def run(self, network: netsurgery.Network) -> netsurgery.Network:
        return network.with_scores({name: torch.tensor(v) for name, v in self.values}, self.comparable)


def counts(*passes: netsurgery.Pass) -> dict[str, int]:
    edit = netsurgery.plan(model(), list(passes), (X,))
    return {group.name: len(edit.keep.get(group.name, range(group.size))) for group in edit.network.prunable}


def test_ratio_per_layer() -> None:
    assert counts(RandomScore(), PruneChannels(0.3)) == {"0": 12, "3": 23, "5": 17}
    assert counts(RandomScore(), PruneChannels(0.0)) == {"0": 16, "3": 32, "5": 24}
    assert counts(RandomScore(), PruneChannels(0.999)) == {"0": 1, "3": 1, "5": 1}


def test_ratio_of_all_units_together() -> None:
    kept = counts(RandomScore(), PruneChannels(0.5, scope="global"))
    assert sum(kept.values()) == 36 and len(set(kept.values())) == 3


def test_lowest_scores_go() -> None:
    scores = (("0", tuple(range(16))), ("3", tuple(range(32, 0, -1))), ("5", tuple([1.0] * 24)))
    edit = netsurgery.plan(model(), [Given(scores), PruneChannels(0.5)], (X,))
    assert edit.keep == {
        "0": tuple(range(8, 16)),
        "3": tuple(range(16)),
        "5": tuple(range(12, 24)),
    }  # ties: the first go


@pytest.mark.parametrize("what", ["params", "macs"])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("budget", [0.1, 0.35, 0.5, 0.9])
def test_budgets_are_met_within_one_unit(what: str, scope: str, budget: float) -> None:
    edit = netsurgery.plan(model(), [RandomScore(), PruneChannels(scope=scope, **{what: budget})], (X,))
    limit = budget * getattr(edit.before, what)
    assert getattr(edit.after, what) <= limit
    one_more = [
        getattr(edit.network.cost({**edit.counts, name: count + 1}), what) for name, count in edit.counts.items()
    ]
    assert max(one_more) > limit
    assert netsurgery.cost(netsurgery.rewrite(model(), edit), (X,)) == edit.after


def test_absolute_budget() -> None:
    edit = netsurgery.plan(model(), [RandomScore(), PruneChannels(params=5000)], (X,))
    assert 4000 < edit.after.params <= 5000


def test_limits() -> None:
    kept = counts(RandomScore(), PruneChannels(0.7, multiple_of=8))
    assert kept == {"0": 8, "3": 16, "5": 8}
    assert counts(RandomScore(), PruneChannels(0.9, min_channels=6)) == {"0": 6, "3": 6, "5": 6}
    assert counts(RandomScore(), PruneChannels(0.9, max_ratio=0.25)) == {"0": 12, "3": 24, "5": 18}
    kept = counts(RandomScore(), PruneChannels(macs=0.4, scope="global", multiple_of=8))
    assert all(n % 8 == 0 for n in kept.values())


def test_patterns() -> None:
    assert counts(RandomScore(), PruneChannels(0.5, exclude=["0"])) == {"0": 16, "3": 16, "5": 12}
    assert counts(RandomScore(), PruneChannels(0.5, include=["[05]"])) == {"0": 8, "3": 32, "5": 12}
    assert counts(RandomScore(), PruneChannels(0.5, include="1")) == {"0": 8, "3": 32, "5": 24}  # the norm carries them
    with pytest.raises(InputError, match="pattern 'stem' matches no module with parameters in Sequential"):
        counts(RandomScore(), PruneChannels(0.5, exclude=["stem"]))
    with pytest.raises(
        InputError, match=r"nothing of Sequential can be pruned.*8: the network output has this dimension"
    ):
        counts(RandomScore(), PruneChannels(0.5, exclude=["*"]))


def test_normalisation_across_groups() -> None:
    scores = (("0", tuple([100.0] * 8 + [300.0] * 8)), ("3", tuple([0.1] * 16 + [0.3] * 16)), ("5", tuple([2.0] * 24)))
    raw = counts(Given(scores), PruneChannels(24 / 72, scope="global", normalize="none"))
    assert raw == {"0": 16, "3": 8, "5": 24}
    even = counts(Given(scores), PruneChannels(24 / 72, scope="global"))
    assert even == {"0": 8, "3": 16, "5": 24}
    assert counts(Given(scores, comparable=True), PruneChannels(24 / 72, scope="global")) == raw


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "takes one of ratio, params, macs and threshold, got none"),
        ({"ratio": 0.5, "macs": 0.5}, "got ratio and macs"),
        ({"ratio": 1.0}, r"ratio=1.0\): the share to remove must be in \[0, 1\)"),
        ({"ratio": -0.1}, r"must be in \[0, 1\)"),
        ({"ratio": float("nan")}, r"must be in \[0, 1\)"),
        ({"params": 1.5}, r"a share to keep in \(0, 1\]"),
        ({"macs": 0}, "positive whole number"),
        ({"ratio": 0.5, "scope": "all"}, "'layer' or 'global'"),
        ({"ratio": 0.5, "normalize": "median"}, "'auto', 'mean', 'max', 'sum' or 'none'"),
        ({"ratio": 0.5, "multiple_of": 0}, "at least 1"),
    ],
)
def test_arguments_are_checked_at_once(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        PruneChannels(**arguments)


def test_scores_are_checked() -> None:
    good = {"3": tuple([1.0] * 32), "5": tuple([1.0] * 24)}
    for bad, message in (
        (
            (1.0, float("nan")) * 8,
            r"scores of group '0' are NaN or infinite at units \[1, 3, 5, 7, 9\]: look at 0.weight",
        ),
        ((1.0,) * 15, r"has 16 units but scores of shape \(15,\), Tensor"),
        (None, r"group '0' has no scores, which other groups have: let the scoring pass score it too \(its include,"),
    ):
        scores = {**good, **({"0": bad} if bad else {})}
        with pytest.raises(InputError, match=message):
            counts(Given(tuple(scores.items())), PruneChannels(0.5))


def test_a_budget_that_cannot_be_met() -> None:
    with pytest.raises(InputError, match=r"params=0.2\): Sequential keeps at least [\d,]+ of [\d,]+ params"):
        counts(RandomScore(), PruneChannels(params=0.2, max_ratio=0.1))


class Halves(nn.Module):
    """The code splits into equal parts by chunk: they must keep equally many units, not the same ones."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(4, 12), nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x).chunk(2, dim=1)
        return self.d(self.b(right) + self.c(left))


def test_tied_groups_keep_equally_many_units() -> None:
    network = netsurgery.trace(Halves(), torch.randn(1, 4))
    assert network.equal_sizes == (("a", "a:2"),)
    for scope in ("layer", "global"):
        edit = netsurgery.plan(Halves(), [RandomScore(3), PruneChannels(0.4, scope=scope)], torch.randn(1, 4))
        assert len(edit.keep["a"]) == len(edit.keep["a:2"]) and edit.keep["a"] != edit.keep["a:2"]
        small = Halves()
        assert netsurgery.verify(small, netsurgery.rewrite(small, edit), edit) < 1e-6
    with pytest.raises(InputError, match="splits into equal parts must keep equally many units"):
        netsurgery.Edit(network, {"a": (0, 1)})


def test_magnitude_prefers_small_filters() -> None:
    net = model()
    with torch.no_grad():
        net[0].weight[4:12] *= 1e-3
    edit = netsurgery.plan(net, [MagnitudeScore(), PruneChannels(0.5)], (X,))
    assert edit.keep["0"] == (0, 1, 2, 3, 12, 13, 14, 15)


def test_a_threshold_takes_scores_as_they_are() -> None:
    scores = (("0", tuple(range(16))), ("3", tuple([5.0] * 31 + [-1.0])), ("5", tuple([9.0] * 24)))
    assert counts(Given(scores), PruneChannels(threshold=4.0)) == {"0": 11, "3": 31, "5": 24}
    assert counts(Given(scores), PruneChannels(threshold=5.0, multiple_of=4)) == {"0": 12, "3": 4, "5": 24}
    assert counts(Given(scores), PruneChannels(threshold=-2.0)) == {"0": 16, "3": 32, "5": 24}


def test_a_threshold_holds_for_each_of_the_parts_of_a_split() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.one, self.other = nn.Linear(3, 8), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            one, other = self.both(x).relu().chunk(2, 1)
            return self.one(one) + self.other(other)

    scores = (("both", (-1.0, -0.5, 0.0, 0.1)), ("both:2", (0.4, 0.03, 0.2, 0.3)))
    edit = netsurgery.plan(Split(), [Given(scores), PruneChannels(threshold=0.05)], torch.zeros(1, 3))
    assert edit.counts == {"both": 3, "both:2": 3}


def test_groups_of_which_most_scores_are_negative_are_normalised_too() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    scores = (("0", (-0.03, -0.03, 0.02, 0.03)), ("2", (0.001, 0.002, 0.01, 0.02)))
    edit = netsurgery.plan(net, [Given(scores), PruneChannels(0.5, scope="global")], torch.zeros(1, 4))
    assert edit.counts == {"0": 2, "2": 2}
