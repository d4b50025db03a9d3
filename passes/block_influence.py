"""Scores of residual blocks by the change that they make to their inputs."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from netsurgery.analysis.blocks import Block, at
from netsurgery.analysis.network import Network
from netsurgery.axes import inner, leaves
from netsurgery.capture.meta_run import home
from netsurgery.errors import InputError
from netsurgery.passes.calibration import in_eval_mode, outputs_of
from netsurgery.passes.losses import Loss
from netsurgery.passes.reporting import DataPass

__all__ = ["BlockInfluenceScore"]


@dataclass(frozen=True)
class BlockInfluenceScore(DataPass):
    """Score residual blocks: 1 - cosine similarity of a block's input and output, its mean over positions.

    The similarity of the features ``(channels,)`` is taken at each position of each sample: each token, each pixel. A
    block with a low score passes its input on nearly unchanged. The scores are laid on the network as ``block_scores``,
    by path, and ``RemoveBlocks`` ranks blocks by them. Padded positions count like others: pass texts of equal length.

    Args:
        data: inputs, with or without labels, as for ``netsurgery.passes.calibration.draw_inputs``.
        samples: how many are drawn.
        seed: fixes the samples.
        loss: as for ``netsurgery.passes.measure``, by which ``plan`` measures what is left.
        classes: likewise.
        rows: samples that go through at once.

    Source: Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", arXiv
    2403.03853, for decoder layers. Pixels as positions are our choice.

    Raises:
        InputError: no data, a number out of range, a network without residual blocks or without weights, data that the
            model does not run on, or features that are not finite.

    Example:
        >>> import torch, netsurgery
        >>> from netsurgery.passes import BlockInfluenceScore, RemoveBlocks
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> encoder, data = torch.nn.TransformerEncoder(layer, 3), torch.randn(6, 4, 8)
        >>> short = netsurgery.apply(encoder, [BlockInfluenceScore(data), RemoveBlocks(count=1)], data[:1])
        >>> len(short.layers)
        2
    """

    data: object = field(repr=False, compare=False)
    samples: int = 64
    seed: int = 0
    loss: Loss | None = field(default=None, repr=False)
    classes: bool = True
    rows: int = 8

    gives: ClassVar[frozenset[str]] = frozenset({"block scores"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data is None:
            raise InputError("BlockInfluenceScore(data=None): needs data to run the model on")

    def run(self, network: Network) -> Network:
        """Run the model on samples, and lay the scores on its blocks."""
        if not network.blocks:
            raise InputError(f"{network.model_name} has no residual blocks that can go, so there is nothing to score")
        network.require_weights(self)
        model, drawn = network.model, self.drawn()
        means = {block.path: _Mean(block) for block in network.blocks}
        device = home(model)
        with torch.no_grad(), in_eval_mode(model), _watched(model, means):
            for inputs, _ in drawn.batches(self.rows, device):
                outputs_of(model, inputs, device)
        scores = {path: 1 - mean.value for path, mean in means.items()}
        if bad := [path for path, score in scores.items() if not math.isfinite(score)]:
            raise InputError(f"the input or output of '{bad[0]}' is not finite on the data: look at its weights")
        return dataclasses.replace(network, block_scores=scores)


class _Mean:
    """The similarity of the input and output of a block, averaged over positions."""

    def __init__(self, block: Block):
        self.block, self.total, self.count = block, 0.0, 0
        self.features = _features(block)
        self.given: Tensor | None = None

    def before(self, _: nn.Module, args: object, kwargs: object) -> None:
        """Keep the input: the block may write to it."""
        self.given = at(self.block.given, (args, kwargs)).detach().clone()

    def after(self, _: nn.Module, args: object, kwargs: object, out: object) -> None:
        """Compare it with the output."""
        assert self.given is not None
        given, result = self._by_position(self.given), self._by_position(at(self.block.returned, out))
        found = torch.nn.functional.cosine_similarity(given, result, dim=-1)  # (positions,)
        self.total, self.count, self.given = self.total + float(found.sum()), self.count + found.numel(), None

    def _by_position(self, x: Tensor) -> Tensor:
        positions = [dim for dim in range(x.dim()) if dim not in self.features]
        ordered = x.detach().double().permute(*positions, *self.features)
        return ordered.flatten(len(positions)).flatten(0, -2)

    @property
    def value(self) -> float:
        """The average so far."""
        return self.total / self.count if self.count else math.nan


def _features(block: Block) -> list[int]:
    """The dimensions of a block's input that hold features; the last where none is known."""
    dims = block.source.meta["dims"]
    return [i for i, axis in enumerate(dims) if any(map(inner, leaves(axis)))] or [len(dims) - 1]


@contextlib.contextmanager
def _watched(model: nn.Module, means: dict[str, _Mean]) -> Iterator[None]:
    hooks: list[RemovableHandle] = []
    try:
        for path, mean in means.items():
            module = model.get_submodule(path)
            hooks.append(module.register_forward_pre_hook(mean.before, with_kwargs=True))
            hooks.append(module.register_forward_hook(mean.after, with_kwargs=True))
        yield
    finally:
        for hook in hooks:
            hook.remove()
