"""A small network with layers of many kinds, for graph rewrites."""

import torch
from torch import Tensor, nn


class Small(nn.Module):
    """A residual block, a grouped and a depthwise convolution, a dense connection, functional layers, an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6, eps=1e-3)
        self.inner, self.inner_norm = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.outer, self.outer_norm = nn.Conv2d(6, 6, 5, padding=2), nn.BatchNorm2d(6)
        self.act = nn.ReLU6()
        self.mix = nn.Conv2d(6, 6, 1)
        self.grouped, self.depthwise = nn.Conv2d(6, 8, 2, groups=2), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.dense = nn.Conv2d(8, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(12, 5, 2, stride=2)
        self.norm = nn.LayerNorm(5)
        self.hidden, self.back = nn.Linear(5, 9), nn.Linear(9, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu(self.stem_norm(self.stem(x)), inplace=True)
        x = x + self.outer_norm(self.outer(self.act(self.inner_norm(self.inner(x)))))
        y = self.mix(x)
        x = self.act(self.depthwise(self.grouped(self.act(y) + y)))
        x = self.up(torch.cat([x, self.dense(x)], 1)).flatten(2).transpose(1, 2)
        x = x + self.back(nn.functional.gelu(self.hidden(self.norm(x))))
        return self.head(x.mean(1))
