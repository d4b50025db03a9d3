"""Silencing written by hand: forward hooks in plain torch zero what removed units feed into each consumer.

These networks share nothing with netsurgery.verification.oracles; they check it as much as the rewriting.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import netsurgery

SIDE = 4


class Net(nn.Module):
    """Named layers and a forward written as a function of them."""

    def __init__(self, run: Callable[["Net", Tensor], Tensor], **layers: nn.Module):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


@dataclass(frozen=True)
class Case:
    """A network, the units that go from each group, and the positions these feed in the input of each consumer.

    ``silent`` names, for each consuming module, positions along dimension 1 of its input (the last dimension of a
    linear layer's input); ``statistics`` names layer norms whose statistics leave those positions out.
    """

    make: Callable[[], Net]
    remove: dict[str, tuple[int, ...]]
    silent: dict[str, list[int]]
    statistics: dict[str, list[int]] = field(default_factory=dict)
    shape: tuple[int, ...] = (2, 3, SIDE, SIDE)


def conv(a: int, b: int, k: int = 1, **options: int) -> nn.Conv2d:
    return nn.Conv2d(a, b, k, padding=k // 2, **options)


def shuffled(x: Tensor, groups: int) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


def swap_halves(n: Net, x: Tensor) -> Tensor:
    first, second = n.a(x).chunk(2, 1)
    return n.b(torch.cat([second, first], 1))


def each_half(n: Net, x: Tensor) -> Tensor:
    first, second = n.a(x).chunk(2, 1)
    late = n.late(second)
    return n.early(first) - 2 * late


def squeeze_excite(n: Net, x: Tensor) -> Tensor:
    x = n.a(x)
    gate = n.grow(n.shrink(x.mean((2, 3))).relu()).sigmoid()
    return n.b(x * gate[:, :, None, None])


def token_norm(n: Net, x: Tensor) -> Tensor:
    return n.b(n.norm(n.a(x).flatten(2).transpose(1, 2)))


CASES = {
    "chain": Case(
        lambda: Net(lambda n, x: n.b(n.bn(n.a(x)).relu()), a=conv(3, 8, 3), bn=nn.BatchNorm2d(8), b=conv(8, 4)),
        {"a": (1, 5, 7)},
        {"b": [1, 5, 7]},
    ),
    "residual": Case(
        lambda: Net(
            lambda n, x: n.head((y := n.stem(x)) + n.second(n.first(y).relu())),
            stem=conv(3, 6), first=conv(6, 5, 3), second=conv(5, 6), head=conv(6, 4),
        ),
        {"stem": (0, 4), "first": (2,)},
        {"first": [0, 4], "second": [2], "head": [0, 4]},
    ),
    "input joined": Case(
        lambda: Net(lambda n, x: n.b(torch.cat([x, n.a(x)], 1)), a=conv(3, 6), b=conv(9, 4)),
        {"a": (0, 2)},
        {"b": [3, 5]},
    ),
    "joined with itself": Case(
        lambda: Net(lambda n, x: n.b(torch.cat([y := n.a(x), x, y], 1)), a=conv(3, 4), b=conv(11, 4)),
        {"a": (1,)},
        {"b": [1, 8]},
    ),
    "halves swapped": Case(
        lambda: Net(swap_halves, a=conv(3, 8), b=conv(8, 4)),
        {"a": (1, 2), "a:2": (0, 3)},
        {"b": [5, 6, 0, 3]},
    ),
    "halves consumed in turn": Case(
        lambda: Net(each_half, a=conv(3, 8), early=conv(4, 5), late=conv(4, 5)),
        {"a": (0, 3), "a:2": (1, 2)},
        {"early": [0, 3], "late": [1, 2]},
    ),
    "shuffled": Case(  # channel (g, i) of (2, 4) goes to position (i, g)
        lambda: Net(lambda n, x: n.b(shuffled(n.a(x), 2)), a=conv(3, 8), b=conv(8, 4)),
        {"a:2": (1, 2)},
        {"b": [2, 3, 4, 5]},
    ),
    "flattened": Case(
        lambda: Net(lambda n, x: n.b(n.a(x).flatten(1)), a=conv(3, 5), b=nn.Linear(5 * SIDE**2, 4)),
        {"a": (0, 3)},
        {"b": [c * SIDE**2 + s for c in (0, 3) for s in range(SIDE**2)]},
    ),
    "flattened, channels last": Case(
        lambda: Net(lambda n, x: n.b(n.a(x).permute(0, 2, 3, 1).flatten(1)), a=conv(3, 5), b=nn.Linear(5 * SIDE**2, 4)),
        {"a": (0, 3)},
        {"b": [s * 5 + c for c in (0, 3) for s in range(SIDE**2)]},
    ),
    "depthwise": Case(  # input channel c makes the output channels 2c and 2c + 1
        lambda: Net(lambda n, x: n.b(n.deep(n.a(x))), a=conv(3, 4), deep=conv(4, 8, 3, groups=4), b=conv(8, 4)),
        {"a": (1, 3)},
        {"b": [2, 3, 6, 7]},
    ),
    "grouped": Case(  # of 2 groups with 4 inputs and 3 outputs each: input 1 and output 2 of either group
        lambda: Net(lambda n, x: n.b(n.mid(n.a(x))), a=conv(3, 8), mid=conv(8, 6, 3, groups=2), b=conv(6, 4)),
        {"a:2": (1,), "mid": (2,)},
        {"mid": [1, 5], "b": [2, 5]},
    ),
    "a whole group": Case(
        lambda: Net(lambda n, x: n.b(n.mid(n.a(x))), a=conv(3, 8), mid=conv(8, 6, 3, groups=2), b=conv(6, 4)),
        {"a": (0,)},
        {"mid": [0, 1, 2, 3], "b": [0, 1, 2]},
    ),
    "transposed": Case(
        lambda: Net(
            lambda n, x: n.b(n.up(n.a(x))), a=conv(3, 6), up=nn.ConvTranspose2d(6, 5, 2, 2), b=conv(5, 4)
        ),
        {"a": (0, 5), "up": (1,)},
        {"up": [0, 5], "b": [1]},
    ),
    "transposed, grouped": Case(
        lambda: Net(
            lambda n, x: n.b(n.up(n.a(x))), a=conv(3, 6), up=nn.ConvTranspose2d(6, 8, 2, 2, groups=2), b=conv(8, 4)
        ),
        {"a:2": (0,), "up": (3,)},
        {"up": [0, 3], "b": [3, 7]},
    ),
    "shared": Case(
        lambda: Net(lambda n, x: n.b(n.twice(n.twice(n.a(x)).relu())), a=conv(3, 6), twice=conv(6, 6, 3), b=conv(6, 4)),
        {"a": (2, 3)},
        {"twice": [2, 3], "b": [2, 3]},
    ),
    "squeeze and excite": Case(
        lambda: Net(squeeze_excite, a=conv(3, 8), shrink=nn.Linear(8, 4), grow=nn.Linear(4, 8), b=conv(8, 4)),
        {"a": (0, 6), "shrink": (1,)},
        {"shrink": [0, 6], "grow": [1], "b": [0, 6]},
    ),
    "layer norm": Case(
        lambda: Net(token_norm, a=conv(3, 6), norm=nn.LayerNorm(6), b=nn.Linear(6, 4)),
        {"a": (1, 2)},
        {"b": [1, 2]},
        {"norm": [1, 2]},
    ),
    "pixel shuffle": Case(  # channel (c, p, q) of (3, 2, 2)
        lambda: Net(lambda n, x: n.b(F.pixel_shuffle(n.a(x), 2)), a=conv(3, 12), b=conv(3, 4)),
        {"a": (1,)},
        {"b": [1]},
    ),
}  # fmt: skip


def build(case: Case) -> tuple[Net, tuple[Tensor]]:
    torch.manual_seed(0)
    model = case.make().double().eval()
    for name, tensor in model.state_dict().items():
        if "running" in name or "norm" in name or "bn" in name:
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
    return model, (torch.randn(case.shape, dtype=torch.float64),)


def silence(model: Net, case: Case) -> None:
    """Make every consumer blind to the removed units."""
    for path, positions in case.silent.items():
        layer = model.get_submodule(path)
        dim = -1 if isinstance(layer, nn.Linear) else 1

        def blind(layer: nn.Module, arguments: tuple[Tensor], positions=positions, dim=dim) -> Tensor:
            return arguments[0].index_fill(dim, torch.tensor(positions), 0)

        layer.register_forward_pre_hook(blind)
    for path, positions in case.statistics.items():
        layer = model.get_submodule(path)

        def over_the_rest(layer: nn.LayerNorm, arguments: tuple[Tensor], out: Tensor, positions=positions) -> Tensor:
            rest = [i for i in range(out.shape[-1]) if i not in positions]
            x = arguments[0][..., rest]
            out[..., rest] = F.layer_norm(x, (len(rest),), layer.weight[rest], layer.bias[rest], layer.eps)
            return out

        layer.register_forward_hook(over_the_rest)


@pytest.mark.parametrize("name", CASES)
def test_removal_equals_silencing_by_hand(name):
    case = CASES[name]
    model, inputs = build(case)
    network = netsurgery.trace(model, inputs)
    keep = {
        group: tuple(unit for unit in range(network[group].size) if unit not in gone)
        for group, gone in case.remove.items()
    }
    edit = netsurgery.Edit(network, keep)
    small = netsurgery.rewrite(model, edit)
    with torch.no_grad():
        original = model(*inputs)
        silence(model, case)
        wanted = model(*inputs)
        found = small(*inputs)
    assert (found - wanted).abs().max() < 1e-12 * wanted.abs().max()
    assert (original - wanted).abs().max() > 1e-3 * wanted.abs().max()  # what went did matter
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
