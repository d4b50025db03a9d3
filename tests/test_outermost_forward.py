"""Sizes written in the forward of the whole model, as in every tutorial: it is rewritten as those inside are."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import netsurgery
import oracles
from netsurgery.passes import MagnitudeScore, PruneChannels

IMAGES = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class LeNet(nn.Module):
    """Two convolutions and three linear layers; ``flat`` lays the features side by side."""

    def __init__(self, flat: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.flat = flat
        self.width = 16 * 5 * 5
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(16 * 5 * 5, 120), nn.Linear(120, 84), nn.Linear(84, 10)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(self.flat(self, x)))
        return self.fc3(self.drop(F.relu(self.fc2(x))))


FLAT: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "view": lambda m, x: x.view(-1, 16 * 5 * 5),
    "reshape": lambda m, x: torch.reshape(x, (x.size(0), 400)),
    "attribute": lambda m, x: x.view(-1, m.width),
    "twice": lambda m, x: x.view(-1, 16, 25).reshape(-1, 400),
    "channels last": lambda m, x: x.permute(0, 2, 3, 1).reshape(-1, 5 * 5 * 16),
    "of the input": lambda m, x: x.view(x.shape[0], 16 * x.shape[2] * x.shape[3]),
    "pooled": lambda m, x: F.adaptive_avg_pool2d(x, 1).view(-1, 16).repeat_interleave(25, 1),
}


def lenet(flat: str) -> nn.Module:
    torch.manual_seed(0)
    return LeNet(FLAT[flat]).double().eval()


@pytest.mark.parametrize("flat", FLAT)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_flattened_size_follows(flat: str, batch: int) -> None:
    model, images = lenet(flat), IMAGES[:batch]
    small, edit = oracles.check(model, (images,), 1e-10, share=0.5)
    assert edit.counts == {"conv1": 3, "conv2": 8, "fc1": 60, "fc2": 42}
    assert isinstance(small, LeNet) and list(small.state_dict()) == list(model.state_dict())
    other = torch.randn(5, 3, 32, 32, dtype=torch.float64)
    assert netsurgery.verify(model, small, netsurgery.Edit(netsurgery.trace(model, other), edit.keep), other) < 1e-10


class Narrow(nn.Module):
    """The width of the features alone, ``x.view(-1, 32)``, after the pool over all positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 1)
        return self.fc(x.view(-1, 32))


class Decoder(nn.Module):
    """A linear layer whose outputs become channels of 4x4 positions."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 8 * 4 * 4)
        self.up = nn.ConvTranspose2d(8, 6, 4, 2, 1)
        self.out = nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        return self.out(F.relu(self.up(F.relu(self.fc(z)).view(-1, 8, 4, 4))))


class Heads(nn.Module):
    """Attention with its heads written in the forward of the whole model."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(12, 72), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], -1, 3, 4, 6).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v, scale=0.4).transpose(1, 2).reshape(-1, 5, 24))


class Counted(nn.Module):
    """One of the sizes is worked out with the number of the others: ``c // 12`` for 3 parts of 4 heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(12, 72), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = self.qkv(x).shape
        q, k, v = self.qkv(x).view(n, t, 3, 4, c // 12).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v, scale=0.4).transpose(1, 2).reshape(n, t, -1))


class Asked(nn.Module):
    """The code makes sure of a size that it writes down."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if x.shape[1] % 4:
            raise RuntimeError("no multiple of 4")
        return self.b(x.view(-1, 4, x.shape[1] // 4).tanh().flatten(1))


class Features(nn.Module):
    """The size stands inside of a part, with the sizes of space that go with it."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.fc = Flattened(), nn.Linear(8 * 30 * 30, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.part(x))


class Flattened(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu().view(-1, 7200)


@pytest.mark.parametrize(
    ("kind", "shape", "groups"),
    [
        (Narrow, (2, 3, 8, 8), {"conv1", "conv2"}),
        (Decoder, (2, 12), {"fc", "up"}),
        (Heads, (2, 5, 12), {"qkv:2", "qkv:3"}),
        (Counted, (2, 5, 12), {"qkv:2", "qkv:3"}),
        (Asked, (2, 12), {"a", "a:2"}),
        (Features, (2, 3, 32, 32), {"part.conv"}),
    ],
)
def test_other_sizes_written_in_the_forward(kind: type[nn.Module], shape: tuple[int, ...], groups: set[str]) -> None:
    torch.manual_seed(0)
    _, edit = oracles.check(kind().double().eval(), (torch.randn(shape, dtype=torch.float64),), 1e-10, share=0.5)
    assert set(edit.keep) == groups


def test_a_rewritten_model_trains_is_copied_and_pickled() -> None:
    model = lenet("view")
    small = netsurgery.apply(model, [MagnitudeScore(), PruneChannels(0.5)], IMAGES)
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small_without_a_lambda(small)))):
        twin.flat = model.flat
        assert torch.equal(twin(IMAGES), small(IMAGES))
    small.train()
    assert not torch.equal(small(IMAGES), small(IMAGES))  # dropout
    small(IMAGES).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def small_without_a_lambda(small: nn.Module) -> nn.Module:
    small.flat = None
    return small


def test_what_is_rewritten_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "netsurgery"):
        edit = netsurgery.plan(lenet("view"), [MagnitudeScore(), PruneChannels(0.5)], IMAGES)
        netsurgery.rewrite(lenet("view"), edit)
    assert caplog.messages == ["rewrote the forward of 1 modules whose code hard-codes a size: the model"]
    assert "\nforward rewritten\n" in edit.diff()
    assert list(edit.replaced) == [""]


def test_a_second_surgery_on_a_rewritten_model() -> None:
    model = lenet("view")
    small = netsurgery.apply(model, [MagnitudeScore(), PruneChannels(0.5)], IMAGES)
    _, edit = oracles.check(small, (IMAGES,), 1e-10, share=0.5)
    assert edit.counts == {"conv1": 2, "conv2": 4, "fc1": 30, "fc2": 21}


def test_a_size_that_cannot_be_followed_is_locked_with_the_reason() -> None:
    def quiet(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            return x.view(-1, 400)

    network = netsurgery.trace(LeNet(quiet).double().eval(), IMAGES)
    reason = network["conv2"].locked or ""
    assert "aten.view at" in reason and "shape '[-1, 400]' is invalid" in reason
    line = quiet.__code__.co_firstlineno + 1
    assert reason.endswith(f"(the code of the model uses no_grad at tests/test_outermost_forward.py:{line})")
