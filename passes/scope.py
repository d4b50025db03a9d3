"""The groups that are scored: those of named modules, and those that a later removal may cut."""

from __future__ import annotations

import torch

from netsurgery.analysis.network import Network
from netsurgery.errors import InputError
from netsurgery.passes.bundles import Choice
from netsurgery.passes.patterns import Chosen, Pattern
from netsurgery.passes.removal import PruneChannels
from netsurgery.passes.selection import belongs, is_touched

__all__ = ["scoped"]


def scoped(
    network: Network, include: tuple[Pattern, ...], exclude: tuple[Pattern, ...], removal: PruneChannels | None
) -> Network:
    """The network with locks on all groups that are not to be scored.

    Args:
        include: as for ``PruneChannels``: only groups that matching modules alone produce; all, where there are none.
        exclude: likewise; no group that a matching module produces or carries.
        removal: only groups that this may take units of.

    Raises:
        InputError: a pattern matches no module, or no group is left.
    """
    included, excluded = Chosen(network, include), Chosen(network, exclude)
    left = {
        group.name
        for group in network.prunable
        if (not include or belongs(group, included, include)) and not is_touched(group, excluded)
    }
    if removal is not None:
        left &= _taken(network, removal)
    if not left:
        raise InputError(
            f"LossIncreaseScore: no group of {network.model_name} is left to be scored: "
            "loosen include, exclude and removal; print(network) lists the groups"
        )
    return network.with_locked({g.name: "is not scored" for g in network.prunable if g.name not in left})


def _taken(network: Network, removal: PruneChannels) -> set[str]:
    """The groups that a removal may take units of, whatever their scores."""
    scores = {group.name: torch.arange(group.size, dtype=torch.float64) for group in network.prunable}
    bundles = Choice(removal, network.with_scores(scores)).bundles
    return {group.name for bundle in bundles if bundle.most for group in bundle.groups}
