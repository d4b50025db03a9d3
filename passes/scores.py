"""Importance of units by their weights: a non-negative number for each unit of each group. Lower goes first.

The weights are those that layers use, with masks, weight norms and low-rank updates carried out: see
``netsurgery.analysis.weights``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from netsurgery.analysis.computed_weights import peeled
from netsurgery.analysis.groups import Group, Role
from netsurgery.analysis.network import Network
from netsurgery.analysis.weights import Use, Weight, computed_weights, is_computed, uses
from netsurgery.axes import Axis, leaves
from netsurgery.errors import InputError
from netsurgery.kernels.criteria import Name
from netsurgery.kernels.sparsity import outer_terms
from netsurgery.passes.entries import accumulated, in_roles, per_unit, unit_sums
from netsurgery.passes.layers import Grouping, check_choice, outer_groups, positions_of, scored_layers
from netsurgery.pipeline import Pass

__all__ = ["BatchNormScore", "GeometricMedianScore", "HGSRScore", "MagnitudeScore", "RandomScore"]


aten = torch.ops.aten
BATCH_NORMS = (aten.native_batch_norm, aten._native_batch_norm_legit, aten.cudnn_batch_norm, aten.miopen_batch_norm)


#: Units are scored by the weights that make them; where there are none, by what they are given, or are read with.
_MADE: tuple[tuple[Role], ...] = (("produces",), ("carries",), ("consumes",))


def _powers(network: Network, groups: Iterable[Group], p: float) -> dict[str, Tensor]:
    """For each unit of some groups the sum of ``|w|^p`` over the weights that make it."""
    found = uses(network)

    def along(weight: Weight, axes: list[int]) -> Tensor:
        values = accumulated(weight.value)
        norms: Tensor = torch.linalg.vector_norm(values, p, dim=axes) if axes else values.abs()
        return norms.pow(p)

    return unit_sums(network, {group.name: _making(found[group.name]) for group in groups}, along)


def _making(found: list[Use]) -> list[Use]:
    return in_roles([use for use in found if use.weight.value.is_floating_point()], *_MADE)


@dataclass(frozen=True)
class HGSRScore(Pass):
    """Each unit's own terms of the hierarchical group sparse criterion.

    Args:
        criterion: one of the ten of the paper.
        grouping: "feature", the terms of the input channels that layers read from a unit; "neuron", of the output
            channels that produce it; "coupled", one term over all layers that read it, as in ``HGSR``.

    Source: Mitsuno, Miyao, Kurita, arXiv 2004.04394, feature-wise and neuron-wise: an outer group is one channel of one
    layer; layers are summed. A unit that is several channels (groups, flattened features), or that several layers
    read, has the sum of their terms; that is our choice, as the source is silent. "coupled" is ours. A unit that no
    layer reads (or produces) is scored by the absolute values that carry it.

    Example:
        >>> import torch, netsurgery
        >>> from netsurgery.passes import HGSRScore
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False), torch.nn.Linear(2, 2, bias=False))
        >>> model[1].weight.data = torch.tensor([[1.0, 4.0], [9.0, 16.0]])
        >>> HGSRScore().run(netsurgery.trace(model)).scores["0"]
        tensor([16., 36.])
    """

    criterion: Name = "hierarchical_sq_group_l12"
    grouping: Grouping = "feature"

    gives: ClassVar[frozenset[str]] = frozenset({"scores"})

    def __post_init__(self) -> None:
        check_choice("HGSRScore", self.criterion, self.grouping)

    def run(self, network: Network) -> Network:
        """Lay the scores on the network."""
        network.require_weights(self)
        listed, values = scored_layers(network, self.grouping)
        found = outer_groups(network, listed, self.grouping)
        value = dict(zip(map(id, listed), values, strict=True))
        weights = [value[id(layer)] for layer in found.layers]
        terms = outer_terms(weights, found.layout, self.criterion) if weights else torch.zeros(0)
        scores = {name: terms[where] for name, where in found.units.items()}
        if self.grouping != "coupled":
            axes = [layer.input_axis if self.grouping == "feature" else layer.output_axis for layer in found.layers]
            for axis, term in zip(axes, terms.split([axis.size for axis in axes]), strict=True):
                for channel, units in per_unit(axis, term).items():
                    group = network.by_channel.get(channel)
                    if group is not None and group.locked is None:
                        scores[group.name] = scores[group.name] + units if group.name in scores else units
        missing = [group for group in network.prunable if group.name not in scores]
        rest = _powers(network, missing, 1)
        return network.with_scores({**scores, **rest})


@dataclass(frozen=True)
class MagnitudeScore(Pass):
    """The p-norm of the weights that produce each unit.

    Args:
        p: 1 or 2 are usual; any positive number.
        lamp: divide the p-th power of each norm by the sum of those of its group that are not smaller (LAMP): these
            are comparable across groups, ``PruneChannels(..., scope="global")``. They are shares of what is left of
            their group, made to be ranked: ``per="auto"`` does not divide them by costs. Divided, they kept 34 and 66%
            of a small network's answers on digits (two seeds) at 75% of the multiply-accumulates, undivided 85 and 92%;
            at 75% of the parameters either way 99%.

    Source: Li et al., "Pruning Filters for Efficient ConvNets", arXiv 1608.08710 (p = 1); Lee et al., "Layer-Adaptive
    Sparsity for the Magnitude-based Pruning", arXiv 2010.07611 (LAMP, p = 2, of single weights). Over several producers
    of coupled units the norm of all their weights together, and LAMP of these, are our choice.
    """

    p: float = 2.0
    lamp: bool = False

    gives: ClassVar[frozenset[str]] = frozenset({"scores"})

    def __post_init__(self) -> None:
        if not self.p > 0:
            raise InputError(f"MagnitudeScore(p={self.p}): p must be positive")

    def run(self, network: Network) -> Network:
        """Lay the scores on the network."""
        network.require_weights(self)
        sums = _powers(network, network.prunable, self.p)
        if self.lamp:
            return network.with_scores(
                {name: _layer_adaptive(powers) for name, powers in sums.items()}, comparable=True, ordinal=True
            )
        return network.with_scores({name: score.pow(1 / self.p) for name, score in sums.items()})


def _layer_adaptive(powers: Tensor) -> Tensor:
    """Each number divided by the sum of those that are not smaller."""
    ordered, order = powers.sort(stable=True)
    above = ordered.flip(0).cumsum(0).flip(0)
    scores = torch.empty_like(powers)
    scores[order] = torch.where(above > 0, ordered / above, 0.0)
    return scores


@dataclass(frozen=True)
class BatchNormScore(Pass):
    """The mean absolute scale of the batch norms that a unit passes.

    Source: Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", arXiv 1708.06519. Our
    choice: the mean over several batch norms of coupled units; for a unit that passes none the norm of the weights that
    produce it.

    Example:
        >>> import torch, netsurgery
        >>> from netsurgery.passes import BatchNormScore
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 2)).eval()
        >>> model[1].weight.data = torch.tensor([0.5, -2.0])
        >>> BatchNormScore().run(netsurgery.trace(model)).scores["0"]
        tensor([0.5000, 2.0000])
    """

    gives: ClassVar[frozenset[str]] = frozenset({"scores"})

    def run(self, network: Network) -> Network:
        """Lay the scores on the network."""
        network.require_weights(self)
        sums: dict[Axis, Tensor] = {}
        passed: dict[Axis, int] = {}
        for axis, scale in _norm_scales(network):
            for channel, units in per_unit(axis, accumulated(scale).abs()).items():
                sums[channel] = sums[channel] + units if channel in sums else units
                passed[channel] = passed.get(channel, 0) + sum(leaf is channel for leaf in leaves(axis))
        found = {g.name: sums[g.channel] / passed[g.channel] for g in network.prunable if g.channel in sums}
        rest = MagnitudeScore().run(network).scores if len(found) < len(network.prunable) else {}
        return network.with_scores({**rest, **found})


def _norm_scales(network: Network) -> list[tuple[Axis, Tensor]]:
    """The scales of batch norms, each once: its dimension and its value."""
    norms = [
        n for p in network.programs for n in p.operations if getattr(n.target, "overloadpacket", None) in BATCH_NORMS
    ]
    weights = dict.fromkeys(node.args[1] for node in norms if isinstance(node.args[1], fx.Node))
    names = dict.fromkeys(str(node.target) for node in weights if not is_computed(node))
    plain = [(network.axes[name][0], network.tensors[name]) for name in names if name in network.tensors]
    found = {weight.node: weight for weight in computed_weights(network, network.tensors)}
    made = [found[node] for node in map(peeled, weights) if node in found]
    return [*plain, *((weight.axes[0], weight.value) for weight in made)]


@dataclass(frozen=True)
class GeometricMedianScore(Pass):
    """The summed distance of the weights that produce a unit to those of all other units of its group.

    Source: He et al., "Filter Pruning via Geometric Median", arXiv 1811.00250. The distance over all producers of
    coupled units together is our choice.

    Example:
        >>> import torch, netsurgery
        >>> from netsurgery.passes import GeometricMedianScore
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3, bias=False), torch.nn.Linear(3, 2))
        >>> model[0].weight.data = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
        >>> GeometricMedianScore().run(netsurgery.trace(model)).scores["0"]
        tensor([ 5., 10.,  5.])
    """

    gives: ClassVar[frozenset[str]] = frozenset({"scores"})

    def run(self, network: Network) -> Network:
        """Lay the scores on the network."""
        network.require_weights(self)
        scores = {}
        found = uses(network)
        for group in network.prunable:
            squares = torch.zeros(group.size, group.size)
            for use in _making(found[group.name]):
                weight = accumulated(use.weight.value)
                flat = weight.movedim(use.axis, 0).reshape(weight.shape[use.axis], -1)
                for rows in positions_of(use.weight.axes[use.axis], group.channel):
                    vectors = flat[rows.to(flat.device)].flatten(1)
                    squares = squares.to(vectors) + _distances(vectors).square()
            scores[group.name] = squares.sqrt().sum(1)
        return network.with_scores(scores)


def _distances(vectors: Tensor) -> Tensor:
    """Distances between all rows, ``(n, d)`` to ``(n, n)``; by matrix products those of near rows would cancel."""
    pairs = torch.triu_indices(len(vectors), len(vectors), 1, device=vectors.device)
    found = vectors.new_zeros(len(vectors), len(vectors))
    found[pairs[0], pairs[1]] = torch.pdist(vectors)
    return found + found.T


@dataclass(frozen=True)
class RandomScore(Pass):
    """Scores drawn uniformly from [0, 1): the baseline of every comparison, and what tests prune by."""

    seed: int = 0

    gives: ClassVar[frozenset[str]] = frozenset({"scores"})

    def run(self, network: Network) -> Network:
        """Lay the scores on the network."""
        generator = torch.Generator().manual_seed(self.seed)
        return network.with_scores({g.name: torch.rand(g.size, generator=generator) for g in network.prunable})
