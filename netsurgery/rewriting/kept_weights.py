"""New values of the parameters that keep computed weights as they are when units are removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from netsurgery.analysis.computed_weights import aligned_dims, scaled
from netsurgery.analysis.network import Network
from netsurgery.analysis.replay_without import replay_without
from netsurgery.analysis.weights import no_inputs, part
from netsurgery.errors import RewriteError
from netsurgery.positions import Positions

__all__ = ["rescaled"]


def rescaled(network: Network, tensors: Mapping[str, Tensor], keep: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """New values, at full size, of parameters, with which the entries that stay of computed weights keep their values.

    Args:
        tensors: of a model of the network, by name.
        keep: the units that stay, by group.

    Raises:
        RewriteError: a filter would keep nothing but zeros, and so have no direction any more.
    """
    units = {network[name].channel: kept for name, kept in keep.items()}
    places = Positions(units)
    found: dict[str, Tensor] = {}
    for program in network.programs:
        weights = [node for node in scaled(program, units) if node.meta["scaled_by"] not in found]
        weights = [node for node in weights if not tensors[node.meta["scaled_by"]].is_meta]  # without data, nothing is
        if not weights:
            continue
        # Other units, such as ranks, are gone in both runs: the weight is to lose them.
        full, cut = (
            replay_without(part(program, weights, whole), tensors, no_inputs(tensors), units) for whole in (True, False)
        )
        for node, wanted, left in zip(weights, full, cut, strict=True):
            name = node.meta["scaled_by"]
            if node.meta["limited"]:  # what is within its limit is not changed by it
                found[name] = wanted.reshape(tensors[name].shape)
                continue
            source = next(one for one in node.graph.nodes if one.op == "get_attr" and one.target == name)
            ratio = _ratio(node, source, *_kept(node, wanted, left, places))
            found[name] = tensors[name].detach() * ratio.reshape(tensors[name].shape).to(tensors[name])
    return found


def _kept(node: fx.Node, wanted: Tensor, left: Tensor, places: Positions) -> tuple[Tensor, Tensor]:
    """A computed weight before, and as the code computes it from what stays: both in float64, without what goes.

    Raises:
        RewriteError: the code makes no numbers of what stays.
    """
    dims = node.meta["dims"]
    stays, made = places.cut(wanted, dims), places.cut(left, dims)
    if not bool((made.isfinite() | ~stays.isfinite()).all()):
        raise RewriteError(
            f"some rows of a weight that is computed from '{node.meta['scaled_by']}' would keep nothing but zeros, "
            "and then have no norm to be divided by: keep other units"
        )
    return places.put(torch.zeros_like(wanted), dims, stays).double(), left.double()


def _ratio(node: fx.Node, source: fx.Node, wanted: Tensor, left: Tensor) -> Tensor:
    """The factor by which a parameter must be multiplied so that ``left`` becomes ``wanted``."""
    at = [place for place in aligned_dims(source, node) if place is not None]
    dots, squares = (wanted * left, left * left)
    for dim in sorted(set(range(left.dim())) - set(at), reverse=True):
        dots, squares = dots.sum(dim), squares.sum(dim)
    ratio = torch.where(squares > 0, dots / squares, 1.0)
    return ratio.permute([sorted(at).index(place) for place in at])
