"""Where calls cost more than arithmetic, as on a GPU, many removals go through together: same scores, few calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import netsurgery
from netsurgery.models import resnet20
from netsurgery.passes import LossIncreaseScore
from netsurgery.passes.ablation import Ablation
from netsurgery.passes.losses import Loss
from test_loss_increase import (
    READINGS,
    AcrossSamples,
    ByPlace,
    Contrasted,
    changes,
    contrasts,
    data_for,
    drawn,
    randomised,
)
from test_prefixes import ALL, CUT
from test_random_draws import DATA, noisy


@pytest.fixture
def dear(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Lets calls count as dear from then on."""
    return lambda: monkeypatch.setattr("netsurgery.passes.sample_losses.calls_are_dear", lambda device: True)


SETTINGS: dict[str, dict[str, Any]] = {
    "many at once": {"samples": 5, "rows": 64},
    "some batches": {"samples": 17, "rows": 12},
    "by and by": {"samples": 5, "rows": 64, "mode": "cumulative", "tolerance": 0.2},
    "each group alone": {"samples": 5, "rows": 64, "mode": "per-group", "tolerance": 0.2},
    "little memory": {"samples": 5, "rows": 64, "memory": 1},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", [*ALL, *CUT])
def test_scores_are_the_same(name: str, settings: str, dear: Callable[[], None]) -> None:
    model = {**ALL, **CUT}[name]()
    data = data_for(model)
    network = netsurgery.trace(model, data[0][:3])
    few = LossIncreaseScore(data, **SETTINGS[settings]).run(network).scores
    dear()
    many = LossIncreaseScore(data, **SETTINGS[settings]).run(network).scores
    for group, score in few.items():
        torch.testing.assert_close(many[group], score, rtol=1e-8, atol=1e-12)


PLACES: dict[str, Callable[[Tensor], Tensor]] = {
    "summed so far": lambda x: x.cumsum(0),
    "sorted": lambda x: x + x.sort(0).values,
    "numbered": lambda x: x * torch.arange(len(x))[:, None],
    "counted": lambda x: x / len(x),
    "counted by code": lambda x: x + x.new_full((1,), x.shape[0]),
    "mean taken off": lambda x: x - x.mean(0),
}
MINGLED: dict[str, Callable[[], nn.Module]] = {
    "across": AcrossSamples,
    **{name: lambda how=how: ByPlace(how) for name, how in PLACES.items()},  # type: ignore[misc]
}


@pytest.mark.parametrize("are_dear", [True, False])
@pytest.mark.parametrize("name", MINGLED)
def test_samples_that_meet_others_go_through_by_themselves(name: str, are_dear: bool, dear: Callable[[], None]) -> None:
    if are_dear:
        dear()
    model = randomised(MINGLED[name]())
    data = data_for(model)
    network = netsurgery.trace(model, data[0][:3])
    scores = LossIncreaseScore(data, samples=8, rows=64).run(network).scores
    x, y = drawn(data, 8)
    for group, score in scores.items():
        for unit in range(len(score)):
            wanted = READINGS["effect"](changes(model, network, group, unit, x, y))
            assert float(score[unit]) == pytest.approx(wanted, rel=1e-6, abs=1e-12), (group, unit)


def beside_others(outputs: Tensor, y: Tensor) -> Tensor:
    """One number for each sample, which depends on the other samples."""
    losses = F.cross_entropy(outputs, y, reduction="none")
    return losses * losses.softmax(0) * len(y)


def noisy_loss(outputs: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(outputs + torch.rand_like(outputs), y, reduction="none")


LOSSES: dict[str, Loss] = {
    "a mean": F.cross_entropy,
    "each sample's": lambda o, y: F.cross_entropy(o, y, reduction="none"),
    "beside others": beside_others,
    "random": noisy_loss,
}


@pytest.mark.parametrize("are_dear", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_many_removals_are_those_of_each(name: str, are_dear: bool, dear: Callable[[], None]) -> None:
    model = ALL["residual"]()
    data = data_for(model)
    network = netsurgery.trace(model, data[0][:3])
    alone = LossIncreaseScore(data, LOSSES[name], samples=6, rows=6).run(network).scores
    if are_dear:
        dear()
    together = LossIncreaseScore(data, LOSSES[name], samples=6, rows=64).run(network).scores
    for group, score in alone.items():
        torch.testing.assert_close(together[group], score, rtol=1e-8, atol=1e-12)


def test_outputs_that_compare_samples(dear: Callable[[], None]) -> None:
    model = randomised(Contrasted())
    data = data_for(model)[0][:8], torch.arange(8)
    network = netsurgery.trace(model, data[0][:3])
    few = LossIncreaseScore(data, contrasts).run(network).scores["a"]
    dear()
    torch.testing.assert_close(LossIncreaseScore(data, contrasts, rows=64).run(network).scores["a"], few)


@pytest.mark.parametrize("name", ["dropout", "one for all", "numpy", "a number of numpy's", "randperm"])
def test_random_numbers(name: str, dear: Callable[[], None]) -> None:
    model = noisy(name)
    network = netsurgery.trace(model, DATA[0][:3])
    few = LossIncreaseScore(DATA, samples=8).run(network).scores
    dear()
    many = LossIncreaseScore(DATA, samples=8).run(network).scores
    for group, score in few.items():
        torch.testing.assert_close(many[group], score)


class Calls(TorchDispatchMode):
    """Counts the operations that are called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def cifar() -> tuple[nn.Module, tuple[Tensor, Tensor], netsurgery.Network]:
    torch.manual_seed(0)
    model, data = resnet20().eval(), (torch.randn(64, 3, 8, 8), torch.arange(64) % 10)
    return model, data, netsurgery.trace(model, data[0][:2])


def test_a_unit_of_a_resnet_takes_few_calls(dear: Callable[[], None]) -> None:
    """A tenth of running the network once for each, and that without the calls that cut it."""
    dear()
    model, (x, y), network = cifar()
    with Calls() as naive, torch.no_grad():
        F.cross_entropy(model(x), y)
    with Calls() as ours:
        LossIncreaseScore((x, y), samples=64, rows=2048, progress=False).run(network)
    units = sum(group.size for group in network.prunable)
    assert ours.count / units < naive.count / 8


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, int]]:
    """Numbers of samples that went through at once, and how many times over."""
    found = set[tuple[int, int]]()
    trace = Ablation.trace

    def noted(trials: Ablation, rows: int, copies: int, start: int) -> netsurgery.Network:
        found.add((rows, copies))
        return trace(trials, rows, copies, start)

    monkeypatch.setattr(Ablation, "trace", noted)
    return found


@pytest.mark.parametrize("units", [(2, 3), (7, 5), (3, 20)])
@pytest.mark.parametrize(("loss", "rows"), [(F.cross_entropy, 1), (None, 40)])
def test_samples_come_no_more_often_than_there_are_units(
    units: tuple[int, int], loss: Loss | None, rows: int, sizes: set[tuple[int, int]]
) -> None:
    """A loss that is a mean takes one sample at a time: copies that try no unit would fill the batch."""
    model = nn.Sequential(
        nn.Linear(4, units[0]), nn.ReLU(), nn.Linear(units[0], units[1]), nn.ReLU(), nn.Linear(units[1], 3)
    )
    data = torch.randn(40, 4), torch.arange(40) % 3
    LossIncreaseScore(data, loss).run(netsurgery.trace(model, data[0][:2]))
    assert (rows, max(units)) in sizes and max(copies for _, copies in sizes) == max(units)


def test_racing_traces_few_sizes(dear: Callable[[], None], sizes: set[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 4))
    data = torch.randn(1000, 8), torch.arange(1000) % 4
    network = netsurgery.trace(model, data[0][:3])
    exact = LossIncreaseScore(data).run(network).scores
    sizes.clear()
    dear()
    raced = LossIncreaseScore(data, racing=True).run(network).scores
    assert (
        len(sizes) <= 5
    )  # all samples once for the slopes; a batch, and what is left, each once and several times over
    for name, score in exact.items():
        lowest = [{*one.argsort(stable=True)[:24].tolist()} for one in (score, raced[name])]
        assert len(lowest[0] & lowest[1]) >= 0.9 * 24
