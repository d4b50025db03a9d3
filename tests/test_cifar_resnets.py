"""The classic residual networks for CIFAR: their size, their shortcuts, and what is coupled in them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import netsurgery
from netsurgery.errors import InputError
from netsurgery.models import CifarResNet, Padded, resnet20, resnet32, resnet56, resnet110
from oracles import check
from zoo import randomise

MACS = {resnet20: 40.55, resnet32: 68.86, resnet56: 125.49, resnet110: 252.89}  # millions, of the convolutions
PARAMETERS = {resnet20: 0.27, resnet32: 0.46, resnet56: 0.85, resnet110: 1.73}  # millions; 1.7 in the paper


@pytest.mark.parametrize("build", MACS)
def test_the_sizes_that_are_published(build: Callable[..., CifarResNet]) -> None:
    cost = netsurgery.cost(build().to("meta"), (torch.empty(1, 3, 32, 32, device="meta"),))
    convolutions = sum(macs for path, (_, macs) in cost.modules.items() if path != "head")
    assert round(convolutions / 1e6, 2) == MACS[build]
    assert round(cost.params / 1e6, 2) == PARAMETERS[build]
    projected = netsurgery.cost(build(shortcut="B").to("meta"), (torch.empty(1, 3, 32, 32, device="meta"),))
    assert projected.macs - cost.macs == 2 * 16 * 32 * 16**2  # two projections, of 16x32 and 32x64, on 16^2 and 8^2


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_any_removal_is_exact(shortcut: str) -> None:
    torch.manual_seed(0)
    model = CifarResNet(14, widths=(4, 6, 10), shortcut=shortcut).double().eval()  # type: ignore[arg-type]
    inputs = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    randomise(model, inputs)
    for seed in range(3):
        small, edit = check(model, (inputs[:2],), 1e-10, seed)
    parts = [module for module in small.modules() if isinstance(module, Padded)]
    assert len(parts) == (2 if shortcut == "A" else 0)
    assert not edit.replaced


def test_the_stream_is_one_group_where_it_is_padded() -> None:
    network = netsurgery.trace(CifarResNet(14, widths=(4, 6, 10)), (torch.zeros(1, 3, 32, 32),))
    sizes = {name: network[name].size for name in ("stem.0", "stages.1.0.conv2", "stages.2.0.conv2")}
    assert sizes == {"stem.0": 4, "stages.1.0.conv2": 2, "stages.2.0.conv2": 4}
    assert [group.name for group in network.groups if group.locked] == ["stem.0:in", "head"]
    members = {member.parameter for member in network["stem.0"].members}
    assert {f"stages.{i}.{j}.conv2.weight" for i in range(3) for j in range(2)} < members


def test_the_shortcut_of_zeros() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4)
    out: Tensor = Padded(2, 2)(x)
    assert out.shape == (1, 3, 2, 2)
    assert out[0, 0].tolist() == [[0.0, 2.0], [8.0, 10.0]] and not out[0, 1:].any()
    assert Padded(0, 1)(x).equal(x)


def test_weights_are_drawn_by_fan_out() -> None:
    torch.manual_seed(0)
    for module in resnet20().modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 2000:
            assert module.weight.std().item() == pytest.approx((2 / (9 * module.out_channels)) ** 0.5, rel=0.05)


def test_errors() -> None:
    with pytest.raises(InputError, match=r"CifarResNet\(18\): depth is 6n \+ 2, such as 20"):
        CifarResNet(18)
    with pytest.raises(InputError, match=r"depth is 6n \+ 2"):
        CifarResNet(2)
    with pytest.raises(InputError, match="'A' \\(zeros\\) or 'B' \\(projection\\)"):
        CifarResNet(20, shortcut="C")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"widths=\(8, 4, 16\)\): shortcut 'A' needs widths that do not shrink"):
        CifarResNet(20, widths=(8, 4, 16))
    assert CifarResNet(8, widths=(8, 4, 16), shortcut="B")(torch.zeros(2, 3, 8, 8)).shape == (2, 10)
