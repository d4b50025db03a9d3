"""Training goes on after surgery as if nothing had happened: step by step like the full network with masks.

The twin is the full-size network whose removed units are held at zero: their weights, those that read them, and the
gradients of both. Its other elements must move as those of the small network do, momentum and learning rates included.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.optim import Optimizer, lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import netsurgery
from netsurgery.errors import InputError, RewriteError
from netsurgery.passes import MagnitudeScore, PruneChannels
from oracles import RandomKeep

# The networks ------------------------------------------------------------------------------------------------------


class Everything(nn.Module):
    """A residual link, a concatenation, groups, a depthwise convolution, a flattened map and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.one = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.deep = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.back = nn.Conv2d(12, 8, 1)
        self.side = nn.Conv2d(8, 5, 1)
        self.mix = nn.Conv2d(13, 6, 1)
        self.flat = nn.Linear(6 * 16, 10)
        self.tied = nn.Linear(10, 10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.back(F.gelu(self.deep(F.relu(self.one(x)))))
        x = F.relu(self.mix(torch.cat([x, self.side(x)], 1))).flatten(1)
        x = F.relu(self.flat(x))
        return self.head(F.relu(F.linear(F.relu(self.tied(x)), self.tied.weight)))


class Matrices(nn.Module):
    """Only matrices, of equal sizes among them, as Muon wants them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 9, bias=False), nn.Linear(9, 9, bias=False)
        self.c = nn.Linear(9, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


X = torch.randn(6, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def built(kind: type[nn.Module] = Everything) -> nn.Module:
    torch.manual_seed(0)
    model = kind().double()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.2 * torch.rand_like(tensor))
    return model


# Training ----------------------------------------------------------------------------------------------------------


class Masked:
    """The full network, held at zero wherever the edit removes something."""

    def __init__(self, model: nn.Module, edit: netsurgery.Edit):
        self.model = model
        marked = copy.deepcopy(model)
        self.kept: dict[str, Tensor] = {}  # by parameter: where its elements stay, flat
        with torch.no_grad():
            for tensor in marked.parameters():
                tensor.copy_(torch.arange(tensor.numel()).view_as(tensor))
        cut, axes = edit.positions.cut, edit.network.axes
        places = {name: cut(tensor, axes[name]).long() for name, tensor in marked.named_parameters()}
        self.kept = places
        self.masks = {}
        for name, tensor in model.named_parameters():
            mask = torch.zeros(tensor.numel(), dtype=tensor.dtype)
            mask[places[name].flatten()] = 1
            self.masks[name] = mask.view_as(tensor)
        self.hold()

    def hold(self) -> None:
        with torch.no_grad():
            for name, tensor in self.model.named_parameters():
                tensor.mul_(self.masks[name])
                if tensor.grad is not None:
                    tensor.grad.mul_(self.masks[name])

    def of(self, name: str, tensor: Tensor) -> Tensor:
        """What stays of something of a parameter's shape."""
        return tensor.flatten()[self.kept[name]]


def train(
    model: nn.Module, optimizer: Optimizer, x: Tensor, steps: int, scheduler: Any = None, masked: Masked | None = None
) -> list[float]:
    """Losses of some steps; the targets are fixed."""
    target = torch.linspace(-1, 1, 4, dtype=x.dtype).expand(len(x), 4)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x + 0.1 * step), target)
        loss.backward()
        if masked is not None:
            masked.hold()
        optimizer.step()
        if masked is not None:
            masked.hold()
        losses.append(loss.item())
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        elif scheduler is not None:
            scheduler.step()
    return losses


def copied(model: nn.Module, optimizer: Optimizer, scheduler: Any = None) -> tuple[nn.Module, Optimizer, Any]:
    """A copy of a model with copies of its optimizer and schedule, none of which share anything with the original."""
    return copy.deepcopy((model, optimizer, scheduler))


def assert_same(small: nn.Module, masked: Masked, optimizer: Optimizer, other: Optimizer) -> None:
    """Parameters, and whatever the optimizer keeps of each of their elements."""
    twins = dict(masked.model.named_parameters())
    assert len(optimizer.state) == len(other.state)
    for name, mine in small.named_parameters():
        twin = twins[name]
        torch.testing.assert_close(mine, masked.of(name, twin), rtol=0, atol=1e-9)
        assert optimizer.state[mine].keys() == other.state[twin].keys()
        for key, value in optimizer.state[mine].items():
            wanted = other.state[twin][key]
            if isinstance(value, Tensor):
                wanted = masked.of(name, wanted) if wanted.shape == twin.shape else wanted
                torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-9)
            else:
                assert value == wanted


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, nesterov=True, weight_decay=0.05),
    "sgd-plain": lambda p: torch.optim.SGD(p, 0.02),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.05, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True, weight_decay=0.05),
    "adamw-fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.005, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.02, initial_accumulator_value=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, 1.0),
    "adamax": lambda p: torch.optim.Adamax(p, 0.01),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01, decoupled_weight_decay=True, weight_decay=0.05),
    "radam": lambda p: torch.optim.RAdam(p, 0.01),
    "asgd": lambda p: torch.optim.ASGD(p, 0.01, t0=2),
    "rprop": lambda p: torch.optim.Rprop(p, 0.001),
}

SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "one-cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.05, total_steps=12),  # cycles the momentum too
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 12),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 3), lr_scheduler.ExponentialLR(o, 0.8)], [3]
    ),
}


def follow(
    make: Callable[[Any], Optimizer],
    schedule: Callable[[Optimizer], Any] | None,
    inplace: bool,
    seed: int,
    model: nn.Module | None = None,
) -> None:
    """Train, operate, and train on beside the twin."""
    model = built() if model is None else model
    optimizer = make(model.parameters())
    scheduler = schedule(optimizer) if schedule else None
    train(model, optimizer, X, 4, scheduler)
    edit = netsurgery.plan(model, [RandomKeep(seed)], (X,))
    assert edit.keep
    twin, other, other_scheduler = copied(model, optimizer, scheduler)
    masked = Masked(twin, edit)
    small = netsurgery.rewrite(model, edit, inplace=inplace, optimizer=optimizer)
    assert (small is model) == inplace
    assert [id(p) for g in optimizer.param_groups for p in g["params"]] == [id(p) for p in small.parameters()]
    for step in range(1, 5):
        losses = train(small, optimizer, X, 1, scheduler), train(twin, other, X, 1, other_scheduler, masked)
        assert losses[0] == pytest.approx(losses[1], abs=1e-9), step
        assert_same(small, masked, optimizer, other)
    assert [group["lr"] for group in optimizer.param_groups] == [group["lr"] for group in other.param_groups]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on(name: str, inplace: bool) -> None:
    follow(OPTIMIZERS[name], None, inplace, seed=3)


@pytest.mark.filterwarnings("ignore:The epoch parameter in")  # of torch 2.8's own SequentialLR
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_go_on(name: str, optimizer: str, inplace: bool) -> None:
    follow(OPTIMIZERS[optimizer], SCHEDULES[name], inplace, seed=5)


def test_the_twin_differs_without_the_state() -> None:
    """The comparison can fail: a new optimizer for the small network goes elsewhere."""
    model = built()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    train(model, optimizer, X, 4)
    edit = netsurgery.plan(model, [RandomKeep(3)], (X,))
    twin, other, _ = copied(model, optimizer)
    masked = Masked(twin, edit)
    small = netsurgery.rewrite(model, edit)
    fresh = OPTIMIZERS["adamw"](small.parameters())
    train(small, fresh, X, 2)
    train(twin, other, X, 2, None, masked)
    with pytest.raises(AssertionError):
        assert_same(small, masked, fresh, other)


def test_parametrised_weights_go_on() -> None:
    """Of a weight norm the direction of what goes must not be zero, so the twin's is held by its length alone.

    Where inputs go, the twin's length is cut to that of what stays, once: what stays of the weight stays as it is.
    """
    model = built()
    weight_norm(model.one)

    class Held(Masked):
        def hold(self) -> None:
            free = "one.parametrizations.weight.original1"
            with torch.no_grad():
                columns = self.masks[free].flatten(1).any(0).view(self.masks[free].shape[1:])
                self.masks[free] = columns.expand_as(self.masks[free]).to(torch.float64)
            super().hold()

    optimizer = OPTIMIZERS["adamw"](model.parameters())
    train(model, optimizer, X, 3)
    network = netsurgery.trace(model, (X,))
    edit = netsurgery.Edit(network, {g.name: tuple(range(0, g.size, 2)) for g in network.prunable})
    assert any(member.parameter.startswith("one.") for name in edit.keep for member in network[name].members)
    twin, other, _ = copied(model, optimizer)
    whole = twin.one.parametrizations.weight.original1.detach().clone()
    masked = Held(twin, edit)
    with torch.no_grad():
        left, shape = twin.one.parametrizations.weight.original1, (-1, 1, 1, 1)
        shorter = torch.where(left.flatten(1).any(1), left.flatten(1).norm(dim=1) / whole.flatten(1).norm(dim=1), 1.0)
        twin.one.parametrizations.weight.original0.mul_(shorter.view(shape))
    small = netsurgery.rewrite(model, edit, optimizer=optimizer)
    for _ in range(3):
        found, wanted = train(small, optimizer, X, 1), train(twin, other, X, 1, None, masked)
        assert found == pytest.approx(wanted, abs=1e-9)
    assert_same(small, masked, optimizer, other)


# What an optimizer is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
def test_groups_keep_order_settings_names_and_what_is_not_the_models(inplace: bool) -> None:
    model, extra = built(), nn.Parameter(torch.ones(8, dtype=torch.float64))
    weights = [(n, p) for n, p in model.named_parameters() if p.dim() > 1]
    rest = [(n, p) for n, p in model.named_parameters() if p.dim() == 1]
    groups = [{"params": weights, "lr": 0.3}, {"params": [("extra", extra), *rest], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, 0.01, momentum=0.9, weight_decay=0.1)
    extra.grad = torch.ones_like(extra)
    train(model, optimizer, X, 1)
    extra.grad = torch.ones_like(extra)
    optimizer.step()
    seen: list[str] = []
    optimizer.register_step_post_hook(lambda *_: seen.append("stepped"))
    lists = [group["params"] for group in optimizer.param_groups]
    momentum = optimizer.state[extra]["momentum_buffer"]
    small = netsurgery.apply(model, [MagnitudeScore(), PruneChannels(0.5)], (X,), inplace=inplace, optimizer=optimizer)
    mine = dict(small.named_parameters())
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [
        [id(mine[n]) for n, _ in weights],
        [id(extra), *(id(mine[n]) for n, _ in rest)],
    ]
    assert [group["params"] for group in optimizer.param_groups] == lists
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.01]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert optimizer.param_groups[1]["param_names"] == ["extra", *(n for n, _ in rest)]
    assert optimizer.state[extra]["momentum_buffer"] is momentum and momentum.shape == (8,)
    train(small, optimizer, X, 1)
    assert seen == ["stepped"]
    again = torch.optim.SGD([{"params": g["params"]} for g in optimizer.param_groups], 1.0, momentum=0.5)
    again.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    stem = mine["stem.weight"]
    assert torch.equal(again.state[stem]["momentum_buffer"], optimizer.state[stem]["momentum_buffer"])


@pytest.mark.parametrize("inplace", [False, True])
def test_several_optimizers_and_a_gradient_scaler(inplace: bool) -> None:
    model = built()
    named = dict(model.named_parameters())
    one = torch.optim.AdamW([p for n, p in named.items() if n.startswith("stem")], 0.01)
    two = torch.optim.SGD([p for n, p in named.items() if not n.startswith("stem")], 0.01, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu")

    def step(model: nn.Module) -> None:
        loss = model(X).square().mean()
        for optimizer in (one, two):
            optimizer.zero_grad()
        scaler.scale(loss).backward()
        for optimizer in (one, two):
            scaler.step(optimizer)
        scaler.update()

    step(model)
    small = netsurgery.apply(model, [RandomKeep(3)], (X,), inplace=inplace, optimizer=[one, two])
    before = {name: tensor.clone() for name, tensor in small.named_parameters()}
    step(small)
    assert scaler.get_scale() == 65536.0
    assert all(not torch.equal(before[name], tensor) for name, tensor in small.named_parameters())
    assert len(one.state) + len(two.state) == len(before)


class Lookahead(Optimizer):
    """Around another optimizer: both keep states, and their groups are the same dictionaries."""

    def __init__(self, base: Optimizer) -> None:
        super().__init__(base.param_groups, {})
        self.base, self.param_groups = base, base.param_groups

    def step(self, closure: Any = None) -> None:
        self.base.step(closure)
        with torch.no_grad():
            for param in (p for g in self.param_groups for p in g["params"]):
                slow = self.state[param].setdefault("slow", param.clone())
                param.copy_(slow.lerp_(param, 0.5))


def test_an_optimizer_around_another() -> None:
    model = built()
    optimizer = Lookahead(torch.optim.AdamW(model.parameters(), 0.01))
    train(model, optimizer, X, 3)
    small = netsurgery.apply(model, [RandomKeep(2)], (X,), optimizer=optimizer)
    for param in small.parameters():
        assert torch.equal(optimizer.state[param]["slow"], param)
        assert optimizer.base.state[param]["exp_avg"].shape == param.shape
    assert len(optimizer.state) == len(optimizer.base.state) == len(list(small.parameters()))
    train(small, optimizer, X, 2)


def test_a_training_step_wrapped_by_a_schedule_is_the_same_object() -> None:
    model = built()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    schedule = SCHEDULES["cosine"](optimizer)
    small = netsurgery.apply(model, [RandomKeep(1)], (X,), optimizer=optimizer)
    assert schedule.optimizer is optimizer
    train(small, optimizer, X, 2, schedule)
    assert schedule.last_epoch == 2


# States of other shapes --------------------------------------------------------------------------------------------


def operated(optimizer: Optimizer, model: nn.Module, x: Tensor, **keep: list[int]) -> nn.Module:
    network = netsurgery.trace(model, (x,))
    edit = netsurgery.Edit(network, {name: tuple(units) for name, units in keep.items()})
    return netsurgery.rewrite(model, edit, optimizer=optimizer)


def test_adafactor_keeps_rows_and_columns() -> None:
    model = built(Matrices)
    optimizer = torch.optim.Adafactor(model.parameters(), 0.01)
    train(model, optimizer, ROWS, 3)
    before = {n: dict(optimizer.state[p]) for n, p in model.named_parameters()}
    small = operated(optimizer, model, ROWS, a=[0, 3, 7], b=[2, 8])
    after = {n: optimizer.state[p] for n, p in small.named_parameters()}
    assert torch.equal(after["b.weight"]["row_var"], before["b.weight"]["row_var"][[2, 8]])
    assert torch.equal(after["b.weight"]["col_var"], before["b.weight"]["col_var"][:, [0, 3, 7]])
    assert torch.equal(after["a.weight"]["row_var"], before["a.weight"]["row_var"][[0, 3, 7]])
    assert torch.equal(after["a.weight"]["col_var"], before["a.weight"]["col_var"])
    assert after["c.weight"]["step"] is before["c.weight"]["step"]
    train(small, optimizer, ROWS, 2)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.8 has no Muon")
def test_muon_keeps_its_momentum() -> None:
    model = built(Matrices)
    optimizer = torch.optim.Muon(model.parameters(), 0.01)
    train(model, optimizer, ROWS, 3)
    momentum = {n: optimizer.state[p]["momentum_buffer"].clone() for n, p in model.named_parameters()}
    small = operated(optimizer, model, ROWS, a=[0, 3, 7], b=[2, 8])
    found = {n: optimizer.state[p]["momentum_buffer"] for n, p in small.named_parameters()}
    assert torch.equal(found["a.weight"], momentum["a.weight"][[0, 3, 7]])
    assert torch.equal(found["b.weight"], momentum["b.weight"][[2, 8]][:, [0, 3, 7]])
    assert torch.equal(found["c.weight"], momentum["c.weight"][:, [2, 8]])
    train(small, optimizer, ROWS, 2)


def with_state(model: nn.Module, **made: Callable[[Tensor], Any]) -> Optimizer:
    """An optimizer that keeps these things of each parameter."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for param in model.parameters():
        optimizer.state[param] = {name: make(param.detach()) for name, make in made.items()}
    return optimizer


def test_factors_by_their_usual_names_though_the_matrix_is_square() -> None:
    model = built(Matrices)
    optimizer = with_state(
        model, exp_avg_sq_row=lambda p: torch.arange(p.shape[0]), exp_avg_sq_col=lambda p: torch.arange(p.shape[1])
    )
    small = operated(optimizer, model, ROWS, a=[0, 3, 7], b=[2, 8])
    assert optimizer.state[small.b.weight]["exp_avg_sq_row"].tolist() == [2, 8]
    assert optimizer.state[small.b.weight]["exp_avg_sq_col"].tolist() == [0, 3, 7]


def test_other_names_where_the_shape_is_enough() -> None:
    model = built(Matrices)
    model.b = nn.Linear(9, 8, bias=False, dtype=torch.float64)
    model.c = nn.Linear(8, 4, bias=False, dtype=torch.float64)
    optimizer = with_state(model, columns=lambda p: torch.arange(p.shape[1]), master_copy=lambda p: p.float())
    small = operated(optimizer, model, ROWS, a=[0, 3, 7], b=[2, 6])
    assert optimizer.state[small.b.weight]["columns"].tolist() == [0, 3, 7]
    assert optimizer.state[small.c.weight]["columns"].tolist() == [2, 6]
    for param in small.parameters():
        assert torch.equal(optimizer.state[param]["master_copy"], param.float())


class Square(nn.Module):
    """All weights are square: a matrix of their rows alone has their shape too."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        layer = (lambda: nn.Linear(6, 6, bias=False)) if dims == 2 else lambda: nn.Conv2d(6, 6, 3, bias=False)
        self.a, self.b, self.c = layer(), layer(), layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


@pytest.mark.parametrize("dims", [2, 4])
def test_a_matrix_of_rows_alone_is_refused_where_all_weights_are_square(dims: int) -> None:
    model, x = built(lambda: Square(dims)), torch.ones(1, 6, *[9] * (dims - 2), dtype=torch.float64)
    optimizer = with_state(model, precond_0=lambda p: p.flatten(1) @ p.flatten(1).T)
    with pytest.raises(RewriteError, match=r"'precond_0' of a.weight .* and it is not clear which dim"):
        operated(optimizer, model, x, a=[0, 3, 5], b=[2, 4])
    optimizer.state.clear()
    usual = torch.optim.AdamW(model.parameters())
    model(x).sum().backward()
    usual.step()
    small = operated([optimizer, usual], model, x, a=[0, 3, 5], b=[2, 4])
    assert usual.state[small.b.weight]["exp_avg"].shape == small.b.weight.shape


def test_what_another_weight_shows_is_known_of_a_square_one() -> None:
    model = built(Matrices)  # b is square, a is not
    optimizer = with_state(model, ours=lambda p: p.clone())
    small = operated(optimizer, model, ROWS, a=[0, 3, 7], b=[2, 8])
    assert torch.equal(optimizer.state[small.b.weight]["ours"], small.b.weight)


@pytest.mark.parametrize("inplace", [False, True])
def test_sparse_gradients_are_cut(inplace: bool) -> None:
    model = nn.Sequential(nn.Embedding(20, 8, sparse=True), nn.Linear(8, 3))
    optimizer, x = torch.optim.SparseAdam([model[0].weight]), torch.tensor([[1, 2, 5]])
    model(x).sum().backward()
    optimizer.step()
    grad, network = model[0].weight.grad.to_dense(), netsurgery.trace(model, x)
    (group,) = network.prunable
    edit = netsurgery.Edit(network, {group.name: (0, 2, 7)})
    small = netsurgery.rewrite(model, edit, inplace=inplace, optimizer=optimizer)
    assert torch.equal(small[0].weight.grad.to_dense(), grad[:, [0, 2, 7]])
    small(x).sum().backward()
    optimizer.step()
    assert optimizer.state[small[0].weight]["exp_avg"].shape == (20, 3)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            {"which": lambda p: p.sum(1)},
            r"'which' of b.weight has shape \(9,\), .* has \(9, 9\), and it is not clear which dim",
        ),
        ({"precond": lambda p: p @ p.T}, r"'precond' of a.weight has shape \(9, 9\), the parameter has \(9, 6\)"),
        ({"flat": lambda p: p.flatten()}, r"'flat' of a.weight has shape \(54,\)"),
        ({"blocks": lambda p: p.to(torch.uint8)}, r"'blocks' of a.weight is packed \(Tensor, torch.uint8\)"),
        ({"history": lambda p: [p, p]}, r"'history' of a.weight is a list of tensors"),
    ],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_states_that_cannot_be_cut_are_refused(made: dict, message: str, inplace: bool) -> None:
    model = built(Matrices)
    good, bad = torch.optim.AdamW(model.parameters(), 0.01), with_state(model, **made)
    train(model, good, ROWS, 2)
    ema = AveragedModel(model)
    before = copy.deepcopy((model.state_dict(), good.state_dict(), bad.state_dict(), ema.state_dict()))
    objects = [id(p) for o in (good, bad) for g in o.param_groups for p in g["params"]]
    network = netsurgery.trace(model, (ROWS,))
    edit = netsurgery.Edit(network, {"a": (0, 3, 7), "b": (2, 8)})
    with pytest.raises(RewriteError, match=f"the state of SGD cannot be cut with the weights: {message}"):
        netsurgery.rewrite(model, edit, inplace=inplace, optimizer=[good, bad], ema=ema)
    after = (model.state_dict(), good.state_dict(), bad.state_dict(), ema.state_dict())
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert objects == [id(p) for o in (good, bad) for g in o.param_groups for p in g["params"]]
    assert all(id(p) in objects for p in (*good.state, *bad.state)) and model.a.out_features == 9
    train(model, good, ROWS, 1)
    bad.state.clear()  # what the message offers
    netsurgery.rewrite(model, edit, inplace=inplace, optimizer=[good, bad], ema=ema)


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")  # of torch 2.8's own LBFGS
def test_lbfgs_moves_before_its_first_step_and_is_refused_after_it() -> None:
    model = built(Matrices)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(ROWS).square().mean()
        loss.backward()
        return loss

    model = operated(optimizer, model, ROWS, a=[0, 3, 7])
    optimizer.step(closure)
    with pytest.raises(RewriteError, match="the state of LBFGS cannot be cut with the weights"):
        operated(optimizer, model, ROWS, b=[2, 8])


def test_states_of_no_parameter_and_parameters_held_elsewhere_are_refused() -> None:
    model = built(Matrices)
    optimizer = with_state(model)
    optimizer.state["all"]["history"] = torch.zeros(7)
    with pytest.raises(RewriteError, match="'all' belongs to no parameter"):
        operated(optimizer, model, ROWS, a=[0])
    optimizer = with_state(model)
    optimizer.watched = {"first": [model.a.weight]}
    with pytest.raises(RewriteError, match=r"SGD\.watched holds parameters of the model outside param_groups"):
        operated(optimizer, model, ROWS, a=[0])
    network = netsurgery.trace(model, (ROWS,))
    netsurgery.rewrite(model, netsurgery.Edit(network, {"a": (0,)}), inplace=True, optimizer=optimizer)
    assert optimizer.watched["first"][0].shape == (1, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"optimizer": "sgd"},
            r"optimizer=\.\.\. takes a torch Optimizer or a list of them, got 'sgd'",
        ),
        ({"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(9, 6))])}, "SGD holds none of the model's parameters"),
        ({"ema": {"a": 1}}, r"ema=\.\.\. takes a torch Module or a list of them, got {'a': 1}"),
        ({"ema": nn.Linear(2, 3)}, "ema=Linear holds no module with the names and shapes of Matrices"),
    ],
)
def test_what_is_not_of_the_model(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        netsurgery.apply(built(Matrices), [RandomKeep()], (ROWS,), **arguments)


# Averages of the weights -------------------------------------------------------------------------------------------


def averaged(kind: str, model: nn.Module) -> tuple[nn.Module, Callable[[nn.Module], Any]]:
    """An average of a model's weights, and how it is updated."""
    if kind == "swa":
        swa = AveragedModel(model)
        return swa, swa.update_parameters
    if kind == "ema":
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=True)
        return ema, ema.update_parameters
    if kind == "timm":
        timm = ModelEmaV3(model, decay=0.7)
        return timm, timm.update
    plain = copy.deepcopy(model)

    @torch.no_grad()
    def update(live: nn.Module) -> None:
        for mine, other in zip(plain.state_dict().values(), live.state_dict().values(), strict=True):
            mine.copy_(other if not mine.is_floating_point() else mine.lerp(other, 0.3))

    return plain, update


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", ["swa", "ema", "timm", "plain"])
def test_averages_go_on(kind: str, inplace: bool) -> None:
    """As without surgery, the average of the removed elements aside: it says nothing of the others."""
    model = built()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    ema, update = averaged(kind, model)
    for _ in range(3):
        train(model, optimizer, X, 1)
        update(model)
    edit = netsurgery.plan(model, [RandomKeep(3)], (X,))
    wanted = netsurgery.rewrite(ema if kind == "plain" else ema.module, edit)
    average = ema if kind == "plain" else ema.module
    objects, twin = {n: id(p) for n, p in ema.named_parameters()}, copy.deepcopy(ema)
    small = netsurgery.rewrite(model, edit, inplace=inplace, optimizer=optimizer, ema=ema)
    assert {n: id(p) for n, p in ema.named_parameters()} == objects
    assert (ema if kind == "plain" else ema.module) is average
    torch.testing.assert_close(average.state_dict(), wanted.state_dict(), rtol=0, atol=0)
    assert average.flat.in_features == small.flat.in_features < 96
    train(small, optimizer, X, 1)
    update(small)
    if kind == "ema":
        assert ema.n_averaged == twin.n_averaged + 1
        for mine, before, live in zip(average.parameters(), wanted.parameters(), small.parameters(), strict=True):
            torch.testing.assert_close(mine, before.lerp(live, 0.3))
        for mine, before, live in zip(average.buffers(), wanted.buffers(), small.buffers(), strict=True):
            if mine.is_floating_point():
                torch.testing.assert_close(mine, before.lerp(live, 0.3))
    assert average(X).shape == (6, 4)


def test_an_average_must_be_a_copy() -> None:
    model = built()
    with pytest.raises(InputError, match=r"ema=Sequential is not a copy: 'stem.weight' is the model's own tensor"):
        netsurgery.apply(model, [RandomKeep()], (X,), ema=nn.Sequential(model))


def test_several_removals_in_one_plan() -> None:
    model = built()
    optimizer, (ema, _) = OPTIMIZERS["sgd"](model.parameters()), averaged("ema", model)
    train(model, optimizer, X, 2)
    passes = [MagnitudeScore(), PruneChannels(0.3), MagnitudeScore(p=1), PruneChannels(0.3)]
    edit = netsurgery.plan(model, passes, (X,))
    twin, other, _ = copied(model, optimizer)
    masked = Masked(twin, edit)
    small = netsurgery.apply(model, passes, (X,), optimizer=optimizer, ema=[ema])
    train(small, optimizer, X, 2)
    train(twin, other, X, 2, None, masked)
    assert_same(small, masked, optimizer, other)
    assert [p.shape for p in ema.module.parameters()] == [p.shape for p in small.parameters()]
