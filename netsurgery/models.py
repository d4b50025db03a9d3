"""A small residual network for the demo and for examples."""

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut: y = relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)).

    Args:
        cin: channels of the input.
        cout: channels of the output.
        stride: stride of the first convolution; a 1x1 projection joins the shortcut where shapes differ.
    """

    def __init__(self, cin: int, cout: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or cin != cout:
            self.shortcut = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


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
        stages: list[nn.Module] = []
        for i, (cin, cout) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            first = Block(cin, cout, stride=1 if i == 0 else 2)
            stages.append(nn.Sequential(first, *(Block(cout, cout) for _ in range(blocks - 1))))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(batch, classes)` of images `(batch, 1, height, width)`."""
        logits: Tensor = self.head(self.stages(self.stem(x)).mean((2, 3)))
        return logits
