"""How much of a network is open to removal, counted axis by axis; every number is worked out by hand."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import netsurgery
from netsurgery.axes import Edge, Fixed, channel, inner
from netsurgery.passes import PruneChannels, RandomScore
from test_by_hand import Net


def share(run: Callable[..., Tensor], x: Tensor, **layers: nn.Module) -> float:
    return netsurgery.trace(Net(run, **layers), x).prunable_share


def lin(i: int, o: int) -> nn.Linear:
    return nn.Linear(i, o, bias=False)


X = torch.zeros(5, 4)


def test_all_but_inputs_and_outputs() -> None:
    assert share(lambda m, x: m.b(m.a(x).relu()), X, a=nn.Linear(4, 8), b=nn.Linear(8, 3)) == 1


def test_a_matrix_with_one_free_axis_counts_half() -> None:
    """The middle matrix (7, 6) is free along its inputs; along its outputs, and in what reads them, it is locked."""
    free, half, locked = 6 * 4, 7 * 6, 3 * 7
    found = share(lambda m, x: m.c(m.b(m.a(x)).flip(-1)), X, a=lin(4, 6), b=lin(6, 7), c=lin(7, 3))
    assert found == pytest.approx((free + half) / (free + 2 * half + locked))


def test_biases_and_norms_have_one_axis() -> None:
    found = share(lambda m, x: m.b(m.n(m.a(x)).flip(-1)), X, a=lin(4, 6), n=nn.LayerNorm(6), b=lin(6, 3))
    assert found == 0
    free = 6 * 4 + 6 + 6 + 7 * 6
    found = share(
        lambda m, x: m.c(m.b(m.n(m.a(x))).flip(-1)), X, a=lin(4, 6), n=nn.LayerNorm(6), b=lin(6, 7), c=lin(7, 3)
    )
    assert found == pytest.approx(free / (free + 7 * 6 + 3 * 7))


def test_parts_of_a_concatenation() -> None:
    """The last matrix reads 6 free and 8 locked units, and 4 inputs, which count neither way."""
    found = share(
        lambda m, x: m.c(torch.cat([m.a(x), m.b(x).flip(-1), x], -1)), X, a=lin(4, 6), b=lin(4, 8), c=lin(18, 3)
    )
    free, locked = 6 * 4 + 3 * 6, 8 * 4 + 3 * 8
    assert found == pytest.approx(free / (free + locked))


def test_positions_in_a_product_count_neither_way() -> None:
    """Channels and positions flattened: the axis is free where the channels are."""
    image = torch.zeros(1, 2, 4, 4)
    found = share(
        lambda m, x: m.c(m.b(m.a(x).flatten(1)).flip(-1)), image, a=nn.Conv2d(2, 5, 3, bias=False), b=lin(20, 6),
        c=lin(6, 3),
    )  # fmt: skip
    free, locked = 5 * 2 * 9 + 6 * 20, 6 * 20 + 6 * 3
    assert found == pytest.approx(free / (free + locked))


def test_one_free_factor_is_enough() -> None:
    """Of 3 blocks of 4 the blocks are free, what is in them is locked: half of everything can still go."""
    found = share(
        lambda m, x: m.c(m.b(m.a(x).view(-1, 3, 4).flip(-1).flatten(1)).flip(-1)), X, a=lin(4, 12), b=lin(12, 6),
        c=lin(6, 3),
    )  # fmt: skip
    free, locked = 12 * 4 + 6 * 12, 6 * 12 + 6 * 3
    assert found == pytest.approx(free / (free + locked))


def test_attention_of_which_nothing_moves_counts_its_streams_only() -> None:
    """Heads and what is in them are locked: of four projections (12, 12) the side of the stream is free."""

    def run(m: Net, x: Tensor) -> Tensor:
        h = m.a(x)
        q, k, v = (layer(h).flip(-1) for layer in (m.q, m.k, m.v))
        return m.out(h + m.o((torch.softmax(q @ k.mT, -1) @ v).flip(-1)))

    four = {name: lin(12, 12) for name in "qkvo"}
    found = share(run, X[None], a=lin(4, 12), out=lin(12, 3), **four)
    ends = 12 * 4 + 3 * 12
    assert found == pytest.approx((ends + 4 * 144) / (ends + 8 * 144))


def test_what_a_constant_feeds_is_an_input() -> None:
    """The two coordinates of a table, as in torchvision's Swin V2, are no dimension that anyone could cut."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("coordinates", torch.randn(6, 2))
            self.a, self.b, self.c = lin(2, 8), lin(8, 6), lin(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c((x[:, None] * self.b(self.a(self.coordinates).relu())).sum(1))

    assert netsurgery.trace(Table(), torch.zeros(5, 6)).prunable_share == 1


def test_what_a_pass_locks_is_locked() -> None:
    model = nn.Sequential(lin(4, 8), nn.ReLU(), lin(8, 8), nn.ReLU(), lin(8, 3))
    network = netsurgery.trace(model, X)
    assert network.prunable_share == 1
    one = network.with_locked({"0": "no"})
    assert one.prunable_share == pytest.approx((64 + 24) / (32 + 128 + 24))
    assert "47.8% of its inner dimensions prunable" in str(one)
    assert one.with_locked({"2": "no"}).prunable_share == 0


def test_nothing_but_inputs_and_outputs() -> None:
    assert share(lambda m, x: m.a(x), X, a=nn.Linear(4, 3)) == 0


def test_small_removals_take_that_share() -> None:
    """The definition itself, as a difference: one unit of a hundred from all open groups, and from all inner ones."""
    layers = {"a": lin(4, 100), "b": lin(100, 200), "c": lin(200, 3)}
    locked = netsurgery.trace(Net(lambda m, x: m.c(m.b(m.a(x)).flip(-1)), **layers), X)
    free = netsurgery.trace(Net(lambda m, x: m.c(m.b(m.a(x))), **layers), X)
    gone = []
    for network in (locked, free):
        edit = PruneChannels(0.01).run(RandomScore().run(network))
        assert isinstance(edit, netsurgery.Edit)
        gone.append(edit.before.params - edit.after.params)
    assert locked.prunable_share == pytest.approx(gone[0] / gone[1], abs=0.01)


def test_inner_dimensions() -> None:
    assert inner(channel(3)) and inner(channel(3, "locked"))
    assert not any(
        map(inner, [channel(1), channel(3, Fixed("time")), channel(3, Edge("the network output has this dimension"))])
    )
