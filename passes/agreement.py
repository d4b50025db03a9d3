"""A model compared with the smaller one on samples: losses, agreement of the chosen classes, difference of outputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from netsurgery.capture.inputs import tensors_in
from netsurgery.capture.meta_run import home
from netsurgery.edit import Edit
from netsurgery.errors import InputError
from netsurgery.fidelity import Measured
from netsurgery.passes.calibration import Samples, draw_with_or_without_targets, in_eval_mode, outputs_of
from netsurgery.passes.losses import Loss, check_targets, ignored_by, logits_in, loss_of
from netsurgery.passes.progress import without_log
from netsurgery.rewriting.surgery import rewrite

__all__ = ["MOST", "compared", "measure", "outputs_by_batch", "reported", "squares"]

MOST = 512  # samples that a plan reports on
_ALL = 20_000_000  # numbers of inputs that a plan reports on: 132 pictures of 224 pixels
_LEAST = 64  # samples that it reports on however large they are
_NUMBERS = 1 << 20  # numbers of inputs in a batch
_ROWS = 8, 32  # samples in a batch, at least and at most


def measure(
    model: nn.Module,
    small: nn.Module,
    data: object,
    loss: Loss | None = None,
    samples: int = MOST,
    seed: int = 0,
    classes: bool = True,
) -> Measured:
    """Run a model and the smaller one on the same samples, in eval mode, and compare their outputs.

    ``plan`` does so with the data of the first of its passes that holds some, and ``edit.summary()`` says what it
    found. On samples that scores were chosen by, what is left looks better than on others: measure on those, too.

    Args:
        model: any module; it and the smaller one stay as they are.
        small: takes the same inputs and gives outputs of the same shapes.
        data: with labels, as for ``netsurgery.passes.calibration.draw_samples``; or without, as for ``draw_inputs``.
        loss: ``loss(outputs, targets)``, the mean over the samples, or one number for each ``(n,)``. By default the
            cross-entropy of logits ``(n, classes, ...)``, where the targets fit these.
        samples: how many are drawn, class-balanced where there are classes; two forward passes over them.
        seed: fixes the samples, and the random numbers that the models draw.
        classes: whether outputs may be logits. Pass False where they are other numbers, such as those of a regression
            or an embedding: then their relative difference is reported, and a loss where one is given.

    Returns:
        The mean losses; agreement and KL where outputs are logits: a tensor or an entry ``logits``, of which the labels
        are classes, or, without labels, ``(n, classes)``; and the relative difference of all outputs. Classes that the
        original masks (logits of -inf) have no weight in KL, nor in the difference of outputs, which is over numbers
        that are finite in the original; what the smaller one alone masks makes both infinite.

    Raises:
        InputError: no samples, or none in one of these forms; a model does not run on them, or has no weights; or a
            loss of another shape.

    Example:
        >>> import torch, netsurgery
        >>> from netsurgery.passes import measure
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> print(measure(model, model, torch.randn(64, 4)))
        on 64 samples: agreement with the original 100.0% (KL 0.00), outputs differ by 0%
    """
    drawn = draw_with_or_without_targets(data, samples, seed, ignored_by(loss))
    return compared(model, small, drawn, loss, classes=classes)


def outputs_by_batch(model: nn.Module, drawn: Samples) -> Iterator[object]:
    """Run a model on samples in eval mode: the outputs of each batch."""
    device = home(model)
    with in_eval_mode(model), torch.no_grad():
        for inputs, _ in drawn.batches(_rows(drawn), device):
            yield outputs_of(model, inputs, device)


def compared(
    model: nn.Module,
    small: nn.Module,
    drawn: Samples,
    loss: Loss | None = None,
    before: Sequence[object] | None = None,
    classes: bool = True,
) -> Measured:
    """Do as ``measure``, on samples that are drawn already; without targets there is no loss.

    Args:
        before: the outputs of ``outputs_by_batch`` for the model, if these are known.
    """
    if any(tensor.is_meta for one in (model, small) for tensor in one.parameters()):
        raise InputError(f"{type(model).__name__} has no weights, it is on the meta device")
    sums, device = _Sums(drawn, loss, classes), home(model)
    with in_eval_mode(model), in_eval_mode(small), torch.no_grad():
        for index, (inputs, targets) in enumerate(drawn.batches(_rows(drawn), device)):
            own = outputs_of(model, inputs, device) if before is None else before[index]
            sums.add(own, outputs_of(small, inputs, device), targets)
    return sums.measured()


def reported(
    model: nn.Module,
    edit: Edit,
    drawn: Samples,
    loss: Loss | None = None,
    before: Sequence[object] | None = None,
    classes: bool = True,
) -> Measured:
    """Compare a model with what an edit leaves of it, as ``compared``; of large samples the first alone."""
    with without_log():
        small = rewrite(model, edit)
    return compared(model, small, _first_samples(drawn) if before is None else drawn, loss, before, classes)


def _first_samples(drawn: Samples) -> Samples:
    """The first samples: as many as a report may take time for."""
    count = min(drawn.count, max(_LEAST, int(_ALL / _numbers_in(drawn))))
    return drawn.of(torch.arange(count))


def _rows(drawn: Samples) -> int:
    """Samples that go through at once: few where they are large, for the caches of a CPU."""
    return int(min(max(_NUMBERS / _numbers_in(drawn), _ROWS[0]), _ROWS[1]))


def _numbers_in(drawn: Samples) -> float:
    """The size of the largest input of a sample."""
    given = [t for t in pytree.tree_leaves(drawn.inputs) if isinstance(t, Tensor)]
    return max((t.numel() for t in given), default=1) / drawn.count


@dataclass
class _Sums:
    """Sums over batches of the losses and outputs of two networks."""

    drawn: Samples
    own: Loss | None
    classes: bool

    def __post_init__(self) -> None:
        self.losses = [0.0, 0.0]
        self.positions = self.same = self.numbers = self.finite = 0
        self.broken = False  # the original's outputs hold a NaN
        self.divergence = self.difference = self.norm = 0.0
        self.no_loss = self.no_outputs = ""  # why there is none to compare

    def add(self, before: object, after: object, targets: object) -> None:
        """Add the outputs of a batch."""
        self._add_losses(before, after, targets)
        before, after = _entries_in_both(before, after)
        found, numbers = squares(before, after), _numbers(before)
        if found is None:
            self.no_outputs = "outputs have other shapes, such as other numbers of boxes: they cannot be compared"
            return
        self.difference, self.norm = self.difference + found[0], self.norm + found[1]
        self.numbers += sum(t.numel() for t in numbers)
        self.finite += sum(int(t.isfinite().sum()) for t in numbers)
        self.broken = self.broken or any(bool(t.isnan().any()) for t in numbers)
        logits, changed = (logits_in(before), logits_in(after)) if self.classes else (None, None)
        dim = None if logits is None else _classes(logits, targets, self.drawn.targets, ignored_by(self.own))
        if logits is not None and changed is not None and dim is not None:
            self._add_choices(logits.movedim(dim, -1), changed.movedim(dim, -1), targets)

    def _add_losses(self, before: object, after: object, targets: object) -> None:
        if targets is None or not (self.own or self.classes):
            return
        if self.own is None:
            try:
                for outputs in (before, after):
                    check_targets(outputs, targets, self.drawn.targets)
            except InputError as reason:
                self.no_loss = f"no loss: {reason}"
                return
        rows = len(pytree.tree_leaves(targets)[0])
        for at, outputs in enumerate((before, after)):
            self.losses[at] += float(loss_of(outputs, targets, self.own).double().mean()) * rows

    def _add_choices(self, logits: Tensor, others: Tensor, targets: object) -> None:
        """Add the choices of both networks, from logits ``(..., classes)``, at the positions that have a label."""
        if isinstance(targets, Tensor) and not targets.is_floating_point():
            said = (targets != ignored_by(self.own)).reshape(logits.shape[:-1])
            logits, others = logits[said], others[said]
        p, q = (t.double().log_softmax(-1).flatten(0, -2) for t in (logits, others))
        known = ~p.isnan().any(-1)  # where every class is masked there is none to agree on
        p, q = p[known], q[known]
        none = q.isnan()
        self.positions += len(p)
        self.same += int(((p.argmax(-1) == q.argmax(-1)) & ~none.any(-1)).sum())
        share = p.exp()
        gap = torch.where(none, math.inf, p - q)
        self.divergence += float(torch.where(share > 0, share * gap, 0.0).sum())  # masked classes are of no weight

    def measured(self) -> Measured:
        """The result of all batches so far."""
        count, loss = self.drawn.count, None
        if self.drawn.targets is not None and (self.own or self.classes) and not self.no_loss:
            loss = self.losses[0] / count, self.losses[1] / count
        if not self.no_outputs and not self.numbers:
            self.no_outputs = "the outputs hold no numbers to compare"
        elif not self.no_outputs and (self.broken or not self.finite):
            self.no_outputs = "the outputs are not finite on the data"
        why = "; ".join(filter(None, (self.no_loss, self.no_outputs)))
        if self.no_outputs:
            return Measured(count, loss, why=why)
        error = math.sqrt(self.difference / self.norm) if self.norm else 0.0 if not self.difference else math.inf
        if not self.positions:
            return Measured(count, loss, error=error, why=why)
        return Measured(count, loss, self.same / self.positions, max(0.0, self.divergence / self.positions), error, why)


def squares(before: object, after: object) -> tuple[float, float] | None:
    """Sums of squares: of the difference of two networks' outputs, and of the original's; None where shapes differ.

    They are summed over entries that are finite in the original: masks are infinite. An entry that is infinite or NaN
    in the smaller network alone differs infinitely.
    """
    ones, others = _numbers(before), _numbers(after)
    if [one.shape for one in ones] != [other.shape for other in others]:
        return None
    off = whole = 0.0
    for one, other in zip(ones, others, strict=True):
        wide = torch.complex128 if one.is_complex() else torch.float64
        meant = one.isfinite()
        own, found = one[meant].to(wide), other[meant].to(wide)
        off += float((own - found).abs().square().sum())
        whole += float(own.abs().square().sum())
    return math.inf if math.isnan(off) else off, whole


def _entries_in_both(before: object, after: object) -> tuple[object, object]:
    """Outputs by name without those whose shapes differ, if some do not: a network of fewer blocks caches less."""
    if not isinstance(before, Mapping) or not isinstance(after, Mapping) or squares(before, after) is not None:
        return before, after
    names = [name for name in before if name in after and squares(before[name], after[name]) is not None]
    if not any(_numbers(before[name]) for name in names):
        return before, after
    return {name: before[name] for name in names}, {name: after[name] for name in names}


def _numbers(outputs: object) -> list[Tensor]:
    return [t for t in tensors_in(outputs) if t.is_floating_point() or t.is_complex()]


def _classes(logits: Tensor, targets: object, everything: object, ignored: int) -> int | None:
    """The dimension of logits that holds classes; None if they are no logits."""
    if targets is None:
        return 1 if logits.dim() == 2 and logits.shape[1] > 1 else None
    if not isinstance(targets, Tensor) or not isinstance(everything, Tensor):
        return None
    if targets.is_floating_point():
        try:
            check_targets(logits, targets, everything)
        except InputError:
            return None
        return 1
    labels = everything[everything != ignored]
    for dim in (1, -1):
        rest = [size for at, size in enumerate(logits.shape) if at != dim % logits.dim()]
        fits = list(targets.shape) == rest and logits.shape[dim] > 1
        if fits and (not len(labels) or 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[dim]):
            return dim
    return None
