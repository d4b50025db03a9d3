"""From entries of parameters to units: what a removal takes away, found by removing, is what a unit is scored by."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

import netsurgery
import zoo
from netsurgery.analysis.groups import Group
from netsurgery.analysis.network import Network
from netsurgery.errors import InputError, RewriteError
from netsurgery.passes import MagnitudeScore, PruneChannels, unit_scores
from random_networks import Program, build, example, programs
from test_language_models import MASKED, MODELS


def importance(network: Network, seed: int = 0) -> dict[str, Tensor]:
    """Random numbers for the entries of every tensor of a model: repeated ones would hide wrong positions."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(t.shape, generator=generator, dtype=torch.float64) for name, t in network.tensors.items()}


def numbered(model: nn.Module) -> Any:
    """A copy of a model in float64 in which each entry is its own number in its tensor."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in dict(other.state_dict(keep_vars=True)).values():
            tensor.copy_(torch.arange(tensor.numel()).view_as(tensor))
    return other


def rewritten(network: Network, model: nn.Module, keep: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor] | None:
    """The numbers of the entries that stay, as the rewritten model holds them; None where its code does not follow."""
    try:
        small = netsurgery.rewrite(model, netsurgery.Edit(network, keep))
    except RewriteError:
        return None
    return {name: tensor.long().flatten() for name, tensor in small.state_dict().items()}


def cut(network: Network, keep: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Likewise, of those tensors alone that lose any."""
    places = netsurgery.Edit(dataclasses.replace(network, equal_sizes=()), keep).positions
    changed = {name: axes for name, axes in network.axes.items() if places.changes(axes)}
    shapes = {name: network.tensors[name].shape for name in changed}
    return {
        name: places.cut(torch.arange(shapes[name].numel()).view(shapes[name]), axes).flatten()
        for name, axes in changed.items()
    }


def gone(entries: Mapping[str, Tensor], left: Mapping[str, Tensor]) -> float:
    """The sum of the entries that do not stay."""
    return sum(float(entries[name].sum() - entries[name].flatten()[stay].sum()) for name, stay in left.items())


def some_units(group: Group) -> list[int]:
    return sorted({0, group.size // 2, group.size - 1})


def hold(network: Network, most: int = 1000) -> int:
    """Units of some groups are scored by what removing them takes away; returns how many were removed."""
    entries = importance(network)
    scores = unit_scores(network, entries)
    assert scores.keys() == {group.name for group in network.prunable}
    assert all(score.shape == (network[name].size,) for name, score in scores.items())
    some = network.prunable[:: 1 + len(network.prunable) // most]
    for group in some:
        for unit in some_units(group):
            left = cut(network, {group.name: tuple(one for one in range(group.size) if one != unit)})
            assert float(scores[group.name][unit]) == pytest.approx(gone(entries, left), rel=1e-9)
    return sum(len(some_units(group)) for group in some)


def hold_rewritten(network: Network, model: nn.Module) -> int:
    """Likewise, as the rewritten model shows it, wherever its code follows; returns how many units that were."""
    entries = importance(network)
    twin, count = numbered(model), 0
    for group in network.prunable:
        for unit in some_units(group) if network.equal_to(group.name) == (group.name,) else ():
            left = rewritten(network, twin, {group.name: tuple(one for one in range(group.size) if one != unit)})
            if left is not None:
                count += 1
                held = {name: values for name, values in entries.items() if name in left}
                expected = gone(held, {name: left[name] for name in held})
                assert float(unit_scores(network, held)[group.name][unit]) == pytest.approx(expected, rel=1e-9)
    return count


@pytest.mark.parametrize(
    "name", ["densenet121", "googlenet", "mobilenet_v3_small", "regnet_x_400mf", "shufflenet_v2_x0_5", "squeezenet1_1"]
)
def test_the_zoo(name: str) -> None:
    assert hold(netsurgery.trace(zoo.build(name), zoo.images(name)), 12) > 10


@pytest.mark.parametrize("name", MODELS)
def test_language_models(name: str) -> None:
    model: Any = MODELS[name][0]()
    model.config.use_cache = False  # what a model returns is locked: here keys and values
    network = netsurgery.trace(model, {key: value[:2] for key, value in MASKED.items()})
    assert {"head", "head_dim", "channel"} & {group.unit for group in network.prunable}
    assert hold(network) > 9


class Everywhere(nn.Module):
    """Flattening, concatenation, a channel shuffle, groups of convolutions and normalisation, and a residual link."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.grouped, self.norm = nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.GroupNorm(2, 8)
        self.back, self.head = nn.Conv2d(8, 6, 1), nn.Linear(14 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        b, y = self.b(x), self.norm(self.grouped(self.a(x)))
        y = y.view(-1, 2, 4, *y.shape[2:]).transpose(1, 2).flatten(1, 2)
        z = torch.cat([b + self.back(y), y], 1)
        return self.head(z.flatten(1))


class Heads(nn.Module):
    """Attention with queries, keys and values in one weight, and two heads for each of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.out = nn.Linear(3, 8), nn.Linear(8, 8 + 4 + 4), nn.Linear(8, 3)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embed(x))
        q, k, v = self.qkv(x).split([8, 4, 4], -1)
        q = q.unflatten(-1, (2, 2, 2)).permute(0, 2, 3, 1, 4)
        k, v = (t.unflatten(-1, (2, 1, 2)).permute(0, 2, 3, 1, 4) for t in (k, v))
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.head(self.out(y.permute(0, 3, 1, 2, 4).flatten(2)))


class Recurrent(nn.Module):
    """A weight that has its units on two axes."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


class Products(nn.Module):
    """Units against each other: on one axis twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Conv1d(3, 5, 1), nn.Linear(25, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.head((y @ y.transpose(1, 2)).flatten(1))


class Tied(nn.Module):
    """A table that is read back; and one layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.out = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 7, bias=False)
        self.again, self.out.weight = self.mix, self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.again(self.mix(self.embed(x)).relu()))


NETWORKS = {
    "everywhere": (Everywhere, torch.randn(2, 3, 2, 2).double()), "heads": (Heads, torch.randn(2, 4, 3).double()),
    "recurrent": (Recurrent, torch.randn(2, 4, 3).double()), "products": (Products, torch.randn(2, 3, 4).double()),
    "tied": (Tied, torch.zeros(2, 3).long()),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_units_that_stand_in_many_ways(name: str) -> None:
    build_one, x = NETWORKS[name]
    model = build_one().double()
    network = netsurgery.trace(model, x)
    assert network.prunable and hold(network) >= 3
    assert hold_rewritten(network, model) >= 3


drawn = settings(
    max_examples=8, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


def of_program(program: Program) -> None:
    torch.manual_seed(0)
    model = build(program)
    network = netsurgery.trace(model, example(program))
    if network.prunable:
        hold(network)
        hold_rewritten(network, model)


@drawn
@given(programs("joins"))
def test_random_joins(program: Program) -> None:
    of_program(program)


@drawn
@given(programs("groups"))
def test_random_groups(program: Program) -> None:
    of_program(program)


@drawn
@given(programs("layouts"))
def test_random_layouts(program: Program) -> None:
    of_program(program)


@drawn
@given(programs("everything"))
def test_random_networks(program: Program) -> None:
    of_program(program)


def test_positions_by_hand() -> None:
    network = netsurgery.trace(Everywhere(), torch.randn(2, 3, 2, 2))
    t = {name: one.float() for name, one in importance(network).items()}
    found = unit_scores(network, t)
    by_place = {(m.parameter, m.axis, g.size): g.name for g in network.prunable for m in g.members}
    joined = t["head.weight"].view(5, 14, 4).sum((0, 2))  # behind flatten, of 6 channels and of 8 that are shuffled
    stream = joined[:6] + t["b.weight"].sum((1, 2, 3)) + t["back.weight"].sum((1, 2, 3)) + t["back.bias"]
    torch.testing.assert_close(found[by_place["b.weight", 0, 6]], stream)
    own = t["grouped.weight"].sum((1, 2, 3)) + t["grouped.bias"] + t["norm.weight"] + t["norm.bias"]
    read = joined[6:] + t["back.weight"].sum((0, 2, 3))  # at place 2 i + g unit i of group g
    torch.testing.assert_close(found[by_place["norm.weight", 0, 4]], own.view(2, 4).sum(0) + read.view(4, 2).sum(1))
    read_of_group = t["grouped.weight"].sum((0, 2, 3))  # unit i of each group
    made = (t["a.weight"].sum((1, 2, 3)) + t["a.bias"]).view(2, 2)
    torch.testing.assert_close(found[by_place["grouped.weight", 1, 2]], made.sum(0) + read_of_group)
    groups = made.sum(1) + own.view(2, 4).sum(1) + read.view(4, 2).sum(0)
    torch.testing.assert_close(found[by_place["norm.weight", 0, 2]], groups)


def test_heads_by_hand() -> None:
    network = netsurgery.trace(Heads(), torch.randn(2, 4, 3))
    t = {name: one.float() for name, one in importance(network).items()}
    found = unit_scores(network, t)
    rows = t["qkv.weight"].sum(1) + t["qkv.bias"]
    q, k, v = rows[:8].view(2, 2, 2), rows[8:12].view(2, 2), rows[12:].view(2, 2)
    out = t["out.weight"].sum(0).view(2, 2, 2)
    expected = [
        q.sum((1, 2)) + k.sum(1) + v.sum(1) + out.sum((1, 2)),  # two that share keys and values
        q.sum((0, 2)) + out.sum((0, 2)),
        q.sum((0, 1)) + k.sum(0),
        v.sum(0) + out.sum((0, 1)),
    ]
    assert [group.unit for group in network.prunable[1:5]] == ["head", "head", "head_dim", "head_dim"]
    for group, one in zip(network.prunable[1:5], expected, strict=True):
        torch.testing.assert_close(found[group.name], one)


# What counts, and what is refused --------------------------------------------------------------------------------


def small() -> tuple[nn.Sequential, Network]:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 2))
    return model, netsurgery.trace(model)


def test_roles() -> None:
    _, network = small()
    t = importance(network)
    parts = {
        "produces": t["0.weight"].sum(1), "carries": t["0.bias"] + t["1.weight"] + t["1.bias"],
        "consumes": t["3.weight"].sum(0),
    }  # fmt: skip
    for role, expected in parts.items():
        torch.testing.assert_close(unit_scores(network, t, role)["0"], expected)
    both = unit_scores(network, t, ("carries", "produces"))["0"]
    torch.testing.assert_close(both, parts["produces"] + parts["carries"])
    network = netsurgery.trace(Heads(), torch.randn(2, 4, 3))
    t = importance(network)  # no layer reads a dimension of queries and keys
    assert torch.equal(unit_scores(network, t, "consumes")["qkv:3"], unit_scores(network, t)["qkv:3"])


def test_the_score_of_magnitudes_is_one_of_them() -> None:
    model, network = small()
    squares = {name: parameter.square() for name, parameter in model.named_parameters()}
    found = unit_scores(network, squares, "produces")["0"]
    assert not found.requires_grad
    torch.testing.assert_close(found.sqrt(), MagnitudeScore().run(network).scores["0"])


def test_what_is_not_given_is_zero_and_what_is_given_for_locked_groups_does_not_matter() -> None:
    _, network = small()
    found = unit_scores(network, {"3.weight": torch.ones(2, 4), "3.bias": torch.full((2,), torch.nan)})
    assert found["0"].tolist() == [2.0] * 4


@pytest.mark.parametrize(("dtype", "found"), [
    (torch.bool, torch.float32), (torch.int64, torch.float32), (torch.bfloat16, torch.float32),
    (torch.float32, torch.float32), (torch.float64, torch.float64),
])  # fmt: skip
def test_dtypes(dtype: torch.dtype, found: torch.dtype) -> None:
    model, network = small()
    given = {name: torch.ones_like(parameter, dtype=dtype) for name, parameter in model.named_parameters()}
    score = unit_scores(network, given)["0"]
    assert score.dtype == found and score.tolist() == [3 + 1 + 1 + 1 + 2] * 4


def test_sparse_tensors_and_models_without_data() -> None:
    model, _ = small()
    network = netsurgery.trace(model.to("meta"))
    t = importance(network)
    torch.testing.assert_close(unit_scores(network, {n: v.to_sparse() for n, v in t.items()}), unit_scores(network, t))


def test_shared_parameters_count_once_under_any_name() -> None:
    model = Tied()
    network = netsurgery.trace(model, torch.zeros(2, 3).long())
    t = importance(network)
    assert set(t) == {"embed.weight", "mix.weight", "mix.bias"}
    renamed = {name.replace("embed", "out").replace("mix", "again"): one for name, one in t.items()}
    for tensors in (renamed, {**renamed, **t}, {**t, "out.weight": t["embed.weight"].clone()}):
        torch.testing.assert_close(unit_scores(network, tensors), unit_scores(network, t))
    expected = t["embed.weight"].sum(0) + t["mix.bias"] + t["mix.weight"].sum(0) + t["mix.weight"].sum(1)
    torch.testing.assert_close(unit_scores(network, t)["embed:2"], expected - t["mix.weight"].diagonal())
    with pytest.raises(InputError, match=r"'embed.weight' and 'out.weight' are one parameter, but are given different"):
        unit_scores(network, {**t, "out.weight": t["embed.weight"] + 1})


class Sharded(Tensor):
    placements = ("Shard(0)",)


@pytest.mark.parametrize(("change", "message"), [
    ({"0.weights": torch.ones(4, 3)},
     "unit_scores: '0.weights' is no tensor of Sequential; names are those of model.named_parameters(), such as "
     "'0.weight' and 5 more"),
    ({"0.weight": torch.ones(3, 4)}, "unit_scores: '0.weight' is given a tensor of shape (3, 4), but has (4, 3)"),
    ({"0.weight": None}, "unit_scores: '0.weight' is given NoneType, not a tensor; leave out what has none"),
    ({"0.weight": torch.ones(4, 3, device="meta")},
     "unit_scores: what is given for '0.weight' is on the meta device: give real numbers"),
    ({"0.weight": torch.ones(4, 3) * 1j}, "unit_scores: what is given for '0.weight' is complex: give real numbers"),
    ({"0.weight": torch.ones(4, 3).as_subclass(Sharded)},
     "unit_scores: what is given for '0.weight' is sharded: give the whole, tensor.full_tensor()"),
    *((one, "unit_scores: nothing is given that group '0' could be scored by: '0.weight', '0.bias', '1.weight' and "
      "2 more") for one in ({}, {"3.bias": torch.ones(2)})),
])  # fmt: skip
def test_what_is_refused(change: dict[str, Any], message: str) -> None:
    _, network = small()
    with pytest.raises(InputError) as error:
        unit_scores(network, change)
    assert str(error.value) == message


@pytest.mark.parametrize("roles", ["reads", (), ("consumes", "all")])
def test_roles_that_do_not_exist(roles: Any) -> None:
    with pytest.raises(InputError) as error:
        unit_scores(small()[1], {}, roles)
    expected = f"unit_scores(roles={roles!r}): one or several of 'produces', 'consumes', 'carries'"
    assert str(error.value) == expected


def test_pruning_by_them() -> None:
    @dataclasses.dataclass(frozen=True)
    class Fewest(netsurgery.Pass):
        gives = frozenset({"scores"})

        def run(self, network: Network) -> Network:
            return network.with_scores(unit_scores(network, {"0.bias": torch.tensor([3.0, 1.0, 2.0, 4.0])}))

    edit = netsurgery.plan(small()[0], [Fewest(), PruneChannels(0.5)])
    assert edit.keep == {"0": (0, 3)}


def test_one_tensor_under_two_names_is_two() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)).eval()
    network, shared = netsurgery.trace(model, torch.randn(2, 3)), torch.rand(3, 3)
    found = unit_scores(network, {"0.weight": shared, "2.weight": shared})
    apart = unit_scores(network, {"0.weight": shared, "2.weight": shared.clone()})
    assert found.keys() == apart.keys() and all(torch.equal(found[name], apart[name]) for name in found)


@pytest.mark.parametrize(
    "arguments",
    [lambda model, network, named: (model, named), lambda model, network, named: (network, list(named))],
)
def test_arguments_of_other_kinds(arguments: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    network, named = netsurgery.trace(model, torch.randn(2, 3)), dict(model.named_parameters())
    with pytest.raises(InputError, match=r"unit_scores\(network, tensors\) takes what trace returns"):
        unit_scores(*arguments(model, network, named))
