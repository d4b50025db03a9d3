"""Importance of units: one non-negative number for each unit of each group that may lose some. Lower goes first."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from netsurgery.axes import Axis, leaves, product
from netsurgery.errors import InputError
from netsurgery.kernels.hgsr import CRITERIA, Name
from netsurgery.network import Group, Network
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


class _Sums:
    """Scores by group name, added up from values along axes."""

    def __init__(self, network: Network):
        self.network = network
        self.found: dict[str, Tensor] = {}

    def add(self, axis: Axis, values: Tensor) -> None:
        for channel, units in per_unit(axis, values).items():
            group = self.network.by_channel.get(channel)
            if group is not None and group.frozen is None:
                self.found[group.name] = self.found[group.name] + units if group.name in self.found else units


def _blocks(axes: tuple[Axis, ...], carried: Callable[[Axis], bool]) -> Axis:
    """The groups of a grouped convolution: the leading factors of its outputs that its inputs have too."""
    factors = axes[0].terms if axes and axes[0].op == "product" else axes[:1]
    return product(itertools.takewhile(lambda factor: all(map(carried, leaves(factor))), factors))


def _collect(
    network: Network, groups: Iterable[Group], order: tuple[str, ...], along: Callable[[Tensor, int], Tensor]
) -> dict[str, Tensor]:
    """For each group the sum of ``along(weight, axis)`` over its members in a role: the first in order that it has."""
    scores: dict[str, Tensor] = {}
    memo: dict[tuple[str, int], dict[Axis, Tensor]] = {}
    for group in groups:
        members = [m for m in group.members if network.tensors[m.parameter].is_floating_point()]
        role = next((r for r in (*order, "consumes") if any(m.role == r for m in members)), None)
        for member in members:
            if member.role != role:
                continue
            key = member.parameter, member.axis
            if key not in memo:
                values = along(_accumulated(network.tensors[member.parameter]), member.axis)
                memo[key] = per_unit(network.axes[member.parameter][member.axis], values)
            term = memo[key][group.channel]
            scores[group.name] = scores[group.name] + term if group.name in scores else term
    return scores


def _outer_sums(values: Tensor, axis: int) -> Tensor:
    """Sums over all axes but one."""
    sums: Tensor = values.movedim(axis, 0).flatten(1).sum(1) if values.dim() > 1 else values
    return sums


def _accumulated(weight: Tensor) -> Tensor:
    weight = weight.detach()
    return weight if weight.dtype == torch.float64 else weight.float()


@dataclass(frozen=True)
class HGSRScore(Pass):
    """Each unit's own terms of the hierarchical group sparse criterion: of the channels that layers read from it.

    Args:
        criterion: one of the ten of the paper.

    Source: Mitsuno, Miyao, Kurita, arXiv 2004.04394, feature-wise: an outer group is what one input channel feeds;
    layers are summed. A unit that is several channels (groups, flattened features), or that several layers read, has
    the sum of their terms; that is our choice, as the source is silent.

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
        scores = _Sums(network)
        roles = {(m.parameter, m.axis, g.channel): m.role for g in network.groups for m in g.members}
        for name, axes in network.axes.items():
            read = [
                axis
                for axis in range(len(axes))
                if any(roles.get((name, axis, c)) == "consumes" for c in leaves(axes[axis]))
            ]
            blocks = _blocks(axes, lambda leaf: roles.get((name, 0, leaf)) == "carries")  # noqa: B023
            if read or (len(axes) > 2 and blocks.size > 1):
                self._add_terms(scores, network.tensors[name], axes, read[0] if read else 1, blocks)
        missing = [group for group in network.prunable if group.name not in scores.found]  # nothing reads them
        rest = _collect(network, missing, ("produces", "carries"), lambda w, axis: _outer_sums(w.abs(), axis))
        return network.with_scores({**scores.found, **rest})

    def _add_terms(self, scores: _Sums, weight: Tensor, axes: tuple[Axis, ...], axis: int, blocks: Axis) -> None:
        """Add the term of each channel that a weight reads along ``axis`` to the units it belongs to."""
        norm, inner, outer, _ = CRITERIA[self.criterion]
        weight = _accumulated(weight)
        windows = tuple(range(2, weight.dim()))
        kernels = torch.linalg.vector_norm(weight, norm, dim=windows) if windows else weight.abs()
        if axis == 0:
            scores.add(axes[0], outer(inner(kernels).sum(1)))
        else:  # of a grouped convolution, each group of outputs reads channels of its own
            terms = outer(
                inner(kernels).reshape(blocks.size, -1, kernels.shape[1]).sum(1)
            )  # (groups, inputs of a group)
            scores.add(axes[1], terms.sum(0))
            scores.add(blocks, terms.sum(1))


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
            flat = weight.movedim(axis, 0).flatten(1) if weight.dim() > 1 else weight[:, None]
            norms: Tensor = torch.linalg.vector_norm(flat, self.p, dim=1)
            return norms.pow(self.p)

        sums = _collect(network, network.prunable, ("produces", "carries"), along)
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
