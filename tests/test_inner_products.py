"""Dimensions within heads grow: the layer that makes one side of a product of activations hides added units."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import netsurgery
from growth import RandomGrowth, check_growth
from netsurgery import Copy, Edit, New
from netsurgery.errors import InputError
from netsurgery.passes import PlantChannels, Planting, PruneChannels, RandomScore, WidenChannels

WIDTH, HEADS, DIM = 12, 3, 4


class Attention(nn.Module):
    """Attention as it is written in many ways: a body makes heads of queries, keys and values from inputs."""

    def __init__(self, heads_of: Callable[[Attention, Tensor], Any], scale: float | None = None) -> None:
        super().__init__()
        self.heads_of, self.scale = heads_of, scale
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * DIM) for _ in range(3))
        self.qkv, self.one = nn.Linear(WIDTH, 3 * HEADS * DIM), nn.Linear(WIDTH, DIM, bias=False)
        self.qnorm, self.knorm, self.flat = nn.LayerNorm(DIM), nn.LayerNorm(DIM), nn.BatchNorm1d(HEADS * DIM)
        self.scales = nn.Parameter(torch.rand(DIM) + 0.5)
        self.out = nn.Linear(HEADS * DIM, WIDTH)
        self.flat.running_mean.uniform_(-1, 1)
        self.flat.running_var.uniform_(0.5, 2)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads_of(self, x)
        if self.scale is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = (q @ k.transpose(-1, -2) * self.scale).softmax(-1) @ v
        return self.out(out.transpose(1, 2).flatten(2))


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def fused(m: Attention, x: Tensor) -> Any:
    return m.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)


def chunked(m: Attention, x: Tensor) -> Any:
    return map(heads, m.qkv(x).chunk(3, -1))


def shared(m: Attention, x: Tensor) -> Any:
    return heads(m.q(x)), m.one(x)[:, None].expand(-1, HEADS, -1, -1), heads(m.v(x))


def scaled(m: Attention, x: Tensor) -> Any:
    return heads(m.q(x)), heads(m.k(x)) * m.scales, heads(m.v(x))


def batch_normed(m: Attention, x: Tensor) -> Any:
    return heads(m.q(x)), heads(m.flat(m.k(x).transpose(1, 2)).transpose(1, 2)), heads(m.v(x))


def normed(m: Attention, x: Tensor) -> Any:
    return m.qnorm(heads(m.q(x))), m.knorm(heads(m.k(x))), heads(m.v(x))


def activated(m: Attention, x: Tensor) -> Any:  # only the queries come from a layer alone
    return heads(m.q(x)), heads(m.k(x)).tanh() + 0.3, heads(m.v(x))


def alike(m: Attention, x: Tensor) -> Any:  # each unit of one layer is on both sides
    return heads(m.q(x)), heads(m.q(x)), heads(m.v(x))


def also_read(m: Attention, x: Tensor) -> Any:  # keys are values, too
    return heads(m.q(x)).sigmoid(), heads(m.k(x)), heads(m.k(x))


def added(m: Attention, x: Tensor) -> Any:
    k = heads(m.k(x))
    return heads(m.q(x)).sigmoid(), k, heads(m.v(x)) + k


def two_products(m: Attention, x: Tensor) -> Any:
    q, k, v = (heads(layer(x)) for layer in (m.q, m.k, m.v))
    return q, k, v * (q @ m.one(x)[:, None].transpose(-1, -2)).sum(-1, keepdim=True)


WAYS = (fused, chunked, shared, scaled, batch_normed, activated, two_products)
X = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(3)).double()


def attention(way: Callable[..., Any], scale: float | None = None, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, WIDTH), Attention(way, scale), nn.Linear(WIDTH, 3)).double().eval()
    with torch.no_grad():
        model(X)
    return model


def inner(model: nn.Module) -> tuple[netsurgery.Network, str]:
    """The network and the name of its dimensions of queries and keys."""
    network = netsurgery.trace(model, X)
    names = [g.name for g in network.prunable if g.unit == "head_dim"]
    return network, next(n for n in names if {"q", "k", "qkv"} & {m.module[2:] for m in network[n].members})


def edit_of(network: netsurgery.Network, name: str, units: Sequence[Any]) -> Edit:
    return Edit(network, dict.fromkeys(network.equal_to(name), units))


@pytest.mark.parametrize(("scale", "seed"), [(None, 0), (0.4, 1)])
@pytest.mark.parametrize("way", WAYS)
def test_random_growth_changes_no_output(way: Callable[..., Any], scale: float | None, seed: int) -> None:
    model = attention(way, scale, seed)
    edit, left = check_growth(model, (X,), 1e-11, RandomGrowth(seed))
    assert not left
    assert "head_dim" in {edit.network[name].unit for name in edit.grown}


@pytest.mark.parametrize("way", [*WAYS, normed])
def test_every_unit_twice(way: Callable[..., Any]) -> None:
    model = attention(way)
    network, name = inner(model)
    edit = edit_of(network, name, (*range(DIM), *map(Copy, range(DIM))))
    torch.testing.assert_close(netsurgery.rewrite(model, edit)(X), model(X), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("way", "why"),
    [
        (normed, "it takes statistics over these units"),
        (alike, "it multiplies units by each other, and no layer makes one side for it alone"),
        (also_read, "it multiplies units by each other, and no layer makes one side for it alone"),
        (added, "it multiplies units by each other, and no layer makes one side for it alone"),
    ],
)
def test_what_nothing_hides_is_refused_by_name(way: Callable[..., Any], why: str) -> None:
    network, name = inner(attention(way))
    with pytest.raises(InputError, match=f"group '{name}' cannot have more units without a change of outputs: {why}"):
        edit_of(network, name, (*range(DIM), New()))


@pytest.mark.parametrize("way", [fused, shared, two_products])
def test_growing_and_pruning_back_gives_the_original(way: Callable[..., Any]) -> None:
    model = attention(way)
    network, name = inner(model)
    grown = netsurgery.rewrite(model, edit_of(network, name, (*range(DIM), New(), New(seed=1))))
    again = netsurgery.rewrite(grown, edit_of(netsurgery.trace(grown, X), name, range(DIM)))
    for one, other in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("way", [fused, shared, scaled, activated])
def test_gradients_are_those_of_the_larger_network(way: Callable[..., Any]) -> None:
    model = attention(way)
    model(X).square().mean().backward()
    network, name = inner(model)
    new = netsurgery.rewrite(model, edit_of(network, name, (0, Copy(1, share=0.3), 1, 2, Copy(3, share=0.7), 3)))
    found = {name: parameter.grad for name, parameter in new.named_parameters() if parameter.grad is not None}
    new.zero_grad()
    new(X).square().mean().backward()
    for name, parameter in new.named_parameters():
        if name in found:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-13)


def test_new_units_learn() -> None:
    model = attention(fused)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    edit = netsurgery.plan(model, [PlantChannels(2 * HEADS, unit="head_dim")], X)
    plant = Planting(model, X, edit=edit, optimizer=optimizer)
    old = (model(X) - 1).square().mean()
    for _ in range(9):
        optimizer.zero_grad()
        (model(X) - 1).square().mean().backward()
        optimizer.step()
    assert (model(X) - 1).square().mean() < old
    weight = plant.finish()[1].qkv.weight.unflatten(0, (3, HEADS, -1))
    assert weight.shape[2] == DIM + 2 and weight[:, :, DIM:].flatten(1).any(1).all()


def test_passes_grow_dimensions_of_heads_where_they_are_asked_to() -> None:
    model = attention(shared, 0.5)
    wide = netsurgery.apply(model, [WidenChannels(2, unit="head_dim")], X)
    assert (wide[1].q.out_features, wide[1].one.out_features) == (2 * HEADS * DIM, 2 * DIM)
    more = netsurgery.apply(model, [PlantChannels(1, unit="head_dim")], X)
    assert more[1].one.out_features == DIM + 1
    less = netsurgery.apply(wide, [RandomScore(), PruneChannels(0.5, unit="head_dim")], X)
    assert less[1].one.out_features == DIM
    torch.testing.assert_close(wide(X), model(X), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(more(X), model(X), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_attention_of_torch(batch_first: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.last = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
            self.inside = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            out: Tensor = self.last(self.inside(x, x, x, need_weights=False)[0])
            return out

    torch.manual_seed(0)
    model = Net().double().eval()
    edit, left = check_growth(model, (X,), 1e-11, RandomGrowth(1))
    assert {edit.network[name].unit for name in edit.grown} >= {"head_dim"} and not left
