"""Random removals, and what must hold of each of them."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

import netsurgery
from netsurgery.errors import RewriteError
from netsurgery.verification import permuted_difference


@dataclass(frozen=True)
class RandomKeep(netsurgery.Pass):
    """Keep a random set of units of every group that is not locked; ``share`` of all units, or any number if None."""

    seed: int = 0
    share: float | None = None

    gives: ClassVar[frozenset[str]] = frozenset({"edit"})

    def run(self, network: netsurgery.Network) -> netsurgery.Edit:
        generator = torch.Generator().manual_seed(self.seed)
        counts: dict[str, int] = {}
        for group in network.prunable:
            some = int(torch.randint(1, group.size, (), generator=generator)) if group.size > 1 else 1
            counts[group.name] = some if self.share is None else max(1, round(self.share * group.size))
        for tied in network.equal_sizes:
            if any(name in counts for name in tied):
                counts.update(dict.fromkeys(tied, counts[tied[0]]))  # fails where only some of them are locked
        keep = {}
        for name, count in counts.items():
            chosen = torch.randperm(network[name].size, generator=generator)[:count]
            keep[name] = tuple(sorted(chosen.tolist()))
        return netsurgery.Edit(network, keep)


def parameters(model: nn.Module) -> int:
    """Number of parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything a model holds."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@dataclass
class Tally:
    """What became of edits made by hand: none of their sizes was planned, so that a few may be refused."""

    carried_out: int = 0
    refused: int = 0

    @property
    def share(self) -> float:
        """The share that was refused."""
        return self.refused / (self.carried_out + self.refused)


def check(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    tolerance: float,
    seed: int = 0,
    share: float | None = None,
    tally: Tally | None = None,
) -> tuple[nn.Module, netsurgery.Edit]:
    """Remove units at random and hold the result to everything that must be true of it.

    Args:
        share: of the units of each group that stay; by default a random one.
        tally: counts refusals of the edit made by hand, for the caller to bound; without one, none may be refused.

    Returns:
        The small model and the edit, for what else a test wants to know.
    """
    before = snapshot(model)
    network = netsurgery.trace(model, inputs)
    assert permuted_difference(model, network, inputs, seed) < tolerance
    edit = netsurgery.plan(model, [RandomKeep(seed, share)], inputs)
    small = netsurgery.rewrite(model, edit)
    assert netsurgery.verify(model, small, edit, inputs) < tolerance
    check_unplanned(model, RandomKeep(seed, share).run(network), inputs, tolerance, tally)
    assert isinstance(small, getattr(type(model), "netsurgery_class", type(model)))
    assert list(small.state_dict()) == list(before)
    assert parameters(small) == edit.after.params
    assert (parameters(small) < parameters(model)) == bool(edit.keep)
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in model.parameters()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return small, edit


def check_unplanned(
    model: nn.Module, edit: netsurgery.Edit, inputs: tuple[Tensor, ...], tolerance: float, tally: Tally | None
) -> None:
    """Sizes that nothing has planned are carried out exactly or, where refusals are counted, refused."""
    try:
        small = netsurgery.rewrite(model, edit)
    except RewriteError:
        if tally is None:
            raise
        tally.refused += 1
        return
    assert netsurgery.verify(model, small, edit, inputs) < tolerance
    if tally is not None:
        tally.carried_out += 1
