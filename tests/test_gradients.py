"""Scores from gradients that are there: those of gates at the readers of each unit."""

from __future__ import annotations

import copy
import logging
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import netsurgery
from netsurgery.errors import InputError
from netsurgery.passes import GradientScore, PruneChannels, TaylorScore, unit_scores
from netsurgery.passes.ablation import Ablation, AblationSettings
from netsurgery.passes.calibration import draw_samples
from netsurgery.passes.gate_gradients import gate_slopes
from test_language_models import MASKED, MODELS
from test_loss_increase import NETWORKS, data_for, randomised


def slopes(model: nn.Module, data: tuple[Any, Tensor], loss: Any = None, example: Any = None) -> dict[str, Tensor]:
    """The slope of the loss summed over samples, by a gate on each unit at its readers."""
    network = netsurgery.trace(model, data[0][:2] if example is None else example)
    found = gate_slopes(Ablation(AblationSettings(loss), network, draw_samples(data, 12)))
    return {name: slope.sum(0) for name, slope in found.items()}


def scores(model: nn.Module, x: Any, **options: Any) -> dict[str, Tensor]:
    return dict(GradientScore(**options).run(netsurgery.trace(model, x)).scores)


def trained(model: nn.Module, data: tuple[Any, Tensor]) -> None:
    """Gradients of the loss summed over the samples that scores of data draw."""
    drawn = draw_samples(data, 12)
    F.cross_entropy(model(*drawn.inputs[0]), drawn.targets, reduction="sum").backward()


#: Groups that a norm reads before a layer does: the gate of ``TaylorScore`` is in front of it, weights are behind.
NORMED = {"depthwise": ["expand", "group"], "attention": ["attention.qkv:3"]}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_score_is_the_slope_of_a_gate(name: str) -> None:
    model = NETWORKS[name]()
    data = data_for(model)
    trained(model, data)
    found, expected = scores(model, data[0][:2]), slopes(model, data)
    assert found.keys() == expected.keys()
    for group in expected.keys() - NORMED.get(name, []):
        torch.testing.assert_close(found[group], expected[group].abs(), rtol=1e-9, atol=1e-12)


class Plain(nn.Module):
    """Layers without a norm; a concatenation, and groups."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 4, 3, bias=False)
        self.c, self.head = nn.Conv2d(10, 5, 1), nn.Linear(5 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([torch.relu(self.a(x)), F.leaky_relu(self.b(x))], 1)
        return self.head(torch.relu(self.c(y)).flatten(1))


def test_without_norms_the_weights_and_biases_that_make_a_unit_say_the_same() -> None:
    model = randomised(Plain())
    data = data_for(model)
    trained(model, data)
    network = netsurgery.trace(model, data[0][:2])
    products = {name: p.detach() * p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = unit_scores(network, products, ("produces", "carries"))
    for group, slope in slopes(model, data).items():
        torch.testing.assert_close(found[group], slope, rtol=1e-6, atol=1e-12)
    made = scores(model, data[0][:2], roles=("carries", "produces"))
    for group, score in scores(model, data[0][:2]).items():
        torch.testing.assert_close(score, made[group], rtol=1e-6, atol=1e-12)
        assert torch.equal(score.argsort(), found[group].abs().argsort())


def test_of_one_sample_it_is_the_taylor_score() -> None:
    model = randomised(Plain())
    data = data_for(model)
    drawn = draw_samples(data, 1)
    F.cross_entropy(model(*drawn.inputs[0]), drawn.targets).backward()
    network = netsurgery.trace(model, data[0][:2])
    expected = TaylorScore(data, samples=1).run(network)
    found = GradientScore().run(network)
    for group in network.prunable:
        torch.testing.assert_close(found.scores[group.name], expected.scores[group.name], rtol=1e-9, atol=1e-12)
    assert found.comparable
    half = PruneChannels(0.5, scope="global")
    assert half.run(found).keep == half.run(expected).keep


def test_a_filter_in_front_of_a_batch_norm_says_nothing_but_its_readers_do() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6, eps=1e-12), nn.ReLU(), nn.Conv2d(6, 2, 1))
    x = torch.randn(8, 3, 6, 6)
    model.double().train()(x.double()).square().sum().backward()
    assert float(scores(model, x.double(), roles=("produces",))["0"].max()) < 1e-9
    assert float(scores(model, x.double())["0"].min()) > 1e-2
    shifted = scores(model, x.double(), roles=("carries",))["0"]  # scale and shift of the norm, behind it
    torch.testing.assert_close(scores(model, x.double())["0"], shifted)


@pytest.mark.parametrize("name", MODELS)
def test_language_models(name: str) -> None:
    build, loss, targets, group, _ = MODELS[name]
    model, example = build(), {key: value[:2] for key, value in MASKED.items()}
    drawn = draw_samples((MASKED, targets), 12)
    inputs, target = drawn.rows(slice(0, 12), torch.device("cpu"))
    loss(model(**inputs[1]), target).sum().backward()
    found, expected = scores(model, example)[group], slopes(model, (MASKED, targets), loss, example)[group]
    torch.testing.assert_close(found, expected.abs(), rtol=1e-6, atol=1e-12)
    edit = netsurgery.plan(model, [GradientScore(), PruneChannels(0.5)], example)
    assert set(edit.keep[group]) == set(found.topk(6).indices.tolist())
    assert netsurgery.verify(model, netsurgery.rewrite(model, edit), edit, example) < 1e-6


class Queries(nn.Module):
    """Attention of two heads, a classifier behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.head = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(3, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (one(x).unflatten(-1, (2, -1)).transpose(1, 2) for one in (self.q, self.k, self.v))
        return self.head(((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2).mean(1))


def test_dimensions_of_queries_and_keys_are_scored_by_both() -> None:
    model = randomised(Queries())
    data = torch.randn(12, 5, 3, dtype=torch.float64), torch.arange(12) % 4
    trained(model, data)
    found, expected = scores(model, data[0][:2]), slopes(model, data)
    network = netsurgery.trace(model, data[0][:2])
    (both,) = [g.name for g in network.prunable if {m.role for m in g.members} == {"produces", "carries"}]
    assert network[both].unit == "head_dim" and len(network.prunable) == 3
    for group, slope in expected.items():
        factor = 2 if group == both else 1
        torch.testing.assert_close(found[group], factor * slope.abs(), rtol=1e-9, atol=1e-12)


def linears() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


X = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))


def backward(model: nn.Module, factor: float = 1, x: Tensor = X) -> None:
    (model(x).square().sum() * factor).backward()


def test_by_hand() -> None:
    model = linears()
    backward(model)
    weight: Any = model[2].weight
    products = weight.detach() * weight.grad
    torch.testing.assert_close(scores(model, X)["0"], products.sum(0).abs())
    torch.testing.assert_close(scores(model, X, kind="squares")["0"], products.square().sum(0))
    made = (model[0].weight * model[0].weight.grad).square().sum(1)  # type: ignore[operator]
    torch.testing.assert_close(scores(model, X, kind="squares", roles="produces")["0"], made.detach())


def test_batches_add_up_and_a_common_factor_keeps_the_order() -> None:
    one, other = linears(), linears()
    backward(one)
    for part in X.split(5):
        backward(other, 2.0**10, part)
    for group, score in scores(one, X).items():
        torch.testing.assert_close(scores(other, X)[group], score * 2**10)


def test_nothing_is_changed_and_the_smaller_model_has_its_gradients() -> None:
    model = linears().train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    backward(model)
    before = copy.deepcopy([(p, p.grad) for p in model.parameters()])
    small: Any = netsurgery.apply(model, [GradientScore(), PruneChannels(0.5)], X)
    assert model.training and small.training
    for p, (value, grad) in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, value) and p.grad is not None and torch.equal(p.grad, grad)
    kept = scores(model, X)["0"].topk(3).indices.sort().values
    assert torch.equal(small[0].weight.grad, model[0].weight.grad[kept])  # type: ignore[index, union-attr]
    inplace = netsurgery.apply(model, [GradientScore(), PruneChannels(0.5)], X, inplace=True, optimizer=optimizer)
    assert torch.equal(inplace[0].weight, small[0].weight)  # type: ignore[arg-type]


def test_a_second_score_in_one_pipeline_has_the_gradients_that_are_left() -> None:
    model = linears()
    backward(model)
    rounds = [GradientScore(), PruneChannels({"0": 0.5}), GradientScore(), PruneChannels({"2": 0.5})]
    small: Any = netsurgery.apply(model, rounds, X)
    first: Any = netsurgery.apply(model, rounds[:2], X)
    assert torch.equal(small[2].weight, netsurgery.apply(first, rounds[2:], X)[2].weight)
    assert small[2].weight.shape == (3, 3)


def test_half_precision_and_sparse_gradients() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 6, sparse=True), nn.Linear(6, 4), nn.Linear(4, 2))
    x = torch.tensor([[1, 1, 5]])
    backward(model, x=x)
    table: Any = model[0].weight
    assert table.grad.is_sparse
    made = scores(model, x, roles=("produces", "carries"))["0"]
    torch.testing.assert_close(made, (table.detach() * table.grad.to_dense()).sum(0).abs())
    assert table.grad.is_sparse
    half = linears().half()
    for parameter in half.parameters():
        parameter.grad = torch.full_like(parameter, 2.0**15)  # times a weight, more than half precision holds
    with torch.no_grad():
        half[2].weight.fill_(64)  # type: ignore[operator, union-attr]
    found = scores(half, X.half())["0"]
    assert found.dtype == torch.float32 and found.tolist() == [5 * 2.0**21] * 6


# What is missing ---------------------------------------------------------------------------------------------------


def test_gradients_that_are_not_there() -> None:
    model = linears()
    with pytest.raises(InputError) as error:
        scores(model, X)
    assert str(error.value) == (
        "GradientScore: no parameter of Sequential has a gradient: call loss.backward() on this very model first, "
        "and score before optimizer.zero_grad()"
    )
    backward(model)
    torch.optim.SGD(model.parameters(), 0.1).zero_grad(set_to_none=False)
    with pytest.raises(InputError) as error:
        scores(model, X)
    assert str(error.value) == (
        "GradientScore: all gradients of Sequential are zero: score after loss.backward(), before optimizer.zero_grad()"
    )


class Readers(nn.Module):
    """Two layers that read the same units."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) + self.c(self.a(x))


def test_some_gradients_that_are_not_there(caplog: pytest.LogCaptureFixture) -> None:
    model = Readers()
    model.b.requires_grad_(False)
    backward(model)
    with caplog.at_level(logging.WARNING, "netsurgery"):
        found = scores(model, X)["a"]
    assert caplog.messages == ["GradientScore: 'b.weight' without a gradient count as zero"]
    torch.testing.assert_close(found, (model.c.weight * model.c.weight.grad).sum(0).abs().detach())  # type: ignore[operator]
    model.c.requires_grad_(False).weight.grad = None
    with pytest.raises(InputError) as error:
        scores(model, X)
    assert str(error.value) == (
        "GradientScore: group 'a' is scored by 'b.weight', 'c.weight', without a gradient: let requires_grad be True "
        "there and run backward again, or choose other roles, such as roles=('produces', 'carries')"
    )
    assert scores(model, X, roles=("produces", "carries"))["a"].shape == (6,)


def test_what_is_refused() -> None:
    with pytest.raises(InputError) as error:
        GradientScore(kind="fisher")  # type: ignore[arg-type]
    assert str(error.value) == "GradientScore(kind='fisher'): 'taylor' or 'squares'"
    with pytest.raises(InputError) as error:
        GradientScore(roles=("read",))  # type: ignore[arg-type]
    assert str(error.value) == "GradientScore(roles=('read',)): one or several of 'produces', 'consumes', 'carries'"
    with pytest.raises(InputError, match=r"GradientScore reads weights, but '0.weight' has none"):
        scores(linears().to("meta"), X.to("meta"))
    network = netsurgery.trace(nn.Linear(4, 3), X)
    assert GradientScore().run(network) is network  # nothing can go


def test_infinite_gradients_are_refused_not_removed() -> None:
    model = linears()
    backward(model)
    model[2].weight.grad[0, 1] = torch.inf  # type: ignore[index, union-attr]
    with pytest.raises(InputError, match=r"scores of group '0' are NaN or infinite at units \[1\]"):
        netsurgery.plan(model, [GradientScore(), PruneChannels(0.5)], X)


def test_it_reads_as_it_is_written() -> None:
    assert repr(GradientScore()) == "GradientScore(kind='taylor', roles=('consumes',))"
    assert GradientScore(roles=("consumes", "produces")) == GradientScore(roles=("produces", "consumes"))
    assert hash(GradientScore(roles=["produces"])) == hash(GradientScore(roles="produces"))


# Computed weights --------------------------------------------------------------------------------------------------


def masked(model: nn.Sequential) -> None:
    for layer in (model[0], model[2]):
        prune.random_unstructured(layer, "weight", 0.4)


class Times(nn.Module):
    """A weight times something: learned, a constant, or of its own."""

    def __init__(self, *factors: Any):
        super().__init__()
        self.factors = nn.ParameterList([one for one in factors if isinstance(one, Tensor)])
        self.numbers = [one for one in factors if not isinstance(one, Tensor)]

    def forward(self, weight: Tensor) -> Tensor:
        for one in (*self.factors, *self.numbers):
            weight = one(weight) if callable(one) else one * weight
        return weight


class Over(nn.Module):
    """A weight over a learned scale of each output."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 2, 5)[:, None])

    def forward(self, weight: Tensor) -> Tensor:
        return weight / self.scale


def times(*factors: Any) -> Any:
    def change(model: nn.Sequential) -> None:
        parametrize.register_parametrization(model[2], "weight", Times(*factors))

    return change


COMPUTED: dict[str, Any] = {
    "masks": masked, "a number": times(0.3), "a learned number": times(torch.tensor(0.3)),
    "a learned scale of inputs": times(torch.rand(6)), "a learned scale of outputs": times(torch.rand(5, 1)),
    "over a learned scale": lambda model: parametrize.register_parametrization(model[2], "weight", Over()),
    "a cast": times(lambda w: w.double().float()), "turned": times(lambda w: (-w.t()).clone().t()),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.parametrize("roles", [("consumes",), ("produces",)])
def test_computed_weights_are_scored_as_plain_ones(name: str, roles: Any) -> None:
    model = linears()
    COMPUTED[name](model)
    same_as_plain(model, roles)


def same_as_plain(model: Any, roles: Any) -> None:
    plain = linears()
    with torch.no_grad():
        for layer, twin in zip(model, plain, strict=True):
            if isinstance(layer, nn.Linear):
                twin.weight.copy_(layer.weight)
                twin.bias.copy_(layer.bias)
    backward(model)
    backward(plain)
    expected = list(scores(plain, X, roles=roles).values())
    found = list(scores(model, X, roles=roles).values())
    assert len(expected) == len(found) == 2
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, torch.nn.utils.weight_norm])
def test_the_length_of_a_weight_norm_tells_of_what_a_layer_makes_but_not_of_what_it_reads(wrap: Any) -> None:
    model = linears()
    for index in (0, 2):
        wrap(model[index])
    same_as_plain(model, ("produces",))
    with pytest.raises(InputError) as error:
        scores(model, X)
    text = str(error.value)
    names = r"'2\.\S+(0|_g)', '2\.\S+(1|_v)'"
    assert re.match(
        rf"GradientScore: group '0\S*' is scored by a weight that is computed from {names} at \S+, the", text
    )
    assert text.endswith(
        ", the gradient of which those of its parameters do not tell: let the layer hold the result "
        "(parametrize.remove_parametrizations, merge_and_unload) and run backward again, or use TaylorScore(data)"
    )


class Cross(nn.Module):
    """Attention that takes queries from one place and keys and values from another: its weight in three parts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Linear(3, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.attention(x, x[:, :2], x[:, :2], need_weights=False)[0])


def test_parts_of_a_weight_are_told_by_the_whole() -> None:
    torch.manual_seed(0)
    model, x = Cross().double(), torch.randn(2, 4, 3, dtype=torch.float64)
    backward(model, x=x)
    readers: Any = model.attention.in_proj_weight, model.head.weight
    expected = sum((reader * reader.grad).sum(0) for reader in readers).detach().abs()
    torch.testing.assert_close(scores(model, x)["embed"], expected)
    made: Any = model.embed.weight, model.embed.bias  # nothing between them and their readers
    produced = ((made[0] * made[0].grad).sum(1) + made[1] * made[1].grad).detach()
    own: Any = model.attention.out_proj
    beside = ((own.weight * own.weight.grad).sum(1) + own.bias * own.bias.grad).detach()
    torch.testing.assert_close(scores(model, x, roles=("produces", "carries"))["embed"], (produced + beside).abs())


REFUSED: dict[str, Any] = {
    "of itself": times(lambda w: w * w.sigmoid()), "a power": times(lambda w: w.abs().pow(1.5)),
    "squared": times(lambda w: w * w), "a shift": times(lambda w: w + 1), "rounded": times(lambda w: w.round()),
    "written into": times(lambda w: w.clone().mul_(2).add_(1)),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_computed_weights_are_refused(name: str) -> None:
    model = linears()
    REFUSED[name](model)
    backward(model)
    network = netsurgery.trace(model, X)
    with pytest.raises(InputError, match=r"is computed from '2.parametrizations.weight.original' at .* do not tell"):
        GradientScore().run(network)


def test_low_rank_updates_are_refused_and_merged_ones_are_not() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.down, self.up = nn.Linear(6, 5), nn.Linear(6, 2, bias=False), nn.Linear(2, 5, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + 2 * self.up(self.down(x))

    model = linears()
    model[2] = adapted = Adapted()
    adapted.base.requires_grad_(False)
    backward(model)
    with pytest.raises(InputError, match=r"computed from '2.base.weight', '2.down.weight', '2.up.weight' at .*merge"):
        scores(model, X)


def test_masks_that_are_removed_leave_their_gradients() -> None:
    model = linears()
    masked(model)
    backward(model)
    expected = scores(model, X)
    for layer in (model[0], model[2]):
        prune.remove(layer, "weight")
    for one, other in zip(scores(model, X).values(), expected.values(), strict=True):
        torch.testing.assert_close(one, other)


def test_squares_are_of_single_entries() -> None:
    """The length of a weight norm has one entry for a filter: the squares of the filter's are not in it."""
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 3)).double()
    model(torch.randn(16, 4, dtype=torch.float64)).square().mean().backward()
    network = netsurgery.trace(model, torch.randn(2, 4, dtype=torch.float64))
    GradientScore(roles=("produces",)).run(network)
    with pytest.raises(InputError, match="is scored by a weight that is computed from"):
        GradientScore(kind="squares", roles=("produces",)).run(network)
