"""The study of benchmarks/sparsity.py: what it counts, how it searches, and that it says the same twice."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import netsurgery
from netsurgery.kernels.criteria import CRITERIA, reading
from netsurgery.kernels.hgsr_reference import reference

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import sparsity
from sparsity import IMAGE, MIXED, NONE, NORM, QUICK, Job, RemoveEmpty, Run

STRONG = Job("hierarchical_sqrt_group_lasso", 3.0, 0, 8)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    """What the quick mode wrote, where, and what it printed."""
    out, text = tmp_path_factory.mktemp("sparsity") / "made" / "here", io.StringIO()
    rows = sparsity.run(QUICK, out, Console(file=text, width=80))
    result = json.loads((out / "sparsity.json").read_text())
    assert result["rows"] == [dataclasses.asdict(row) for row in rows]
    return result, out, text.getvalue()


@pytest.fixture(scope="module")
def strong() -> Run:
    return sparsity.measure(STRONG)


def test_every_criterion_is_trained_beside_no_penalty_and_the_mixture(ran: tuple[dict[str, Any], Path, str]) -> None:
    result, out, text = ran
    names = [NONE, *CRITERIA, MIXED]
    assert [row["penalty"] for row in result["rows"]] == names
    pushes = {name: [r["push"] for r in result["runs"] if r["penalty"] == name] for name in names}
    assert pushes[NONE] == [0.0]
    for name in names[1:]:
        assert pushes[name] == list(QUICK.pushes)
    table = (out / "sparsity.md").read_text().splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in table[2:]] == names
    assert len({line.count("|") for line in table}) == 1
    for name in names:
        assert name in text
    assert max(map(len, text.splitlines()[:-1])) <= 80


def test_the_figures_are_in_range(ran: tuple[dict[str, Any], Path, str]) -> None:
    result = ran[0]
    for row in result["rows"]:
        assert 0 <= row["low"] <= row["high"] <= 100
        assert all(0 <= row[what] <= 100 for what in ("accuracy", "empty", "small", "weights", "left"))
    for run in result["runs"]:
        assert all(0 <= run[what] <= 100 for what in ("accuracy", "empty", "small", "weights", "removed_accuracy"))
        assert run["parameters"] == sum(p.numel() for p in sparsity.PlainNet().parameters())
        assert (run["removed_parameters"] < run["parameters"]) == (run["empty"] > 0)
        assert run["strength"] > 0 or run["penalty"] == NONE
    alone = next(run for run in result["runs"] if run["penalty"] == NONE)
    assert alone["accuracy"] > 50  # after one epoch; chance is 10
    assert alone["empty"] == 0


def test_the_picture_opens_and_is_not_blank(ran: tuple[dict[str, Any], Path, str]) -> None:
    from matplotlib.image import imread

    pixels = imread(ran[1] / "sparsity.png")
    assert pixels.shape[0] > 500 and pixels.shape[1] > 1000
    assert len({tuple(p) for p in pixels.reshape(-1, pixels.shape[2])[::7]}) > 30  # a colour for each penalty


def test_a_strong_penalty_empties_channels_and_they_are_worth_nothing(strong: Run) -> None:
    assert strong.empty > 20
    assert strong.removed_parameters < strong.parameters
    assert abs(strong.removed_accuracy - strong.accuracy) < 1  # 450 images


def test_the_same_seed_gives_the_same_figures(strong: Run) -> None:
    before = torch.random.get_rng_state()
    assert sparsity.measure(STRONG) == strong
    assert torch.equal(torch.random.get_rng_state(), before)
    small = Job(STRONG.penalty, STRONG.push, 1, 1)
    assert sparsity.measure(small) != sparsity.measure(Job(STRONG.penalty, STRONG.push, 2, 1))


@pytest.mark.parametrize("penalty", sparsity.PENALTIES)
def test_a_push_is_a_multiple_of_the_cross_entropy_of_guessing(penalty: str) -> None:
    convolutions = [m.weight for m in sparsity.untrained("plain", 0).modules() if isinstance(m, nn.Conv2d)]
    readings = [reading(tuple(w.shape), "feature") for w in convolutions]
    criterion, l1_ratio = sparsity.PENALTIES[penalty]
    value = (1 - l1_ratio) * reference(convolutions, criterion, readings)
    value = value + l1_ratio * reference(convolutions, "l1", readings)
    strength = sparsity.strength_of(Job(penalty, 3.0, 1, 1))
    assert strength * value.item() == pytest.approx(3 * math.log(10), rel=1e-4)


def test_exactly_the_empty_channels_go() -> None:
    model = sparsity.untrained("plain", 0)
    last = [m for m in model.modules() if isinstance(m, nn.Conv2d)][1:]
    with torch.no_grad():
        last[0].weight[:, [2, 5]] *= 1e-5
        last[1].weight[:, 7] = 0
        last[2].weight *= 1e-5  # all of them: the highest stays
        last[2].weight[:, 4] *= 2
        model[-1].weight[:, 3] = 0  # the classifier alone reads these: they are not counted
    edit = netsurgery.plan(model, [NORM, RemoveEmpty(1e-3)], IMAGE)
    gone = {g.name: set(range(g.size)) - set(edit.keep.get(g.name, range(g.size))) for g in edit.network.prunable}
    assert list(gone.values()) == [{2, 5}, {7}, set(range(32)) - {4}, set()]
    small = netsurgery.rewrite(model, edit)
    assert netsurgery.verify(model, small, edit, (torch.rand(1, 1, 8, 8),)) < 1e-5


def test_coupled_channels_of_a_residual_network_empty_too() -> None:
    run = sparsity.measure(dataclasses.replace(STRONG, network="residual", grouping="coupled"))
    assert run.empty > 20
    assert run.removed_parameters < run.parameters
    assert abs(run.removed_accuracy - run.accuracy) < 1


def test_a_network_that_diverged_has_no_empty_channels() -> None:
    run = sparsity.measure(Job("hierarchical_sq_exclusive", 1e4, 0, 1))
    assert (run.empty, run.small, run.weights, run.removed_parameters) == (0, 0, 0, run.parameters)
    assert run.accuracy < 20


def tried(seeds: int = 2, **accuracies: float) -> dict[float, list[Run]]:
    """Runs whose mean accuracy is as given, by push (`p3=99`); the share of empty channels is 10 times the push."""
    return {
        (push := float(name[1:])): [
            Run("l1", push, push, seed, accuracy + (-1) ** seed, 10 * push, 0, 0, 100, 100, accuracy)
            for seed in range(seeds)
        ]
        for name, accuracy in accuracies.items()
    }


def test_figures_are_interpolated_where_half_a_point_is_lost() -> None:
    found = sparsity.matched(tried(p0=99, p1=98.75, p3=98.25))
    assert (found["accuracy"], found["strength"], found["empty"], found["left"]) == pytest.approx((98.5, 2, 20, 100))
    assert sparsity.matched(tried(p0=99, p4=97))["empty"] == pytest.approx(10)  # from no penalty on
    assert sparsity.matched(tried(p0=99, p1=98.9, p4=98.8))["empty"] == 40  # the strongest, all are within


def test_a_lucky_accuracy_counts_no_more_than_its_neighbours() -> None:
    lucky = tried(p4=98.75, p0=99, p1=97.75)  # 97.75 and 98.75 count as 98.25 and 98.25: the limit is 2/3 of the way
    assert sparsity.falling(lucky) == [(0, 99), (1, 98.25), (4, 98.25)]
    assert sparsity.matched(lucky)["empty"] == pytest.approx(20 / 3)


def test_the_range_is_that_of_seeds_drawn_again() -> None:
    assert sparsity.drawn(tried(p0=99, p1=98.75, p3=98.25)) == pytest.approx((20, 20))  # seeds differ alike everywhere
    low, high = sparsity.drawn(tried(seeds=1, p0=99, p3=98))
    assert low == high == pytest.approx(15)
    mixed = tried(p0=99, p1=98.75, p3=98.25)
    mixed[3.0][0] = dataclasses.replace(mixed[3.0][0], empty=90)  # the other has 30
    low, high = sparsity.drawn(mixed)
    assert low < 22 and high > 45  # 20 or 50 where one of them is drawn twice


def test_the_search_goes_on_where_the_limit_is() -> None:
    assert sparsity.next_push(tried(p0=99, p1=99, p100=90)) == 10
    assert sparsity.next_push(tried(p0=99, p1=99, p4=98.75)) == 12
    assert sparsity.next_push(tried(p0=99, p3=98, p9=97)) == 1


def test_every_round_tries_one_more_push_of_each_penalty(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(job: Job) -> Run:  # as if l1 might be up to 2, and the others anything
        accuracy = 97.0 if job.penalty == "l1" and job.push > 2 else 99.0
        return Run(job.penalty, job.push, 1, job.seed, accuracy, 0, 0, 0, 1, 1, accuracy)

    monkeypatch.setattr(sparsity, "measure", made)
    found = sparsity.Study(seeds=2, pushes=(1, 4), rounds=2, jobs=1).search(Console(file=io.StringIO()))
    assert list(found) == [NONE, *sparsity.PENALTIES]
    assert list(found[NONE]) == [0]
    assert list(found["l1"]) == [0, 1, 4, 2, math.sqrt(8)]
    assert list(found["group_lasso"]) == [0, 1, 4, 12, 36]
    assert all([run.seed for run in runs] == [0, 1] for each in found.values() for runs in each.values())
