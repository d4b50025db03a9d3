"""A fixed, seeded set of samples from any form of data: class-balanced, or in the proportions of the data."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from numbers import Number
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    default_collate,
)

from netsurgery.arguments import is_count
from netsurgery.capture.inputs import Inputs, as_inputs
from netsurgery.capture.meta_run import RAISED_BY_MODELS
from netsurgery.capture.randomness import seeded
from netsurgery.errors import InputError

__all__ = [
    "HELD_BACK", "IGNORED", "Samples", "draw_inputs", "draw_samples", "draw_with_or_without_targets", "in_eval_mode",
    "outputs_of", "reads_once",
]  # fmt: skip

HELD_BACK = 5  # where something is fitted to samples, one in so many is held back
IGNORED = -100  # the label that PyTorch's losses leave out (``ignore_index``)
Value = TypeVar("Value")

_LABELS = ("labels", "label", "targets", "target")
_FORMS = "(inputs, targets), or a dictionary with 'labels'"


@dataclass(frozen=True)
class Samples:
    """Samples in an order whose beginnings are class-balanced too.

    Attributes:
        inputs: positional and keyword inputs of the model; every tensor has a row for each sample.
        targets: the targets of the loss, likewise; None where only inputs were drawn.
        count: number of samples.
    """

    inputs: Inputs
    targets: object
    count: int

    def rows(self, which: Tensor | slice, device: torch.device) -> tuple[Inputs, object]:
        """Inputs and targets of some samples on a device."""
        return (_map(self.inputs, lambda t: t[which].to(device)), _map(self.targets, lambda t: t[which].to(device)))

    def of(self, which: Tensor) -> Samples:
        """Some of the samples, or all, in an order."""
        return Samples(_map(self.inputs, lambda t: t[which]), _map(self.targets, lambda t: t[which]), len(which))

    def batches(self, size: int, device: torch.device) -> Iterator[tuple[Inputs, object]]:
        """All samples in batches of at most ``size``."""
        for start in range(0, self.count, size):
            yield self.rows(slice(start, start + size), device)


def draw_samples(data: object, count: int, seed: int = 0, ignored: int = IGNORED) -> Samples:
    """Draw samples, equally many of each class as far as there are.

    Args:
        data: a pair of tensors ``(inputs, targets)`` with a row for each sample (either may be a tuple, list or
            dictionary of tensors); a dictionary of tensors with an entry "labels"; a Dataset; a DataLoader, of which
            the dataset, the part of it that a ``SubsetRandomSampler`` names, and ``collate_fn`` are used, and the order
            is not; a list of samples whose targets are numbers; or any iterable of batches, of which the first are
            used. Items and batches are ``(inputs, targets)`` or dictionaries with an entry "labels", "label",
            "targets" or "target". Random transforms of a dataset are applied: pass one without augmentation.
        count: how many; fewer where there are not so many.
        seed: fixes the choice and the order.
        ignored: the label that says nothing: samples that have no other are not drawn.

    Classes are those of a one-dimensional integer target. Where a dataset does not list its ``targets`` or ``labels``,
    twice as many items are drawn at random, and balanced.

    Raises:
        InputError: no samples, or none in one of these forms.
    """
    return _Drawing(count, seed, _pair, ignored).draw_samples(data)


def draw_inputs(data: object, count: int, seed: int = 0) -> Samples:
    """Draw inputs alone, whatever their classes.

    Args:
        data: as for ``draw_samples``; or inputs without targets: a tensor with a row for each sample, a dictionary of
            tensors, or a Dataset, DataLoader or iterable of batches whose items and batches are such. Two things in a
            tuple or list are inputs and targets: pass two inputs as ``((one, other), None)``.
        count: how many; fewer where there are not so many.
        seed: fixes the choice and the order.

    Raises:
        InputError: no samples, or none in one of these forms.
    """
    return _Drawing(count, seed, _inputs_alone, None).draw_samples(data)


def draw_with_or_without_targets(data: object, count: int, seed: int = 0, ignored: int = IGNORED) -> Samples:
    """Draw samples with targets, or else inputs alone; an iterator is read once for both."""
    first, second = itertools.tee(data) if reads_once(data) else (data, data)
    try:
        return draw_samples(first, count, seed, ignored)
    except InputError:
        if _lengths_differ(data):  # labels, but not of these inputs
            raise
        return draw_inputs(second, count, seed)


def _lengths_differ(data: object) -> bool:
    """True if data is a pair of tensors, of which one has more rows."""
    if not isinstance(data, tuple | list) or len(data) != 2 or not all(isinstance(one, Tensor) for one in data):
        return False
    return len(data[0]) != len(data[1])


def reads_once(data: object) -> TypeGuard[Iterable[object]]:
    """True if data is an iterator, or gives the same one each time: a second look finds nothing, or other samples."""
    source = data.dataset if isinstance(data, DataLoader) else data
    if isinstance(source, Tensor | Mapping | list | tuple) or not isinstance(source, Iterable):
        return False
    return isinstance(source, Iterator) or iter(source) is iter(source)


@dataclass
class _Drawing:
    """One draw of samples.

    Attributes:
        pair: makes inputs and targets of a batch.
        ignored: the label of samples that are not drawn; None: classes play no part.
    """

    count: int
    seed: int
    pair: Callable[[object], tuple[Inputs, object]]
    ignored: int | None

    def __post_init__(self) -> None:
        if not is_count(self.count, 1):
            raise InputError(f"samples={self.count!r}: the number of samples to draw must be at least 1")
        self.generator = torch.Generator().manual_seed(self.seed)

    def draw_samples(self, data: object) -> Samples:
        """Draw the samples."""
        with torch.random.fork_rng(devices=[]):  # random transforms are the same each time, and leave no trace
            torch.manual_seed(self.seed)
            inputs, targets = self.chosen(self.pair(data)) if self.is_whole(data) else self.collected(data)
        found = _length((inputs, targets))
        if not found:
            raise InputError("the data holds no samples")
        return Samples(inputs, targets, found)

    def is_whole(self, data: object) -> bool:
        """True if the data is one batch that holds everything."""
        if self.ignored is None and isinstance(data, Tensor):
            return True
        if isinstance(data, Mapping):
            return _tensors(dict(data))
        if not isinstance(data, tuple | list) or len(data) != 2 or _is_batches(data):
            return False
        return _tensors(data[0]) and (_tensors(data[1]) or (self.ignored is None and data[1] is None))

    def collected(self, data: object) -> tuple[Inputs, object]:
        """Samples of a data set, or of batches."""
        collate: Callable[[list[Any]], object] = default_collate
        if isinstance(data, DataLoader) and not isinstance(data.dataset, IterableDataset):
            source, collate = _part(data), data.collate_fn or default_collate
        elif _is_items(data) or (isinstance(data, Dataset) and not isinstance(data, IterableDataset)):
            source = data
        else:
            return self.chosen(self.joined(data))
        if not isinstance(source, Sized):
            raise InputError(
                f"the dataset {type(source).__name__} has no length: pass one that has, or an IterableDataset"
            )
        labels = None if self.ignored is None else _listed(source)
        settled = labels is not None or self.ignored is None  # else more are needed to balance
        wanted = self.count if settled else 2 * self.count
        picked = self.order(labels, len(source))[:wanted].tolist()
        if not picked:
            raise InputError("the data holds no samples")
        found = self.pair(collate([source[index] for index in picked]))
        return found if settled else self.chosen(found)

    def chosen(self, found: tuple[Inputs, object]) -> tuple[Inputs, object]:
        """Choose as many samples as are asked for."""
        order = self.order(None if self.ignored is None else found[1], _length(found))[: self.count]
        return _map(found, lambda t: t[order])

    def order(self, targets: object, count: int) -> Tensor:
        """A random order; where there are classes, the first of each, then the second of each, and so on."""
        order = torch.randperm(count, generator=self.generator)
        if not isinstance(targets, Tensor) or targets.is_floating_point() or self.ignored is None or not count:
            return order
        said = (targets.cpu() != self.ignored).reshape(count, -1).any(1)
        order = order[said[order]]
        if not len(order):
            raise InputError(f"every label of the data is {self.ignored}, which losses ignore")
        classes = _classes(targets)
        return order if classes is None else order[_turns(classes[order])]

    def joined(self, batches: object) -> tuple[Inputs, object]:
        """Join the first batches that hold twice as many samples as asked for."""
        if not isinstance(batches, Iterable):
            raise InputError(f"data is {type(batches).__name__}: pass a DataLoader, a Dataset or a pair of tensors")
        pairs: list[tuple[Inputs, object]] = []
        for batch in batches:
            pairs.append(self.pair(batch))
            if sum(map(_length, pairs)) >= 2 * self.count:
                break
        if not pairs:
            raise InputError("the data holds no samples")
        leaves = [pytree.tree_flatten(pair) for pair in pairs]
        columns = zip(*(values for values, _ in leaves), strict=True)
        joined = [torch.cat(column) if isinstance(column[0], Tensor) else column[0] for column in columns]
        return pytree.tree_unflatten(joined, leaves[0][1])  # type: ignore[no-any-return]


def _part(loader: DataLoader[object]) -> Dataset[object] | Sequence[object]:
    """The data set of a loader, or the part of it that a sampler names."""
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    return Subset(loader.dataset, sampler.indices) if isinstance(sampler, SubsetRandomSampler) else loader.dataset


def _pair(batch: object) -> tuple[Inputs, object]:
    if isinstance(batch, Mapping):
        key = next((key for key in _LABELS if key in batch), None)
        if key is not None:
            return ((), {k: v for k, v in batch.items() if k != key}), batch[key]
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        return as_inputs(batch[0]), batch[1]
    raise InputError(f"a batch of the data is {type(batch).__name__}, expected {_FORMS}")


def _inputs_alone(batch: object) -> tuple[Inputs, object]:
    if isinstance(batch, Tensor):
        return as_inputs(batch), None
    if isinstance(batch, Mapping):
        return ((), {key: value for key, value in batch.items() if key not in _LABELS}), None
    if isinstance(batch, tuple | list) and len(batch) in (1, 2):
        return as_inputs(batch[0]), None
    raise InputError(f"a batch of the data is {type(batch).__name__}, expected inputs, or {_FORMS}")


def _listed(data: object) -> Tensor | None:
    """The classes of a dataset that lists them."""
    if isinstance(data, Subset):
        labels = _listed(data.dataset)
        return None if labels is None else labels[torch.as_tensor(data.indices)]
    if isinstance(data, ConcatDataset):
        parts = [_listed(part) for part in data.datasets]
        found = [part for part in parts if part is not None]
        return torch.cat(found) if len(found) == len(parts) else None
    tensors = getattr(data, "tensors", None)  # of a TensorDataset
    named = tensors[-1] if tensors else next((v for k in _LABELS if (v := getattr(data, k, None)) is not None), None)
    try:
        classes = None if named is None else _classes(torch.as_tensor(named))
    except (TypeError, ValueError, RuntimeError):  # listed in a form of their own
        return None
    return classes if classes is not None and isinstance(data, Sized) and len(classes) == len(data) else None


def _classes(targets: Tensor) -> Tensor | None:
    return targets.cpu() if targets.dim() == 1 and not targets.is_floating_point() else None


def _turns(classes: Tensor) -> Tensor:
    """An order in which the first of each class come first, then the second of each, and so on."""
    by_class = classes.argsort(stable=True)
    sizes = torch.unique_consecutive(classes[by_class], return_counts=True)[1]
    turn = torch.empty_like(by_class)
    turn[by_class] = torch.cat([torch.arange(int(size)) for size in sizes])
    return turn.argsort(stable=True)


def _tensors(value: object) -> bool:
    leaves = pytree.tree_leaves(value)
    return bool(leaves) and all(isinstance(leaf, Tensor) and leaf.dim() for leaf in leaves)


def _is_batches(data: object) -> bool:
    """True if a list holds batches, rather than inputs and targets."""
    return isinstance(data, list) and all(isinstance(item, tuple | list) and len(item) == 2 for item in data)


def _is_items(data: object) -> TypeGuard[Sequence[object]]:
    """True if a list holds samples rather than batches: each has one number for its target."""
    if not isinstance(data, list | tuple) or not data:
        return False
    first, target = data[0], None
    if isinstance(first, Mapping):
        target = next((first[key] for key in _LABELS if key in first), None)
    elif isinstance(first, tuple | list) and len(first) == 2:
        target = first[1]
    return isinstance(target, Number) or (isinstance(target, Tensor) and not target.dim())


def _length(value: object) -> int:
    lengths = {len(leaf) for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor) and leaf.dim()}
    if len(lengths) != 1:
        raise InputError(
            f"inputs and targets have {sorted(lengths)} rows: a row for each sample is needed "
            "(lists are taken for batches: pass single samples as a Dataset)"
        )
    return lengths.pop()


def _map(value: Value, change: Callable[[Tensor], Tensor]) -> Value:
    """A value with each tensor in it changed."""
    mapped: Value = pytree.tree_map_only(Tensor, change, value)
    return mapped


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put all of a model into eval mode; afterwards each module has its own mode again."""
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def outputs_of(model: nn.Module, inputs: Inputs, device: torch.device, seed: int = 0) -> object:
    """Run a model in its mode; the random numbers that it draws are the same each time.

    Returns:
        The outputs, as the model returns them.

    Raises:
        InputError: it does not run on these inputs.
    """
    try:
        with seeded(seed, device):
            return model(*inputs[0], **inputs[1])
    except RAISED_BY_MODELS as error:
        raise InputError(f"{type(model).__name__} does not run on the data: {error}") from error
