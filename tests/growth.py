"""Random growth, and what must hold of it: no output changes."""

import random
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

import netsurgery
from netsurgery import Copy, Edit, Network, New
from netsurgery.analysis.growth import obstacles
from netsurgery.capture.inputs import tensors_in
from netsurgery.units import listed


@dataclass(frozen=True)
class RandomGrowth(netsurgery.Pass):
    """Add units of every sort in random places to every group that can grow; ``left`` gets the others' reasons."""

    seed: int = 0
    shares: tuple[float, ...] = (0.3, 0.0, -1.5)
    left: dict[str, str] = field(default_factory=dict, compare=False)

    gives: ClassVar[frozenset[str]] = frozenset({"edit"})

    def run(self, network: Network) -> Edit:
        draw, keep = random.Random(self.seed), dict[str, tuple[Any, ...]]()
        self.left.clear()
        bundles = dict.fromkeys(network.equal_to(group.name) for group in network.prunable)
        for names in bundles:
            if locked := [name for name in names if network[name].locked]:
                self.left.update(dict.fromkeys(names, f"keeps as many units as {locked[0]}"))
                continue
            more = draw.randint(1, 3)
            for name in names:
                keep[name] = listed(name, self._some(size := network[name].size, more, draw), size)
        twice = {name for one in obstacles(network, keep) for name in network.equal_to(one)}
        for name in twice:
            units = [one for unit in range(network[name].size) for one in (unit, Copy(unit))]
            keep[name] = listed(name, units, network[name].size)
        while found := obstacles(network, keep):
            for one, why in found.items():
                self.left.update({name: why for name in network.equal_to(one) if keep.pop(name, None)})
        return Edit(network, keep)

    def _some(self, size: int, more: int, draw: random.Random) -> tuple[Any, ...]:
        units: list[Any] = list(range(size))
        for _ in range(more):
            unit = draw.randrange(size)
            added = draw.choice([New(seed=draw.randrange(9)), Copy(unit), Copy(unit, share=draw.choice(self.shares))])
            units.insert(draw.randrange(len(units) + 1), added)
        return tuple(units)


def check_growth(
    model: nn.Module, inputs: tuple[Any, ...], tolerance: float, growth: RandomGrowth
) -> tuple[Edit, dict[str, str]]:
    """Grow at random: outputs, what is left of the old units, and sizes are as they must be.

    Returns:
        The edit, and the groups that cannot grow, with reasons.
    """
    edit = netsurgery.plan(model, [growth], inputs)
    grown = netsurgery.rewrite(model, edit)
    assert list(grown.state_dict()) == list(model.state_dict())
    assert sum(p.numel() for p in grown.parameters()) == edit.after.params
    assert (edit.after.params > edit.before.params) == bool(edit.keep)
    with torch.no_grad():
        wanted, found = tensors_in(model(*inputs)), tensors_in(grown(*inputs))
    for one, other in zip(wanted, found, strict=True):
        assert one.shape == other.shape
        if one.numel() and one.is_floating_point():
            assert (one - other).abs().max() <= tolerance * one.abs().max().clamp(min=1e-30)
    assert netsurgery.verify(model, grown, edit, inputs) <= tolerance
    return edit, dict(growth.left)
