"""Sequences of several lengths, and cells that the code calls step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
    pad_sequence,
    unpack_sequence,
)

import netsurgery
from netsurgery.passes import MagnitudeScore, PruneChannels
from oracles import check

X = torch.randn(3, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([7, 3, 5])
ORDERED = torch.tensor([7, 5, 5])

Run = Callable[..., Any]


class Net(nn.Module):
    """A layer before, what is done with sequences, and two layers after."""

    def __init__(self, run: Run, **parts: nn.Module):
        super().__init__()
        torch.manual_seed(0)
        self.run = run
        self.before = nn.Linear(6, 10)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        out: Tensor = self.run(self, self.before(x), *others)
        return out


def head(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 3))


def exact(model: nn.Module, inputs: tuple[Any, ...], *names: str) -> nn.Module:
    """Random removals are exact, and take units of every weight that is named."""
    small = model
    for seed, share in ((0, None), (1, None), (2, 0.5)):
        small, _ = check(model.double().eval(), inputs, 1e-10, seed, share)
    shapes = dict(small.state_dict())
    for name in names:
        assert shapes[name].shape != model.state_dict()[name].shape, name
    return small


# Packed sequences ------------------------------------------------------------------------------------------------


def packed(net: Any, x: Tensor, lengths: Any) -> Any:
    y = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    return net.head(pad_packed_sequence(net.rnn(y)[0], batch_first=True)[0])


def ordered(net: Any, x: Tensor, lengths: Any) -> Any:
    y = pack_padded_sequence(x.transpose(0, 1), lengths)
    return net.head(pad_packed_sequence(net.rnn(y)[0])[0])


def last_states(net: Any, x: Tensor, lengths: Any) -> Any:
    y = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
    _, state = net.rnn(y)
    state = state[0] if isinstance(state, tuple) else state
    return net.head(torch.cat([state[-2], state[-1]], -1))


def to_full_length(net: Any, x: Tensor, lengths: Any) -> Any:
    y = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    out, found = pad_packed_sequence(net.rnn(y)[0], batch_first=True, padding_value=-1.5, total_length=9)
    return net.head(out).sum(1) / found[:, None]


def its_data(net: Any, x: Tensor, lengths: Any) -> Any:
    y = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    y = PackedSequence(y.data.relu(), y.batch_sizes, y.sorted_indices, y.unsorted_indices)
    return net.head(net.rnn(y)[0].data)


def twice(net: Any, x: Tensor, lengths: Any) -> Any:
    y = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    y = net.second(net.rnn(y)[0])[0]
    return net.head(pad_packed_sequence(y, batch_first=True)[0].amax(1))


def listed(net: Any, x: Tensor, lengths: Any) -> Any:
    y = pack_sequence([one[:n] for one, n in zip(x, lengths.tolist(), strict=True)], enforce_sorted=False)
    return net.head(pad_sequence(unpack_sequence(net.rnn(y)[0]), batch_first=True))


def from_a_mask(net: Any, x: Tensor, mask: Tensor) -> Any:
    return packed(net, x, mask.sum(1))


def two_ways(width: int = 12, kind: Any = nn.LSTM, **options: Any) -> Any:
    return kind(10, width, bidirectional=True, batch_first=True, **options)


@pytest.mark.parametrize(
    "lengths", [LENGTHS, LENGTHS.tolist(), tuple(LENGTHS.tolist())], ids=["tensor", "list", "tuple"]
)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_packed_sequences(kind: Any, lengths: Any) -> None:
    small = exact(
        Net(packed, rnn=two_ways(kind=kind), head=head(24)), (X, lengths), "rnn.weight_hh_l0", "before.weight"
    )
    width = small.rnn.weight_hh_l0.shape[1]
    assert small.rnn.hidden_size == width and small.rnn.input_size == small.before.out_features
    assert small(X.flip(0), LENGTHS.flip(0)).shape == (3, 7, 3)  # other lengths


@pytest.mark.parametrize(
    ("net", "inputs"),
    [
        (Net(ordered, rnn=nn.GRU(10, 12), head=head(12)), (X, ORDERED)),
        (Net(ordered, rnn=nn.LSTM(10, 12), head=head(12)), (X, ORDERED.tolist())),
        (Net(last_states, rnn=two_ways(num_layers=2), head=head(24)), (X, LENGTHS)),
        (Net(last_states, rnn=two_ways(kind=nn.RNN, nonlinearity="relu"), head=head(24)), (X, LENGTHS)),
        (Net(to_full_length, rnn=two_ways(kind=nn.GRU), head=head(24)), (X, LENGTHS)),
        (Net(packed, rnn=nn.LSTM(10, 12, proj_size=4, batch_first=True), head=head(4)), (X, LENGTHS)),
        (Net(packed, rnn=nn.GRU(10, 12, batch_first=True, bias=False), head=head(12)), (X, LENGTHS)),
        (Net(its_data, rnn=two_ways(), head=head(24)), (X, LENGTHS)),
        (Net(twice, rnn=two_ways(8), second=nn.GRU(16, 6, batch_first=True), head=head(6)), (X, LENGTHS)),
        (Net(listed, rnn=two_ways(), head=head(24)), (X, LENGTHS)),
        (Net(from_a_mask, rnn=two_ways(), head=head(24)), (X, torch.arange(7) < LENGTHS[:, None])),
    ],
    ids=lambda value: value.run.__name__ if isinstance(value, Net) else "",
)
def test_uses_of_packed_sequences(net: nn.Module, inputs: tuple[Any, ...]) -> None:
    exact(net, inputs, "rnn.weight_hh_l0", "before.weight")


class Reader(nn.Module):
    """A recogniser of text: convolutions, a sequence of columns, its lengths given as keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.rnn = nn.LSTM(32, 12, 2, bidirectional=True, dropout=0.1)
        self.classes = nn.Linear(24, 5)

    def forward(self, image: Tensor, widths: Tensor) -> Tensor:
        x = self.features(image).flatten(1, 2).permute(2, 0, 1)
        y, _ = self.rnn(
            pack_padded_sequence(x, torch.div(widths, 2, rounding_mode="floor").cpu(), enforce_sorted=False)
        )
        return self.classes(pad_packed_sequence(y)[0]).log_softmax(-1)


def test_a_recogniser_of_text() -> None:
    image, widths = torch.randn(3, 1, 8, 12, dtype=torch.float64), torch.tensor([12, 8, 10])
    model = Reader().double().eval()
    edit = netsurgery.plan(model, [MagnitudeScore(), PruneChannels(0.5)], {"image": image, "widths": widths})
    small = netsurgery.rewrite(model, edit)
    assert (small.features[0].out_channels, small.rnn.hidden_size, small.rnn.input_size) == (4, 6, 16)
    assert netsurgery.verify(model, small, edit, {"image": image, "widths": widths}) < 1e-10


def test_what_says_the_lengths_stays() -> None:
    network = netsurgery.trace(Net(packed, rnn=two_ways(), head=head(24)).double(), (X, LENGTHS))
    assert {group.name for group in network.prunable} == {"before", "rnn", "head.0"}


def by_a_tensor(net: Any, x: Tensor, at: Tensor) -> Any:
    return net.head(torch.cat([net.rnn(part)[0] for part in torch.tensor_split(x, at, 1)], 1))


def test_positions_of_a_split_in_a_tensor() -> None:
    exact(Net(by_a_tensor, rnn=two_ways(), head=head(24)), (X, torch.tensor([2, 5])), "rnn.weight_hh_l0")
    exact(Net(lambda net, x, at: by_a_tensor(net, x, at.cpu()), rnn=two_ways(), head=head(24)), (X, torch.tensor([3])))


# Cells, step by step -----------------------------------------------------------------------------------------------


def steps(net: Any, x: Tensor) -> Any:
    state = None
    for step in x.unbind(1):
        state = net.cell(step, state)
    return net.head(state[0] if isinstance(state, tuple) else state)


def from_zeros(net: Any, x: Tensor) -> Any:
    state: Any = x.new_zeros(x.shape[0], net.cell.hidden_size)
    if isinstance(net.cell, nn.LSTMCell):
        state = state, torch.zeros(len(x), net.cell.hidden_size, dtype=x.dtype, device=x.device)
    outs = []
    for step in range(x.size(1)):
        state = net.cell(x[:, step], state)
        outs.append(state[0] if isinstance(state, tuple) else state)
    return net.head(torch.stack(outs, 1))


def two_cells(net: Any, x: Tensor) -> Any:
    first, second = None, None
    for step in x.unbind(1):
        first = net.cell(step, first)
        second = net.other(first, second)
    return net.head(second)


def fed_back(net: Any, x: Tensor) -> Any:
    state, seen, outs = None, x[:, 0], []
    for _ in range(4):
        state = net.cell(seen, state)
        outs.append(net.head(state))
        seen = net.back(outs[-1])
    return torch.stack(outs, 1)


@pytest.mark.parametrize("run", [steps, from_zeros])
@pytest.mark.parametrize("kind", [nn.GRUCell, nn.LSTMCell, nn.RNNCell])
def test_cells_in_a_loop(kind: Any, run: Run) -> None:
    small = exact(Net(run, cell=kind(10, 12), head=head(12)), (X,), "cell.weight_hh", "before.weight")
    assert small.cell.hidden_size == small.cell.weight_hh.shape[1] < 12
    assert small(X[:, :4].repeat(2, 1, 1)).shape[0] == 6  # fewer steps, more rows


@pytest.mark.parametrize(
    "net",
    [
        Net(two_cells, cell=nn.GRUCell(10, 12), other=nn.RNNCell(12, 9, nonlinearity="relu"), head=head(9)),
        Net(two_cells, cell=nn.RNNCell(10, 12), other=nn.GRUCell(12, 9, bias=False), head=head(9)),
        Net(fed_back, cell=nn.GRUCell(10, 12), back=nn.Linear(3, 10), head=head(12)),
        Net(fed_back, cell=nn.RNNCell(10, 12), back=nn.Linear(3, 10), head=head(12)),
    ],
    ids=lambda net: f"{net.run.__name__} {type(net.cell).__name__}",
)
def test_several_cells(net: nn.Module) -> None:
    exact(net, (X,), "cell.weight_hh", "cell.weight_ih", "before.weight")
