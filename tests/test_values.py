"""Models whose code looks at values: they are recorded with them, and compared along the path that was recorded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import netsurgery
from netsurgery import values
from netsurgery.errors import InputError, TraceError
from netsurgery.passes import PruneChannels, RandomScore
from netsurgery.tracing import record
from netsurgery.verification import permuted_difference
from oracles import check, snapshot

X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
HALF = [RandomScore(seed=1), PruneChannels(0.5)]


class Net(nn.Module):
    """Code between a first layer of 8 units, and two last ones."""

    def __init__(self, run: Callable[..., Any]):
        super().__init__()
        self.run = run
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        h = self.a(x)
        return self.run(self, h), 0 * (self.b(h) + self.c(h))


def net(run: Callable[..., Any], seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(run).double().eval()


def loop(m: Net, h: Tensor) -> Tensor:
    for _ in range(int(h.abs().sum()) % 3 + 1):
        h = h * 1.5
    return m.b(h)


def written(m: Net, h: Tensor) -> Tensor:
    h = h.clone()
    h[h.mean(1) > 0] = 0.5
    h[h.amax(1) > 1] = h[h.amax(1) > 1] * 2
    return m.b(h) * h.sum().item()


def buckets(m: Net, h: Tensor) -> Tensor:
    found, place, count = torch.unique((h.sum(1) * 2).long(), return_inverse=True, return_counts=True)
    sums = h.new_zeros(len(found), h.shape[1]).index_add_(0, place, h)
    return m.b(sums / count[:, None])


def kept_boxes(m: Net, h: Tensor) -> dict[str, Any]:
    corners = m.b(h).abs()[:, [0, 1]]
    boxes = torch.cat([corners, corners + 1 + m.c(h).abs()[:, :2]], 1)
    keep = torchvision.ops.batched_nms(boxes, h.mean(1), (h.mean(1) > 0).long(), 0.3)
    return {"boxes": boxes[keep], "labels": (h.mean(1) > 0)[keep], "features": [m.b(row) for row in h[keep]]}


def flags_of_units(m: Net, h: Tensor) -> Tensor:
    """A decision for each unit, which goes with it."""
    return (m.b(h * (h > 0.1)) + m.c(torch.where(h < 0, h, 0.0))) * h.amax().item()


#: What the code does, and what of it is compared.
LOOKS: dict[str, Callable[..., Any]] = {
    "a branch": lambda m, h: m.b(h) if h.sum() > 0 else m.c(h),
    "a loop": loop,
    "an item": lambda m, h: m.b(h) * h.mean().item(),
    "a list": lambda m, h: m.b(h) * sum(h.mean(1).tolist()),
    "an array": lambda m, h: m.b(h) * float(h.mean(1).cpu().numpy().sum()),
    "a tensor of items": lambda m, h: m.b(h) * torch.tensor([h.mean(), h.amax(), 1.0]),
    "a new tensor of items": lambda m, h: m.b(h) * h.new_tensor([h.mean(), h.amax(), 1.0]),
    "equality": lambda m, h: m.b(h) if torch.equal(h, h * 2) else m.c(h),
    "flags of units": flags_of_units,
    "rows of a mask": lambda m, h: m.b(h[h.mean(1) > 0]),
    "no rows": lambda m, h: m.b(h[h.mean(1) > 1e9][:, :, None].flatten(1)),
    "rows written": written,
    "nonzero": lambda m, h: m.b(h.index_select(0, (h.mean(1) > 0).nonzero()[:, 0])),
    "the place of the largest": lambda m, h: m.b(h[h.mean(1).argmax().item()]),
    "some of the best": lambda m, h: m.b(h[h.mean(1).topk(3)[1]]) * h.mean(1).topk(int((h.mean(1) > 9).sum()) + 3)[0],
    "a sort": lambda m, h: m.b(h[h.mean(1).sort()[1][h.mean(1).sort(descending=True)[0] > 0]]),
    "largest of rows": lambda m, h: m.b(h) * h[(h @ h.T).max(1)[1]].mean().item() + (h @ h.T).max(1)[0][:, None],
    "repeats": lambda m, h: m.b(h.repeat_interleave((h.mean(1) > 0).long() + 1, 0)),
    "buckets": buckets,
    "boxes": kept_boxes,
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", LOOKS)
def test_code_that_looks_at_values(name: str, seed: int) -> None:
    _, edit = check(net(LOOKS[name], seed), (X,), 1e-10, seed)
    assert edit.network.programs[0].values == "all"
    assert "a" in [group.name for group in edit.network.prunable]
