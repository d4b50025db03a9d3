"""New units that would learn fastest: chosen among draws by the gradients of the weights that read them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import netsurgery
from netsurgery import Edit, New
from netsurgery.errors import InputError, PassError
from netsurgery.passes import GradMax, PlantChannels, Planting, WidenChannels
from test_inner_products import Attention, fused


def data(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(96, *shape, generator=generator)
    return x, x.flatten(1)[:, :3].abs().argmax(1)


class Block(nn.Module):
    """A residual stream: several layers make it, and several read it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.up, self.down = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.last = nn.Linear(6 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        return self.last((x + self.down(self.up(x).relu())).flatten(1))


def tokens() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 12), Attention(fused), nn.Flatten(), nn.Linear(12 * 4, 3))


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dense": (dense, (5,)), "residual": (Block, (3, 4, 4)), "tokens": (tokens, (4, 5)),
}  # fmt: skip


def readers_gradient(model: nn.Module, edit: Edit, group: str, samples: tuple[Tensor, Tensor]) -> float:
    """By hand: the norm of the gradient at the zeros that hide one group's new units, planted alone."""
    alone = Edit(edit.network, {name: edit.keep[name] for name in edit.network.equal_to(group)})
    grown = netsurgery.rewrite(model, alone)
    F.cross_entropy(grown(samples[0]), samples[1]).backward()
    total = 0.0
    for name, parameter in grown.named_parameters():
        new, grad = alone.positions.new_entries(alone.network.axes[name]), parameter.grad
        if new is not None and grad is not None:
            total += float(grad[new & (parameter == 0)].square().sum())
    return total**0.5


@pytest.mark.parametrize("name", NETS)
def test_gradients_are_the_largest_of_all_draws(name: str) -> None:
    make, shape = NETS[name]
    torch.manual_seed(0)
    model, samples = make().eval(), data(*shape)
    plain = netsurgery.plan(model, [PlantChannels(1)], samples[0])
    best = netsurgery.plan(model, [PlantChannels(1), GradMax(samples, samples=96, candidates=6)], samples[0])
    assert best.counts == plain.counts and len(best.keep) >= 2
    assert torch.allclose(netsurgery.rewrite(model, best)(samples[0]), model(samples[0]), atol=1e-5)
    for group in best.keep:
        if best.network.equal_to(group)[0] != group:
            continue
        (chosen,) = [unit for unit in best.keep[group] if isinstance(unit, New)]
        draws = [
            readers_gradient(model, Edit(best.network, {**best.keep, **dict.fromkeys(
                best.network.equal_to(group), (*range(best.network[group].size), New(seed=seed)))}), group, samples)
            for seed in range(6)
        ]  # fmt: skip
        if len(best.network.equal_to(group)) == 1:
            assert draws[chosen.seed] == max(draws) > min(draws)


def test_it_learns_faster() -> None:
    torch.manual_seed(0)
    model, (x, y) = dense(), data(5)

    def after(passes: list[Any]) -> float:
        net = copy.deepcopy(model)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        plant = Planting(net, x, edit=netsurgery.plan(net, passes, x), optimizer=optimizer)
        for _ in range(20):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        return F.cross_entropy(plant.finish()(x), y).item()

    random = [after([PlantChannels(2, seed=100 * seed)]) for seed in range(5)]
    assert after([PlantChannels(2), GradMax((x, y), candidates=16)]) < min(random)


def test_the_model_and_the_random_state_stay() -> None:
    model, samples = dense(), data(5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    passes = [PlantChannels({"0": 2}), GradMax(samples)]
    edit = netsurgery.plan(model, passes, samples[0])
    assert edit == netsurgery.plan(model, passes, samples[0])
    assert torch.equal(state, torch.get_rng_state()) and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    again = Edit.from_json(edit.to_json(), edit.network)
    assert again == edit and len({unit.seed for unit in edit.keep["0"][8:] if isinstance(unit, New)}) == 2


def test_batches_add_up() -> None:
    model, samples = Block().eval(), data(3, 4, 4)
    one, other = (
        netsurgery.plan(model, [PlantChannels(2), GradMax(samples, rows=rows)], samples[0]) for rows in (96, 7)
    )
    assert one == other


X = data(5)
NANS = X[0] * torch.nan, X[1]
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: GradMax(X, candidates=0), InputError, r"GradMax\(candidates=0\): a whole number of at least 1"),
    (lambda: GradMax(None), InputError, "GradMax.data=None.: pass the samples, with labels"),
    (lambda: netsurgery.plan(dense(), [GradMax(X)], X[0]), PassError, r"edit, .*: put PlantChannels\(8\) before"),
    (lambda: netsurgery.plan(dense(), [WidenChannels(2), GradMax(X)], X[0]), InputError, "adds none: put"),
    (lambda: netsurgery.plan(dense(), [PlantChannels(2), GradMax(X[0])], X[0]), InputError, "label|target"),
    (lambda: netsurgery.plan(dense(), [PlantChannels(2), GradMax(NANS)], X[0]), InputError, "not finite"),
    (lambda: PlantChannels(2, init="gradmax"), InputError, r"the pass GradMax\(data\) behind PlantChannels"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(case: int) -> None:
    make, error, message = BAD[case]
    with pytest.raises(error, match=message):
        make()


def test_logits_that_are_no_classes_of_the_labels_are_named() -> None:
    """As of a language model, whose classes are last."""
    words = torch.randint(0, 9, (16, 4), generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 9))
    with pytest.raises(InputError, match=r"neither classes nor their shares: pass loss=f\(outputs, targets\)"):
        netsurgery.plan(model, [PlantChannels(2), GradMax((words, words))], words[:1])

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.movedim(-1, 1), targets)

    edit = netsurgery.plan(model, [PlantChannels(2), GradMax((words, words), loss=loss)], words[:1])
    assert len(edit.grown) == 2
