"""A part that the code calls several times, along different branches of its own, and whose code hard-codes a size."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import netsurgery
from netsurgery.errors import InputError
from netsurgery.passes import PruneChannels, RandomScore
from oracles import check

X = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Part(nn.Module):
    """Two layers with heads between them, written with constants; ``mix`` uses what else it is given."""

    def __init__(self, mix: Callable[..., Tensor]):
        super().__init__()
        self.mix = mix
        self.f, self.g, self.drop = nn.Linear(12, 12), nn.Linear(12, 12), nn.Dropout(0.5)

    def heads(self, x: Tensor) -> Tensor:
        return self.f(x).view(x.shape[0], -1, 3, 4).softmax(-1).flatten(2)


class WithState(Part):
    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        y = self.drop(self.heads(x))
        return self.g(y if state is None else self.mix(y, state))


class WithFlag(Part):
    def forward(self, x: Tensor, *, first: bool = False) -> Tensor:
        y = self.heads(x)
        return self.g(y.relu() if first else y.tanh())


class WithMask(Part):
    def forward(self, x: Tensor, extra: Tensor) -> Tensor:
        y = self.heads(x)
        return self.g(y * extra if extra.dim() == 3 else y + extra.unsqueeze(1))


class WithPair(Part):
    def forward(self, x: Tensor, *states: Any) -> tuple[Tensor, Tensor]:
        y = self.heads(x)
        if states:
            y = y + states[0][0] * states[0][1]
        return self.g(y), y


class WithMode(Part):
    def forward(self, x: Tensor, how: str = "sum", **options: Any) -> Tensor:
        y = self.heads(x)
        y = y + x.new_zeros(12) if how == "sum" else y * x.new_ones(12)
        return self.g(y * options["scale"]) if "scale" in options else self.g(y)


class Sampled(nn.Module):
    """Its own code asks on which of several sizes it is."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        q, k, v = (
            t.view(x.shape[0], -1, 3, 4).transpose(1, 2) for t in (self.f(x), x, x if before is None else before)
        )
        return self.g(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def with_state(net: Any, x: Tensor) -> Tensor:
    state = None
    for _ in range(3):
        state = net.part(x, state)
    return state


def with_flag(net: Any, x: Tensor) -> Tensor:
    return net.part(net.part(x, first=True)) + net.part(x, first=False)


def with_mask(net: Any, x: Tensor) -> Tensor:
    return net.part(net.part(x, x.sigmoid()), x.mean(1))


def with_pair(net: Any, x: Tensor) -> Tensor:
    first = net.part(x)
    return net.part(first[0], first)[0]


def with_mode(net: Any, x: Tensor) -> Tensor:
    return net.part(net.part(x, "sum"), "product") + net.part(x, scale=2.0)


class Net(nn.Module):
    def __init__(self, run: Callable[[Any, Tensor], Tensor], part: nn.Module):
        super().__init__()
        self.run = run
        self.before, self.part, self.after = nn.Linear(6, 12), part, nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.run(self, self.before(x)))


def net(run: Callable[[Any, Tensor], Tensor], part: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return Net(run, part).double().eval()


BRANCHES: dict[str, Callable[[], nn.Module]] = {
    "no state at first": lambda: net(with_state, WithState(torch.add)),
    "no state at first, multiplied": lambda: net(with_state, WithState(torch.mul)),
    "a flag": lambda: net(with_flag, WithFlag(torch.add)),
    "dimensions": lambda: net(with_mask, WithMask(torch.add)),
    "more arguments": lambda: net(with_pair, WithPair(torch.add)),
    "a word, and options": lambda: net(with_mode, WithMode(torch.add)),
    "attention": lambda: net(with_state, Sampled()),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_branches_are_followed(name: str) -> None:
    model = BRANCHES[name]()
    for seed, share in ((0, 0.5), (1, 0.75), (2, None)):
        small, edit = check(model, (X,), 1e-10, seed, share)
    assert any(member.parameter == "part.g.weight" for name in edit.keep for member in edit.network[name].members)
    assert "first_that_fits" in small.part.netsurgery_code
    again = pickle.loads(pickle.dumps(small.part))
    assert again.netsurgery_code == small.part.netsurgery_code


def pruned(name: str) -> nn.Module:
    return netsurgery.apply(BRANCHES[name](), [RandomScore(), PruneChannels(0.5)], (X,))


def test_other_kinds_of_inputs_are_refused_and_other_sizes_are_not() -> None:
    small = pruned("no state at first")
    x = torch.randn(3, 7, small.before.out_features, dtype=torch.float64)
    state = torch.randn(3, 7, small.part.g.in_features, dtype=torch.float64)
    for y in (small.part(x), small.part(x, state), small.part(x, state=None), small.part(state=state, x=x)):
        assert y.shape == (3, 7, small.part.g.out_features)
    with pytest.raises(InputError, match=r"rewrote this module's forward as it runs where 'state' is .*, got 3"):
        small.part(x, 3)
    with pytest.raises(InputError, match="'x' is a tensor of 3 dimensions, got 2"):
        small.part(x[0], x[0])


def test_each_branch_trains_as_it_did() -> None:
    small = pruned("no state at first").train()
    x = torch.randn(2, 5, small.before.out_features, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    one, two = small.part(x), small.part(x)
    assert not torch.equal(one, two)  # dropout is at work
    (one.sum() + small.part(x, two).square().sum()).backward()
    assert x.grad is not None and all(p.grad is not None for p in small.part.parameters())


def test_the_branches_compile() -> None:
    small = pruned("a flag")
    compiled = torch.compile(copy.deepcopy(small), backend="eager")
    torch.testing.assert_close(compiled(X), small(X))


# Code that is another in training -----------------------------------------------------------------------------------


class MasksInTraining(Part):
    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x).view(x.shape[0], -1, 3, 4).transpose(1, 2)
        if self.training:
            weights = F.dropout((0.5 * y @ y.transpose(-1, -2)).softmax(-1), 0.25, True)
            return self.g((weights @ y).transpose(1, 2).reshape(x.shape[0], -1, 12))
        return self.g(((y @ y.transpose(-1, -2) * 0.5).softmax(-1) @ y).transpose(1, 2).flatten(2))


class AddsInTraining(Part):
    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        y = self.heads(x) if state is None else self.heads(x) * state
        return self.g(y + 1) if self.training else self.g(y)


class OtherOrder(Part):
    """The same in both modes, in another order; and a part of a result that nothing reads."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            y, _ = self.heads(x).relu()[..., :12], x[..., 0]
            return self.g(y * 2.0)
        y = 2.0 * self.heads(x)
        last = y[:, -1]
        assert last.dim() == 2
        return self.g(y.relu())


class RefusesOneInTraining(Part):
    """The same operations in both modes; in training it asks for a size that it does not ask for in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.heads(x)
        if self.training and x.shape[0] < 2:
            raise ValueError("expected more than one sample")
        return self.g(y)


class Pads(Part):
    """In training a branch by size, with a shift by a number that is an attribute."""

    def __init__(self, mix: Callable[..., Tensor]):
        super().__init__(mix)
        self.shift, self.longest = 0.5, 4

    def forward(self, x: Tensor) -> Tensor:
        y = self.heads(x)
        if self.training and x.shape[1] > self.longest:
            y = F.dropout1d(y - self.shift, 0.0, self.training)
        return self.g(y)


TRAINED: dict[str, Callable[[], nn.Module]] = {
    "masks": lambda: net(lambda net, x: net.part(x), MasksInTraining(torch.add)),
    "adds": lambda: net(lambda net, x: net.part(x), AddsInTraining(torch.add)),
    "adds, with a state": lambda: net(with_state, AddsInTraining(torch.add)),
    "another order": lambda: net(lambda net, x: net.part(net.part(x)), OtherOrder(torch.add)),
    "a size": lambda: net(lambda net, x: net.part(x), RefusesOneInTraining(torch.add)),
    "a branch by size": lambda: net(lambda net, x: net.part(x), Pads(torch.add)),
}


@pytest.mark.parametrize("name", TRAINED)
def test_code_that_is_another_in_training_is_followed(name: str) -> None:
    model = TRAINED[name]()
    for seed, share in ((0, 0.5), (1, 0.75), (2, None)):
        small, _ = check(model, (X,), 1e-10, seed, share)
    assert "netsurgery_train if self.training" in small.part.netsurgery_code


@pytest.mark.parametrize("name", ["adds", "another order", "a size", "a branch by size"])
def test_in_training_too_the_result_is_that_of_the_silenced_network(name: str) -> None:
    """Units whose consumers are zero may go: in both modes nothing else changes."""
    model = TRAINED[name]()
    gone = [i for i in range(12) if i % 4 == 1]
    with torch.no_grad():
        model.part.g.weight[:, gone] = 0
        model.part.f.weight[gone], model.part.f.bias[gone] = 0, -1e9  # nothing of the softmax either
    network = netsurgery.trace(model, (X,))
    inner = next(group for group in network.prunable if group.size == 4)
    small = netsurgery.rewrite(model, netsurgery.Edit(network, {inner.name: (0, 2, 3)}))
    for one in (model, small):
        one.train()
    torch.testing.assert_close(small(X), model(X), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(small(X), small.eval()(X)) or name in ("another order", "a size")


def test_a_size_that_only_training_asks_for_is_asked_for_there_alone() -> None:
    model = TRAINED["a size"]()
    before = [(part, dict(vars(part))) for part in model.modules()]
    small = netsurgery.apply(model, [RandomScore(), PruneChannels(0.5)], (X,))
    assert all(vars(part) == own for part, own in before) and not model.training
    assert small(X[:1]).shape == (1, 5, 3)
    with pytest.raises(AssertionError, match="at these other sizes its code would take another branch"):
        small.train()(X[:1])


class Drops(Part):
    """Functional dropout in several forms, none of which changes the operations in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(self.f(x), 0.1, self.training).view(x.shape[0], -1, 3, 4).transpose(1, 2)
        y = F.scaled_dot_product_attention(y, y, y, dropout_p=self.drop.p if self.training else 0.0)
        before = y.transpose(1, 2).flatten(2)
        after = torch.dropout(before, 0.5, self.training)
        return self.g(before + F.dropout1d(input=after, training=self.training))


class Targets(Net):
    """In training it needs targets, so that this run cannot be recorded."""

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        out = super().forward(x)
        if self.training and targets is None:
            raise ValueError("in training, targets are needed")
        return out if targets is None else (out - targets).square()


def targets(part: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return Targets(lambda net, x: net.part(x), part).double().eval()


def test_dropout_in_training_is_followed_where_that_run_cannot_be_recorded() -> None:
    model = targets(Drops(torch.add))
    gone = [i for i in range(12) if i % 4 == 1]
    with torch.no_grad():
        model.part.g.weight[:, gone] = 0
        model.part.f.weight[gone], model.part.f.bias[gone] = 0, 0
    network = netsurgery.trace(model, (X,))
    inner = next(group for group in network.prunable if group.size == 4)
    small = netsurgery.rewrite(model, netsurgery.Edit(network, {inner.name: (0, 2, 3)}))
    torch.testing.assert_close(small(X), model(X), rtol=1e-9, atol=1e-9)
    for one in (model, small):
        one.train()
    y = torch.zeros(2, 5, 3, dtype=torch.float64)
    assert not torch.equal(small(X, y), small(X, y))
    one, two = (torch.stack([net(X, y) for _ in range(1000)]).mean() for net in (small, model))
    torch.testing.assert_close(one, two, rtol=0.1, atol=0)


def test_other_code_in_training_is_locked_where_that_run_cannot_be_recorded() -> None:
    network = netsurgery.trace(targets(AddsInTraining(torch.add)), (X,))
    reasons = [group.locked for group in network.groups if group.locked and "part" in group.locked]
    assert any("runs other code in training, and that run is not recorded" in reason for reason in reasons)


class ReadsAnother(Part):
    """The same operations in both modes, but in training one of them reads another tensor of the same shape."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        z = (x if self.training else y).view(x.shape[0], -1, 3, 4).softmax(-1).flatten(2)
        return self.g(z) + x


def test_an_operation_that_reads_another_tensor_in_training_is_other_code() -> None:
    network = netsurgery.trace(targets(ReadsAnother(torch.add)), (X,))
    reasons = [group.locked for group in network.groups if group.locked and "part" in group.locked]
    assert any("runs other code in training, and that run is not recorded" in reason for reason in reasons)


def test_each_mode_has_its_dropout() -> None:
    small = netsurgery.apply(TRAINED["masks"](), [RandomScore(), PruneChannels(0.5)], (X,))
    assert torch.equal(small(X), small(X))
    small.train()
    assert not torch.equal(small(X), small(X))


class Counts(Part):
    """It takes another way each second time, and nothing that it is given says so."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        y = self.heads(x)
        return self.g(y.relu() if self.calls % 2 else y.tanh())


class ByNumber(Part):
    def forward(self, x: Tensor, index: int) -> Tensor:
        y = self.heads(x)
        return self.g(y.relu() if index else y.tanh())


@pytest.mark.parametrize(
    ("run", "part", "why"),
    [
        (lambda net, x: net.part(net.part(x)), Counts(torch.add), "relu.default runs where aten.tanh.default ran"),
        (lambda net, x: net.part(net.part(x, 0), 1), ByNumber(torch.add), "several branches for inputs of one kind"),
    ],
)
def test_branches_that_no_input_tells_apart_are_locked(run: Any, part: nn.Module, why: str) -> None:
    network = netsurgery.trace(net(run, part), (X,))
    reasons = [group.locked for group in network.groups if group.locked and "part" in group.locked]
    assert any(why in reason for reason in reasons)


class AlwaysDrops(Part):
    """What it turns on, it turns on in eval mode, too: nothing that the mode says."""

    def forward(self, x: Tensor) -> Tensor:
        return self.g(self.mix(self.heads(x))) + x


@pytest.mark.parametrize(
    "mix",
    [
        lambda y: F.dropout(y, 0.5),
        lambda y: F.batch_norm(y.flatten(0, 1), None, None, training=True).view_as(y),
        lambda y: F.dropout(F.dropout(y, 0.5), 0.0),
    ],
    ids=["dropout", "batch norm", "dropout twice"],
)
def test_what_the_code_always_turns_on_is_followed(mix: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    model = Net(lambda net, x: net.part(x), AlwaysDrops(mix)).double().eval()
    network = netsurgery.trace(model, (X,))
    inner = next(group for group in network.prunable if group.size == 4)
    edit = netsurgery.Edit(network, {inner.name: (0, 2, 3)})
    small = netsurgery.rewrite(model, edit)
    assert netsurgery.verify(model, small, edit, (X,)) < 1e-9
    small.train()
    torch.manual_seed(0)
    trained = small(X)
    small.eval()
    torch.manual_seed(0)
    assert torch.equal(small(X), trained)
