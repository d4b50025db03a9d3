"""Scores against numbers computed by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import netsurgery
from netsurgery.errors import InputError
from netsurgery.kernels import CRITERIA
from netsurgery.kernels.criteria import Name
from netsurgery.passes import (
    BatchNormScore,
    GeometricMedianScore,
    HGSRScore,
    MagnitudeScore,
    PruneChannels,
    RandomScore,
)
from netsurgery.passes.layers import Grouping

# METHODS: the criteria on [[1, 4], [9, 16]] (rows: outputs), feature-wise
VECTORS = {
    "l1": 30, "group_lasso": 25.548, "hierarchical_sqrt_group_lasso": 7.634, "hierarchical_sq_group_lasso": 500,
    "exclusive_sparsity": 500, "hierarchical_sqrt_exclusive": 25.548, "hierarchical_sq_exclusive": 80708,
    "group_l12": 7.634, "hierarchical_sqrt_group_l12": 4.449, "hierarchical_sq_group_l12": 52,
}  # fmt: skip


def two_convs(weight: Tensor) -> nn.Sequential:
    out, into, *kernel = weight.shape
    net = nn.Sequential(nn.Conv2d(3, into, 1), nn.Conv2d(into, out, tuple(kernel)))
    net[1].weight.data = weight
    return net


@pytest.mark.parametrize(("criterion", "total"), VECTORS.items())
def test_hgsr_vectors(criterion: str, total: float) -> None:
    net = two_convs(torch.tensor([[1.0, 4.0], [9.0, 16.0]])[..., None, None])
    network = netsurgery.trace(net, torch.zeros(1, 3, 4, 4))
    scores = HGSRScore(criterion).run(network).scores["0"]
    assert scores.shape == (2,)
    assert scores.sum().item() == pytest.approx(total, rel=2e-4)


@pytest.mark.parametrize("criterion", VECTORS)
def test_hgsr_against_loops(criterion: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    net = two_convs(weight).double()
    network = netsurgery.trace(net, torch.zeros(1, 3, 4, 4, dtype=torch.float64))
    scores = HGSRScore(criterion).run(network).scores["0"]
    norm = 2 if "lasso" in criterion else 1
    for i in range(4):
        k = [weight[o, i].flatten().norm(norm).item() for o in range(5)]
        want = {
            "l1": sum(k), "group_lasso": sum(v**2 for v in k) ** 0.5, "hierarchical_sqrt_group_lasso": sum(k) ** 0.5,
            "hierarchical_sq_group_lasso": sum(k) ** 2, "exclusive_sparsity": sum(k) ** 2,
            "hierarchical_sqrt_exclusive": sum(v**2 for v in k) ** 0.5,
            "hierarchical_sq_exclusive": sum(v**2 for v in k) ** 2,
            "group_l12": sum(k) ** 0.5, "hierarchical_sqrt_group_l12": sum(v**0.5 for v in k) ** 0.5,
            "hierarchical_sq_group_l12": sum(v**0.5 for v in k) ** 2,
        }[criterion]  # fmt: skip
        assert scores[i].item() == pytest.approx(want)


@pytest.mark.parametrize("criterion", VECTORS)
def test_degree_of_homogeneity(criterion: Name) -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    x = torch.zeros(1, 3, 4, 4, dtype=torch.float64)
    one, two = (
        HGSRScore(criterion).run(netsurgery.trace(two_convs(w).double(), x)).scores["0"] for w in (weight, -3 * weight)
    )
    torch.testing.assert_close(two, 3 ** (CRITERIA[criterion].inner * CRITERIA[criterion].outer) * one)


def test_unknown_criterion() -> None:
    with pytest.raises(InputError, match="no criterion 'l2': choose one of l1, group_lasso"):
        HGSRScore("l2")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="p must be positive"):
        MagnitudeScore(p=0)


def test_coupled_units_sum_over_all_consumers() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (
                nn.Conv2d(3, 4, 1),
                nn.Conv2d(4, 4, 1),
                nn.Conv2d(4, 5, 1),
                nn.Linear(4 * 9, 2),
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            x = x + self.b(x)
            return self.d(x.flatten(1)) + self.c(x).mean()

    net = Residual()
    network = netsurgery.trace(net, torch.zeros(1, 3, 3, 3))
    scores = HGSRScore("l1").run(network).scores["a"]
    want = (
        net.b.weight.abs().sum((0, 2, 3))
        + net.c.weight.abs().sum((0, 2, 3))
        + net.d.weight.abs().view(2, 4, 9).sum((0, 2))
    )
    assert torch.allclose(scores, want.detach())
    want = torch.stack([net.a.weight.flatten(1).norm(dim=1), net.b.weight.flatten(1).norm(dim=1)]).norm(dim=0)
    assert torch.allclose(MagnitudeScore().run(network).scores["a"], want.detach())


def test_grouped_convolutions_are_scored_within_their_group() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(6, 2, 1))
    network = netsurgery.trace(net, torch.zeros(1, 3, 5, 5))
    scores = HGSRScore("l1").run(network).scores
    weight = (
        net[1].weight.detach().abs()
    )  # (6, 2, 3, 3): outputs of group 0 read inputs 0 and 1, of group 1 inputs 2 and 3
    assert [(g.name, g.size) for g in network.prunable] == [("0", 2), ("0:2", 2), ("1", 3)]
    assert torch.allclose(scores["0:2"], weight.sum((0, 2, 3)))  # unit i of each group: inputs i and 2 + i
    by_group = MagnitudeScore(p=1).run(network).scores["0"]
    assert torch.allclose(by_group, net[0].weight.detach().abs().view(2, 2, 3).sum((1, 2)))


def test_random_scores_are_seeded() -> None:
    network = netsurgery.trace(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    one, two, other = (RandomScore(seed).run(network).scores["0"] for seed in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_half_precision_is_summed_in_single() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).half()
    network = netsurgery.trace(net)
    assert MagnitudeScore().run(network).scores["0"].dtype == torch.float32


@pytest.mark.parametrize("grouping", ["feature", "neuron", "coupled"])
def test_units_with_nan_are_refused_not_removed(grouping: Grouping) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        net[0].weight[1, 0] = float("nan")
        net[2].weight[0, 1] = float("nan")
    with pytest.raises(InputError, match=r"scores of group '0' are NaN or infinite at units \[1\]"):
        netsurgery.plan(net, [HGSRScore("group_lasso", grouping), PruneChannels(0.5)], torch.zeros(1, 3))


def test_lamp_divides_by_what_is_not_smaller() -> None:
    net = nn.Sequential(nn.Linear(1, 3, bias=False), nn.Linear(3, 1))
    net[0].weight.data = torch.tensor([[2.0], [-1.0], [3.0]])
    scores = MagnitudeScore(lamp=True).run(netsurgery.trace(net)).scores["0"]
    assert torch.allclose(scores, torch.tensor([4 / 13, 1 / 14, 1.0]))
    assert float(MagnitudeScore(lamp=True).run(netsurgery.trace(zeroed(net))).scores["0"].sum()) == 0


def zeroed(net: nn.Sequential) -> nn.Sequential:
    net[0].weight.data.zero_()
    return net


class TwoNorms(nn.Module):
    """A stream with two norms, one of them over a concatenation, beside a layer without any."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 3, 1), nn.Conv2d(1, 2, 1), nn.Conv2d(5, 4, 1)
        self.first, self.both, self.d = nn.BatchNorm2d(3), nn.BatchNorm2d(5), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        joined = self.both(torch.cat([self.first(self.a(x)), self.b(x)], 1))
        y: Tensor = self.d(self.c(joined))
        return y


def test_the_scales_of_batch_norms() -> None:
    net = TwoNorms().eval()
    net.first.weight.data = torch.tensor([1.0, -2.0, 3.0])
    net.both.weight.data = torch.tensor([5.0, 0.0, -1.0, -7.0, 0.5])
    network = netsurgery.trace(net, torch.zeros(2, 1, 2, 2))
    scores = BatchNormScore().run(network).scores
    assert scores["a"].tolist() == [3.0, 1.0, 2.0]
    assert scores["b"].tolist() == [7.0, 0.5]
    assert torch.equal(scores["c"], MagnitudeScore().run(network).scores["c"])


def test_distances_of_coupled_units_are_over_all_that_produces_them() -> None:
    class Coupled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(2, 4, 3), nn.Conv2d(2, 4, 3), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.c(self.a(x) + self.b(x))
            return y

    net = Coupled()
    scores = GeometricMedianScore().run(netsurgery.trace(net, torch.zeros(1, 2, 4, 4))).scores["a"]
    joined = torch.cat([net.a.weight.flatten(1), net.b.weight.flatten(1)], 1).detach()
    assert torch.allclose(scores, torch.cdist(joined, joined).sum(1), rtol=1e-4)
    grouped = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(6, 2, 1))
    found = GeometricMedianScore().run(netsurgery.trace(grouped, torch.zeros(1, 1, 4, 4))).scores["1"]
    units = grouped[1].weight.detach().view(2, 3, -1).movedim(0, 1).flatten(1)  # unit i is filters i and 3 + i
    assert torch.allclose(found, torch.cdist(units, units).sum(1), rtol=1e-4)


@pytest.mark.parametrize("units", [8, 26, 64])
@pytest.mark.parametrize("offset", [1.0, 100.0])
def test_distances_of_filters_near_one_another(units: int, offset: float) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(16, units, 3), nn.Conv2d(units, 2, 1))
    with torch.no_grad():
        net[0].weight.copy_(offset + 1e-3 * torch.randn(units, 16, 3, 3))
    found = GeometricMedianScore().run(netsurgery.trace(net, torch.zeros(1, 16, 4, 4))).scores["0"]
    weight = net[0].weight.detach().double().flatten(1)
    wanted = (weight[:, None] - weight).square().sum(2).sqrt().sum(1)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)
    assert found.argsort()[: units // 2].sort().values.tolist() == wanted.argsort()[: units // 2].sort().values.tolist()


def test_a_filter_is_no_distance_from_its_copy() -> None:
    net = nn.Sequential(nn.Linear(300, 40, bias=False), nn.Linear(40, 2)).half()
    with torch.no_grad():
        net[0].weight.copy_(net[0].weight[:1].expand(40, 300))
    assert GeometricMedianScore().run(netsurgery.trace(net)).scores["0"].tolist() == [0.0] * 40
