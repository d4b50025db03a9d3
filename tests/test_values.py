"""Models whose code looks at values: they are recorded with them, and compared along the path that was recorded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from oracles import check

X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Code between a first layer of 8 units, and two last ones."""

    def __init__(self, run: Callable[..., Tensor]):
        super().__init__()
        self.run = run
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.run(self, h) + 0 * (self.b(h) + self.c(h)).sum()


def loop(m: Net, h: Tensor) -> Tensor:
    for _ in range(int(h.abs().sum()) % 3 + 1):
        h = h * 1.5
    return m.b(h)


def chosen_branch(m: Net, h: Tensor) -> Tensor:
    return m.b(h) if h.sum() > 0 else m.c(h)


def threshold(m: Net, h: Tensor) -> Tensor:
    return m.b(h * (h > 0.1)) + m.c(torch.where(h < 0, h, 0.0))


LOOKS = {
    "a branch": chosen_branch,
    "a loop": loop,
    "an item": lambda m, h: m.b(h) * h.mean().item(),
    "a list": lambda m, h: m.b(h) * sum(h.mean(1).tolist()),
    "an array": lambda m, h: m.b(h) * float(h.mean(1).numpy().sum()),
    "a tensor of items": lambda m, h: m.b(h) * torch.tensor([h.mean(), h.amax(), 1.0]),
    "equality": lambda m, h: m.b(h) if torch.equal(h, h * 2) else m.c(h),
    "a threshold after a look": lambda m, h: threshold(m, h) * h.amax().item(),
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", LOOKS)
def test_code_that_looks_at_values(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    model = Net(LOOKS[name]).double().eval()
    _, edit = check(model, (X,), 1e-10, seed)
    assert edit.network.programs[0].valued
    assert [group.name for group in edit.network.prunable] == ["a"]
