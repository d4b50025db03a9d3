"""What a removal loses is made up for: exactly where it can be, and never silently not."""

from __future__ import annotations

import copy
import dataclasses
import logging
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

import netsurgery
from netsurgery.errors import InputError, PassError, RewriteError
from netsurgery.models import DigitsResNet
from netsurgery.passes import MagnitudeScore, PruneChannels, RandomScore, compensation, least_squares, lost, progress
from netsurgery.passes.calibration import draw_inputs
from netsurgery.passes.compensation import Compensate, Method, compensate
from netsurgery.passes.least_squares import windows
from oracles import RandomKeep, snapshot
from random_networks import Program, build, example, programs

torch.manual_seed(0)
IMAGES = torch.randn(48, 3, 8, 8, dtype=torch.float64)
OTHERS = torch.randn(16, 3, 8, 8, dtype=torch.float64)
DATA = IMAGES, torch.arange(48) % 4


@pytest.fixture(autouse=True)
def _the_same_in_any_order() -> None:
    torch.manual_seed(0)


def randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    model = model.double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                shape = module.running_mean.shape
                module.running_mean.copy_(torch.randn(shape, generator=generator))
                module.running_var.copy_(torch.rand(shape, generator=generator) + 0.5)
                module.weight.copy_(torch.rand(shape, generator=generator) + 0.5)
                module.bias.copy_(torch.randn(shape, generator=generator))
    return model


def removing(
    model: nn.Module, x: Tensor, method: str | None, data: Any = DATA, ridge: float = 1e-12, **units: list[int]
) -> netsurgery.Edit:
    """An edit without some units, compensated; the ridge is as good as none."""
    network = netsurgery.trace(model, (x[:2],))
    keep = {n: tuple(i for i in range(network[n].size) if i not in gone) for n, gone in units.items()}
    edit = netsurgery.Edit(network, keep)
    return compensate(edit, method, data, ridge=ridge) if method else edit


def error(model: nn.Module, edit: netsurgery.Edit, x: Tensor) -> float:
    """How far the smaller network is from the original, relative to its largest output; it equals the silenced one."""
    small = netsurgery.rewrite(model, edit)
    assert netsurgery.verify(model, small, edit, (x[:2],)) < 1e-9
    with torch.no_grad():
        wanted = model(x)
        return float((small(x) - wanted).abs().max() / wanted.abs().max())


# Constants ---------------------------------------------------------------------------------------------------------


class Constant(nn.Module):
    """Units 1 and 4 are the same number for every input and position: their batch norm has no scale."""

    def __init__(self, reader: nn.Module, norm: nn.Module | None = None, flat: bool = False) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.reader, self.after = reader, norm or nn.Identity()
        self.flat = flat
        self.last = nn.LazyConv2d(4, 1) if not flat else nn.LazyLinear(4)
        randomised(self)
        with torch.no_grad():
            self.norm.weight[[1, 4]] = 0
            self.norm.bias[[1, 4]] = torch.tensor([0.7, 1.9], dtype=torch.float64)
        self(IMAGES[:2])

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        return self.last(F.relu(self.after(self.reader(x.flatten(1) if self.flat else x))))


CONSTANT = {
    "1x1": lambda: Constant(nn.Conv2d(6, 5, 1)),
    "3x3, strides": lambda: Constant(nn.Conv2d(6, 5, 3, stride=2)),
    "two groups": lambda: Constant(nn.Conv2d(6, 4, 3, groups=2)),
    "flattened": lambda: Constant(nn.Linear(6 * 36, 7), flat=True),
    "a batch norm follows": lambda: Constant(nn.Conv2d(6, 5, 3, bias=False), nn.BatchNorm2d(5)),
    "a batch norm follows a linear layer": lambda: Constant(
        nn.Linear(6 * 36, 7, bias=False), nn.BatchNorm1d(7), flat=True
    ),
    "reflected": lambda: Constant(nn.Conv2d(6, 5, 3, padding=1, padding_mode="reflect")),
}


def constant_units(model: nn.Module) -> dict[str, list[int]]:
    """The units of the network that are these two channels; grouped convolutions pair them with others."""
    network = netsurgery.trace(model, (IMAGES[:2],))
    return {"first": [1, 4]} if network["first"].size == 6 else {"first:2": [1]}


@pytest.mark.parametrize("method", ["bias", "least-squares"])
@pytest.mark.parametrize("name", CONSTANT)
def test_constants_are_no_loss(name: str, method: str) -> None:
    model = CONSTANT[name]().double().eval()
    units = constant_units(model)
    plain = removing(model, IMAGES, None, **units)
    assert error(model, plain, OTHERS) > 1e-3
    edit = removing(model, IMAGES, method, ridge=1e-4, **units)  # the weights are right already
    assert not edit.uncompensated
    assert error(model, edit, OTHERS) < 1e-9


def test_at_a_border_of_zeros_a_constant_is_none() -> None:
    """There less of it is read: what is kept is the mean of every output over the data."""
    model = Constant(nn.Conv2d(6, 5, 3, padding=1)).double().eval()
    edit = removing(model, IMAGES, "bias", first=[1, 4])
    small, plain = (netsurgery.rewrite(model, one) for one in (edit, removing(model, IMAGES, None, first=[1, 4])))
    outputs: list[Tensor] = []
    for network in (model, small, plain):
        network.reader.register_forward_hook(lambda *args: outputs.append(args[2].detach()))
        network(IMAGES)
    before, after, without = outputs
    torch.testing.assert_close(after.mean((0, 2, 3)), before.mean((0, 2, 3)), rtol=0, atol=1e-12)
    off = (after - before)[:, :, 1:-1, 1:-1]
    assert off.abs().max() > 1e-3  # so the inside is off by as much as the borders need
    torch.testing.assert_close(off, off[:1, :, :1, :1].expand_as(off))
    assert (after - before).square().mean() < (without - before).square().mean()


@pytest.mark.parametrize("method", ["bias", "least-squares"])
def test_every_output_keeps_its_mean(method: str) -> None:
    """In every layer that reads removed units, whatever the units do, and behind other such layers."""
    torch.manual_seed(3)
    model = randomised(DigitsResNet((8, 12), 2))
    x = torch.randn(40, 1, 8, 8, dtype=torch.float64)
    edit = netsurgery.plan(
        model,
        [RandomScore(2), PruneChannels(0.4, compensate=method, data=(x, torch.arange(40) % 10))],
        (x[:2],),
    )
    small = netsurgery.rewrite(model, edit)
    assert not edit.uncompensated
    torch.testing.assert_close(small(x).mean(0), model(x).mean(0), rtol=0, atol=1e-10)
    norm = model.stages[0][1].bn1
    taken = edit.positions(edit.network.axes["stages.0.1.bn1.bias"][0])
    outputs = []
    for network in (model, small):
        network.stages[0][1].bn1.register_forward_hook(lambda *args: outputs.append(args[2].detach().mean((0, 2, 3))))
        network(x)
    assert norm.num_features == 8
    torch.testing.assert_close(outputs[1], outputs[0][taken], rtol=0, atol=1e-10)


# Linear combinations -----------------------------------------------------------------------------------------------


class Redundant(nn.Module):
    """A residual stream, read by convolutions of all sorts and a linear layer; units 2 and 5 are made of others."""

    def __init__(self, reader: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 1)
        self.inside, self.back = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.reader = reader
        self.head = nn.Linear(6, 4)
        self.double().eval()
        with torch.no_grad():
            for layer in (self.first, self.back, self.inside):
                layer.weight[2] = 2 * layer.weight[0] - layer.weight[1]
                layer.weight[5] = layer.weight[4] + layer.weight[3]
                layer.bias[2] = 2 * layer.bias[0] - layer.bias[1]
                layer.bias[5] = layer.bias[4] + layer.bias[3]

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.back(self.inside(x))
        return self.head(x.mean((2, 3))) + F.relu(self.reader(x)).mean((2, 3))


READERS = {
    "3x3 with zeros around": lambda: nn.Conv2d(6, 4, 3, padding=1),
    "without bias": lambda: nn.Conv2d(6, 4, 3, padding=1, bias=False),
    "dilated, with strides": lambda: nn.Conv2d(6, 4, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(2, 1)),
    "same": lambda: nn.Conv2d(6, 4, (2, 3), padding="same", padding_mode="circular"),
    "a batch norm follows": lambda: nn.Sequential(nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4)),
}


@pytest.mark.parametrize("name", READERS)
def test_units_made_of_others_are_no_loss(name: str) -> None:
    torch.manual_seed(1)
    model = Redundant(READERS[name]())
    assert error(model, removing(model, IMAGES, None, first=[2, 5]), OTHERS) > 1e-2
    edit = removing(model, IMAGES, "least-squares", first=[2, 5], inside=[2, 5])
    assert not edit.uncompensated
    assert error(model, edit, OTHERS) < 1e-7
    for_bias = removing(model, IMAGES, "bias", first=[2, 5], inside=[2, 5])
    assert error(model, for_bias, OTHERS) > 1e-2
    assert set(for_bias.uncompensated) - {"Redundant"} == ({"reader.weight"} if name == "without bias" else set())


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": 1, "stride": 2},
        {"padding": 2, "dilation": 2, "groups": 2},
        {"padding": "same", "padding_mode": "circular"},
        {"padding": 1, "padding_mode": "replicate", "groups": 4},
    ],
)
def test_windows_are_what_a_convolution_multiplies(dims: int, options: dict) -> None:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](4, 8, tuple(range(2, 2 + dims)), bias=False, **options).double()
    x = torch.randn(3, 4, *range(7, 7 + dims), dtype=torch.float64)
    rows = windows(conv, x, torch.arange(conv(x)[0, 0].numel()))  # (groups, n, d)
    weights = conv.weight.reshape(conv.groups, 8 // conv.groups, -1)
    wanted = conv(x)
    found = (rows @ weights.mT).unflatten(1, (3, -1)).permute(1, 0, 3, 2).reshape(wanted.shape)
    torch.testing.assert_close(found, wanted)


class Reads(nn.Module):
    """Rows of a sequence: the linear layer is given three dimensions; or several at once."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


ROWS = torch.randn(30, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("chunk", [1, 1 << 22])
def test_least_squares_by_hand(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as one system of equations, with rows for the ridge."""
    monkeypatch.setattr(least_squares, "_NUMBERS", chunk)
    monkeypatch.setattr(lost, "_LARGEST", 7 * 4 * 7 * 8)  # batches of 7
    torch.manual_seed(2)
    model = Reads()
    keep = [0, 1, 4, 6, 7]
    edit = netsurgery.Edit(netsurgery.trace(model, (ROWS[:2],)), {"a": tuple(keep)})
    edit = compensate(edit, "least-squares", (ROWS, torch.zeros(30)), ridge=0.3)
    ridge = edit.compensations[0].layers[0].ridge
    assert ridge in (0.3, 3, 30)
    hidden = torch.tanh(model.a(ROWS)).flatten(0, 1).detach()
    x, y, old = hidden[:, keep], model.b(hidden).detach(), model.b.weight.detach()[:, keep]
    pull = (ridge * x.square().sum() / 5).sqrt() * torch.eye(5, 6, dtype=torch.float64)
    left = torch.cat([torch.cat([x, torch.ones(len(x), 1)], 1), pull])
    right = torch.cat([y, pull[:, :5] @ old.T])
    solution = torch.linalg.lstsq(left, right).solution
    torch.testing.assert_close(edit.values["b.weight"][:, keep], solution[:5].T)
    torch.testing.assert_close(edit.values["b.bias"], solution[5])
    gone = [2, 3, 5]
    assert torch.equal(edit.values["b.weight"][:, gone], model.b.weight[:, gone])


def test_a_layer_that_runs_twice_is_fitted_to_both() -> None:
    class Twice(Reads):
        def forward(self, x: Tensor) -> Tensor:
            one = self.b(torch.tanh(self.a(x)))
            return one.relu_() + self.b(torch.relu(self.a(x)))  # what was heard of the first run is changed

    torch.manual_seed(2)
    model = Twice()
    with torch.no_grad():
        model.a.weight[3], model.a.bias[3] = model.a.weight[0], model.a.bias[0]
    edit = removing(model, ROWS, "least-squares", (ROWS, torch.zeros(30)), a=[3])
    assert error(model, edit, ROWS) < 1e-8
    edit = removing(model, ROWS, "bias", (ROWS, torch.zeros(30)), a=[2])
    small = netsurgery.rewrite(model, edit)
    means = [(m.b(m.a(ROWS).tanh()) + m.b(m.a(ROWS).relu())).mean((0, 1)) for m in (model, small)]
    torch.testing.assert_close(means[1], means[0])


# In a plan ---------------------------------------------------------------------------------------------------------


def digits_net() -> tuple[nn.Module, Tensor, tuple[Tensor, Tensor]]:
    torch.manual_seed(4)
    x = torch.randn(40, 1, 8, 8, dtype=torch.float64)
    return randomised(DigitsResNet((8, 12))), x, (x, torch.arange(40) % 10)


def test_less_is_lost() -> None:
    model, x, data = digits_net()
    lost = {}
    for method in (None, "bias", "least-squares"):
        small = netsurgery.apply(model, [MagnitudeScore(), PruneChannels(0.4, compensate=method, data=data)], (x[:2],))
        lost[method] = (small(x) - model(x)).square().mean().item()
    assert lost["least-squares"] < 0.75 * lost["bias"] < 0.25 * lost[None]


def test_the_model_is_left_as_it_was() -> None:
    model, x, data = digits_net()
    model.train()
    model.stages[0].eval()
    before, modes = snapshot(model), [module.training for module in model.modules()]
    netsurgery.plan(model, [MagnitudeScore(), PruneChannels(0.4, compensate="least-squares", data=data)], (x[:2],))
    assert [module.training for module in model.modules()] == modes
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_two_removals_optimizer_inplace_and_files(tmp_path) -> None:
    model, x, data = digits_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    ema = AveragedModel(model)
    remove = PruneChannels(0.3, compensate="least-squares", data=data)
    passes = [MagnitudeScore(), remove, RandomScore(1), PruneChannels(0.3, compensate="bias", data=data)]
    edit = netsurgery.plan(model, passes, (x[:2],))
    small = netsurgery.rewrite(model, edit)
    assert netsurgery.verify(model, small, edit, (x[:2],)) < 1e-9
    step = netsurgery.apply(model, passes[:2], (x[:2],))
    torch.testing.assert_close(netsurgery.apply(step, passes[2:], (x[:2],))(x), small(x))
    plain = netsurgery.rewrite(step, dataclasses.replace(netsurgery.plan(step, passes[2:], (x[:2],)), values={}))
    assert (small(x) - step(x)).square().mean() < (plain(x) - step(x)).square().mean()
    assert len(edit.compensations) == 2 and edit.summary().count("  compensated ") == 2
    netsurgery.save(tmp_path, small, edit)
    torch.testing.assert_close(netsurgery.load(tmp_path, digits_net()[0])(x), small(x))
    wanted = small.state_dict()
    assert netsurgery.apply(model, passes, (x[:2],), inplace=True, optimizer=optimizer, ema=ema) is model
    torch.testing.assert_close(model.state_dict(), wanted)
    torch.testing.assert_close(ema.module.state_dict(), wanted)  # it was the model's equal before
    model(x).square().mean().backward()
    optimizer.step()


def test_a_master_copy_in_the_optimizer_is_the_weight() -> None:
    model, x, data = digits_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for parameter in model.parameters():
        optimizer.state[parameter] = {"master_param": parameter.detach().float()}
    passes = [MagnitudeScore(), PruneChannels(0.3, compensate="least-squares", data=data)]
    small = netsurgery.apply(model, passes, (x[:2],), optimizer=optimizer)
    for parameter in small.parameters():
        assert torch.equal(optimizer.state[parameter]["master_param"], parameter.float())


def test_an_average_moves_as_the_weights_do() -> None:
    model, x, data = digits_net()
    ema = AveragedModel(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    edit = netsurgery.plan(model, [MagnitudeScore(), PruneChannels(0.3, compensate="bias", data=data)], (x[:2],))
    before = dict(model.state_dict())
    netsurgery.rewrite(model, edit, ema=ema)
    moved = edit.values["head.bias"] - before["head.bias"]
    assert moved.abs().max() > 1e-3
    torch.testing.assert_close(ema.module.head.bias, before["head.bias"] - 0.1 + moved)


def test_the_diff_says_what_has_new_values() -> None:
    model = Redundant(nn.Conv2d(6, 4, 1, bias=False))
    edit = removing(model, IMAGES, "bias", first=[2])
    lines = [line for line in edit.diff().splitlines() if " -> " not in line]
    assert lines == [
        "inside.bias has new values",
        "head.bias has new values",
        "reader.weight not compensated: its layer has no bias of its own, and no batch norm alone follows",
    ]


def rare_class(count: int) -> tuple[Tensor, Tensor]:
    """One sample in a hundred is of a class that looks otherwise."""
    y = (torch.arange(count) % 100 == 0).long()
    x = torch.randn(count, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    return x + 6 * y[:, None], y


@pytest.mark.parametrize("method", ["bias", "least-squares"])
@pytest.mark.parametrize("form", [lambda x, y: (x, y), TensorDataset, lambda x, y: DataLoader(TensorDataset(x, y), 50)])
def test_means_are_those_over_the_data_and_not_over_classes(form: Any, method: str) -> None:
    x, y = rare_class(4000)
    for seed in range(3):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).double()
        mean = model(x).mean(0)
        off = {}
        for how in (None, method):
            removal = PruneChannels(0.5, compensate=how, data=form(x, y) if how else None, samples=200)
            small = netsurgery.apply(model, [MagnitudeScore(), removal], (x[:2],))
            off[how] = (small(x).mean(0) - mean).norm().item()
        assert off[method] < 0.2 * off[None]


def test_images_alone_are_enough() -> None:
    model, x, (_, y) = digits_net()
    wanted = None
    batches = DataLoader(TensorDataset(x), batch_size=7)
    for data in ((x, y), x, (x, None), TensorDataset(x), batches, {"x": x}, [image[None] for image in x]):
        passes = [MagnitudeScore(), PruneChannels(0.4, compensate="bias", data=data, samples=1000)]
        outputs = netsurgery.apply(model, passes, (x[:2],))(x)
        wanted = outputs if wanted is None else wanted
        torch.testing.assert_close(outputs, wanted)


def test_data_of_every_sort_and_few_samples() -> None:
    model, x, data = digits_net()
    passes = [MagnitudeScore(), PruneChannels(0.4, compensate="bias", data=data, samples=40)]
    wanted = netsurgery.apply(model, passes, (x[:2],))(x)
    loader = DataLoader(TensorDataset(*data), batch_size=7, shuffle=True)
    passes = [MagnitudeScore(), PruneChannels(0.4, compensate="bias", data=loader)]
    torch.testing.assert_close(netsurgery.apply(model, passes, (x[:2],))(x), wanted)
    assert repr(passes[1]) == repr(PruneChannels(0.4, compensate="bias", data=data))


class Fixed(nn.Module):
    """The size of its first layer is fixed by the code."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():  # so that it is not rewritten
            return self.c(torch.relu(self.b(torch.relu(self.a(x)).view(-1, 8))))


def test_code_that_hard_codes_a_size_is_found_first() -> None:
    x = ROWS[:, 0]
    edit = netsurgery.plan(
        Fixed().double(), [MagnitudeScore(), PruneChannels(0.5, compensate="bias", data=(x, torch.zeros(30)))], (x[:2],)
    )
    assert list(edit.keep) == ["b"] and list(edit.values) == ["c.bias"] and edit.uncompensated == {}


@pytest.mark.parametrize("method", ["bias", "least-squares"])
def test_an_edit_that_the_code_does_not_follow_says_so(method: Method) -> None:
    x = ROWS[:, 0]
    network = netsurgery.trace(Fixed().double(), (x[:2],), try_sizes=False)
    edit = compensate(netsurgery.Edit(network, {"a": range(4), "b": range(3)}), method, x)
    ((name, why),) = edit.uncompensated.items()
    assert name == "Fixed" and not edit.values and not edit.compensations
    assert re.fullmatch(r"group 'a' cannot have 4 units: .* fixed by the code.*", why), why
    assert f"Fixed not compensated: {why}" in edit.diff()


@pytest.mark.parametrize("removals", [1, 2])
def test_the_code_is_fitted_once_for_the_removal_and_its_compensation(
    removals: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Any] = []
    fit = compensation.fit_code
    monkeypatch.setattr(compensation, "fit_code", lambda *args: tried.append(args) or fit(*args))  # type: ignore[func-returns-value]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    passes = [PruneChannels(0.5), Compensate("least-squares", ROWS[:, 0])]
    edit = netsurgery.plan(model, [MagnitudeScore(), *passes * removals], (ROWS[:2, 0],))
    assert len(tried) == removals - 1 and len(edit.compensations) == removals
    small = netsurgery.rewrite(model, edit)
    assert netsurgery.verify(model, small, edit, (ROWS[:2, 0],)) < 1e-12


def test_code_that_runs_otherwise_in_training() -> None:
    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 1, bias=False)
            self.norm, self.c = nn.BatchNorm2d(5), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = F.dropout(torch.relu(self.a(x)), 0.5, self.training)
            return self.c(torch.relu(self.norm(self.b(x))).mean((2, 3)))

    model = randomised(Drops())
    edit = removing(model, IMAGES, "bias", a=[0, 3])
    assert len(edit.network.programs) == 2
    assert list(edit.values) == ["norm.running_mean"] and not edit.uncompensated
    again = compensate(compensate(edit, "least-squares", DATA), "bias", DATA)
    torch.testing.assert_close(again.values, edit.values)


@settings(max_examples=40, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(programs("everything"), st.sampled_from(["bias", "least-squares"]))
def test_random_networks(program: Program, method: str) -> None:
    """Whatever is compensated is cut as it is silenced; what can change is a layer that reads removed units."""
    torch.manual_seed(0)
    model, inputs = build(program), example(program)
    before = snapshot(model)
    edit = netsurgery.plan(model, [RandomKeep(program.seed)], inputs)
    edit = compensate(edit, method, (inputs, torch.zeros(len(inputs[0]))), ridge=1.0)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert netsurgery.verify(model, netsurgery.rewrite(model, edit), edit, inputs) < 1e-8
    consumed = {m.module for name in edit.keep for m in edit.network[name].members if m.role == "consumes"}
    changed = {name.rpartition(".")[0] for name in edit.values if not name.endswith("running_mean")}
    assert changed <= consumed


# It never hurts ----------------------------------------------------------------------------------------------------


class Sparse(nn.Module):
    """Layers whose units fire for one input in ten, as trained ones do."""

    def __init__(self, depth: int, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, 10)
        self.double().eval()
        x = torch.randn(400, width, dtype=torch.float64)
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.normal_()
                y = x @ layer.weight.T
                layer.weight /= y.std(0)[:, None]
                y = x @ layer.weight.T
                layer.bias.copy_(-y.quantile(0.9, 0))
                x = torch.relu(layer(x))
            self.head.weight /= self.head(x).std()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(x)


def off(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    """How far outputs are from the original's, relative to how much these vary."""
    with torch.no_grad():
        wanted = model(x)
        return float((other(x) - wanted).square().mean() / wanted.var(0).mean())


@pytest.mark.parametrize("method", ["bias", "least-squares"])
@pytest.mark.parametrize(("depth", "seed"), [(6, 0), (9, 1), (12, 2), (16, 3)])
def test_a_network_whose_units_rarely_fire_is_not_silenced(depth: int, seed: int, method: str) -> None:
    """Layers fitted one after the other alone let least squares double the error here."""
    torch.manual_seed(seed)
    model = Sparse(depth)
    x, others = torch.randn(2, 400, 64, dtype=torch.float64)
    passes = [RandomScore(seed), PruneChannels(0.15)]
    plain = netsurgery.plan(model, passes, (x[:2],))
    edit = compensate(plain, method, x)
    small, cut = netsurgery.rewrite(model, edit), netsurgery.rewrite(model, plain)
    assert off(model, small, others) < 1.05 * off(model, cut, others)  # but for noise: other samples decided
    assert small(others).var(0).mean() > 0.2 * cut(others).var(0).mean()  # it does not answer alike to every sample


@pytest.mark.parametrize("samples", [1, 2, 3, 6, 11])
@pytest.mark.parametrize("method", ["bias", "least-squares"])
def test_few_samples_do_not_hurt(samples: int, method: str) -> None:
    torch.manual_seed(samples)
    model = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 8)).double()
    x = torch.randn(500, 6, dtype=torch.float64)
    plain = netsurgery.plan(model, [MagnitudeScore(), PruneChannels(0.2)], (x[:2],))
    edit = compensate(plain, method, x, samples=samples)
    cut, small = (off(model, netsurgery.rewrite(model, one), x) for one in (plain, edit))
    assert small < 1.1 * cut


def test_what_does_not_help_is_left_and_said(caplog: pytest.LogCaptureFixture) -> None:
    """The samples that are held back are of another sort than those that are fitted to."""
    torch.manual_seed(0)
    model = Reads()
    nn.init.zeros_(model.a.bias)
    rows = 1 + 0.1 * torch.randn(10, 5, dtype=torch.float64)
    plain = netsurgery.Edit(netsurgery.trace(model, (rows[:2],)), {"a": (0, 1, 4, 6, 7)})
    order = draw_inputs(torch.arange(10.0), 10).inputs[0][0].long()  # in which they are drawn
    rows[order[-2:]] *= -1  # the last of five batches is held back
    with caplog.at_level(logging.WARNING, "netsurgery"):
        edit = compensate(plain, "bias", rows)
    why = "its outputs come no nearer to the original's on samples that were held back"
    assert edit.uncompensated == {"b": why} and not edit.values
    assert caplog.messages == [f"not compensated: b: {why}"]
    (found,) = edit.compensations
    assert found.taken == "nothing" and found.before == found.after
    assert found.layers[0].taken == "nothing" and found.layers[0].before == found.layers[0].after


def test_a_network_that_comes_no_nearer_is_left_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, data = digits_net()
    for best, taken, only in (
        (1, "constant", "only constants were compensated"),
        (0, "nothing", "nothing was changed"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(
                lost.Lost, "gaps", lambda self, values, best=best: [abs(n - best) for n in range(len(values))]
            )
            passes = [MagnitudeScore(), PruneChannels(0.4, compensate="least-squares", data=data)]
            edit = netsurgery.plan(model, passes, (x[:2],))
        said = f"its outputs are no nearer to the original's on samples that were held back: {only}"
        assert edit.uncompensated == {"DigitsResNet": said}
        assert edit.compensations[0].taken == taken
        assert all(name.endswith((".bias", "running_mean")) for name in edit.values) and bool(edit.values) == best


def test_errors_are_told() -> None:
    model, x, data = digits_net()
    edit = netsurgery.plan(
        model, [MagnitudeScore(), PruneChannels(0.4, compensate="least-squares", data=data)], (x[:2],)
    )
    (found,), small = edit.compensations, netsurgery.rewrite(model, edit)
    runs = [name for name, _ in model.named_modules() if name in {one.layer for one in found.layers}]
    assert [one.layer for one in found.layers] == runs  # in the order in which they run
    assert found.samples == 40 and found.after < found.before and all(one.after <= one.before for one in found.layers)
    with torch.no_grad():
        assert found.after == pytest.approx(
            float((small(x) - model(x)).square().sum() / model(x).square().sum()), rel=0.9
        )
    assert edit.summary().splitlines()[1] == f"  {found}"
    lines = found.table().splitlines()
    assert lines[0].split() == ["layer", "before", "after", "taken", "ridge"] and len(lines) == 1 + len(found.layers)
    assert lines[1].split()[0] == found.layers[0].layer and "%" in lines[1]


# In one pass, with bounded memory ----------------------------------------------------------------------------------


def test_the_original_runs_once_over_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, data = digits_net()
    monkeypatch.setattr(compensation, "_bytes", lambda *args: 1 << 40)  # too much for layers one after the other
    rows = []
    model.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    plain = netsurgery.plan(model, [MagnitudeScore(), PruneChannels(0.4)], (x[:2],))
    rows.clear()
    counted = compensate(plain, "least-squares", data)
    assert len(counted.compensations[0].layers) > 4 and not counted.compensations[0].in_order
    batches = [count for count in rows if count == 8]  # others are shapes that the code was tried on
    assert len(batches) == 5 + 4  # of the one that is held back the outputs too: the original's, and with three values


class Narrow(Reads):
    """Takes no more than eight samples at once, and masks an output."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 8:
            raise ValueError("too many samples")
        return super().forward(x).masked_fill(torch.tensor([False, True, False]), -torch.inf)


def test_a_model_that_does_not_take_all_samples_at_once_and_outputs_that_are_infinite() -> None:
    model = Narrow()
    plain = netsurgery.Edit(netsurgery.trace(model, (ROWS[:2],)), {"a": (0, 1, 4, 6, 7)})
    (found,) = (edit := compensate(plain, "least-squares", ROWS)).compensations
    assert not found.in_order and found.after < found.before and not edit.uncompensated


def test_little_memory_means_several_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, data = digits_net()
    monkeypatch.setattr(compensation, "_bytes", lambda *args: 1 << 40)  # too much for layers one after the other
    plain = netsurgery.plan(model, [MagnitudeScore(), PruneChannels(0.4)], (x[:2],))
    whole = compensate(plain, "least-squares", data)
    passes = []
    sums = lost.Lost.sums
    monkeypatch.setattr(lost.Lost, "sums", lambda self, readers: passes.append(len(readers)) or sums(self, readers))
    parts = compensate(plain, "least-squares", data, memory=1 << 17)
    assert len(passes) > 1 and sum(passes) == len(whole.compensations[0].layers)
    torch.testing.assert_close(parts.values, whole.values)
    assert not parts.uncompensated


def test_a_layer_that_needs_too_much_memory_gets_a_constant() -> None:
    model = Redundant(nn.Conv2d(6, 4, 3, padding=1))
    plain = removing(model, IMAGES, None, first=[2, 5])
    edit = compensate(plain, "least-squares", IMAGES, memory=25_000)
    need = 2 * 8 * 37 * 43  # of fitted samples and those held back: 4 * 9 inputs and a constant, 6 outputs
    said = f"its refit needs {need:,} bytes, more than memory=25,000: only a constant was compensated"
    assert edit.uncompensated == {"inside": said}
    assert not any(name == "inside.weight" for name in edit.values) and "reader.weight" in edit.values
    edit = compensate(plain, "least-squares", IMAGES, memory=need)
    assert not edit.uncompensated and "inside.weight" in edit.values


def test_large_outputs_are_looked_at_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(6)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 4, 3, stride=2, padding=1)).double()
    x = torch.randn(20, 3, 30, 34, dtype=torch.float64)
    plain = netsurgery.plan(model, [MagnitudeScore(), PruneChannels(0.3)], (x[:2],))
    some = compensate(plain, "least-squares", x)
    monkeypatch.setattr(least_squares, "POSITIONS", 10**6)
    every = compensate(plain, "least-squares", x)
    torch.testing.assert_close(some.values, every.values, rtol=0.2, atol=0.02)
    assert not torch.equal(some.values["2.weight"], every.values["2.weight"])
    errors = [off(model, netsurgery.rewrite(model, one), x) for one in (plain, some, every)]
    assert errors[1] < 1.05 * errors[2] < 0.9 * errors[0]


def test_half_precision_and_single_precision_agree_with_double() -> None:
    torch.manual_seed(8)
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1)).double()
    found = {}
    for kind in (torch.float64, torch.float32, torch.bfloat16):
        one, x = copy.deepcopy(model).to(kind), IMAGES.to(kind)
        keep = {"0": (0, 1, 2, 4, 6, 7, 8, 9), "2": (0, 2, 3, 5)}
        edit = compensate(netsurgery.Edit(netsurgery.trace(one, (x[:2],)), keep), "least-squares", x)
        assert edit.values["2.weight"].dtype == kind
        found[kind] = edit.values["2.weight"].double()
    torch.testing.assert_close(found[torch.float32], found[torch.float64], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[torch.bfloat16], found[torch.float64], rtol=0.1, atol=0.05)


def test_how_far_it_is_is_told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_EVERY", -1.0)
    with caplog.at_level(logging.INFO, "netsurgery"), progress.waiting("compensation", 4) as step:
        for _ in range(4):
            step()
    assert [message.partition(",")[0] for message in caplog.messages] == [
        f"compensation: {n}% done" for n in (25, 50, 75, 100)
    ]


# What cannot be compensated ----------------------------------------------------------------------------------------


class Awkward(nn.Module):
    """Weights that are shared, used by the code itself, or computed; and units that no weight reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 8)
        self.one, self.two = nn.Linear(8, 3), nn.Linear(8, 3, bias=False)
        self.two.weight = self.one.weight
        self.free = nn.Parameter(torch.randn(8, 3))
        self.computed = weight_norm(nn.Linear(8, 3))
        self.q, self.k = nn.Linear(5, 4), nn.Linear(5, 4)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        score = (self.q(x) * self.k(x)).sum(-1, keepdim=True)
        return self.one(y) + self.two(y) * score + y @ self.free + self.computed(y)


def test_what_is_not_compensated_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Awkward(), ROWS[:, 0]
    with caplog.at_level(logging.WARNING, "netsurgery"):
        edit = removing(model, x, "least-squares", (x, torch.zeros(30)), a=[1, 2], q=[0])
    assert set(edit.values) == {"one.bias", "computed.bias"}
    shared = "it is shared or computed from others: only a bias was compensated"
    assert edit.uncompensated == {
        "one.weight in one": shared,
        "one.weight in two": "its layer has no bias of its own, and no batch norm alone follows",
        "free": "Awkward, which uses it, is no linear layer or convolution",
        "computed.parametrizations.weight.original1": shared,
        "q": "no weight reads its units",
    }
    assert caplog.messages[0].startswith("not compensated: ")
    assert all(name in caplog.messages[0] for name in edit.uncompensated)
    small = netsurgery.rewrite(model, edit)
    assert netsurgery.verify(model, small, edit, (x[:2],)) < 1e-9


def test_a_batch_norm_after_more_than_one_layer_is_left() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(5, 8)
            self.one, self.two = nn.Linear(8, 3, bias=False), nn.Linear(8, 3, bias=False)
            self.norm, self.other = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
            self.three = nn.Linear(8, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.a(x))
            three = self.three(y)
            return self.norm(self.one(y)) + self.norm(self.two(y)) + self.other(three) * three

    model, x = randomised(Shared()), ROWS[:, 0]
    edit = removing(model, x, "bias", (x, torch.zeros(30)), a=[1])
    assert set(edit.uncompensated) == {"one.weight", "two.weight", "three.weight"} and not edit.values


def test_values_are_for_a_model_of_the_same_weights() -> None:
    model = randomised(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1, bias=True)))
    other = copy.deepcopy(model)
    edit = removing(model, IMAGES, "bias", **{"0": [1, 4]})
    assert torch.equal(netsurgery.rewrite(other, edit)(IMAGES), netsurgery.rewrite(model, edit)(IMAGES))
    with torch.no_grad():
        other[0].weight[2] += 1
    before = snapshot(other)
    with pytest.raises(RewriteError, match=r"for a model with other weights: '0.weight' differs; plan anew$"):
        netsurgery.rewrite(other, edit, inplace=True)
    after = snapshot(other)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_values_must_fit() -> None:
    network = netsurgery.trace(Reads(), (ROWS[:2],))
    with pytest.raises(InputError, match=r"the new value of 'b.bias' has shape \(2,\), but the tensor has \(3,\)"):
        netsurgery.Edit(network, {"a": (0,)}, values={"b.bias": torch.zeros(2)})
    with pytest.raises(InputError, match=r"the new value of 'c' has shape \(2,\), but the model has no such tensor"):
        netsurgery.Edit(network, {"a": (0,)}, values={"c": torch.zeros(2)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"compensate": "mean", "data": DATA}, r"PruneChannels\(compensate='mean'\): 'bias', 'least-squares' or None"),
        ({"compensate": "bias"}, r"PruneChannels\(compensate='bias'\) needs data=\.\.\., which it is measured on"),
        ({"ridge": 0}, r"PruneChannels\(ridge=0\): must be positive"),
    ],
)
def test_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        PruneChannels(0.5, **arguments)


def test_data_that_the_model_does_not_run_on() -> None:
    model, x, _ = digits_net()
    passes = [MagnitudeScore(), PruneChannels(0.5, compensate="bias", data=(x[:, :, 0], torch.zeros(40)))]
    hooks = copy.copy([module._forward_hooks for module in model.modules()])
    with pytest.raises(InputError, match="DigitsResNet does not run on the data: "):
        netsurgery.apply(model, passes, (x[:2],))
    assert not any(map(len, hooks))


def test_outputs_that_are_not_finite_are_left() -> None:
    model, x, (_, y) = digits_net()
    x = x.clone()
    x[0, 0, 0, 0] = float("nan")
    edit = netsurgery.plan(model, [MagnitudeScore(), PruneChannels(0.5, compensate="bias", data=(x, y))], (x[1:3],))
    assert not edit.values
    assert set(edit.uncompensated.values()) == {"its inputs or outputs are not finite on the data"}


# As a pass of its own -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["bias", "least-squares"])
@pytest.mark.parametrize("rounds", [1, 2])
def test_the_pass_is_what_the_removal_does_by_itself(method: str, rounds: int) -> None:
    model = randomised(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4)))
    x = torch.randn(200, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one, apart = [], []
    for _ in range(rounds):
        one += [MagnitudeScore(), PruneChannels(0.3, compensate=method, data=x, samples=100)]
        apart += [MagnitudeScore(), PruneChannels(0.3), Compensate(method, x, samples=100)]
    found, wanted = (netsurgery.plan(model, passes, (x[:2],)) for passes in (apart, one))
    assert found.keep == wanted.keep and found.compensations == wanted.compensations and len(found.values) > 1
    torch.testing.assert_close(found.values, wanted.values, rtol=0, atol=0)
    assert found.measured == wanted.measured is not None
    small = netsurgery.rewrite(model, found)
    assert netsurgery.verify(model, small, found, (x[:2],)) < 1e-9
    plain = netsurgery.apply(model, [step for step in apart if not isinstance(step, Compensate)], (x[:2],))
    with torch.no_grad():
        assert (small(x) - model(x)).norm() < (plain(x) - model(x)).norm()


def test_scores_after_the_pass_see_the_new_values() -> None:
    model = randomised(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4)))
    x = torch.randn(200, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    first = [MagnitudeScore(), PruneChannels({"0": 0.5}), Compensate("least-squares", x)]
    edit = netsurgery.plan(model, [*first, MagnitudeScore(), PruneChannels({"2": 0.5})], (x[:2],))
    half = netsurgery.rewrite(model, netsurgery.plan(model, first, (x[:2],)))
    wanted = netsurgery.plan(half, [MagnitudeScore(), PruneChannels({"2": 0.5})], (x[:2],)).keep["2"]
    assert edit.keep["2"] == wanted


@pytest.mark.parametrize(
    ("passes", "error", "text"),
    [
        (lambda: [Compensate("bias", DATA)], PassError, r"needs edit, which no pass before it gives: put a removal"),
        (lambda: [MagnitudeScore(), Compensate("bias", DATA), PruneChannels(0.5)], PassError, "put a removal such as"),
        (
            lambda: [MagnitudeScore(), PruneChannels(0.5), MagnitudeScore(), Compensate("bias", DATA)],
            PassError,
            r"pass 4, Compensate\(.*, changes an edit, but pass 3 gives none: put it right after the removal",
        ),
        (lambda: [Compensate("mean", DATA)], InputError, r"Compensate\('mean'\): 'bias' or 'least-squares'"),
        (lambda: [Compensate("bias", None)], InputError, "pass the inputs that it is measured on"),
        (
            lambda: [Compensate("bias", DATA, samples=0)],
            InputError,
            r"Compensate\(samples=0\): a whole number of at least 1",
        ),
        (lambda: [Compensate("bias", DATA, ridge=0.0)], InputError, "must be positive"),
        (lambda: [Compensate("bias", iter([DATA]))], InputError, "can be read once"),
    ],
)
def test_wrong_arguments_of_the_pass(passes: Any, error: type[Exception], text: str) -> None:
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))
    with pytest.raises(error, match=text):
        netsurgery.plan(model, passes(), (torch.zeros(2, 6),))
