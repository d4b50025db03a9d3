"""Growing changes no output: copies share what they give, new units are read by zeros."""

import copy
import json
import re
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor, nn

import netsurgery
import random_networks
import zoo
from growth import RandomGrowth, check_growth
from netsurgery import Copy, Edit, New
from netsurgery.analysis.growth import obstacles
from netsurgery.errors import InputError
from netsurgery.passes import MagnitudeScore, PlantChannels, PruneChannels, WidenChannels
from netsurgery.passes.compensation import compensate
from random_networks import THEMES, Program, programs
from test_random_networks import EXAMPLES, exhaustive


class Net(nn.Module):
    """A stem, a residual block with a depthwise convolution, a concatenation, and a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.wide, self.deep = nn.Conv2d(6, 5, 1), nn.Conv2d(5, 5, 3, padding=1, groups=5)
        self.back, self.side = nn.Conv2d(5, 6, 1), nn.Conv2d(6, 4, 1)
        self.hidden, self.head = nn.Linear(10 * 4, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.back(F.relu(self.deep(F.relu(self.wide(x)))))
        x = F.max_pool2d(torch.cat([x, self.side(x)], 1), 2)
        return self.head(F.relu(self.hidden(x.flatten(1))))


X = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def net() -> Net:
    torch.manual_seed(0)
    model = Net().double().eval()
    with torch.no_grad():
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
    return model


def grown(model: nn.Module, keep: dict, **others: object) -> nn.Module:
    return netsurgery.rewrite(model, Edit(netsurgery.trace(model, X), keep), **others)


# The oracle: nothing changes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_every_group_of_a_network_grows(seed: int) -> None:
    edit, left = check_growth(net(), (X,), 1e-12, RandomGrowth(seed))
    assert edit.grown == ("stem", "wide", "side", "hidden")
    assert not left


@pytest.mark.parametrize("examples", [EXAMPLES // 4, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("theme", THEMES)
def test_random_networks_grow(theme: str, examples: int) -> None:
    groups = {"grown": 0, "left": 0}

    @exhaustive(examples)
    @given(programs(theme))
    def run(program: Program) -> None:
        torch.manual_seed(0)
        model, inputs = random_networks.build(program), random_networks.example(program)
        edit, left = check_growth(model, inputs, 1e-10, RandomGrowth(program.seed))
        groups["grown"] += len(edit.grown)
        groups["left"] += len(left)

    run()
    assert groups["grown"] > groups["left"], groups


@pytest.mark.parametrize(
    "name",
    [
        "mobilenet_v3_small",
        "shufflenet_v2_x0_5",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("densenet121", "resnext50_32x4d", "regnet_y_400mf")),
    ],
)
def test_classifiers_grow(name: str) -> None:
    edit, left = check_growth(zoo.build(name).double(), (zoo.images(name).double(),), 1e-10, RandomGrowth())
    assert not left and len(edit.grown) == len(edit.network.prunable)


def test_float32_keeps_five_digits() -> None:
    model = zoo.build("mobilenet_v3_small")
    growth = RandomGrowth(shares=(0.25,))  # halves and quarters are exact, and none cancels another
    check_growth(model, (zoo.images("mobilenet_v3_small"),), 1e-5, growth)  # as exact as a removal


# What a unit becomes -----------------------------------------------------------------------------------------------


def test_copies_are_made_alike_and_share_what_is_read() -> None:
    model = net()
    new = grown(model, {"hidden": (6, 0, Copy(6), Copy(2, share=0.25), 1, 2, 3, 4, 5)})
    order = [6, 0, 6, 2, 1, 2, 3, 4, 5]
    shares = torch.tensor([0.5, 1, 0.5, 0.25, 1, 0.75, 1, 1, 1], dtype=torch.float64)
    assert torch.equal(new.hidden.weight, model.hidden.weight[order])
    assert torch.equal(new.hidden.bias, model.hidden.bias[order])
    assert torch.equal(new.head.weight, model.head.weight[:, order] * shares)
    assert (new.hidden.out_features, new.head.in_features) == (9, 9)


def test_new_units_are_read_by_zeros() -> None:
    model = net()
    new = grown(model, {"stem": (0, 1, New(), 2, 3, 4, 5, New())})
    for reader in (new.wide, new.side):
        assert not reader.weight[:, [2, 7]].any()
    assert torch.equal(new.wide.weight[:, [0, 1, 3, 4, 5, 6]], model.wide.weight)
    assert torch.equal(new.norm.weight[[2, 7]], torch.ones(2).double())
    assert torch.equal(new.norm.running_var[[2, 7]], torch.ones(2).double())
    assert not new.norm.bias[[2, 7]].any() and not new.norm.running_mean[[2, 7]].any()
    made = torch.cat([new.stem.weight[[2, 7]].flatten(), new.back.weight[[2, 7]].flatten()])
    assert made.all() and len(made.unique()) == len(made)


def test_he_has_the_published_variance_and_the_seed_decides() -> None:
    model = nn.Sequential(nn.Conv2d(8, 2, 3), nn.ReLU(), nn.Conv2d(2, 1, 1))
    network = netsurgery.trace(model, torch.randn(1, 8, 5, 5))
    one, same, other = (
        netsurgery.rewrite(model, Edit(network, {"0": (0, 1, *[New(seed=seed)] * 2000)})) for seed in (1, 1, 2)
    )
    assert one[0].weight[2:].var().item() == pytest.approx(2 / (8 * 9), rel=0.02)
    assert torch.equal(one[0].weight, same[0].weight) and not torch.equal(one[0].weight, other[0].weight)


def test_units_go_come_and_change_places_at_once() -> None:
    model = net()
    edit = Edit(netsurgery.trace(model, X), {"wide": (4, New(), 2, Copy(2), 0), "side": (3, 1, 0, 2)})
    new = netsurgery.rewrite(model, edit)
    assert netsurgery.verify(model, new, edit, X) < 1e-12
    assert edit.summary() == "removed 2 units of 1 groups; added 2 units of 1 groups"
    assert "side.weight 4x6x1x1 of other units" in edit.diff().splitlines()  # as many as before
    silenced = copy.deepcopy(model)
    with torch.no_grad():
        silenced.back.weight[:, [1, 3]] = 0
    torch.testing.assert_close(new(X), silenced(X), rtol=1e-12, atol=1e-12)


def test_planting_and_pruning_back_gives_the_original_bit_for_bit() -> None:
    model = net()
    network = netsurgery.trace(model, X)
    edit = Edit(network, {"stem": (0, New(), 1, 2, 3, 4, 5), "hidden": (*range(7), New())})
    larger = netsurgery.rewrite(model, edit)
    back = Edit(netsurgery.trace(larger, X), {"stem": (0, 2, 3, 4, 5, 6), "hidden": tuple(range(7))})
    again = netsurgery.rewrite(larger, back)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert not edit.then(back).keep


def test_in_training_mode_copies_and_new_units_change_nothing_either() -> None:
    model = net().train()
    new = grown(copy.deepcopy(model), {"stem": (0, Copy(0), New(), 1, 2, 3, 4, 5)})
    torch.testing.assert_close(new(X), model(X), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(new.norm.running_mean[[0, 1, 3]], model.norm.running_mean[[0, 0, 1]])


# Statistics over units ---------------------------------------------------------------------------------------------


class Normed(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 6), norm, nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.gelu(self.norm(self.first(x))))


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.RMSNorm(6), nn.GroupNorm(1, 6), nn.GroupNorm(3, 6)])
def test_statistics_stay_where_each_unit_has_as_many_copies(norm: nn.Module) -> None:
    model = Normed(norm).double()
    x = torch.randn(4, 5).double()
    network = netsurgery.trace(model, x)
    (name,) = (
        group.name for group in network.prunable if obstacles(network, {group.name: (*range(group.size), New())})
    )
    size = network[name].size
    thrice = tuple(unit for u in range(size) for unit in (u, Copy(u), Copy(u)))
    new = netsurgery.rewrite(model, Edit(network, {name: thrice}))
    torch.testing.assert_close(new(x), model(x), rtol=1e-12, atol=1e-12)
    once = (*range(size), *(Copy(unit) for unit in range(1, size)))
    for units in ((*range(size), New()), (*range(size), Copy(0)), once):
        with pytest.raises(InputError, match=f"'{name}' cannot have more units without .* a whole factor"):
            Edit(network, {name: units})


class Softmax(Normed):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).softmax(-1))


class Summed(Normed):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(y) + y.sum(-1, keepdim=True)


class Unbiased(Normed):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(y / y.std(-1, keepdim=True))


class Tied(Normed):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(self.first(x)), self.first.weight.T)


class WeightNorm(Normed):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__(norm)
        self.last = nn.utils.parametrizations.weight_norm(self.last)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Softmax, "works across these units without weights"),
        (Summed, "works across these units without weights"),
        (Unbiased, "it takes (statistics|a variance) over these units"),
        (Tied, "the tensor that makes these units reads them, too"),
        (WeightNorm, "works across these units without weights"),
    ],
)
def test_what_would_change_outputs_is_refused_by_name(kind: type[Normed], why: str) -> None:
    model = kind(nn.Identity()).double()
    network = netsurgery.trace(model, torch.randn(4, 5).double())
    with pytest.raises(InputError, match=f"group 'first' cannot have more units .*{why}"):
        Edit(network, {"first": (*range(6), New())})
    with pytest.raises(InputError, match=f"group 'first' cannot have more units .*{why}"):
        Edit(network, {"first": (*range(6), *(Copy(unit) for unit in range(6)))})


class Body(Normed):
    """A network around a function of its units and its last layer."""

    def __init__(self, body: Callable[..., Tensor]) -> None:
        super().__init__(nn.Identity())
        self.body, self.other = body, nn.Linear(6, 2)
        self.square, self.scale = nn.Linear(6, 6), nn.Parameter(torch.rand(6) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, self.first(x))


PLANTED, COPIED = (*range(6), New()), (*range(6), Copy(2))
DOUBLED = (*range(6), *map(Copy, range(6)))
REFUSED: list[tuple[Callable[..., Tensor], tuple, str]] = [
    (lambda m, h: m.last(h / h.std(-1, keepdim=True)), DOUBLED, "variance over these units .*unbiased"),
    (lambda m, h: m.last(h) * torch.var_mean(h, -1, keepdim=True)[0], DOUBLED, "variance over these units"),
    (lambda m, h: m.last(h) + h.var(-1, correction=2, keepdim=True), DOUBLED, "variance over these units"),
    (lambda m, h: torch.cdist(h, m.last.weight), COPIED, "works across these units without weights"),
    (lambda m, h: m.last(h) + m.other(h * m.last.weight[0]), COPIED, "used otherwise, too: aten.select"),
    (lambda m, h: m.last(h) + m.other(h + m.last.weight.mean(0)), COPIED, "used otherwise, too: aten.mean"),
    (lambda m, h: (h @ m.scale)[:, None] + m.other(h * m.scale), COPIED, "used otherwise, too: aten.mul"),
    (lambda m, h: m.last(h + m.square(h) + h @ m.square.weight), COPIED, "the tensor that makes these units"),
    (lambda m, h: m.last(h.log()), PLANTED, "gives no number for some values, .*aten.log"),
    (lambda m, h: m.last((h - 1).sqrt()), PLANTED, "gives no number for some values"),
    (lambda m, h: m.last(h / h.sum(0, keepdim=True)), PLANTED, "gives no number for some values, .*aten.div"),
    (lambda m, h: m.last(torch.addcdiv(h, h, h.relu().sum(0))), PLANTED, "gives no number for some values"),
    (lambda m, h: m.last(h**0.5), PLANTED, "gives no number for some values"),
    (lambda m, h: m.last(h.tanh().acos()), PLANTED, "gives no number for some values"),
]


@pytest.mark.parametrize(("body", "units", "why"), REFUSED)
def test_what_shares_and_zeros_do_not_keep_is_refused(body: Callable[..., Tensor], units: tuple, why: str) -> None:
    network = netsurgery.trace(Body(body).double(), torch.randn(4, 5).double())
    with pytest.raises(InputError, match=f"group 'first' cannot have more units .*{why}"):
        Edit(network, {"first": units})


KEPT: list[Callable[..., Tensor]] = [
    lambda m, h: m.last(h + m.square(h)),  # the layer makes and reads the same units
    lambda m, h: m.last(h + h @ m.square.weight),
    lambda m, h: m.last(F.glu(torch.cat([h, m.square(h)], 1), 1)),
    lambda m, h: m.last(F.pad(h, (1, 1))[:, 1:-1]),
    lambda m, h: m.last((h.square() + 1e-3).log() + (1 + h.exp()).rsqrt()),
    lambda m, h: m.last(F.normalize(h, dim=0) + h / (h.std(0, keepdim=True) + 1e-5)),
    lambda m, h: m.last(h.relu().sqrt() + h.sigmoid().reciprocal() + h.abs().clamp(min=0.1) ** 1.5),
    lambda m, h: m.last((h + m.scale) / m.scale),  # neither 0 nor 1 would do for both
    lambda m, h: m.last(h + m.scale.log() + h.sigmoid() ** (1 / m.scale)),
]


@pytest.mark.parametrize("body", KEPT)
@pytest.mark.parametrize("units", [PLANTED, COPIED, (2, 1, Copy(2), 0, New(), 3, 4, 5)])
def test_what_keeps_outputs_grows(body: Callable[..., Tensor], units: tuple) -> None:
    torch.manual_seed(1)
    model, x = Body(body).double(), torch.randn(4, 5).double()
    new = netsurgery.rewrite(model, Edit(netsurgery.trace(model, x), {"first": units}))
    torch.testing.assert_close(new(x), model(x), rtol=1e-12, atol=1e-12)
    new(x).square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in new.parameters())


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: object) -> None:
        super().__init__()
        self.layer, self.last = kind(5, 6, batch_first=True, **options), nn.LazyLinear(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(x)[0])


@pytest.mark.parametrize(
    ("kind", "options"),
    [(nn.LSTM, {"num_layers": 2}), (nn.GRU, {"bidirectional": True}), (nn.RNN, {}), (nn.LSTM, {"proj_size": 4})],
)
def test_recurrent_layers_grow(kind: type[nn.RNNBase], options: dict) -> None:
    torch.manual_seed(0)
    model, x = Recurrent(kind, **options).double(), torch.randn(3, 4, 5).double()
    model(x)
    edit, left = check_growth(model, (x,), 1e-12, RandomGrowth(3))
    assert edit.grown and not left


class Tokens(nn.Module):
    """A batch norm of tokens, whose statistics run over the units in training."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 6), nn.BatchNorm1d(4), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).relu())


@pytest.mark.parametrize("training", [False, True])
def test_batch_norms_across_units_need_equal_copies_in_any_mode(training: bool) -> None:
    model, x = Tokens().double().train(training), torch.randn(3, 4, 5).double()
    network = netsurgery.trace(model, x)
    for units in (PLANTED, COPIED):
        with pytest.raises(InputError, match="takes statistics over these units"):
            Edit(network, {"first": units})
    new = netsurgery.rewrite(model, Edit(network, {"first": DOUBLED}))
    torch.testing.assert_close(new.train()(x), model.train()(x), rtol=1e-12, atol=1e-12)


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.register_buffer("counts", torch.arange(12).view(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return (self.first(x) * 10).long() @ self.counts


def test_whole_numbers_have_no_shares() -> None:
    torch.manual_seed(0)
    model, x = Whole().double(), torch.randn(4, 5).double()
    network = netsurgery.trace(model, x)
    with pytest.raises(InputError, match="by whole numbers, of which copies cannot take shares"):
        Edit(network, {"first": COPIED})
    assert torch.equal(netsurgery.rewrite(model, Edit(network, {"first": PLANTED}))(x), model(x))


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(5, 6, dtype=torch.cdouble))
        self.last = nn.Parameter(torch.randn(6, 2, dtype=torch.cdouble))

    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_real(x.to(self.first.dtype) @ self.first @ self.last)


def test_new_units_of_complex_weights_are_no_zeros() -> None:
    model, x = Complex(), torch.randn(4, 5).double()
    new = netsurgery.rewrite(model, Edit(netsurgery.trace(model, x), {"first": (*PLANTED, Copy(0))}))
    assert new.first[:, 6].abs().min() > 0 and not new.last[6].any()
    torch.testing.assert_close(new(x), model(x), rtol=1e-12, atol=1e-12)


def test_slopes_begin_with_their_mean_and_units_may_all_be_new() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 6), nn.PReLU(6, 0.2), nn.Linear(6, 2)).double(), torch.randn(4, 5).double()
    new = netsurgery.rewrite(model, Edit(netsurgery.trace(model, x), {"0": (New(), New(), New(seed=1))}))
    torch.testing.assert_close(new[1].weight, torch.full((3,), 0.2).double())
    assert not new[0].bias.any() and new[0].weight.all()
    assert torch.equal(new(x), model[2].bias.expand(4, 2))


# What else follows -------------------------------------------------------------------------------------------------

OPTIMIZERS = [
    lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2),
    lambda p: torch.optim.AdamW(p, 1e-2, amsgrad=True),
    lambda p: torch.optim.Adagrad(p, 1e-2, initial_accumulator_value=0.5),
    lambda p: torch.optim.Rprop(p, 1e-2),
    lambda p: torch.optim.ASGD(p, 1e-2),
]


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("inplace", [False, True])
def test_state_of_copies_is_copied_and_that_of_new_units_begins(make: object, inplace: bool) -> None:
    model = net()
    optimizer = make(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    before = {key: value.clone() for key, value in optimizer.state[model.hidden.weight].items() if value.dim()}
    edit = Edit(netsurgery.trace(model, X), {"hidden": (*range(7), Copy(2), New())})
    new = netsurgery.rewrite(model, edit, inplace=inplace, optimizer=optimizer)
    fresh = nn.Linear(1, 1).double()
    start = make(fresh.parameters())
    fresh(torch.zeros(1, 1).double()).sum().backward()
    for key, value in before.items():
        after = optimizer.state[new.hidden.weight][key]
        assert torch.equal(after[:8], value[[*range(7), 2]])
        if key == "ax":
            assert torch.equal(after[8], new.hidden.weight[8])
        else:
            begins = {"sum": 0.5, "step_size": 1e-2}.get(key, 0.0)
            assert torch.equal(after[8], torch.full_like(after[8], begins)), key
    assert start.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    optimizer.zero_grad()
    new(X).square().mean().backward()
    optimizer.step()


def test_averages_grow_alike() -> None:
    model = net()
    average = torch.optim.swa_utils.AveragedModel(model)
    new = grown(model, {"stem": (*range(6), Copy(1), New())}, ema=average)
    for one, other in zip(new.state_dict().values(), average.module.state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("inplace", [False, True])
def test_gradients_are_those_of_the_larger_network(inplace: bool) -> None:
    model = net()
    model(X).square().mean().backward()
    keep = {"hidden": (*range(7), Copy(2), New()), "stem": (0, 1, Copy(1, share=0.3), 3, 4, 2, 5)}
    new = grown(model, keep, inplace=inplace)
    found = {name: parameter.grad for name, parameter in new.named_parameters()}
    new.zero_grad()
    new(X).square().mean().backward()
    for name, parameter in new.named_parameters():
        wanted = parameter.grad.clone()
        if name == "head.weight":  # what a new unit gives was not known
            assert not found[name][:, 8].any()
            wanted[:, 8] = 0
        torch.testing.assert_close(found[name], wanted, rtol=1e-10, atol=1e-14)


def test_sparse_gradients_are_shared_too() -> None:
    model = nn.Sequential(nn.Embedding(9, 6, sparse=True), nn.ReLU(), nn.Linear(6, 2)).double()
    x = torch.randint(0, 9, (4, 3), generator=torch.Generator().manual_seed(0))
    model(x).square().mean().backward()
    new = netsurgery.rewrite(model, Edit(netsurgery.trace(model, x), {"0": (0, *range(1, 6), Copy(0, share=0.3))}))
    found = new[0].weight.grad
    new.zero_grad()
    new(x).square().mean().backward()
    assert found is not None and found.is_sparse
    torch.testing.assert_close(found.to_dense(), new[0].weight.grad.to_dense(), rtol=1e-10, atol=1e-14)


def test_an_edit_that_grows_is_a_value() -> None:
    model = net()
    network = netsurgery.trace(model, X)
    edit = Edit(network, {"wide": (0, 1, Copy(1), 3, New(seed=4)), "hidden": (*range(7), Copy(6, share=0.1))})
    again = Edit.from_json(edit.to_json(), network)
    assert again == edit and json.loads(edit.to_json())["format"] == 3
    assert again.keep["hidden"][6:] == (Copy(6, share=0.9), Copy(6, share=0.1))
    assert edit.after == netsurgery.cost(netsurgery.rewrite(model, edit), X)
    removal = Edit(network, {"wide": (0, 1)})
    assert json.loads(removal.to_json())["format"] == 2


def test_edits_compose_as_they_are_carried_out() -> None:
    model = net()
    first = Edit(netsurgery.trace(model, X), {"hidden": (0, 1, 2, Copy(2), 4, 6), "wide": (*range(5), New())})
    middle = netsurgery.rewrite(model, first)
    later = Edit(netsurgery.trace(middle, X), {"hidden": (3, 0, Copy(0), 1, 5), "wide": (5, 0, 1, 2)})
    end, at_once = netsurgery.rewrite(middle, later), netsurgery.rewrite(model, first.then(later))
    assert first.then(later).keep["hidden"] == (Copy(2, 0.5), Copy(0, 0.5), Copy(0, 0.5), 1, 6)
    for one, other in zip(end.state_dict().values(), at_once.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"wide": (0, Copy(9))}, r"'wide': units that stay must be distinct and in 0..4"),
        ({"wide": (Copy(0, share=0.5), 1)}, "the shares of unit 0 add up to 0.5, not to 1"),
        ({"head": (*range(3), New())}, "'head' is locked: the network output"),
        ({"wide": (0, New)}, "'wide': the units that stay must be a list of whole numbers"),
    ],
)
def test_impossible_growth(keep: dict, message: str) -> None:
    network = netsurgery.trace(net(), X)
    with pytest.raises(InputError, match=message):
        Edit(network, keep)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Copy(1.5), r"Copy\(1.5, share=None\): the index of a unit, and a number"),
        (lambda: Copy("a"), "the index of a unit"),
        (lambda: Copy(1, share="half"), r"Copy\(1, share='half'\): the index of a unit, and a number"),
        (lambda: Copy(1, share=float("nan")), "a share is a finite number"),
        (lambda: New(seed=1.5), r"New\(seed=1.5\): a whole number"),
    ],
)
def test_units_are_checked_where_they_are_made(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_whole_shares_of_several_copies_are_written_and_read() -> None:
    model = net()
    network = netsurgery.trace(model, X)
    edit = Edit(network, {"side": (0, 1, 2, 3, Copy(0, share=1), Copy(0, share=1), Copy(0, share=-2))})
    assert Edit.from_json(edit.to_json(), network) == edit
    larger = netsurgery.rewrite(model, edit)
    torch.testing.assert_close(larger(X), model(X), rtol=1e-12, atol=1e-12)
    back = Edit(netsurgery.trace(larger, X), {"side": (4, 1, 2, 3, 5)})
    both = edit.then(back)
    assert both.keep["side"] == (Copy(0, share=1), 1, 2, 3, Copy(0, share=1))
    assert Edit.from_json(both.to_json(), network) == both


def test_a_later_edit_cannot_copy_what_an_earlier_one_makes() -> None:
    model = net()
    first = Edit(netsurgery.trace(model, X), {"wide": (*range(5), New())})
    later = Edit(netsurgery.trace(netsurgery.rewrite(model, first), X), {"wide": (*range(6), Copy(5))})
    with pytest.raises(InputError, match="carry this one out first"):
        first.then(later)


# Passes ------------------------------------------------------------------------------------------------------------


def test_widening_keeps_the_function_and_prices_it() -> None:
    model = net()
    edit = netsurgery.plan(model, [WidenChannels(1.5)], X)
    wide = netsurgery.rewrite(model, edit)
    assert edit.counts == {"stem": 9, "wide": 8, "side": 6, "hidden": 10}
    assert edit.summary() == "asked to add 50% of the channels of each layer, added 11 units to the 22 of 4 groups"
    torch.testing.assert_close(wide(X), model(X), rtol=1e-12, atol=1e-12)
    assert netsurgery.cost(wide, X) == edit.after


def test_units_get_as_many_copies_as_others_or_one_more() -> None:
    edit = netsurgery.plan(net(), [WidenChannels(2.4, seed=3, include="hidden")], X)
    many = Counter(unit if isinstance(unit, int) else unit.unit for unit in edit.keep["hidden"])
    assert sorted(many.values()) == [2, 2, 2, 2, 3, 3, 3]
    other = netsurgery.plan(net(), [WidenChannels(2.4, seed=4, include="hidden")], X)
    assert other.keep != edit.keep


def test_a_multiple_is_rounded_up() -> None:
    edit = netsurgery.plan(net(), [WidenChannels(1.1, multiple_of=4)], X)
    assert edit.counts == {"stem": 8, "wide": 8, "hidden": 8}  # side: 4 already


def test_noise_moves_shares_so_that_copies_part_in_training() -> None:
    model = net()
    for noise, apart in ((0.0, False), (0.5, True)):
        wide = netsurgery.apply(model, [WidenChannels(2, noise=noise)], X)
        torch.testing.assert_close(wide(X), model(X), rtol=1e-12, atol=1e-12)
        wide(X).square().mean().backward()
        rows = wide.hidden.weight.grad
        assert torch.allclose(rows[:7], rows[7:]) != apart


def test_planting_adds_what_is_asked_for_by_modules() -> None:
    model = net()
    edit = netsurgery.plan(model, [PlantChannels({"wide": 3, "hid*": 2})], X)
    assert edit.counts == {"wide": 8, "hidden": 9}
    assert edit.summary() == "asked to add 3 in 'wide', 2 in 'hid*', added 5 units to the 12 of 2 groups"
    torch.testing.assert_close(netsurgery.rewrite(model, edit)(X), model(X), rtol=1e-12, atol=1e-12)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))


class Encoder(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 8), Attention(), nn.LayerNorm(8), nn.Linear(8, 3))


def test_heads_grow_where_dimensions_within_them_cannot() -> None:
    torch.manual_seed(0)
    model, x = Encoder().double(), torch.randn(2, 6, 5).double()
    network = netsurgery.trace(model, x)
    heads = next(group.name for group in network.groups if group.unit == "head")
    edit = netsurgery.plan(model, [PlantChannels(3)], x)
    assert edit.counts == {heads: 3, "1.up": 15}  # a head is four channels
    assert list(edit.outcomes[0].short) == ["0"] and "by a whole factor" in edit.outcomes[0].short["0"]
    torch.testing.assert_close(netsurgery.rewrite(model, edit)(x), model(x), rtol=1e-12, atol=1e-12)
    twice = netsurgery.plan(model, [WidenChannels(2)], x)
    assert twice.counts == {"0": 16, heads: 4, "1.up": 24} and not twice.outcomes[0].short
    torch.testing.assert_close(netsurgery.rewrite(model, twice)(x), model(x), rtol=1e-12, atol=1e-12)


class Flipped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).flip(-1)).relu())


@pytest.mark.parametrize("settings", [PlantChannels(2), PlantChannels({"first": 1, "second": 2}), WidenChannels(2)])
def test_locked_layers_are_named(settings: netsurgery.Pass) -> None:
    edit = netsurgery.plan(Flipped(), [settings], torch.randn(4, 5))
    assert list(edit.counts) == ["second"]
    assert edit.outcomes[0].short["first"].startswith("0 of 6 (locked: units are identified by position: aten.flip")


def test_a_locked_layer_alone_is_an_error() -> None:
    with pytest.raises(InputError, match=r"nothing of Flipped can grow .*first: 0 of 6 \(locked: units are identified"):
        netsurgery.plan(Flipped(), [PlantChannels(2, include="first")], torch.randn(4, 5))


class Joined(nn.Module):
    """Statistics are taken over two groups together, and in the second case over a constant with them."""

    def __init__(self, constant: bool) -> None:
        super().__init__()
        self.one, self.other, self.last = nn.Linear(5, 4), nn.Linear(5, 3), nn.Linear(9 if constant else 7, 2)
        self.constant = constant

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.one(x), self.other(x), *([x.new_zeros(len(x), 2)] if self.constant else [])], 1)
        return self.last(y - y.mean(1, keepdim=True))


def test_statistics_over_several_groups_need_all_of_them() -> None:
    x = torch.randn(4, 5).double()
    model = Joined(constant=False).double()
    wide = netsurgery.apply(model, [WidenChannels(2)], x)
    torch.testing.assert_close(wide(x), model(x), rtol=1e-12, atol=1e-12)
    for settings in (WidenChannels(2, include="one"), PlantChannels(1)):
        with pytest.raises(InputError, match=r"nothing of Joined can grow .* a whole factor"):
            netsurgery.plan(model, [settings], x)
    model = Joined(constant=True).double()  # whose code makes more zeros then
    wide = netsurgery.apply(model, [WidenChannels(2)], x)
    torch.testing.assert_close(wide(x), model(x), rtol=1e-12, atol=1e-12)
    assert wide.last.in_features == 18


def test_widening_and_pruning_in_one_pipeline() -> None:
    model = net()
    passes = [WidenChannels(2), MagnitudeScore(), PruneChannels(0.25)]
    edit = netsurgery.plan(model, passes, X)
    small, at_once = model, netsurgery.rewrite(model, edit)
    small = netsurgery.apply(netsurgery.apply(model, passes[:1], X), passes[1:], X)
    assert edit.counts == {"stem": 9, "wide": 8, "side": 6, "hidden": 11}
    torch.testing.assert_close(at_once(X), small(X), rtol=1e-12, atol=1e-12)
    with pytest.raises(InputError, match="some copies of units of 'stem' were removed again: verify each edit"):
        netsurgery.verify(model, at_once, edit, X)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WidenChannels(0.5), "a number of at least 1, .*; PruneChannels removes"),
        (lambda: WidenChannels(2, noise=1.0), r"noise=1.0\): a number in \[0, 1\)"),
        (lambda: WidenChannels(2, multiple_of=0), r"multiple_of=0\): a whole number"),
        (lambda: WidenChannels(2, unit="neuron"), "one or several of 'any', 'channel'"),
        (lambda: PlantChannels(0), "a whole number of at least 1"),
        (lambda: PlantChannels(2.5), "a whole number of at least 1"),
        (lambda: PlantChannels({}), "a whole number of at least 1"),
        (lambda: PlantChannels(2, init="zeros"), "'he' is the only initialisation"),
        (lambda: netsurgery.plan(net(), [PlantChannels(2, include="nothing.*")], X), "matches no module"),
        (
            lambda: netsurgery.plan(net(), [PlantChannels(2, include="head")], X),
            r"head: 0 of 3 \(locked: the network ou",
        ),
        (
            lambda: netsurgery.plan(net(), [PlantChannels(2, exclude="*")], X),
            "They leave no group with open units: netw",
        ),
        (lambda: netsurgery.plan(net(), [PlantChannels({"wide": 2, "nothing": 1})], X), "'nothing' matches no module"),
        (lambda: netsurgery.plan(net(), [WidenChannels(1)], X), "The factor adds less than one unit to each group"),
        (lambda: compensate(netsurgery.plan(net(), [PlantChannels(2)], X), "bias", X), "needs no compensation"),
    ],
)
def test_bad_settings(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


class Quiet(Attention):
    """Its own train() gives nothing back, as some do."""

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)


def test_code_whose_train_returns_nothing_follows() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 8), Quiet(), nn.Linear(8, 3)).double(), torch.randn(2, 6, 5).double()
    nn.Module.train(model, False)
    wide = netsurgery.apply(model, [WidenChannels(2)], x)
    torch.testing.assert_close(wide(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_new_unit_depends_on_its_seed_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    network = netsurgery.trace(model, torch.randn(2, 4).double())
    one = netsurgery.rewrite(model, Edit(network, {"0": (*range(6), New(seed=3), New(seed=5), New(seed=5))}))
    other = netsurgery.rewrite(model, Edit(network, {"0": (New(seed=5), *range(6)), "2": (*range(5), New())}))
    alone = netsurgery.rewrite(model, Edit(network, {"2": (*range(5), New())}))
    assert torch.equal(one[0].weight[7], other[0].weight[0]) and not torch.equal(*one[0].weight[7:])
    ratios = other[2].weight[5, 1:] / alone[2].weight[5]  # there are more inputs to share the variance
    torch.testing.assert_close(ratios, torch.full((6,), (6 / 7) ** 0.5).double())


@pytest.mark.parametrize(
    "growth", [PlantChannels({"4": 2}), PlantChannels(2, include="4"), WidenChannels(2, include="4")]
)
def test_a_locked_layer_that_is_named_is_named(growth: netsurgery.Pass) -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(2, 4)
    why = "4: 0 of 2 (locked: the network output has this dimension)"
    with pytest.raises(InputError, match=re.escape(why)):
        netsurgery.plan(model, [growth], x)
    assert why in str(netsurgery.plan(model, [PlantChannels({"0": 1, "4": 2})], x).outcomes[0])
    assert not netsurgery.plan(model, [PlantChannels(2, include=["[0-9]*"])], x).outcomes[0].short


@pytest.mark.parametrize(
    "growth", [PlantChannels({"b.down": 2}), PlantChannels(2, include=["b.down"]), PlantChannels({"b.*": 2})]
)
def test_a_layer_of_a_residual_stream_is_named(growth: PlantChannels) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 7), nn.Linear(7, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(self.up(x).relu())

    model, x = nn.Sequential(OrderedDict(a=nn.Linear(4, 6), b=Block(), c=nn.Linear(6, 2))), torch.randn(2, 4)
    why = "0 of 6 (also produced by a: include 'a' to grow it)"
    if growth.amount == {"b.*": 2}:
        assert netsurgery.plan(model, [growth], x).outcomes[0].short == {"a": why}
    else:
        with pytest.raises(InputError, match=re.escape(f"can grow with these settings. a: {why}")):
            netsurgery.plan(model, [growth], x)


def test_planting_again_makes_no_twins() -> None:
    model = net()
    for _ in range(2):
        model = netsurgery.apply(model, [PlantChannels(2)], X)
    made = model.hidden.weight[7:]
    assert made.shape[0] == 4 and len(made[:, 0].unique()) == 4


def test_a_group_of_new_units_alone_is_what_silence_leaves() -> None:
    model = net()
    edit = Edit(netsurgery.trace(model, X), {"wide": (New(), New())})
    assert netsurgery.verify(model, netsurgery.rewrite(model, edit), edit, X) < 1e-12


class Grouped(nn.Module):
    """Queries of four heads, keys and values of two, which the code repeats."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 2)).transpose(1, 2)
        k, v = (one.unflatten(-1, (2, 2)).transpose(1, 2).repeat_interleave(2, 1) for one in self.kv(x).chunk(2, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_what_has_grown_is_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 8), Grouped(), nn.Linear(8, 3)), torch.randn(2, 6, 5)
    edit = netsurgery.plan(model, [WidenChannels(2)], x)
    wide = netsurgery.rewrite(model, edit)
    netsurgery.save(tmp_path, wide, edit)
    assert torch.equal(netsurgery.load(tmp_path, copy.deepcopy(model))(x), wide(x))
