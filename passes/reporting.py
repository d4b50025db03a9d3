"""Passes that hold data: they draw samples from it, and plans are measured on these."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from netsurgery.arguments import require_counts
from netsurgery.edit import Edit
from netsurgery.errors import InputError
from netsurgery.fidelity import Measured
from netsurgery.passes.agreement import MOST, reported
from netsurgery.passes.calibration import Samples, draw_inputs, draw_samples, reads_once
from netsurgery.passes.losses import Loss, ignored_by
from netsurgery.pipeline import Pass

__all__ = ["DataPass"]


class DataPass(Pass):
    """A pass that holds data, which plans are measured on. Derive a frozen dataclass with these fields.

    Attributes:
        data: the source of samples, read several times; None: nothing is measured.
        samples: how many are drawn.
        seed: fixes the samples.
        loss: as for ``netsurgery.passes.measure``.
        classes: likewise.
        labelled: whether samples are drawn with their labels, class-balanced.
    """

    data: object
    samples: int
    seed: int = 0
    loss: Loss | None = None
    classes: bool = True
    labelled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_counts(self, *(name for name in ("samples", "rows", "memory") if hasattr(self, name)))
        self.check_rereadable("data")

    def check_rereadable(self, name: str) -> None:
        """Make sure that the data in a field gives the same samples whenever it is read.

        Raises:
            InputError: it is an iterator, or what gives the same one each time.
        """
        if reads_once(data := getattr(self, name)):
            raise InputError(
                f"{type(self).__name__}({name}=...): {type(data).__name__} can be read once, and a plan reads it "
                "several times: pass a list of its batches, or the DataLoader or Dataset that it comes from"
            )

    def drawn(self, most: int | None = None) -> Samples:
        """Draw the samples, at most so many."""
        count = self.samples if most is None else min(self.samples, most)
        if self.labelled:
            return draw_samples(self.data, count, self.seed, ignored_by(self.loss))
        return draw_inputs(self.data, count, self.seed)

    def measure(self, model: nn.Module, edit: Edit) -> Measured | None:
        """Measure on the samples how far the smaller network is from the model."""
        if self.data is None:
            return None
        return reported(model, edit, self.drawn(MOST), self.loss, classes=self.classes)
