"""Importance of units: one non-negative number for each unit of each group that may lose some. Lower goes first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from netsurgery.axes import Axis
from netsurgery.errors import InputError
from netsurgery.kernels.hgsr import CRITERIA, Name
from netsurgery.network import Network
from netsurgery.pipeline import Pass

__all__ = ["HGSRScore", "MagnitudeScore", "RandomScore"]


def per_unit(axis: Axis, values: Tensor) -> dict[Axis, Tensor]:
    """Sum values given along an axis over the positions of each unit of each channel in it.

    Args:
        values: shape ``(axis.size,)``.
    """
    if not axis.op:
        return {axis: values}
    found: dict[Axis, Tensor] = {}
    if axis.op == "concat":
        blocks = list(values.split([term.size for term in axis.terms]))
    else:
        grid = values.reshape([term.size for term in axis.terms])
        blocks = [grid.sum([d for d in range(grid.dim()) if d != dim]) for dim in range(grid.dim())]
    for term, block in zip(axis.terms, blocks, strict=True):
        for channel, units in per_unit(term, block).items():
            found[channel] = found[channel] + units if channel in found else units
    return found


def _collect(
    network: Network, role: str, along: Callable[[Tensor, int], Tensor], outer: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """For each group the sum over its members in a role of ``outer(sums of along(weight, axis) over each unit)``.

    A group without members in that role is scored by those in another: produces, consumes, carries.
    """
    chosen: dict[str, str] = {}
    for group in network.prunable:
        roles = {member.role for member in group.members if network.tensors[member.parameter].is_floating_point()}
        chosen[group.name] = next(r for r in (role, "produces", "consumes", "carries") if r in roles)
    scores: dict[str, Tensor] = {}
    memo: dict[tuple[str, int], dict[Axis, Tensor]] = {}
    for group in network.prunable:
        for member in group.members:
            weight = network.tensors[member.parameter]
            if member.role != chosen[group.name] or not weight.is_floating_point():
                continue
            key = member.parameter, member.axis
            if key not in memo:
                memo[key] = per_unit(network.axes[member.parameter][member.axis], along(weight, member.axis))
            term = outer(memo[key][group.channel])
            scores[group.name] = scores[group.name] + term if group.name in scores else term
    return scores


def _accumulated(weight: Tensor) -> Tensor:
    weight = weight.detach()
    return weight if weight.dtype == torch.float64 else weight.float()


@dataclass(frozen=True)
class HGSRScore(Pass):
    """Each unit's own term of the hierarchical group sparse criterion, over all layers that consume the unit.

    Args:
        criterion: one of the ten of the paper.

    Source: Mitsuno, Miyao, Kurita, arXiv 2004.04394, feature-wise: an outer group is what one input channel feeds;
    layers are summed. Over coupled channels (residual links, concatenations, flattened features) the sum over all
    consumers is our choice, as the source is silent.

    Example:
        >>> import torch, netsurgery
        >>> from netsurgery.passes import HGSRScore
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False), torch.nn.Linear(2, 2, bias=False))
        >>> model[1].weight.data = torch.tensor([[1.0, 4.0], [9.0, 16.0]])
        >>> HGSRScore().run(netsurgery.trace(model)).scores["0"]
        tensor([16., 36.])
    """

    criterion: Name = "hierarchical_sq_group_l12"

    gives: ClassVar[frozenset[str]] = frozenset({"scores"})

    def __post_init__(self) -> None:
        if self.criterion not in CRITERIA:
            raise InputError(f"HGSRScore has no criterion '{self.criterion}': choose one of {', '.join(CRITERIA)}")

    def run(self, network: Network) -> Network:
        """Lay the scores on the network."""
        norm, inner, outer, _ = CRITERIA[self.criterion]

        def along(weight: Tensor, axis: int) -> Tensor:
            weight = _accumulated(weight)
            kernels = (
                torch.linalg.vector_norm(weight, norm, dim=tuple(range(2, weight.dim())))
                if weight.dim() > 2
                else weight.abs()
            )
            return inner(kernels).movedim(axis, 0).flatten(1).sum(1) if kernels.dim() > 1 else inner(kernels)

        return network.with_scores(_collect(network, "consumes", along, outer))


@dataclass(frozen=True)
class MagnitudeScore(Pass):
    """The p-norm of the weights that produce each unit.

    Args:
        p: 1 or 2 are usual; any positive number.

    Source: Li et al., "Pruning Filters for Efficient ConvNets", arXiv 1608.08710 (p = 1). Over several producers of
    coupled units the norm of all their weights together is our choice.
    """

    p: float = 2.0

    gives: ClassVar[frozenset[str]] = frozenset({"scores"})

    def __post_init__(self) -> None:
        if not self.p > 0:
            raise InputError(f"MagnitudeScore(p={self.p}): p must be positive")

    def run(self, network: Network) -> Network:
        """Lay the scores on the network."""

        def along(weight: Tensor, axis: int) -> Tensor:
            flat = (
                _accumulated(weight).movedim(axis, 0).flatten(1) if weight.dim() > 1 else _accumulated(weight)[:, None]
            )
            return torch.linalg.vector_norm(flat, self.p, dim=1).pow(self.p)

        sums = _collect(network, "produces", along, lambda x: x)
        return network.with_scores({name: score.pow(1 / self.p) for name, score in sums.items()})


@dataclass(frozen=True)
class RandomScore(Pass):
    """Scores drawn uniformly from [0, 1): the baseline of every comparison, and what tests prune by."""

    seed: int = 0

    gives: ClassVar[frozenset[str]] = frozenset({"scores"})

    def run(self, network: Network) -> Network:
        """Lay the scores on the network."""
        generator = torch.Generator().manual_seed(self.seed)
        return network.with_scores({g.name: torch.rand(g.size, generator=generator) for g in network.prunable})
