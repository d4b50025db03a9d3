"""A traced network is a value: planning, rewriting and checking read it, and write nothing onto it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import netsurgery
from netsurgery.analysis import tracing
from netsurgery.analysis.network import Network
from netsurgery.capture.program import Call
from netsurgery.passes import (
    Compensate,
    HGSRScore,
    LossIncreaseScore,
    PruneChannels,
    ReconstructionScore,
    TaylorScore,
)


def contents(value: Any) -> Any:
    """Containers and runs of modules by what they hold, tensors by their values, all else as it is."""
    if isinstance(value, Call):
        return contents(vars(value))
    if isinstance(value, dict):
        return {key: contents(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value), [contents(item) for item in value]
    return value.tolist() if isinstance(value, Tensor) and not value.is_meta else value


def snapshot(network: Network) -> dict[str, Any]:
    """All that the programs of a network hold, their nodes' notes included, by place."""
    found: dict[str, Any] = {}
    for program in network.programs:
        for name, value in vars(program).items():
            found[f"{program.mode} {name}"] = contents(value)
        for node in program.graph.nodes:
            found[f"{program.mode} {node}"] = node.args, node.kwargs
            found.update((f"{program.mode} {node} {key}", contents(value)) for key, value in node.meta.items())
    return found


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The places where two snapshots differ; the list of operations is only a view of the graph."""
    places = [place for place in {**before, **after} if not place.endswith(" operations")]
    return [place for place in places if place not in before or before[place] != after.get(place)]


class Heads(nn.Module):
    """Its sizes are written into the code, so that its forward is rewritten."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 36), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(-1, 3, 3, 12).unbind(2)
        return self.out((q @ k.transpose(-2, -1) / 3).softmax(-1) @ v).flatten(1)


class Stubborn(nn.Module):
    """One layer whose size cannot follow, so that passes run again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            y = self.a(x).relu().view(-1, 8)
        return self.c(self.b(y).relu())


def folded() -> nn.Module:
    parts = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), weight_norm(nn.Conv2d(8, 6, 3)), nn.ReLU()
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))


class Dropping(nn.Module):
    """It draws random numbers in eval mode, too: units are silenced in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(nn.functional.dropout(self.a(x).relu(), 0.3, training=True) / x.square().sum().item())


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "hard-coded sizes": (lambda: nn.Sequential(Heads(), nn.Linear(24, 4)), (3, 8)),
    "a lock found by planning": (Stubborn, (6,)),
    "batch norms that are folded": (folded, (3, 8, 8)),
    "random numbers": (Dropping, (6,)),
}


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Network, dict[str, Any]]]:
    """Every network that is traced, as it was then."""
    found = []

    def analyse(*args: Any) -> Network:
        network = original(*args)
        found.append((network, snapshot(network)))
        return network

    original = tracing.analyse
    monkeypatch.setattr(tracing, "analyse", analyse)
    return found


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_written_onto_a_network(name: str, traced: list[tuple[Network, dict[str, Any]]]) -> None:
    build, shape = CASES[name]
    torch.manual_seed(0)
    model = build().eval()
    data = torch.randn(24, *shape), torch.randint(4, (24,))
    inputs = (data[0][:2],)
    scores: list[netsurgery.Pass] = [HGSRScore(), LossIncreaseScore(data, samples=12), TaylorScore(data, samples=12)]
    for score in (*scores[: 2 if name == "random numbers" else 3], ReconstructionScore(data[0], samples=12)):
        network = netsurgery.trace(model, inputs)
        edit = netsurgery.plan(model, [score, PruneChannels(0.5), Compensate("bias", data[0], samples=12)], inputs)
        assert edit.keep
        small = netsurgery.rewrite(model, edit)
        assert netsurgery.verify(model, small, edit, inputs) < 1e-4
        by_hand = PruneChannels(0.5).run(HGSRScore().run(network))
        netsurgery.verify(model, netsurgery.rewrite(model, by_hand), by_hand, inputs)
    assert len(traced) >= 8
    assert [changes(before, snapshot(network)) for network, before in traced] == [[] for _ in traced]
