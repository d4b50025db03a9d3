"""A convolution becomes several side by side, and the same outputs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from netsurgery.analysis.network import Network
from netsurgery.arguments import near_names, require_counts
from netsurgery.edit import Edit
from netsurgery.errors import InputError
from netsurgery.module_rewrites import ModuleRewrite, register_rewrite
from netsurgery.outcome import Outcome
from netsurgery.passes.bundles import call_of
from netsurgery.passes.whole_layers import Layers, shell
from netsurgery.pipeline import Pass

__all__ = ["BranchConv", "Branched", "Branches"]


class Branches(nn.ModuleList):
    """Modules that read the same tensor; what they give is concatenated.

    Args:
        branches: the modules.
        dim: the dimension that it is concatenated in, counted from the last one.
    """

    def __init__(self, branches: list[nn.Module], dim: int):
        super().__init__(branches)
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """Run them."""
        return torch.cat([branch(x) for branch in self], self.dim)


@register_rewrite
@dataclass(frozen=True)
class Branched(ModuleRewrite):
    """A convolution whose filters are dealt out, in order, to several.

    Args:
        filters: how many each gets.
    """

    filters: tuple[int, ...]

    def build(self, module: _ConvNd) -> nn.Module:
        """The convolutions, of the class of the old one."""
        dim = 1 if isinstance(module, _ConvTransposeNd) else 0
        parts = {
            key: [None] * len(self.filters) if one is None else one.detach().split(self.filters, axis)
            for (key, one), axis in zip(module._parameters.items(), (dim, 0), strict=True)
        }
        branches: list[nn.Module] = []
        for index, count in enumerate(self.filters):
            branch = shell(module)
            for key, old in module._parameters.items():
                part = parts[key][index]
                branch._parameters[key] = (
                    None if part is None or old is None else nn.Parameter(part.clone(), old.requires_grad)
                )
            branch.out_channels = count
            branches.append(branch)
        return Branches(branches, 1 - module.weight.dim())


@dataclass(frozen=True)
class BranchConv(Pass):
    """Split a convolution's filters into several convolutions, whose outputs are concatenated; none changes.

    Each branch is then a layer of its own, which can be pruned, grown, or replaced. The convolution becomes a
    ``netsurgery.passes.Branches``: the key ``conv.weight`` becomes ``conv.0.weight``, ``conv.1.weight`` and so on.

    Args:
        path: of the convolution.
        parts: how many; filters that are left over go to the first ones.

    Raises:
        InputError: no such convolution, one that is grouped, shares its weights or has hooks, or fewer filters than
            parts.

    Example:
        >>> import torch, netsurgery
        >>> from netsurgery.passes import BranchConv
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.ReLU(), torch.nn.Conv2d(5, 2, 3))
        >>> netsurgery.apply(model, [BranchConv("0")], torch.zeros(1, 3, 8, 8), verify=True)[0]
        Branches(
          (0): Conv2d(3, 3, kernel_size=(3, 3), stride=(1, 1))
          (1): Conv2d(3, 2, kernel_size=(3, 3), stride=(1, 1))
        )

    Source: a mutation of EENA, Zhu et al., arXiv 1905.07320.
    """

    path: str
    parts: int = dataclasses.field(default=2, kw_only=True)

    gives: ClassVar[frozenset[str]] = frozenset({"edit"})

    def __repr__(self) -> str:
        return call_of(self)

    def __post_init__(self) -> None:
        require_counts(self, "parts", least=2)

    def run(self, network: Network) -> Edit:
        """Deal the filters out."""
        layers = Layers(network)
        module = layers.modules.get(self.path)
        call = f"BranchConv({self.path!r})"
        if not isinstance(module, _ConvNd):
            found = f"is a {type(module).__name__}" if module is not None else f"is none of {network.model_name}"
            names = [path for path, one in layers.modules.items() if isinstance(one, _ConvNd)]
            near = near_names(str(self.path), names)
            raise InputError(f"{call} takes the path of a convolution; this one {found}{near}")
        if (why := layers.obstacle(self.path)) is not None:
            raise InputError(f"{call}: {why}")
        if module.groups > 1:
            raise InputError(f"{call}: it has {module.groups} groups, whose filters read different inputs")
        each, more = divmod(module.out_channels, self.parts)
        if not each:
            raise InputError(f"{call}: it has {module.out_channels} filters for {self.parts} parts")
        filters = tuple(each + (index < more) for index in range(self.parts))
        outcome = Outcome(f"'{self.path}' into {self.parts}", " + ".join(map(str, filters)) + " filters", does="branch")
        return Edit(network, {}, modules={self.path: Branched(filters)}, outcomes=(outcome,))
