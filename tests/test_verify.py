"""What verify says is so: no alarm where the result is right, an infinite difference where a number is none."""

from __future__ import annotations

import copy
import sys
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import netsurgery
from netsurgery.errors import InputError
from netsurgery.passes import MagnitudeScore, PruneChannels, RandomScore
from netsurgery.verification import oracles as verification

HALF = [RandomScore(), PruneChannels(0.5)]
X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
PADDED = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])


class Masked(nn.Module):
    """Looks at its mask, as the attention of Hugging Face does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor, mask: Tensor, scaled: bool = False) -> Tensor:
        h = self.a(x).relu()
        if not mask.all():
            h = h * mask[..., None]
        return self.b(h / h.shape[1] if scaled else h)


def built(kind: type[nn.Module]) -> Any:
    torch.manual_seed(0)
    return kind().eval()


def cut(model: nn.Module, given: Any, **options: Any) -> tuple[Any, netsurgery.Edit]:
    edit = netsurgery.plan(model, [RandomScore(), PruneChannels(0.5, **options)], given)
    return netsurgery.rewrite(model, edit), edit


def broken(small: nn.Module) -> nn.Module:
    """A copy in which one weight of each matrix is another."""
    wrong = copy.deepcopy(small)
    with torch.no_grad():
        for parameter in wrong.parameters():
            parameter.view(-1)[0] += 1.0
    return wrong


# Masks, flags and keywords that are others than those of the trace ------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        (X, PADDED),
        {"x": X, "mask": PADDED},
        (X, torch.ones(2, 6, dtype=torch.bool), True),
        (X, PADDED, True),
    ],
    ids=str,
)
def test_inputs_that_take_another_way_than_those_of_the_plan(other: Any) -> None:
    model = built(Masked)
    small, edit = cut(model, (X, torch.ones(2, 6, dtype=torch.bool)))
    nothing = netsurgery.Edit(edit.network, {})
    assert netsurgery.verify(model, model, nothing, other) == 0
    assert netsurgery.verify(model, small, edit, other) < 1e-6
    assert netsurgery.verify(model, broken(small), edit, other) > 1e-3


def test_keywords_in_another_order() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.b(self.a(x) - 2 * self.a(y[..., :16]))

    model, y = built(Two), torch.randn(2, 6, 20)
    small, edit = cut(model, {"x": X, "y": y})
    assert netsurgery.verify(model, small, edit, {"y": y, "x": X}) < 1e-6
    same = built(Two)
    small, edit = cut(same, {"x": X, "y": X})
    assert netsurgery.verify(same, small, edit, {"y": X + 1, "x": X}) < 1e-6  # it was one tensor, and is two


def test_a_group_that_is_another_on_that_way_is_refused() -> None:
    class Switch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.c(self.a(x) + self.b(x) if mask.all() else self.a(x)) + self.b(x).sum()

    model = built(Switch)
    network = netsurgery.trace(model, (X, PADDED))
    edit = netsurgery.Edit(network, {"a": tuple(range(12))})
    small = netsurgery.rewrite(model, edit)
    assert netsurgery.verify(model, small, edit, (X, PADDED)) < 1e-6
    with pytest.raises(InputError, match="'a' has other units there: plan the edit with such inputs"):
        netsurgery.verify(model, small, edit, (X, torch.ones_like(PADDED)))


def test_bert_with_a_mask_that_the_plan_did_not_know() -> None:
    # It looks for an optional package `kernels`; from the root of this repository it would find ours.
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=60
    )
    model = transformers.BertModel(config).eval()
    ids = torch.randint(60, (2, 6))
    ones = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    padded = {"input_ids": ids, "attention_mask": PADDED.long()}
    edit = netsurgery.plan(model, [RandomScore(), PruneChannels(0.5, unit="channel", include=["*intermediate*"])], ones)
    assert netsurgery.verify(model, model, netsurgery.Edit(edit.network, {}), padded) < 1e-6
    small = netsurgery.rewrite(model, edit)
    assert netsurgery.verify(model, small, edit, padded) < 1e-5
    assert netsurgery.verify(model, broken(small), edit, padded) > 1e-3


# torch's fused encoder --------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, **options)
        self.embed, self.last = nn.Linear(16, 32), nn.Linear(32, 3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says which layers cannot be fused
            self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(32))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.last(self.encoder(self.embed(x), src_key_padding_mask=mask))


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("unit", ["channel", "head", "head_dim", "any"])
def test_an_encoder_with_padding_trains_and_runs(unit: str) -> None:
    torch.manual_seed(0)
    model = Encoder().eval()
    small, edit = cut(model, (X, ~PADDED), unit=unit)
    assert netsurgery.verify(model, small, edit, (X, ~PADDED)) < 1e-5
    assert netsurgery.verify(model, broken(small), edit, (X, ~PADDED)) > 1e-3
    small.train()
    small(X, ~PADDED).sum().backward()
    small.eval()
    usual = small(X, ~PADDED)
    with torch.no_grad():
        assert torch.allclose(small(X, ~PADDED)[PADDED], usual[PADDED], atol=1e-5)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("options", [{"norm_first": True}, {"activation": "gelu"}, {"bias": False}], ids=str)
def test_encoders_of_other_kinds(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Encoder(**options).eval()
    small, edit = cut(model, (X, ~PADDED), unit="head")
    with torch.no_grad():
        assert small(X, ~PADDED).isfinite().all()
    assert netsurgery.verify(model, small, edit, (X, ~PADDED)) < 1e-5


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_heads_of_one_layer_alone() -> None:
    torch.manual_seed(0)
    model = Encoder().eval()
    edit = netsurgery.plan(
        model, [RandomScore(), PruneChannels(0.5, unit="head", include=["encoder.layers.1.*"])], (X, ~PADDED)
    )
    assert list(edit.replaced) == ["encoder.layers.1.self_attn"]
    small = netsurgery.rewrite(model, edit)
    with torch.no_grad():  # the first layer is torch's own, and says that all can read nested tensors
        small(X, ~PADDED)
    assert netsurgery.verify(model, small, edit, (X, ~PADDED)) < 1e-5
    whole = copy.deepcopy(model)
    netsurgery.rewrite(whole, edit, inplace=True)
    with torch.no_grad():
        assert torch.allclose(whole(X, ~PADDED), small(X, ~PADDED))


# Randomness that never stops ------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Draws random numbers in eval mode too."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b, self.log = nn.Linear(16, 24), nn.Linear(24, 3), nn.Linear(16, 24)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.kind == "dropout":
            h = F.dropout(h, 0.5)
        elif self.kind == "latent":  # as a variational autoencoder does
            h = h + torch.randn_like(h) * (0.5 * self.log(x)).exp()
        elif self.kind == "bernoulli":
            h = h * torch.bernoulli(self.log(x).sigmoid())
        elif self.kind == "rrelu":
            h = F.rrelu(h, training=True)
        else:
            h = h + torch.empty_like(h).uniform_(-1, 1)
        return self.b(h)


@pytest.mark.parametrize("kind", ["dropout", "latent", "bernoulli", "rrelu", "uniform"])
def test_what_is_drawn_at_random_is_the_same_in_both(kind: str) -> None:
    torch.manual_seed(0)
    model = Noisy(kind).double().eval()
    x = X.double()
    small, edit = cut(model, x)
    assert edit.keep
    state = torch.get_rng_state()
    assert netsurgery.verify(model, small, edit, x) < 1e-12
    assert torch.equal(torch.get_rng_state(), state)
    assert netsurgery.verify(model, broken(small), edit, x) > 1e-3
    with torch.no_grad():  # a wrong number that only the draw sees
        (small.log if kind in ("latent", "bernoulli") else small.a).bias[0] += 3.0
    assert netsurgery.verify(model, small, edit, x) > 1e-3


def test_inputs_stay_as_they_are() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(16, 24), nn.Linear(24, 3))
    small, edit = cut(model, X)
    x = X.clone()
    assert netsurgery.verify(model, small, edit, x) < 1e-6
    assert torch.equal(x, X)


# Not a number -----------------------------------------------------------------------------------------------------


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 3))


@pytest.mark.parametrize("place", ["both", "the small one", "the original"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_never_the_same(place: str, value: float) -> None:
    model = plain()
    edit = netsurgery.Edit(netsurgery.trace(model, X), {"0": tuple(range(12))})
    small = netsurgery.rewrite(model, edit)
    with torch.no_grad():
        for one, name in ((model, "the original"), (small, "the small one")):
            if place in (name, "both"):
                one[2].weight[1, 3] = value
    assert netsurgery.verify(model, small, edit, X) == float("inf")


def test_nan_in_the_weights_of_a_unit_that_goes_is_gone_with_it() -> None:
    model = plain()
    with torch.no_grad():
        model[0].weight[20] = float("nan")
    edit = netsurgery.Edit(netsurgery.trace(model, X), {"0": tuple(range(12))})
    assert netsurgery.verify(model, netsurgery.rewrite(model, edit), edit, X) < 1e-6


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ([1.0, float("nan")], [1.0, float("nan")]),
        ([1.0, float("nan")], [1.0, 2.0]),
        ([1.0, 2.0], [float("nan"), 2.0]),
        ([float("inf")], [float("-inf")]),
        ([float("nan")], [0.0]),
        ([1.0, 2.0], [1.0]),
    ],
)
def test_differences_that_are_infinite(found: list[float], wanted: list[float]) -> None:
    one, other = torch.tensor(found), torch.tensor(wanted)
    assert verification._difference([one], [other]) == float("inf")
    assert verification._difference([torch.ones(2), one], [torch.ones(2), other]) == float("inf")
    assert verification._difference([one, torch.ones(2)], [other, torch.ones(2)]) == float("inf")


def test_another_number_of_outputs_is_infinitely_different() -> None:
    class Twice(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x

    model = plain()
    edit = netsurgery.Edit(netsurgery.trace(model, X), {"0": tuple(range(12))})
    assert netsurgery.verify(model, Twice(*netsurgery.rewrite(model, edit)), edit, X) == float("inf")


# Arguments --------------------------------------------------------------------------------------------------------


def test_arguments_in_another_order() -> None:
    model = plain()
    small, edit = cut(model, X)
    arguments: list[Any] = [small, model, edit]
    with pytest.raises(InputError, match=r"the original comes first: verify\(model, small, edit\)"):
        netsurgery.verify(*arguments)
    for given in ([model, edit, small], [edit, model, small], [model, small, X]):
        with pytest.raises(InputError, match="takes the original, the small model and the edit, got"):
            netsurgery.verify(*given)
    with pytest.raises(InputError, match=r"is not the Sequential that the edit is for .* pass the original"):
        netsurgery.verify(nn.Linear(16, 3), small, edit)
    netsurgery.rewrite(model, edit, inplace=True)
    with pytest.raises(InputError, match="if it was cut in place, a copy made before"):
        netsurgery.verify(model, model, edit)


def test_magnitude_of_a_model_that_has_a_nan() -> None:
    model = plain()
    with torch.no_grad():
        model[2].bias[0] = float("nan")
    edit = netsurgery.plan(model, [MagnitudeScore(), PruneChannels(0.5)], X)
    assert netsurgery.verify(model, netsurgery.rewrite(model, edit), edit) == float("inf")
