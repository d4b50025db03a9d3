"""Weights that are computed from others: what stays of them stays as it is, and scores are of what layers use."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import netsurgery
from netsurgery.errors import InputError, RewriteError
from netsurgery.passes import (
    BatchNormScore,
    FisherScore,
    GeometricMedianScore,
    HGSRScore,
    LossIncreaseScore,
    MagnitudeScore,
    PruneChannels,
    TaylorScore,
)  # fmt: skip
from netsurgery.verification import permuted_difference
from oracles import RandomKeep, check

pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
Weighted = Callable[[nn.Module], Tensor]


class Computed(nn.Module):
    """Its convolution ``b`` uses a weight that a test computes from its parameters."""

    def __init__(self, weight: Weighted, **tensors: Tensor):
        super().__init__()
        self.weight = weight
        self.a, self.c = nn.Conv1d(3, 8, 3), nn.Conv1d(6, 4, 3)
        self.v = nn.Parameter(torch.randn(6, 8, 3))
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(F.conv1d(self.a(x).relu(), self.weight(self)).relu())
        return y


class Shared(Computed):
    """The length of its filters scales their outputs too."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(F.conv1d(self.a(x).relu(), self.weight(self)).relu() * self.g[:, None])
        return y


def wrapped(wrap: Callable[[nn.Module], nn.Module], kind: Any = nn.Conv1d) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), wrap(kind(8, 6, 3)), nn.ReLU(), nn.Conv1d(6, 4, 3))


def computed(weight: Weighted, **tensors: Tensor) -> Callable[[], nn.Module]:
    return lambda: Computed(weight, **tensors)


def length(v: Tensor) -> Tensor:
    return v.square().sum((1, 2), keepdim=True).sqrt()


G = 1 + torch.rand(6, generator=torch.Generator().manual_seed(3))

#: Where a parameter can make up for what a removal changes: all hidden units may go.
KEPT: dict[str, Callable[[], nn.Module]] = {
    "weight norm": wrapped(parametrizations.weight_norm),
    "weight norm by inputs": wrapped(lambda m: parametrizations.weight_norm(m, dim=1)),
    "weight norm of all": wrapped(lambda m: parametrizations.weight_norm(m, dim=None)),
    "old weight norm": wrapped(torch.nn.utils.weight_norm),
    "old weight norm of all": wrapped(lambda m: torch.nn.utils.weight_norm(m, dim=None)),
    "transposed": wrapped(parametrizations.weight_norm, nn.ConvTranspose1d),
    "grouped": wrapped(parametrizations.weight_norm, lambda *sizes: nn.Conv1d(*sizes, groups=2)),
    "by hand": computed(lambda m: m.v * (m.g[:, None, None] / length(m.v)), g=G),
    "normalised, then scaled": computed(lambda m: F.normalize(m.v.flatten(1)).view_as(m.v) * m.g.view(-1, 1, 1), g=G),
    "the largest is its length": computed(lambda m: -m.v / m.v.abs().amax((1, 2), True) * m.g[:, None, None], g=G),
    "the mean of other weights": computed(lambda m: m.v / m.u.square().mean((0, 1), True), u=torch.rand(6, 8, 3)),
}  # fmt: skip

#: Where none can: units that the computation works across are locked.
LOCKED: dict[str, Callable[[], nn.Module]] = {
    "spectral norm": wrapped(parametrizations.spectral_norm),
    "old spectral norm": wrapped(torch.nn.utils.spectral_norm),
    "standardised": computed(lambda m: (m.v - m.v.mean((1, 2), True)) / m.v.std((1, 2), keepdim=True)),
    "standardised as a batch norm": computed(
        lambda m: F.batch_norm(m.v[None].flatten(2), None, None, m.g, training=True).view_as(m.v), g=G
    ),
    "standardised as a layer norm": computed(lambda m: F.layer_norm(m.v.flatten(1), (24,)).view_as(m.v)),
    "normalised without a scale": computed(lambda m: F.normalize(m.v, dim=1)),
    "a softmax": computed(lambda m: m.v.softmax(1)),
    "a length that something else uses": lambda: Shared(lambda m: m.v * (m.g[:, None, None] / length(m.v)), g=G),
    "a sum of two": computed(
        lambda m: m.v * m.g[:, None, None] / length(m.v) + 0 * m.v * m.g[:, None, None], g=G
    ),
}  # fmt: skip

X = torch.randn(2, 3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double().eval()


def weight_of(model: nn.Module) -> Tensor:
    """The weight that the second layer uses."""
    layer: Any = model[2] if isinstance(model, nn.Sequential) else model
    if isinstance(model, nn.Sequential):
        layer(torch.zeros(1, layer.in_channels, 5, dtype=torch.float64))  # old norms compute it as they run
        found: Tensor = layer.weight
        return found
    return model.weight(model)  # type: ignore[no-any-return, operator]


def silent(model: nn.Module, units: list[int]) -> None:
    """Let the first layer's units be 0 always."""
    first: Any = model[0] if isinstance(model, nn.Sequential) else model.a
    with torch.no_grad():
        first.weight[units] = 0
        first.bias[units] = 0


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("inplace", [False, True])
def test_what_stays_of_a_computed_weight_stays_as_it_is(name: str, inplace: bool) -> None:
    model = made(KEPT[name])
    network = netsurgery.trace(model, X)
    first = "a" if isinstance(model, Computed) else "0:2" if name == "grouped" else "0"
    assert network[first].locked is None
    assert permuted_difference(model, network, X) < 1e-10
    edit = netsurgery.Edit(network, {first: tuple(range(1, network[first].size, 2))})
    silent(model, list(range(0, 8, 2)))
    wanted, weight = model(X).detach(), weight_of(model).detach().clone()
    small = netsurgery.rewrite(model, edit, inplace=inplace)
    torch.testing.assert_close(small(X), wanted, rtol=1e-10, atol=1e-10)
    inputs = 0 if name == "transposed" else 1
    kept = range(1, weight.shape[inputs], 2)
    rest = weight.index_select(inputs, torch.tensor(kept))
    torch.testing.assert_close(weight_of(small), rest, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", KEPT)
def test_verify_sees_it_alike(name: str) -> None:
    model = made(KEPT[name])
    for seed in range(3):
        edit = netsurgery.plan(model, [RandomKeep(seed)], X)
        assert edit.keep
        small = netsurgery.rewrite(model, edit)
        assert netsurgery.verify(model, small, edit, X) < 1e-10
        with torch.no_grad():
            for parameter in small.parameters():
                parameter.mul_(1.5)
        assert netsurgery.verify(model, small, edit, X) > 1e-2


@pytest.mark.parametrize("name", LOCKED)
def test_what_cannot_stay_is_locked(name: str) -> None:
    model = made(LOCKED[name])
    network = netsurgery.trace(model, X)
    first = network["a" if isinstance(model, Computed) else "0"]
    assert first.locked is not None and first.locked.startswith("a weight is computed across these units")
    edit = netsurgery.plan(model, [RandomKeep(1)], X) if network.prunable else None
    if edit is not None:
        assert netsurgery.verify(model, netsurgery.rewrite(model, edit), edit, X) < 1e-10


def test_a_layer_that_runs_twice() -> None:
    torch.manual_seed(0)
    layer = parametrizations.weight_norm(nn.Linear(8, 8))
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(8, 4)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    edit = netsurgery.Edit(netsurgery.trace(model, x), {"0": (1, 2, 5)})
    small: Any = netsurgery.rewrite(model, edit)
    torch.testing.assert_close(small[2].weight, layer.weight[[1, 2, 5]][:, [1, 2, 5]])
    assert netsurgery.verify(model, small, edit, x) < 1e-10


def test_new_lengths_are_in_the_diff_and_in_averages_and_files(tmp_path: Any) -> None:
    model = made(KEPT["weight norm"])
    average = torch.optim.swa_utils.AveragedModel(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + torch.rand_like(parameter))
    weight, own = weight_of(model).detach().clone(), weight_of(average.module).detach().clone()
    edit = netsurgery.Edit(netsurgery.trace(model, X), {"0": (0, 2, 5)})
    assert edit.diff().splitlines()[:4] == [
        "0.weight 8x3x3 -> 3x3x3",
        "0.bias 8 -> 3",
        "2.parametrizations.weight.original1 6x8x3 -> 6x3x3",
        "2.parametrizations.weight.original0 has new values",
    ]
    small = netsurgery.rewrite(model, edit, ema=average)
    torch.testing.assert_close(weight_of(small), weight[:, [0, 2, 5]])
    torch.testing.assert_close(weight_of(average.module), own[:, [0, 2, 5]])
    netsurgery.save(tmp_path, small, edit)
    again = netsurgery.load(tmp_path, made(KEPT["weight norm"]), X)
    torch.testing.assert_close(weight_of(again), weight[:, [0, 2, 5]])


def test_training_goes_on_from_there() -> None:
    """A step of gradient descent along the direction of a filter leaves the rest where a plain weight would be."""
    model = made(KEPT["weight norm"])
    edit = netsurgery.Edit(netsurgery.trace(model, X), {"0": (0, 2, 5)})
    small: Any = netsurgery.rewrite(model, edit)
    before = small[2].weight.detach().clone()
    optimizer = torch.optim.SGD(small.parameters(), 1e-6)
    small(X).square().mean().backward()
    optimizer.step()
    torch.testing.assert_close(small[2].weight, before, rtol=1e-4, atol=1e-6)
    assert not torch.equal(small[2].weight, before)


def test_a_filter_of_which_only_zeros_would_stay_is_refused() -> None:
    model: Any = made(KEPT["weight norm"])
    with torch.no_grad():
        model[2].parametrizations.weight.original1[3, :4] = 0
    edit = netsurgery.Edit(netsurgery.trace(model, X), {"0": (0, 1, 2, 3)})
    with pytest.raises(RewriteError, match=r"'2\.parametrizations\.weight\.original0' would keep nothing but zeros"):
        netsurgery.rewrite(model, edit)


# Scores are of the weight that a layer uses ------------------------------------------------------------------------


SCORES = {
    "magnitude": MagnitudeScore(),
    "lamp": MagnitudeScore(lamp=True),
    "l1": MagnitudeScore(p=1),
    "median": GeometricMedianScore(),
    "batch norm": BatchNormScore(),
    "hgsr": HGSRScore(),
    "hgsr of outputs": HGSRScore(grouping="neuron"),
    "hgsr, coupled": HGSRScore("group_lasso", "coupled"),
}


class Twins(nn.Module):
    """A layer whose weight is computed from ``u`` and ``v`` between two plain ones, a batch norm after it."""

    def __init__(self, weight: Weighted | None = None, **tensors: Tensor):
        super().__init__()
        self.weight = weight
        self.a, self.c, self.norm = nn.Linear(3, 8), nn.Linear(6, 4), nn.BatchNorm1d(6)
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor.double()))

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.w if self.weight is None else self.weight(self)
        y: Tensor = self.c(self.norm(F.linear(self.a(x), weight)).relu())
        return y


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def written(m: Any) -> Tensor:
    weight = m.u.clone()
    weight.t().mul_(m.v.t())
    weight.detach().add_(1)
    weight.view(-1).square_()
    return weight


V, U = random(6, 8), random(6, 8, seed=1)
SCALES = torch.logspace(-2, 2, 6, dtype=torch.float64)[:, None]

EXPRESSIONS: dict[str, tuple[Weighted, dict[str, Tensor]]] = {
    "a mask": (lambda m: m.v * (m.u > 0), {"v": V, "u": U}),
    "a low rank": (lambda m: m.v + 0.5 * (m.u @ m.t), {"v": V, "u": random(6, 2), "t": random(2, 8, seed=2)}),
    "a scale": (lambda m: m.v * 1e-3 * m.u[:, :1], {"v": V, "u": SCALES.expand(6, 2)}),
    "a difference": (lambda m: m.v - m.u, {"v": V + 100, "u": U + 100}),
    "a rounded weight": (lambda m: (m.v * 4).round() / 4, {"v": V}),
    "a power": (lambda m: m.v.abs().pow(3), {"v": V}),
    "a transposed product": (lambda m: (m.u.t() * m.v).t(), {"v": random(8, 6), "u": U}),
    "parts": (lambda m: torch.cat([m.v, m.u]), {"v": V[:2], "u": U[2:]}),
    "a slice": (lambda m: m.v[:, 1:-1], {"v": random(6, 10)}),
    "written in place": (written, {"v": V, "u": U}),
    "kronecker": (lambda m: torch.kron(m.u, m.v), {"u": random(1, 1), "v": V}),
    "a weight norm": (lambda m: torch._weight_norm(m.v, m.u), {"v": V * SCALES, "u": U[:, :1]}),
}


@pytest.mark.parametrize("expression", EXPRESSIONS)
@pytest.mark.parametrize("score", SCORES)
def test_scores_are_those_of_a_plain_weight(score: str, expression: str) -> None:
    torch.manual_seed(0)
    weight, tensors = EXPRESSIONS[expression]
    model = Twins(weight, **tensors).double().eval()
    plain = Twins(None, w=weight(model).detach()).double().eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    found, wanted = scored(model, SCORES[score]), scored(plain, SCORES[score])
    assert found.keys() == wanted.keys() or expression in ("a slice", "parts")  # these have groups of their own
    for place in {"a", *found} - {"c"} if expression == "parts" else found:
        torch.testing.assert_close(found[place], wanted[place])


def scored(model: nn.Module, score: netsurgery.Pass, x: Tensor | None = None) -> dict[str, Tensor]:
    """Scores by the first plain parameter that has the units in it."""
    network = score.run(netsurgery.trace(model, random(2, 3) if x is None else x))
    assert isinstance(network, netsurgery.Network)
    places = {group.name: {(m.parameter, m.axis) for m in group.members} for group in network.prunable}
    known = {"a": ("a.weight", 0), "c": ("c.weight", 1)}
    return {name: network.scores[group] for name, one in known.items() for group, at in places.items() if one in at}


def normalised(plain: nn.Module, wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """The same function with a weight norm whose directions have lengths of their own."""
    model: Any = copy.deepcopy(plain)
    model[0] = wrap(model[0])
    parametrized = parametrize.is_parametrized(model[0])
    direction = model[0].parametrizations.weight.original1 if parametrized else model[0].weight_v
    with torch.no_grad():
        direction *= torch.linspace(10, 0.1, 16)[:, None, None]
    return model


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, torch.nn.utils.weight_norm])
@pytest.mark.parametrize("score", [MagnitudeScore(), GeometricMedianScore(), BatchNormScore(), HGSRScore()])
def test_networks_of_the_same_function_keep_the_same_units(score: netsurgery.Pass, wrap: Any) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv1d(4, 16, 3), nn.ReLU(), nn.Conv1d(16, 2, 3))
    x = torch.randn(1, 4, 9)
    kept = [
        tuple(netsurgery.plan(model, [score, PruneChannels(0.5)], x).keep.values())
        for model in (plain, normalised(plain, wrap))
    ]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("score", [MagnitudeScore(), HGSRScore(grouping="neuron")])
def test_what_a_mask_prunes_weighs_nothing(score: netsurgery.Pass) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 16, 3), nn.ReLU(), nn.Conv1d(16, 2, 3))
    prune.ln_structured(model[0], "weight", 0.5, n=2, dim=0)
    prune.random_unstructured(model[0], "bias", 0.5)
    x = torch.randn(1, 4, 9)
    edit = netsurgery.plan(model, [score, PruneChannels(threshold=0)], x)
    mask: Any = model[0].weight_mask
    assert edit.keep["0"] == tuple(mask.any(2).any(1).nonzero().flatten().tolist())
    small: Any = netsurgery.rewrite(model, edit)
    assert small(x).shape == (1, 2, 5) and small[0].weight.shape == (8, 4, 3)
    assert netsurgery.verify(model, small, edit, x) < 1e-6


def test_the_scale_of_a_batch_norm_may_be_computed_too() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    model[1].weight.data = torch.tensor([1.0, -2.0, 3.0, 4.0])
    prune.custom_from_mask(model[1], "weight", torch.tensor([1.0, 1.0, 0.0, 1.0]))
    scores = BatchNormScore().run(netsurgery.trace(model)).scores  # type: ignore[union-attr]
    assert scores["0"].tolist() == [1.0, 2.0, 0.0, 4.0]


def test_the_rank_of_a_low_rank_update_is_scored_by_its_own_matrices() -> None:
    model = Twins(*EXPRESSIONS["a low rank"][:1], **EXPRESSIONS["a low rank"][1]).double().eval()
    network = netsurgery.trace(model, random(2, 3))
    rank = next(g for g in network.prunable if {(m.parameter, m.axis) for m in g.members} == {("u", 1), ("t", 0)})
    wanted = (model.u.square().sum(0) + model.t.square().sum(1)).sqrt()  # type: ignore[operator, union-attr]
    torch.testing.assert_close(MagnitudeScore().run(network).scores[rank.name], wanted.detach())


def test_scores_follow_the_weights_as_they_are_now() -> None:
    model = Twins(lambda m: m.v * m.u, v=V, u=U).double().eval()
    network = netsurgery.trace(model, random(2, 3))
    before = MagnitudeScore().run(network).scores
    with torch.no_grad():
        model.u.mul_(2)  # type: ignore[operator, union-attr]
    after = MagnitudeScore().run(network).scores
    (name,) = [name for name in before if name != "a"]
    torch.testing.assert_close(after[name], 2 * before[name])


REFUSED: dict[str, tuple[Weighted, str]] = {
    "random": (lambda m: m.v * torch.rand(6, 8, dtype=torch.float64), r"'v' at .*draws random numbers"),
    "noise": (lambda m: m.v + torch.randn_like(m.v), r"cannot be scored: aten.randn_like.default draws random numbers"),
    "a mask of dropout": (
        lambda m: F.dropout(m.v, 0.5, training=True),
        "cannot be scored: aten.bernoulli_.float draws",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("score", SCORES)
def test_what_has_no_value_is_refused_by_name(name: str, score: str) -> None:
    weight, why = REFUSED[name]
    network = netsurgery.trace(Twins(weight, v=V).double().eval(), random(2, 3))
    with pytest.raises(InputError, match=why):
        SCORES[score].run(network)


# Weights that the code writes --------------------------------------------------------------------------------------


class Overwritten(nn.Module):
    """Its layer ``c`` runs with a weight that a function makes of that of ``real``."""

    def __init__(self, write: Callable[[Any], object], trains: bool):
        super().__init__()
        self.write, self.trains = write, trains
        self.a, self.z = nn.Conv1d(3, 8, 3), nn.Conv1d(6, 2, 3)
        self.real, self.c = nn.Conv1d(8, 6, 3, bias=False), nn.Conv1d(8, 6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.real if self.training and self.trains else self.c
        if layer is self.c:
            self.write(self)
        y: Tensor = self.z(layer(self.a(x).relu()).relu())
        return y


def assigned(m: Any) -> None:
    m.c.weight.data = m.real.weight.data * 1.0


def the_same_memory(m: Any) -> None:
    m.c.weight.data = m.real.weight.data


def copied(m: Any) -> None:
    m.c.weight.data.copy_(m.real.weight.data)


def loaded(m: Any) -> None:
    m.c.load_state_dict(m.real.state_dict())


def flattened(m: Any) -> None:
    vector = nn.utils.parameters_to_vector(m.real.parameters())
    nn.utils.vector_to_parameters(vector * 1.0, m.c.parameters())


def averaged(m: Any) -> None:
    m.c.weight.data.mul_(0).add_(m.real.weight.data)


WRITES = [assigned, the_same_memory, copied, loaded, flattened, averaged]


def overwritten(write: Callable[[Any], object], trains: bool = False) -> Overwritten:
    torch.manual_seed(0)
    return Overwritten(write, trains).double().eval().requires_grad_(False)


@pytest.mark.parametrize("write", WRITES)
def test_what_a_parameter_is_overwritten_with_is_what_is_scored_and_cut(write: Callable[[Any], object]) -> None:
    model = overwritten(write, trains=True)
    plain = nn.Sequential(model.a, nn.ReLU(), copy.deepcopy(model.real), nn.ReLU(), model.z)
    labels = torch.randint(2, (16, 6), generator=torch.Generator().manual_seed(1))
    data = random(16, 3, 12), labels
    scores: list[netsurgery.Pass] = [
        MagnitudeScore(), GeometricMedianScore(), HGSRScore(), TaylorScore(data), FisherScore(data),
        LossIncreaseScore(data, samples=16, progress=False),
    ]  # fmt: skip
    for score in scores:
        found, wanted = (score.run(netsurgery.trace(m, X)) for m in (model, plain))
        assert isinstance(found, netsurgery.Network) and isinstance(wanted, netsurgery.Network)
        for own, other in zip(found.prunable, wanted.prunable, strict=True):
            torch.testing.assert_close(found.scores[own.name], wanted.scores[other.name])
    for seed in range(3):
        check(model, (X,), 1e-10, seed)
        edit = netsurgery.plan(model, [RandomKeep(seed)], X)
        small = netsurgery.rewrite(model, edit)
        assert [tuple(t.shape) for t in (small.c.weight, small.real.weight)] == 2 * [small.real.weight.shape]
        again = netsurgery.rewrite(model, edit)
        small(X)
        again.load_state_dict(small.state_dict())
        assert torch.equal(again(X), small(X))


def new_parameter(m: Any) -> None:
    m.c.weight = nn.Parameter(m.real.weight * 2)


def swapped(m: Any) -> None:
    torch.utils.swap_tensors(m.c.weight, m.real.weight)


def pointed_elsewhere(m: Any) -> None:
    m.c.weight.data.set_(m.real.weight.data * 1)


@pytest.mark.parametrize("write", [new_parameter, swapped, pointed_elsewhere])
@pytest.mark.parametrize("trains", [False, True])
def test_writes_that_cannot_be_followed_lock_what_they_touch(write: Callable[[Any], object], trains: bool) -> None:
    network = netsurgery.trace(overwritten(write, trains), X)
    assert network.prunable == ()
    assert all(group.locked for group in network.groups)


def test_data_that_changes_its_shape_is_followed() -> None:
    """The parameter itself is nothing but a place then."""
    model = overwritten(lambda m: setattr(m.c.weight, "data", m.real.weight.data[:, :, 1:]))
    network = netsurgery.trace(model, X)
    assert [group.size for group in network.prunable] == [8, 6]
    edit = netsurgery.plan(model, [RandomKeep(1)], X)
    assert netsurgery.verify(model, netsurgery.rewrite(model, edit), edit, X) < 1e-10


# Weights that are held within a norm -------------------------------------------------------------------------------


def constrained(m: Any) -> None:
    m.c.weight.data = torch.renorm(m.c.weight.data, 2, 0, 0.5)


def constrained_in_place(m: Any) -> None:
    m.c.weight.data.renorm_(2, 0, 0.5)


@pytest.mark.parametrize("write", [constrained, constrained_in_place])
def test_what_a_limit_has_cut_down_stays_so(write: Callable[[Any], object]) -> None:
    model = overwritten(write)
    with torch.no_grad():
        model.c.weight[:3] *= 0.1
    network = netsurgery.trace(model, X)
    assert [group.name for group in network.prunable] == ["a", "c"]
    wanted = model.c.weight.detach().renorm(2, 0, 0.5)
    scores = MagnitudeScore().run(network).scores
    torch.testing.assert_close(scores["c"], wanted.flatten(1).norm(dim=1))
    edit = netsurgery.Edit(network, {"a": (0, 2, 3)})
    small = netsurgery.rewrite(model, edit)
    torch.testing.assert_close(small.c.weight, wanted[:, [0, 2, 3]])
    small(X)
    torch.testing.assert_close(small.c.weight, wanted[:, [0, 2, 3]])
    assert netsurgery.verify(model, small, edit, X) < 1e-10


def test_a_table_with_a_largest_norm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 8, max_norm=1.0), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    x = torch.tensor([[0, 3, 8, 3]])
    network = netsurgery.trace(model, x)
    assert [group.name for group in network.prunable] == ["0:2", "1"]
    table = model[0].weight.detach().renorm(2, 0, 1.0)
    torch.testing.assert_close(MagnitudeScore().run(network).scores["0:2"], table.norm(dim=0))
    edit = netsurgery.Edit(network, {"0:2": (0, 2, 3), "1": (1, 4)})
    small: Any = netsurgery.rewrite(model, edit)
    torch.testing.assert_close(small[0].weight, table[:, [0, 2, 3]])
    assert small[0].embedding_dim == 3
    assert netsurgery.verify(model, small, edit, x) < 1e-10


def normalised_in_place(m: Any) -> None:
    m.c.weight.data.div_(m.c.weight.data.norm(dim=(1,), keepdim=True))


def normalised_by_rows(m: Any) -> None:
    m.c.weight.data[1] /= m.c.weight.data[1].norm()


@pytest.mark.parametrize("write", [normalised_in_place, normalised_by_rows])
def test_a_weight_that_is_normalised_in_place_is_locked(write: Callable[[Any], object]) -> None:
    network = netsurgery.trace(overwritten(write), X)
    (locked,) = [g.locked for g in network.groups if g.name == "a"]
    assert locked is not None and "computed across these units" in locked


# Low-rank updates that are not merged ------------------------------------------------------------------------------


class Adapter(nn.Module):
    """A layer and low-rank updates that run beside it, as adapters do."""

    def __init__(self, base: nn.Module, *updates: tuple[nn.Module, nn.Module, float]):
        super().__init__()
        self.base = base
        self.down = nn.ModuleList([down for down, _, _ in updates])
        self.up = nn.ModuleList([up for _, up, _ in updates])
        self.scales = [scale for _, _, scale in updates]
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        for down, up, scale in zip(self.down, self.up, self.scales, strict=True):
            y = y + up(down(x if isinstance(down, nn.Embedding) else self.dropout(x))) * scale
        return y


def lin(*sizes: int) -> nn.Linear:
    return nn.Linear(*sizes, bias=False)


def conv(*sizes: int, **options: int) -> nn.Conv1d:
    return nn.Conv1d(*sizes, bias=False, **options)


def merged_convolution(m: Any) -> nn.Module:
    base = copy.deepcopy(m.base)
    base.weight.data += m.scales[0] * torch.einsum("or,rik->oik", m.up[0].weight[..., 0], m.down[0].weight)
    return base


def merged_matrices(m: Any) -> nn.Module:
    base = copy.deepcopy(m.base)
    for down, up, scale in zip(m.down, m.up, m.scales, strict=True):
        first = down.weight.t() if isinstance(down, nn.Embedding) else down.weight
        product = scale * up.weight @ first
        base.weight.data += product.t() if isinstance(base, nn.Embedding) else product
    return base


Parts = tuple[Callable[[], Adapter], Callable[[Any], nn.Module], Callable[[nn.Module], nn.Module], Tensor]
ROWS = random(2, 5, 3)
ADAPTED: dict[str, Parts] = {
    "linear": (
        lambda: Adapter(nn.Linear(8, 6), (lin(8, 2), lin(2, 6), 3.0)), merged_matrices,
        lambda m: nn.Sequential(nn.Linear(3, 8), m, nn.ReLU(), nn.Linear(6, 2)), ROWS,
    ),
    "two": (
        lambda: Adapter(nn.Linear(8, 6), (lin(8, 2), lin(2, 6), 3.0), (lin(8, 3), lin(3, 6), -0.5)), merged_matrices,
        lambda m: nn.Sequential(nn.Linear(3, 8), m, nn.ReLU(), nn.Linear(6, 2)), ROWS,
    ),
    "convolution": (
        lambda: Adapter(conv(8, 6, 3, stride=2), (conv(8, 2, 3, stride=2), conv(2, 6, 1), 3.0)), merged_convolution,
        lambda m: nn.Sequential(nn.Conv1d(3, 8, 1), m, nn.ReLU(), nn.Conv1d(6, 2, 1)), X,
    ),
    "table": (
        lambda: Adapter(nn.Embedding(9, 6), (nn.Embedding(9, 2), lin(2, 6), 3.0)), merged_matrices,
        lambda m: nn.Sequential(m, nn.ReLU(), nn.Linear(6, 2)), torch.arange(4)[None],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ADAPTED)
@pytest.mark.parametrize("score", SCORES)
def test_an_update_that_is_not_merged_is_scored_as_if_it_were(score: str, name: str) -> None:
    torch.manual_seed(0)
    make, merge, around, x = ADAPTED[name]
    model = around(make()).double().eval()
    place = 0 if name == "table" else 1
    plain = copy.deepcopy(model)
    plain[place] = merge(plain[place])  # type: ignore[index, operator]
    torch.testing.assert_close(model(x), plain(x))
    found = SCORES[score].run(netsurgery.trace(model, x))
    wanted = SCORES[score].run(netsurgery.trace(plain, x))
    assert isinstance(found, netsurgery.Network) and isinstance(wanted, netsurgery.Network)
    for group in wanted.prunable:
        twin = group.name.replace(f"{place}", f"{place}.base", 1) if group.name.startswith(f"{place}") else group.name
        torch.testing.assert_close(found.scores[twin], wanted.scores[group.name])
    assert {g.name for g in found.prunable} == {*found.scores}


def test_branches_that_are_no_update_are_scored_by_themselves() -> None:
    torch.manual_seed(0)
    parts = Adapter(nn.Linear(8, 6), (lin(8, 2), nn.Sequential(nn.ReLU(), lin(2, 6)), 1.0))  # type: ignore[arg-type]
    model = nn.Sequential(nn.Linear(3, 8), parts, nn.ReLU(), nn.Linear(6, 2)).double().eval()
    found = MagnitudeScore().run(netsurgery.trace(model, ROWS)).scores["1.base"]
    joined = torch.cat([parts.base.weight, parts.up[0][1].weight], 1)  # type: ignore[index, union-attr, list-item]
    torch.testing.assert_close(found, joined.norm(dim=1).detach())


def test_a_residual_layer_is_no_update_of_the_one_before() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = lin(3, 6), lin(6, 6), lin(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            y: Tensor = self.c(x + self.b(x))
            return y

    model = Residual().double()
    found = MagnitudeScore().run(netsurgery.trace(model, ROWS)).scores["a"]
    torch.testing.assert_close(found, torch.cat([model.a.weight, model.b.weight], 1).norm(dim=1).detach())


def test_a_model_without_data_is_cut_all_the_same() -> None:
    model = made(KEPT["weight norm"])
    edit = netsurgery.Edit(netsurgery.trace(model, X), {"0": (0, 2, 5)})
    small: Any = netsurgery.rewrite(copy.deepcopy(model).to("meta"), edit)
    assert small[2].parametrizations.weight.original1.shape == (6, 3, 3)
    assert small[2].weight.is_meta


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lengths_in_other_precisions(dtype: torch.dtype) -> None:
    model = made(KEPT["weight norm"]).to(dtype)
    weight = weight_of_conv(model)
    edit = netsurgery.Edit(netsurgery.trace(model, X.to(dtype)), {"0": (0, 2, 5)})
    found = weight_of_conv(netsurgery.rewrite(model, edit))
    assert found.dtype == dtype
    torch.testing.assert_close(found, weight[:, [0, 2, 5]], rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


def weight_of_conv(model: Any) -> Tensor:
    weight: Tensor = model[2].weight.detach()
    return weight
