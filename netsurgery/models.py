"""Small residual networks: one for the demo and for examples, and the classic ones for CIFAR."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netsurgery.errors import InputError

__all__ = ["Block", "CifarResNet", "DigitsResNet", "Padded", "resnet20", "resnet32", "resnet56", "resnet110"]

Shortcut = Literal["A", "B"]


class Padded(nn.Module):
    """A shortcut without parameters: every ``stride``-th position, and ``extra`` channels of zeros after the own."""

    def __init__(self, extra: int, stride: int) -> None:
        super().__init__()
        self.extra, self.stride = extra, stride

    def forward(self, x: Tensor) -> Tensor:
        """From `(batch, c, height, width)` to `(batch, c + extra, height / stride, width / stride)`, rounded up."""
        x = x[:, :, :: self.stride, :: self.stride]
        if not self.extra:
            return x
        return torch.cat([x, x.new_zeros(x.shape[0], self.extra, x.shape[2], x.shape[3])], 1)


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut: y = relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)).

    Args:
        cin: channels of the input.
        cout: channels of the output; with shortcut "A" at least as many.
        stride: stride of the first convolution.
        shortcut: what joins where shapes differ: "A", zeros for the new channels; "B", a 1x1 projection.
    """

    def __init__(self, cin: int, cout: int, stride: int = 1, shortcut: Shortcut = "B") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.shortcut: nn.Module = nn.Identity()
        if (stride != 1 or cin != cout) and shortcut == "A":
            self.shortcut = Padded(cout - cin, stride)
        elif stride != 1 or cin != cout:
            self.shortcut = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def _stages(widths: Sequence[int], blocks: int, shortcut: Shortcut) -> nn.Sequential:
    """A stage of blocks for each width; every stage after the first halves the resolution."""
    stages: list[nn.Module] = []
    for i, (cin, cout) in enumerate(zip((widths[0], *widths), widths, strict=False)):
        first = Block(cin, cout, 1 if i == 0 else 2, shortcut)
        stages.append(nn.Sequential(first, *(Block(cout, cout) for _ in range(blocks - 1))))
    return nn.Sequential(*stages)


class DigitsResNet(nn.Module):
    """A residual network for 1x8x8 digits: a stem, one stage of blocks per width, mean over space, a linear head.

    Args:
        widths: channels of each stage; every stage after the first halves the resolution.
        blocks: residual blocks per stage.
        classes: length of the output.

    Example:
        >>> import torch
        >>> DigitsResNet()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128), blocks: int = 1, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        self.stages = _stages(widths, blocks, "B")
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(batch, classes)` of images `(batch, 1, height, width)`."""
        logits: Tensor = self.head(self.stages(self.stem(x)).mean((2, 3)))
        return logits


class CifarResNet(nn.Module):
    """The residual networks for CIFAR: a stem, three stages of n blocks, mean over space, a linear head.

    Args:
        depth: number of layers with weights, 6n + 2.
        classes: length of the output.
        channels: of the images.
        widths: channels of each stage.
        shortcut: where a stage begins: "A", zeros for the new channels and no parameters, as the paper does on CIFAR
            and as FLOPs of pruned networks are published; "B", a 1x1 projection with batch norm.

    Raises:
        InputError: another depth or shortcut, or widths that shrink where zeros are to fill them up.

    Example:
        >>> import torch
        >>> CifarResNet(20, widths=(4, 8, 16))(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    Source: He et al., "Deep Residual Learning for Image Recognition", arXiv 1512.03385, section 4.2. Weights are drawn
    as in arXiv 1502.01852. On which side the zeros stand the paper does not say: after, as in the authors' own code.
    """

    def __init__(
        self,
        depth: int,
        classes: int = 10,
        channels: int = 3,
        *,
        widths: Sequence[int] = (16, 32, 64),
        shortcut: Shortcut = "A",
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise InputError(f"CifarResNet({depth}): depth is 6n + 2, such as 20, 32, 44, 56 or 110")
        if shortcut not in ("A", "B"):
            raise InputError(f"CifarResNet(shortcut={shortcut!r}): 'A' (zeros) or 'B' (projection)")
        if shortcut == "A" and list(widths) != sorted(widths):
            raise InputError(f"CifarResNet(widths={tuple(widths)}): shortcut 'A' needs widths that do not shrink")
        stem = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(widths[0]), nn.ReLU())
        self.stages = _stages(widths, (depth - 2) // 6, shortcut)
        self.head = nn.Linear(widths[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(batch, classes)` of images `(batch, channels, height, width)`."""
        logits: Tensor = self.head(self.stages(self.stem(x)).mean((2, 3)))
        return logits


def resnet20(
    classes: int = 10, channels: int = 3, *, widths: Sequence[int] = (16, 32, 64), shortcut: Shortcut = "A"
) -> CifarResNet:
    """The network of 20 layers for CIFAR; see ``CifarResNet``."""
    return CifarResNet(20, classes, channels, widths=widths, shortcut=shortcut)


def resnet32(
    classes: int = 10, channels: int = 3, *, widths: Sequence[int] = (16, 32, 64), shortcut: Shortcut = "A"
) -> CifarResNet:
    """The network of 32 layers for CIFAR; see ``CifarResNet``."""
    return CifarResNet(32, classes, channels, widths=widths, shortcut=shortcut)


def resnet56(
    classes: int = 10, channels: int = 3, *, widths: Sequence[int] = (16, 32, 64), shortcut: Shortcut = "A"
) -> CifarResNet:
    """The network of 56 layers for CIFAR; see ``CifarResNet``."""
    return CifarResNet(56, classes, channels, widths=widths, shortcut=shortcut)


def resnet110(
    classes: int = 10, channels: int = 3, *, widths: Sequence[int] = (16, 32, 64), shortcut: Shortcut = "A"
) -> CifarResNet:
    """The network of 110 layers for CIFAR; see ``CifarResNet``."""
    return CifarResNet(110, classes, channels, widths=widths, shortcut=shortcut)
