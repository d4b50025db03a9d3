"""A student learns from a teacher's outputs and features, in any training loop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netsurgery.arguments import is_real
from netsurgery.errors import InputError
from netsurgery.kernels.criteria import accumulator
from netsurgery.passes.calibration import IGNORED
from netsurgery.passes.hints import Hints
from netsurgery.passes.losses import Loss, form_of, ignored_by, logits_in

__all__ = ["Distillation"]


class Distillation(nn.Module):
    """The loss ``(1 - alpha) * CE + alpha * T^2 * KL(softmax(teacher / T) || softmax(student / T)) + hints``.

    CE is the cross-entropy of the student's logits. It and KL are means over the positions that have a label, computed
    in float32 (float64 if logits are); -100 is no label. Nothing flows back into the teacher. Call it as
    ``distillation(student_outputs, teacher_outputs, targets)``. Outputs are logits ``(n, classes, ...)``, or hold such
    under ``logits``; targets are class indices ``(n, ...)``. Without targets (None) CE is left out, and all positions
    count: the loss is ``alpha * T^2 * KL + hints``, so that batches with and without labels can take turns.

    Args:
        temperature: T, above 0.
        alpha: the share of the teacher, in [0, 1]; 0 and 1 leave the other term out.
        loss: ``loss(logits, targets)`` in place of the cross-entropy, such as
            ``nn.CrossEntropyLoss(label_smoothing=0.1)``: the mean, or one number for each sample ``(n,)``. It gets the
            student's logits with the classes in dimension 1, and targets as they are, which may then be anything;
            class indices equal to its ``ignore_index`` are left out of KL, too.
        dim: the dimension of logits that holds the classes. None: 1 of two; of more, the one that targets lack.
        hints: modules of the teacher by those of the student, such as ``{"stages.1": "layer2"}``: the mean squared
            differences of their features (of a tuple, the first) are added up. They must run once in each run.
        student: with hints: where the modules are. Hooks collect features until ``close``, or the end of a ``with``
            block. Build it before the first call of a model in torch.compile, and anew when the modules were replaced.
        teacher: likewise.
        hint_weight: the factor of the hints, at least 0.
        normalize: divide the features of each sample by their root mean square first.
        project: where channels differ, learn a layer that maps the student's to the teacher's: 1x1 convolutions for
            features ``(n, channels, ...)`` of four and five dimensions, linear layers for ``(n, ..., channels)`` of two
            and three. Sizes in space are averaged to the smaller. Give ``distillation.parameters()`` to the optimizer,
            and put the distillation in DistributedDataParallel where the student is.
        example_inputs: with hints: what both networks are run on once, in eval mode, to compare shapes and to make the
            layers of ``project``: a tuple of positional inputs, one tensor, or a dictionary.

    Raises:
        InputError: an argument out of range; hints that are no modules, or whose features differ in shape. When it is
            called: outputs that are no logits, or not of the same classes; targets that are no class indices; a module
            that did not run.

    Example:
        >>> import torch
        >>> from netsurgery.passes import Distillation
        >>> student = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> teacher = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> with Distillation(hints={"1": "1"}, student=student, teacher=teacher, project=True, example_inputs=x) as d:
        ...     optimizer = torch.optim.SGD([*student.parameters(), *d.parameters()], 0.1)
        ...     with torch.no_grad():
        ...         wanted = teacher(x)
        ...     d(student(x), wanted, y).backward()
        ...     optimizer.step()

    Source: Hinton, Vinyals, Dean, arXiv 1503.02531: temperature, and T^2, by which gradients stay of one size. Hints:
    Romero et al., FitNets, arXiv 1412.6550: a learnt layer on the student's features, trained as a stage before. Ours:
    hints in one sum with the rest, ``normalize``, pooling, and the defaults of temperature and alpha.
    """

    def __init__(
        self,
        temperature: float = 4.0,
        alpha: float = 0.5,
        *,
        loss: Loss | None = None,
        dim: int | None = None,
        hints: Mapping[str, str] | None = None,
        student: nn.Module | None = None,
        teacher: nn.Module | None = None,
        hint_weight: float = 1.0,
        normalize: bool = False,
        project: bool = False,
        example_inputs: object = None,
    ):
        super().__init__()
        _check_number("temperature", temperature, temperature != 0, "a number above 0")
        _check_number("alpha", alpha, True, "the share of the teacher, a number in [0, 1]", most=1)
        _check_number("hint_weight", hint_weight, True, "a number of at least 0")
        self.temperature, self.alpha, self.hint_weight = float(temperature), float(alpha), float(hint_weight)
        self.loss, self.dim = loss, dim
        self.hints: Hints | None = None
        self._labels_checked = False  # the check of their range makes a GPU wait, so it runs once
        if not hints:
            return
        if not isinstance(hints, Mapping) or not all(isinstance(one, str) for pair in hints.items() for one in pair):
            raise InputError(f"Distillation(hints={hints!r}): expected a dictionary {{student's module: teacher's}}")
        if student is None or teacher is None:
            raise InputError("Distillation(hints=...): pass student= and teacher=, whose modules the hints name")
        if project and example_inputs is None:
            raise InputError("Distillation(project=True): pass example_inputs=, by which its layers are made")
        self.hints = Hints(hints, student, teacher, normalize, project, example_inputs)

    def forward(self, student: object, teacher: object, targets: object = None) -> Tensor:
        """The loss, a scalar, from the outputs of student and teacher for the same inputs."""
        own, wanted = self._logits(student, teacher, targets)
        counted = self._counted(own, targets)
        if targets is None and not self.alpha and self.hints is None:
            raise InputError("Distillation(alpha=0) is the loss of targets alone: pass targets, or a higher alpha")
        total = own.new_zeros(())
        if targets is not None and self.alpha < 1:
            total = total + (1 - self.alpha) * self._of_targets(own, targets, counted)
        if self.alpha:
            found = _divergence(own / self.temperature, wanted / self.temperature, counted)
            total = total + self.alpha * self.temperature**2 * found
        if self.hints is not None:
            total = total + self.hint_weight * self.hints()
        return total

    def close(self) -> None:
        """Take the hooks from student and teacher."""
        if self.hints is not None:
            self.hints.close()

    def __enter__(self) -> Distillation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"temperature={self.temperature:g}, alpha={self.alpha:g}, hint_weight={self.hint_weight:g}"

    def _logits(self, student: object, teacher: object, targets: object) -> tuple[Tensor, Tensor]:
        """The logits of student and teacher, ``(n, classes, ...)``."""
        own, wanted = _logits_of("student", student), _logits_of("teacher", teacher).detach()
        dim = _dim_of_classes(own, targets) if self.dim is None else self.dim
        if not -own.dim() <= dim < own.dim() or dim % own.dim() == 0:
            raise InputError(f"Distillation(dim={dim}): no dimension of classes in logits {tuple(own.shape)}")
        shapes = f"logits are {tuple(own.shape)} of the student and {tuple(wanted.shape)} of the teacher"
        if own.dim() == wanted.dim() and own.shape[dim] != wanted.shape[dim]:
            raise InputError(
                f"{shapes}: {own.shape[dim]} classes and {wanted.shape[dim]}; both must have the same ones"
            )
        if own.shape != wanted.shape:
            raise InputError(f"{shapes}: run both on the same batch")
        if own.shape[dim] < 2:
            raise InputError(f"{shapes}: of one class there is nothing to learn")
        dtype = accumulator(own, wanted)
        return own.movedim(dim, 1).to(dtype), wanted.movedim(dim, 1).to(dtype)

    def _counted(self, own: Tensor, targets: object) -> Tensor | None:
        """True at the positions ``(n, ...)`` that have a label; None for all."""
        wanted = (own.shape[0], *own.shape[2:])
        if not _are_indices(targets) or targets.shape != wanted:
            if targets is not None and self.loss is None:
                raise InputError(
                    f"targets are {form_of(targets)}, no class indices {wanted}: pass such, or loss=f(logits, targets)"
                )
            return None
        if self.loss is None:
            self._check_range(own, targets)
        return targets.long() != ignored_by(self.loss)  # 8 bits hold no -100

    def _check_range(self, own: Tensor, targets: Tensor) -> None:
        if torch.compiler.is_compiling() or (self._labels_checked and not targets.is_cpu):
            return
        self._labels_checked, labels = True, targets[targets.long() != IGNORED]
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < own.shape[1]:
            raise InputError(
                f"targets go from {int(labels.min())} to {int(labels.max())}, no class indices where there are "
                f"{own.shape[1]} classes"
            )

    def _of_targets(self, own: Tensor, targets: object, counted: Tensor | None) -> Tensor:
        if self.loss is None:
            assert isinstance(targets, Tensor)  # they are class indices
            return _mean(F.cross_entropy(own, targets.long(), ignore_index=IGNORED, reduction="none"), counted)
        found = self.loss(own, targets)
        if not isinstance(found, Tensor) or found.shape not in ((), (len(own),)):
            raise InputError(
                f"the loss of {len(own)} samples is {form_of(found)}: return the mean, or one number for each"
            )
        return found.mean()


def _check_number(name: str, value: object, fits: bool, expected: str, most: float = math.inf) -> None:
    if not (is_real(value) and fits and 0 <= float(value) <= most and math.isfinite(value)):
        raise InputError(f"Distillation({name}={value!r}): expected {expected}")


def _logits_of(who: str, outputs: object) -> Tensor:
    found = logits_in(outputs)
    if found is None:
        raise InputError(
            f"the {who}'s output is {form_of(outputs)}: pass logits (n, classes, ...), or what holds such as `logits`"
        )
    return found


def _dim_of_classes(logits: Tensor, targets: object) -> int:
    """The dimension that targets lack."""
    last = logits.dim() - 1
    if last == 1:
        return 1
    shapes = {dim: (*logits.shape[:dim], *logits.shape[dim + 1 :]) for dim in (1, last)}
    if targets is None or not _are_indices(targets) or shapes[1] == shapes[last] == targets.shape:
        raise InputError(
            f"logits are {tuple(logits.shape)} and targets {form_of(targets)}, which does not say where the classes "
            "are: pass dim=1 or dim=-1"
        )
    return last if targets.shape == shapes[last] else 1


def _are_indices(targets: object) -> TypeGuard[Tensor]:
    kinds = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    return isinstance(targets, Tensor) and targets.dtype in kinds


def _divergence(own: Tensor, wanted: Tensor, counted: Tensor | None) -> Tensor:
    """KL(softmax(wanted) || softmax(own)) of logits ``(n, classes, ...)``."""
    found, known = own.log_softmax(1), wanted.log_softmax(1)
    share = known.exp()
    terms = torch.where(share > 0, share * (known - found), 0.0)  # classes that both mask (-inf) have no weight
    return _mean(terms.sum(1), counted)


def _mean(values: Tensor, counted: Tensor | None) -> Tensor:
    """The mean over positions that count; zero where none does."""
    if counted is None:
        return values.sum() / max(1, values.numel())
    return torch.where(counted, values, 0.0).sum() / counted.sum().clamp_min(1)
