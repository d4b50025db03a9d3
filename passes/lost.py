"""What a removal loses on data: layer by layer, in one run of the original, and in the outputs of the network."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from netsurgery.copying import named_tensors
from netsurgery.edit import Edit
from netsurgery.errors import InputError
from netsurgery.passes.least_squares import Sums, rows_of
from netsurgery.passes.readers import Reader
from netsurgery.passes.samples import Samples
from netsurgery.passes.waiting import waiting
from netsurgery.randomness import seeded
from netsurgery.tracing import RAISED_BY_MODELS, Inputs, home, tensors_in

__all__ = ["Lost"]

_LARGEST = 1 << 25  # bytes of a tensor: larger ones cost more time for pages of memory than for sums
_PARTS = 5  # of the samples one in five is held back
_COMPARED = 64  # samples that the network as a whole is compared on, or a batch more


class Lost:
    """A network, what a removal leaves of it, and samples in batches, of which every fifth is held back.

    Args:
        edit: the removal.
        small: what it leaves; its tensors are changed for a comparison, and changed back.
        drawn: the samples.
    """

    def __init__(self, edit: Edit, small: nn.Module, drawn: Samples):
        self.model, self.small, self.drawn = edit.network.model, small, drawn
        self.device = home(self.model)
        nodes = [node for node in edit.network.ir.nodes if isinstance(node.meta.get("shape"), torch.Size)]
        rows = next((node.meta["shape"][0] for node in nodes if node.op == "placeholder" and node.meta["shape"]), 1)
        largest = 4 * max((prod(node.meta["shape"]) for node in nodes if node.op == "call_function"), default=1)
        self.size = max(1, min(_LARGEST * rows // max(1, largest), -(-drawn.count // _PARTS)))

    def batches(self) -> Iterator[tuple[bool, Inputs]]:
        """Whether a batch is held back, and its inputs."""
        every = min(_PARTS, self.count)
        for index, (inputs, _) in enumerate(self.drawn.batches(self.size, self.device)):
            yield index % every == every - 1, inputs

    @property
    def count(self) -> int:
        """How many batches there are."""
        return -(-self.drawn.count // self.size)

    def sums(self, readers: Sequence[Reader]) -> list[tuple[Sums | None, Sums | None]]:
        """For each layer the sums over batches that are not held back, and over those that are; None where none is."""
        found: list[list[Sums | None]] = [[None] * len(readers), [None] * len(readers)]
        generator = torch.Generator().manual_seed(0)
        with waiting("compensation", self.count) as step:
            for held, inputs in self.batches():
                with self.listening(readers, found[held], generator):
                    self.run(self.model, inputs)
                step()
        return list(zip(*found, strict=True))

    @contextlib.contextmanager
    def listening(
        self, readers: Sequence[Reader], sums: list[Sums | None], generator: torch.Generator
    ) -> Iterator[None]:
        """Add what each layer lacks to its sums whenever it runs in the original."""
        with contextlib.ExitStack() as hooks:
            for index, reader in enumerate(readers):
                listener = _listener(self.small.get_submodule(reader.path), reader, generator, sums, index)
                layer = self.model.get_submodule(reader.path)
                hooks.callback(layer.register_forward_hook(listener, with_kwargs=True, prepend=True).remove)
            yield

    def gaps(self, values: Sequence[Mapping[str, Tensor]]) -> list[float]:
        """How far the smaller network's outputs are from the original's on samples that are held back.

        Args:
            values: of its tensors, by name; those that are not named stay as they are.

        Returns:
            For each of these the mean square of the difference, relative to the mean square of the outputs; NaN where
            outputs are no numbers or have other shapes.
        """
        tensors = dict(named_tensors(self.small))
        own = {name: tensors[name].clone() for one in values for name in one}
        sums: list[list[tuple[float, float]]] = [[] for _ in values]
        held = (inputs for which, inputs in self.batches() if which)
        for inputs in itertools.islice(held, -(-_COMPARED // self.size)):
            wanted = self.run(self.model, inputs)
            for one, found in zip(values, sums, strict=True):
                for name, old in own.items():
                    tensors[name].copy_(one.get(name, old))
                found.append(_squares(self.run(self.small, inputs), wanted))
        for name, old in own.items():
            tensors[name].copy_(old)
        return [_relative(found) for found in sums]

    def run(self, network: nn.Module, inputs: Inputs) -> Any:
        """The outputs of a network."""
        try:
            with seeded(0, self.device):
                return network(*inputs[0], **inputs[1])
        except RAISED_BY_MODELS as error:
            raise InputError(f"{type(self.model).__name__} does not run on the data: {error}") from error


def _listener(module: Any, reader: Reader, generator: torch.Generator, sums: list[Sums | None], index: int) -> Any:
    """A hook on a layer of the original: adds what the smaller one's outputs lack for the inputs that stay."""
    dim = -1 if isinstance(module, nn.Linear) else -1 - len(module.kernel_size)

    @torch.no_grad()  # also where the code turns gradients on
    def listener(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        x, wanted = args[0] if args else kwargs["input"], out
        if reader.inputs is not None:
            x = x.index_select(dim, reader.inputs.to(x.device))
        if reader.kept is not None:
            wanted = wanted.index_select(dim, reader.kept.to(out.device))
        for some in rows_of(module, x, wanted, reader.weight is not None, generator):
            before = sums[index]
            sums[index] = some if before is None else before + some

    return listener


def _squares(found: Any, wanted: Any) -> tuple[float, float]:
    """Squares of the difference of two networks' outputs, and of the outputs; NaN where there is none."""
    pairs = list(itertools.zip_longest(tensors_in(found), tensors_in(wanted)))
    if any(one is None or other is None or one.shape != other.shape for one, other in pairs):
        return math.nan, math.nan
    floats = [(one.double(), other.double()) for one, other in pairs if one.is_floating_point()]
    off, whole = (
        sum(float(t.square().sum()) for t in some)
        for some in ([one - other for one, other in floats], [other for _, other in floats])
    )
    return off, whole


def _relative(found: Sequence[tuple[float, float]]) -> float:
    off, whole = (sum(column) for column in zip(*found, strict=True)) if found else (math.nan, math.nan)
    return off / whole if whole > 0 else math.nan
