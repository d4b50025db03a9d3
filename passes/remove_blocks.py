"""Removal of whole residual blocks: depth instead of width."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from netsurgery.analysis.network import Network
from netsurgery.arguments import is_count, is_real, require_counts
from netsurgery.edit import Edit
from netsurgery.errors import InputError
from netsurgery.outcome import Outcome
from netsurgery.passes.bundles import call_of
from netsurgery.pipeline import Pass

__all__ = ["RemoveBlocks"]


@dataclass(frozen=True)
class RemoveBlocks(Pass):
    """Drop residual blocks: those with the lowest scores, or some by name. The input of a block becomes its output.

    ``network.blocks`` lists those that can go. They are found on the recorded graph: modules whose output is their
    input plus branches that they compute from it, such as a decoder layer; ``rewrite`` says what becomes of names.

    Args:
        count: how many go.
        ratio: the share of the blocks that goes, in [0, 1), rounded to a number of blocks.
        blocks: which go, by path or pattern (``layers.1?``); then no scores are needed.

    Raises:
        InputError: none or several of these, a number out of range, a pattern that matches no block, a network without
            residual blocks, or scores that are not those of its blocks.

    Example:
        >>> import torch, netsurgery
        >>> from netsurgery.passes import RemoveBlocks
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> encoder = torch.nn.TransformerEncoder(layer, 3)
        >>> print(netsurgery.plan(encoder, [RemoveBlocks(blocks=["layers.1"])], torch.zeros(1, 4, 8)).diff())
        layers.1 removed
        parameters 1,800 -> 1,200 (66.7%)
        MACs 6,912 -> 4,608 (66.7%)
    """

    count: int | None = None
    ratio: float | None = None
    blocks: Sequence[str] | None = None

    needs: ClassVar[frozenset[str]] = frozenset({"block scores"})
    gives: ClassVar[frozenset[str]] = frozenset({"edit"})

    def __repr__(self) -> str:
        return call_of(self)

    def __post_init__(self) -> None:
        given = [name for name in ("count", "ratio", "blocks") if getattr(self, name) is not None]
        if len(given) != 1:
            raise InputError(f"RemoveBlocks takes one of count, ratio and blocks, got {' and '.join(given) or 'none'}")
        if self.count is not None and not is_count(self.count):
            raise InputError(f"RemoveBlocks(count={self.count!r}): a whole number of at least 0; a share is ratio=")
        require_counts(self, "count", least=0)
        if self.ratio is not None and not (is_real(self.ratio) and 0 <= self.ratio < 1):
            raise InputError(f"RemoveBlocks(ratio={self.ratio!r}): the share of the blocks to remove is in [0, 1)")
        if self.blocks is not None:
            named = [self.blocks] if isinstance(self.blocks, str) else [*self.blocks]
            if not named or not all(isinstance(one, str) for one in named):
                raise InputError(f"RemoveBlocks(blocks={self.blocks!r}): paths of blocks, such as ['layers.3']")
            object.__setattr__(self, "blocks", tuple(named))
            object.__setattr__(self, "needs", frozenset())

    def run(self, network: Network) -> Edit:
        """Choose the blocks that go."""
        paths = [block.path for block in network.blocks]
        if not paths:
            raise InputError(
                f"{network.model_name} has no residual block that can go: no module that runs once gives the sum of "
                "its input and of what it computes from it, and is read nowhere else"
            )
        dropped = self._named(network, paths) if self.blocks is not None else self._lowest(network, paths)
        asked = f"{self.ratio:.1%} of {len(paths)} blocks" if self.ratio is not None else _blocks(len(dropped), paths)
        return Edit(network, {}, dropped=dropped, outcomes=(Outcome(asked, _blocks(len(dropped), paths)),))

    def _named(self, network: Network, paths: Sequence[str]) -> tuple[str, ...]:
        matched = {one: fnmatch.filter(paths, one) for one in self.blocks or ()}
        if unknown := next((one for one, found in matched.items() if not found), None):
            raise InputError(
                f"RemoveBlocks(blocks=...): '{unknown}' matches no residual block of {network.model_name} that can go: "
                f"those are {', '.join(paths)}"
            )
        return tuple(path for path in paths if any(path in found for found in matched.values()))

    def _lowest(self, network: Network, paths: Sequence[str]) -> tuple[str, ...]:
        count = round(self.ratio * len(paths)) if self.ratio is not None else self.count or 0
        if count > len(paths):
            raise InputError(
                f"RemoveBlocks(count={count}): {network.model_name} has {len(paths)} blocks that can go: "
                f"{', '.join(paths)}"
            )
        if missing := next((path for path in paths if path not in network.block_scores), None):
            raise InputError(
                f"RemoveBlocks(count=...) goes by scores, and '{missing}' has none: put BlockInfluenceScore(data) "
                "before it, or name the blocks (blocks=[...])"
            )
        return tuple(sorted(paths, key=network.block_scores.__getitem__)[:count])


def _blocks(count: int, of: Sequence[str]) -> str:
    return f"{count} of {len(of)} blocks"
