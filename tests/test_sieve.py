"""Loss increase at real size: what is not scored, what slopes decide, how long it takes."""

import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import netsurgery
from netsurgery.demo import digits
from netsurgery.errors import InputError
from netsurgery.passes import LossIncreaseScore, PruneChannels, forecast, progress
from netsurgery.passes.score_checkpoint import ScoreCheckpoint
from netsurgery.passes.sieve import Regression, Sieve, at_most, drawn
from test_loss_increase import NETWORKS, Deciding, checkpoints, data_for, randomised, separable

Data = tuple[Tensor, Tensor]


# Scope -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "left"), [
    ({"include": "a"}, {"a"}),
    ({"exclude": ["a"]}, {"stem"}),
    ({"exclude": nn.BatchNorm2d}, None),
    ({"removal": PruneChannels(0.5, include="a")}, {"a"}),
    ({"removal": PruneChannels(0.5, protect="head")}, {"a"}),
    ({"removal": PruneChannels(0.5), "exclude": "stem"}, {"a"}),
    ({"removal": PruneChannels({"a": 0.5})}, {"a"}),
    ({"include": "head", "removal": PruneChannels(0.5)}, None),
])  # fmt: skip
def test_what_is_not_scored_changes_nothing_for_the_others(settings: dict[str, Any], left: set[str] | None) -> None:
    model = NETWORKS["residual"]()
    data = data_for(model)
    network = netsurgery.trace(model, data[0][:3])
    score = LossIncreaseScore(data, samples=12, **settings)
    if left is None:
        with pytest.raises(InputError, match="no group of Residual is left to be scored: loosen include, exclude and"):
            score.run(network)
        return
    found, whole = (one.run(network).scores for one in (score, LossIncreaseScore(data, samples=12)))
    assert set(found) == left < set(whole)
    for name, one in found.items():
        torch.testing.assert_close(one, whole[name], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "settings",
    [{}, {"racing": True}, {"mode": "cumulative", "tolerance": 0.3}, {"mode": "per-group", "tolerance": 0.3}],
)
def test_groups_are_left_out_in_every_mode(settings: dict[str, Any]) -> None:
    model = NETWORKS["residual"]()
    data = data_for(model)
    score = LossIncreaseScore(data, samples=12, include="a", **settings)
    edit = netsurgery.plan(model, [score, PruneChannels(0.5, include="a")], data[0][:3])
    assert set(edit.keep) == {"a"}
    found = score.run(netsurgery.trace(model, data[0][:3]))
    assert set(found.scores) == {"a"}
    with pytest.raises(
        InputError,
        match=r"group 'stem' has no scores, which other groups have: let the scoring pass score it too \(its include, "
        r"exclude and removal\), or keep the removal from it, PruneChannels\(exclude='stem'\)",
    ):
        PruneChannels(0.5).run(found)


# The sieve -------------------------------------------------------------------------------------------------------


def wide(seed: int) -> tuple[nn.Module, Data]:
    """A network with many more units than digits need."""
    torch.manual_seed(seed)
    x, y = digits(seed).train
    x = x.flatten(1)
    model = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(4):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model.eval(), (x, y)


def shared(one: Tensor, other: Tensor) -> float:
    """The share of the lower half that is the same."""
    half = len(one) // 2
    lowest = [{*score.argsort(stable=True)[:half].tolist()} for score in (one, other)]
    return len(lowest[0] & lowest[1]) / half


@pytest.mark.parametrize(("seed", "samples"), [(0, 96), (1, 96), (2, 96), (3, 400)])
def test_what_slopes_decide_is_the_exact_selection_at_the_stated_confidence(
    seed: int, samples: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = checkpoints(monkeypatch)
    model, data = wide(seed)
    network = netsurgery.trace(model, data[0][:3])
    exact = LossIncreaseScore(data, samples=samples).run(network).scores
    race = LossIncreaseScore(data, samples=samples, racing=True, confidence=0.9)
    with caplog.at_level(logging.INFO, "netsurgery"):
        found = race.run(network).scores
    *_, said = [message for message in caplog.messages if message.startswith("sieve")]
    pattern = (
        r"sieve: slopes decide for (\d+) of 600 units; at most ([\d.]+)% of the selection is wrong by that, with a "
        r"chance of 95%"
    )
    decided, bound = map(float, re.fullmatch(pattern, said).groups())  # type: ignore[union-attr]
    *_, checkpoint = made
    assert sum(int((seen == 0).sum()) for _, seen in checkpoint.entries.values()) == decided > 200
    wrong = 1 - sum(shared(found[name], exact[name]) for name in exact) / 2
    assert bound <= 10 and wrong <= 0.1
    assert samples > 96 or wrong <= bound / 100  # all that were tried, on all samples
    for name, (_, seen) in checkpoint.entries.items():
        whole = seen == samples
        torch.testing.assert_close(found[name][whole], exact[name][whole], rtol=1e-4, atol=1e-7)


def test_predictions_that_say_nothing_decide_little() -> None:
    torch.manual_seed(0)
    sizes = {"a": 400, "b": 600, "c": 30}
    loss_deltas = {name: torch.randn(size, dtype=torch.float64) for name, size in sizes.items()}
    draw = drawn(sizes, 0.9, 0)
    assert draw is not None and [len(units) for units in draw.units.values()] == [63, 94, 12]
    assert [*draw.equal.values()] == [63, 94, 5]
    for noise, least, most in ((3.0, 0.7, 1.0), (0.1, 0.15, 0.4)):
        regressions = {}
        for name, units in draw.units.items():
            told = loss_deltas[name] + noise * torch.randn(sizes[name], dtype=torch.float64)
            regressions[name] = Regression(
                torch.stack([told, torch.zeros_like(told)], 1), units, loss_deltas[name][units]
            )
        sieve = Sieve(regressions, draw, {name: size // 2 for name, size in sizes.items()}, 0.9)
        while more := sieve.more():
            for name, units in more.items():
                assert not {*units} & {*draw.units[name]}
                regressions[name].learn(units, loss_deltas[name][units])
        assert least <= sum(map(len, sieve.tried.values())) / 1030 <= most
        assert sieve.missed <= 0.1
        for name, units in sieve.tried.items():
            known = regressions[name].estimates.clone()
            known[units] = loss_deltas[name][units]
            assert shared(known, loss_deltas[name]) >= 0.9
            assert {*draw.units[name]} <= {*units}


def test_the_border_is_where_what_is_known_has_it() -> None:
    told = torch.arange(100, dtype=torch.float64)[:, None].expand(100, 2)
    regression = Regression(told, list(range(0, 100, 5)), 2.0 * torch.arange(0, 100, 5, dtype=torch.float64))
    before = regression.border(30, 1.0)
    assert float((regression.means < before).sum()) == pytest.approx(30, abs=2)
    regression.learn(list(range(1, 100, 5)), torch.full((20,), 1e3, dtype=torch.float64))  # higher than they were told
    assert float((regression.known.nan_to_num(nan=math.inf) < regression.border(30, 1.0)).sum()) + float(
        (regression.known.isnan() & (regression.means < regression.border(30, 1.0))).sum()
    ) == pytest.approx(30, abs=2)


def test_a_bound_holds_as_often_as_it_says() -> None:
    assert at_most(0, 30, 0.05) == pytest.approx(1 - 0.05 ** (1 / 30))
    assert at_most(30, 30) == 1.0
    held = 0.0
    for wrong in range(101):
        chance = math.comb(100, wrong) * 0.07**wrong * 0.93 ** (100 - wrong)
        held += chance * (at_most(wrong, 100) >= 0.07)
    assert 0.95 <= held < 0.99


def test_small_networks_are_not_sieved() -> None:
    assert drawn({"a": 60, "b": 100}, 0.95, 0) is None


def test_racing_that_saves_nothing_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model, data = separable()
    network = netsurgery.trace(model, data[0][:3])
    with caplog.at_level(logging.INFO, "netsurgery"):
        LossIncreaseScore(data, samples=96, racing=True).run(network)
    assert caplog.messages == ["racing has saved nothing: every unit was tried on all 96 samples"]
    caplog.clear()
    with caplog.at_level(logging.INFO, "netsurgery"):
        LossIncreaseScore(data, samples=200, racing=True).run(network)
    assert caplog.messages == []


class Stopped(Exception):
    pass


@pytest.mark.parametrize("after", [2, 9, 14])
def test_a_race_that_is_interrupted_goes_on(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = wide(0)
    network = netsurgery.trace(model, data[0][:3])
    settings: dict[str, Any] = {"samples": 96, "racing": True, "rows": 48, "confidence": 0.9}
    whole = LossIncreaseScore(data, **settings).run(network).scores
    add, count = ScoreCheckpoint.add, 0

    def stopping(self: ScoreCheckpoint, *args: Any) -> None:
        nonlocal count
        count += 1
        if count == after:
            raise Stopped
        add(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(ScoreCheckpoint, "add", stopping)
        with pytest.raises(Stopped):
            LossIncreaseScore(data, file=tmp_path / "scores", **settings).run(network)
    tried = 0

    def counting(self: ScoreCheckpoint, name: str, units: list[int], *args: Any) -> None:
        nonlocal tried
        tried += len(units)
        add(self, name, units, *args)

    monkeypatch.setattr(ScoreCheckpoint, "add", counting)
    resumed = LossIncreaseScore(data, file=tmp_path / "scores", **settings).run(network).scores
    assert tried
    for name, score in whole.items():
        torch.testing.assert_close(resumed[name], score, rtol=1e-6, atol=1e-9)
    tried = 0
    again = LossIncreaseScore(data, file=tmp_path / "scores", **settings).run(network).scores
    assert not tried and all(torch.equal(again[name], resumed[name]) for name in resumed)
    narrower = LossIncreaseScore(data, file=tmp_path / "scores", include="0", **settings)
    with pytest.raises(InputError, match="holds scores of another model, other samples or other settings"):
        narrower.run(network)  # a race of other groups takes the samples in another order


# Time ------------------------------------------------------------------------------------------------------------


def said(score: LossIncreaseScore, caplog: pytest.LogCaptureFixture) -> list[str]:
    model = NETWORKS["residual"]()
    caplog.clear()
    with caplog.at_level(logging.INFO, "netsurgery"):
        score.run(netsurgery.trace(model, data_for(model)[0][:3]))
    return caplog.messages


def test_how_long_it_will_take_is_said_before(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_for(NETWORKS["residual"]())
    settings: dict[str, Any] = {"samples": 12, "rows": 4}
    assert said(LossIncreaseScore(data, **settings), caplog) == []  # so little is not worth while
    monkeypatch.setattr(forecast, "_WORTH", 0.0)
    monkeypatch.setattr(progress, "_EVERY", 0.0)
    first, *lines = said(LossIncreaseScore(data, **settings), caplog)
    known = r"LossIncreaseScore: 11 units in 2 groups on 12 samples will take %sabout \d+ s, by trials of 2 groups"
    assert re.fullmatch(known % "", first)
    assert len(lines) >= 6
    pattern = r"loss increase, every unit: (\d+)% done, about \d+ s left after \d+ s"
    shares = [int(re.fullmatch(pattern, line)[1]) for line in lines]  # type: ignore[index]
    assert shares == sorted(shares) and shares[-1] == 100
    assert said(LossIncreaseScore(data, progress=False, **settings), caplog) == []
    monkeypatch.setattr(forecast, "_LONG", 0.0)
    scope = "include, exclude or removal where not every group will be cut"
    (dear, *_) = said(LossIncreaseScore(data, **settings), caplog)
    assert dear.endswith(f"; cheaper: racing=True, fewer samples, {scope}")
    dear, *lines = said(LossIncreaseScore(data, mode="cumulative", **settings), caplog)
    assert re.fullmatch(known % "at most " + f"; cheaper: fewer samples, {scope}", dear)
    assert re.fullmatch(r"loss increase, one unit after the other: \d+ trials done after \d+ s", lines[0])


def test_what_is_known_already_is_not_forecast(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(forecast, "_WORTH", 0.0)
    score = LossIncreaseScore(data_for(NETWORKS["residual"]()), samples=12, file=tmp_path / "scores")
    assert len(said(score, caplog)) == 1
    assert said(score, caplog) == []


def test_a_network_that_is_cut_for_each_unit_has_a_forecast(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast, "_WORTH", 0.0)
    model = randomised(Deciding())
    data = data_for(model)
    with caplog.at_level(logging.INFO, "netsurgery"):
        LossIncreaseScore(data, samples=8).run(netsurgery.trace(model, data[0][:3]))
    cut, *lines = caplog.messages
    assert cut == "each unit is cut out in turn, which is slow: its code decides by values"
    assert any("11 units in 2 groups on 8 samples will take about " in message for message in lines)


def test_a_forecast_scales_what_it_has_measured() -> None:
    found = forecast.Forecast({"early": 100.0, "middle": 40.0, "late": 1.0}, {"early": 2.0, "late": 0.1})
    assert found.rate("early") == 2.0 and found.rate("middle") == pytest.approx(4.0)
    assert found.total({"early": 3, "late": 10}) == pytest.approx(7.0)
    assert [progress.span(s) for s in (4.4, 99, 125, 5000, 12600)] == ["4 s", "99 s", "2 min", "83 min", "3.5 h"]


# Layout ----------------------------------------------------------------------------------------------------------


class Laid(nn.Module):
    """Reads what convolutions make in the order of its memory."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.c, self.d = nn.ConvTranspose2d(8, 6, 2, 2), nn.Conv2d(6, 6, 1)
        self.hidden, self.head = nn.Linear(6 * 64, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(x, 4)
        x = F.hardswish(self.b(F.relu(self.a(x))))
        x = F.pixel_unshuffle(F.pixel_shuffle(self.d(self.c(x)).repeat(1, 2, 1, 1)[:, :4], 2), 2).repeat(1, 2, 1, 1)
        return self.head(torch.tanh(self.hidden(x[:, :6].reshape(len(x), -1))))


@pytest.mark.parametrize("rows", [1, 4, 12])
def test_results_that_lie_with_channels_last_are_the_same(rows: int) -> None:
    torch.manual_seed(0)
    model = Laid().eval()
    data = torch.randn(12, 3, 5, 5), torch.arange(12) % 4
    found = LossIncreaseScore(data, samples=12, rows=rows).run(netsurgery.trace(model, data[0][:3])).scores
    slow = LossIncreaseScore((data[0].double(), data[1]), samples=12, rows=rows)
    exact = slow.run(netsurgery.trace(model.double(), data[0][:3].double())).scores
    assert set(found) == set(exact) and len(found) >= 2
    for name, score in exact.items():
        torch.testing.assert_close(found[name], score, rtol=1e-3, atol=2e-6)
