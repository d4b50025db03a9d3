"""The rounds of a search: each candidate is tried, the best one stays, until the budget is used up or nothing gains."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from netsurgery.analysis.costs import Cost
from netsurgery.analysis.network import Network
from netsurgery.arguments import is_count
from netsurgery.capture.inputs import Inputs
from netsurgery.edit import Edit
from netsurgery.errors import InputError
from netsurgery.passes.progress import Report
from netsurgery.pipeline import Pass, trace
from netsurgery.search import trials
from netsurgery.search.candidates import Budget, Candidate, offered
from netsurgery.search.identity import fingerprint, of_network
from netsurgery.search.journal import Entry, Journal
from netsurgery.search.outcome import Growth, Round
from netsurgery.search.trials import Parcel, Setting, State, Trial
from netsurgery.tables import first_of

__all__ = ["Rounds", "Search", "check_settings", "parcel", "trial_seed"]


@dataclass(frozen=True)
class Search:
    """The settings of a search.

    Attributes:
        setting: what all candidates have in common.
        growth: the pass that grows every group, given a seed; each group of it alone is a candidate.
        by: what is compared: the loss on held-out samples, or how much lower it is for each parameter that is added.
        patience: rounds without a lower loss after which the search stops.
        candidates: groups that are tried in a round, drawn at random; None: all.
        seed: of all that is random.
    """

    setting: Setting
    growth: Callable[[int], Pass]
    budget: Budget
    by: Literal["loss", "gain"]
    patience: int
    candidates: int | None
    seed: int

    @property
    def inputs(self) -> Any:
        """Example inputs, as ``trace`` takes them."""
        given: Inputs = self.setting.inputs
        return given[0] or given[1]

    def identity(self) -> dict[str, str]:
        """Fingerprints of the network, the inputs, the data, and what else a user passes.

        Raises:
            InputError: something that cannot be told from another.
        """
        split = self.setting.split
        data = [split.train.inputs, split.train.targets, split.held.inputs, split.held.targets]
        return {
            "network": of_network(self.setting.net),
            "data": fingerprint("the data", data),
            "teacher": fingerprint("the teacher", split.teacher),
            "example_inputs": fingerprint("example_inputs", self.setting.inputs),
            **self.setting.fitting.identity(),
        }

    def settings(self) -> dict[str, Any]:
        """All that results depend on beside ``identity``, for JSON."""
        return {
            "growth": repr(self.growth(0)),
            "budget": dict(self.budget.most),
            "by": self.by,
            "patience": self.patience,
            "candidates": self.candidates,
            "seed": self.seed,
            "threads": self.setting.threads,
            **self.setting.fitting.settings(),
        }

    def offers(self, model: nn.Module, number: int) -> list[Candidate]:
        """The candidates of a round that fit into the budget."""
        every = offered(model, self.inputs, self.growth(trial_seed(self.seed, number)))
        return [one for one in every if not self.budget.over(one.cost)]

    def drawn(self, offers: list[Candidate], number: int) -> list[Candidate]:
        """Those that are tried."""
        if self.candidates is None or self.candidates >= len(offers):
            return offers
        picked = random.Random(f"{self.seed} {number}").sample(range(len(offers)), self.candidates)
        return [offers[index] for index in sorted(picked)]

    def check(self) -> Network:
        """The network at the start.

        Raises:
            InputError: it is over the budget, nothing of it can grow, or the smallest growth is over the budget.
        """
        network = trace(self.setting.net, self.inputs, try_sizes=False)
        if over := self.budget.over(network.cost()):
            raise InputError(f"budget={dict(self.budget.most)} is under the present size: the network has {over}")
        if not network.prunable:
            reasons = first_of((f"'{group.name}' is locked: {group.locked}" for group in network.groups), 5)
            raise InputError(f"nothing of {network.model_name} can grow: {reasons}")
        every = offered(self.setting.net, self.inputs, self.growth(0))
        if all(self.budget.over(one.cost) for one in every):
            least = min(every, key=lambda one: one.cost.params)
            raise InputError(
                f"budget={dict(self.budget.most)} leaves no room: with more units in '{least.name}' alone the network "
                f"has {self.budget.over(least.cost)}"
            )
        return network


def trial_seed(*parts: object) -> int:
    """A seed that follows from these parts and from nothing else."""
    return random.Random(" ".join(map(str, parts))).randrange(2**31)


def check_settings(search: Search) -> None:
    """Raise InputError for a number or a word out of range."""
    counts = {"patience": search.patience, "threads": search.setting.threads}
    if search.candidates is not None:
        counts["candidates"] = search.candidates
    for name, value in counts.items():
        if not is_count(value, 1):
            raise InputError(f"{name}={value!r}: a whole number of at least 1")
    if search.by not in ("loss", "gain"):
        raise InputError(f"by={search.by!r}: 'loss', or 'gain' for each added parameter")
    if not is_count(search.seed):
        raise InputError(f"seed={search.seed!r}: a whole number")


def parcel(search: Search, executor: Executor | None) -> Parcel:
    """The values that all candidates have in common, on their way to where they are trained.

    Raises:
        InputError: it cannot be pickled.
    """
    return Parcel(f"setting {id(search)}", search.setting) if executor is None else Parcel.closed(search.setting)


class Rounds:
    """A search that is carried out.

    Args:
        network: of the net at the start, as ``Search.check`` gives it.
        journal: what is known already is not computed again.
        executor: where candidates are trained; None: here, one after the other.
        report: says how far the search is.
    """

    def __init__(self, search: Search, network: Network, journal: Journal, executor: Executor | None, report: Report):
        self.search, self.network, self.journal, self.executor, self.report = search, network, journal, executor, report
        self.setting = parcel(search, executor)
        self.history: list[Round] = []
        self.edits: list[Edit] = []
        self.weights = self.best_weights = b""
        self.refused: set[str] = set()
        self.known: float | None = None

    def run(self) -> Growth:
        """All rounds that are left."""
        try:
            with self.report.running():
                self.report.begin("", {"": 1})
                why = self._carry_out()
        finally:
            trials.forget()
        best = min(self.history, key=lambda one: (one.loss, one.number))
        edit = self.edits[best.number]
        model = trials.rebuilt(self.search.setting, State(edit.to_json(), self.best_weights), self.network)
        return Growth(model, tuple(self.history), why, edit)

    def _carry_out(self) -> str:
        self._restore()
        if not self.history:
            self._begin()
        while not (why := self._stop()):
            begin = time.perf_counter()
            number = len(self.history)
            model = trials.rebuilt(self.search.setting, self._state(), self.network)
            within = self.search.offers(model, number)
            offers = [one for one in within if one.name not in self.refused]
            if not offers:
                why = self._none_is_left(number) if within else "every further growth is over the budget"
                break
            if self.executor is None:
                trials.keep(self.setting, self._sent(number), model, offers[0].edit.network)
            why = self._round(number, self.search.drawn(offers, number), time.perf_counter() - begin)
            if why:
                break
        return why

    def _stop(self) -> str:
        best = min(self.history, key=lambda one: (one.loss, one.number))
        if len(self.history) - 1 - best.number >= self.search.patience:
            return f"{self.search.patience} rounds without a lower loss on held-out samples"
        return ""

    def _state(self) -> State:
        return State(self.edits[-1].to_json(), self.weights)

    # What was left --------------------------------------------------------------------------------------------------

    def _restore(self) -> None:
        for entry in self.journal.rounds():
            edit = Edit.from_json(entry["edit"], self.network)
            self._keep(Round.read(entry), edit, self.journal.weights(entry))
            self._note_refused(self.journal.candidates(entry["number"]).values())

    def _begin(self) -> None:
        setting = self.search.setting
        with trials.threads_of_torch(setting.threads):
            found = setting.fitting.measure(setting.net, setting.split.held)
        if not math.isfinite(found.loss):
            raise InputError(
                f"the loss of the network as it is, is {found.loss}: look at its weights, the data and the loss"
            )
        edit, cost = Edit(self.network, {}), self.network.cost()
        start = Round(0, "", found.loss, found.accuracy, cost.params, cost.macs, self._widths(edit))
        self._commit(start, edit, trials.weights(setting.net))

    def _widths(self, edit: Edit) -> dict[str, int]:
        if not self.history:
            every = offered(self.search.setting.net, self.search.inputs, self.search.growth(0))
            names = [name for one in every for name in one.edit.keep]
        else:
            names = list(self.history[0].widths)
        return {name: edit.counts.get(name, self.network[name].size) for name in names}

    def _commit(self, done: Round, edit: Edit, weights: bytes) -> None:
        self.journal.add_round(weights, **done.entry(), edit=edit.to_json())
        self._keep(done, edit, weights)

    def _keep(self, done: Round, edit: Edit, weights: bytes) -> None:
        if not self.history or done.loss < min(one.loss for one in self.history):
            self.best_weights = weights
        self.weights = weights
        self.history.append(done)
        self.edits.append(edit)

    # A round --------------------------------------------------------------------------------------------------------

    def _round(self, number: int, offers: list[Candidate], spent: float) -> str:
        """Try candidates and keep the best; why the search ends, where none can be kept.

        Args:
            spent: seconds that went into finding them.
        """
        found, trial = self._tried(number, offers)
        if not found:
            return ""  # all of these were refused: others are drawn
        cost = {one.name: one.cost for one in offers}
        name = min(found, key=lambda one: (self._score(found[one], cost[one]), list(cost).index(one)))
        if math.isinf(self._score(found[name], cost[name])):
            return "training diverged in every candidate of a round: a lower lr may help"
        chosen = next(one for one in offers if one.name == name)
        if trial is None or trial[0] != name:  # it was tried before an interruption, and its weights are gone
            again = dict(trials.tried_by(self.executor, {name: self._task(number, chosen, self._sent(number))}))[name]
        else:
            again = trial[1]
        edit = self.edits[-1].then(chosen.edit)
        entries = self._entries(number, found)
        done = Round(
            number,
            name,
            again.loss,
            again.accuracy,
            chosen.cost.params,
            chosen.cost.macs,
            self._widths(edit),
            len(found),
            sum(one["seconds"] for one in entries) + spent,
            sum(one["surgery"] for one in entries) + spent,
        )
        self._commit(done, edit, again.weights)
        return ""

    def _entries(self, number: int, names: Iterable[str]) -> list[Entry]:
        """The notes of some candidates of a round."""
        known = self.journal.candidates(number)
        return [known[name] for name in names]

    def _tried(self, number: int, offers: list[Candidate]) -> tuple[dict[str, float], tuple[str, Trial] | None]:
        """The losses of all candidates that can be made, and of those tried now the best."""
        known, order = self.journal.candidates(number), {one.name: one for one in offers}
        found = {name: _loss(one["loss"]) for name, one in known.items() if name in order and not one["refused"]}
        self._note_refused(known.values())
        sent = self._sent(number)
        tasks = {name: self._task(number, one, sent) for name, one in order.items() if name not in known}
        best: tuple[str, Trial] | None = None
        self._say(number, len(offers) - len(tasks), offers)
        for name, trial in trials.tried_by(self.executor, tasks):
            self.journal.add(event="candidate", round=number, group=name, **_noted(trial, order[name].cost))
            if trial.refused:
                self.refused.add(name)
                continue
            found[name] = _loss(trial.loss)
            self._say(number, len(found), offers)

            def rank(one: str) -> tuple[float, int]:
                return self._score(found[one], order[one].cost), list(order).index(one)

            if best is None or rank(name) < rank(best[0]):
                best = name, trial
        return found, best

    def _sent(self, number: int) -> Parcel:
        """The network that a round begins with, on its way to where candidates are trained."""
        state = self._state()
        return Parcel(f"{self.setting.key} {number}", state) if self.executor is None else Parcel.closed(state)

    def _task(self, number: int, one: Candidate, sent: Parcel) -> tuple[Any, ...]:
        return self.setting, sent, one.edit.to_json(), trial_seed(self.search.seed, number, one.name)

    def _score(self, loss: float, cost: Cost) -> float:
        """The lowest is the best; infinite where training diverged."""
        last = self.history[-1]
        if self.search.by == "loss" or math.isinf(loss):
            return loss
        return (loss - last.loss) / max(1, cost.params - last.params)

    def _note_refused(self, entries: Iterable[Mapping[str, Any]]) -> None:
        self.refused.update(one["group"] for one in entries if one["refused"])

    def _none_is_left(self, number: int) -> str:
        """Why the search ends where all groups were refused."""
        if number > 1:
            return "no candidate can be made any more"
        reasons = [f"{name}: {one['refused']}" for name, one in self.journal.candidates(1).items()]
        raise InputError(f"no candidate can be made: {'; '.join(reasons)[:500]}")

    def _say(self, number: int, done: int, offers: list[Candidate]) -> None:
        """The progress of the search, by what may still be added."""
        start, last = self.history[0], self.history[-1]
        share, step = (self.search.budget.share(start, one) for one in (last, offers[0].cost))
        share = min(1.0, share + max(0.0, step - share) * done / len(offers))
        self.known = share if self.known is None else self.known  # a search that goes on has done that before
        self.report.what = f"round {number}, {done} of {len(offers)} candidates, {last.params:,} parameters"
        self.report.done = (share - self.known) / max(1e-9, 1 - self.known)
        if self.report.done > 0:
            self.report.draw()


def _noted(trial: Trial, cost: Cost) -> Entry:
    return {
        "loss": trial.loss if math.isfinite(trial.loss) else None,
        "accuracy": trial.accuracy,
        "params": cost.params,
        "macs": cost.macs,
        "seconds": round(trial.seconds, 4),
        "surgery": round(trial.surgery, 4),
        "refused": trial.refused,
    }


def _loss(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else math.inf
