"""Layers become products of two of lower rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from netsurgery.analysis.network import Network
from netsurgery.arguments import is_count, is_real
from netsurgery.edit import Edit
from netsurgery.errors import InputError, RewriteError
from netsurgery.module_rewrites import ModuleRewrite, register_rewrite, rewritten
from netsurgery.outcome import Outcome
from netsurgery.passes.bundles import call_of
from netsurgery.passes.patterns import Chosen, Modules, as_patterns
from netsurgery.passes.whole_layers import Layers
from netsurgery.pipeline import Pass

__all__ = ["Factored", "Factorise"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@register_rewrite
@dataclass(frozen=True)
class Factored(ModuleRewrite):
    """A linear layer or a convolution of one position as a series of two, of which the first gives ``rank`` numbers.

    Args:
        rank: of the product.
        exact: whether it is the full one, so that no output changes.
    """

    rank: int
    exact: bool = False

    averages = False  # singular vectors of another matrix are others

    def build(self, module: nn.Module) -> nn.Module:
        """``W = (U sqrt(S)) (sqrt(S) V)``, cut to the largest singular values; the bias is that of the second."""
        own: Any = module
        left, values, right = torch.linalg.svd(own.weight.detach().flatten(1).double(), full_matrices=False)
        root = values[: self.rank].sqrt()
        first, second = _pair(own, self.rank)
        for new, part in ((first, root[:, None] * right[: self.rank]), (second, left[:, : self.rank] * root)):
            new.weight = nn.Parameter(part.to(own.weight.dtype).reshape(new.weight.shape), own.weight.requires_grad)
        if own.bias is not None:
            second.bias = nn.Parameter(own.bias.detach().clone(), own.bias.requires_grad)
        return nn.Sequential(first, second)


def _pair(module: Any, rank: int) -> tuple[Any, Any]:
    """Two layers without a bias, of a rank; strides and paddings are in the first."""
    if isinstance(module, nn.Linear):
        return (
            nn.Linear(module.in_features, rank, bias=False, device="meta"),
            nn.Linear(rank, module.out_features, bias=False, device="meta"),
        )
    kind: Any = _CONVOLUTIONS[module.weight.dim() - 3]
    around = {"stride": module.stride, "padding": module.padding, "padding_mode": module.padding_mode}
    first = kind(module.in_channels, rank, module.kernel_size, bias=False, device="meta", **around)
    return first, kind(rank, module.out_channels, module.kernel_size, bias=False, device="meta")


@dataclass(frozen=True)
class _Tried(ModuleRewrite):
    """The two layers of a rank, without values."""

    rank: int

    def build(self, module: nn.Module) -> nn.Module:
        own: Any = module
        first, second = _pair(own, self.rank)
        second.bias = None if own.bias is None else nn.Parameter(torch.empty(own.bias.shape, device="meta"))
        series = nn.Sequential(first, second).to_empty(device=own.weight.device)
        for parameter in series.parameters():
            nn.init.zeros_(parameter)
        return series


def _unfit(network: Network, ranks: Mapping[str, int]) -> dict[str, str]:
    """The layers that the model's code needs as they are, and why, by halves."""
    try:
        rewritten(network, {path: _Tried(rank) for path, rank in ranks.items()})
    except RewriteError as error:
        if len(ranks) == 1:
            return dict.fromkeys(ranks, f"the model's code needs it as it is: {_root(error)}")
        paths, half = list(ranks), len(ranks) // 2
        parts = ({path: ranks[path] for path in part} for part in (paths[:half], paths[half:]))
        return {path: why for part in parts for path, why in _unfit(network, part).items()}
    return {}


def _root(error: BaseException) -> str:
    """The error that an error goes back to."""
    while error.__cause__ is not None:
        error = error.__cause__
    first = str(error).strip().partition("\n")[0]
    return first if isinstance(error, RewriteError) else f"{type(error).__name__}: {first}"


@dataclass(frozen=True)
class Factorise(Pass):
    """Replace linear layers and 1x1 convolutions by products of two of lower rank, by singular value decomposition.

    ``W`` of shape ``(out, in)`` becomes ``(out, rank) (rank, in)``: the nearest product of this rank, exact at the full
    one. The layer becomes an ``nn.Sequential``: the keys ``fc.weight`` and ``fc.bias`` become ``fc.0.weight``,
    ``fc.1.weight`` and ``fc.1.bias``. ``edit.summary()`` has the relative error of each weight, in the Frobenius norm,
    and names the layers that are left, such as those of which the code reads attributes (``self.fc.out_features``).

    Args:
        rank: of each product, at most the full one.
        ratio: the share of the full rank that goes, in [0, 1), as ``PruneChannels`` takes it.
        include: only layers that these match, as for ``PruneChannels``.
        exclude: none that these match.
        always: also layers that get no fewer parameters, as at full rank.

    Raises:
        InputError: none or both of rank and ratio, a number out of range, a pattern that matches nothing, or no layer
            that gets fewer parameters.

    Example:
        >>> import torch, netsurgery
        >>> from netsurgery.passes import Factorise
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 12), torch.nn.ReLU(), torch.nn.Linear(12, 2))
        >>> small = netsurgery.apply(model, [Factorise(rank=3)])
        >>> small[0]
        Sequential(
          (0): Linear(in_features=16, out_features=3, bias=False)
          (1): Linear(in_features=3, out_features=12, bias=True)
        )

    Source: Denton et al., "Exploiting Linear Structure Within Convolutional Networks for Efficient Evaluation", arXiv
    1404.0736; that the cut decomposition is the nearest is due to Eckart and Young (1936). Roots of the singular values
    in both factors are our choice.
    """

    rank: int | None = None
    ratio: float | None = None
    include: Modules = dataclasses.field(default=(), kw_only=True)
    exclude: Modules = dataclasses.field(default=(), kw_only=True)
    always: bool = dataclasses.field(default=False, kw_only=True)

    gives: ClassVar[frozenset[str]] = frozenset({"edit"})

    def __repr__(self) -> str:
        return call_of(self)

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.ratio is None):
            raise InputError("Factorise takes a rank or a ratio, one of both")
        if self.rank is not None and not is_count(self.rank, 1):
            raise InputError(f"Factorise(rank={self.rank!r}): a whole number of at least 1; a share is ratio=")
        if self.ratio is not None and not (is_real(self.ratio) and 0 <= self.ratio < 1):
            raise InputError(f"Factorise(ratio={self.ratio!r}): the share of the rank that goes is in [0, 1)")
        for name in ("include", "exclude"):
            object.__setattr__(self, name, as_patterns(getattr(self, name)))

    def run(self, network: Network) -> Edit:
        """Choose the layers that get fewer parameters."""
        network.require_weights(self)
        layers, short, errors = Layers(network), dict[str, str](), dict[str, str]()
        modules: dict[str, Factored] = {}
        for path in self._meant(network, layers):
            module: Any = layers.modules[path]
            out, into = module.weight.flatten(1).shape if "weight" in module._parameters else (1, 1)
            full = min(out, into)
            rank = self.rank if self.rank is not None else max(1, round(full * (1 - (self.ratio or 0))))
            why = layers.obstacle(path)
            if why is None and not bool(module.weight.isfinite().all()):
                why = "its weight has entries that are no finite numbers"
            if why is None and rank > full:
                why = f"its full rank is {full}"
            if why is None and not self.always and rank * (out + into) >= out * into:
                why = f"at rank {rank} it has no fewer parameters"
            if why is not None:
                short[path] = why
                continue
            modules[path] = Factored(rank, exact=rank == full)
            errors[path] = f"rank {rank} of {full}, relative error {_error(module.weight, rank):.2g}"
        try:
            edit = Edit(network, {}, modules=modules)
        except RewriteError:
            unfit = _unfit(network, {path: one.rank for path, one in modules.items()})
            short |= unfit
            modules = {path: one for path, one in modules.items() if path not in unfit}
            errors = {path: errors[path] for path in modules}
            edit = Edit(network, {}, modules=modules)
        if not modules:
            reasons = "; ".join(f"{path}: {why}" for path, why in list(short.items())[:5]) or "there is none"
            raise InputError(f"{self!r}: {network.model_name} has no layer that can be factorised: {reasons}")
        count = len(modules) + len(short)
        outcome = Outcome(f"{count} layers", f"{len(modules)}", short, notes=errors, does="factorise")
        return dataclasses.replace(edit, outcomes=(outcome,))

    def _meant(self, network: Network, layers: Layers) -> list[str]:
        include, exclude = (as_patterns(given) for given in (self.include, self.exclude))
        included, excluded = (Chosen(network, given) for given in (include, exclude))
        return [
            path
            for path, module in layers.modules.items()
            if _is_matrix(module) and (not include or path in included) and path not in excluded
        ]


def _is_matrix(module: nn.Module) -> bool:
    """True if a layer is the product with one matrix."""
    if type(module) in _CONVOLUTIONS:
        own: Any = module
        return own.groups == 1 and all(size == 1 for size in own.kernel_size)
    return type(module) is nn.Linear


def _error(weight: Tensor, rank: int) -> float:
    """The distance of the nearest matrix of a rank, relative to the norm of the matrix."""
    squares = torch.linalg.svdvals(weight.detach().flatten(1).double()).square()
    return float((squares[rank:].sum() / squares.sum().clamp(min=1e-300)).sqrt())
