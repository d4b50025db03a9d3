"""Code that cannot be followed, but reads its sizes from integers of the module: these follow if a run confirms it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import netsurgery
from oracles import check

X = torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 2], [1, 2, 3, 4, 5, 6, 0, 3, 5]])


class GraphAttention(nn.Module):
    """Heads of attention over the edges of a graph; which are loops is looked up by their values."""

    def __init__(self, width: int, out_channels: int, heads: int, scaled: bool = False):
        super().__init__()
        self.heads, self.out_channels, self.scaled = heads, out_channels, scaled
        self.lin = nn.Linear(width, heads * out_channels)
        self.source = nn.Parameter(torch.randn(1, heads, out_channels))
        self.target = nn.Parameter(torch.randn(1, heads, out_channels))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        edges = edges[:, (edges[0] != edges[1]).nonzero()[:, 0]]
        y = self.lin(x).view(-1, self.heads, self.out_channels)
        a = (y * self.source).sum(-1)[edges[0]] + (y * self.target).sum(-1)[edges[1]]
        if self.scaled:
            a = a / self.out_channels**0.5
        weights = a.exp()
        total = torch.zeros(len(x), self.heads, dtype=x.dtype).index_add(0, edges[1], weights)
        messages = y[edges[0]] * (weights / total[edges[1]]).unsqueeze(-1)
        out = torch.zeros(len(x), self.heads, self.out_channels, dtype=x.dtype).index_add(0, edges[1], messages)
        return out.view(-1, self.heads * self.out_channels)


class Graph(nn.Module):
    def __init__(self, **options: Any):
        super().__init__()
        torch.manual_seed(0)
        self.a = GraphAttention(6, 8, 4, **options)
        self.b = GraphAttention(32, 5, 1)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.b(self.a(x, edges).relu(), edges)


def units(network: netsurgery.Network) -> set[int]:
    return {group.size for group in network.prunable if any(m.parameter == "a.source" for m in group.members)}


def test_heads_and_channels_of_a_graph_attention() -> None:
    for seed, share in ((0, 0.5), (1, None), (2, 0.75)):
        small, edit = check(Graph().double().eval(), (X, EDGES), 1e-10, seed, share)
        assert (small.a.heads, small.a.out_channels) == tuple(small.a.source.shape[1:])
        assert not edit.replaced and units(edit.network) == {4, 8}


def test_a_number_computed_from_a_size_locks_that_size_alone() -> None:
    small, edit = check(Graph(scaled=True).double().eval(), (X, EDGES), 1e-10, share=0.5)
    assert units(edit.network) == {4} and (small.a.heads, small.a.out_channels) == (2, 8)
    (why,) = {group.locked for group in edit.network.groups if group.size == 8 and group.locked}
    assert "computes other=2.828" in why and " in a" in why


class Named(nn.Module):
    """Its code keeps what it saw; it mentions ``width``, but not ``limit``, which is as large."""

    def __init__(self, **held: int):
        super().__init__()
        self.lin, self.limit, self.width = nn.Linear(6, 8), 8, 8
        self.__dict__.update(held)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.shape
        return self.lin(x).reshape(-1, self.width) * 2.0


def test_only_integers_that_the_code_mentions_follow() -> None:
    small, _ = check(nn.Sequential(Named(), nn.Linear(8, 3)).double().eval(), (X,), 1e-10, share=0.5)
    assert (small[0].width, small[0].limit) == (4, 8)


def test_integers_of_one_size_follow_together_or_not_at_all() -> None:
    model = Graph()
    model.a, model.b = GraphAttention(6, 4, 4), GraphAttention(16, 5, 1)
    small, edit = check(model.double().eval(), (X, EDGES), 1e-10, share=0.5)
    assert (small.a.heads, small.a.out_channels) == (2, 2)
    network = netsurgery.trace(model, (X, EDGES))
    assert [[network[name].size for name in names] for names in network.equal_sizes] == [[4, 4]]
    assert len(edit.keep) == 2
