"""Updates beside a layer that are not merged: LoRA before heads, DoRA in both of its forms, as if they were merged."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import netsurgery
from netsurgery.passes import GeometricMedianScore, HGSRScore, MagnitudeScore, PruneChannels
from oracles import check

SCORES = {"magnitude": MagnitudeScore(), "hgsr": HGSRScore(), "median": GeometricMedianScore()}


class Dora(nn.Module):
    """weight = m * (W + s B A) / |W + s B A|, the norm detached, as it is written in the paper."""

    def __init__(self, base: Any, rank: int = 2, scale: float = 2.0):
        super().__init__()
        self.base, self.scale = base, scale
        out, *rest = base.weight.shape
        self.a = nn.Parameter(torch.randn(rank, *rest) * 0.5)
        self.b = nn.Parameter(torch.randn(out, rank, *[1] * (len(rest) - 1)) * 0.5)
        self.m = nn.Parameter(torch.rand(out, *[1] * len(rest)) + 0.5)

    def direction(self) -> Tensor:
        product = self.b.flatten(1) @ self.a.flatten(1)
        weight: Tensor = self.base.weight + self.scale * product.reshape(self.base.weight.shape)
        return weight

    def norm(self, weight: Tensor) -> Tensor:
        return weight.square().sum(tuple(range(1, weight.dim())), keepdim=True).sqrt().detach()

    def weight(self) -> Tensor:
        weight = self.direction()
        return self.m * weight / self.norm(weight)

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if isinstance(self.base, nn.Linear):
            return F.linear(x, weight, bias)
        return F.conv2d(x, weight, bias, padding=1 if weight.shape[-1] == 3 else 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, self.weight(), self.base.bias)

    def merged(self) -> nn.Module:
        layer: nn.Module = copy.deepcopy(self.base)
        layer.weight.data = self.weight().detach()  # type: ignore[union-attr, assignment]
        return layer


class Beside(Dora):
    """The same as adapters do it: the layer as it is, and what is added to its result."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        s = (self.m / self.norm(self.direction())).transpose(0, 1)
        shape = (1, -1, *[1] * (s.dim() - 2))
        plain = y if self.base.bias is None else y - self.base.bias.view(shape)
        return y + ((s - 1) * plain + s * self.run(self.run(x, self.a), self.b) * self.scale)


class Lora(Dora):
    """W + s B A, without a magnitude."""

    def weight(self) -> Tensor:
        return self.direction()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return y + self.run(self.run(x, self.a), self.b) * self.scale


def linear(kind: Any) -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), kind(nn.Linear(16, 12)), nn.ReLU(), nn.Linear(12, 3)), matrix(
        4, 6
    )


def without_bias(kind: Any) -> tuple[nn.Module, Tensor]:
    inner = kind(nn.Linear(16, 12, bias=False))
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), inner, nn.ReLU(), nn.Linear(12, 3)), matrix(4, 6)


def convolution(kind: Any) -> tuple[nn.Module, Tensor]:
    inner = kind(nn.Conv2d(8, 12, 3, padding=1))
    return nn.Sequential(nn.Conv2d(3, 8, 1), inner, nn.ReLU(), nn.Conv2d(12, 3, 1)), matrix(2, 3, 5, 5)


class Attention(nn.Module):
    """Heads: queries and values have an update."""

    def __init__(self, kind: Any):
        super().__init__()
        self.q, self.k, self.v = kind(nn.Linear(8, 12)), nn.Linear(8, 12), kind(nn.Linear(8, 12))
        self.o = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (3, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        out: Tensor = self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


def heads(kind: Any) -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(6, 8), Attention(kind), nn.Linear(8, 3)), matrix(2, 5, 6)


def matrix(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def merged(model: nn.Module) -> nn.Module:
    """A copy with each update merged into its layer."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Dora):
                setattr(parent, name, child.merged())
    return model


def twins(network: netsurgery.Network, plain: netsurgery.Network) -> dict[str, str]:
    """For groups of the merged model those that hold the same units: of what reads them, the same axis."""
    places = {(m.parameter.replace("base.", ""), m.axis): g.name for g in network.groups for m in g.members}
    found = {}
    for group in plain.prunable:
        same = [
            name
            for member in group.members
            if (name := places.get((member.parameter, member.axis))) and network[name].unit == group.unit
        ]
        if same and network[same[0]].size == group.size:
            found[group.name] = same[0]
    return found


@pytest.mark.parametrize("make", [linear, without_bias, convolution, heads])
@pytest.mark.parametrize("kind", [Dora, Beside, Lora])
def test_units_of_adapted_layers_are_scored_as_if_merged_and_cut_exactly(kind: Any, make: Any) -> None:
    torch.manual_seed(0)
    model, x = make(kind)
    model = model.double().eval()
    plain = merged(model)
    torch.testing.assert_close(model(x), plain(x))
    network, other = netsurgery.trace(model, x), netsurgery.trace(plain, x)
    pairs = {plain_name: name for plain_name, name in twins(network, other).items() if network[name].locked is None}
    assert any(network[name].size in (12, 4, 3) and network[name].unit != "rank" for name in pairs.values())
    for score in SCORES.values():
        found, wanted = score.run(network).scores, score.run(other).scores
        for plain_name, name in pairs.items():
            torch.testing.assert_close(found[name], wanted[plain_name])
    _, edit = check(model, (x,), 1e-10, 0, 0.5)
    assert any(network[name].unit == "rank" for name in edit.keep)
    edit = netsurgery.plan(model, [MagnitudeScore(), PruneChannels(0.5)], x)
    kept = {plain_name: edit.keep[name] for plain_name, name in pairs.items() if name in edit.keep}
    assert kept
    if {*edit.keep} <= {*pairs.values()}:
        cut = netsurgery.rewrite(plain, netsurgery.Edit(other, kept))
        torch.testing.assert_close(cut(x), netsurgery.rewrite(model, edit)(x), rtol=1e-10, atol=1e-10)


def test_what_the_norm_is_taken_over_is_locked_with_the_reason() -> None:
    model, x = linear(Beside)
    network = netsurgery.trace(model.double(), x)
    (why,) = [group.locked for group in network.groups if group.size == 16]
    assert why is not None and why.startswith(
        "a weight is computed across these units, and a removal would change the rest of it"
    )


def test_the_rank_of_an_update_of_few_channels_is_told_by_its_window() -> None:
    update = Lora(nn.Conv2d(3, 12, 3, padding=1), rank=4)
    network = netsurgery.trace(nn.Sequential(update, nn.ReLU(), nn.Conv2d(12, 3, 1)), torch.zeros(1, 3, 5, 5))
    assert {group.size: group.unit for group in network.prunable} == {12: "channel", 4: "rank"}
    edit = netsurgery.plan(network.model, [MagnitudeScore(), PruneChannels(0.5)], torch.zeros(1, 3, 5, 5))
    assert [*edit.counts.values()] == [6]


class Twice(nn.Module):
    """What is multiplied by parameters is no term of a layer, or its numbers are of another dimension."""

    def __init__(self, way: str):
        super().__init__()
        self.base, self.down, self.up = nn.Linear(4, 4), nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
        self.s, self.way = nn.Parameter(torch.rand(4) + 0.5), way

    def forward(self, x: Tensor) -> Tensor:
        y, update = self.base(x), self.up(self.down(x))
        if self.way == "rows":
            out: Tensor = y + update * self.s[:, None]  # x is (4, 4): a number for each row
        else:
            out = y + update * self.s.view(2, 2).repeat(2, 2)
        return out


@pytest.mark.parametrize("way", ["rows", "table"])
def test_other_factors_make_no_merged_weight(way: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), Twice(way), nn.ReLU(), nn.Linear(4, 2)).double()
    network = netsurgery.trace(model, matrix(4, 3))
    found = MagnitudeScore().run(network).scores
    assert {*found} == {group.name for group in network.prunable}
    for seed in range(2):
        check(model, (matrix(4, 3),), 1e-10, seed, 0.5)
