"""einops in the forward of the whole model and in parts: sizes named there follow, for any batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import netsurgery
import oracles

einops = pytest.importorskip("einops")
layers = pytest.importorskip("einops.layers.torch")

Run = Callable[["Net", Tensor], Tensor]
ROWS, IMAGES = torch.randn(2, 12, dtype=torch.float64), torch.randn(2, 3, 8, 8, dtype=torch.float64)
SEQUENCES = torch.randn(2, 7, 12, dtype=torch.float64)


class Net(nn.Module):
    """Layers and a forward of one line."""

    def __init__(self, run: Run, **parts: nn.Module):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class Within(nn.Module):
    """A network as a part of another."""

    def __init__(self, part: nn.Module):
        super().__init__()
        self.part, self.last = part, nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.part(x).relu())


def lines(run: Run, width: int = 32, read: int = 32) -> nn.Module:
    return Net(run, a=nn.Linear(12, width), b=nn.Linear(read, 5))


def images(run: Run, read: int) -> nn.Module:
    return Net(run, c=nn.Conv2d(3, 16, 3, padding=1), b=nn.Linear(read, 5))


def attention(m: Any, x: Tensor) -> Tensor:
    h = m.first(x)
    q, k, v = einops.rearrange(m.qkv(h), "b n (three h d) -> three b h n d", three=3, h=4)
    seen = einops.einsum(q, k, "b h i d, b h j d -> b h i j").softmax(-1)
    out = einops.rearrange(einops.einsum(seen, v, "b h i j, b h j d -> b h i d"), "b h n d -> b n (h d)")
    return m.last(h + m.out(out))


def packed(m: Any, x: Tensor) -> Tensor:
    both, shapes = einops.pack([m.a(x), m.b(x)], "* c")
    one, other = einops.unpack(both.tanh(), shapes, "* c")
    return m.c(one * other)


def layered() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3),
        layers.Rearrange("b (g c) h w -> b g c h w", g=4),
        nn.Tanh(),
        layers.Rearrange("b g c h w -> b (g c) h w"),
        layers.Reduce("b c h w -> b c", "max"),
        nn.Linear(32, 5),
    )


NETS: dict[str, tuple[Callable[[], nn.Module], Tensor, int]] = {
    "rearrange": (
        lambda: lines(
            lambda m, x: m.b(einops.rearrange(einops.rearrange(m.a(x), "b (h d) -> b h d", h=4), "b h d -> b (h d)"))
        ),
        ROWS,
        2,
    ),
    "rearrange, all sizes named": (
        lambda: lines(lambda m, x: m.b(einops.rearrange(m.a(x), "b (h d) -> b h d", h=4, d=8).flatten(1))),
        ROWS,
        2,
    ),
    "rearrange, the whole named": (
        lambda: lines(lambda m, x: m.b(einops.rearrange(m.a(x), "b (c one) -> b c one", c=32)[..., 0])),
        ROWS,
        1,
    ),
    "reduce": (lambda: images(lambda m, x: m.b(einops.reduce(m.c(x), "b c h w -> b c", "mean")), 16), IMAGES, 1),
    "reduce groups": (
        lambda: images(lambda m, x: m.b(einops.reduce(m.c(x), "b (c k) h w -> b c", "max", k=2)), 8),
        IMAGES,
        2,
    ),
    "reduce windows": (
        lambda: images(
            lambda m, x: m.b(einops.reduce(m.c(x), "b c (h p) (w q) -> b c h w", "max", p=2, q=2).mean((2, 3))), 16
        ),
        IMAGES,
        1,
    ),
    "repeat": (
        lambda: lines(lambda m, x: m.b(einops.repeat(m.a(x), "b c -> b (c r)", r=3)), width=8, read=24),
        ROWS,
        2,
    ),
    "einsum and rearrange": (
        lambda: Net(
            attention, first=nn.Linear(12, 24), qkv=nn.Linear(24, 96), out=nn.Linear(32, 24), last=nn.Linear(24, 5)
        ),
        SEQUENCES,
        3,
    ),
    "pack": (lambda: Net(packed, a=nn.Linear(12, 8), b=nn.Linear(12, 8), c=nn.Linear(8, 5)), ROWS, 1),
    "layers": (layered, IMAGES, 2),
    "a mix of axes": (
        lambda: nn.Sequential(
            nn.Linear(12, 32),
            layers.EinMix("b (h d) -> b h e", weight_shape="h d e", bias_shape="h e", h=4, d=8, e=6),
            layers.Rearrange("b h e -> b (h e)"),
            nn.Linear(24, 5),
        ),
        ROWS,
        3,
    ),
}


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_named_sizes_follow(name: str, within: bool) -> None:
    make, x, count = NETS[name]
    torch.manual_seed(0)
    model = (Within(make()) if within else make()).double().eval()
    model(x)  # einops keeps what it has worked out for these sizes
    network = netsurgery.trace(model, (x,))
    assert len(network.prunable) == count + within
    small, edit = oracles.check(model, (x,), 1e-10, share=0.5)
    assert len(edit.keep) == count + within
    other = torch.randn(5, *x.shape[1:], dtype=torch.float64)
    assert netsurgery.verify(model, small, netsurgery.Edit(netsurgery.trace(model, other), edit.keep), other) < 1e-10


@pytest.mark.parametrize("seed", range(4))
def test_any_number_of_heads_and_dimensions(seed: int) -> None:
    torch.manual_seed(seed)
    make, x, _ = NETS["einsum and rearrange"]
    tally = oracles.Tally()
    oracles.check(make().double().eval(), (x,), 1e-10, seed, tally=tally)
    assert tally.refused == (seed in (0, 2))  # a size that nothing has planned


def test_a_size_that_is_only_asked_for_is_locked_at_the_users_line() -> None:
    model = lines(lambda m, x: m.b(einops.repeat(m.a(x), "b c -> b c k", c=32, k=2).sum(-1))).double()
    reason = netsurgery.trace(model, (ROWS,))["a"].locked or ""
    assert "the code refuses other sizes" in reason and "test_einops.py" in reason and "einops/" not in reason


def test_nothing_that_remembers_stays_in_the_caches_of_einops() -> None:
    make, x, _ = NETS["rearrange"]
    model = Within(make()).double()
    netsurgery.trace(model, (x,))
    h = torch.zeros(2, 32)
    assert all(type(size) is int for size in einops.rearrange(h, "b (h d) -> b h d", h=4).shape)
    assert einops.parse_shape(h, "b c") == {"b": 2, "c": 32}
