"""The effect of a removal on data: layer by layer, in one run of the original, and in the outputs of the network."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from math import prod

import torch
from torch import Tensor, nn

from netsurgery.capture.copies import named_tensors
from netsurgery.capture.inputs import Inputs
from netsurgery.capture.meta_run import home
from netsurgery.edit import Edit
from netsurgery.passes.agreement import squares
from netsurgery.passes.calibration import HELD_BACK, Samples, outputs_of
from netsurgery.passes.least_squares import Layer, Sums, layer_at, outputs_at, places_of, spatial, sums_of
from netsurgery.passes.progress import waiting
from netsurgery.passes.readers import Reader, hooked

__all__ = ["Lost"]

_LARGEST = 1 << 25  # bytes of a tensor: larger ones cost more time for pages of memory than for sums
_COMPARED = 64  # samples that the network as a whole is compared on, or a batch more


class Lost:
    """A network, the smaller one that a removal leaves, and samples in batches, of which every fifth is held back.

    Args:
        edit: the removal.
        small: the network that it leaves; other values are put into its tensors for a while.
        drawn: the samples.

    Attributes:
        tensors: the tensors of the smaller network, by name.
        name: the name of the network.
        largest: bytes of the largest tensor that a sample makes.
    """

    def __init__(self, edit: Edit, small: nn.Module, drawn: Samples):
        self.model, self.small, self.drawn = edit.network.model, small, drawn
        self.name = edit.network.model_name
        self.tensors, self.device = dict(named_tensors(small)), home(self.model)
        nodes = [node for node in edit.network.ir.nodes if isinstance(node.meta.get("shape"), torch.Size)]
        inputs = [node.meta["shape"] for node in nodes if node.op == "placeholder" and node.meta["shape"]]
        whole = max((4 * prod(node.meta["shape"]) for node in nodes if node.op == "call_function"), default=1)
        self.largest = max(1, whole // max(1, inputs[0][0] if inputs else 1))
        self.size = max(1, min(_LARGEST // self.largest, -(-drawn.count // HELD_BACK)))

    @property
    def count(self) -> int:
        """The number of batches."""
        return -(-self.drawn.count // self.size)

    def batches(self) -> Iterator[tuple[bool, Inputs]]:
        """The inputs of each batch; before them, True if it is held back."""
        every = min(HELD_BACK, self.count)
        for index, (inputs, _) in enumerate(self.drawn.batches(self.size, self.device)):
            yield index % every == every - 1, inputs

    def sums(self, readers: Sequence[Reader]) -> list[tuple[Sums | None, Sums | None]]:
        """For each layer the sums over batches that are not held back, and over those that are; None where none is.

        Inputs are those of the original, less what is removed.
        """
        fitted: dict[str, Sums] = {}
        kept_back: dict[str, Sums] = {}
        part = fitted
        generator = torch.Generator().manual_seed(0)

        def add(reader: Reader, x: Tensor, out: Tensor) -> None:
            module, refit = self.layer(reader), reader.weight is not None
            x, out = (_stay(module, t, at) for t, at in ((x, reader.inputs), (out, reader.kept)))
            places = places_of(module, out, generator) if refit else None
            some = sums_of(module, x, outputs_at(module, out, places), places, refit)
            part[reader.path] = part[reader.path] + some if reader.path in part else some

        with waiting("compensation", self.count) as step, hooked(self.model, readers, add):
            for held, inputs in self.batches():
                part = kept_back if held else fitted
                self.run(self.model, inputs)
                step()
        return [(fitted.get(reader.path), kept_back.get(reader.path)) for reader in readers]

    def targets(self, readers: Sequence[Reader]) -> dict[str, list[tuple[Tensor, Tensor | None]]]:
        """The outputs that each layer should return at some places, each time it runs, and the places."""
        found: dict[str, list[tuple[Tensor, Tensor | None]]] = {reader.path: [] for reader in readers}
        places: dict[str, Tensor | None] = {}
        generator = torch.Generator().manual_seed(0)

        def keep(reader: Reader, _: Tensor, out: Tensor) -> None:
            module = self.layer(reader)
            out = _stay(module, out, reader.kept)
            if reader.path not in places:
                places[reader.path] = places_of(module, out, generator)
            found[reader.path].append((outputs_at(module, out, places[reader.path]).clone(), places[reader.path]))

        with hooked(self.model, readers, keep):
            for _, inputs in self.batches():
                self.run(self.model, inputs)
        return found

    def layer(self, reader: Reader) -> Layer:
        """The layer of the smaller network."""
        return layer_at(self.small, reader.path)

    def gaps(self, values: Sequence[Mapping[str, Tensor]]) -> list[float]:
        """Measure the smaller network's outputs against the original's on samples that are held back.

        Args:
            values: values of its tensors, by name; tensors that are not named stay as they are.

        Returns:
            For each of these the mean square of the difference, relative to the mean square of the outputs; NaN where
            outputs are no numbers or have other shapes.
        """
        gathered: list[list[tuple[float, float]]] = [[] for _ in values]
        held = (inputs for which, inputs in self.batches() if which)
        for inputs in itertools.islice(held, -(-_COMPARED // self.size)):
            wanted = self.run(self.model, inputs)
            for one, found in zip(values, gathered, strict=True):
                with self.holding(one):
                    found.append(squares(wanted, self.run(self.small, inputs)) or (math.nan, math.nan))
        return [_relative(found) for found in gathered]

    @contextlib.contextmanager
    def holding(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Put other values into the smaller network's tensors for a while."""
        own = {name: self.tensors[name].clone() for name in values}
        try:
            for name, value in values.items():
                self.tensors[name].copy_(value)
            yield
        finally:
            for name, value in own.items():
                self.tensors[name].copy_(value)

    def run(self, network: nn.Module, inputs: Inputs) -> object:
        """The outputs of a network."""
        return outputs_of(network, inputs, self.device)


def _stay(module: Layer, t: Tensor, positions: Tensor | None) -> Tensor:
    """Inputs or outputs of a layer without the channels that are removed."""
    return t if positions is None else t.index_select(-1 - spatial(module), positions.to(t.device))


def _relative(found: Sequence[tuple[float, float]]) -> float:
    off, whole = (sum(column) for column in zip(*found, strict=True)) if found else (math.nan, math.nan)
    return off / whole if whole > 0 else math.nan
