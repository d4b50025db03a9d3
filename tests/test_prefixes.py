"""Removals one after the other: the tolerance is the network's, and what is said of the loss is what comes out."""

import logging
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import netsurgery
from netsurgery.errors import InputError, RewriteError
from netsurgery.passes import LossIncreaseScore, MagnitudeScore, PruneChannels
from netsurgery.passes.ablation import Ablation
from test_loss_increase import (
    NETWORKS,
    Deciding,
    Normed,
    WritesIntoViews,
    by_surgery,
    checkpoints,
    data_for,
    loss_of,
    randomised,
)


class Halves(nn.Module):
    """What one layer makes is split into equal parts, twice: both parts lose equally many units."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 12, 3), nn.Conv2d(6, 10, 1), nn.Conv2d(5, 7, 1)
        self.bn, self.head = nn.BatchNorm2d(12), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        left, right = F.relu(self.bn(self.a(x))).chunk(2, 1)
        one, other = self.b(left + right.mean((2, 3), keepdim=True)).chunk(2, 1)
        return self.head(self.c(F.gelu(one) * torch.sigmoid(other)).mean((2, 3)))


class Apart(nn.Module):
    """Parts of equal size that are read apart."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 12, 3), nn.Conv2d(6, 8, 1), nn.Conv2d(6, 8, 1)
        self.bn, self.head = nn.BatchNorm2d(12), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        left, right = F.relu(self.bn(self.a(x))).chunk(2, 1)
        return self.head((self.b(left) + self.c(right)).relu().mean((2, 3)))


class Standardised(nn.Module):
    """Weights that are worked out over all inputs, of which some go; a norm without parameters after them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 7), nn.Linear(7, 6), nn.Linear(6, 5)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x.mean((2, 3))))
        weight = self.b.weight / self.b.weight.norm(dim=0, keepdim=True)
        x = F.layer_norm(F.linear(x, weight, self.b.bias), (6,))
        return self.head(torch.relu(self.c(torch.tanh(x) + x.softmax(1))))


ALL: dict[str, Callable[[], nn.Module]] = {
    **NETWORKS,
    **{
        one.__name__.lower(): lambda one=one: randomised(one())  # type: ignore[misc]
        for one in (Normed, Halves, Apart, Standardised)
    },
}
CUT: dict[str, Callable[[], nn.Module]] = {
    one.__name__.lower(): lambda one=one: randomised(one())  # type: ignore[misc]
    for one in (Deciding, WritesIntoViews)
}


def rise(model: nn.Module, edit: netsurgery.Edit, data: tuple[Tensor, Tensor]) -> float:
    """By how much the loss of the network is higher once an edit is carried out."""
    return loss_of(netsurgery.rewrite(model, edit), *data) - loss_of(model, *data)


def said(caplog: pytest.LogCaptureFixture) -> float:
    """The rise of the loss that the log speaks of last."""
    lines = [
        re.search(r"without \d+ units of \d+ groups the loss rises by (\S+) on", r.message) for r in caplog.records
    ]
    return float([line for line in lines if line is not None][-1][1])


def planned(model: nn.Module, data: Any, tolerance: float, removal: Any = None, **settings: Any) -> netsurgery.Edit:
    score = LossIncreaseScore(data, mode="cumulative", tolerance=tolerance, removal=removal, samples=24, **settings)
    return netsurgery.plan(model, [score, removal or PruneChannels(threshold=tolerance)], data[0][:3])


@pytest.mark.parametrize(("tolerance", "rows"), [(0.0, None), (0.1, 5), (0.1, 24), (1.0, None)])
@pytest.mark.parametrize("name", ALL)
def test_the_tolerance_is_that_of_the_network(
    name: str, tolerance: float, rows: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "netsurgery")
    model = ALL[name]()
    data = data_for(model)
    edit = planned(model, data, tolerance, rows=rows)
    found = rise(model, edit, data)
    assert found <= tolerance + 1e-9
    assert said(caplog) == pytest.approx(found, rel=1e-3, abs=1e-9)
    assert edit.keep or tolerance < 0.1


@pytest.mark.parametrize("mode", ["cumulative", "per-group"])
def test_a_threshold_above_the_tolerance_takes_no_more(mode: Any) -> None:
    model = ALL["halves"]()
    data = data_for(model)
    score = LossIncreaseScore(data, mode=mode, tolerance=0.1, samples=24)
    edits = [netsurgery.plan(model, [score, PruneChannels(threshold=t)], data[0][:3]) for t in (0.1, 0.5, 50.0)]
    assert edits[0].keep and edits[0].keep == edits[1].keep == edits[2].keep


@pytest.mark.parametrize("name", CUT)
def test_networks_that_cannot_be_run_in_parts(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "netsurgery")
    model = CUT[name]()
    data = data_for(model)
    edit = planned(model, data, 0.2)
    found = rise(model, edit, data)
    assert edit.keep and found <= 0.2 and found == pytest.approx(said(caplog), rel=1e-3)


def one_by_one(
    model: nn.Module, network: netsurgery.Network, data: tuple[Tensor, Tensor], tolerance: float
) -> dict[str, int]:
    """Units that each group loses, by a loop that cuts every candidate out of the original, beside what is gone."""
    norms = MagnitudeScore().run(network).scores
    orders = {group.name: norms[group.name].argsort(stable=True).tolist() for group in network.prunable}
    counts = dict.fromkeys(orders, 0)
    sizes, levels = 0, []
    for _ in range(2):
        for name, order in orders.items():
            sizes += len(order)
            levels.append((name, tolerance * sizes / (2 * sum(map(len, orders.values())))))
    for name, level in [*levels, *((name, tolerance) for name in orders)]:
        while counts[name] < int(0.9 * len(orders[name]) + 1e-9):
            tried = {**counts, name: counts[name] + 1}
            keep = {other: tuple(sorted(order[tried[other] :])) for other, order in orders.items()}
            if rise(model, netsurgery.Edit(network, keep), data) > level:
                break
            counts = tried
    return {name: len(orders[name]) - count for name, count in counts.items() if count}


@pytest.mark.parametrize("tolerance", [0.05, 0.3])
@pytest.mark.parametrize("name", ["residual", "concatenated", "flattened", "normed", "standardised"])
def test_what_goes_is_what_a_loop_of_removals_finds(name: str, tolerance: float) -> None:
    model = ALL[name]()
    data = data_for(model)
    edit = planned(model, data, tolerance)
    assert edit.counts == one_by_one(model, edit.network, data, tolerance)


LIMITS: dict[str, tuple[str, dict[str, Any]]] = {
    "a multiple": ("residual", {"multiple_of": 2}),
    "a multiple of a product": ("attention", {"multiple_of": 4}),
    "some modules": ("residual", {"include": ["a"]}),
    "all but some": ("concatenated", {"exclude": ["c"]}),
    "half at most": ("depthwise", {"max_ratio": 0.5}),
    "three at least": ("concatenated", {"min_channels": 3}),
    "heads": ("attention", {"unit": "head", "threshold": 3.0}),
    "groups": ("depthwise", {"unit": ("group", "channel")}),
    "all of a layer": ("residual", {"max_ratio": 1.0}),
    "a lower threshold": ("residual", {"threshold": 0.02}),
}


@pytest.mark.parametrize("name", LIMITS)
def test_a_removal_with_limits(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """What is tried is what it takes."""
    caplog.set_level(logging.INFO, "netsurgery")
    network, limits = LIMITS[name]
    model = ALL[network]()
    data = data_for(model)
    tolerance = max(0.4, limits.get("threshold", 0.4))
    edit = planned(model, data, tolerance, PruneChannels(**{"threshold": 0.4, **limits}))
    found = rise(model, edit, data)
    assert found <= limits.get("threshold", 0.4)
    if limits.get("threshold", 0.4) == tolerance:
        assert edit.keep and found == pytest.approx(said(caplog), rel=1e-3)


def test_a_removal_that_the_tolerance_does_not_hold_for() -> None:
    for removal in (PruneChannels(0.5), PruneChannels(threshold=0.2)):
        with pytest.raises(
            InputError, match=r"the removal needs a threshold of at most the tolerance, PruneChannels\(t"
        ):
            LossIncreaseScore(None, mode="cumulative", tolerance=0.1, removal=removal)


class Noisy(nn.Module):
    """Draws random numbers in eval mode, too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 8), nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x.mean((2, 3))))
        return self.head(torch.relu(self.b(F.dropout(x, 0.5))))


def test_random_numbers_are_the_same_on_the_way() -> None:
    model = randomised(Noisy())
    data = data_for(model)
    network = netsurgery.trace(model, data[0][:3])
    found = [LossIncreaseScore(data, mode="cumulative", tolerance=0.2).run(network).scores for _ in range(2)]
    assert all(torch.equal(score, found[1][name]) for name, score in found[0].items())
    assert any(bool((score <= 0.2).any()) for score in found[0].values())


def trained() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Three layers that each hold what the next needs, twice over."""
    torch.manual_seed(0)
    x, y = torch.randn(400, 8), torch.randint(4, (400,))
    x[torch.arange(400), y] += 3
    model = nn.Sequential(*(m for n in (8, 16, 16, 16) for m in (nn.Linear(n, 16), nn.ReLU())), nn.Linear(16, 4))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), (x, y)


def test_a_tolerance_of_each_group_is_not_that_of_the_network() -> None:
    model, data = trained()
    loss_deltas, scores = {}, {}
    for mode in ("per-group", "cumulative"):
        score: Any = LossIncreaseScore(data, mode=mode, tolerance=0.05, samples=400)  # type: ignore[arg-type]
        edit = netsurgery.plan(model, [score, PruneChannels(threshold=0.05)], data[0][:3])
        loss_deltas[mode], scores[mode] = rise(model, edit, data), edit.network.scores
        assert edit.counts
    assert loss_deltas["cumulative"] <= 0.05 < loss_deltas["per-group"]


def test_of_each_group_alone_the_scores_are_the_rises_of_prefixes() -> None:
    model = NETWORKS["residual"]()
    data = data_for(model)
    network = netsurgery.trace(model, data[0][:3])
    base = loss_of(model, *data)
    tolerance = 0.05
    scores = LossIncreaseScore(data, samples=24, mode="per-group", tolerance=tolerance).run(network).scores
    norms = MagnitudeScore().run(network).scores
    for group in network.prunable:
        order = norms[group.name].argsort(stable=True).tolist()
        highest, longest = -math.inf, 0
        for length in range(1, group.size):
            highest = max(highest, by_surgery(model, network, group.name, set(order[:length]), *data) - base)
            if highest > tolerance:
                break
            assert float(scores[group.name][order[length - 1]]) == pytest.approx(highest, rel=1e-6)
            longest = length
        assert int((scores[group.name] <= tolerance).sum()) == longest
        assert scores[group.name].argsort(stable=True).tolist()[longest:] == order[longest:]
    edit = PruneChannels(threshold=tolerance).run(network.with_scores(scores))
    assert edit.counts == {
        g.name: g.size - k for g in network.prunable if (k := int((scores[g.name] <= tolerance).sum()))
    }


def test_any_lower_threshold_holds_too() -> None:
    model, data = trained()
    score = LossIncreaseScore(data, mode="cumulative", tolerance=0.2, samples=400)
    network = score.run(netsurgery.trace(model, data[0]))
    removed = []
    for threshold in (-0.01, 0.0, 0.01, 0.03, 0.06, 0.1, 0.15, 0.2):
        edit = PruneChannels(threshold=threshold).run(network)
        assert rise(model, edit, data) <= max(threshold, 0) + 1e-6
        removed.append(sum(network[n].size - count for n, count in edit.counts.items()))
    assert removed == sorted(removed) and len(set(removed)) > 4


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("after", [1, 4, 9, 14])
def test_what_is_interrupted_goes_on_to_the_same(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ALL["concatenated"]()
    data = data_for(model)
    network = netsurgery.trace(model, data[0][:3])

    def run(**more: Any) -> dict[str, Tensor]:
        score = LossIncreaseScore(data, mode="cumulative", tolerance=0.3, samples=24, rows=9, **more)
        return dict(score.run(network).scores)

    tried: list[tuple[str, int]] = []
    loss_deltas = Ablation.loss_deltas

    def until(limit: float) -> None:
        def some(trials: Ablation, due: Any, start: int, stop: int) -> Iterator[Any]:
            for name, units, found in loss_deltas(trials, due, start, stop):
                if len(tried) == limit:
                    raise Interrupted
                tried.append((name, start))
                yield name, units, found

        tried.clear()
        monkeypatch.setattr(Ablation, "loss_deltas", some)

    until(math.inf)
    whole = run()
    everything = list(tried)
    until(after)
    with pytest.raises(Interrupted):
        run(file=tmp_path / "scores")
    until(math.inf)
    resumed = run(file=tmp_path / "scores")
    assert len(tried) == len(everything) - after  # nothing is tried twice
    assert all(torch.equal(score, resumed[name]) for name, score in whole.items())
    tried.clear()
    assert torch.equal(run(file=tmp_path / "scores")["a"], whole["a"]) and not tried


@pytest.mark.parametrize("mode", ["score", "cumulative", "per-group"])
def test_trials_that_are_refused_from_some_number_on_count_once(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some units are cut out before the first that cannot be; each is tried on each sample once."""
    model = randomised(WritesIntoViews())
    data = data_for(model)
    network = netsurgery.trace(model, data[0][:3])
    made = checkpoints(monkeypatch)

    def scores() -> Tensor:
        score = LossIncreaseScore(data, mode=mode, tolerance=0.3, samples=24, rows=9)
        found = score.run(network).scores["conv"]
        *_, checkpoint = made
        assert all(int(seen.max()) == 24 for _, seen in checkpoint.entries.values())
        return found

    def refusing(model: nn.Module, edit: netsurgery.Edit) -> nn.Module:
        if 3 not in edit.keep["conv"]:
            raise RewriteError("not this one")
        return netsurgery.rewrite(model, edit)

    whole = scores()
    monkeypatch.setattr("netsurgery.passes.ablation.rewrite", refusing)
    torch.testing.assert_close(scores(), whole, rtol=1e-9, atol=1e-12)
