"""Least squares with a ridge from sums over data, and errors on other data from its sums alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

__all__ = [
    "POSITIONS", "Change", "Layer", "Sums", "bytes_of", "layer_at", "outputs_at", "places_of", "spatial", "sums_of",
    "windows",
]  # fmt: skip

Layer = nn.Linear | _ConvNd

POSITIONS = 128  # outputs of one sample that are looked at: neighbours say much the same
_NUMBERS = 1 << 21  # of inputs that are unfolded at once


@dataclass(frozen=True)
class Change:
    """A change of a layer: of its weights ``(groups, d, o)`` and its constant ``(groups, o)``; None for no change."""

    weights: Tensor | None = None
    constant: Tensor | None = None


@dataclass(frozen=True)
class Sums:
    """Sums over rows of a layer's inputs X ``(groups, n, d)`` and the residuals R ``(groups, n, o)`` of its outputs.

    Attributes:
        count: n.
        gram: ``X'X``, of X with a column of ones at its end, ``(groups, d + 1, d + 1)``, float64.
        cross: ``X'R``, ``(groups, d + 1, o)``, float64.
        lost: the squares of R, all together.
        whole: the wanted outputs, and their squares, ``(2, groups, o)``.
    """

    count: int
    gram: Tensor
    cross: Tensor
    lost: Tensor
    whole: Tensor

    @classmethod
    def of(cls, x: Tensor, lacks: Tensor, wanted: Tensor) -> Sums:
        """The sums of some rows: products in the type of the rows, sums in float64."""
        x = torch.cat([x, x.new_ones(*x.shape[:2], 1)], 2)
        whole = torch.stack([wanted.sum(1, dtype=torch.float64), wanted.square().sum(1, dtype=torch.float64)])
        lost = lacks.square().sum(dtype=torch.float64)
        return cls(x.shape[1], (x.mT @ x).double(), (x.mT @ lacks).double(), lost, whole)

    def __add__(self, other: Sums) -> Sums:
        mine, others = vars(self), vars(other)
        return Sums(**{name: mine[name] + others[name] for name in mine})

    @property
    def finite(self) -> bool:
        """True if nothing that was summed is NaN or infinite."""
        return all(bool(t.isfinite().all()) for t in (self.gram, self.cross, self.lost, self.whole))

    @property
    def variance(self) -> float:
        """The sum of squares of the wanted outputs less their means."""
        sums, squares = self.whole
        return float((squares - sums.square() / self.count).sum().clamp_min(0))

    def constant(self) -> Change:
        """The change of the constant alone: the mean residual."""
        return Change(constant=self.cross[:, -1] / self.count)

    def refit(self, ridge: float, shift: bool) -> Change:
        """The change D of weights that makes ``|R - X D|^2 + ridge * mean(X^2) * |D|^2`` smallest.

        Args:
            shift: whether a constant may be added too; the ridge does not hold it.
        """
        width = self.gram.shape[-1] - 1
        size = width + shift
        gram = self.gram[:, :size, :size].clone()
        diagonal = gram.diagonal(dim1=1, dim2=2)[:, :width]
        scale = diagonal.mean(1, keepdim=True)
        diagonal += torch.where(scale > 0, ridge * scale, 1.0)
        found = torch.linalg.solve(gram, self.cross[:, :size])
        return Change(found[:, :width], found[:, width] if shift else None)

    def error(self, change: Change) -> float:
        """The sum of squares that is left after a change."""
        if change.weights is None and change.constant is None:
            return float(self.lost)
        solution = torch.zeros_like(self.cross)
        if change.weights is not None:
            solution[:, :-1] = change.weights
        if change.constant is not None:
            solution[:, -1] = change.constant
        taken = (solution * (2 * self.cross - self.gram @ solution)).sum()
        return max(0.0, float(self.lost - taken))


def layer_at(network: nn.Module, path: str) -> Layer:
    """The linear layer or convolution at a path."""
    layer = network.get_submodule(path)
    assert isinstance(layer, Layer)
    return layer


def bytes_of(module: Layer, refit: bool) -> int:
    """Bytes of the sums of a layer, twice, as those of samples that are held back are kept apart."""
    weight = module.weight
    groups = getattr(module, "groups", 1)
    width = weight[0].numel() + 1 if refit else 1
    outputs = weight.shape[0] // groups
    return int(2 * 8 * groups * width * (width + outputs))


def places_of(module: Layer, out: Tensor, generator: torch.Generator) -> Tensor | None:
    """The places of outputs that are looked at in each sample, in row-major order; None for all."""
    count = prod(_whole(module, out).shape[2:] if spatial(module) else _whole(module, out).shape[1:2])
    if count <= POSITIONS:
        return None
    return torch.randperm(count, generator=generator)[:POSITIONS].sort().values.to(out.device)


def outputs_at(module: Layer, out: Tensor, places: Tensor | None) -> Tensor:
    """Outputs of a layer at some places, ``(samples, places, outputs)``."""
    out = _whole(module, out)
    out = out.flatten(2).mT if spatial(module) else out
    return out if places is None else out[:, places]


def sums_of(module: Layer, x: Tensor, wanted: Tensor, places: Tensor | None, refit: bool) -> Sums:
    """Sums over the inputs of a layer and its wanted outputs, in blocks of samples.

    Args:
        module: a linear layer or convolution.
        x: its inputs, without those that are removed.
        wanted: its outputs as they should be, at some places, ``(samples, places, outputs)``.
        places: which.
        refit: whether its weights are to change: else X has no columns but that of ones.
    """
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    if not refit:
        lacks = (wanted - outputs_at(module, module.forward(x), places)).to(kind)
        return Sums.of(*(_grouped(t.to(kind), 1) for t in (lacks[..., :0], lacks, wanted)))
    groups, x = getattr(module, "groups", 1), _whole(module, x)
    weight = module.weight.to(kind).reshape(groups, -1, module.weight[0].numel()).mT  # (groups, d, o)
    bias = 0 if module.bias is None else module.bias.to(kind).reshape(groups, 1, -1)
    size = max(1, _NUMBERS // max(1, wanted.shape[1] * weight.shape[0] * weight.shape[1]))
    total: Sums | None = None
    for some, outputs in zip(x.split(size), wanted.split(size), strict=True):
        rows, right = _inputs(module, some.to(kind), places), _grouped(outputs.to(kind), groups)
        found = Sums.of(rows, right - (rows @ weight + bias), right)
        total = found if total is None else total + found
    assert total is not None
    return total


def _inputs(module: Layer, x: Tensor, places: Tensor | None) -> Tensor:
    """The rows that the weights are multiplied with, ``(groups, n, d)``."""
    if isinstance(module, nn.Linear):
        return _grouped(x if places is None else x[:, places], 1)
    return windows(module, x, places)


def _grouped(t: Tensor, groups: int) -> Tensor:
    """``(samples, places, channels)`` as ``(groups, n, channels of a group)``."""
    rows: Tensor = t.flatten(0, 1).unflatten(1, (groups, t.shape[-1] // groups)).movedim(1, 0)
    return rows


def spatial(module: Layer) -> int:
    """The number of dimensions that a convolution goes along; 0 for a linear layer."""
    return 0 if isinstance(module, nn.Linear) else len(module.kernel_size)


def windows(module: _ConvNd, x: Tensor, places: Tensor | None = None) -> Tensor:
    """The windows that a convolution multiplies with its weights: ``(groups, n, channels of a group * kernel)``."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    for dim, (size, step, apart) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True), 2):
        x = x.unfold(dim, apart * (size - 1) + 1, step)[..., ::apart]
    last = 2 + spatial(module)
    if places is None:
        x = x.flatten(2, last - 1)
    else:
        at: tuple[slice | Tensor, ...] = (slice(None), slice(None), *torch.unravel_index(places, x.shape[2:last]))
        x = x[at]  # (b, channels, places, *kernel)
    rows: Tensor = x.unflatten(1, (module.groups, -1)).movedim(1, 0).movedim(3, 2).flatten(3).flatten(1, 2)
    return rows


def _whole(module: Layer, t: Tensor) -> Tensor:
    """``(samples, c, *s)`` of a convolution, ``(samples, s, c)`` of a linear layer."""
    dims = spatial(module)
    shape = (-1, *t.shape[t.dim() - dims - 1 :]) if dims else (len(t) if t.dim() > 1 else 1, -1, t.shape[-1])
    whole: Tensor = t.reshape(shape)
    return whole
