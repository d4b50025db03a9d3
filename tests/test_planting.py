"""Planting: new units live, and every old entry stays bitwise as it was through a whole training run."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import netsurgery
import random_networks
from netsurgery import Copy, Edit, Network, New
from netsurgery.capture.inputs import tensors_in
from netsurgery.errors import InputError, RewriteError, TraceError
from netsurgery.models import resnet20
from netsurgery.passes import Planting
from random_networks import THEMES, Program, programs
from test_growth import Net


class SignAndNoise(torch.optim.Optimizer):
    """Moves every parameter that it holds, whatever its gradient: signs of gradients, decay and noise."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for one in group["params"]:
                grad = torch.zeros_like(one) if one.grad is None else one.grad
                average = self.state[one].setdefault("average", torch.zeros_like(one))
                average.mul_(0.9).add_(grad.sign() + 0.1 * torch.randn_like(one))
                one.mul_(0.99).sub_(average, alpha=group["lr"])


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 6), nn.BatchNorm1d(6, momentum=None), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.gelu(self.norm(self.first(x))))


class Tied(nn.Module):
    """The inner width of two blocks that share their weights, and a weight that is read by its name alone."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.again = nn.Linear(5, 6), nn.Linear(6, 5), nn.Linear(5, 6)
        self.again.weight = self.up.weight
        self.gain, self.out = nn.Parameter(torch.ones(6)), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(F.relu(self.up(x)) * self.gain)
        x = x + F.linear(F.relu(self.again(x)) * self.gain, self.down.weight)
        return self.out(x)


class Bare(nn.Module):
    """Norms whose buffers are handed to a function by the model, and plain parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(6, 5), torch.randn(2, 6)])
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        x = F.linear(x, self.weights[0])
        x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, self.training)
        return F.linear(F.relu(x), self.weights[1])


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.cells, self.last = nn.Linear(5, 6), nn.LSTM(6, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.cells(F.relu(self.first(x)).unsqueeze(1))[0].flatten(1))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.embed, self.head = nn.Linear(5, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embed(x).unsqueeze(1)).squeeze(1))


def weight_normed() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 6)), nn.ReLU(), nn.Linear(6, 2))


FLAT = (8, 5)
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual, depthwise and concatenation": (Net, (8, 3, 4, 4)),
    "residual stream": (lambda: resnet20(widths=(4, 6, 8), classes=3), (4, 3, 16, 16)),
    "linear, average of all batches": (MLP, FLAT),
    "tied": (Tied, FLAT),
    "functional": (Bare, FLAT),
    "recurrent": (Recurrent, FLAT),
    "transformer": (Transformer, FLAT),
    "weight norm": (weight_normed, FLAT),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "adamw foreach": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, foreach=True, amsgrad=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01, initial_accumulator_value=0.1),
    "asgd": lambda p: torch.optim.ASGD(p, 0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.01),
    "sign and noise": SignAndNoise,
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    kind, shape = NETS[name]
    model = kind().train()
    x = torch.randn(shape)
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(shape))  # running statistics that are not those of the beginning
        for one in model.parameters():
            one.add_(0.05 * torch.randn_like(one))
    return model, x


@dataclass(frozen=True)
class PlantAll(netsurgery.Pass):
    """New units in every group that can grow, the first in front."""

    amount: int = 2
    gives: ClassVar[frozenset[str]] = frozenset({"edit"})

    def run(self, network: Network) -> Edit:
        keep: dict[str, Any] = {}
        for names in dict.fromkeys(network.equal_to(group.name) for group in network.prunable):
            more = {n: (New(), *range(network[n].size), *[New()] * (self.amount - 1)) for n in names}
            keep |= more if is_possible(network, {**keep, **more}) else {}
        return Edit(network, keep)


def is_possible(network: Network, keep: dict[str, Any]) -> bool:
    try:
        Edit(network, keep)
    except InputError:  # locked, or outputs would change
        return False
    return True


def planted(model: nn.Module, x: Any) -> Edit:
    edit = netsurgery.plan(model, [PlantAll()], x)
    assert edit.grown
    return edit


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, steps: int, *, low: str = "") -> list[float]:
    """Losses of a small task, at whose end a network tells two halves of the inputs apart."""
    scaler = torch.amp.GradScaler("cpu", enabled=low == "scaler", init_scale=2.0**30, growth_interval=3)
    target = (x.flatten(1).sum(1) > 0).long()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(low)):
            loss = F.cross_entropy(model(x).float(), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses


def entries(edit: Edit, model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Each tensor of a model, and which of its entries are new, worked out from the members of the groups that grow."""
    first: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        own = first.setdefault(id(tensor), name)  # a tied tensor has the name that it has first
        new = torch.zeros(tensor.shape, dtype=torch.bool)
        for axis in {m.axis for g in edit.keep for m in edit.network[g].members if m.parameter == own}:
            mask = edit.positions.new(edit.network.axes[own][axis])
            assert mask is not None
            new |= mask.reshape([-1 if i == axis else 1 for i in range(tensor.dim())])
        yield name, tensor.detach(), new


def check_old(edit: Edit, before: nn.Module, after: nn.Module) -> dict[str, Tensor]:
    """Every old entry is the same bit for bit; how much new ones changed, by tensor."""
    was = before.state_dict()
    assert list(was) == list(after.state_dict())
    changed = {}
    for name, tensor, new in entries(edit, after):
        assert tensor.shape == was[name].shape and tensor.dtype == was[name].dtype
        assert torch.equal(tensor[~new], was[name][~new]), name
        if new.any():
            changed[name] = (tensor != was[name])[new]
    return changed


@pytest.mark.parametrize("low", ["", "bfloat16", "scaler"])
@pytest.mark.parametrize("which", OPTIMIZERS)
def test_old_entries_stay_whatever_the_optimizer_does(which: str, low: str) -> None:
    model, x = made("residual, depthwise and concatenation")
    optimizer = OPTIMIZERS[which](model.parameters())
    train(model, optimizer, x, 2)
    edit = planted(model, x)
    before = netsurgery.rewrite(model, edit)
    plant = Planting(model, edit=edit, optimizer=optimizer)
    train(model, optimizer, x, 20, low=low)
    assert plant.finish() is model
    changed = check_old(edit, before, model)
    assert sum(int(one.sum()) for one in changed.values()) > 0.5 * sum(one.numel() for one in changed.values())
    assert all(changed[name].any() for name in ("stem.weight", "wide.weight", "norm.running_mean", "head.weight"))
    train(model, optimizer, x, 2)  # the whole network goes on
    assert not torch.equal(model.stem.weight[1], before.stem.weight[1])


@pytest.mark.parametrize("which", ["sgd", "sign and noise"])
@pytest.mark.parametrize("name", NETS)
def test_old_entries_stay_in_networks_of_any_kind(name: str, which: str) -> None:
    model, x = made(name)
    original = copy.deepcopy(model)
    names = [one for one, _ in model.named_parameters()]
    optimizer = OPTIMIZERS[which](model.parameters())
    edit = planted(model, x)
    before = netsurgery.rewrite(model, edit)
    plant = Planting(model, edit=edit, optimizer=optimizer)
    norms = any(isinstance(one, nn.BatchNorm1d | nn.BatchNorm2d) for one in model.modules()) and name != "functional"
    for training in (True, False):  # norms of old units are as in eval mode
        wanted = copy.deepcopy(original).train(training and not norms)(x)
        torch.testing.assert_close(copy.deepcopy(model).train(training)(x), wanted, rtol=1e-5, atol=1e-5)
    losses = train(model, optimizer, x, 20)
    if which == "sgd":
        assert losses[-1] < losses[0]
    assert plant.finish() is model
    changed = check_old(edit, before, model)
    assert all(torch.isfinite(one).all() for one in model.parameters())
    assert sum(int(one.sum()) for one in changed.values()) > 0
    assert [type(one).__mro__[1:] for one in model.modules()] == [type(one).__mro__[1:] for one in before.modules()]
    assert [one for one, _ in model.named_parameters()] == names
    assert all(isinstance(one, nn.Parameter) and one.requires_grad for one in model.parameters())
    held = optimizer.param_groups[0]["params"]
    assert all(one is other for one, other in zip(held, model.parameters(), strict=True))
    train(model, optimizer, x, 1)


def backward(model: nn.Module, inputs: Any) -> None:
    for one in tensors_in(model(*inputs)):
        if one.requires_grad:
            one.square().sum().backward(retain_graph=True)


def can_learn(model: nn.Module, inputs: Any) -> bool:
    try:
        backward(model, inputs)
    except RuntimeError:  # where all is trained, its code writes into what gradients need
        return False
    return True


@pytest.mark.parametrize("theme", THEMES)
def test_old_entries_stay_in_random_networks(theme: str) -> None:
    grown = []

    @settings(
        max_examples=20,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(programs(theme))
    def run(program: Program) -> None:
        torch.manual_seed(0)
        model, inputs = random_networks.build(program).train(), random_networks.example(program)
        edit = netsurgery.plan(model, [PlantAll()], inputs)
        grown.append(bool(edit.grown))
        if not edit.grown:
            return
        before = netsurgery.rewrite(model, edit)
        optimizer = SignAndNoise(model.parameters())
        plant = Planting(model, edit=edit, optimizer=optimizer)
        learns = can_learn(copy.deepcopy(before).requires_grad_(), inputs)
        for _ in range(2):
            model(*inputs)
            if learns:
                backward(model, inputs)
            optimizer.step()
        plant.finish()
        check_old(edit, before, model)

    run()
    assert sum(grown) >= 5  # of the others some have nothing that can be pruned, either


# Optimizers --------------------------------------------------------------------------------------------------------


def test_an_optimizer_holds_new_entries_in_its_groups_and_begins_with_them() -> None:
    model, x = made("linear, average of all batches")
    body, head = [*model.first.parameters(), *model.norm.parameters()], [*model.last.parameters()]
    optimizer = torch.optim.AdamW([{"params": body}, {"params": head, "lr": 0.5}], 0.01)
    train(model, optimizer, x, 7)
    edit = planted(model, x)
    plant = Planting(model, edit=edit, optimizer=optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 1]
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.5]
    assert optimizer.param_groups[1]["params"][0] is model.last.weight_new
    assert not optimizer.state
    train(model, optimizer, x, 1)
    assert optimizer.state[model.last.weight_new]["step"] == 1
    plant.finish()
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 2]


@pytest.mark.parametrize("which", OPTIMIZERS)
@pytest.mark.parametrize("fresh", [False, True])
def test_state_of_old_entries_is_put_back_and_that_of_new_ones_is_theirs(which: str, fresh: bool) -> None:
    model, x = made("linear, average of all batches")
    optimizer = OPTIMIZERS[which](model.parameters())
    train(model, optimizer, x, 0 if fresh else 3)
    edit = planted(model, x)
    was = {n: dict(optimizer.state.get(one, {})) for n, one in model.named_parameters()}
    plant = Planting(model, edit=edit, optimizer=optimizer)
    train(model, optimizer, x, 3)
    late = {n.removesuffix("_new"): dict(optimizer.state[one]) for n, one in model.named_parameters()}
    plant.finish()
    for name, tensor, new in entries(edit, model):
        if name not in was:
            continue
        own = optimizer.state.get(dict(model.named_parameters())[name], {})
        assert set(was[name]) <= set(own)
        for key, value in own.items():
            if not isinstance(value, Tensor) or value.shape != tensor.shape or not value.dim():
                continue
            if key in was[name]:
                assert torch.equal(value[~new].flatten(), was[name][key].flatten())
            if name in late and key in late[name] and late[name][key].shape == (int(new.sum()),):
                assert torch.equal(value[new], late[name][key])
        if fresh and which in ("sgd", "adamw", "adamw fused", "asgd") and name in late:
            assert own.keys() == late[name].keys()
    train(model, optimizer, x, 2)


def test_an_optimizer_made_after_planting_holds_new_entries_alone() -> None:
    model, x = made("residual, depthwise and concatenation")
    edit = planted(model, x)
    before = netsurgery.rewrite(model, edit)
    earlier = SignAndNoise(model.parameters())  # nobody speaks of it: it must not reach old entries either
    plant = Planting(model, edit=edit)
    train(model, SignAndNoise(model.parameters()), x, 5)
    earlier.step()
    assert sum(one.numel() for one in model.parameters()) < edit.after.params
    plant.finish()
    check_old(edit, before, model)


def test_schedulers_and_clipping_go_on() -> None:
    model, x = made("linear, average of all batches")
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    plant = Planting(model, edit=planted(model, x), optimizer=optimizer)
    model(x).square().mean().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-9)
    optimizer.step()
    scheduler.step()
    plant.finish()
    assert optimizer.param_groups[0]["lr"] == 0.025


# Averages ----------------------------------------------------------------------------------------------------------

AVERAGES = {
    "equal": {},
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "own": {"avg_fn": lambda average, one, _: 0.7 * average + 0.3 * one, "use_buffers": True},
}


@pytest.mark.parametrize("kind", AVERAGES)
def test_averages_keep_their_own_old_entries(kind: str) -> None:
    model, x = made("residual, depthwise and concatenation")
    average = AveragedModel(model, **AVERAGES[kind])
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    train(model, optimizer, x, 2)
    edit = planted(model, x)
    before = netsurgery.rewrite(average.module, edit)
    plant = Planting(model, edit=edit, optimizer=optimizer, ema=average)
    for _ in range(5):
        train(model, optimizer, x, 1)
        average.update_parameters(model)
    plant.finish()
    changed = check_old(edit, before, average.module)
    assert changed["stem.weight"].all() and changed["norm.running_mean"].all()
    assert not torch.equal(average.module.stem.weight, model.stem.weight)
    average.update_parameters(model)
    average.module(x)


@pytest.mark.parametrize("kind", AVERAGES)
def test_averages_made_after_planting_become_ordinary(kind: str) -> None:
    model, x = made("residual, depthwise and concatenation")
    edit = planted(model, x)
    before = netsurgery.rewrite(model, edit)
    plant = Planting(model, edit=edit)
    average = AveragedModel(model, **AVERAGES[kind])
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    for _ in range(5):
        train(model, optimizer, x, 1)
        average.update_parameters(model)
    plant.finish(ema=average)
    check_old(edit, before, average.module)
    optimizer = OPTIMIZERS["sgd"](average.module.parameters())
    count = int(average.module.norm.num_batches_tracked)
    train(average.module, optimizer, x, 2)
    assert int(average.module.norm.num_batches_tracked) == count + 2


# While it lasts ----------------------------------------------------------------------------------------------------


def test_statistics_are_put_back_after_each_forward_even_of_a_part() -> None:
    model, x = made("residual, depthwise and concatenation")
    Planting(model, edit=planted(model, x))
    was, other = model.norm.running_var.clone(), model.norm.running_mean.clone()
    model.norm(model.stem(x))
    assert torch.equal(model.norm.running_var[1:-1], was[1:-1])
    assert not torch.equal(model.norm.running_var[[0, -1]], was[[0, -1]])
    with pytest.raises(RuntimeError):
        model(x.transpose(1, 2))
    with torch.no_grad():
        model.norm.reset_running_stats()
    model(x)
    assert torch.equal(model.norm.running_mean[1:-1], other[1:-1])


def test_statistics_that_the_model_hands_to_functions_are_put_back() -> None:
    model, x = made("functional")
    Planting(model, edit=planted(model, x))
    was = model.norm.running_mean.clone()
    model(x)
    changed = model.norm.running_mean != was
    assert changed[[0, -1]].all() and not changed[1:-1].any()


@pytest.mark.parametrize("name", ["residual, depthwise and concatenation", "linear, average of all batches"])
def test_with_statistics_of_the_batch_training_mode_computes_what_it_did(name: str) -> None:
    model, x = made(name)
    original, edit = copy.deepcopy(model), planted(model, x)
    before = netsurgery.rewrite(model, edit)
    plant = Planting(model, edit=edit, statistics="batch")
    for training in (True, False):
        wanted = copy.deepcopy(original).train(training)(x)
        torch.testing.assert_close(copy.deepcopy(model).train(training)(x), wanted, rtol=1e-5, atol=1e-5)
    train(model, SignAndNoise(model.parameters()), x, 5)
    plant.finish()
    check_old(edit, before, model)


def test_new_units_are_normalised_by_their_batch_and_followed() -> None:
    model, x = made("residual, depthwise and concatenation")
    plant = Planting(model, edit=planted(model, x))
    made_by = model.stem(x)
    mean, var = made_by.mean((0, 2, 3)), made_by.var((0, 2, 3))
    was = model.norm.running_mean.clone()
    with torch.no_grad():
        found = model.norm(input=made_by)
    new = torch.tensor([0, -1])
    torch.testing.assert_close(found.mean((0, 2, 3))[new], torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(model.norm.running_mean[new], 0.9 * was[new] + 0.1 * mean[new])
    torch.testing.assert_close(found[:, 1:-1], model.eval().norm(made_by)[:, 1:-1])
    assert not torch.allclose(mean[1:-1], was[1:-1], rtol=1e-3) and model.norm.training is False and var.all()
    plant.finish()
    assert not model.norm._forward_hooks and not model._forward_hooks


def test_gradients_flow_in_eval_mode_and_through_two_passes() -> None:
    model, x = made("residual, depthwise and concatenation")
    Planting(model, edit=planted(model, x))
    for training in (True, False):
        model.train(training)
        (model(x) + model(x.flip(0))).square().mean().backward()
    inner = x.clone().requires_grad_()
    torch.utils.checkpoint.checkpoint(model, inner, use_reentrant=False).sum().backward()
    assert inner.grad is not None and all(one.grad is not None for one in model.parameters())


def test_new_entries_get_the_gradients_of_the_whole_network() -> None:
    model, x = made("residual, depthwise and concatenation")
    edit = planted(model, x)
    whole = netsurgery.rewrite(model, edit)
    Planting(model, edit=edit, statistics="batch")
    for one in (model, whole):
        one(x).square().mean().backward()
    for name, tensor, new in entries(edit, whole):
        if new.any() and "running" not in name:
            path, _, key = name.rpartition(".")
            found = model.get_submodule(path).get_parameter(f"{key}_new").grad
            torch.testing.assert_close(found, dict(whole.named_parameters())[name].grad[new])
            assert tensor.shape == getattr(model.get_submodule(path), key).shape


def test_training_is_resumed_from_the_state_dict() -> None:
    model, x = made("linear, average of all batches")
    edit, small = planted(model, x), copy.deepcopy(model)
    plant = Planting(model, edit=edit)
    train(model, OPTIMIZERS["sgd"](model.parameters()), x, 3)
    state = copy.deepcopy(model.state_dict())
    assert {"first.weight_new", "first.weight_old", "last.bias"} <= set(state) and "first.weight" not in state
    for one in small.state_dict().values():
        one.zero_()  # a network made anew
    again = Planting(small, edit=edit)
    small.load_state_dict(state)
    small(x)
    for one, other in zip(model.buffers(), small.buffers(), strict=True):
        assert one.shape != (6,) or torch.equal(one, other)
    small.load_state_dict(state)
    plant.finish(), again.finish()
    for one, other in zip(model.state_dict().values(), small.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_other_types_and_memory_formats() -> None:
    model, x = made("residual, depthwise and concatenation")
    model = model.to(memory_format=torch.channels_last)
    edit = planted(model, x)
    before = netsurgery.rewrite(model, edit).double()
    plant = Planting(model, edit=edit)
    assert model.stem.weight.is_contiguous(memory_format=torch.channels_last)
    model.double()
    train(model, OPTIMIZERS["sgd"](model.parameters()), x.double(), 3)
    plant.finish()
    check_old(edit, before, model)
    assert model.stem.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python")
def test_a_compiled_model_is_planted() -> None:
    model, x = made("residual, depthwise and concatenation")
    edit = planted(model, x)
    before = netsurgery.rewrite(model, edit)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    plant = Planting(compiled, edit=edit, optimizer=optimizer)
    eager, other = copy.deepcopy((model, optimizer))
    losses, wanted = train(compiled, optimizer, x, 4), train(eager, other, x, 4)
    assert losses == pytest.approx(wanted, rel=1e-3)
    assert plant.finish() is model
    check_old(edit, before, model)


def test_planting_goes_on_round_after_round() -> None:
    model, x = made("linear, average of all batches")
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    for size in (8, 10, 12):
        edit = planted(model, x)
        before = netsurgery.rewrite(model, edit)
        plant = Planting(model, edit=edit, optimizer=optimizer)
        assert str(plant) == f"2 new units in 1 group: 20 of {edit.after.params} parameters are trained"
        train(model, optimizer, x, 3)
        plant.finish()
        assert str(plant) == "2 new units in 1 group: finished"
        check_old(edit, before, model)
        assert model.first.out_features == size == len(model.norm.running_mean)
        train(model, optimizer, x, 1)


def test_what_is_not_trained_is_trained_where_it_is_new_and_not_trained_after_that() -> None:
    model, x = made("linear, average of all batches")
    model.first.requires_grad_(False)
    edit = planted(model, x)
    before = netsurgery.rewrite(model, edit)
    plant = Planting(model, edit=edit)
    train(model, OPTIMIZERS["sgd"](model.parameters()), x, 3)
    plant.finish()
    assert check_old(edit, before, model)["first.weight"].any()
    assert [one.requires_grad for one in model.parameters()] == [False, False, True, True, True, True]


# Refusals ----------------------------------------------------------------------------------------------------------


class Outside(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.gains = [torch.ones(6, requires_grad=True)]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) * self.gains[0])


@pytest.mark.parametrize(
    ("keep", "why"),
    [
        ({"first": (*range(6), Copy(0))}, "copies units of 'first'"),
        ({"first": (*range(5), New())}, "removes units of 'first'"),
        ({"first": (5, 4, 3, 2, 1, 0)}, "adds no units"),
        ({}, "adds no units"),
    ],
)
def test_edits_that_change_old_units_are_refused(keep: dict[str, Any], why: str) -> None:
    model, x = made("linear, average of all batches")
    before = copy.deepcopy(model)
    with pytest.raises(InputError, match=why):
        Planting(model, edit=Edit(netsurgery.trace(model, x), keep))
    check_untouched(model, before)


def check_untouched(model: nn.Module, before: nn.Module) -> None:
    assert list(map(type, model.modules())) == list(map(type, before.modules()))
    for one, other in zip(model.state_dict().values(), before.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in before.named_parameters()]


def test_what_cannot_be_planted_is_refused_and_nothing_changes() -> None:
    model, x = made("linear, average of all batches")
    edit, before = planted(model, x), copy.deepcopy(model)
    with pytest.raises(InputError, match=r"does not hold 'first.weight', which gets new entries"):
        Planting(model, edit=edit, optimizer=torch.optim.SGD(model.last.parameters(), 0.1))
    with pytest.raises(InputError, match=r"statistics='none'.*: 'running' or 'batch'"):
        Planting(model, edit=edit, statistics="none")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="LBFGS works on matrices, or on all parameters at once, and cannot go on"):
        Planting(model, edit=edit, optimizer=torch.optim.LBFGS(model.parameters()))
    with pytest.raises(InputError, match="holds no module with the names and shapes"):
        Planting(model, edit=edit, ema=nn.Linear(1, 1))
    with pytest.raises(InputError, match="takes an Edit that adds units, got dict"):
        Planting(model, edit={"first": (New(),)})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="the module in DataParallel, and wrap it again"):
        Planting(nn.DataParallel(model), edit=edit)
    with pytest.raises(RewriteError, match="the edit is for another model"):
        Planting(Tied(), edit=edit)
    check_untouched(model, before)
    outside = Outside()
    with pytest.raises(InputError, match="'gains' of module 'Outside' holds tensors that are trained"):
        Planting(outside, edit=planted(outside, x))
    words = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 2))
    with pytest.raises(InputError, match=r"'0.weight' has sparse gradients: set sparse=False on '0'"):
        Planting(words, edit=planted(words, torch.zeros(3, dtype=torch.long)))


def test_finish_is_called_once_and_planting_is_not_nested() -> None:
    model, x = made("linear, average of all batches")
    edit = planted(model, x)
    plant = Planting(model, edit=edit)
    with pytest.raises(InputError, match="is being planted already: call finish"):
        Planting(model, edit=edit)
    with pytest.raises(TraceError, match=r"module '.*' is being planted: call finish\(\) of its Planting first"):
        netsurgery.trace(model, x)
    with pytest.raises(InputError, match="it is no copy of the planted model"):
        plant.finish(ema=MLP())
    loss = model(x).sum()
    plant.finish()
    with pytest.raises(InputError, match="was called before; make another Planting"):
        plant.finish()
    with pytest.raises(RuntimeError):
        loss.backward()


def test_an_amount_by_modules_stands_for_an_edit() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(8, 4)
    wanted = net(x).detach()
    plant = Planting(net, x, amount=3, include="2", optimizer=torch.optim.SGD(net.parameters(), 0.1))
    assert str(plant) == "3 new units in 1 group: 24 of 99 parameters are trained"
    assert torch.equal(net(x), wanted)
    with pytest.raises(InputError, match="is being planted already"):
        Planting(net, x, amount=1)
    assert plant.finish()[2].out_features == 9
    edit = netsurgery.Edit(netsurgery.trace(net, x), {"0": (*range(5), New())})
    for settled in ({}, {"amount": 1, "edit": edit}, {"edit": edit, "include": "0"}):
        with pytest.raises(InputError, match="takes either amount"):
            Planting(net, x, **settled)


def test_losses_may_be_held_all_along() -> None:
    """As in a loop over batches, whose variables outlive it: before planting, meanwhile and afterwards."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    held = []

    def train() -> None:
        for _ in range(2):
            optimizer.zero_grad()
            held.append(model(x).square().mean())
            held[-1].backward()
            optimizer.step()

    train()
    plant = Planting(model, x, amount=2, optimizer=optimizer)
    train()
    plant.finish()
    train()
    assert model[0].weight.grad is not None and model[0].weight.grad.shape == (8, 4)
    netsurgery.rewrite(
        model, netsurgery.Edit(netsurgery.trace(model, x), {"0": range(5)}), inplace=True, optimizer=optimizer
    )
    train()
    assert model[0].weight.grad.shape == (5, 4) and held[-1] < held[0]
