"""Networks that draw random numbers in eval mode: one draw for all, and a warning that names the line."""

from __future__ import annotations

import copy
import logging
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import netsurgery
from netsurgery.analysis.replay import draws
from netsurgery.capture.randomness import seeded
from netsurgery.passes import LossIncreaseScore, PruneChannels, TaylorScore
from netsurgery.passes.calibration import draw_samples

DATA = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).double(), torch.arange(40) % 4
CPU = torch.device("cpu")


class Noisy(nn.Module):
    def __init__(self, noise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 8), nn.Linear(8, 6), nn.Linear(6, 4)
        self.noise = noise

    def forward(self, x: Tensor) -> Tensor:
        x = self.noise(torch.relu(self.a(x)))
        return self.head(torch.relu(self.b(x)))


class StaysOn(nn.Dropout):
    """As Monte Carlo dropout does."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p)


NOISES: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.5),
    "a module": StaysOn(0.3),
    "alpha dropout": lambda x: F.feature_alpha_dropout(x, 0.3, training=True) * (x != 0),
    "rand": lambda x: x * torch.rand(x.shape, dtype=x.dtype),
    "randn_like": lambda x: x * torch.randn_like(x),
    "in place": lambda x: x * torch.empty_like(x).normal_(),
    "rrelu": lambda x: F.rrelu(-x, 0.1, 0.9, training=True),
    "bernoulli": lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)),
    "randperm": lambda x: x + x[torch.randperm(len(x))],
    "one for all": lambda x: x * (1 + torch.rand(())),
    "multinomial": lambda x: x * torch.multinomial(torch.ones(len(x), 5), 1).to(x.dtype),
    "numpy": lambda x: x * torch.as_tensor(numpy.random.rand(len(x), 1)),  # noqa: NPY002
    "a number of numpy's": lambda x: x * (1 + numpy.random.rand()),  # noqa: NPY002
    "random": lambda x: x * (1 + random.random()),
}  # fmt: skip


def noisy(name: str) -> nn.Module:
    torch.manual_seed(0)
    return Noisy(NOISES[name]).double().eval()


def line(name: str) -> str:
    """The line of code that draws."""
    noise: Any = NOISES[name]
    code = noise.forward.__code__ if isinstance(noise, nn.Module) else noise.__code__
    return f"{Path(code.co_filename).name}:{code.co_firstlineno + isinstance(noise, nn.Module)}"


def seed_of(network: netsurgery.Network, start: int) -> int:
    """What the draws of a batch follow from: operations of torch draw by their place."""
    places = [place for place, node in enumerate(network.ir.nodes) if node.op == "call_function" and draws(node)]
    return start + 7919 * places[0] if places else 0


def loss(model: nn.Module, network: netsurgery.Network, gone: dict[str, list[int]], rows: int, samples: Any) -> Tensor:
    """The losses of a plain loop over batches, where units are zeroed; each batch with its draw."""
    small: Any = copy.deepcopy(model)
    for name, units in gone.items():
        layer = small.get_submodule(name)
        layer.weight.data[units], layer.bias.data[units] = 0, 0
    found = []
    for start in range(0, samples.count, rows):
        inputs, targets = samples.rows(slice(start, start + rows), CPU)
        with seeded(seed_of(network, start), CPU), torch.no_grad():
            found.append(F.cross_entropy(small(*inputs[0]), targets, reduction="none"))
    return torch.cat(found)


def test_a_generator_that_the_model_keeps_is_left_as_it_is() -> None:
    own = torch.Generator().manual_seed(3)
    torch.manual_seed(0)
    model = Noisy(lambda x: x * torch.rand(x.shape, generator=own, dtype=x.dtype)).double().eval()
    network = netsurgery.trace(model, DATA[0][:3])
    for score in (LossIncreaseScore(DATA), TaylorScore(DATA)):
        first, second = score.run(network).scores, score.run(network).scores
        assert first and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("rows", [None, 9])
@pytest.mark.parametrize("name", NOISES)
def test_scores_are_those_of_a_loop_with_the_same_draw(name: str, rows: int | None) -> None:
    model, samples = noisy(name), draw_samples(DATA, 40)
    network = netsurgery.trace(model, DATA[0][:3])
    scores = LossIncreaseScore(DATA, rows=rows).run(network).scores
    base = loss(model, network, {}, rows or 40, samples)
    assert scores
    for group, score in scores.items():
        for unit in range(len(score)):
            found = (loss(model, network, {group: [unit]}, rows or 40, samples) - base).abs().mean()
            assert float(score[unit]) == pytest.approx(float(found), rel=1e-6, abs=1e-10), (group, unit)


SETTINGS: list[dict[str, Any]] = [
    {}, {"rows": 9}, {"rows": 3}, {"memory": 1}, {"racing": True}, {"racing": True, "rows": 9},
    {"mode": "cumulative", "tolerance": 0.1}, {"mode": "cumulative", "tolerance": 0.1, "rows": 9},
    {"mode": "per-group"},
]  # fmt: skip


CALLS = [(name, settings) for name in NOISES for settings in SETTINGS if name in ("dropout", "numpy") or not settings]


@pytest.mark.parametrize(("name", "settings"), CALLS, ids=str)
def test_two_calls_give_the_same_and_name_the_line(
    name: str, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = noisy(name)
    network = netsurgery.trace(model, DATA[0][:3])
    states = torch.random.get_rng_state(), random.getstate()
    first = LossIncreaseScore(DATA, **settings).run(network).scores
    assert torch.equal(torch.random.get_rng_state(), states[0]) and random.getstate() == states[1]
    torch.rand(7), random.random()
    second = LossIncreaseScore(DATA, **settings).run(network).scores
    assert all(torch.equal(score, second[group]) for group, score in first.items())
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2 and warnings[0] == warnings[1]
    assert re.fullmatch(
        rf"Noisy draws random numbers in eval mode too, .*{re.escape(line(name))}.*: scores are those of one draw, the "
        "same with and without each unit",
        warnings[0],
    )


@pytest.mark.parametrize("name", ["dropout", "rand", "numpy"])
def test_what_goes_by_and_by_meets_the_same_draw(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "netsurgery")
    model, samples = noisy(name), draw_samples(DATA, 40)
    network = netsurgery.trace(model, DATA[0][:3])
    score = LossIncreaseScore(DATA, mode="cumulative", tolerance=0.1, rows=9)
    edit = PruneChannels(threshold=0.1).run(score.run(network))
    gone = {group: sorted({*range(network[group].size)} - {*units}) for group, units in edit.keep.items()}
    found = loss(model, network, gone, 9, samples).mean() - loss(model, network, {}, 9, samples).mean()
    said = next(m[1] for r in caplog.records if (m := re.search(r"the loss rises by (\S+) on", r.getMessage())))
    assert len(gone) == 2 and float(found) == pytest.approx(float(said), rel=1e-3) and float(found) <= 0.1


def test_a_network_that_draws_nothing_is_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model = Noisy(nn.Dropout(0.5)).double().eval()
    LossIncreaseScore(DATA).run(netsurgery.trace(model, DATA[0][:3]))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
