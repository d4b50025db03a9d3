"""What ``trace`` leaves open can be cut: one group alone, with what is tied to it, at any count, and exactly."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

import netsurgery
import random_networks
import zoo
from test_hard_coded import CASES, Attention, Net
from test_hard_coded import X as ROWS

SEQUENCE = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
IMAGE = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def alone(network: netsurgery.Network) -> list[tuple[str, ...]]:
    """The open groups, each with those that are tied to it."""
    tied = {name: names for names in network.equal_sizes for name in names}
    return list(dict.fromkeys(tied.get(group.name, (group.name,)) for group in network.prunable))


def edits(network: netsurgery.Network, seed: int, most: int) -> list[netsurgery.Edit]:
    """Edits of one group each: to one unit, to all but one, and to random counts between."""
    chosen, found = random.Random(seed), []
    groups = alone(network)
    for names in chosen.sample(groups, min(most, len(groups))):
        size = network[names[0]].size
        for count in {1, size - 1, chosen.randrange(1, size), chosen.randrange(1, size)}:
            keep = {name: tuple(sorted(chosen.sample(range(network[name].size), count))) for name in names}
            found.append(netsurgery.Edit(network, keep))
    return found


def assert_open_is_open(model: nn.Module, *inputs: Any, seed: int = 0, most: int = 20, tolerance: float = 1e-10) -> Any:
    """Each open group can be cut alone, at any count, and the network that was traced, for more to be said of it."""
    model = model.double().eval()
    network = netsurgery.trace(model, inputs)
    for edit in edits(network, seed, most):
        small = netsurgery.rewrite(model, edit)
        assert netsurgery.verify(model, small, edit, inputs) < tolerance, edit.counts
    return network


class Code(nn.Module):
    """Layers, and a forward that a test gives."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **layers: Any):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def lin(*sizes: int) -> dict[str, nn.Module]:
    return {
        name: nn.Linear(*pair) for name, pair in zip("abcdef", zip(sizes[::2], sizes[1::2], strict=True), strict=False)
    }


def channel_attention(net: Any, x: Tensor) -> Tensor:
    x = net.stem(x)
    q, k, v = net.q(x), net.k(x), net.v(x)
    weights = (q.flatten(2) @ k.flatten(2).transpose(1, 2)).softmax(-1)
    return net.out((weights @ v.flatten(2)).view_as(v))


def channel_parts() -> dict[str, nn.Module]:
    names = {"stem": (3, 8, 3, 1, 1), "q": (8, 8, 1), "k": (8, 8, 1), "v": (8, 8, 1), "out": (8, 4, 1)}
    return {name: nn.Conv2d(*sizes) for name, sizes in names.items()}


def literal_heads(net: Any, x: Tensor) -> Tensor:
    x = net.stem(x)
    b, n, c = x.shape
    q, k, v = net.qkv(x).view(b, n, 3, 4, c // net.h).permute(2, 0, 3, 1, 4)
    return net.out(x + net.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)))


def head_parts() -> dict[str, Any]:
    parts = {"stem": (6, 24), "qkv": (24, 72), "proj": (24, 24), "out": (24, 3)}
    return {"h": 4, **{name: nn.Linear(*sizes) for name, sizes in parts.items()}}


def cell_of_one_step(net: Any, x: Tensor) -> Tensor:
    return net.b(net.cell(net.a(x[:, 0])))


def of_the_same_shape(net: Any, x: Tensor) -> Tensor:
    a, b = net.a(x), net.b(x)
    assert a.shape == b.shape
    return net.c(torch.cat([a, b], -1))


def outer_product(net: Any, x: Tensor) -> Tensor:
    a, b = net.a(x), net.b(x)
    return net.c((a.unsqueeze(-1) * b.unsqueeze(-2)).view(*a.shape[:-1], a.shape[-1] ** 2))


def reshaped_as(net: Any, x: Tensor) -> Tensor:
    a, b = net.a(x), net.b(x)
    return net.c((b.transpose(1, 2) @ a).transpose(1, 2).reshape(a.shape[0], b.shape[-1], -1).sum(1))


def expanded_as(net: Any, x: Tensor) -> Tensor:
    a, b = net.a(x), net.b(x)
    return net.c(a + b.mean(1, keepdim=True).expand_as(b) * b.new_ones(a.shape).relu())


def zeros_of_another(net: Any, x: Tensor) -> Tensor:
    a, b = net.a(x), net.b(x)
    return net.c(torch.cat([a, b, a.new_zeros(b.shape)], -1))


def uneven_chunks(net: Any, x: Tensor) -> Tensor:
    a = net.a(x)
    p, q, r = torch.cat([a, net.d(a) + a, net.b(x)], -1).chunk(3, dim=-1)
    return net.c(torch.cat([p.relu(), (p + q).tanh(), r], -1))


def squeezed(net: Any, x: Tensor) -> Tensor:
    x = net.conv(x)
    b, c, _, _ = x.shape
    y = net.b(net.a(x.mean((2, 3)).view(b, c)).relu()).sigmoid().view(b, c, 1, 1)
    return net.last(x * y.expand_as(x))


def functional(net: Any, x: Tensor) -> Tensor:
    x = net.a(x)
    q, k, v = net.b(x).view(2, 5, 3, 4, 6).permute(2, 0, 3, 1, 4)
    y = ((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).reshape(2, 5, 24)
    return net.c(F.linear(y, net.weight) + y @ net.weight)


def squeeze_parts() -> dict[str, nn.Module]:
    return {"conv": nn.Conv2d(3, 16, 3), **lin(16, 4, 4, 16), "last": nn.Conv2d(16, 4, 1)}


CODES: dict[str, tuple[Code, Tensor]] = {
    "channel attention": (Code(channel_attention, **channel_parts()), IMAGE),
    "literal heads": (Code(literal_heads, **head_parts()), SEQUENCE),
    "an rnn cell": (Code(cell_of_one_step, cell=nn.RNNCell(10, 12), **lin(6, 10, 12, 3)), SEQUENCE),
    "a gru cell": (Code(cell_of_one_step, cell=nn.GRUCell(10, 12), **lin(6, 10, 12, 3)), SEQUENCE),
    "of the same shape": (Code(of_the_same_shape, **lin(6, 8, 6, 8, 16, 3)), SEQUENCE),
    "an outer product": (Code(outer_product, **lin(6, 8, 6, 8, 64, 3)), SEQUENCE),
    "reshaped": (Code(reshaped_as, **lin(6, 8, 6, 8, 8, 3)), SEQUENCE),
    "expanded": (Code(expanded_as, **lin(6, 8, 6, 8, 8, 3)), SEQUENCE),
    "zeros": (Code(zeros_of_another, **lin(6, 8, 6, 8, 24, 3)), SEQUENCE),
    "uneven chunks": (Code(uneven_chunks, **lin(6, 30, 6, 28, 88, 3, 30, 30)), SEQUENCE),
    "squeeze and excite": (Code(squeezed, **squeeze_parts()), IMAGE),
    "functional": (Code(functional, weight=nn.Parameter(torch.rand(24, 24)), **lin(6, 24, 24, 72, 24, 3)), SEQUENCE),
}


@pytest.mark.parametrize("name", CODES)
def test_in_the_outermost_code(name: str) -> None:
    assert_open_is_open(*CODES[name])


@pytest.mark.parametrize("name", CODES)
def test_in_the_code_of_a_part(name: str) -> None:
    code, x = CODES[name]
    network = assert_open_is_open(nn.Sequential(code), x)
    assert alone(network)  # and not by locking everything


def test_what_is_tied() -> None:
    """A size that the outermost code takes from another group: both have it, or neither changes."""
    equal_sizes = {name: assert_open_is_open(*CODES[name]).equal_sizes for name in CODES}
    assert equal_sizes["channel attention"] == (("q", "k"),)
    assert equal_sizes["an rnn cell"] == (("cell", "cell:in"),)
    assert equal_sizes["of the same shape"] == equal_sizes["an outer product"] == (("a", "b"),)
    assert equal_sizes["a gru cell"] == equal_sizes["squeeze and excite"] == ()


def test_ties_are_found_in_each_layer() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(16, 6)

        def forward(self, x: Tensor) -> Tensor:
            self.seen = x.shape  # it cannot be rewritten
            return x + of_the_same_shape(self, x)

    network = assert_open_is_open(nn.Sequential(nn.Linear(6, 6), *(Layer() for _ in range(4))), SEQUENCE)
    assert network.equal_sizes == tuple((f"{i}.a", f"{i}.b") for i in range(1, 5))
    half = [netsurgery.passes.RandomScore(), netsurgery.passes.PruneChannels(0.5)]
    assert netsurgery.plan(nn.Sequential(Layer()), half, (SEQUENCE.float(),)).counts == {"0.a": 4, "0.b": 4}


def test_tied_groups_keep_equally_many_units() -> None:
    network = netsurgery.trace(Code(of_the_same_shape, **lin(6, 8, 6, 8, 16, 3)), (SEQUENCE.float(),))
    with pytest.raises(netsurgery.errors.InputError, match="must keep equally many units"):
        netsurgery.Edit(network, {"a": (0, 1)})
    locked = network.with_locked({"b": "because"})
    assert locked["a"].locked == "because"


def test_what_no_partner_helps_is_locked() -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():  # so that it is not rewritten
            return net.c(net.a(x).view(2, 5, net.b.out_features // 2)) + net.b(x).sum()

    code = Code(run, **lin(6, 8, 6, 16, 8, 3))
    network = assert_open_is_open(code, SEQUENCE)
    assert "is fixed by the code" in network["a"].locked or "fails at other sizes" in network["a"].locked


@pytest.mark.parametrize("run", CASES, ids=lambda run: run.__name__)
def test_attention_that_hard_codes_sizes(run: Any) -> None:
    torch.manual_seed(0)
    network = assert_open_is_open(Net(Attention(run)), ROWS)
    assert len(alone(network)) >= 2


RECURRENT = [nn.LSTM(10, 12, 2, bidirectional=True, batch_first=True), nn.GRU(10, 12, 2), nn.LSTM(10, 12, proj_size=5)]


@pytest.mark.parametrize("rnn", RECURRENT, ids=str)
def test_recurrent_layers(rnn: nn.Module) -> None:
    width = (rnn.proj_size or rnn.hidden_size) * (2 if rnn.bidirectional else 1)
    assert_open_is_open(Code(lambda net, x: net.b(net.rnn(net.a(x))[0]), rnn=rnn, **lin(6, 10, width, 3)), SEQUENCE)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(24, 4, 32, batch_first=True)
    inside = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(6, 24), inside, nn.Linear(24, 3))


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 16, num_layers=2, num_heads=4, hidden_dim=24, mlp_dim=32)


@pytest.mark.parametrize("build", [encoder, vit])
def test_transformers(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    x = SEQUENCE if build is encoder else torch.randn(1, 3, 32, 32, dtype=torch.float64)
    assert_open_is_open(build(), x, most=8)


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "mobilenet_v3_small", "resnet18"])
def test_convolutional_networks(name: str) -> None:
    assert_open_is_open(zoo.build(name), zoo.images(name, 1).double(), most=5, tolerance=1e-6)


@settings(max_examples=25, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(random_networks.programs())
def test_random_networks(program: random_networks.Program) -> None:
    torch.manual_seed(0)
    example = tuple(t.double() if t.is_floating_point() else t for t in random_networks.example(program))
    assert_open_is_open(random_networks.build(program), *example, most=6, tolerance=1e-8)
