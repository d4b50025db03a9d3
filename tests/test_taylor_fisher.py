"""Slopes of gates: a gate closed a little changes the loss by its slope."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import netsurgery
from netsurgery.errors import InputError
from netsurgery.passes import FisherScore, LossIncreaseScore, PruneChannels, TaylorScore
from netsurgery.passes.ablation import Ablation, AblationSettings
from netsurgery.passes.calibration import draw_samples
from netsurgery.passes.gate_gradients import gate_slopes
from netsurgery.passes.readings import Reading
from test_loss_increase import NETWORKS, data_for, randomised


def slopes(model: nn.Module, data: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    network = netsurgery.trace(model, data[0][:2])
    return gate_slopes(Ablation(AblationSettings(), network, draw_samples(data, 12)))


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "attention"])  # norms read units, too
def test_the_sum_of_the_slopes_is_that_of_the_weights_that_read_a_unit(name: str) -> None:
    """The derivative by a gate is the sum of gradient times weight over the weights that consume the unit."""
    model = NETWORKS[name]()
    data = data_for(model)
    found = slopes(model, data)
    drawn = draw_samples(data, 12)
    F.cross_entropy(model(*drawn.inputs[0]), drawn.targets, reduction="sum").backward()
    network = netsurgery.trace(model, data[0][:2])
    checked = 0
    for group in network.prunable:
        readers = [m for m in group.members if m.role == "consumes"]
        if not readers or any(network.axes[m.parameter][m.axis] is not group.channel for m in readers):
            continue
        checked += 1
        expected = torch.zeros(group.size, dtype=torch.float64)
        for member in readers:
            parameter = network.tensors[member.parameter]
            product = (parameter.grad * parameter).detach().movedim(member.axis, 0)  # type: ignore[operator]
            expected += product.flatten(1).sum(1)
        torch.testing.assert_close(found[group.name].sum(0), expected, rtol=1e-9, atol=1e-12)
    assert checked


class Twice(nn.Module):
    """Each sample goes through with its mirror image, side by side in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(torch.cat([x, x.flip(3)])).mean((2, 3)))
        one, other = torch.relu(self.b(x)).chunk(2)
        return self.head(one * other)


class Recurrent(nn.Module):
    """Units that are read at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 5, batch_first=True), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.mean(1))[0][:, -1])


@pytest.mark.parametrize(("build", "name", "readers"), [
    (Twice, "a", ["b.weight"]), (Recurrent, "lstm", ["lstm.weight_hh_l0", "head.weight"]),
])  # fmt: skip
def test_slopes_of_each_sample(build: Callable[[], nn.Module], name: str, readers: list[str]) -> None:
    """As when the weights that read a unit are scaled, one sample alone."""
    model = randomised(build())
    data = data_for(model)
    found = slopes(model, data)[name]
    drawn = draw_samples(data, 12)
    parameters = [dict(model.named_parameters())[reader] for reader in readers]
    for row in (0, 7):
        loss = F.cross_entropy(model(drawn.inputs[0][0][row : row + 1]), drawn.targets[row : row + 1])
        gradients = torch.autograd.grad(loss, parameters)
        expected = sum((p * g).sum(0) for p, g in zip(parameters, gradients, strict=True))
        torch.testing.assert_close(found[row], expected, rtol=1e-9, atol=1e-12)


def test_slopes_of_units_in_half_precision_among_others() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(8, 6), nn.Linear(6, 5).half(), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.b(torch.relu(self.a(x.mean((1, 2)))).half()).float()))

    found = slopes(Mixed(), tuple(t.float() if t.is_floating_point() else t for t in data_for(nn.Identity())))
    assert {name: bool(slope.abs().sum() > 0) for name, slope in found.items()} == {"a": True, "b": True}


def test_a_network_that_may_lose_nothing_has_no_scores() -> None:
    network = netsurgery.trace(nn.Linear(4, 3), torch.zeros(1, 4))
    assert not TaylorScore((torch.zeros(2, 4), torch.zeros(2).long())).run(network).scores


def test_scores_are_means_over_the_samples() -> None:
    model = NETWORKS["residual"]()
    data = data_for(model)
    network = netsurgery.trace(model, data[0][:2])
    found = slopes(model, data)
    for name, a in found.items():
        for one, expected in (
            (TaylorScore(data, samples=12), a.abs().mean(0)),
            (TaylorScore(data, samples=12, order=2), (a**2 / 2 - a).abs().mean(0)),
            (TaylorScore(data, samples=12, order=2, by="rise"), (a**2 / 2 - a).mean(0)),
            (FisherScore(data, samples=12, rows=5), (a**2).mean(0) / 2),
        ):
            torch.testing.assert_close(one.run(network).scores[name], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("by", ["effect", "rise"])
def test_slopes_predict_small_removals(by: Reading) -> None:
    """Units that matter little: the second order predicts the change of the loss, to a third of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    model[2].weight.data *= 0.02
    data = torch.randn(200, 6).double(), torch.randint(3, (200,))
    network = netsurgery.trace(model, data[0][:2])
    exact = LossIncreaseScore(data, samples=200, by=by).run(network).scores["0"]
    predicted = TaylorScore(data, samples=200, order=2, by=by).run(network).scores["0"]
    assert float((exact - predicted).abs().max()) < float(exact.abs().max()) / 3


def test_an_order_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InputError, match=r"TaylorScore\(order=3\): 1 or 2"):
        TaylorScore((), order=3)  # type: ignore[arg-type]


def test_pruning_by_them() -> None:
    model = NETWORKS["flattened"]()
    data = data_for(model)
    for score in (TaylorScore(data), FisherScore(data)):
        edit = netsurgery.plan(model, [score, PruneChannels(0.5)], data[0][:2])
        assert netsurgery.verify(model, netsurgery.rewrite(model, edit), edit, data[0][:2]) < 1e-10
