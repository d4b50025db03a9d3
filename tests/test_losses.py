"""Targets are what the loss takes them for, and a loss is a mean over the samples; else both are refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import netsurgery
from netsurgery.errors import InputError
from netsurgery.passes import FisherScore, LossIncreaseScore, TaylorScore
from netsurgery.passes.ablation import Ablation, AblationSettings
from netsurgery.passes.calibration import draw_samples
from netsurgery.passes.losses import Loss, cross_entropy

SCORES = (LossIncreaseScore, TaylorScore, FisherScore)
X = torch.randn(70, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(70) % 3


class Sequences(nn.Module):
    """Logits ``(n, t, classes)`` of sequences, or ``(n, classes, t)``."""

    def __init__(self, classes: int, last: bool) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Linear(4, 6), nn.Linear(6, classes), last

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(torch.relu(self.a(x)))
        return y if self.last else y.transpose(1, 2)


def network(outputs: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, outputs))


def of_sequences(classes: int, last: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return Sequences(classes, last)


ROWS = torch.randn(70, 5, 4, generator=torch.Generator().manual_seed(1))
NUMBERS = torch.randn(70, 3, generator=torch.Generator().manual_seed(2))
WRONG: dict[str, tuple[nn.Module, Tensor, Tensor, str]] = {
    "one number": (network(1), X, NUMBERS[:, :1], "that is one class, of which the cross-entropy is always zero"),
    "yes or no": (network(1), X, Y.clamp_max(1).float()[:, None], "that is one class"),
    "yes or no, as integers": (network(1), X, torch.zeros(70).long(), "that is one class"),
    "numbers": (network(3), X, NUMBERS, r"no shares of classes: the least is -\d"),
    "numbers that are positive": (network(3), X, NUMBERS.exp(), "no shares of classes: the least is 0"),
    "several labels": (network(3), X, (NUMBERS > -1).float(), "their sums over dimension 1 go from "),
    "not a number": (network(3), X, torch.full((70, 3), float("nan")), "no shares of classes: the least is nan"),
    "late ones": (network(3), X, torch.cat([torch.full((60, 3), 1 / 3), torch.ones(10, 3)]), "go from 1 to 3"),
    "labels from one on": (network(3), X, Y + 1, "but labels go from 1 to 3 where there are 3 classes"),
    "labels below zero": (network(3), X, Y - 1, "but labels go from -1 to 1 where there are 3 classes"),
    "a late label": (network(3), X, torch.where(torch.arange(70) > 60, 7, Y), "but labels go from 0 to 7"),
    "tokens as many as places": (of_sequences(5, True), ROWS, torch.zeros(70, 5).long(), "which fit classes in dim"),
    "shares of the last": (of_sequences(5, True), ROWS, torch.randn(70, 5, 5).softmax(-1), "no shares of classes"),
    "shares of both": (of_sequences(5), ROWS, torch.eye(5).expand(70, 5, 5), "fit classes in dimension 1 and classes"),
}  # fmt: skip


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", WRONG)
def test_targets_that_are_neither_classes_nor_shares(name: str, score: Any) -> None:
    model, x, targets, message = WRONG[name]
    with pytest.raises(InputError, match=rf"{message}.*: pass loss=f\(outputs, targets\)$"):
        score((x, targets)).run(netsurgery.trace(model, x[:2]))


def test_targets_that_are() -> None:
    shares = F.one_hot(Y, 3).float()
    for score in SCORES:
        traced = netsurgery.trace(network(3), X[:2])
        by_class = score((X, Y)).run(traced).scores["0"]
        by_share = score((X, shares)).run(traced).scores["0"]
        torch.testing.assert_close(by_share, by_class, rtol=1e-3, atol=1e-6)
        assert float(by_class.abs().max()) > 0


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    ("outputs", "targets", "loss"),
    [
        (3, Y, nn.CrossEntropyLoss(reduction="sum")),
        (3, Y, lambda o, y: F.cross_entropy(o, y, reduction="none").sum()),
        (3, Y, lambda o, y: F.cross_entropy(o, y, reduction="sum") / 32),
        (1, NUMBERS[:, :1], nn.MSELoss(reduction="sum")),
        (3, NUMBERS, lambda o, y: (o - y).square().mean(1).sum()),
    ],
)
def test_a_sum_is_no_mean(outputs: int, targets: Tensor, loss: Loss, score: Any) -> None:
    with pytest.raises(InputError, match=r"twice over is twice as high, .*: it is a sum; return the mean, or one num"):
        score((X, targets), loss).run(netsurgery.trace(network(outputs), X[:2]))


def test_a_sum_that_is_zero_on_the_samples_is_found_too() -> None:
    model = network(1)
    targets = model(X).detach()
    with pytest.raises(InputError, match="it is a sum"):
        LossIncreaseScore((X, targets), nn.MSELoss(reduction="sum")).run(netsurgery.trace(model, X[:2]))


def test_a_loss_that_depends_on_how_many_go_through() -> None:
    def divided(outputs: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(outputs, y, reduction="none") / len(y)

    def contrasted(outputs: Tensor, y: Tensor) -> Tensor:
        return outputs.logsumexp(0).mean() - outputs.gather(1, y[:, None]).mean()

    traced = netsurgery.trace(network(3), X[:2])
    for loss, rows in ((divided, None), (contrasted, 16)):
        with pytest.raises(InputError, match="so it depends on how many go through at once: return the mean, or one"):
            LossIncreaseScore((X, Y), loss, rows=rows).run(traced)
    LossIncreaseScore((X, Y), contrasted, rows=70, by="rise").run(traced)  # all at once: it is what it is
    with pytest.raises(InputError, match="so it depends on how many go through at once: return the mean, or one"):
        LossIncreaseScore((X, Y), contrasted, rows=70).run(traced)  # of single samples it is nothing


@pytest.mark.parametrize("rows", [16, 17, 70])
@pytest.mark.parametrize(
    "loss",
    [F.cross_entropy, nn.CrossEntropyLoss(), lambda o, y: F.cross_entropy(o, y, reduction="none"),
     lambda o, y: F.nll_loss(o.log_softmax(1), y)],
)  # fmt: skip
def test_a_mean_is_the_same_whatever_goes_through_at_once(loss: Loss, rows: int) -> None:
    traced = netsurgery.trace(network(3), X[:2])
    own, whole = LossIncreaseScore((X, Y), loss, rows=rows), LossIncreaseScore((X, Y), rows=70)
    torch.testing.assert_close(own.run(traced).scores["0"], whole.run(traced).scores["0"], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("loss", [None, F.cross_entropy, nn.CrossEntropyLoss(ignore_index=7)])
def test_labels_that_are_ignored_count_for_nothing(score: Any, loss: Loss | None) -> None:
    ignored = torch.where(torch.arange(70) < 40, Y, getattr(loss, "ignore_index", -100))
    traced = netsurgery.trace(network(3), X[:2])
    found, wanted = score((X, ignored), loss).run(traced), score((X[:40], Y[:40]), loss).run(traced)
    torch.testing.assert_close(found.scores["0"], wanted.scores["0"], rtol=1e-3, atol=1e-6)
    few = draw_samples((X, ignored), 9, ignored=getattr(loss, "ignore_index", -100))
    assert few.targets.bincount().tolist() == [3, 3, 3]


def test_places_that_are_ignored_count_for_nothing() -> None:
    logits, labels = torch.randn(3, 5, 4), torch.tensor([[0, 1, -100, -100], [-100, -100, -100, 2], [0, 1, 2, 3]])
    wanted = torch.stack([F.cross_entropy(one[None], y[None]) for one, y in zip(logits, labels, strict=True)])
    torch.testing.assert_close(cross_entropy(logits, labels), wanted)
    assert cross_entropy(logits, torch.full((3, 4), -100)).tolist() == [0, 0, 0]
    padded = torch.randint(6, (70, 5)).masked_fill(torch.arange(5) >= 2, -100)
    found, wanted_score = (
        LossIncreaseScore((ROWS[:, :n], padded[:, :n])).run(netsurgery.trace(of_sequences(6), ROWS[:2, :n])).scores["a"]
        for n in (5, 2)
    )
    torch.testing.assert_close(found, wanted_score, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("place", [20, 45, 69])
@pytest.mark.parametrize("shares", [False, True])
def test_scores_that_are_kept_are_of_these_targets(place: int, shares: bool, tmp_path: Path) -> None:
    """Whichever of the targets is another: the first few are looked at more closely."""
    model, later = network(3), Y.clone()
    later[place] = (later[place] + 1) % 3
    traced = netsurgery.trace(model, X[:2])
    ordered = draw_samples((X, torch.zeros(70)), 70)  # all samples, in the order in which they are drawn
    prints = []
    for y in (Y, later):
        targets = F.one_hot(y, 3).float() if shares else y
        kept = type(ordered)(((X,), {}), targets, 70)
        prints.append(Ablation(AblationSettings(), traced, kept).fingerprint())
    assert prints[0] != prints[1]


def test_a_kept_file_is_refused_where_late_targets_changed(tmp_path: Path) -> None:
    model, shares = network(3), F.one_hot(Y, 3).float()
    traced = netsurgery.trace(model, X[:2])
    LossIncreaseScore((X, shares), file=tmp_path / "scores").run(traced)
    order = draw_samples((torch.arange(70), NUMBERS), 70).inputs[0][0]
    late = shares.clone()
    late[order[-1]] = late[order[-1]].roll(1)
    with pytest.raises(InputError, match="holds scores of another model, other samples or other settings"):
        LossIncreaseScore((X, late), file=tmp_path / "scores").run(traced)


def test_what_the_message_says() -> None:
    model, x, targets, _ = WRONG["numbers that are positive"]
    with pytest.raises(
        InputError, match=re.escape("the model returns (16, 3) and targets are torch.float32 (16, 3), ")
    ):
        LossIncreaseScore((x, targets)).run(netsurgery.trace(model, x[:2]))
