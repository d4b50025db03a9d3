"""Growing in rounds: what stays is the best candidate, old entries are fixed, and an interruption changes nothing."""

import copy
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import netsurgery
from netsurgery.errors import InputError, NetsurgeryError
from netsurgery.passes import Distillation
from netsurgery.search import Growth, identity, trials
from test_planting import NETS

SERVED = multiprocessing.get_context("forkserver")  # forked of a process that has computed no gradients
SERVED.set_forkserver_preload(["netsurgery.search.trials"])


class Net(nn.Module):
    """Two hidden layers, a norm with running statistics, random numbers in training."""

    def __init__(self, first: int = 2, second: int = 3) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(4, first), nn.BatchNorm1d(first), nn.Linear(first, second)
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(second, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(F.relu(self.two(F.relu(self.norm(self.one(x)))))))


class HardCoded(nn.Module):
    """A view that names the width, so that growing needs another forward or another attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.relu(self.one(x)).view(-1, 2, 3).flatten(1))


class Split(nn.Module):
    """Two groups that must keep equal sizes, read by name."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.head = nn.Linear(4, 6), nn.Linear(3, 3)

    def forward(self, values: Tensor) -> Tensor:
        one, two = self.wide(values).chunk(2, 1)
        return self.head(one.sigmoid() * two)


def samples(count: int = 90) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    y = torch.arange(count) % 3
    x = torch.randn(count, 4, generator=generator) * 0.5
    x[:, :3] += F.one_hot(y, 3)
    return x, y


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


NET = seeded(Net)
TEACHER = seeded(lambda: Net(16, 16), 1)
TINY: dict[str, Any] = {"amount": 1, "epochs": 1, "batch_size": 24, "log": None, "progress": False, "lr": 0.02}


def grow(net: nn.Module = NET, data: Any = None, **given: Any) -> Growth:
    settings = {**TINY, "budget": {"params": 55}, **given}
    return netsurgery.grow(net, samples() if data is None else data, **settings)


def same(one: Growth, other: Growth) -> bool:
    """Whether two results are the same bit for bit, but for the time that they took."""
    timeless = [[dataclasses.replace(each, seconds=0, surgery=0) for each in result.history] for result in (one, other)]
    states = [result.model.state_dict() for result in (one, other)]
    return (
        timeless[0] == timeless[1]
        and one.why == other.why
        and list(states[0]) == list(states[1])
        and all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    )


def test_units_are_added_up_to_the_budget_and_old_entries_stay() -> None:
    result = grow(patience=9)
    first, last = result.history[0], result.history[-1]
    assert first.params == 35 == sum(one.numel() for one in NET.parameters())
    assert 35 < last.params <= 55 and result.why == "every further growth is over the budget"
    assert last.widths == {name: result.edit.counts.get(name, size) for name, size in first.widths.items()} or (
        result.best is not last
    )
    for before, after in itertools.pairwise(result.history):
        grown = [name for name in first.widths if after.widths[name] != before.widths[name]]
        assert grown == [after.group] and after.widths[after.group] == before.widths[after.group] + 1
        assert after.params > before.params and after.number == before.number + 1
    model = result.model
    assert type(model) is Net and netsurgery.cost(model, samples()[0][:1]).params == result.best.params
    for name, old in NET.state_dict().items():
        new = model.state_dict()[name]
        assert torch.equal(new[tuple(map(slice, old.shape))], old), name


def test_the_best_network_of_all_rounds_is_given_back() -> None:
    result = grow(patience=2, lr=2.0, budget={"params": 400}, epochs=2, amount=2)
    losses = [one.loss for one in result.history]
    assert result.why == "2 rounds without a lower loss on held-out samples"
    assert result.best.number == len(losses) - 3 == losses.index(min(losses))
    x, y = samples()
    held = netsurgery.search.split.read((x, y), 0.2, 0).held
    with torch.no_grad():
        loss = F.cross_entropy(result.model.eval()(held.inputs[0][0]).double(), held.targets)
    assert float(loss) == pytest.approx(result.best.loss, rel=1e-5)


def test_nothing_else_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    net, teacher = copy.deepcopy(NET).train(), copy.deepcopy(TEACHER).train()
    net.one.weight.requires_grad_(False)
    x, y = samples()
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()  # noqa: NPY002
    threads = torch.get_num_threads()
    before = [copy.deepcopy(one.state_dict()) for one in (net, teacher)]
    result = grow(net, (x, y), teacher=teacher, threads=2)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert numpy.random.get_state()[1].tolist() == states[2]  # noqa: NPY002
    assert torch.get_num_threads() == threads and not list(tmp_path.iterdir())
    for one, was in zip((net, teacher), before, strict=True):
        assert one.training and all(torch.equal(t, was[name]) for name, t in one.state_dict().items())
        assert all(p.grad is None for p in one.parameters())
    assert not net.one.weight.requires_grad and torch.equal(x, samples()[0])
    assert result.model.training and not result.model.one.weight.requires_grad and result.model.two.weight.requires_grad
    assert not trials._opened


def test_in_inference_mode_it_is_the_same() -> None:
    expected = grow(teacher=TEACHER)
    with torch.inference_mode():
        assert same(grow(copy.deepcopy(NET), samples(), teacher=TEACHER), expected)
    with torch.no_grad():
        assert same(grow(teacher=TEACHER), expected)


def entries(path: Path, event: str) -> list[dict[str, Any]]:
    return [one for one in map(json.loads, path.read_text().splitlines()) if one["event"] == event]


@pytest.mark.parametrize("by", ["loss", "gain"])
def test_the_best_candidate_stays(by: str, tmp_path: Path) -> None:
    """Worked out anew from the log, in which all that was tried is."""
    log = tmp_path / "growth.jsonl"
    result = grow(by=by, log=log, net=seeded(lambda: Net(2, 6), 3), budget={"params": 90})
    assert len(result.history) > 2
    for before, after in itertools.pairwise(result.history):
        found = [one for one in entries(log, "candidate") if one["round"] == after.number]
        assert len(found) == after.tried and (after.tried == 2 or after.number > 2)

        def merit(one: dict[str, Any], before: Any = before) -> float:
            rise = before.loss - one["loss"]
            return rise if by == "loss" else rise / (one["params"] - before.params)

        best = max(found, key=merit)
        assert (best["group"], best["loss"], best["params"]) == (after.group, after.loss, after.params)


def test_loss_and_gain_choose_differently() -> None:
    groups = [
        [one.group for one in grow(net=seeded(lambda: Net(2, 6), 3), budget={"params": 110}, by=by, patience=9).history]
        for by in ("loss", "gain")
    ]
    assert groups[0] != groups[1]


def test_candidates_are_drawn_from_the_seed() -> None:
    given = {"net": seeded(lambda: Net(2, 6), 3), "budget": {"params": 110}, "candidates": 1, "patience": 9}
    one, other, third = grow(**given), grow(**given), grow(**given, seed=1)
    assert same(one, other) and not same(one, third)
    assert {each.tried for each in one.history[1:]} == {1}
    assert len({each.group for each in one.history[1:]}) == 2


@pytest.mark.parametrize("teacher", [None, TEACHER], ids=["alone", "teacher"])
def test_executors_give_the_same_bits(teacher: nn.Module | None) -> None:
    given: dict[str, Any] = {"teacher": teacher, "budget": {"params": 50}}
    expected = grow(**given)
    for executor in (ProcessPoolExecutor(2, SERVED), ProcessPoolExecutor(1, SERVED), ThreadPoolExecutor(3)):
        with executor:
            assert same(grow(**given, executor=executor), expected), executor


@pytest.mark.slow
def test_the_executor_of_a_cluster_gives_the_same_bits() -> None:
    import distributed

    given: dict[str, Any] = {"teacher": TEACHER, "budget": {"params": 50}}
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        assert same(grow(**given, executor=client.get_executor()), grow(**given))


def test_of_equal_candidates_the_first_stays_whoever_is_done_first(monkeypatch: pytest.MonkeyPatch) -> None:
    original = trials.tried_by
    for order in (list, lambda found: found[::-1]):

        def alike(*given: Any, order: Any = order) -> Any:
            return order([(name, dataclasses.replace(one, loss=1.0)) for name, one in original(*given)])

        monkeypatch.setattr(trials, "tried_by", alike)
        first = grow(budget={"params": 50}, patience=1).history[1]
        assert (first.group, first.tried) == ("one", 2)


@pytest.mark.parametrize("candidates", [None, 1])
def test_what_cannot_be_made_is_left_out(
    candidates: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, refused = trials.tried, ["one"]

    def refuses(*task: Any) -> trials.Trial:
        asked = [name for name in refused if f'"{name}": {{"size"' in task[2]]
        return trials.Trial(refused=f"{asked[0]} cannot") if asked else original(*task)

    monkeypatch.setattr(trials, "tried", refuses)
    log = tmp_path / "growth.jsonl"
    result = grow(candidates=candidates, patience=9, log=log)
    assert {one.group for one in result.history} == {"", "two"}
    assert [one["group"] for one in entries(log, "candidate") if one["refused"]] == ["one"]  # and never again
    assert same(grow(candidates=candidates, patience=9, log=log), result)
    refused.append("two")
    with pytest.raises(InputError, match=r"^no candidate can be made: .*one: one cannot"):
        grow(candidates=candidates)


# Interruptions -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Growth]:
    log = tmp_path_factory.mktemp("finished") / "growth.jsonl"
    return log, grow(log=log, teacher=TEACHER, patience=9)


def cut(log: Path, folder: Path, size: int) -> Path:
    """A copy of a log that ends after so many bytes, with all the weights."""
    (folder / log.name).write_bytes(log.read_bytes()[:size])
    weights = log.with_name("growth.weights")
    (folder / weights.name).mkdir()
    for path in weights.iterdir():
        (folder / weights.name / path.name).write_bytes(path.read_bytes())
    return folder / log.name


def places(log: Path) -> list[int]:
    """After each line, and in the middle of some."""
    sizes = [len(line) for line in log.read_bytes().splitlines(keepends=True)]
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    return [0, *ends, *(end - size // 2 for end, size in zip(ends, sizes, strict=True))][: len(ends) + 5]


def test_a_log_that_ends_anywhere_is_gone_on_with(finished: tuple[Path, Growth], tmp_path: Path) -> None:
    log, expected = finished
    whole = [{**one, "seconds": 0, "surgery": 0} for one in map(json.loads, log.read_text().splitlines())]
    assert len(places(log)) > 12
    for size in places(log):
        (tmp_path / str(size)).mkdir()
        own = cut(log, tmp_path / str(size), size)
        assert same(grow(log=own, teacher=TEACHER, patience=9), expected), size
        left = [{**one, "seconds": 0, "surgery": 0} for one in map(json.loads, own.read_text().splitlines())]
        assert left == whole, size


def test_what_is_known_is_not_computed_again(
    finished: tuple[Path, Growth], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, expected = finished
    tried: list[str] = []
    original = trials.tried
    monkeypatch.setattr(trials, "tried", lambda *task: tried.append(task[2]) or original(*task))
    assert same(grow(log=log, teacher=TEACHER, patience=9), expected) and not tried
    lines = log.read_bytes().splitlines(keepends=True)
    second = next(index for index, line in enumerate(lines) if json.loads(line).get("round") == 2)
    own = cut(log, tmp_path, sum(map(len, lines[: second + 1])))  # one candidate of the second round is known
    assert same(grow(log=own, teacher=TEACHER, patience=9), expected)
    later = sum(one.tried for one in expected.history[2:])
    assert len(tried) in (later - 1, later)  # the known one is trained again only if it stays


def test_the_best_may_have_been_tried_before_an_interruption(tmp_path: Path) -> None:
    """Its weights are gone then: it is trained again, and no other takes its place."""
    given: dict[str, Any] = {"net": seeded(lambda: Net(2, 6), 0), "budget": {"params": 75}, "patience": 9}
    log = tmp_path / "growth.jsonl"
    expected = grow(**given, log=log)
    assert [one["group"] for one in entries(log, "candidate")][:2] == ["one", "two"]
    assert expected.history[1].group == "one"
    lines = log.read_bytes().splitlines(keepends=True)
    first = next(index for index, line in enumerate(lines) if b'"candidate"' in line)
    log.write_bytes(b"".join(lines[: first + 1]))
    assert same(grow(**given, log=log), expected)


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_round_whose_weights_are_gone_is_worked_out_again(
    gone: int, finished: tuple[Path, Growth], tmp_path: Path
) -> None:
    log, expected = finished
    own = cut(log, tmp_path, log.stat().st_size)
    (tmp_path / "growth.weights" / f"round-{gone}.safetensors").unlink()
    assert same(grow(log=own, teacher=TEACHER, patience=9), expected)
    assert own.read_text().count('"event": "round"') == len(expected.history)


def test_workers_that_are_forked_too_late_are_said() -> None:
    """Gradients that begin in a thread of autograd's own, as on a GPU, keep forked processes from having any."""

    class Failed(ThreadPoolExecutor):
        def submit(self, *_: Any, **__: Any) -> Any:
            return super().submit(self.fail)

        def fail(self) -> None:
            raise RuntimeError("Unable to handle autograd's threading, see https://.../wiki/Autograd-and-Fork")

    with Failed(1) as executor, pytest.raises(InputError, match=r"cannot compute gradients .*get_context\('spawn'\)"):
        grow(executor=executor)


@pytest.mark.parametrize("damage", ["cut", "empty", "no weights", "one bit", "another round"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_round_whose_weights_are_damaged_is_worked_out_again(
    damage: str, number: int, finished: tuple[Path, Growth], tmp_path: Path
) -> None:
    log, expected = finished
    own = cut(log, tmp_path, log.stat().st_size)
    path = tmp_path / "growth.weights" / f"round-{number}.safetensors"
    whole = path.read_bytes()
    damaged = {
        "cut": whole[:-7],
        "empty": b"",
        "no weights": b"not weights",
        "one bit": whole[:-1] + bytes([whole[-1] ^ 1]),
        "another round": path.with_name("round-2.safetensors").read_bytes(),
    }
    path.write_bytes(damaged[damage])
    assert same(grow(log=own, teacher=TEACHER, patience=9), expected)
    assert path.read_bytes() == whole and own.read_text().count('"event": "round"') == len(expected.history)


def dies(*_: Any) -> None:
    os._exit(3)


def test_a_worker_that_dies_is_said_and_the_log_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "growth.jsonl"
    with monkeypatch.context() as patch, ProcessPoolExecutor(1, SERVED) as executor:
        patch.setattr(trials, "tried", dies)
        with pytest.raises(NetsurgeryError, match=r"a worker of the executor died .*the same call goes on from there"):
            grow(log=log, executor=executor)
    assert same(grow(log=log), grow())


def test_the_log_names_settings_candidates_and_rounds(finished: tuple[Path, Growth]) -> None:
    log, result = finished
    (settings,) = entries(log, "settings")
    assert settings["settings"]["budget"] == {"params": 55} and settings["torch"] == torch.__version__
    assert settings["settings"]["distillation"] == (
        "Distillation(temperature=4, alpha=0.5, hint_weight=1) of None, dim=None"
    )
    assert [one["number"] for one in entries(log, "round")] == [one.number for one in result.history]
    for one in entries(log, "candidate"):
        assert one["loss"] > 0 and one["params"] <= 55 and one["seconds"] >= one["surgery"] > 0 and not one["refused"]


OTHERS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "lr": (lambda: {"lr": 0.03}, "lr was 0.02 and is 0.03"),
    "budget": (lambda: {"budget": {"params": 56}}, "budget was {'params': 55} and is {'params': 56}"),
    "growth": (lambda: {"amount": 2}, "growth was 'PlantChannels\\(amount=1\\)' and is 'PlantChannels\\(amount=2\\)'"),
    "network": (lambda: {"net": seeded(Net, 7)}, "the network is another"),
    "data": (lambda: {"data": samples(93)}, "the data is another"),
    "teacher": (lambda: {"teacher": None}, "the teacher is another"),
    "values of example inputs": (lambda: {"example_inputs": X[:1] + 1}, "other example_inputs"),
    "shapes of example inputs": (lambda: {"example_inputs": X[:2]}, "other example_inputs"),
    "dropout": (lambda: {"net": changed(NET, "drop", "p", 0.2)}, "the network is another"),
    "the momentum of a norm": (lambda: {"net": changed(NET, "norm", "momentum", 0.2)}, "the network is another"),
    "a setting of one's own": (lambda: {"net": changed(NET, "", "scale", 0.5)}, "the network is another"),
    "another forward": (lambda: {"net": of_class(NET, Slower)}, "the network is another"),
    "what is frozen": (lambda: {"net": frozen(NET)}, "the network is another"),
}


class Slower(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


def changed(net: nn.Module, path: str, name: str, value: object) -> nn.Module:
    net = copy.deepcopy(net)
    setattr(net.get_submodule(path), name, value)
    return net


def of_class(net: nn.Module, kind: type[nn.Module]) -> nn.Module:
    other = kind()
    other.load_state_dict(net.state_dict())
    return other


def frozen(net: nn.Module) -> nn.Module:
    net = copy.deepcopy(net)
    net.one.weight.requires_grad_(False)
    return net


def test_a_class_of_the_same_name_with_another_forward(tmp_path: Path) -> None:
    def made(factor: float) -> nn.Module:
        class Scaled(Net):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) * factor

        return of_class(NET, Scaled)

    log = tmp_path / "growth.jsonl"
    grow(made(1.0), log=log, budget={"params": 45})
    grow(made(1.0), log=log, budget={"params": 45})
    with pytest.raises(InputError, match="the network is another"):
        grow(made(2.0), log=log, budget={"params": 45})


def test_names_of_inputs_tell_data_apart() -> None:
    x, y = X[:, :2], X[:, 2:]
    one, other = ({"a": x, "b": y}, {"b": x, "a": y})
    assert identity.fingerprint("data", one) != identity.fingerprint("data", other)


def test_nothing_is_asked_of_a_network_without_a_log() -> None:
    class Locked(Net):
        lock = threading.Lock()

    assert len(grow(of_class(NET, Locked)).history) > 1


@pytest.mark.parametrize("name", OTHERS)
def test_a_log_of_another_search_is_refused(name: str, finished: tuple[Path, Growth]) -> None:
    log, _ = finished
    text = log.read_bytes()
    make, said = OTHERS[name]
    with pytest.raises(InputError, match=f"growth.jsonl is the log of another search .*{said}.*: remove it, or"):
        grow(**{"teacher": TEACHER, "log": log, "patience": 9, **make()})
    assert log.read_bytes() == text


def of_softness(by: float) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, label_smoothing=by)

    return loss


def by_default(smoothing: float) -> Any:
    def loss(outputs: Tensor, targets: Tensor, by: float = smoothing) -> Tensor:
        return F.cross_entropy(outputs, targets, label_smoothing=by)

    return loss


class Focal:
    """An object with a state and the default text, which holds an address."""

    def __init__(self, power: float) -> None:
        self.power = power

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets) * self.power

    def method(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self(outputs, targets)


def local_class(power: float) -> Any:
    class Loss(nn.Module):
        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return super().__class__ and F.cross_entropy(outputs, targets) * power

    return Loss()


def calling(inner: Any) -> Any:
    return lambda outputs, targets: inner(outputs, targets)


ALIKE: dict[str, tuple[str, Callable[[], Any], Callable[[], Any]]] = {
    "lambdas that call another": (
        "loss",
        lambda: lambda o, t: F.cross_entropy(o, t),
        lambda: lambda o, t: F.nll_loss(o, t),
    ),
    "lambdas with another number": (
        "optimizer",
        lambda: lambda p, lr: torch.optim.SGD(p, lr, 0.5),
        lambda: lambda p, lr: torch.optim.SGD(p, lr, 0.9),
    ),
    "closures": ("loss", lambda: of_softness(0.1), lambda: of_softness(0.2)),
    "closures of closures": ("loss", lambda: calling(of_softness(0.1)), lambda: calling(of_softness(0.2))),
    "defaults": ("loss", lambda: by_default(0.1), lambda: by_default(0.2)),
    "objects": ("loss", lambda: Focal(1.0), lambda: Focal(2.0)),
    "methods": ("loss", lambda: Focal(1.0).method, lambda: Focal(2.0).method),
    "local classes": ("loss", lambda: local_class(1.0), lambda: local_class(2.0)),
    "modules": (
        "loss",
        lambda: nn.CrossEntropyLoss(label_smoothing=0.1),
        lambda: nn.CrossEntropyLoss(label_smoothing=0.2),
    ),
    "weights of classes": (
        "loss",
        lambda: nn.CrossEntropyLoss(torch.tensor([1.0, 1.0, 1.0])),
        lambda: nn.CrossEntropyLoss(torch.tensor([1.0, 1.0, 2.0])),
    ),
    "partials": (
        "loss",
        lambda: functools.partial(calling(of_softness(0.1))),
        lambda: functools.partial(calling(of_softness(0.3))),
    ),
    "partials of numbers": (
        "optimizer",
        lambda: functools.partial(torch.optim.AdamW, betas=(0.9, 0.99)),
        lambda: functools.partial(torch.optim.AdamW, betas=(0.8, 0.99)),
    ),
    "the loss of a distillation": (
        "distillation",
        lambda: Distillation(loss=of_softness(0.1)),
        lambda: Distillation(loss=of_softness(0.2)),
    ),
}


@pytest.mark.parametrize("name", ALIKE)
def test_functions_of_one_name_are_told_apart(name: str, tmp_path: Path) -> None:
    key, one, other = ALIKE[name]
    given = {"log": tmp_path / "growth.jsonl", "budget": {"params": 45}, "teacher": None}
    given["teacher"] = TEACHER if key == "distillation" else None
    expected = grow(**given, **{key: one()})
    assert same(grow(**given, **{key: one()}), expected)
    with pytest.raises(InputError, match=f"growth.jsonl is the log of another search .*{key}"):
        grow(**given, **{key: other()})


def test_a_loss_whose_state_cannot_be_told_is_refused_with_a_log(tmp_path: Path) -> None:
    numbers = (one for one in range(10**6))

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets) + 0 * next(numbers)

    with pytest.raises(
        InputError,
        match=r"^loss=test_grow\..*\.loss cannot be told from another for the log \(cannot pickle 'generator' "
        r"object\): pass one that can be pickled, or log=None$",
    ):
        grow(loss=loss, log=tmp_path / "growth.jsonl")
    assert not list(tmp_path.iterdir()) and len(grow(loss=loss).history) > 1


class Unwilling:
    """Refuses to be pickled in a way of its own."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise self.error


@pytest.mark.parametrize("value", [pickle.PickleError("no"), RuntimeError("no"), NotImplementedError("no")], ids=repr)
def test_every_way_to_refuse_pickling_is_said(value: Exception) -> None:
    with pytest.raises(InputError, match=r"^loss=f cannot be told from another for the log \(no\): pass one that"):
        identity.fingerprint("loss=f", Unwilling(value))


def fingerprints() -> str:
    return repr([[identity.fingerprint(name, one()) for name, (_, one, _) in ALIKE.items()], identity.of_network(NET)])


def test_fingerprints_are_the_same_in_another_process() -> None:
    found = subprocess.run(
        [sys.executable, "-c", "import test_grow; print(test_grow.fingerprints(), end='')"],
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == fingerprints()


@pytest.mark.parametrize("text", ["a line without its end", "not a log\n", '{"event": "round"}\n', "[1]\n"])
def test_another_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text(text)
    with pytest.raises(InputError, match=r"notes.txt is no log of a search.*: pass another file as log, or None"):
        grow(log=tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == text


def test_a_log_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written to \(.*\): pass another file as log, or None"):
        grow(log=tmp_path / "file" / "growth.jsonl")
    with pytest.raises(InputError, match="cannot be written to"):
        grow(log=tmp_path)


# Bad input ---------------------------------------------------------------------------------------------------------

X, Y = samples()


def logits_alone(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs


def of_matrices(parameters: list[Tensor], lr: float) -> Any:
    raise ValueError("2D parameters only")


def of_nans() -> nn.Module:
    net = copy.deepcopy(NET)
    with torch.no_grad():
        net.head.weight.fill_(float("nan"))
    return net


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "budget under the present size": (
        {"budget": {"params": 34}},
        "budget={'params': 34} is under the present size: the network has 35 params where 34 are allowed",
    ),
    "budget of MACs": ({"budget": {"macs": 10}}, "under the present size: the network has 23 macs where 10"),
    "no room": ({"budget": {"params": 36}}, "leaves no room: with more units in 'two' alone the network has 41 params"),
    "unknown budget": ({"budget": {"flops": 9}}, "budget has no key 'flops': there are params and macs"),
    "budget of another form": ({"budget": 900}, r"budget=900: pass dict\(params=...\), dict\(macs=...\)"),
    "share as budget": ({"budget": {"params": 1.5}}, "params is a whole number of at least 1"),
    "teacher of other classes": (
        {"teacher": nn.Linear(4, 5)},
        r"the teacher's logits are \(16, 5\) for 16 samples and the network's \(16, 3\): a teacher of the same classes",
    ),
    "teacher that is none": ({"teacher": "big"}, "takes a torch.nn.Module as its teacher, got str"),
    "teacher of other inputs": ({"teacher": nn.Linear(9, 3)}, "Linear does not run on the data"),
    "inputs alone": ({"data": X}, r"the data has no labels: pass \(inputs, targets\)"),
    "no labels": ({"data": (X, None)}, "the data has no labels"),
    "a dataset without labels": ({"data": TensorDataset(X)}, r"expected \(inputs, targets\), or a dictionary with"),
    "other labels": ({"data": (X, Y + 1)}, "labels go from 1 to 3 where there are 3 classes"),
    "nothing to grow": ({"net": nn.Linear(4, 3)}, "nothing of Linear can grow: '.*' is locked: .*output"),
    "a locked group": (
        {"net": nn.Sequential(nn.Linear(4, 6), nn.Softmax(1), nn.Linear(6, 3))},
        "nothing of Sequential can grow with these settings. 0: 0 of 6 .*it works across these units without weights",
    ),
    "amount": ({"amount": 0}, "amount=0: a whole number of at least 1"),
    "amount that is a share": ({"amount": 0.5}, "amount=0.5: a whole number of at least 1"),
    "candidates": ({"candidates": 0}, "candidates=0: a whole number of at least 1"),
    "patience": ({"patience": 0}, "patience=0: a whole number of at least 1"),
    "epochs": ({"epochs": 0}, "epochs=0: a whole number of at least 1"),
    "threads": ({"threads": True}, "threads=True: a whole number of at least 1"),
    "lr": ({"lr": 0}, "lr=0: a number above 0"),
    "by": ({"by": "accuracy"}, "by='accuracy': 'loss', or 'gain' for each added parameter"),
    "validation": ({"validation": 1.0}, r"validation=1.0: the share of the data to hold out, in \(0, 1\)"),
    "validation of nothing": ({"validation": 0.001}, "leaves none to learn or none to hold"),
    "hints": (
        {
            "teacher": TEACHER,
            "distillation": Distillation(hints={"one": "one"}, student=Net(), teacher=Net(), example_inputs=X),
        },
        "distillation has hints, which are bound to one student",
    ),
    "distillation alone": ({"distillation": Distillation()}, "there is no teacher: pass teacher="),
    "an optimizer that is none": ({"optimizer": nn.Linear}, "optimizer=torch.nn.modules.linear.Linear: "),
    "an optimizer that wants a closure": (
        {"optimizer": torch.optim.LBFGS},
        "an optimizer that steps without a closure",
    ),
    "an optimizer of matrices": ({"optimizer": of_matrices}, "optimizer=test_grow.of_matrices: 2D parameters only"),
    "a loss of another form": (
        {"loss": logits_alone},
        r"the loss of 16 samples is \(16, 3\): return the mean, or one number",
    ),
    "other labels late in the data": (
        {"data": (X, Y.clone().index_fill_(0, torch.tensor([77]), 9)), "loss": nn.CrossEntropyLoss()},
        "the loss does not take these outputs and targets: Target 9 is out of bounds",
    ),
    "other labels late in the data, with a teacher": (
        {
            "data": (X, Y.clone().index_fill_(0, torch.tensor([77]), -1)),
            "teacher": TEACHER,
            "loss": nn.CrossEntropyLoss(),
        },
        "the loss does not take these outputs and targets: Target -1 is out of bounds|labels go from -1 to 2",
    ),
    "labels for validation": (
        {"validation": (X, Y + 1)},
        "^validation: .*labels go from 1 to 3 where there are 3 classes",
    ),
    "late labels for validation": (
        {"validation": (X, Y.clone().index_fill_(0, torch.tensor([77]), 9)), "loss": nn.CrossEntropyLoss()},
        "^validation: the loss does not take these outputs and targets: Target 9 is out of bounds",
    ),
    "inputs for validation": ({"validation": (X[:, :3], Y)}, "^validation: Net does not run on the data: "),
    "inputs of another dtype for validation": (
        {"validation": (X.long(), Y)},
        "^validation: Net does not run on the data: ",
    ),
    "numbers for validation": ({"validation": (X, Y.float())}, "^validation: .*neither classes nor their shares"),
    "numbers for validation and a loss": (
        {"validation": (X, Y.float()), "loss": F.nll_loss},
        "^validation: the loss does not take these outputs and targets: ",
    ),
    "targets of another shape for validation": (
        {"validation": (X, torch.stack([Y, Y], 1)), "loss": F.cross_entropy},
        "^validation: the loss does not take these outputs and targets: ",
    ),
    "shares for validation and a loss of numbers": (
        {
            "data": (X, F.one_hot(Y, 3).float()),
            "validation": (X, torch.zeros(90, 2)),
            "loss": lambda outputs, targets: (outputs - targets).square().mean(),
        },
        "^validation: the loss does not take these outputs and targets: ",
    ),
    "a network that returns no numbers": (
        {"net": of_nans()},
        "the loss of the network as it is, is nan",
    ),
    "shares of classes and a teacher": (
        {"data": (X, F.one_hot(Y, 3).float()), "teacher": TEACHER},
        "no class indices",
    ),
    "an executor that is none": ({"executor": 4}, "executor=4: a concurrent.futures.Executor, or None"),
    "a pattern": ({"include": ["layer9"]}, "pattern 'layer9' matches no module with parameters in Net"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_any_work(name: str, tmp_path: Path) -> None:
    given, said = BAD[name]
    log = tmp_path / "growth.jsonl"
    with pytest.raises(InputError, match=said):
        grow(**{"log": log, **given})
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_pickled_is_refused_before_any_work() -> None:
    net = copy.deepcopy(NET)
    net.register_forward_hook(lambda *_: None)
    with (
        ProcessPoolExecutor(1, SERVED) as executor,
        pytest.raises(InputError, match="cannot be sent to other processes"),
    ):
        grow(net=net, executor=executor)
    assert len(grow(net=net).history) > 1


def vanishing(outputs: Tensor, targets: Tensor) -> Tensor:
    """No number as soon as the network differs from what it was."""
    same = outputs.shape[0] == 18 and torch.equal(outputs, held_outputs())
    return F.cross_entropy(outputs, targets) * (1.0 if same or outputs.requires_grad else float("nan"))


def held_outputs() -> Tensor:
    with torch.no_grad():
        held = netsurgery.search.split.read(samples(), 0.2, 0).held
        return copy.deepcopy(NET).eval()(held.inputs[0][0])


def test_training_that_diverges_ends_the_search() -> None:
    result = grow(loss=vanishing)
    assert result.why == "training diverged in every candidate of a round: a lower lr may help"
    assert len(result.history) == 1 and all(
        torch.equal(one, NET.state_dict()[name]) for name, one in result.model.state_dict().items()
    )


# Data, models, settings --------------------------------------------------------------------------------------------


def test_forms_of_data() -> None:
    x, y = samples()
    validation = (x[:30], y[:30])
    expected = grow(data=(x, y), validation=validation)
    data = TensorDataset(x, y)
    for form in (
        data,
        DataLoader(data, 16, shuffle=True),
        [(one, int(label)) for one, label in zip(x, y, strict=True)],
    ):
        found = grow(data=form, validation=validation)
        assert found.history[0] == expected.history[0] and len(found.history) > 1


def test_each_class_is_held_out_alike() -> None:
    x, y = samples()
    y = torch.where(torch.arange(90) < 60, 0, y)
    split = netsurgery.search.split.read((x, y), 0.2, 0)
    assert split.held.targets.bincount().tolist() == [round(0.2 * int(n)) for n in y.bincount()]
    assert split.train.count + split.held.count == 90
    rows = torch.cat([split.train.inputs[0][0], split.held.inputs[0][0]])
    assert len(rows.unique(dim=0)) == 90


def test_groups_of_equal_sizes_grow_together_by_keyword_inputs() -> None:
    x, y = samples()
    result = grow(net=seeded(Split), data={"values": x, "labels": y}, budget={"params": 60})
    assert len(result.history) > 1 and result.model.wide.out_features == 2 * result.model.head.in_features
    assert [*result.best.widths.values()] in ([4, 4], [5, 5], [4], [5], [3, 3], [3])


def test_code_with_sizes_in_it_is_rewritten_in_workers_too() -> None:
    net = seeded(HardCoded)
    expected = grow(net=net, budget={"params": 100}, amount=3)
    assert expected.history[-1].params > 51
    with ProcessPoolExecutor(1, SERVED) as executor:
        assert same(grow(net=net, budget={"params": 100}, amount=3, executor=executor), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_networks_of_all_kinds_grow_and_keep_their_old_entries(name: str) -> None:
    make, shape = NETS[name]
    net = seeded(make)
    x = torch.randn(48, *shape[1:], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        net.train()(x)
        classes = net.eval()(x).shape[1]
    given: dict[str, Any] = {"amount": 2, "candidates": 2, "batch_size": 16, "patience": 2}
    params = 2 * sum(one.numel() for one in net.parameters())
    result = grow(net, (x, torch.arange(48) % classes), budget={"params": params}, **given)
    last = result.history[-1]
    assert last.number > 1 and result.history[0].params < last.params <= params
    assert same(grow(net, (x, torch.arange(48) % classes), budget={"params": params}, **given), result)
    before, after = net.state_dict(), result.model.state_dict()
    network = result.edit.network
    for key, old in before.items():
        if key in network.axes:
            added = result.edit.positions.new_entries(network.axes[key])
            kept = after[key] if added is None else after[key][~added].view(old.shape)
            assert torch.equal(kept, old), key


def test_modules_say_what_may_grow() -> None:
    for given in ({"include": NET.two}, {"include": "two"}, {"exclude": [NET.one]}, {"amount": {"two": 1}}):
        result = grow(**given)
        assert {one.group for one in result.history[1:]} == {"two"}, given


def test_a_teacher_and_its_share_change_what_is_learnt() -> None:
    found = [
        grow(),
        grow(teacher=TEACHER),
        grow(teacher=TEACHER, distillation=Distillation(alpha=0.9)),
        grow(teacher=TEACHER, distillation=Distillation(alpha=0.0)),
    ]
    assert not same(found[0], found[1]) and not same(found[1], found[2])
    assert same(found[0], found[3])  # nothing of the teacher is taken


def test_a_loss_of_the_users() -> None:
    x, y = samples()
    smooth = grow(data=(x, y), loss=nn.CrossEntropyLoss(label_smoothing=0.2))
    each = grow(data=(x, y), loss=nn.CrossEntropyLoss(label_smoothing=0.2, reduction="none"))
    assert smooth.history[0].loss == pytest.approx(each.history[0].loss) != grow().history[0].loss
    squares = grow(data=(x, F.one_hot(y, 3).float()), loss=F.mse_loss)
    assert squares.history[-1].loss < squares.history[0].loss and squares.history[0].accuracy is None


class Positions(nn.Module):
    """Three classes for each of two positions."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.relu(self.one(x))).view(-1, 3, 2)


@pytest.mark.parametrize(
    ("ignored", "loss"),
    [
        (-100, None),
        (-100, F.cross_entropy),
        (255, nn.CrossEntropyLoss(ignore_index=255)),
        (0, nn.CrossEntropyLoss(ignore_index=0)),
    ],
)
def test_accuracy_is_that_of_positions_with_a_label(ignored: int, loss: Any) -> None:
    y = torch.stack([Y, Y], 1)
    y[torch.arange(90) % 4 == 0, 1] = ignored
    held = X[:30], y[:30]
    net = seeded(Positions)
    found = grow(net, (X, y), validation=held, loss=loss, budget={"params": 80}).history[0].accuracy
    said = held[1] != ignored
    right = (net(X[:30]).argmax(1) == held[1])[said]
    assert found == pytest.approx(100 * float(right.double().mean())) and bool((~said).any())


def test_without_any_label_there_is_no_accuracy() -> None:
    fitting = netsurgery.search.fitting.Fitting(1, 8, torch.optim.SGD, 0.1, nn.CrossEntropyLoss(reduction="none"))
    samples = netsurgery.passes.calibration.Samples(((X,), {}), torch.full((90,), -100), 90)
    assert fitting.measure(NET, samples).accuracy is None


def test_an_optimizer_with_arguments_of_its_own() -> None:
    momentum = grow(optimizer=functools.partial(torch.optim.SGD, momentum=0.9))
    assert not same(momentum, grow(optimizer=torch.optim.SGD))


def test_a_budget_of_macs_and_of_both() -> None:
    assert grow(budget={"macs": 40}).history[-1].macs <= 40
    both = grow(budget={"macs": 400, "params": 50})
    assert both.history[-1].params <= 50 and both.why == "every further growth is over the budget"


def test_the_table_and_the_picture(tmp_path: Path) -> None:
    result = grow(patience=9)
    lines = str(result).splitlines()
    assert " ".join(lines[0].split()) == "round grown parameters MACs held-out loss accuracy % tried s"
    assert lines[1].split()[:4] == ["0", "(start)", "35", "23"]
    assert len(lines) == len(result.history) + 2 and sum(" *" in line for line in lines[1:-1]) == 1
    assert lines[-1] == f"stopped: {result.why}; * is the network that is given back"
    result.plot(tmp_path / "widths.png")
    assert (tmp_path / "widths.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(NetsurgeryError, match=r"cannot be written to .*: pass another path"):
        result.plot(tmp_path / "none" / "widths.png")


def test_the_edit_is_all_that_was_added() -> None:
    result = grow(patience=9)
    again = netsurgery.rewrite(NET, netsurgery.Edit.from_json(result.edit.to_json(), netsurgery.trace(NET, X[:1])))
    again.load_state_dict(result.model.state_dict())
    assert torch.equal(again.eval()(X), result.model.eval()(X))


def test_it_says_how_far_it_is(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netsurgery.passes.progress, "_EVERY", 0.0)
    with caplog.at_level("INFO", "netsurgery"):
        grow(progress=True)
    lines = [one.message for one in caplog.records if one.message.startswith("grow, round")]
    assert lines and all("% done, about " in line and " left after " in line for line in lines)
    assert "candidates, 35 parameters" in lines[0]
