"""Layers fitted one after the other, each to its inputs in the smaller network whose earlier layers are fitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from netsurgery.passes.least_squares import outputs_at, sums_of
from netsurgery.passes.lost import Lost
from netsurgery.passes.readers import Reader, hooked

__all__ = ["InOrder"]


class InOrder:
    """Fits layers in one run on all samples at once: each layer when it runs.

    Args:
        lost: both networks and the samples.
        readers: the layers, each with the ridge of its refit, None for a constant alone.
    """

    def __init__(self, lost: Lost, readers: Mapping[str, tuple[Reader, float | None]]):
        self.lost, self.readers = lost, readers
        held = [held for held, _ in lost.batches()]
        self.fitted = [index for index, which in enumerate(held) if not which]
        self.all = list(range(len(held)))
        found = lost.targets([reader for reader, _ in readers.values()])
        self.targets = {path: runs for path, runs in found.items() if len(runs) == len(held)}  # runs once in each

    def fit(self, values: Mapping[str, Tensor], batches: Sequence[int]) -> dict[str, Tensor]:
        """New values of the smaller network's tensors, by name.

        Args:
            values: those of layers that cannot be fitted in order, because they run more or less than once.
            batches: numbers of those that are fitted to.
        """
        lost, size = self.lost, self.lost.size
        rows = torch.cat([torch.arange(n * size, min((n + 1) * size, lost.drawn.count)) for n in batches])
        inputs, _ = lost.drawn.rows(rows, lost.device)
        begin = {}
        for path, (reader, _) in self.readers.items():
            known = {} if path in self.targets else values
            begin.update({name: known.get(name, lost.tensors[name]).clone() for name in reader.names})

        def correct(reader: Reader, x: Tensor, out: Tensor) -> Tensor | None:
            if reader.path not in self.targets:
                return None
            module, ridge = lost.layer(reader), self.readers[reader.path][1]
            runs = [self.targets[reader.path][n] for n in batches]
            wanted, places = torch.cat([run for run, _ in runs]), runs[0][1]
            if outputs_at(module, out, places).shape != wanted.shape:
                return None
            sums = sums_of(module, x, wanted, places, reader.weight is not None)
            if not sums.finite:
                return None
            change = sums.constant() if ridge is None else sums.refit(ridge, reader.shift is not None)
            for name, value in reader.changed(lost.tensors, change).items():
                lost.tensors[name].copy_(value)
            corrected: Tensor = module.forward(x)
            return corrected

        readers = [reader for reader, _ in self.readers.values()]
        with lost.holding(begin), hooked(lost.small, readers, correct):
            lost.run(lost.small, inputs)
            return {name: lost.tensors[name].clone() for name in begin}
