"""A ratio is a share of a layer's channels, whatever these are products of; what is no channel stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import netsurgery
from netsurgery.errors import InputError
from netsurgery.passes import MagnitudeScore, PruneChannels, RandomScore, SoftPruning

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))


def cut(model: nn.Module, inputs: Any, *passes: netsurgery.Pass) -> Any:
    """The smaller model, which is what the larger one is with the units silenced."""
    torch.manual_seed(0)
    edit = netsurgery.plan(model.eval(), [RandomScore(), *passes], inputs)
    small = netsurgery.rewrite(model, edit)
    assert netsurgery.verify(model, small, edit, inputs) < 1e-5
    return small


def weights(model: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(p.shape) for p in model.parameters() if p.dim() > 1]


# Groups of normalisations and of convolutions ------------------------------------------------------------------------


def normed(groups: int, width: int = 32) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.GroupNorm(groups, width), nn.Conv2d(width, 4, 1))


@pytest.mark.parametrize(
    ("groups", "ratio", "left"), [(8, 0.5, 16), (4, 0.25, 24), (2, 0.75, 8), (32, 0.5, 16), (1, 0.5, 16)]
)
def test_the_groups_of_a_norm_stay(groups: int, ratio: float, left: int) -> None:
    small = cut(normed(groups), IMAGE, PruneChannels(ratio))
    assert small[0].out_channels == small[1].num_channels == small[2].in_channels == left
    assert small[1].num_groups == (groups if groups < 32 else left)  # of one channel each, they are channels


def test_the_groups_of_a_norm_go_where_they_are_asked_for() -> None:
    small = cut(normed(8), IMAGE, PruneChannels(0.5, unit="group"))
    assert (small[1].num_groups, small[1].num_channels) == (4, 16)
    small = cut(normed(8), IMAGE, PruneChannels(0.5, unit=("group", "channel")))
    assert (small[1].num_groups, small[1].num_channels) == (4, 8)


def grouped(groups: int, before: int = 32, after: int = 32) -> nn.Module:
    parts = [nn.Conv2d(3, before, 3), nn.ReLU(), nn.Conv2d(before, after, 3, groups=groups), nn.ReLU()]
    return nn.Sequential(*parts, nn.Conv2d(after, 4, 1))


@pytest.mark.parametrize(
    ("model", "left"),
    [
        (grouped(4), (16, 16, 4)),
        (grouped(8, 32, 64), (16, 32, 8)),
        (grouped(32), (16, 16, 16)),  # depthwise
        (grouped(16, 16, 32), (8, 16, 8)),  # depthwise, two of each
        (grouped(8, 32, 8), (16, 4, 4)),  # one of each
    ],
)
def test_of_a_grouped_convolution_the_width_of_the_groups_goes(model: nn.Module, left: tuple[int, ...]) -> None:
    small = cut(model, IMAGE, PruneChannels(0.5))
    assert (small[2].in_channels, small[2].out_channels, small[2].groups) == left


def test_the_groups_of_a_convolution_go_where_they_are_asked_for() -> None:
    small = cut(grouped(4), IMAGE, PruneChannels(0.5, unit="group"))
    assert (small[2].in_channels, small[2].out_channels, small[2].groups) == (16, 16, 2)


def test_of_a_transposed_convolution_too() -> None:
    parts = [nn.Conv2d(3, 16, 1), nn.ConvTranspose2d(16, 32, 2, 2, groups=4), nn.GroupNorm(4, 32), nn.Conv2d(32, 3, 1)]
    small = cut(nn.Sequential(*parts), IMAGE, PruneChannels(0.5))
    assert (small[1].in_channels, small[1].out_channels, small[1].groups, small[2].num_groups) == (8, 16, 4, 4)


def test_a_shuffle_of_channels_keeps_its_blocks() -> None:
    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 24, 1), nn.Conv2d(24, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            b, _, h, w = x.shape
            return self.b(self.a(x).relu().view(b, 2, -1, h, w).transpose(1, 2).reshape(b, -1, h, w))

    small = cut(Shuffled(), IMAGE, PruneChannels(0.5))
    assert small.a.out_channels == small.b.in_channels == 12


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "regnet_y_400mf", "resnext50_32x4d"])
def test_half_of_the_channels_of_whole_networks(name: str) -> None:
    model = getattr(torchvision.models, name)().eval()
    x = torch.randn(1, 3, 64, 64)
    edit = netsurgery.plan(model, [RandomScore(), PruneChannels(0.5)], x)
    sizes = edit.network.sizes(edit.counts)
    for parameter, axes in edit.network.axes.items():
        for axis in axes:  # nothing is cut twice
            assert sizes(axis) >= axis.size // 2 - 1, parameter


# Attention -----------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Queries may have more heads than keys and values."""

    def __init__(self, heads: int = 6, keys: int = 6, dim: int = 8):
        super().__init__()
        self.heads, self.keys, self.dim = heads, keys, dim
        self.q, self.k, self.v = (nn.Linear(12, n * dim) for n in (heads, keys, keys))
        self.out = nn.Linear(heads * dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.dim)).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(self.heads // self.keys, 1) for t in (k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Around(nn.Module):
    def __init__(self, inside: nn.Module):
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x)


def widths(model: Any) -> tuple[int, ...]:
    return tuple(layer.out_features for layer in (model.inside.q, model.inside.k, model.inside.v))


@pytest.mark.parametrize(("ratio", "left"), [(0.5, (24, 24, 24)), (0.25, (36, 36, 36))])
@pytest.mark.parametrize("unit", ["any", "head", "head_dim"])
def test_a_share_of_the_width_of_attention(unit: str, ratio: float, left: tuple[int, ...]) -> None:
    small = cut(Around(Attention(heads=4, keys=4, dim=12)), ROWS, PruneChannels(ratio, unit=unit))
    assert widths(small) == left


def test_both_factors_of_attention_where_both_are_asked_for() -> None:
    small = cut(Around(Attention()), ROWS, PruneChannels(0.5, unit=("head", "head_dim")))
    assert widths(small) == (3 * 4, 3 * 4, 3 * 4)


@pytest.mark.parametrize("unit", ["any", "head", "head_dim"])
def test_queries_that_share_keys(unit: str) -> None:
    small = cut(Around(Attention(8, 4)), ROWS, PruneChannels(0.5, unit=unit))
    assert widths(small) == (32, 16, 16)


def test_a_transformer_layer() -> None:
    layer = nn.TransformerEncoderLayer(24, 4, 32, batch_first=True)
    model = nn.Sequential(
        nn.Linear(12, 24), nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(24, 3)
    )
    small = cut(model, ROWS, PruneChannels(0.5))
    assert small[1].layers[0].self_attn.in_proj_weight.shape == (36, 12)
    assert small[1].layers[0].linear1.weight.shape == (16, 12)


# Numbers of channels, not of units ----------------------------------------------------------------------------------


def test_multiples_are_of_channels() -> None:
    small = cut(Around(Attention()), ROWS, PruneChannels(0.5, unit="head", multiple_of=8))
    assert widths(small) == (24, 24, 24)  # 3 of 6 heads of 8
    small = cut(Around(Attention(dim=6)), ROWS, PruneChannels(0.5, unit="head", multiple_of=8))
    assert widths(small) == (24, 24, 24)  # 4 of 6 heads of 6: 18 is no multiple
    small = cut(Around(Attention()), ROWS, PruneChannels(0.4, unit="head_dim", multiple_of=12))
    assert widths(small) == (36, 36, 36)
    small = cut(normed(4, 40), IMAGE, PruneChannels(0.5, multiple_of=8))
    assert small[0].out_channels == 24


def test_the_fewest_are_channels_too() -> None:
    small = cut(Around(Attention()), ROWS, PruneChannels(0.9, unit="head", min_channels=16))
    assert widths(small) == (16, 16, 16)
    small = cut(normed(8), IMAGE, PruneChannels(0.9, min_channels=12))
    assert small[0].out_channels == 16


def test_positions_are_no_channels() -> None:
    flat = nn.Sequential(nn.Conv2d(3, 12, 3), nn.Flatten(), nn.Linear(12 * 36, 5))
    assert cut(flat, IMAGE, PruneChannels(0.5, multiple_of=4))[0].out_channels == 8

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.up = nn.Linear(12, 12 * 16), nn.ConvTranspose2d(12, 3, 2, 2)

        def forward(self, z: Tensor) -> Tensor:
            return self.up(self.fc(z).relu().unflatten(1, (-1, 4, 4)))

    assert cut(Decoder(), ROWS[:, 0], PruneChannels(0.5, multiple_of=4)).up.in_channels == 8


@pytest.mark.parametrize(
    ("width", "step", "ratio", "left"),
    [(20, 8, 0.5, 16), (20, 8, 0.3, 16), (20, 8, 0.1, 20), (30, 16, 0.6, 16), (7, 2, 0.5, 4)],
)
def test_widths_that_are_no_multiple(width: int, step: int, ratio: float, left: int) -> None:
    model = nn.Sequential(nn.Linear(12, width), nn.ReLU(), nn.Linear(width, 3))
    assert cut(model, ROWS, PruneChannels(ratio, multiple_of=step))[0].out_features == left
    edit = netsurgery.plan(model, [RandomScore(), PruneChannels(ratio, multiple_of=step)], ROWS)
    if left > width - int(width * ratio):
        assert f"0: {width - left} of {width} (multiple_of={step})" in edit.summary()


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("what", ["params", "macs"])
def test_budgets_whose_last_step_is_one_unit(what: str, scope: str) -> None:
    model = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 2))  # 7 parameters and 6 MACs a unit
    x = torch.zeros(1, 4)
    prices = [getattr(netsurgery.trace(model, x).cost({"0": n}), what) for n in range(1, 10)]
    for n, price in enumerate(prices, start=1):
        for budget, left in ((price, n), (price - 1, n - 1), (price + 1, n)):
            if left:
                edit = netsurgery.plan(
                    model, [RandomScore(), PruneChannels(scope=scope, max_ratio=1.0, **{what: budget})], x
                )
                assert edit.counts.get("0", 9) == left


# No channels ---------------------------------------------------------------------------------------------------------


class LoRA(nn.Module):
    """A layer and an update of low rank beside it."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], rank: int = 8):
        super().__init__()
        self.run = run
        self.w, self.out = nn.Linear(12, 32), nn.Linear(32, 3)
        self.a, self.b = nn.Linear(12, rank, bias=False), nn.Linear(rank, 32, bias=False)
        self.drop = nn.Dropout(0.1)
        self.gain, self.gate = nn.Parameter(torch.rand(rank)), nn.Parameter(torch.rand(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.run(self, x).relu())


BESIDE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "beside": lambda m, x: m.w(x) + m.b(m.a(m.drop(x))) * 2,
    "scaled first": lambda m, x: m.b(m.a(x) * 0.5) + m.w(x),
    "with learned factors": lambda m, x: m.w(x) + m.b(m.a(x) * m.gain) * m.gate,
    "several": lambda m, x: (m.w(x) + m.b(m.a(x)) * 0.5) + m.b(m.a(m.drop(x))),
    "of the weight": lambda m, x: F.linear(x, m.w.weight + 2 * m.b.weight @ m.a.weight, m.w.bias),
    "turned": lambda m, x: x @ (m.w.weight.T + m.a.weight.T @ m.b.weight.T) + m.w.bias,
}


@pytest.mark.parametrize("run", BESIDE)
def test_the_rank_of_an_update_is_no_channel(run: str) -> None:
    small = cut(LoRA(BESIDE[run]), ROWS, PruneChannels(0.5))
    assert small.a.weight.shape == (8, 12) and small.b.weight.shape == (16, 8)
    small = cut(LoRA(BESIDE[run]), ROWS, PruneChannels(0.5, unit="rank"))
    assert small.a.weight.shape == (4, 12) and small.b.weight.shape == (32, 4)


def test_convolutions_of_low_rank() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.out = nn.Conv2d(12, 16, 3, padding=1), nn.Conv2d(16, 3, 1)
            self.a, self.b = nn.Conv2d(12, 4, 3, padding=1, bias=False), nn.Conv2d(4, 16, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.out((self.w(x) + self.b(self.a(x))).relu())

    x = torch.randn(1, 12, 6, 6)
    assert cut(Beside(), x, PruneChannels(0.5)).a.out_channels == 4


def test_an_embedding_of_low_rank() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.a, self.b = nn.Embedding(20, 16), nn.Embedding(20, 4), nn.Linear(4, 16, bias=False)
            self.out = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.w(x) + self.b(self.a(x)))

    small = cut(Beside(), torch.tensor([[1, 2, 3]]), PruneChannels(0.5))
    assert (small.w.embedding_dim, small.a.embedding_dim) == (8, 4)


def test_a_hidden_layer_beside_another_is_made_of_channels() -> None:
    small = cut(LoRA(lambda m, x: m.w(x) + m.b(m.a(x).relu())), ROWS, PruneChannels(0.5))
    assert small.a.out_features == 4
    small = cut(LoRA(BESIDE["beside"], rank=40), ROWS, PruneChannels(0.5))  # not low
    assert small.a.out_features == 20
    plain = nn.Sequential(nn.Linear(12, 6, bias=False), nn.Linear(6, 24))
    assert cut(plain, ROWS, PruneChannels(0.5))[0].out_features == 3


class Fed(nn.Module):
    """A layer reads a constant."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor]):
        super().__init__()
        self.run = run
        self.w, self.out = nn.Linear(12, 32), nn.Linear(32, 3)
        self.read, self.norm = nn.Linear(8, 32), nn.LayerNorm(8)
        self.register_buffer("table", torch.randn(5, 8))
        self.plain = torch.randn(5, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((self.w(x) + self.run(self, x)).relu())


CONSTANTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a buffer": lambda m, x: m.read(m.table),
    "a buffer with a norm": lambda m, x: m.read(m.norm(m.table)),
    "rows of a buffer": lambda m, x: m.read(m.table[torch.tensor([3, 1, 0, 2, 4])]),
    "an embedding of a buffer": lambda m, x: m.read(F.embedding(torch.tensor([3, 1, 0, 2, 4]), m.table)),
    "a tensor that is an attribute": lambda m, x: m.read(m.plain * 2),
    "ones": lambda m, x: m.read(torch.ones(5, 8)),
    "noise": lambda m, x: m.read(torch.randn(5, 8)) * 0,
    "filled": lambda m, x: m.read(x.new_full((5, 8), 0.3)),
    "a part": lambda m, x: m.read(torch.cat([x[0, :, :3], x.new_ones(5, 5)], 1)),
}


@pytest.mark.parametrize("run", CONSTANTS)
def test_what_a_constant_feeds_is_an_input(run: str) -> None:
    model = Fed(CONSTANTS[run]).eval()
    network = netsurgery.trace(model, ROWS)
    reads = [
        group for group in network.groups if any((m.parameter, m.axis) == ("read.weight", 1) for m in group.members)
    ]
    assert reads and all(group.locked for group in reads)
    assert any("a constant feeds this dimension, as an input would" in (group.locked or "") for group in reads)
    assert cut(model, ROWS, PruneChannels(0.5)).read.weight.shape == (16, 8)


def test_a_state_that_begins_with_zeros_is_no_input() -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.out = nn.RNNCell(12, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.cell(x[:, 0]))

    network = netsurgery.trace(nn.Sequential(Step()), ROWS)
    assert [group.name for group in network.groups if group.locked is None] == ["0.cell", "0.cell:in:2"]


def test_what_a_constant_is_added_to_is_none() -> None:
    """A table of positions, a mask, statistics: what the network has learned makes the units too."""

    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(12, 8), nn.Linear(8, 3), nn.BatchNorm1d(5)
            self.register_buffer("table", torch.randn(5, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.norm(self.a(x) + self.table + x.new_ones(8)))

    small = cut(Added(), ROWS, PruneChannels(0.5))
    assert small.a.out_features == 4 and small.table.shape == (5, 4)


def test_coordinates_of_swin_stay() -> None:
    model = torchvision.models.swin_v2_t().eval()
    edit = netsurgery.plan(model, [RandomScore(), PruneChannels(0.5)], torch.randn(1, 3, 64, 64))
    small = netsurgery.rewrite(model, edit)
    attention = small.features[1][0].attn
    assert attention.relative_coords_table.shape[-1] == attention.cpb_mlp[0].in_features == 2
    assert attention.cpb_mlp[0].out_features == 256


# Elsewhere -----------------------------------------------------------------------------------------------------------


def test_soft_pruning_takes_a_share_once() -> None:
    pruning = SoftPruning(grouped(4), IMAGE, method="sfp", ratio=0.5, epochs=1, grouping="coupled")
    pruning.step(0)
    small: Any = pruning.finish()
    assert (small[2].in_channels, small[2].out_channels, small[2].groups) == (16, 16, 4)


def test_units_are_checked() -> None:
    with pytest.raises(
        InputError, match=r"unit='heads'\): one or several of 'any', 'channel', 'head', 'head_dim', 'group'"
    ):
        PruneChannels(0.5, unit="heads")
    with pytest.raises(InputError, match="one or several of"):
        PruneChannels(0.5, unit=())
    assert "unit=('head', 'rank')" not in repr(PruneChannels(0.5))


def test_scores_rank_what_is_cut() -> None:
    """Of a norm's groups of four, the two that are smallest over all groups go."""
    model = normed(8)
    with torch.no_grad():
        model[0].weight.fill_(1.0).view(8, 4, -1)[:, 1:3] *= 0.1
    edit = netsurgery.plan(model, [MagnitudeScore(), PruneChannels(0.5)], IMAGE)
    assert edit.keep == {"0:2": (0, 3)}
