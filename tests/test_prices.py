"""Multiply-accumulates against counts by hand: transposed convolutions, modules used twice, attention, einsum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import netsurgery
from netsurgery.passes import PruneChannels, RandomScore


class Code(nn.Module):
    def __init__(self, run: Callable[[Any, Tensor], Tensor], **layers: Any):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def one(layer: nn.Module) -> Code:
    return Code(lambda m, x: m.a(x), a=layer)


def attended(m: Any, x: Tensor) -> Tensor:
    q, k, v = (f(x).unflatten(-1, (-1, 6)).transpose(1, 2) for f in (m.q, m.k, m.v))
    return m.out(F.scaled_dot_product_attention(q, k, v, is_causal=m.causal).transpose(1, 2).flatten(2))


def heads(**options: bool) -> Code:
    layers = {name: nn.Linear(10, 24) for name in "qkv"}
    return Code(attended, causal=options.get("causal", False), out=nn.Linear(24, 3), **layers)


PROJECTIONS = 2 * 5 * (3 * 10 * 24 + 24 * 3)  # of two sequences of five: queries, keys, values; outputs
PRODUCTS = 2 * 4 * 5 * 5 * 6 * 2  # two sequences, four heads, every pair of positions, six dimensions; scores, sums

ROWS, IMAGE, LINE = torch.zeros(2, 5, 10), torch.zeros(2, 6, 5, 7), torch.zeros(2, 6, 9)
VOLUME = torch.zeros(1, 4, 3, 4, 5)

CASES: dict[str, tuple[nn.Module, Tensor, int]] = {
    # each input position meets each weight once, whatever the stride
    "transposed, stride 1": (one(nn.ConvTranspose2d(6, 4, 3)), IMAGE, 2 * 5 * 7 * 6 * 4 * 9),
    "transposed, stride 2": (one(nn.ConvTranspose2d(6, 4, 4, stride=2, padding=1)), IMAGE, 2 * 5 * 7 * 6 * 4 * 16),
    "transposed, uneven": (
        one(nn.ConvTranspose2d(6, 4, (2, 3), stride=(3, 2), output_padding=(1, 0))), IMAGE, 2 * 5 * 7 * 6 * 4 * 6
    ),
    "transposed, groups": (one(nn.ConvTranspose2d(6, 9, 3, stride=2, groups=3)), IMAGE, 2 * 5 * 7 * 6 * 3 * 9),
    "transposed, a line": (one(nn.ConvTranspose1d(6, 4, 5, stride=3)), LINE, 2 * 9 * 6 * 4 * 5),
    "transposed, a volume": (one(nn.ConvTranspose3d(4, 3, 2, stride=2)), VOLUME, 60 * 4 * 3 * 8),
    # each output position meets each weight once
    "stride 2": (one(nn.Conv2d(6, 4, 3, stride=2)), IMAGE, 2 * 2 * 3 * 4 * 6 * 9),
    "groups": (one(nn.Conv2d(6, 12, 3, padding=1, groups=3)), IMAGE, 2 * 35 * 12 * 2 * 9),
    "depthwise": (one(nn.Conv2d(6, 6, 3, padding=1, groups=6)), IMAGE, 2 * 35 * 6 * 9),
    "dilated": (one(nn.Conv1d(6, 4, 3, dilation=2)), LINE, 2 * 5 * 4 * 6 * 3),
    # a module that is used several times works several times
    "used twice": (Code(lambda m, x: m.a(m.a(x)), a=nn.Linear(10, 10)), ROWS, 2 * (2 * 5 * 100)),
    "used on two sizes": (
        Code(lambda m, x: m.a(x).sum() + m.a(x[..., ::2, ::2]), a=nn.Conv2d(6, 4, 1)), IMAGE, 24 * 2 * (35 + 12)
    ),
    "used in a loop": (Code(lambda m, x: sum(m.a(r) for r in x.unbind(1)), a=nn.Linear(10, 3)), ROWS, 2 * 5 * 30),  # type: ignore[arg-type, misc]
    "shared weights": (
        Code(lambda m, x: F.linear(m.a(x), m.a.weight.T), a=nn.Linear(10, 4)), ROWS, 2 * 5 * 40 * 2
    ),
    # attention
    "attention": (heads(), ROWS, PROJECTIONS + PRODUCTS),
    "causal attention": (heads(causal=True), ROWS, PROJECTIONS + PRODUCTS),
    "a transformer's layer": (
        one(nn.TransformerEncoderLayer(24, 4, 32, batch_first=True)), torch.zeros(2, 5, 24),
        2 * 5 * (3 * 24 * 24 + 24 * 24 + 2 * 24 * 32) + PRODUCTS,
    ),
    "nn.MultiheadAttention": (
        Code(lambda m, x: m.a(x, x, x)[0], a=nn.MultiheadAttention(24, 4, batch_first=True)), torch.zeros(2, 5, 24),
        2 * 5 * 4 * 24 * 24 + PRODUCTS,
    ),
    # einsum
    "einsum, a layer": (
        Code(lambda m, x: torch.einsum("bnd,od->bno", x, m.w), w=nn.Parameter(torch.zeros(4, 10))), ROWS, 2 * 5 * 10 * 4
    ),
    "einsum, scores": (
        Code(lambda m, x: torch.einsum("bnhd,bmhd->bhnm", *[m.a(x).unflatten(-1, (4, 6))] * 2), a=nn.Linear(10, 24)),
        ROWS, 2 * 5 * 10 * 24 + 2 * 4 * 25 * 6,
    ),
    "einsum, three": (
        Code(lambda m, x: torch.einsum("bnd,dr,ro->bno", x, m.a, m.b), a=nn.Parameter(torch.zeros(10, 3)),
             b=nn.Parameter(torch.zeros(3, 8))),
        ROWS, 2 * 5 * 10 * 3 + 2 * 5 * 3 * 8,
    ),
    "einsum, an outer product": (  # no sum: not counted, as other multiplications are not
        Code(lambda m, x: torch.einsum("bi,bj->bij", x[:, 0], m.a(x[:, 1])), a=nn.Linear(10, 4)), ROWS, 2 * 10 * 4
    ),
    # other products
    "bilinear": (Code(lambda m, x: m.a(x, x), a=nn.Bilinear(10, 10, 4)), ROWS, 2 * 5 * 10 * 10 * 4),
    "matmul": (Code(lambda m, x: x @ m.w, w=nn.Parameter(torch.zeros(10, 7))), ROWS, 2 * 5 * 10 * 7),
    "a product of rows": (Code(lambda m, x: m.a(x) @ x[0, 0], a=nn.Linear(10, 10)), ROWS, 2 * 5 * 100 + 2 * 5 * 10),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_macs(name: str) -> None:
    model, x, macs = CASES[name]
    assert netsurgery.cost(model.eval(), x).macs == macs


def smaller(model: nn.Module, x: Tensor, **settings: Any) -> tuple[nn.Module, netsurgery.Edit]:
    """A cut model; what was said of its price before is true."""
    edit = netsurgery.plan(model.eval(), [RandomScore(), PruneChannels(0.5, **settings)], x)
    small = netsurgery.rewrite(model, edit)
    assert netsurgery.cost(small, x) == edit.after
    return small, edit


def test_after_a_cut_of_a_transposed_convolution() -> None:
    model = nn.Sequential(nn.Conv2d(6, 8, 1), nn.ConvTranspose2d(8, 10, 4, stride=2, padding=1), nn.Conv2d(10, 3, 1))
    _, edit = smaller(model, IMAGE)
    assert edit.before.macs == 2 * (35 * 6 * 8 + 35 * 8 * 10 * 16 + 140 * 10 * 3)
    assert edit.after.macs == 2 * (35 * 6 * 4 + 35 * 4 * 5 * 16 + 140 * 5 * 3)


@pytest.mark.parametrize(("unit", "count", "dim"), [("head", 2, 6), ("head_dim", 4, 3)])
def test_after_a_cut_of_attention(unit: str, count: int, dim: int) -> None:
    _, edit = smaller(nn.Sequential(heads()), ROWS, unit=unit)
    assert edit.after.macs == 2 * 5 * (3 * 10 * 12 + 12 * 3) + 2 * count * 25 * dim * 2


def test_after_a_cut_of_a_module_that_is_used_twice() -> None:
    model = Code(lambda m, x: m.b(m.a(x)) + m.b(m.a(x + 1)), a=nn.Linear(10, 8), b=nn.Linear(8, 3))
    _, edit = smaller(model, ROWS)
    assert (edit.before.macs, edit.after.macs) == (2 * 10 * (80 + 24), 2 * 10 * (40 + 12))
    assert (edit.before.params, edit.after.params) == (88 + 27, 44 + 15)


def test_after_a_cut_of_an_einsum() -> None:
    model = Code(
        lambda m, x: torch.einsum("bnd,do->bno", m.a(x).relu(), m.w),
        a=nn.Linear(10, 8),
        w=nn.Parameter(torch.zeros(8, 3)),
    )
    _, edit = smaller(model, ROWS)
    assert (edit.before.macs, edit.after.macs) == (10 * (80 + 24), 10 * (40 + 12))
