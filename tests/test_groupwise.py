"""A plan that finds a lock keeps the scores that do not depend on it, and asks for all others again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import netsurgery
from netsurgery import pipeline
from netsurgery.passes import FisherScore, LossIncreaseScore, PruneChannels, RandomScore, TaylorScore

DATA = torch.randn(24, 6, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 4


class Stubborn(nn.Module):
    """Layers whose sizes the code holds fixed, and one that follows."""

    def __init__(self, fixed: tuple[int, ...]) -> None:
        super().__init__()
        self.fixed = fixed
        self.a, self.b, self.c, self.d = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate((self.a, self.b, self.c)):
            x = layer(x).relu()
            if index in self.fixed:
                with torch.enable_grad():  # so that it is not rewritten
                    x = x.view(-1, 8)
        return self.d(x)


@dataclass(frozen=True)
class Counted(netsurgery.Pass):
    """The norms of rows, as a pass of a user's that says so."""

    gives: ClassVar[frozenset[str]] = frozenset({"scores"})

    @property
    def groupwise(self) -> bool:
        return True

    def run(self, network: netsurgery.Network) -> netsurgery.Network:
        return network.with_scores({g.name: network.tensors[f"{g.name}.weight"].norm(dim=1) for g in network.prunable})


ONCE: dict[str, Callable[[], netsurgery.Pass]] = {
    "effects": lambda: LossIncreaseScore(DATA, samples=12),
    "rises": lambda: LossIncreaseScore(DATA, samples=12, by="rise"),
    "removals of each group": lambda: LossIncreaseScore(DATA, samples=12, mode="per-group", tolerance=0.1),
    "slopes": lambda: TaylorScore(DATA, samples=12),
    "information": lambda: FisherScore(DATA, samples=12),
    "a pass of one's own": Counted,
}
AGAIN: dict[str, Callable[[], netsurgery.Pass]] = {
    "random": lambda: RandomScore(0),
    "racing": lambda: LossIncreaseScore(DATA, samples=12, racing=True),
    "removals one after the other": lambda: LossIncreaseScore(DATA, samples=12, mode="cumulative", tolerance=0.1),
}


def planned(score: netsurgery.Pass, monkeypatch: pytest.MonkeyPatch, *more: netsurgery.Pass) -> tuple[Any, int, int]:
    """The edit, how often the score was run, and how often all passes were gone through."""
    torch.manual_seed(0)
    model = Stubborn((0, 2)).eval()
    runs, rounds = [], []
    kind = type(score)
    run, through = kind.run, pipeline._run
    with monkeypatch.context() as patch:
        patch.setattr(kind, "run", lambda one, network: runs.append(one) or run(one, network))  # type: ignore[func-returns-value]
        patch.setattr(pipeline, "_run", lambda *args: rounds.append(args) or through(*args))  # type: ignore[func-returns-value]
        return netsurgery.plan(model, [score, PruneChannels(0.5), *more], (DATA[0][:2],)), len(runs), len(rounds)


@pytest.mark.parametrize("name", ONCE)
def test_scores_of_each_group_are_asked_for_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    score = ONCE[name]()
    edit, runs, rounds = planned(score, monkeypatch)
    assert (runs, rounds) == (1, 3) and list(edit.keep) == ["b"]
    monkeypatch.setattr(type(score), "groupwise", False)
    anew, runs, rounds = planned(score, monkeypatch)
    assert (runs, rounds) == (3, 3) and anew.to_json() == edit.to_json()
    assert list(anew.network.scores) == list(edit.network.scores) == ["b"]
    assert torch.equal(anew.network.scores["b"], edit.network.scores["b"])
    assert (anew.network.comparable, anew.network.groups) == (edit.network.comparable, edit.network.groups)


@pytest.mark.parametrize("name", AGAIN)
def test_scores_that_depend_on_other_groups_are_asked_for_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    edit, runs, rounds = planned(AGAIN[name](), monkeypatch)
    assert runs == rounds == 3 and "b" in edit.network.scores


def test_scores_of_what_a_removal_leaves_are_asked_for_once_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock is found by the second removal, and the first leaves the same."""
    torch.manual_seed(0)
    model = Stubborn((0, 2)).eval()
    score = LossIncreaseScore(DATA, samples=12)
    passes = [score, PruneChannels(0.5, include=["b"]), score, PruneChannels(0.5, include=["a", "b"])]
    edits, runs = [], []
    run = LossIncreaseScore.run
    for groupwise in (True, False):
        runs.clear()
        with monkeypatch.context() as patch:
            patch.setattr(LossIncreaseScore, "run", lambda one, net: runs.append(one) or run(one, net))  # type: ignore[func-returns-value]
            patch.setattr(LossIncreaseScore, "groupwise", groupwise)
            edits.append(netsurgery.plan(model, passes, (DATA[0][:2],)))
        assert len(runs) == (2 if groupwise else 4)
    assert edits[0].to_json() == edits[1].to_json() and edits[0].counts == {"b": 2}


def test_where_no_score_is_left_the_pass_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Stubborn((0, 2)).eval()
    score = LossIncreaseScore(DATA, samples=12, include=["a"])
    with pytest.raises(netsurgery.NetsurgeryError, match="no group of Stubborn is left to be scored"):
        netsurgery.plan(model, [score, PruneChannels(0.5, include=["a"])], (DATA[0][:2],))


def test_a_plan_starts_from_a_network_whose_code_was_not_tried() -> None:
    model = Stubborn((0, 2)).eval()
    tried, untried = (netsurgery.trace(model, (DATA[0][:2],), try_sizes=sizes) for sizes in (True, False))
    assert [group.name for group in tried.prunable] == ["b"]
    assert [group.name for group in untried.prunable] == ["a", "b", "c"]
    assert untried.with_locked({name: tried[name].locked or "" for name in ("a", "c")}).groups == tried.groups
