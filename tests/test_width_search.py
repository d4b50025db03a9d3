"""Width search: widening changes no output, the best gain stays, and what is found is trained anew beside uniform."""

import copy
import itertools
import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import netsurgery
from netsurgery.errors import InputError
from netsurgery.search import Widths, WidthSearch, trials
from test_grow import NET, SERVED, Net, same, samples, seeded

TINY: dict[str, Any] = {"multiple_of": 2, "epochs": 1, "retrain": 2, "batch_size": 24, "lr": 0.02, "log": None}


def search(net: nn.Module = NET, data: Any = None, **given: Any) -> WidthSearch:
    settings = {**TINY, "budget": {"params": 70}, "progress": False, **given}
    return WidthSearch(net, samples() if data is None else data, **settings)


def alike(one: Widths, other: Widths) -> bool:
    pairs = [
        (a.model.state_dict(), b.model.state_dict())
        for a, b in ((one.found, other.found), (one.uniform, other.uniform))
    ]
    return same(one.growth, other.growth) and all(torch.equal(a[name], b[name]) for a, b in pairs for name in a)


def test_layers_widen_up_to_the_budget_and_the_best_gain_stays(tmp_path: Path) -> None:
    log = tmp_path / "widths.jsonl"
    result = search(log=log, patience=9).run()
    history = result.growth.history
    assert history[-1].params <= 70 and len(history) > 2 and all(size % 2 == 0 for size in history[2].widths.values())
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for before, after in itertools.pairwise(history):
        tried = [one for one in lines if one["event"] == "candidate" and one["round"] == after.number]
        best = max(tried, key=lambda one: (before.loss - one["loss"]) / (one["params"] - before.params))
        assert (best["group"], best["loss"]) == (after.group, after.loss) and len(tried) == after.tried


def test_everything_is_trained_in_a_candidate() -> None:
    result = search(patience=9).run()
    assert result.growth.best.number > 0
    model = result.growth.model
    for name, old in NET.named_parameters():
        new = model.get_parameter(name)
        assert not torch.equal(new[tuple(map(slice, old.shape))], old), name


def test_a_candidate_begins_with_the_outputs_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netsurgery.search.fitting.Fitting, "fit", lambda *_: None)
    losses = {one.loss for one in search(patience=9).run().growth.history}
    assert max(losses) - min(losses) < 1e-6


def test_what_is_found_is_trained_from_new_weights_beside_uniform_widths() -> None:
    result = search(retrain=3, patience=9).run()
    x = samples()[0]
    assert result.found.params == result.growth.best.params
    found, uniform = result.found.model, result.uniform.model
    assert type(found) is type(uniform) is Net
    assert [p.shape for p in found.parameters()] == [p.shape for p in result.growth.model.parameters()]
    assert not any(torch.equal(a, b) for a, b in zip(found.parameters(), result.growth.model.parameters(), strict=True))
    assert result.uniform.params == netsurgery.cost(uniform, x[:1]).params <= result.found.params
    one, two = uniform.one.out_features, uniform.two.out_features
    factor = result.uniform.params / 35
    assert one / 2 == pytest.approx(two / 3, rel=0.35) and factor > 1
    text = str(result)
    assert "found widths" in text and f"{result.uniform.params:,}" in text and "(start)" in text


def test_uniform_widths_take_what_room_there_is() -> None:
    """One unit more in any layer would be too much, but for rounding to the same factor."""
    net = seeded(lambda: Net(12, 18))
    result = search(net=net, budget={"params": 700}, retrain=1, patience=9).run()
    widths = (result.uniform.model.one.out_features, result.uniform.model.two.out_features)

    def params(one: int, two: int) -> int:
        return sum(p.numel() for p in Net(one, two).parameters())

    assert params(*widths) == result.uniform.params <= result.found.params < params(widths[0] + 1, widths[1] + 1)


def test_nothing_else_changes_and_the_seed_fixes_all() -> None:
    net, state = copy.deepcopy(NET).train(), torch.get_rng_state()
    one = search(net).run()
    assert torch.equal(torch.get_rng_state(), state) and net.training and not trials._opened
    assert all(torch.equal(t, NET.state_dict()[name]) for name, t in net.state_dict().items())
    assert alike(one, search(net).run()) and not alike(one, search(net, seed=1).run())


def test_an_interrupted_search_goes_on_and_executors_give_the_same_bits(tmp_path: Path) -> None:
    log = tmp_path / "widths.jsonl"
    expected = search(log=log).run()
    lines = log.read_bytes().splitlines(keepends=True)
    for end in range(0, len(lines), 2):
        log.write_bytes(b"".join(lines[:end]))
        assert alike(search(log=log).run(), expected), end
    with ProcessPoolExecutor(2, SERVED) as executor:
        assert alike(search(executor=executor).run(), expected)
    with pytest.raises(InputError, match=r"is the log of another search .*growth was"):
        search(log=log, factor=1.5).run()


class Own(nn.Module):
    """Holds a weight, and does not say how it is drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.last = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((x @ self.weight).relu())


def test_weights_that_nobody_knows_how_to_draw() -> None:
    with pytest.raises(
        InputError, match=r"'the network itself' \(Own\) has no reset_parameters.*: pass reset=f\(model\)"
    ):
        search(seeded(Own))

    def reset(model: nn.Module) -> None:
        nn.init.normal_(model.weight)
        model.last.reset_parameters()

    assert search(seeded(Own), reset=reset).run().found.params > 31


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a factor below 1": ({"factor": 0.5}, r"WidenChannels\(factor=0.5\): a number of at least 1"),
    "a factor that adds nothing": ({"factor": 1, "multiple_of": 1}, "factor=1: a number above 1"),
    "noise": ({"noise": 1.5}, r"noise=1.5\): a number in \[0, 1\)"),
    "retrain": ({"retrain": 0}, "retrain=0: a whole number of at least 1"),
    "budget": ({"budget": {"params": 3}}, "is under the present size"),
    "no labels": ({"data": samples()[0]}, "the data has no labels"),
    "nothing to widen": ({"net": nn.Linear(4, 3)}, "nothing of Linear can grow: '.*' is locked: .*output"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_any_work(name: str, tmp_path: Path) -> None:
    given, said = BAD[name]
    with pytest.raises(InputError, match=said):
        search(**{"log": tmp_path / "widths.jsonl", **given}).run()
    assert not list(tmp_path.iterdir())
