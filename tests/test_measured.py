"""What a plan says of loss and agreement where its passes hold data; the same by hand, for every kind of output."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import netsurgery
from netsurgery.errors import InputError
from netsurgery.fidelity import Measured
from netsurgery.models import DigitsResNet
from netsurgery.passes import (
    FisherScore,
    LossIncreaseScore,
    MagnitudeScore,
    PruneChannels,
    ReconstructionScore,
    TaylorScore,
    agreement,
    measure,
    reporting,
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def net(inputs: int = 6, outputs: int = 4, width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Dropout(0.5), nn.Linear(width, outputs))


def cut(model: nn.Module, x: Any = None, ratio: float = 0.5) -> nn.Module:
    return netsurgery.apply(model, [MagnitudeScore(), PruneChannels(ratio)], x)


def expected(model: nn.Module, small: nn.Module, x: Tensor, y: Tensor | None) -> Measured:
    """The report on logits ``(n, classes)``, by the textbook."""
    with torch.no_grad():
        a, b = (copy.deepcopy(one).eval()(x).double() for one in (model, small))
    loss = None if y is None else tuple(float(F.cross_entropy(t, y)) for t in (a, b))
    kl = float(F.kl_div(b.log_softmax(1), a.log_softmax(1), log_target=True, reduction="batchmean"))
    agreement = float((a.argmax(1) == b.argmax(1)).double().mean())
    return Measured(len(x), loss, agreement, kl, float((a - b).norm() / a.norm()))  # type: ignore[arg-type]


def assert_same(found: Measured | None, wanted: Measured) -> None:
    assert found is not None and (found.samples, found.why) == (wanted.samples, wanted.why)
    for name in ("loss", "agreement", "kl", "error"):
        one, other = getattr(found, name), getattr(wanted, name)
        assert (one is None) == (other is None) and (one is None or one == pytest.approx(other, rel=1e-5, abs=1e-9)), (
            name
        )


# A plan with data ----------------------------------------------------------------------------------------------------

X, Y = drawn(100, 6), torch.arange(100) % 4


@pytest.mark.parametrize(
    "score",
    [
        TaylorScore((X, Y)),
        FisherScore((X, Y)),
        LossIncreaseScore((X, Y), progress=False),
        LossIncreaseScore((X, Y), F.cross_entropy, progress=False),
    ],
)
def test_a_plan_with_data_reports(score: netsurgery.Pass, caplog: pytest.LogCaptureFixture) -> None:
    model = net().train()
    edit = netsurgery.plan(model, [score, PruneChannels(0.5)])
    assert model.training
    assert_same(edit.measured, expected(model, netsurgery.rewrite(model, edit), X, Y))
    line = edit.summary()
    assert line == f"asked to remove 50.0% of the channels of each layer, removed 50.0% (8 of 16); {edit.measured}"
    assert "on 100 samples: loss " in line and ", agreement with the original " in line
    with caplog.at_level(logging.INFO, "netsurgery"):
        netsurgery.apply(model, [score, PruneChannels(0.5)])
    assert caplog.messages[-1] == line and caplog.records[-1].levelname == "INFO"


def test_without_data_nothing_is_said() -> None:
    edit = netsurgery.plan(net(), [MagnitudeScore(), PruneChannels(0.5)])
    assert edit.measured is None and edit.summary().endswith("removed 50.0% (8 of 16)")


def test_data_of_a_removal_has_no_labels() -> None:
    model = net()
    for data in (X, (X, Y)):
        for how in (None, "bias", "least-squares"):
            edit = netsurgery.plan(model, [MagnitudeScore(), PruneChannels(0.5, compensate=how, data=data)])
            assert_same(edit.measured, expected(model, netsurgery.rewrite(model, edit), X, None))
            assert ": agreement with the original " in edit.summary() and "), outputs differ by " in edit.summary()
    few = netsurgery.plan(model, [MagnitudeScore(), PruneChannels(0.5, data=X, samples=20)])
    assert few.measured is not None and few.measured.samples == 20


def test_the_first_pass_with_data_reports_on_what_all_have_done() -> None:
    model = net(width=32)
    passes = [MagnitudeScore(), PruneChannels(0.25), TaylorScore((X, Y)), PruneChannels(0.5, data=X[:7])]
    edit = netsurgery.plan(model, passes)
    assert len(edit.outcomes) == 2 and edit.counts == {"0": 12}
    assert_same(edit.measured, expected(model, netsurgery.rewrite(model, edit), X, Y))


def test_at_most_512_samples_drawn_as_the_pass_draws_them() -> None:
    x, y = drawn(3000, 6), (torch.arange(3000) < 30).long()
    model = net(outputs=2)
    edit = netsurgery.plan(model, [TaylorScore((x, y)), PruneChannels(0.5)])
    assert edit.measured is not None and edit.measured.samples == 512
    both = netsurgery.passes.calibration.draw_samples((x, y), 512)
    assert int(both.targets.sum()) == 30
    assert_same(edit.measured, expected(model, netsurgery.rewrite(model, edit), both.inputs[0][0], both.targets))


def test_a_trained_network_on_digits() -> None:
    from netsurgery.demo import digits, fit

    data = digits(0)
    torch.manual_seed(0)
    model = DigitsResNet((8, 16))
    fit(model, data.train, 3, 1e-2, 0, lambda: None)
    image = data.train[0][:1]
    edit = netsurgery.plan(model, [TaylorScore(data.train, samples=256), PruneChannels(0.2)], image)
    found = edit.measured
    assert found is not None and found.samples == 256 and found.loss is not None and found.agreement is not None
    assert found.loss[0] < 0.5 < found.loss[1] and 0.3 < found.agreement < 1
    held_out = measure(model, netsurgery.rewrite(model, edit), data.test)
    assert_same(held_out, expected(model, netsurgery.rewrite(model, edit), *data.test))
    wrong = data.train[0], (data.train[1] + 1) % 10
    said = netsurgery.plan(model, [TaylorScore(wrong, samples=256), PruneChannels(0.2)], image).measured
    assert said is not None and said.loss is not None and said.loss[0] > 3  # what was there before gives it away


def test_a_pass_of_ones_own_may_report() -> None:
    @dataclass(frozen=True)
    class Own(netsurgery.Pass):
        gives: ClassVar[frozenset[str]] = frozenset({"scores"})

        def run(self, network: netsurgery.Network) -> netsurgery.Network:
            return MagnitudeScore().run(network)

        def measure(self, model: nn.Module, edit: netsurgery.Edit) -> Measured:
            return measure(model, netsurgery.rewrite(model, edit), (X, Y))

    edit = netsurgery.plan(net(), [Own(), PruneChannels(0.5)])
    assert edit.summary().partition("; ")[2].startswith("on 100 samples: loss ")


@pytest.mark.parametrize("labelled", [False, True])
def test_a_pass_of_ones_own_with_data_reports_by_itself(labelled: bool) -> None:
    @dataclass(frozen=True)
    class Own(reporting.DataPass):
        data: Any
        samples: int = 1000
        gives: ClassVar[frozenset[str]] = frozenset({"scores"})

        def run(self, network: netsurgery.Network) -> netsurgery.Network:
            return MagnitudeScore().run(network)

    Own.labelled = labelled
    model = net()
    edit = netsurgery.plan(model, [Own((X, Y)), PruneChannels(0.5)])
    assert_same(edit.measured, expected(model, netsurgery.rewrite(model, edit), X, Y if labelled else None))
    few = netsurgery.plan(model, [Own((X, Y), samples=20), PruneChannels(0.5)]).measured
    assert few is not None and few.samples == 20
    assert netsurgery.plan(model, [Own(None), PruneChannels(0.5)]).measured is None


def test_what_cannot_be_measured_is_said() -> None:
    model = net()
    for data, why in (
        (drawn(10, 5), "not measured: Sequential does not run on the data: "),
        ([], "not measured: the data holds no samples"),
        ([(X,)], "on 100 samples: "),
    ):
        edit = netsurgery.plan(model, [MagnitudeScore(), PruneChannels(0.5, data=data)])
        assert edit.summary().partition("; ")[2].startswith(why)
    empty = nn.Sequential(nn.Linear(6, 16, device="meta"), nn.ReLU(), nn.Linear(16, 4, device="meta"))
    edit = netsurgery.plan(empty, [netsurgery.passes.RandomScore(), PruneChannels(0.5, data=X)])
    assert edit.summary().endswith("; not measured: Sequential has no weights, it is on the meta device")


def test_a_forward_that_is_rewritten_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
            self.head = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(x).mean(1))

    x = drawn(12, 5, 16)
    passes = [TaylorScore((x, torch.arange(12) % 3)), PruneChannels(0.5, unit="head")]
    with caplog.at_level(logging.INFO, "netsurgery"):
        netsurgery.apply(Fixed(), passes, x[:2])
    assert sum("rewrote the forward" in message for message in caplog.messages) == 1
    assert sum("on 12 samples: loss" in message for message in caplog.messages) == 1


# Other outputs -------------------------------------------------------------------------------------------------------


def test_regression() -> None:
    model = net(outputs=3)
    small, goal = cut(model), drawn(100, 3, seed=1)
    with torch.no_grad():
        a, b = (one.eval()(X).double() for one in (model, small))
    error = float((a - b).norm() / a.norm())
    without = measure(model, small, (X, goal))
    assert (without.loss, without.agreement, without.error) == (None, None, pytest.approx(error, rel=1e-5))
    assert without.why.startswith("no loss: the model returns (") and str(without).endswith("loss=f(outputs, targets))")
    for loss in (F.mse_loss, lambda out, y: (out - y).square().mean(1)):
        found = measure(model, small, (X, goal), loss)
        assert found.loss == pytest.approx([float(F.mse_loss(t, goal.double())) for t in (a, b)], rel=1e-5)
        assert (found.agreement, found.error, found.why) == (None, pytest.approx(error, rel=1e-5), "")
        edit = netsurgery.plan(model, [TaylorScore((X, goal), loss), PruneChannels(0.5)])
        assert "loss" in edit.summary() and "outputs differ by" in edit.summary() and "agreement" not in edit.summary()
    one = net(outputs=1)
    assert measure(one, cut(one), X).agreement is None
    assert measure(one, cut(one), (X, goal[:, :1]), F.mse_loss).agreement is None


def test_numbers_that_are_no_classes() -> None:
    """Nobody but the user can tell an embedding from logits."""
    model = net()
    small, wanted = cut(model), expected(model, cut(model), X, None)
    for data in (X, (X, None), (X, Y), {"input": X}, (X, drawn(100, 4, seed=1))):
        found = measure(model, small, data, classes=False)
        assert (found.loss, found.agreement, found.kl, found.why) == (None, None, None, "")
        assert found.error == pytest.approx(wanted.error, rel=1e-5)
    goal = drawn(100, 4, seed=1)
    found = measure(model, small, (X, goal), F.mse_loss, classes=False)
    assert found.loss is not None and found.agreement is None


@pytest.mark.parametrize("classes", [True, False])
def test_a_plan_says_what_a_score_takes_outputs_for(classes: bool) -> None:
    score = ReconstructionScore(X, classes=classes)
    for passes in ([score, PruneChannels(0.5)], [score, PruneChannels(0.5, data=X, compensate="least-squares")]):
        edit = netsurgery.plan(net(), passes)
        assert edit.measured is not None and edit.measured.error is not None
        assert (edit.measured.agreement is None, edit.measured.kl is None) == (not classes, not classes)
        assert ("agreement" in edit.summary()) == classes and "outputs differ by" in edit.summary()


def test_labels_that_do_not_fit() -> None:
    model = net()
    small = cut(model)
    found = measure(model, small, (X, Y + 3))
    assert found.loss is None and found.agreement is None and found.error is not None
    assert "but labels go from 3 to 6 where there are 4 classes" in str(found)
    with pytest.raises(
        InputError, match=r"the loss of 32 samples is \(32, 4\): return the mean, or one number for each"
    ):
        measure(model, small, (X, Y), lambda out, y: out)
    with pytest.raises(InputError, match="Sequential does not run on the data"):
        measure(model, small, (X[:, :3], Y))


def test_shares_of_classes_are_labels() -> None:
    model = net()
    small = cut(model)
    found = measure(model, small, (X, F.one_hot(Y, 4).double()))
    assert_same(found, expected(model, small, X, Y))


class Dense(nn.Module):
    """A prediction for each position: ``(n, classes, h, w)`` or ``(n, h * w, classes)``."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer, self.last = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 5, 1), last

    def forward(self, x: Tensor) -> Tensor:
        y = self.outer(self.inner(x).relu())
        return y.flatten(2).transpose(1, 2) if self.last else y


def by_position(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out.flatten(0, 1), y.flatten())


@pytest.mark.parametrize("last", [False, True])
def test_a_class_for_each_position(last: bool) -> None:
    model, x = Dense(last), drawn(10, 3, 4, 4)
    y = torch.randint(5, (10, 16) if last else (10, 4, 4), generator=torch.Generator().manual_seed(0))
    y[:, 0] = -100
    small = cut(model, x[:1])
    found = measure(model, small, (x, y), by_position if last else None)
    with torch.no_grad():
        a, b = ((t if last else t.flatten(2).transpose(1, 2)).double() for t in (model(x), small(x)))
    said = (y != -100).flatten(1)
    assert found.agreement == pytest.approx(float((a.argmax(-1) == b.argmax(-1))[said].double().mean()))
    kl = (a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1)[said].mean()
    assert found.kl == pytest.approx(float(kl), rel=1e-5) and found.loss is not None and found.why == ""
    assert measure(model, small, x).agreement is None  # nobody says which dimension holds classes


class Several(nn.Module):
    """Outputs in a dictionary, one of which may be logits."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.body, self.name = net(), name

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.body(x)
        return {self.name: y, "squares": y.square(), "largest": y.argmax(1)}


def test_dictionaries() -> None:
    named, other = Several("logits"), Several("features")
    found = measure(named, cut(named, X[:2]), (X, Y))
    wanted = expected(named.body, cut(named.body), X, Y)
    assert (found.agreement, found.kl) == (wanted.agreement, pytest.approx(wanted.kl, rel=1e-5))
    assert found.why.startswith("no loss: the model returns dict, not logits: pass loss=")
    full = measure(named, cut(named, X[:2]), (X, Y), lambda out, y: F.cross_entropy(out["logits"], y))
    assert full.loss == pytest.approx(wanted.loss, rel=1e-5) and full.why == ""
    rest = measure(other, cut(other, X[:2]), X)
    assert rest.agreement is None and rest.error is not None and str(rest).startswith("on 100 samples: outputs differ")


def test_outputs_by_name_whose_shapes_differ_are_left_out() -> None:
    class Cached(nn.Module):
        def __init__(self, layers: int) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(layers))

        def forward(self, x: Tensor) -> dict[str, Any]:
            cache = [x := layer(x).relu() for layer in self.layers]
            return {"logits": x, "cache": cache, "last": cache[-1].sum(1)}

    torch.manual_seed(0)
    model, small, data = Cached(3), Cached(2), torch.randn(32, 4)
    found = measure(model, small, data, classes=False)
    one, other = model(data), small(data)
    names = ("logits", "last")
    off = sum((one[name] - other[name]).square().sum() for name in names) / sum(one[n].square().sum() for n in names)
    assert not found.why and found.error == pytest.approx(float(off.detach() ** 0.5), rel=1e-5)
    nothing = measure(model, nn.Linear(4, 4), data)
    assert nothing.error is None and "other shapes" in nothing.why


def test_boxes() -> None:
    class Boxes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net()

        def forward(self, x: Tensor) -> list[Tensor]:
            return [row[row > 0] for row in self.body(x)]

    model, small = Boxes(), Boxes()
    small.body = cut(model.body)  # type: ignore[assignment]
    assert str(measure(model, small, X)) == (
        "not measured: outputs have other shapes, such as other numbers of boxes: they cannot be compared"
    )
    assert measure(model, model, X).error == 0


def test_outputs_that_are_not_finite_or_no_numbers() -> None:
    class Changed(nn.Module):
        def __init__(self, change: Any) -> None:
            super().__init__()
            self.body, self.change = net(), change

        def forward(self, x: Tensor) -> Tensor:
            return self.change(self.body(x))

    for change, why in (
        (lambda y: y / 0, "the outputs are not finite on the data"),
        (lambda y: y.argmax(1), "the outputs hold no numbers to compare"),
    ):
        assert str(measure(Changed(change), Changed(change), X)) == f"not measured: {why}"


class Masked(nn.Module):
    """Logits of which some are -inf, as constants or as the sample has it."""

    def __init__(self, body: nn.Module, mask: Any) -> None:
        super().__init__()
        self.body, self.mask = body, mask

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).masked_fill(self.mask(x), -torch.inf)


def constant(*classes: int) -> Any:
    return lambda x: torch.zeros(5).index_fill(0, torch.tensor(classes), 1.0).bool()


def test_masked_classes_play_no_part() -> None:
    model = net(outputs=5)
    small = cut(model)
    rest = nn.Sequential(*model), nn.Sequential(*small)
    for one in rest:
        one.append(nn.Linear(5, 3, bias=False))
        one[-1].weight.data = torch.eye(5)[[0, 2, 4]]
    found = measure(Masked(model, constant(1, 3)), Masked(small, constant(1, 3)), X)
    assert_same(found, expected(*rest, X, None))
    labelled = measure(Masked(model, constant(1, 3)), Masked(small, constant(1, 3)), (X, 2 * (Y % 3)))
    assert_same(labelled, expected(*rest, X, Y % 3))


@pytest.mark.parametrize(
    "mask",
    [
        lambda x: x[:, :5] > 1,  # other classes for each sample
        lambda x: (x[:, :1] > 0).expand(-1, 5),  # all classes of some samples
        lambda x: torch.arange(5) > (x[:, :1] * 10).int() % 5,
    ],
)
def test_classes_that_are_masked_for_some_samples(mask: Any) -> None:
    model = net(outputs=5)
    small = cut(model)
    with torch.no_grad():
        a, b = (Masked(one.eval(), mask)(X).double() for one in (model, small))
    rows = [(p[p.isfinite()], q[p.isfinite()]) for p, q in zip(a, b, strict=True) if bool(p.isfinite().any())]
    kl = sum(float((p.softmax(0) * (p.log_softmax(0) - q.log_softmax(0))).sum()) for p, q in rows) / len(rows)
    off = sum(float((p - q).square().sum()) for p, q in rows) / sum(float(p.square().sum()) for p, _ in rows)
    found = measure(Masked(model, mask), Masked(small, mask), X)
    assert found.agreement == pytest.approx(sum(float(p.argmax() == q.argmax()) for p, q in rows) / len(rows))
    assert (found.kl, found.error) == (pytest.approx(kl, rel=1e-5), pytest.approx(off**0.5, rel=1e-5))


def test_classes_that_one_network_alone_masks() -> None:
    model = net(outputs=5)
    more = measure(Masked(model, constant(1)), Masked(model, constant(1, 3)), X)
    assert (more.kl, more.error) == (float("inf"), float("inf")) and "KL inf" in str(more)
    fewer = measure(Masked(model, constant(1, 3)), Masked(model, constant(1)), X)
    with torch.no_grad():
        y = model.eval()(X).double()
    away = y[:, [0, 2, 3, 4]].logsumexp(1) - y[:, [0, 2, 4]].logsumexp(1)  # what goes to the class that was masked
    assert (fewer.kl, fewer.error) == (pytest.approx(float(away.mean()), rel=1e-5), 0)
    broken = measure(model, Masked(model, lambda x: torch.ones(5, dtype=torch.bool)), X)
    assert (broken.agreement, broken.kl, broken.error) == (0, float("inf"), float("inf"))


def test_random_numbers_are_the_same_for_both() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x + torch.randn_like(x))

    model, same = Noisy(), Noisy()
    state = torch.random.get_rng_state()
    assert measure(model, same, X).error == 0
    assert torch.equal(state, torch.random.get_rng_state())


def test_language_models() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, vocab_size=50, num_labels=3
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    ids = torch.randint(50, (40, 7), generator=torch.Generator().manual_seed(0))
    data = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(40) % 3}
    inputs = {"input_ids": ids[:2], "attention_mask": torch.ones_like(ids[:2])}

    def loss(out: Any, y: Tensor) -> Tensor:
        return F.cross_entropy(out.logits, y, reduction="none")

    edit = netsurgery.plan(model, [TaylorScore(data, loss), PruneChannels(0.5, unit=("head", "channel"))], inputs)
    small = netsurgery.rewrite(model, edit).eval()
    with torch.no_grad():
        a, b = (one(ids, torch.ones_like(ids)).logits.double() for one in (model, small))
    assert edit.measured is not None
    assert edit.measured.loss == pytest.approx([float(F.cross_entropy(t, data["labels"])) for t in (a, b)], rel=1e-5)
    assert edit.measured.agreement == pytest.approx(float((a.argmax(1) == b.argmax(1)).double().mean()))
    bare = transformers.BertModel(config).eval()
    half = netsurgery.plan(
        bare, [MagnitudeScore(), PruneChannels(0.5, data={"input_ids": ids})], {"input_ids": ids[:2]}
    )
    assert "on 40 samples: outputs differ by " in half.summary()


def test_large_samples_are_reported_on_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "_ALL", 700)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(100, 10)
    passes = [MagnitudeScore(), PruneChannels(0.5, compensate="bias", data=x)]
    measured = netsurgery.plan(model, passes, x[:1]).measured
    assert measured is not None
    assert measured.samples == 70
    monkeypatch.setattr(agreement, "_ALL", 7)
    measured = netsurgery.plan(model, passes, x[:1]).measured
    assert measured is not None
    assert measured.samples == 64


def test_labels_that_only_the_original_has_classes_for_give_no_loss() -> None:
    x, y = torch.randn(20, 6), torch.arange(20) % 4
    found = netsurgery.passes.measure(nn.Linear(6, 4), nn.Linear(6, 3), (x, y))
    assert found.loss is None and found.agreement is None and "no loss" in found.why and "other shapes" in found.why


@pytest.mark.parametrize("score", [TaylorScore, FisherScore, LossIncreaseScore])
@pytest.mark.parametrize("x", [torch.randn(8, 5), torch.randn(8, 6, dtype=torch.float64)], ids=["shape", "dtype"])
def test_data_that_the_model_does_not_run_on_is_one_clear_error(score: Any, x: Tensor) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).train()
    with pytest.raises(InputError, match="Sequential does not run on the data: "):
        netsurgery.plan(model, [score((x, torch.arange(8) % 3)), PruneChannels(0.5)], torch.randn(2, 6))
    assert model.training


def test_labels_of_other_inputs_are_an_error() -> None:
    model = nn.Linear(6, 4)
    with pytest.raises(InputError, match="40"):
        measure(model, model, (torch.randn(50, 6), torch.arange(40) % 4))


@pytest.mark.parametrize("score", [TaylorScore, FisherScore])
@pytest.mark.parametrize("what", ["data", "loss"])
def test_gradients_that_are_not_finite_are_an_error(score: Any, what: str) -> None:
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(8, 6)
    if what == "data":
        x[3, 2] = torch.nan
    loss = None if what == "data" else lambda o, y: F.cross_entropy(o, y) / 0
    with pytest.raises(InputError, match="gradients at group '0' are not finite: look for NaN"):
        netsurgery.plan(model, [score((x, torch.arange(8) % 3), loss), PruneChannels(0.5)], x[:2])
