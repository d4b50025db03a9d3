"""Soft filter pruning: published numbers, what is done to weights, that the end is exact, and in training loops."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import prune

import netsurgery
import zoo
from netsurgery.errors import InputError
from netsurgery.models import CifarResNet, resnet20, resnet32, resnet56, resnet110
from netsurgery.passes import SoftPruning
from netsurgery.passes.filter_positions import filters_of_layers, norms, published_macs
from netsurgery.passes.soft import hard_share, pruned_share, soft_factor
from zoo import randomise

METHODS = ("sfp", "asfp", "srfp", "asrfp", "hfp", "ghfp")
GROUPINGS = ("layer", "coupled")
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=1e-1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.005, momentum=0.9, centered=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.01, weight_decay=1e-2),
}


# Published numbers ---------------------------------------------------------------------------------------------------


def test_checkpoints_of_the_schedules() -> None:
    assert [round(soft_factor(t, 200), 3) for t in (25, 50)] == [0.237, 0.056]
    assert [round(hard_share(t, 200), 3) for t in (25, 100)] == [0.341, 0.879]
    assert pruned_share(25, 200, 0.4) == pytest.approx(0.3)  # after an eighth of the epochs three quarters
    assert pruned_share(50, 200, 0.4, delay=1 / 4) == pytest.approx(0.3)
    assert soft_factor(199, 200, start=0.0) == 0


@pytest.mark.parametrize("epochs", [1, 2, 5, 20, 57, 200])
def test_ends_of_the_schedules(epochs: int) -> None:
    shares = [pruned_share(t, epochs, 0.4) for t in range(epochs)]
    assert shares == sorted(shares) and shares[-1] == 0.4
    assert shares.count(0.4) == max(1, epochs // 20)  # pinned for the last 5%
    assert [pruned_share(t, 10, 0.4, pinned=0.3) for t in range(10)].count(0.4) == 3
    factors = [soft_factor(t, epochs) for t in range(epochs)]
    assert factors == sorted(factors, reverse=True)
    assert factors.count(0.0) == max(1, epochs // 10)  # for the last 10%
    hard = [hard_share(t, epochs) for t in range(epochs)]
    assert hard == sorted(hard) and hard[-1] == 1.0


DROPS = {
    resnet20: (15.2, 29.3, 42.2, 54.0),
    resnet32: (14.9, 28.8, 41.5, 53.2),
    resnet56: (14.7, 28.4, 41.1, 52.6),
    resnet110: (14.6, 28.2, 40.8, 52.3),
}  # percent of the FLOPs at 10, 20, 30 and 40% of the filters


@pytest.mark.parametrize("build", DROPS)
def test_published_flops(build: Callable[[], CifarResNet]) -> None:
    network = netsurgery.trace(build().to("meta"), (torch.empty(1, 3, 32, 32, device="meta"),))
    sizes = {name: filters.size for name, (_, filters) in filters_of_layers(network).items()}
    assert len(sizes) == 2 * len([n for n in sizes if n.endswith("conv1.weight")]) + 1  # two of a block, and the stem
    whole = published_macs(network, {})
    found = [
        round(100 * (1 - published_macs(network, {n: share * size for n, size in sizes.items()}) / whole), 1)
        for share in (0.1, 0.2, 0.3, 0.4)
    ]
    assert tuple(found) == DROPS[build]


# What is done to weights ---------------------------------------------------------------------------------------------


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 10, 3), nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, 7, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(7 * 16, 3),
    )  # fmt: skip


def images(n: int = 6, channels: int = 2, side: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, channels, side, side, generator=torch.Generator().manual_seed(0)).to(dtype)


def by_hand(weight: Tensor, hard: set[int], share: float, factor: float, hard_part: float) -> tuple[Tensor, set[int]]:
    """W * (M + a (1 - M)) * H, filter by filter."""
    order = sorted(range(len(weight)), key=lambda i: (i not in hard, math.sqrt(float(weight[i].square().sum())), i))
    pruned = order[: math.floor(len(weight) * share + 1e-9)]
    gone = set(order[: math.floor(len(weight) * share * hard_part + 1e-9)])
    scales = [0.0 if i in gone else factor if i in pruned else 1.0 for i in range(len(weight))]
    return weight * torch.tensor(scales, dtype=weight.dtype).view(-1, 1, 1, 1), gone


@pytest.mark.parametrize("method", METHODS)
def test_the_update(method: str) -> None:
    model, epochs, ratio = small_net().double(), 20, 0.3
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruning = SoftPruning(
        model, images(dtype=torch.float64), method=method, ratio=ratio, epochs=epochs, optimizer=optimizer  # type: ignore[arg-type]
    )  # fmt: skip
    layers = [model[0].weight, model[3].weight]
    hard: list[set[int]] = [set(), set()]
    for t in range(epochs):
        share = ratio * (1 - math.exp(-8 * math.log(4) * t / epochs)) if method.startswith("a") and t < 19 else ratio
        soft = method in ("srfp", "asrfp", "ghfp") and t < 18
        factor = math.exp(t / epochs * math.log(1e-5 / (1 + 1e-7))) if soft else 0.0
        part = {"hfp": 1.0, "ghfp": 1 - (1 - (t + 1) / epochs) ** 3}.get(method, 0.0) if t < 19 else 1.0
        assert pruning.epoch == t - 1
        with torch.no_grad():
            for i, weight in enumerate(layers):
                weight += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(10 * t + i))
                for row in hard[i]:
                    weight[row] = 0  # training leaves these alone
        expected = [by_hand(w.detach().clone(), h, share, factor, part) for w, h in zip(layers, hard, strict=True)]
        hard = [gone for _, gone in expected]
        pruning.step(t)
        assert pruning.schedule == pytest.approx((share, factor, part), abs=1e-12)
        for weight, (wanted, _) in zip(layers, expected, strict=True):
            torch.testing.assert_close(weight.detach(), wanted, rtol=1e-12, atol=1e-12)
        found = [set(pruning.hard[n].nonzero().flatten().tolist()) for n in ("0.weight", "3.weight")]
        assert found == hard
    assert [len(one) for one in hard] == [3, 2]


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_pruning_before_training(grouping: str) -> None:
    """As SFP's authors do: the initial weights are pruned once, all may come back in the first epoch."""
    model = small_net()
    pruning = SoftPruning(
        model, images(), method="sfp", ratio=0.3, epochs=2, grouping=grouping, before_training=True  # type: ignore[arg-type]
    )  # fmt: skip
    assert (pruning.epoch, pruning.schedule) == (-2, (0.0, 1.0, 0.0))
    assert "0 of 2 epochs done" in str(pruning)
    before = model[0].weight.detach().clone()
    pruning.step(-1)
    assert (pruning.epoch, pruning.schedule) == (-1, (0.3, 0.0, 0.0))
    assert "0 of 2 epochs done" in str(pruning)
    weakest = before.flatten(1).norm(dim=1).argsort()[:3]
    expected = before.clone()
    expected[weakest] = 0
    assert model[0].weight.equal(expected)
    assert int((model[3].weight.flatten(1).norm(dim=1) == 0).sum()) == 2
    train(model, torch.optim.SGD(model.parameters(), 0.05), images())
    assert bool(model[0].weight[weakest].any())  # they come back
    pruning.step(0)
    pruning.step(1)
    assert pruning.finish()[0].out_channels == 7


def test_pruning_before_training_for_good() -> None:
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    pruning = SoftPruning(model, images(), method="hfp", ratio=0.3, epochs=2, optimizer=optimizer, before_training=True)
    pruning.step(-1)
    gone = model[0].weight.flatten(1).norm(dim=1) == 0
    assert int(gone.sum()) == 3 and pruning.schedule == (0.3, 0.0, 1.0)
    train(model, optimizer, images())
    assert not model[0].weight[gone].any() and not model[1].bias[gone].any()


@pytest.mark.parametrize("settle", [0.0, 1.0])
def test_pruning_before_training_may_be_left_out_and_goes_on(settle: float) -> None:
    def build(before_training: bool) -> SoftPruning:
        model = small_net()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        return SoftPruning(
            model, images(), method="sfp", ratio=0.3, epochs=2, settle=settle, optimizer=optimizer,
            before_training=before_training,
        )  # fmt: skip

    one, other, without = build(True), build(True), build(False)
    one.step(0)
    without.step(0)
    assert all(one.pruned[name].equal(without.pruned[name]) for name in one.pruned)
    fresh = build(True)
    fresh.step(-1)
    other.load_state_dict(fresh.state_dict())
    assert other.epoch == -1 and all(other.pruned[name].equal(fresh.pruned[name]) for name in fresh.pruned)
    with pytest.raises(InputError, match=r"step\(-1\): expected an epoch from 0 to 1"):
        other.step(-1)
    with pytest.raises(InputError, match=r"the state is of before_training=True, here it is False"):
        without.load_state_dict(fresh.state_dict())


def test_states_of_before_know_nothing_of_pruning_before_training() -> None:
    pruning = SoftPruning(small_net(), images(), method="sfp", ratio=0.3, epochs=2)
    pruning.step(0)
    state = pruning.state_dict()
    del state["settings"]["before_training"]
    other = SoftPruning(small_net(), images(), method="sfp", ratio=0.3, epochs=2)
    other.load_state_dict(state)
    assert other.epoch == 0


def test_soft_filters_keep_their_norm_and_hard_ones_do_not() -> None:
    model = small_net()
    randomise(model.eval(), images(8))
    bias, own = model[1].bias.detach().clone(), model[0].bias.detach().clone()
    pruning = SoftPruning(model, images(), method="sfp", ratio=0.3, epochs=2)
    pruning.step(0)
    gone = pruning.pruned["0.weight"]
    assert int(gone.sum()) == 3 and not pruning.hard["0.weight"].any()
    assert not model[0].weight[gone].any() and model[0].bias.equal(own)
    assert model[1].bias.equal(bias) and model[1].weight.all()
    pruning.step(1)
    assert pruning.hard["0.weight"].equal(pruning.pruned["0.weight"])
    gone = pruning.hard["0.weight"]
    assert not model[1].weight[gone].any() and not model[1].bias[gone].any() and not model[0].bias[gone].any()
    assert model[1].weight[~gone].all() and model[1].bias[~gone].equal(bias[~gone])


def test_a_share_that_is_whole_but_for_rounding() -> None:
    pruning = SoftPruning(nn.Sequential(nn.Conv2d(1, 100, 1), nn.Conv2d(100, 1, 1)), ratio=0.29, epochs=1, method="sfp")
    pruning.step(0)
    assert int(100 * 0.29) == 28 and int(pruning.pruned["0.weight"].sum()) == 29


def test_coupled_units_are_ranked_over_all_that_produces_them() -> None:
    model = stream(dtype=torch.float32)
    pruning = SoftPruning(model, images(4, 3, 8), method="sfp", ratio=0.25, epochs=1, grouping="coupled")
    producers = [model.stem[0].weight, *(block.conv2.weight for block in model.stages[0])]
    size = sum(p.detach().double().flatten(1).square().sum(1) for p in producers).sqrt()
    torch.testing.assert_close(norms(pruning._filters["stem.0"], dict(model.named_parameters())), size)
    pruning.step(0)
    assert pruning.pruned["stem.0"].nonzero().flatten().tolist() == [int(size.argmin())]


def test_what_is_pruned_for_good_stays_the_first_in_rank() -> None:
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruning = SoftPruning(model, images(), method="hfp", ratio=0.3, epochs=3, optimizer=optimizer)
    with torch.no_grad():
        model[0].weight[7:] *= 1e-3
    pruning.step(0)
    with torch.no_grad():
        model[0].weight[:3] = 0
    pruning.step(1)
    assert pruning.hard["0.weight"].nonzero().flatten().tolist() == [7, 8, 9]


def test_only_the_norms_of_pruned_filters_are_zero() -> None:
    model = stream(dtype=torch.float32)
    pruning = SoftPruning(model, images(4, 3, 8), method="sfp", ratio=0.5, epochs=1)
    pruning.step(0)
    pairs = [("stem.0", "stem.1")] + [
        (f"stages.{i}.{j}.conv{k}", f"stages.{i}.{j}.bn{k}") for i in range(3) for j in range(2) for k in (1, 2)
    ]
    for conv, norm in pairs:
        for name in ("weight", "bias"):
            assert model.get_parameter(f"{norm}.{name}").eq(0).equal(pruning.pruned[f"{conv}.weight"]), norm
    assert model.get_parameter("stages.1.0.shortcut.1.bias").all()


# The end is exact ----------------------------------------------------------------------------------------------------


def stream(shortcut: str = "B", dtype: torch.dtype = torch.float64, side: int = 8) -> CifarResNet:
    torch.manual_seed(0)
    model = CifarResNet(14, widths=(4, 8, 12), shortcut=shortcut).to(dtype).eval()  # type: ignore[arg-type]
    randomise(model, images(8, 3, side, dtype))
    return model


class Mixed(nn.Module):
    """Depthwise, grouped, transposed and dilated kernels, concatenation, chunks, a gate, PReLU, flattening."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.grouped, self.prelu = nn.Conv2d(8, 12, 3, padding=1, groups=2), nn.PReLU(12)
        self.side = nn.Conv2d(3, 5, 1)
        self.up, self.halves = nn.ConvTranspose2d(17, 6, 2), nn.Conv2d(6, 10, 1)
        self.squeeze, self.expand = nn.Conv2d(5, 3, 1), nn.Conv2d(3, 5, 1)
        self.hidden, self.last = nn.Linear(5 * 81, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm2(self.depthwise(F.relu(self.norm(self.first(x))))))
        y = torch.cat([self.prelu(self.grouped(y)), F.relu(self.side(x))], 1)
        a, b = self.halves(F.relu(self.up(y))).chunk(2, 1)
        y = F.relu(a) * F.relu(b)
        gate = torch.sigmoid(self.expand(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        hidden = F.relu(self.hidden((y * gate).flatten(1)))
        last: Tensor = self.last(hidden)
        return last


def mixed() -> Mixed:
    torch.manual_seed(0)
    model = Mixed().double().eval()
    randomise(model, images(8, 3, 8, torch.float64))
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, steps: int = 2) -> None:
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def assert_exact(model: nn.Module, pruning: SoftPruning, x: Tensor, tolerance: float = 1e-10) -> nn.Module:
    edit = pruning.plan()
    small = pruning.finish().eval()
    with torch.no_grad():
        assert relative(small(x), model.eval()(x)) < tolerance
    assert netsurgery.verify(model, small, edit, (x,)) < tolerance
    assert netsurgery.cost(small, (x,)) == edit.after
    return small


@pytest.mark.parametrize(
    "build", [lambda: stream("A"), lambda: stream("B"), mixed], ids=["zeros", "projected", "mixed"]
)
@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("method", ["asfp", "ghfp"])
def test_the_end_is_exact(build: Callable[[], nn.Module], grouping: str, method: str) -> None:
    model, x = build(), images(4, 3, 8, torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    pruning = SoftPruning(
        model, x, method=method, ratio=0.5, epochs=3, grouping=grouping, optimizer=optimizer,  # type: ignore[arg-type]
        roles=("convolution", "linear") if grouping == "layer" else ("convolution",),
    )  # fmt: skip
    for epoch in range(3):
        train(model, optimizer, x)
        pruning.step(epoch)
    before = netsurgery.cost(model, (x,))
    small = assert_exact(model, pruning, x)
    after = netsurgery.cost(small, (x,))
    assert after.macs < (0.8 if grouping == "layer" else 0.5) * before.macs
    assert type(small) is type(model) and list(small.state_dict()) == list(model.state_dict())


class Summed(nn.Module):
    """A norm after a sum, and a chunk whose halves must stay equally wide."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.halves, self.left, self.right = nn.Conv2d(6, 8, 1), nn.Conv2d(4, 5, 1), nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.halves(F.relu(self.norm(self.a(x) + self.b(x)))).chunk(2, 1)
        return self.left(F.relu(one)).mean((2, 3)) + self.right(F.relu(other)).mean((2, 3))  # type: ignore[no-any-return]


def test_layer_by_layer_behind_a_sum_and_in_equal_parts() -> None:
    torch.manual_seed(0)
    model, x = Summed().double().eval(), images(4, 3, 8, torch.float64)
    randomise(model, x)
    pruning = SoftPruning(model, x, method="sfp", ratio=0.5, epochs=1)
    with torch.no_grad():
        for weight, rows in (
            (model.a.weight, [1, 2, 3]),
            (model.b.weight, [2, 3, 4]),
            (model.halves.weight, [0, 1, 3, 6]),
        ):
            weight[rows] *= 1e-3
    pruning.step(0)
    assert model.norm.bias.eq(0).nonzero().flatten().tolist() == [2, 3]
    small = assert_exact(model, pruning, x)
    assert [small.a.out_channels, small.halves.out_channels] == [4, 6]  # one of each half: 0 and 6  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("name", zoo.REPRESENTATIVES)
def test_the_zoo(name: str, grouping: str) -> None:
    model, x = zoo.build(name), zoo.images(name)
    pruning = SoftPruning(model, (x,), method="sfp", ratio=0.4, epochs=1, grouping=grouping)  # type: ignore[arg-type]
    pruning.step(0)
    edit, small = pruning.plan(), pruning.finish()
    assert grouping == "layer" or edit.after.macs < 0.7 * edit.before.macs
    assert bool(pruning._leaks) == (name == "convnext_tiny")  # the layer norms over its streams
    with torch.no_grad():
        assert relative(small(x), model(x)) < 1e-5


def test_a_stream_stays_wide_layer_by_layer() -> None:
    model, x = stream(), images(4, 3, 8, torch.float64)
    pruning = SoftPruning(model, x, method="sfp", ratio=0.5, epochs=1)
    with torch.no_grad():  # one unit of the first stage's stream is the smallest of every layer that produces it
        for weight in (model.stem[0].weight, *(block.conv2.weight for block in model.stages[0])):
            weight[3] *= 1e-3
    pruning.step(0)
    small = assert_exact(model, pruning, x)
    assert small.stem[0].out_channels == 3  # type: ignore[index, union-attr]
    widths = {n: m.weight.shape[0] for n, m in small.named_modules() if isinstance(m, nn.Conv2d)}
    assert all(widths[f"stages.1.{i}.conv1"] == 4 and widths[f"stages.1.{i}.conv2"] == 8 for i in range(2))
    assert all(widths[f"stages.2.{i}.conv1"] == 6 and widths[f"stages.2.{i}.conv2"] == 12 for i in range(2))


def test_published_count_is_that_of_zeros() -> None:
    """Filters and channels that are zero when the network runs, counted."""
    model, x = stream("B", torch.float32), images(64, 3, 8)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, 1.0)  # what is not pruned is alive
    with torch.no_grad():  # no unit of the stream is pruned by all that produce it
        model.stem[0].weight[0] *= 1e-3
        model.stages[0][0].conv2.weight[1] *= 1e-3
    pruning = SoftPruning(model, x[:1], method="sfp", ratio=0.3, epochs=1)
    pruning.step(0)
    found: list[int] = []

    def count(module: nn.Module, arguments: tuple[Tensor], out: Tensor) -> None:
        read = arguments[0].abs().amax((0, 2, 3)).count_nonzero()
        made = module.weight.flatten(1).abs().amax(1).count_nonzero()  # type: ignore[operator, union-attr]
        found.append(int(read * made) * module.weight[0, 0].numel() * out[0, 0].numel())  # type: ignore[index, union-attr]

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)  # type: ignore[arg-type]
    with torch.no_grad():
        model.eval()(x)
    counts = {name: int(mask.sum()) for name, mask in pruning.pruned.items()}
    assert published_macs(pruning._network, counts) == sum(found)
    assert published_macs(pruning._network, {}) > sum(found)


def test_silenced_is_what_finish_leaves() -> None:
    model, x = stream(), images(4, 3, 8, torch.float64)
    pruning = SoftPruning(model, x, method="srfp", ratio=0.5, epochs=4, grouping="coupled")
    pruning.step(1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        plain = model(x)
        with pruning.silenced() as same:
            assert same is model
            silent = model(x)
        with pytest.raises(ZeroDivisionError), pruning.silenced():
            1 / 0  # noqa: B018
        edit = pruning.plan()
        assert relative(netsurgery.rewrite(model, edit)(x), silent) < 1e-10
        assert relative(plain, silent) > 1e-2
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_finish_silences_what_came_back() -> None:
    model, x = stream(), images(4, 3, 8, torch.float64)
    pruning = SoftPruning(model, x, method="sfp", ratio=0.5, epochs=1, grouping="coupled")
    pruning.step(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    assert_exact(model, pruning, x)


class Leaky(nn.Module):
    """Units that are not nothing where their weights are zero: behind a sigmoid, in a layer norm; and one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm, self.last = nn.LayerNorm(6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        last: Tensor = self.last(self.norm(self.c(F.relu(self.b(torch.sigmoid(self.a(x)))))))
        return last


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_units_that_are_not_nothing_at_zero_stay(grouping: str) -> None:
    model, x = Leaky(), torch.randn(3, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruning = SoftPruning(
        model, x, method="hfp", ratio=0.5, epochs=1, grouping=grouping, roles=["linear"], optimizer=optimizer  # type: ignore[arg-type]
    )  # fmt: skip
    assert "Units of these would not be nothing if their weights were zero: a, c." in str(pruning)
    assert (set(pruning.pruned) == {"b"}) == (grouping == "coupled")
    pruning.step(0)
    small = assert_exact(model, pruning, x, 1e-5)
    assert [small.a.out_features, small.b.out_features, small.c.out_features] == [6, 3, 6]  # type: ignore[union-attr]


class Routed(nn.Module):
    """Code that looks at an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.first(x))
        last: Tensor = self.last(hidden if hidden.sum() > 1 else -hidden)
        return last


def test_code_that_decides_by_values_is_refused() -> None:
    with pytest.raises(InputError, match="the code of Routed decides by the values of activations"):
        SoftPruning(Routed(), torch.randn(3, 4), ratio=0.5, epochs=1, grouping="coupled")


def test_a_fresh_norm_hides_no_leak() -> None:
    """A residual branch that starts at zero would hide what its inner units do."""
    model = Leaky()
    nn.init.zeros_(model.last.weight)
    pruning = SoftPruning(model, torch.randn(3, 4), ratio=0.5, epochs=1, grouping="coupled")
    assert list(pruning.pruned) == ["b"]


# Hard filters stay at zero -------------------------------------------------------------------------------------------


def assert_held(model: nn.Module, optimizer: torch.optim.Optimizer, pruning: SoftPruning) -> int:
    """Weights, gradients and what the optimizer keeps are zero where filters are gone; how many numbers these are."""
    parameters, count = dict(model.named_parameters()), 0
    for (name, axis), positions in pruning._places(pruning.hard).items():
        parameter = parameters[name]
        kept = [v for v in optimizer.state[parameter].values() if torch.is_tensor(v) and v.shape == parameter.shape]
        for tensor in (parameter, parameter.grad, *kept):
            assert tensor is not None
            part = tensor.detach().index_select(axis, positions.nonzero().flatten())
            assert not part.any(), name
            count += part.numel()
    return count


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_hard_filters_stay_at_zero(name: str, grouping: str) -> None:
    model, x = stream(dtype=torch.float32), images(8, 3, 8)
    optimizer = OPTIMIZERS[name](model.parameters())
    pruning = SoftPruning(
        model, x, method="ghfp", ratio=0.5, epochs=4, grouping=grouping, optimizer=optimizer  # type: ignore[arg-type]
    )  # fmt: skip
    counts = []
    for epoch in range(4):
        for _ in range(3):
            train(model, optimizer, x, 1)
            counts.append(assert_held(model, optimizer, pruning))
        pruning.step(epoch)
        assert_held(model, optimizer, pruning)
    assert counts == sorted(counts) and counts[0] == 0 < counts[3] < counts[-1]
    assert_exact(model, pruning, x, 1e-4)


def test_soft_filters_come_back() -> None:
    model, x = stream(dtype=torch.float32), images(8, 3, 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    pruning = SoftPruning(model, x, method="sfp", ratio=0.5, epochs=9, optimizer=optimizer)
    train(model, optimizer, x)
    pruning.step(0)
    rows = pruning.pruned["stages.1.0.conv1.weight"]
    weight = model.stages[1][0].conv1.weight
    assert not weight[rows].any()
    train(model, optimizer, x)
    assert weight[rows].any()


def test_gradients_are_zero_before_they_are_clipped_or_unscaled() -> None:
    model, x = stream(dtype=torch.float32), images(8, 3, 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    pruning = SoftPruning(model, x, method="hfp", ratio=0.5, epochs=9, grouping="coupled", optimizer=optimizer)
    model.train()(x).sum().backward()
    pruning.step(0)
    assert_held(model, optimizer, pruning)  # what was accumulated before
    (model(x).sum() * float("inf")).backward()
    assert_held(model, optimizer, pruning)


def test_settled_filters_are_hard() -> None:
    model, x = stream(dtype=torch.float32), images(8, 3, 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    pruning = SoftPruning(model, x, method="asrfp", ratio=0.5, epochs=10, settle=0.3, optimizer=optimizer)
    shares = []
    for epoch in range(10):
        pruning.step(epoch)
        shares.append(pruning.schedule[2])
        assert (pruning.schedule[0] == 0.5) == (epoch > 6)  # what is to go is gone from then on
        train(model, optimizer, x, 1)
        assert_held(model, optimizer, pruning)
    assert shares == [0.0] * 7 + [1.0] * 3
    assert pruning.hard["stem.0.weight"].equal(pruning.pruned["stem.0.weight"])


def test_finish_lets_go() -> None:
    model, x = stream(dtype=torch.float32), images(8, 3, 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    pruning = SoftPruning(model, x, method="hfp", ratio=0.5, epochs=1, grouping="coupled", optimizer=optimizer)
    pruning.step(0)
    assert model.stem[0].weight._backward_hooks and optimizer._optimizer_step_post_hooks
    small = pruning.finish(inplace=True)
    assert small is model and not model.stem[0].weight._backward_hooks and not optimizer._optimizer_step_post_hooks
    assert model.stem[0].out_channels == 2
    train(model, torch.optim.SGD(model.parameters(), 0.05), x)


# Training loops ------------------------------------------------------------------------------------------------------


def test_resuming_changes_nothing() -> None:
    def build() -> tuple[CifarResNet, torch.optim.Optimizer, SoftPruning]:
        model = stream(dtype=torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        return model, optimizer, SoftPruning(model, x, method="ghfp", ratio=0.5, epochs=4, optimizer=optimizer)

    x = images(8, 3, 8)
    one, two = build(), build()
    for epoch in range(4):
        for model, optimizer, pruning in (one, two):
            train(model, optimizer, x)
            pruning.step(epoch)
        if epoch == 1:
            saved = [copy.deepcopy(part.state_dict()) for part in two]
            two = build()
            for part, state in zip(two[::-1], saved[::-1], strict=True):  # the pruning first
                part.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(one[0].parameters(), two[0].parameters(), strict=True))
    assert_held(two[0], two[1], two[2])


def test_state_can_be_saved_safely(tmp_path: Path) -> None:
    model = small_net()
    pruning = SoftPruning(model, images(), method="sfp", ratio=0.3, epochs=2)
    pruning.step(0)
    torch.save(pruning.state_dict(), tmp_path / "state.pt")
    fresh = SoftPruning(model, images(), method="sfp", ratio=0.3, epochs=2)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert str(fresh) == str(pruning) and fresh.epoch == 0


@pytest.mark.slow
def test_compiled_training_is_not_compiled_again() -> None:
    model, x = stream(dtype=torch.float32).train(), images(8, 3, 8)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    pruning = SoftPruning(compiled, x, method="ghfp", ratio=0.5, epochs=4, grouping="coupled", optimizer=optimizer)
    frames = []
    for epoch in range(3):
        train(compiled, optimizer, x)
        assert_held(model, optimizer, pruning)
        pruning.step(epoch)
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1] > 0
    pruning.step(3)
    assert_exact(model, pruning, x, 1e-4)


def test_under_autocast() -> None:
    model, x = stream(dtype=torch.float32), images(8, 3, 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu")
    pruning = SoftPruning(model, x, method="hfp", ratio=0.5, epochs=3, grouping="coupled", optimizer=optimizer)
    model.train()
    for epoch in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert_held(model, optimizer, pruning)
        pruning.step(epoch)
    assert_exact(model, pruning, x, 1e-4)


RANKS = """
import sys
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from netsurgery.passes import SoftPruning
from netsurgery.models import CifarResNet

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
for grouping in ("layer", "coupled"):
    torch.manual_seed(0)
    model = DistributedDataParallel(CifarResNet(8, widths=(4, 8, 12)))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=0.01)
    x = torch.randn(8, 3, 8, 8)[rank::2]
    pruning = SoftPruning(model, x, method="ghfp", ratio=0.5, epochs=3, grouping=grouping, optimizer=optimizer)
    for epoch in range(3):
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            for (name, axis), gone in pruning._places(pruning.hard).items():
                assert not model.module.get_parameter(name).index_select(axis, gone.nonzero().flatten()).any()
                assert not model.module.get_parameter(name).grad.index_select(axis, gone.nonzero().flatten()).any()
        pruning.step(epoch)
        mine = torch.cat([mask for masks in (pruning.pruned, pruning.hard) for mask in masks.values()]).int()
        both = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(both, mine)
        assert both[0].equal(both[1]) and both[0].any()
    pruning.finish()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_prune_alike(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANKS, str(rank), str(tmp_path / "store")],
            cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said


# Which filters take part, and errors ---------------------------------------------------------------------------------


def taking_part(model: nn.Module, x: Tensor, **options: Any) -> list[str]:
    return list(SoftPruning(model, x, **{"ratio": 0.5, "epochs": 1, **options}).pruned)


def test_which_layers_take_part() -> None:
    model, x = stream(dtype=torch.float32), images(1, 3, 8)
    blocks = [f"stages.{i}.{j}.conv{k}.weight" for i in range(3) for j in range(2) for k in (1, 2)]
    assert taking_part(model, x) == ["stem.0.weight", *blocks]
    assert "stages.1.0.shortcut.0.weight" in taking_part(model, x, roles=["convolution", "shortcut"])
    assert taking_part(model, x, include="stages.1") == blocks[4:8]
    assert taking_part(model, x, exclude=["stages.0", "*conv2", "stem.0"]) == blocks[4::2]
    assert taking_part(model, x, grouping="coupled", include="stem.0") == ["stem.0"]  # a group, by its name
    assert taking_part(model, x, grouping="coupled", include="*.conv1") == [
        f"stages.{i}.{j}.conv1" for i in range(3) for j in range(2)
    ]
    assert taking_part(model, x, exclude=[model.stages[0], nn.Linear, "*conv2", "stem.0"]) == blocks[4::2]
    assert "stem.0" not in taking_part(model, x, grouping="coupled", exclude="stages.0.1")
    assert taking_part(small_net(), images(), roles=["linear", "convolution"]) == ["0.weight", "3.weight"]


def test_depthwise_kernels_go_with_their_units() -> None:
    model, x = mixed(), images(4, 3, 8, torch.float64)
    assert "depthwise.weight" not in taking_part(model, x)
    pruning = SoftPruning(model, x, method="sfp", ratio=0.5, epochs=1)
    pruning.step(0)
    gone = pruning.pruned["first.weight"]
    for weight in (model.norm.bias, model.depthwise.weight, model.norm2.weight, model.norm2.bias):
        assert not weight[gone].any() and weight[~gone].flatten(1 if weight.dim() > 1 else 0).any()


def test_the_table() -> None:
    optimizer = torch.optim.SGD((model := small_net()).parameters(), 0.1)
    pruning = SoftPruning(model, images(), method="ghfp", ratio=0.3, epochs=4, optimizer=optimizer)
    pruning.step(1)
    assert str(pruning) == (
        "ghfp, layer, ratio 0.3, 2 of 4 epochs done. \n"
        "weight    filters  pruned  for good\n"
        "0.weight       10       3         2\n"
        "3.weight        7       2         1"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "fpgm"}, r"method='fpgm'\): one of sfp, asfp, srfp, asrfp, hfp, ghfp"),
        ({"grouping": "neuron"}, r"grouping='neuron'\): 'layer' or 'coupled'"),
        ({"ratio": 1.0}, r"ratio=1.0\): the share of filters that goes must be a number in \[0, 1\)"),
        ({"ratio": "half"}, r"ratio='half'\): the share of filters"),
        ({"epochs": 0}, r"epochs=0\): expected a whole number of at least 1"),
        ({"epochs": 2.5}, r"epochs=2.5\): expected a whole number"),
        (
            {"method": "asfp", "before_training": True},
            r"before_training=True\): for 'sfp' and 'hfp'; 'asfp' prunes noth",
        ),
        ({"method": "ghfp", "before_training": True}, r"'ghfp' prunes nothing before the first epoch"),
        (
            {"method": "hfp", "asymptotic": True, "before_training": True},
            r"'hfp' with asymptotic=True prunes nothing bef",
        ),
        ({"settle": 2}, r"settle=2\): the share of epochs must be a number in \[0, 1\]"),
        ({"method": "sfp", "asymptotic": True}, r"for 'hfp' and 'ghfp'; 'sfp' says it by its name"),
        ({"roles": "linear"}, r"roles='linear'\): expected a list of 'convolution', 'linear', 'shortcut'"),
        ({"method": "hfp"}, r"method='hfp', settle=0\) prunes filters for good .*: pass optimizer="),
        ({"settle": 0.1}, r"settle=0.1\) prunes filters for good .*: pass optimizer="),
        ({"include": "nowhere"}, "pattern 'nowhere' matches no module"),
        ({"exclude": "*"}, "nothing of Sequential takes part with these settings. Its groups:"),
    ],
)
def test_errors_of_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SoftPruning(small_net(), images(), **{"ratio": 0.5, "epochs": 3, **options})


def test_errors_of_models() -> None:
    with pytest.raises(InputError, match=r"expected a torch.nn.Module, got int"):
        SoftPruning(3, ratio=0.5, epochs=1)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"0.weight is on the meta device: filters are ranked by their weights"):
        SoftPruning(small_net().to("meta"), images(), ratio=0.5, epochs=1)
    other = torch.optim.SGD(small_net().parameters(), 0.1)
    with pytest.raises(InputError, match=r"the optimizer does not hold 0.weight: pass the one that does"):
        SoftPruning(small_net(), images(), method="hfp", ratio=0.5, epochs=1, optimizer=other)


def test_errors_of_steps() -> None:
    model = small_net()
    pruning = SoftPruning(model, images(), method="sfp", ratio=0.5, epochs=3)
    with pytest.raises(InputError, match=r"step\(2\) is still to come, the last was -1: call it to end here"):
        pruning.finish()
    pruning.step(1)
    for wrong in (1, 0, 3, -1, "1", 1.5):
        with pytest.raises(InputError, match=r"expected an epoch from 2 to 2"):
            pruning.step(wrong)  # type: ignore[arg-type]
    done = SoftPruning(small_net(), images(), method="sfp", ratio=0.5, epochs=1)
    done.step(0)
    with pytest.raises(InputError, match=r"step\(1\): all 1 epochs are done: call finish\(\)"):
        done.step(1)
    with torch.no_grad():
        model[3].weight[0, 0] = float("nan")
    before = model[0].weight.detach().clone()
    with pytest.raises(InputError, match=r"weights of 3.weight are NaN or infinite: training went astray"):
        pruning.step(2)
    assert model[0].weight.equal(before) and pruning.epoch == 1
    model[0] = nn.Conv2d(2, 9, 3)
    with pytest.raises(InputError, match=r"0.weight had shape \(10, 2, 3, 3\) and has \(9, 2, 3, 3\) now: build"):
        pruning.step(2)


def test_errors_of_states() -> None:
    state = SoftPruning(small_net(), images(), ratio=0.5, epochs=3).state_dict()
    other = SoftPruning(small_net(), images(), ratio=0.5, epochs=3, exclude="3")
    with pytest.raises(InputError, match=r"the state is of other filters: 3.weight has 7 there, none here"):
        other.load_state_dict(state)
    with pytest.raises(InputError, match=r"epoch 7 is not one of 3"):
        other.load_state_dict({**other.state_dict(), "epoch": 7})
    with pytest.raises(InputError, match="the state has no 'settings': pass one of state_dict"):
        other.load_state_dict({})
    with pytest.raises(InputError, match=r"the state is of ratio=0\.25, here it is "):
        other.load_state_dict({**other.state_dict(), "settings": {**other.state_dict()["settings"], "ratio": 0.25}})


def test_what_is_pruned_but_cannot_go_is_said(caplog: pytest.LogCaptureFixture) -> None:
    class Einsum(nn.Module):
        """For a single unit, einsum multiplies instead."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.w, self.head = nn.Linear(6, 8), nn.Parameter(torch.randn(8, 5)), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(torch.einsum("bi,ij->bj", self.a(x).relu(), self.w))
            return y

    x = torch.randn(4, 6)
    for ratio, said in ((0.5, ""), (0.99, "7 units of 'a' are pruned but stay, as zeros: the code does other things")):
        caplog.clear()
        model = Einsum()
        pruning = SoftPruning(model, x, method="sfp", ratio=ratio, epochs=1, grouping="coupled")
        pruning.step(0)
        assert torch.allclose(pruning.finish()(x), model(x), atol=1e-6)
        assert (said in caplog.text) if said else not caplog.text


def test_coupled_filters_are_ranked_by_the_weight_that_a_layer_uses() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
    mask = torch.ones(8, 3, 3, 3)
    mask[[1, 4, 6]] = 0
    prune.custom_from_mask(model[0], "weight", mask)
    with torch.no_grad():
        model[0].weight_orig[[1, 4, 6]] = 9.0  # large, but for nothing
    pruning = SoftPruning(model, torch.zeros(1, 3, 8, 8), method="sfp", ratio=0.375, epochs=1, grouping="coupled")
    pruning.step(0)
    (pruned,) = pruning.pruned.values()
    assert pruned.nonzero().flatten().tolist() == [1, 4, 6]
