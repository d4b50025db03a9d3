"""Two readings of what a removal does to the loss: the rise, in which the changes of samples cancel, and the effect."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import netsurgery
from netsurgery.errors import InputError
from netsurgery.passes import LossIncreaseScore, PruneChannels, TaylorScore
from netsurgery.passes.readings import Reading
from test_loss_increase import NETWORKS, READINGS, WritesIntoViews, changes, data_for, drawn, randomised


def torn(units: int = 6, right: int = 22) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A network of which two units alone make the logits, right for some of the 40 samples and wrong for the others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, units), nn.ReLU(), nn.Linear(units, 2)).double().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(0.01)
    model[0].weight[:2] = torch.eye(2)
    model[2].weight[:, :2] = torch.eye(2)
    said = torch.arange(40) % 2
    return model, (torch.eye(2).double().repeat(20, 1), torch.where(torch.arange(40) < right, said, 1 - said))


SCORES: list[tuple[Any, dict[str, Any]]] = [
    (LossIncreaseScore, {}), (LossIncreaseScore, {"racing": True}), (LossIncreaseScore, {"loss": F.cross_entropy}),
    (LossIncreaseScore, {"loss": lambda o, y: F.cross_entropy(o, y, reduction="none"), "rows": 3}),
    (TaylorScore, {"order": 2}), (TaylorScore, {"order": 2, "loss": F.cross_entropy}), (TaylorScore, {}),
]  # fmt: skip


@pytest.mark.parametrize(("score", "settings"), SCORES)
def test_units_that_pull_samples_both_ways_stay(score: Any, settings: dict[str, Any]) -> None:
    model, data = torn()
    small = netsurgery.apply(model, [score(data, **settings), PruneChannels(0.5)], data[0][:2])
    assert float((small(data[0]) - model(data[0])).abs().max()) < 0.1


@pytest.mark.parametrize("score", [LossIncreaseScore, lambda data, **more: TaylorScore(data, order=2, **more)])
def test_by_the_rise_they_go_and_one_line_says_so(score: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, data = torn(right=18)
    x, passes = data[0], [score(data, by="rise"), PruneChannels(0.5)]
    small = netsurgery.apply(model, passes, x[:2])
    assert float((small(x) - model(x)).abs().max()) > 0.5
    netsurgery.plan(model, passes, x[:2])  # once more
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert (
        ": the loss falls without " in warning and " of 6 units (" in warning and " in 1 of 1 groups ('0'): " in warning
    )
    assert warning.endswith("by='effect' ranks units by how much they change the loss of each sample, up or down")


def test_few_falls_and_effects_are_no_news(caplog: pytest.LogCaptureFixture) -> None:
    model, data = torn(units=40)
    model[0].weight[2:] = 0  # units that do nothing
    model[0].bias[2:] = 0
    for by in READINGS:
        LossIncreaseScore(data, by=by).run(netsurgery.trace(model, data[0][:2]))
        TaylorScore(data, order=2, by=by).run(netsurgery.trace(model, data[0][:2]))
    assert not caplog.messages


@pytest.mark.parametrize("by", READINGS)
@pytest.mark.parametrize("rows", [None, 5])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_loss_that_is_a_mean_is_read_sample_by_sample(name: str, rows: int | None, by: Reading) -> None:
    model = NETWORKS[name]()
    data = data_for(model)
    network = netsurgery.trace(model, data[0][:3])
    mean = LossIncreaseScore(data, F.cross_entropy, samples=12, rows=rows, by=by).run(network).scores
    each = LossIncreaseScore(data, samples=12, by=by).run(network).scores
    for group, score in each.items():
        torch.testing.assert_close(mean[group], score, rtol=1e-8, atol=1e-12)


def test_a_mean_where_each_unit_is_cut_out() -> None:
    model = randomised(WritesIntoViews())
    data = data_for(model)
    network = netsurgery.trace(model, data[0][:3])
    found = LossIncreaseScore(data, F.cross_entropy, samples=6).run(network).scores["conv"]
    x, y = drawn(data, 6)
    for unit in range(6):
        assert float(found[unit]) == pytest.approx(READINGS["effect"](changes(model, network, "conv", unit, x, y)))


@pytest.mark.parametrize("racing", [False, True])
def test_a_file_holds_one_reading(racing: bool, tmp_path: Path) -> None:
    model, data = torn()
    network = netsurgery.trace(model, data[0][:2])
    file = tmp_path / "scores"
    first = LossIncreaseScore(data, racing=racing, file=file).run(network).scores["0"]
    again = LossIncreaseScore(data, racing=racing, by="effect", file=file).run(network).scores["0"]
    assert torch.equal(first, again)
    with pytest.raises(InputError, match="holds scores of another model, other samples or other settings"):
        LossIncreaseScore(data, racing=racing, by="rise", file=file).run(network)


@pytest.mark.parametrize("mode", ["cumulative", "per-group"])
def test_tolerances_hold_for_the_rise(mode: Any) -> None:
    """Which is the reading of these modes, and may be named."""
    model, data = torn()
    network = netsurgery.trace(model, data[0][:2])
    plain, named = (
        LossIncreaseScore(data, mode=mode, **more).run(network).scores["0"] for more in ({}, {"by": "rise"})
    )
    assert torch.equal(plain, named)


def test_a_threshold_on_effects_bounds_what_each_unit_does_to_a_sample() -> None:
    model = NETWORKS["residual"]()
    data = data_for(model)
    network = netsurgery.trace(model, data[0][:3])
    scores = LossIncreaseScore(data, samples=24).run(network).scores
    limit = float(torch.cat([*scores.values()]).quantile(0.3))
    edit = netsurgery.plan(model, [LossIncreaseScore(data, samples=24), PruneChannels(threshold=limit)], data[0][:3])
    x, y = drawn(data, 24)
    gone = [(name, u) for name, stay in edit.keep.items() for u in range(network[name].size) if u not in stay]
    assert gone
    for name, unit in gone:
        assert READINGS["effect"](changes(model, network, name, unit, x, y)) <= limit * (1 + 1e-9)


def test_readings_that_do_not_exist() -> None:
    with pytest.raises(InputError, match=r"TaylorScore\(by='sign'\): 'effect' or 'rise'"):
        TaylorScore((), by="sign")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"TaylorScore\(by='rise'\) goes with order=2: of first order it vanishes"):
        TaylorScore((), by="rise")
