"""Drawing samples: fixed by the seed, balanced, the same from every form of data."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from netsurgery.errors import InputError
from netsurgery.passes import (
    FisherScore,
    LossIncreaseScore,
    PruneChannels,
    ReconstructionScore,
    TaylorScore,
    measure,
)
from netsurgery.passes.calibration import draw_inputs, draw_samples

X = torch.arange(300.0)[:, None]
Y = torch.cat([torch.zeros(200), torch.ones(70), torch.full((30,), 2)]).long()  # classes of very different sizes


class Unlisted(Dataset[tuple[Tensor, Tensor]]):
    """Does not list its labels."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index], Y[index]


class Listed(Unlisted):
    targets = Y.tolist()


class Streamed(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([(X[i], Y[i]) for i in range(299, -1, -1)])


def classes(data: Any, count: int, seed: int = 0) -> list[int]:
    return torch.bincount(draw_samples(data, count, seed).targets, minlength=3).tolist()


@pytest.mark.parametrize(
    "data",
    [
        (X, Y),
        [X, Y],
        TensorDataset(X, Y),
        Listed(),
        Subset(Listed(), range(300)),
        DataLoader(Listed(), 7),
        ConcatDataset([Subset(Listed(), range(90)), Subset(Listed(), range(90, 300))]),
    ],
)
def test_classes_are_balanced_and_every_form_gives_the_same(data: Any) -> None:
    found = draw_samples(data, 60)
    assert torch.bincount(found.targets).tolist() == [20, 20, 20]
    assert torch.equal(found.targets, draw_samples((X, Y), 60).targets)
    assert torch.equal(found.inputs[0][0], draw_samples((X, Y), 60).inputs[0][0])
    assert torch.equal(Y[found.inputs[0][0][:, 0].long()], found.targets)
    assert torch.bincount(found.targets[:12]).tolist() == [4, 4, 4]  # beginnings are balanced too


def test_small_classes_are_taken_whole() -> None:
    assert classes((X, Y), 150) == [60, 60, 30]
    assert classes((X, Y), 1000) == [200, 70, 30]


def test_the_seed_fixes_the_choice() -> None:
    one, same, other = (draw_samples((X, Y), 30, seed).inputs[0][0] for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_data_that_list_no_labels() -> None:
    for data in (
        Unlisted(),
        DataLoader(Unlisted(), 7),
        DataLoader(Streamed(), 10),
        [(X[:90], Y[:90]), (X[90:], Y[90:])],
    ):
        found = draw_samples(data, 60)
        assert found.count == 60 and torch.equal(Y[found.inputs[0][0][:, 0].long()], found.targets)
    assert min(classes(Unlisted(), 60)) >= 8  # of twice as many, drawn at random


def test_dictionaries_and_collate_functions() -> None:
    items = [{"input_ids": torch.tensor([i, i]), "attention_mask": torch.ones(2), "labels": i % 2} for i in range(20)]
    found = draw_samples(DataLoader(items, 4), 10)  # type: ignore[arg-type]  # a list is a data set
    assert sorted(found.inputs[1]) == ["attention_mask", "input_ids"] and torch.bincount(found.targets).tolist() == [
        5,
        5,
    ]

    def halves(rows: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        return torch.stack([x for x, _ in rows]) / 2, torch.tensor([int(y) for _, y in rows])

    halved = DataLoader(Listed(), 4, collate_fn=halves)
    assert torch.equal(draw_samples(halved, 9).inputs[0][0] * 2, draw_samples(Listed(), 9).inputs[0][0])


class Bare(Dataset[Tensor]):
    """Images without labels."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> Tensor:
        return X[index]


@pytest.mark.parametrize(
    "data",
    [
        X, (X, Y), (X, None), {"x": X}, {"x": X, "labels": Y}, TensorDataset(X), TensorDataset(X, Y), Bare(), Listed(),
        DataLoader(Bare(), 7), DataLoader(TensorDataset(X), 9, shuffle=True), DataLoader(Listed(), 7),
        DataLoader([{"x": x} for x in X]),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_inputs_alone_come_as_they_are_in_the_data(data: Any) -> None:
    found = draw_inputs(data, 60)
    (x,) = (*found.inputs[0], *found.inputs[1].values())
    assert found.targets is None and found.count == 60
    assert torch.equal(x, draw_inputs(X, 60).inputs[0][0])
    shares = Y[x[:, 0].long()].bincount(minlength=3) / 60
    assert float((shares - Y.bincount() / 300).abs().max()) < 0.1  # classes as frequent as in the data
    assert draw_inputs(data, 1000).count == 300


def test_inputs_alone_of_batches() -> None:
    batches = [X[:90], X[90:]], iter([(X[:90],), (X[90:],)]), iter([{"x": X[:90]}, {"x": X[90:]}])
    for data in batches[1:]:
        assert draw_inputs(data, 300).count == 300
    both = draw_inputs(((X, 2 * X), None), 7).inputs[0]
    assert torch.equal(2 * both[0], both[1])
    with pytest.raises(InputError, match=r"a batch of the data is tuple, expected inputs, or \(inputs, targets\)"):
        draw_inputs(iter([(X, X, X)]), 7)
    with pytest.raises(InputError, match="a batch of the data is Tensor, expected"):
        draw_samples(X, 7)


@pytest.mark.parametrize("form", [lambda x, y: (x, y), TensorDataset, lambda x, y: DataLoader(TensorDataset(x, y), 7)])
@pytest.mark.parametrize("ignored", [-100, 255])
def test_labels_that_losses_ignore_are_no_class(form: Any, ignored: int) -> None:
    y = Y.clone()
    y[::2] = ignored
    found = draw_samples(form(X, y), 60, ignored=ignored).targets
    assert found.bincount().tolist() == [23, 22, 15]
    assert len(draw_samples(form(X, y), 1000, ignored=ignored).targets) == 150
    places = torch.full((300, 4), ignored)
    places[:40, 1] = 3
    assert draw_samples(form(X, places), 300, ignored=ignored).count == 40
    with pytest.raises(InputError, match=f"every label of the data is {ignored}, which losses ignore"):
        draw_samples(form(X, torch.full((300,), ignored)), 9, ignored=ignored)


@pytest.mark.parametrize(
    "samples",
    [
        [(X[i], int(Y[i])) for i in range(300)],
        tuple((X[i], Y[i]) for i in range(300)),
        [{"x": X[i], "labels": int(Y[i])} for i in range(300)],
    ],
)
def test_a_list_of_samples_is_a_data_set(samples: Any) -> None:
    drawn = draw_samples(samples, 60)
    assert torch.equal(drawn.targets, draw_samples(Unlisted(), 60).targets)
    (inputs,) = drawn.inputs[0] or drawn.inputs[1].values()
    assert inputs.shape == (60, 1) and torch.equal(Y[inputs[:, 0].long()], drawn.targets)
    assert draw_inputs(samples, 60).count == 60
    assert draw_samples(samples[:2], 60).count == 2


def test_targets_that_are_no_classes() -> None:
    assert draw_samples((X, torch.randn(300)), 50).count == 50
    assert draw_samples((X, torch.zeros(300, 4, 4).long()), 50).targets.shape == (50, 4, 4)


def test_random_transforms_leave_no_trace() -> None:
    class Noisy(Unlisted):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            return X[index] + torch.rand(1), Y[index]

    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert torch.equal(draw_samples(Noisy(), 9).inputs[0][0], draw_samples(Noisy(), 9).inputs[0][0])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("data", "count", "message"),
    [
        ((X, Y), 0, r"samples=0: the number of samples to draw must be at least 1"),
        ((X, Y[:9]), 5, r"inputs and targets have \[9, 300\] rows: a row for each sample is needed"),
        ([], 5, "the data holds no samples"),
        (TensorDataset(X[:0], Y[:0]), 5, "the data holds no samples"),
        (3, 5, "data is int: pass a DataLoader, a Dataset or a pair of tensors"),
        ([(X, Y, Y)], 5, r"a batch of the data is tuple, expected \(inputs, targets\), or a dictionary with 'labels'"),
        (DataLoader([{"x": 1}]), 1, "a batch of the data is dict, expected"),  # type: ignore[arg-type]
    ],
)
def test_data_that_cannot_be_used(data: Any, count: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        draw_samples(data, count)


# What can be read once -----------------------------------------------------------------------------------------------

Form = Callable[[list[Any]], Any]


class OneShot(IterableDataset[Any]):
    """Gives the same iterator each time."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = iter(batches)

    def __iter__(self) -> Iterator[Any]:
        return self.batches


def generated(batches: list[Any]) -> Iterator[Any]:
    yield from batches


ONCE: list[Form] = [
    iter,
    generated,
    lambda some: map(tuple, some),
    OneShot,
    lambda some: DataLoader(OneShot(some), None),
]


@pytest.mark.parametrize("form", ONCE)
@pytest.mark.parametrize("batches", [[(x,) for x in X.split(100)], [*zip(X.split(100), Y.split(100), strict=True)]])
def test_a_model_is_measured_on_all_that_can_be_read_once(form: Form, batches: list[Any]) -> None:
    model = nn.Linear(1, 3)
    found = measure(model, model, form(batches), samples=300)
    assert found.samples == 300 and found == measure(model, model, batches, samples=300)
    assert (found.loss is None) == (len(batches[0]) == 1)


@pytest.mark.parametrize("form", ONCE)
@pytest.mark.parametrize("make", [TaylorScore, FisherScore, LossIncreaseScore, ReconstructionScore])
def test_passes_refuse_what_can_be_read_once(form: Form, make: Any) -> None:
    batches = [(X[:90], Y[:90]), (X[90:], Y[90:])]
    says = (
        rf"{make.__name__}\(data=...\): \w+ can be read once, and a plan reads it several times: pass a list of its "
        "batches, or the DataLoader or Dataset that it comes from"
    )
    with pytest.raises(InputError, match=says):
        make(form(batches))
    with pytest.raises(InputError, match=r"PruneChannels\(data=...\): \w+ can be read once"):
        PruneChannels(0.5, data=form(batches))
    with pytest.raises(InputError, match=r"ReconstructionScore\(held_back=...\): \w+ can be read once"):
        ReconstructionScore(X, held_back=form(batches))


@pytest.mark.parametrize("data", [(X, Y), [(X, Y)], {"x": X, "labels": Y}, Listed(), DataLoader(Streamed(), 10)])
def test_passes_take_what_can_be_read_again(data: Any) -> None:
    for score in (TaylorScore(data, samples=9), ReconstructionScore(data, samples=9)):
        assert torch.equal(*(next(iter(score.drawn().inputs[0] or score.drawn().inputs[1].values())) for _ in "12"))
