"""Code that hard-codes a size: its attributes follow, or its forward is rewritten, and nothing else changes."""

from __future__ import annotations

import copy
import functools
import logging
import pickle
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import netsurgery
import oracles
from netsurgery.errors import InputError
from netsurgery.passes import PruneChannels, RandomScore

X = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Heads by an attribute; the way they are told apart by ``run``."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor]):
        super().__init__()
        self.run = run
        self.heads, self.dim, self.inner = 4, 6, 24
        self.parts = [24, 24, 24]
        self.qkv, self.proj = nn.Linear(16, 72), nn.Linear(24, 16)
        self.q, self.k, self.v = nn.Linear(16, 24), nn.Linear(16, 12), nn.Linear(16, 12)
        self.gain = nn.Parameter(torch.rand(24))
        self.drop = nn.Dropout(0.1)
        self.rate = 0.1

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


def fused(m: Any, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    q, k, v = m.qkv(x).reshape(b, n, 3, m.heads, m.dim).permute(2, 0, 3, 1, 4)
    return m.proj((attend(q, k, v, scale=0.3)).reshape(b, n, m.inner))


def default_scale(m: Any, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    q, k, v = m.qkv(x).reshape(b, n, 3, m.heads, m.dim).permute(2, 0, 3, 1, 4)
    return m.proj(attend(q, k, v, dropout_p=m.rate if m.training else 0.0).reshape(b, n, m.inner))


def constants(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).view(-1, 5, 3, 4, 6).permute(2, 0, 3, 1, 4)
    weights = m.drop(torch.softmax(q @ k.transpose(-2, -1) * 6**-0.5, dim=-1))
    return m.proj((weights @ v).transpose(1, 2).reshape(-1, 5, 24))


def from_the_stream(m: Any, x: Tensor) -> Tensor:
    b, n, c = x.shape
    q, k, v = m.qkv(x).split(m.parts, dim=-1)
    q, k, v = (t.view(b, n, 4, c * 3 // 2 // 4).transpose(1, 2) for t in (q, k, v))
    return m.proj(attend(q, k, v, is_causal=True).flatten(2))


def grouped(m: Any, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    q = m.q(x).view(b, n, m.heads, m.dim).transpose(1, 2)
    k, v = (f(x).view(b, n, 2, m.dim).transpose(1, 2) for f in (m.k, m.v))
    k, v = (t[:, :, None].expand(b, 2, 2, n, m.dim).reshape(b, 4, n, m.dim) for t in (k, v))
    return m.proj(attend(q, k, v, scale=m.dim**-0.5).reshape(b, n, -1))


def masked(m: Any, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    q, k, v = m.qkv(x).reshape(b, n, 3, m.heads, m.dim).permute(2, 0, 3, 1, 4)
    mask = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
    q = F.layer_norm(q, (6,)) * m.gain.view(4, 1, 6)
    return m.proj(attend(q, k, v, attn_mask=mask).reshape(b, n, 24))


def sliced(m: Any, x: Tensor) -> Tensor:
    y = m.qkv(x)
    gate, value = y[..., :24], y[..., 24:48]
    kept = F.group_norm(y[..., 48:].transpose(1, 2), 4).transpose(1, 2)
    return m.proj(gate.sigmoid() * value + kept * m.gain.unflatten(0, (4, 6)).flatten())


def padded(m: Any, x: Tensor) -> Tensor:
    y = torch.cat([m.q(x), x.new_zeros(x.shape[0], x.shape[1], 24)], -1)[..., :24]
    return m.proj(y + torch.zeros(24, dtype=x.dtype, device=x.device))


#: what runs, and whether its forward must be rewritten
CASES = {
    fused: False,
    default_scale: True,
    constants: True,
    from_the_stream: True,
    grouped: True,
    masked: True,
    sliced: True,
    padded: True,
}


class Net(nn.Module):
    def __init__(self, inside: nn.Module):
        super().__init__()
        self.first, self.inside, self.last = nn.Linear(8, 16), inside, nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x + self.inside(x))


class Itself(nn.Module):
    """nn.MultiheadAttention over one input, or with keys and values of another width."""

    def __init__(self, **options: Any):
        super().__init__()
        other = options.pop("other", False)
        self.weights = options.pop("weights", False)
        self.mha = nn.MultiheadAttention(
            16, 4, batch_first=True, **({"kdim": 12, "vdim": 12} if other else {}), **options
        )
        self.other = nn.Linear(16, 12) if other else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.other(x)
        out: Tensor = self.mha(x, y, y, need_weights=self.weights)[0]
        return out


def build(inside: nn.Module) -> Net:
    torch.manual_seed(0)
    net = Net(inside).double().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.5)
    return net


def free(network: netsurgery.Network, unit: str) -> int:
    """Number of open groups of one sort inside of the module."""
    return sum(1 for g in network.prunable if g.unit == unit and any("inside" in m.parameter for m in g.members))


@pytest.mark.parametrize("run", CASES, ids=lambda run: run.__name__)
@pytest.mark.parametrize("seed", range(3))
def test_heads_and_their_dimensions_prune(run: Callable[..., Tensor], seed: int) -> None:
    model = build(Attention(run))
    small, edit = oracles.check(model, (X,), 1e-9, seed, share=0.5)
    assert ("inside" in edit.replaced) == CASES[run]
    assert isinstance(small.inside, Attention)
    network = netsurgery.trace(model, X)
    if run not in (sliced, padded):
        assert free(network, "head") and free(network, "head_dim")
    other = torch.randn(3, 5 if run is constants else 7, 8, dtype=torch.float64)
    again = netsurgery.Edit(netsurgery.trace(model, other), edit.keep)
    assert netsurgery.verify(model, small, again, other) < 1e-9  # batch and length are as free as they were


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weights": True},
        {"bias": False},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"dropout": 0.5},
        {"other": True},
    ],
    ids=str,
)
def test_multihead_attention(options: dict[str, Any]) -> None:
    model = build(Itself(**options))
    small, edit = oracles.check(model, (X,), 1e-9, share=0.5)
    assert list(edit.replaced) == ["inside.mha"]
    assert isinstance(small.inside.mha, nn.MultiheadAttention) and small.inside.mha.num_heads == 2
    assert "inside.mha.forward rewritten" in edit.diff()


def test_torch_layers_with_attention() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), 2, enable_nested_tensor=False
    )
    model = Net(encoder).double().eval()
    small, edit = oracles.check(model, (X,), 1e-9, share=0.5)
    assert {g.unit for g in edit.network.prunable} == {"channel", "head", "head_dim"}
    with torch.no_grad():  # torch's fused encoder would want square weights
        assert small(X).shape == (2, 5, 3)


class Sized(nn.Module):
    """Sizes in a tuple on a module, one of which is worked out."""

    def __init__(self, *size: int) -> None:
        super().__init__()
        self.first, self.last, self.size = nn.Linear(4, 6), nn.Linear(6, 3), size

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.first(x).flatten().view(self.size))
        return out


@pytest.mark.parametrize(
    ("make", "sizes"),
    [
        (lambda: Sized(-1, 6), lambda m: m.size),
        (lambda: nn.Sequential(Sized(1, -1, 6)), lambda m: m[0].size[1:]),
        (
            lambda: nn.Sequential(nn.Linear(4, 6), nn.Flatten(0), nn.Unflatten(0, (-1, 6)), nn.Linear(6, 3)),
            lambda m: m[2].unflattened_size,
        ),
    ],
)
def test_sizes_that_are_worked_out_stay_so(make: Callable[[], nn.Module], sizes: Callable[[Any], Any]) -> None:
    """For other numbers of rows than the network was traced with."""
    torch.manual_seed(0)
    small = netsurgery.apply(make(), [RandomScore(), PruneChannels(0.5)], torch.randn(5, 4))
    assert tuple(sizes(small)) == (-1, 3)
    assert small(torch.randn(7, 4)).shape[-2:] == (7, 3)


def test_units_are_chosen() -> None:
    model = build(Attention(default_scale))
    for unit in ("head", "head_dim", "channel"):
        edit = netsurgery.plan(model, [RandomScore(), PruneChannels(0.5, unit=unit)], X)
        assert {edit.network[name].unit for name in edit.keep} == {unit}
        assert netsurgery.verify(model, netsurgery.rewrite(model, edit), edit, X) < 1e-9
    assert not netsurgery.plan(model, [RandomScore(), PruneChannels(0.5, unit="head")], X).replaced


def small_one(run: Callable[..., Tensor] = default_scale) -> tuple[Net, Net, netsurgery.Edit]:
    model = build(Attention(run))
    edit = netsurgery.plan(model, [RandomScore(), PruneChannels(0.5)], X)
    return model, netsurgery.rewrite(model, edit), edit


def test_a_rewritten_module_is_still_itself() -> None:
    model = build(Attention(default_scale))
    calls = []
    model.inside.register_forward_hook(lambda *_: calls.append(1))
    edit = netsurgery.plan(model, [RandomScore(), PruneChannels(0.5)], X)
    small = netsurgery.rewrite(model, edit)
    calls.clear()
    small(X)
    assert calls == [1] and small.inside.run is default_scale and small.inside.rate == 0.1
    assert list(small.state_dict()) == list(model.state_dict())
    assert [name for name, _ in small.named_parameters()] == [name for name, _ in model.named_parameters()]
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small_one()[1]))):
        assert torch.equal(other(X), small(X))
        assert type(other.inside) is type(small.inside)


def test_surgery_twice() -> None:
    model, small, _ = small_one()
    smaller, edit = oracles.check(small, (X,), 1e-9, share=0.5)
    assert type(smaller.inside) is type(small.inside) and edit.adaptation.attributes  # it follows by attributes now
    every = PruneChannels(0.5, unit=("channel", "head", "head_dim"))
    two = netsurgery.apply(model, [RandomScore(), PruneChannels(0.5), RandomScore(), every], X)
    assert oracles.parameters(two) == edit.after.params


def test_in_place() -> None:
    model, small, edit = small_one()
    inside = model.inside
    assert netsurgery.rewrite(model, edit, inplace=True) is model and model.inside is inside
    assert torch.equal(model(X), small(X))


def test_dropout_follows_the_mode() -> None:
    for run in (default_scale, constants):
        _, small, _ = small_one(run)
        usual = small(X)
        small.train()
        assert not torch.equal(small(X), small(X))
        small.inside.drop.p = 0.0
        if run is constants:
            assert torch.allclose(small(X), usual)
        small(X).sum().backward()
        assert torch.equal(small.eval()(X), usual)


def test_apply_says_what_it_rewrote(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "netsurgery"):
        netsurgery.apply(build(Attention(default_scale)), [RandomScore(), PruneChannels(0.5)], X)
        netsurgery.apply(build(Attention(fused)), [RandomScore(), PruneChannels(0.5)], X)
    assert [r.message for r in caplog.records] == [
        "rewrote the forward of 1 modules whose code hard-codes a size: inside"
    ]


def test_another_way_through_the_code_is_an_error_not_a_guess() -> None:
    def branches(m: Any, x: Tensor) -> Tensor:
        y = default_scale(m, x)
        return y * 2 if x.shape[1] > 4 else y

    _, small, _ = small_one(branches)
    small(torch.randn(2, 6, 8, dtype=torch.float64))
    with pytest.raises(AssertionError, match="other sizes"):
        small(torch.randn(2, 3, 8, dtype=torch.float64))


def test_arguments_of_another_kind_are_an_error() -> None:
    model = build(Itself())
    small = netsurgery.apply(model, [RandomScore(), PruneChannels(0.5)], X)
    h = torch.randn(2, 5, small.first.out_features, dtype=torch.float64)
    mask = torch.zeros(5, 5, dtype=torch.float64)
    with pytest.raises(InputError, match="where 'need_weights' is False, got True: do the surgery again"):
        small.inside.mha(h, h, h, need_weights=True)
    with pytest.raises(InputError, match="where 'attn_mask' is None, got a tensor"):
        small.inside.mha(h, h, h, need_weights=False, attn_mask=mask)
    with pytest.raises(InputError, match="where 'value' is the same tensor as another input"):
        small.inside.mha(h, h, h.clone(), need_weights=False)


class Masks(Attention):
    """Chooses by its mask, as the attention of Hugging Face does."""

    def forward(self, x: Tensor, mask: Tensor | None, extra: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return default_scale(self, x) * (1.0 if mask is None else mask.double().mean()) * sum(extra.values())


def test_masks_of_another_kind_are_an_error() -> None:
    class Gives(Net):
        def forward(self, x: Tensor, mask: Tensor | None = None, **extra: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(x + self.inside(x, mask, extra))

    torch.manual_seed(0)
    model, one = Gives(Masks(default_scale)).double().eval(), torch.ones(1, dtype=torch.float64)
    given = {"x": X, "mask": torch.ones(5, 5, dtype=torch.bool), "a": one}
    edit = netsurgery.plan(model, [RandomScore(), PruneChannels(0.5)], given)
    small = netsurgery.rewrite(model, edit)
    assert "inside" in edit.replaced and netsurgery.verify(model, small, edit, given) < 1e-9
    small(**given)
    for other, why in (
        ({"mask": None}, "'mask' is a tensor of 2 dimensions, got None"),
        ({"mask": torch.ones(1, 5, 5, dtype=torch.bool)}, "'mask' is a tensor of 2 dimensions, got 3"),
        ({"mask": torch.ones(5, 5)}, "'mask' is a tensor of torch.bool numbers, got torch.float32"),
        ({"b": one}, r"'extra' is \['a'\], got \['a', 'b'\]"),
    ):
        with pytest.raises(InputError, match=why):
            small(**{**given, **other})


def test_traced_with_one_image_is_not_guessed_for_two() -> None:
    def one(m: Any, x: Tensor) -> Tensor:
        return default_scale(m, x) * (3 if x.shape[0] == 1 else 1)

    model = build(Attention(one))
    small = netsurgery.apply(model, [RandomScore(), PruneChannels(0.5)], X[:1])
    small(X[:1])
    with pytest.raises(AssertionError, match="other sizes"):
        small(X)


def trains_otherwise(m: Any, x: Tensor) -> Tensor:
    y = default_scale(m, x)
    return y + 1 if m.training else y


def trains_with_what_is_outside(m: Any, x: Tensor) -> Tensor:
    y = default_scale(m, x)
    return y + OUTSIDE if m.training else y


def from_outside(m: Any, x: Tensor) -> Tensor:
    return default_scale(m, x) + OUTSIDE


OUTSIDE = torch.ones(16, dtype=torch.float64)


class GivenAnObject(Attention):
    def forward(self, x: Tensor, cache: object = None) -> Tensor:
        return self.run(self, x)


def remembers(m: Any, x: Tensor) -> Tensor:
    m.seen = default_scale(m, x)
    return m.seen * 1


def under_autocast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return default_scale(m, x)


def under_checkpoint(m: Any, x: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(default_scale, m, x, use_reentrant=False)


@pytest.mark.parametrize(
    ("run", "why"),
    {
        trains_with_what_is_outside: "uses a tensor from outside",
        from_outside: "uses a tensor from outside",
        remembers: f"changes self.seen at tests/test_hard_coded.py:{remembers.__code__.co_firstlineno + 1}",
        under_autocast: "uses autocast",
        under_checkpoint: "uses checkpoint",
    }.items(),
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_be_rewritten_is_locked(run: Callable[..., Tensor], why: str) -> None:
    model = build(Attention(run))
    network = netsurgery.trace(model, X)
    reasons = [g.locked or "" for g in network.groups if g.unit == "head_dim"]
    assert any(f"the code of inside {why}" in reason for reason in reasons)
    oracles.check(model, (X,), 1e-9, share=0.5)


def keeps_two(m: Any, x: Tensor) -> Tensor:
    m.b, m.n = x.shape[:2]
    return default_scale(m, x) * m.n


def keeps_a_pair(m: Any, x: Tensor) -> Tensor:
    m.kept = (x.shape[1], x.shape[-1])
    return default_scale(m, x)


def keeps_what_is_computed(m: Any, x: Tensor) -> Tensor:
    m.total = x.shape[0] * x.shape[1]
    return default_scale(m, x.view(m.total, 1, -1)).view(x.shape)


def keeps_after_use(m: Any, x: Tensor) -> Tensor:
    y = default_scale(m, x)
    m.n = y.size(1)
    return y


KEEPS: dict[Callable[..., Tensor], dict[str, Any]] = {
    keeps_two: {"b": 2, "n": 7},
    keeps_a_pair: {"kept": (7, 8)},
    keeps_what_is_computed: {"total": 14},
    keeps_after_use: {"n": 7},
}


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("run", KEEPS)
def test_sizes_that_a_module_keeps_are_kept_by_the_rewritten_one(run: Callable[..., Tensor], before: bool) -> None:
    model = build(Attention(run))
    if before:
        model(X)
    small, edit = oracles.check(model, (X,), 1e-9, share=0.5)
    assert list(edit.replaced) == ["inside"]
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    edit = netsurgery.Edit(netsurgery.trace(model, x), edit.keep)
    assert netsurgery.verify(model, small, edit, x) < 1e-9
    small(x)
    assert {name: getattr(small.inside, name) for name in KEEPS[run]} == KEEPS[run]


def counts(m: Any, x: Tensor) -> Tensor:
    m.rounds = m.rounds + 1
    return default_scale(m, x)


def keeps_the_first(m: Any, x: Tensor) -> Tensor:
    if not hasattr(m, "n"):
        m.n = x.shape[1]
    return default_scale(m, x) * m.n


def keeps_until_it_changes(m: Any, x: Tensor) -> Tensor:
    if m.length != x.shape[1]:
        m.length = x.shape[1]
    return default_scale(m, x)


def keeps_an_attribute(m: Any, x: Tensor) -> Tensor:
    m.width = m.heads * m.dim
    return default_scale(m, x)


@pytest.mark.parametrize(
    ("run", "why"),
    {
        counts: "changes self.rounds at",
        keeps_the_first: "sets its attribute n",
        keeps_until_it_changes: "changes self.length at",
        keeps_an_attribute: "changes self.width at",
    }.items(),
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_a_module_remembers_from_run_to_run_locks_it(run: Callable[..., Tensor], why: str) -> None:
    inside = Attention(run)
    inside.rounds, inside.length = 0, 3
    model = build(inside)
    reasons = [g.locked or "" for g in netsurgery.trace(model, X).groups if g.unit == "head_dim"]
    assert any(f"the code of inside {why}" in reason for reason in reasons), reasons
    oracles.check(model, (X,), 1e-9, share=0.5)


def test_an_argument_whose_default_is_no_plain_value() -> None:
    class Given(Attention):
        def forward(self, x: Tensor, mask: Any = NotImplementedError) -> Tensor:
            return self.run(self, x)

    class Gives(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(x + self.inside(x, None))

    small, edit = oracles.check(Gives(Given(default_scale)).double().eval(), (X,), 1e-9, share=0.5)
    assert list(edit.replaced) == ["inside"]
    with pytest.raises(InputError, match=r"'mask' is None, got Ellipsis"):
        small.inside(torch.zeros(1, 5, 8, dtype=torch.float64))


def test_what_runs_other_code_in_training_is_rewritten_for_both() -> None:
    small, edit = oracles.check(build(Attention(trains_otherwise)), (X,), 1e-9, share=0.5)
    assert list(edit.replaced) == ["inside"]
    usual = small.inside(X.new_ones(1, 5, small.first.out_features))
    small.inside.rate = 0.0
    trained = small.inside.train()(X.new_ones(1, 5, small.first.out_features))
    torch.testing.assert_close(trained, usual + 1)


def test_code_that_is_given_objects_is_locked() -> None:
    class Gives(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(x + self.inside(x, object()))

    network = netsurgery.trace(Gives(GivenAnObject(default_scale)).double(), X)
    assert any("has an input of type object" in (g.locked or "") for g in network.groups if g.unit == "head_dim")


def test_what_a_module_keeps_in_containers_is_cut_too() -> None:
    def biased(m: Any, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        key = str(x.device)
        if key not in m.cache:
            m.cache[key] = [m.gain[:4, None, None].detach() * torch.arange(n, device=x.device)]
        q, k, v = m.qkv(x).reshape(b, n, 3, m.heads, m.dim).permute(2, 0, 3, 1, 4)
        return m.proj(attend(q, k, v, attn_mask=m.cache[key][0], scale=0.3).reshape(b, n, m.inner))

    model = build(Attention(biased))
    model.inside.cache = {}
    model(X)
    small, edit = oracles.check(model, (X,), 1e-9, share=0.5)
    assert small.inside.cache["cpu"][0].shape[0] == 2 and model.inside.cache["cpu"][0].shape[0] == 4
    assert free(edit.network, "head")


def test_the_whole_model_is_rewritten_as_its_parts_are() -> None:
    model = Attention(constants).double().eval()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    small, edit = oracles.check(model, (x,), 1e-9, share=0.5)
    assert isinstance(small, Attention) and list(edit.replaced) == [""]
    assert all(g.locked is None for g in edit.network.groups if g.unit != "channel")


def by_position(m: Any, x: Tensor) -> Tensor:
    y = default_scale(m, x)
    return torch.stack([y[:, i] * (i + 1) for i in range(x.shape[1])], 1)


def for_each(m: Any, x: Tensor) -> Tensor:
    return torch.stack([row * 2 for row in default_scale(m, x).unbind(1)], 1)


@pytest.mark.parametrize("run", [by_position, for_each], ids=lambda run: run.__name__)
def test_loops_over_positions_are_not_rewritten(run: Callable[..., Tensor]) -> None:
    model = build(Attention(run))
    reasons = [g.locked or "" for g in netsurgery.trace(model, X).groups if g.unit == "head_dim"]
    assert any("does other things for inputs of other sizes" in reason for reason in reasons)


def test_an_attribute_with_a_second_meaning_keeps_it() -> None:
    def limited(m: Any, x: Tensor) -> Tensor:
        return fused(m, x) * (2 if x.shape[1] > m.inner else 1)

    model = build(Attention(limited))
    small, edit = oracles.check(model, (X,), 1e-9, share=0.5)
    assert "inside" in edit.replaced
    longer = torch.randn(1, 20, 8, dtype=torch.float64)  # longer than inner is now, shorter than it was
    again = netsurgery.Edit(netsurgery.trace(model, longer), edit.keep)
    assert netsurgery.verify(model, small, again, longer) < 1e-9


def test_other_dtypes_that_would_take_another_way_are_an_error() -> None:
    def clamped(m: Any, x: Tensor) -> Tensor:
        return default_scale(m, x).clamp(min=torch.finfo(x.dtype).min)

    model = build(Attention(clamped)).float()
    small = netsurgery.apply(model, [RandomScore(), PruneChannels(0.5)], X.float())
    with pytest.raises(InputError, match=r"'x' is a tensor of torch.float32 numbers, got torch.bfloat16"):
        small.bfloat16()(X.bfloat16())


def test_copies_that_protect_from_later_writes_stay() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).view(x.shape[0], x.shape[1], -1, 3)
            y = h.transpose(1, 2).reshape(x.shape[0], -1, 3)  # a view where there is one head
            h.mul_(2)
            return self.b(y.reshape(x.shape[0], -1, 2, 3).flatten(2)) if y.shape[1] == 10 else y

    x = torch.randn(2, 5, 4, dtype=torch.float64)
    network = netsurgery.trace(Writes().double(), x)
    assert all(group.locked for group in network.groups if group.size == 2)


@functools.lru_cache
def ramp(n: int, device: torch.device) -> Tensor:
    return torch.arange(n, device=device, dtype=torch.float64)


def test_caches_of_the_users_code_stay_clean() -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) * ramp(x.shape[1], x.device)[:, None]

    model = Cached().double()
    netsurgery.trace(model, X)
    assert model(X).shape == (2, 5, 2)


def other_code() -> types.ModuleType:
    """Code that the user's code imports, with a function that keeps what it has worked out."""
    made = types.ModuleType("other_code_of_hard_coded")
    text = "import functools\n@functools.lru_cache\ndef in_heads(n, h, c):\n    return n, h, c // h\n"
    exec(compile(text, "other_code.py", "exec"), made.__dict__)
    return made


OTHER = other_code()


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return x.view(*OTHER.in_heads(x.shape[0], 4, x.shape[1])).tanh().flatten(1)


class FromElsewhere(Heads):
    """Its code stands in a module that its class is not in, and that no ``sys.modules`` knows."""

    forward = types.FunctionType(Heads.forward.__code__, {"OTHER": other_code()})


@pytest.mark.parametrize("kind", [Heads, FromElsewhere])
@pytest.mark.parametrize("before", [False, True])
def test_what_a_cached_function_works_out_from_sizes_follows(before: bool, kind: type[Heads]) -> None:
    in_heads = kind.forward.__globals__["OTHER"].in_heads
    in_heads.cache_clear()
    model, x = nn.Sequential(kind(), nn.Linear(32, 2)).double(), torch.randn(3, 6, dtype=torch.float64)
    if before:
        model(x)
    small, edit = oracles.check(model, (x,), 1e-10, share=0.5)
    assert edit.counts == {"0.a": 2, "0.a:2": 4}
    assert small(torch.randn(5, 6, dtype=torch.float64)).shape == (5, 2)
    assert all(type(size) is int for size in in_heads(3, 4, 32))


class Otherwise(nn.Module):
    """Its ``num_features`` is no size of a dimension, whatever it is."""

    def __init__(self, number: int, use: Callable[[Any, Tensor], Tensor]):
        super().__init__()
        self.num_features, self.use, self.layer = number, use, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, self.layer(x))


def repeated(m: Any, x: Tensor) -> Tensor:
    for _ in range(m.num_features):
        x = x + 1
    return x


@pytest.mark.parametrize("number", [3, 4, 8])
@pytest.mark.parametrize(
    "use",
    [
        lambda m, x: x * m.num_features,
        lambda m, x: x + torch.arange(m.num_features).sum(),
        lambda m, x: x / m.num_features**0.5,
        repeated,
    ],
)
def test_a_number_with_another_meaning_under_a_known_name(number: int, use: Callable[[Any, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), Otherwise(number, use), nn.Linear(8, 2)).double().eval()
    x = torch.randn(2, 3, dtype=torch.float64)
    for seed in range(3):
        small, edit = oracles.check(model, (x,), 1e-10, seed, 0.5)
        if number != 8:  # there it is the width of the layer, by chance, and may keep it from changing
            assert {"0", "1.layer"} == {*edit.keep}
            assert small[1].num_features == number  # type: ignore[index, union-attr]
