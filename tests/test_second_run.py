"""What the run at other sizes notices: code that follows a size in any way but by its shapes."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import netsurgery
from netsurgery.errors import InputError, PassError
from netsurgery.passes import PruneChannels, RandomScore
from oracles import RandomKeep

X = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, run: Callable[..., Tensor]):
        super().__init__()
        self.run = run
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.d, self.e = nn.Linear(1, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, self.a(x)) + 0 * (self.e(self.c(self.a(x))) + self.d(x[:, :1]))


FOLLOWS = {
    "a constant made from a size": lambda m, h: m.b(h) / torch.sqrt(torch.tensor(float(h.shape[1]))),
    "an integer made from a size": lambda m, h: m.b(h) / torch.tensor(h.numel()),
    "a list made from a size": lambda m, h: m.b(h) / torch.as_tensor([h.shape[1], 2]).sum(),
    "a new tensor made from a size": lambda m, h: m.b(h) / h.new_tensor(h.shape[1]),
    "fewer operations": lambda m, h: m.b(h) * 3 if h.shape[1] >= 6 else m.b(h),
    "other tensors": lambda m, h: (lambda p, q: p - q if h.shape[1] >= 6 else q - p)(m.b(h), m.c(h)),
    "other results": lambda m, h: (m.e(m.c(h)), m.e(m.b(h)))[h.shape[1] >= 6],
    "an assertion": lambda m, h: m.b(h) if m.a.out_features == 8 else 1 / 0,
}


@pytest.mark.parametrize("name", FOLLOWS)
def test_code_that_follows_a_size_locks(name: str) -> None:
    torch.manual_seed(0)
    model = Net(FOLLOWS[name]).double().eval()
    network = netsurgery.trace(model, X)
    assert network["a"].locked and len(network.prunable) <= 1  # what else there is keeps its freedom
    small = netsurgery.rewrite(model, edit := RandomKeep(share=0.5).run(network))
    assert netsurgery.verify(model, small, edit, X) < 1e-10


def test_operations_left_out_at_the_end_lock() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(h) * 3 if h.shape[1] >= 6 else self.b(h)

    assert "does other things at other sizes" in (netsurgery.trace(Last().double(), X)["a"].locked or "")


def test_another_of_the_same_results_locks() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return (self.c(h), self.b(h))[h.shape[1] >= 6]

    assert "does other things at other sizes" in (netsurgery.trace(Last().double(), X)["a"].locked or "")


@pytest.mark.parametrize("seed", range(4))
def test_slices_from_the_end(seed: int) -> None:
    torch.manual_seed(0)
    model = Net(lambda m, h: m.d(h[:, -5:-4]) + m.c(h)).double().eval()
    with pytest.raises(InputError, match=r"start=\d is fixed by the code: aten.slice"):  # it would need another number
        netsurgery.plan(model, [RandomScore(seed), PruneChannels(0.5)], X)


class Trains(nn.Module):
    """Does something else in training, with all parameters used in eval mode."""

    def __init__(self, run: Callable[[Tensor], Tensor], inside: nn.Module | None = None):
        super().__init__()
        self.run = run
        self.a, self.inside, self.b = nn.Linear(4, 8), inside or nn.Identity(), nn.Linear(8, 2)
        self.noise = nn.Buffer(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.inside(self.a(x)) * self.noise.abs()
        return self.b(self.run(h) + self.noise if self.training else h)


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain if self.training else x + 0 * self.gain


def test_what_only_training_does_counts() -> None:
    network = netsurgery.trace(Trains(lambda h: h.flip(1)), torch.randn(1, 4))
    assert "identified by position: aten.flip" in (network["a"].locked or "")
    for model in (Trains(torch.relu), Trains(torch.relu, Gate())):
        x = torch.randn(3, 4)
        edit = netsurgery.plan(model, [RandomScore(), PruneChannels(0.5)], x)
        assert [program.mode for program in edit.network.programs] == ["eval", "train"]
        small = netsurgery.rewrite(model, edit)
        assert netsurgery.verify(model, small, edit, x) < 1e-6
        small.train()(x).sum().backward()


def test_random_training_code_is_not_replayed() -> None:
    model = Trains(lambda h: nn.functional.dropout(h, 0.5, training=True))
    edit = netsurgery.plan(model, [RandomScore(), PruneChannels(0.5)], torch.randn(3, 4))
    assert netsurgery.verify(model, netsurgery.rewrite(model, edit), edit, torch.randn(3, 4)) < 1e-6


def test_tied_prelus_follow() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.p, self.q, self.b = nn.Linear(4, 8), nn.PReLU(8), nn.PReLU(8), nn.Linear(8, 2)
            self.q.weight = self.p.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.q(self.p(self.a(x))))

    small = netsurgery.apply(Two(), [RandomScore(), PruneChannels(0.5)], torch.randn(1, 4))
    assert small.q.weight is small.p.weight and small.p.num_parameters == 4


def test_attributes_follow_however_a_module_is_called() -> None:
    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.l = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Linear(6, 4)
            self.out = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(input=self.a(input=x)).mean((-1, -2))
            return self.out(nn.functional.linear(y, self.l.weight, self.l.bias))

    for x in (torch.randn(1, 3, 5, 5), torch.randn(3, 5, 5)):  # a batch, and one image alone
        small = netsurgery.apply(Called(), [RandomScore(), PruneChannels(0.5)], x)
        assert (small.a.out_channels, small.b.in_channels, small.b.out_channels) == (4, 4, 3)
        assert (small.l.in_features, small.l.out_features) == (3, 2)


@pytest.mark.parametrize("seed", range(3))
def test_removals_compose_when_a_group_shrinks_to_one_unit(seed: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 1, groups=2), nn.Conv2d(12, 2, 1)).double()
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    passes = [RandomScore(seed), PruneChannels(0.5, unit="group"), RandomScore(seed + 1), PruneChannels(0.4)]
    edit = netsurgery.plan(model, passes, x)
    assert edit.counts == {"0": 1, "0:2": 3, "1": 4}  # one of 2 groups, then of its 4 inputs and 6 outputs
    assert netsurgery.verify(model, netsurgery.rewrite(model, edit), edit, x) < 1e-10


@pytest.mark.parametrize("units", [(0,) * 8, (0, 1, 2, 3, 4, 5, 6, 99), torch.tensor([1, 1])])
def test_edits_of_any_length_are_checked(units: object) -> None:
    network = netsurgery.trace(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)))
    with pytest.raises(InputError, match=r"must be distinct and in 0\.\.7"):
        netsurgery.Edit(network, {"0": units})  # type: ignore[dict-item]


def test_other_bad_input() -> None:
    network = netsurgery.trace(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)))
    with pytest.raises(InputError, match="'nope' is no group"):
        network["nope"]
    with pytest.raises(PassError, match="expected a list of passes"):
        netsurgery.apply(nn.Linear(2, 2), RandomScore())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected a number"):
        PruneChannels("0.5")  # type: ignore[arg-type]
    edit = netsurgery.Edit(network, {"0": (1, 2)})
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    with pytest.raises(InputError, match=r"traced with inputs of shapes \[\(1, 4\)\], got \[\(3, 4\)\]"):
        netsurgery.verify(model, netsurgery.rewrite(model, edit), edit, torch.randn(3, 4))


def test_inference_of_inputs_leaves_the_random_state() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    before = torch.get_rng_state()
    netsurgery.trace(model)
    assert torch.equal(before, torch.get_rng_state())


class Drawn(nn.Module):
    """Its code draws numbers with numpy and Python, in training too; one of them decides which way it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.noise = nn.Linear(4, 8), nn.Linear(8, 3), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        chosen = np.random.rand(*x.shape[:-1]) < 0.5  # noqa: NPY002
        if self.training:
            x = torch.where(torch.tensor(chosen)[..., None], x, self.noise)
        y = self.a(x) * torch.tensor(random.random(), dtype=x.dtype)
        return self.b(y.relu() if np.random.uniform() < 0.5 else y.tanh())  # noqa: NPY002


def test_numbers_that_code_draws_are_the_same_in_every_run() -> None:
    before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    for seed in range(3):
        torch.manual_seed(seed)
        network = netsurgery.trace(Drawn().double(), (torch.randn(5, 4, dtype=torch.float64),))
        assert network["a"].locked is None
    assert before == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
