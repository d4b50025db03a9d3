"""Numbers of modules that no forward needs and that repeat a size: they follow where their meaning is clear."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import netsurgery
from netsurgery.passes import PruneChannels, RandomScore
from oracles import RandomKeep, check

X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def perturb_constants(model: nn.Module) -> Any:
    """The model in eval mode, with statistics and affine parameters that differ from unit to unit."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                nn.init.uniform_(tensor, 0.5, 1.5)  # type: ignore[arg-type]
    return model.double().eval()


def halved(model: nn.Module, x: Any = X) -> tuple[Any, netsurgery.Edit]:
    edit = netsurgery.plan(model, [RandomScore(), PruneChannels(0.5)], x)
    return netsurgery.rewrite(model, edit), edit


# Branches that are folded -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mobileone_s1", "fastvit_t8", "repvgg_a0", "repghostnet_050"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_branches_of_timm_are_folded_after_surgery(name: str, scope: Any) -> None:
    timm = pytest.importorskip("timm")
    from timm.utils.model import reparameterize_model

    model = perturb_constants(timm.create_model(name))
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    edit = netsurgery.plan(model, [RandomScore(), PruneChannels(0.5, scope=scope)], x)
    small = netsurgery.rewrite(model, edit)
    expected = small(x)
    folded = reparameterize_model(small)
    assert len(list(folded.modules())) < len(list(small.modules()))
    torch.testing.assert_close(folded(x), expected, rtol=1e-8, atol=1e-8)


class RepVGG(nn.Module):
    """Three branches that ``folded`` makes one convolution of; it reads the names of sizes, the forward does not."""

    def __init__(self, ch: int, groups: int = 1, name: str = "ch"):
        super().__init__()
        self.name = name
        setattr(self, name, ch)
        self.groups = groups
        self.wide = nn.Conv2d(ch, ch, 3, padding=1, groups=groups, bias=False)
        self.narrow = nn.Conv2d(ch, ch, 1, groups=groups, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(ch) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.norms[0](self.wide(x)) + self.norms[1](self.narrow(x)) + self.norms[2](x)

    def folded(self) -> nn.Conv2d:
        ch = getattr(self, self.name)
        conv = nn.Conv2d(ch, ch, 3, padding=1, groups=self.groups).double()
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        within = ch // self.groups
        one = torch.zeros(ch, within, 3, 3, dtype=torch.float64)
        for i in range(ch):
            one[i, i % within, 1, 1] = 1
        narrow = nn.functional.pad(self.narrow.weight, [1, 1, 1, 1])
        with torch.no_grad():
            for kernel, norm in zip((self.wide.weight, narrow, one), self.norms, strict=True):
                scale = norm.weight / (norm.running_var + norm.eps).sqrt()
                conv.weight += kernel * scale[:, None, None, None]
                conv.bias += norm.bias - norm.running_mean * scale  # type: ignore[operator]
        return conv


@pytest.mark.parametrize("name", ["ch", "dim", "in_chs", "planes", "width", "n"])
@pytest.mark.parametrize("groups", [1, 16, 4])
def test_a_fold_of_branches_reads_its_own_numbers(name: str, groups: int) -> None:
    body = nn.Sequential(nn.Conv2d(3, 16, 3), RepVGG(16, groups, name), nn.Conv2d(16, 2, 3))
    small, _ = halved(perturb_constants(body))
    left = groups if groups < 16 else 8
    assert (getattr(small[1], name), small[1].groups) == (8, left)
    expected = small(X)
    small[1] = small[1].folded()
    torch.testing.assert_close(small(X), expected, rtol=1e-10, atol=1e-10)


def test_random_removals_stay_exact() -> None:
    body = nn.Sequential(nn.Conv2d(3, 16, 3), RepVGG(16), nn.Conv2d(16, 12, 3), RepVGG(12, 12), nn.Conv2d(12, 2, 1))
    for seed in range(3):
        small, _ = check(perturb_constants(body), (X,), 1e-10, seed, None)
        for place in (1, 3):
            assert small[place].ch == small[place].wide.out_channels  # type: ignore[index, union-attr]


def test_a_new_head_of_a_smaller_network() -> None:
    timm = pytest.importorskip("timm")
    small, _ = halved(timm.create_model("resnet18").double().eval(), torch.zeros(1, 3, 64, 64, dtype=torch.float64))
    small.reset_classifier(7)
    assert small.num_features == 256 and small.double()(X).shape == (2, 7)


# Wrappers -----------------------------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """Layers in a row, and numbers beside them."""

    def __init__(self, *layers: nn.Module, **numbers: Any):
        super().__init__()
        self.layers = nn.Sequential(*layers)
        for name, number in numbers.items():
            setattr(self, name, number)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def depthwise(**numbers: Any) -> nn.Module:
    middle = Wrapper(nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(), **numbers)
    return perturb_constants(nn.Sequential(nn.Conv2d(3, 16, 3), middle, nn.Conv2d(16, 2, 1)))


@pytest.mark.parametrize(
    "numbers",
    [
        {"in_channels": 16, "groups": 16},
        {"in_chs": 16, "out_chs": 16, "groups": 16},
        {"dim": 16, "num_groups": 16},
        {"inplanes": 16, "planes": 16},
        {"c_out": 16, "input_size": (1, 16)},
        {"sizes": [16, 16]},
        {"shape": (16, 3)},
        {"config": {"width": 16, "groups": 16}},
        {"cfg": SimpleNamespace(channels=16)},
    ],
)
def test_numbers_of_a_depthwise_wrapper(numbers: dict[str, Any]) -> None:
    small, edit = halved(depthwise(**numbers))
    after = {
        "shape": (8, 3),
        "input_size": (1, 8),
        "sizes": [8, 8],
        "config": {"width": 8, "groups": 8},
        "cfg": SimpleNamespace(channels=8),
    }
    for name in numbers:
        assert getattr(small[1], name) == after.get(name, 8)
    assert "stay" not in edit.summary()


class OfFrames(nn.Module):
    """A depthwise convolution of each frame, whose features come after something else."""

    def __init__(self) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.groups = 16, 16, 16
        self.conv = nn.Conv2d(16, 16, 3, padding=1, groups=16)

    def forward(self, scale: Tensor, x: Tensor) -> Tensor:
        n, t = x.shape[:2]
        return self.conv(x.flatten(0, 1)).unflatten(0, (n, t)) * scale


class Frames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.inner, self.b = nn.Conv2d(3, 16, 1), OfFrames(), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        frames = torch.stack([self.a(x), self.a(2 * x), self.a(3 * x)], 1)
        return self.b(self.inner(x.mean(), frames).mean(1))


def test_channels_are_found_in_any_dimension_of_any_input() -> None:
    small, _ = halved(perturb_constants(Frames()))
    inner = small.inner
    assert (inner.in_channels, inner.out_channels, inner.groups, inner.conv.in_channels) == (8, 8, 8, 8)


class OneByOne(nn.Module):
    """A convolution that is called with single images."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.a, self.middle, self.b = nn.Conv2d(3, 16, 1), middle, nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.b(self.middle(self.a(image))) for image in x])


@pytest.mark.parametrize("groups", [1, 4, 16])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_convolutions_of_single_images_hold_their_channels(kind: Any, groups: int) -> None:
    small, _ = halved(perturb_constants(OneByOne(kind(16, 16, 3, groups=groups))))
    middle = small.middle
    assert (middle.in_channels, middle.out_channels, middle.groups) == (8, 8, min(groups, 8))


class Widths(NamedTuple):
    given: int
    width: int


def test_numbers_of_other_kinds_follow() -> None:
    numbers = {"widths": Widths(3, 16), "shape": torch.Size([3, 16]), "dim": np.int64(16), "flag": True, "ch": 16}
    small, _ = halved(depthwise(**numbers))
    after = {"widths": Widths(3, 8), "shape": torch.Size([3, 8]), "dim": 8, "flag": True, "ch": 8}
    for name, value in after.items():
        found = getattr(small[1], name)
        assert found == value and type(found) is type(numbers[name])


def test_numbers_in_a_list_follow_together() -> None:
    def body(**numbers: Any) -> nn.Module:
        layers = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3), nn.Conv2d(32, 32, 1), nn.Conv2d(32, 4, 1)
        return perturb_constants(Wrapper(*layers, **numbers))

    small, _ = halved(body(sizes=[16, 32], chs=(3, 16), planes=[[16], [4, 32]]))
    assert (small.sizes, small.chs, small.planes) == ([8, 16], (3, 8), [[8], [4, 16]])
    small, edit = cut(body(sizes=[16, 32], width=16), {"layers.0": 8, "layers.1": 16})
    assert (small.sizes, small.width) == ([16, 32], 8)  # 32 has two meanings, so the list stays as it is
    assert "sizes[1]=32 (dimensions of this size become 16 and 32)" in edit.summary()


@pytest.mark.parametrize("name", ["interval", "k", "topk", "every", "rank", "world_size", "port", "timesteps", "order"])
def test_a_number_whose_name_says_no_width_stays_and_is_named(name: str) -> None:
    small, edit = halved(depthwise(**{name: 16, "ch": 16}))
    assert (getattr(small[1], name), small[1].ch) == (16, 8)
    assert name in ("rank", "world_size") or f"{name}=16" in edit.summary()


def cut(model: nn.Module, left: dict[str, int]) -> tuple[Any, netsurgery.Edit]:
    edit = netsurgery.plan(model, [FirstUnits(left)], X)
    return netsurgery.rewrite(model, edit), edit


@dataclasses.dataclass(frozen=True)
class FirstUnits(netsurgery.Pass):
    """Keep the first units of some groups."""

    left: dict[str, int]
    gives = frozenset({"edit"})

    def run(self, network: netsurgery.Network) -> netsurgery.Edit:
        return netsurgery.Edit(network, {name: tuple(range(count)) for name, count in self.left.items()})


@dataclasses.dataclass(frozen=True)
class Inner:
    hidden: int
    kernel: int


@dataclasses.dataclass
class Config:
    width: int
    inner: Inner
    classes: int = 16
    name: str = "16"


def test_a_config_that_modules_share() -> None:
    config = Config(16, Inner(24, 16))
    first, last = (Wrapper(nn.Conv2d(i, o, 1), nn.ReLU(), cfg=config) for i, o in ((3, 16), (24, 2)))
    middle = nn.Conv2d(16, 24, 1)
    model = perturb_constants(Wrapper(first, middle, last, cfg=config))
    small, _ = halved(model)
    assert small.cfg == Config(8, Inner(12, 16))  # words such as kernel and classes mean something else
    assert small.cfg is small.layers[0].cfg and small.cfg is small.layers[2].cfg
    assert config == Config(16, Inner(24, 16)) and model.cfg is config
    netsurgery.rewrite(model, netsurgery.plan(model, [RandomScore(), PruneChannels(0.5)], X), inplace=True)
    assert model.cfg == small.cfg and config.width == 16  # the object may be others', too


# What is not clear --------------------------------------------------------------------------------------------------


def test_two_numbers_of_one_value_are_not_half_updated() -> None:
    """The middle layer has 16 channels in and 16 out, and only those in between shrink."""
    model = perturb_constants(
        Wrapper(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 2, 1), left=16, right=16)
    )
    small, edit = cut(model, {"layers.1": 8})
    assert (small.left, small.right) == (16, 16)
    line = edit.summary().splitlines()[-1]
    assert line == (
        "  numbers that stay, though sizes like them change: left=16 (dimensions of this size become 8 and 16); "
        "right=16 (dimensions of this size become 8 and 16)"
    )


def test_names_tell_two_numbers_of_one_value_apart() -> None:
    inner = Wrapper(nn.Conv2d(16, 16, 1), in_chs=16, out_chs=16, in_channels=16, out_channels=16, ch=16)
    model = perturb_constants(Wrapper(nn.Conv2d(3, 16, 1), inner, nn.Conv2d(16, 2, 1)))
    small, edit = cut(model, {"layers.1.layers.0": 8})
    found = small.layers[1]
    assert (found.in_chs, found.out_chs, found.in_channels, found.out_channels, found.ch) == (16, 8, 16, 8, 16)
    assert "layers.1.ch=16 (dimensions of this size become 8 and 16)" in edit.summary()


def test_the_names_that_stay_are_counted() -> None:
    numbers = {f"number{letter}": 16 for letter in "abcde"}
    model = perturb_constants(Wrapper(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 2, 1), **numbers))
    _, edit = cut(model, {"layers.1": 8})
    assert edit.summary().endswith("; and 2 more")


@pytest.mark.parametrize("name", ["kernel_size", "num_layers", "maxLen", "num_heads", "steps", "num_classes", "depth"])
def test_words_of_other_meanings(name: str) -> None:
    small, edit = halved(depthwise(**{name: 16, "flag": True}))
    assert getattr(small[1], name) == 16 and "stay" not in edit.summary()


class Scaled(Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.dim**-0.5


class Counted(Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.dim):
            x = x + 0.1
        return super().forward(x)


class Helped(Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        return scaled(self, super().forward(x))


def scaled(module: Any, x: Tensor) -> Tensor:
    return x / getattr(module, "d" + "im")


class Asked(Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self.dim
        return super().forward(x)


@pytest.mark.parametrize("kind", [Scaled, Counted, Helped])
def test_what_the_forward_computes_with_stays(kind: Any) -> None:
    inner = kind(nn.Conv2d(16, 16, 3, groups=16), dim=16, ch=16)
    model = perturb_constants(nn.Sequential(nn.Conv2d(3, 16, 3), inner, nn.Conv2d(16, 2, 1)))
    small, edit = check(model, (X,), 1e-10, 0, 0.5)
    assert not edit.replaced
    assert small[1].dim == 16  # type: ignore[index, union-attr]
    assert "1.dim=16 (the code computes with it)" in edit.summary()
    if kind is not Helped:  # there the code does not say which of the two it reads
        assert small[1].ch == 8  # type: ignore[index, union-attr]


def test_the_size_of_images_is_no_width() -> None:
    info = {"input_size": (3, 8, 8), "pool_size": (8, 8), "num_chs": 8}
    model = perturb_constants(Wrapper(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), info=info))
    small, _ = halved(model)
    assert small.info == {**info, "num_chs": 4}


def test_what_the_forward_asks_for_follows() -> None:
    inner = Asked(nn.Conv2d(16, 16, 3, groups=16), dim=16, ch=16)
    model = perturb_constants(nn.Sequential(nn.Conv2d(3, 16, 3), inner, nn.Conv2d(16, 2, 1)))
    small, _ = check(model, (X,), 1e-10, 0, 0.5)
    assert (small[1].dim, small[1].ch) == (8, 8)  # type: ignore[index, union-attr]


def test_a_config_that_the_forward_computes_with_stays() -> None:
    class Net(Wrapper):
        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x) * self.cfg.width

    model = perturb_constants(Net(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 2, 1), cfg=Config(16, Inner(24, 16))))
    small, edit = check(model, (X,), 1e-10, 0, 0.5)
    assert small.cfg == model.cfg and "cfg (the code computes with it)" in edit.summary()


def test_averages_follow_with_their_own_numbers() -> None:
    model, average = depthwise(ch=16), depthwise(ch=16)
    netsurgery.rewrite(model, netsurgery.plan(model, [RandomKeep(0, 0.5)], X), ema=average)
    assert average[1].ch == 8 and average(X).shape == model(X).shape  # type: ignore[index, union-attr]
