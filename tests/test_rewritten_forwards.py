"""A rewritten forward has the gradients, the numbers under autocast and the effects of the code, or it is locked."""

from __future__ import annotations

import collections
import copy
import cProfile
import functools
import hashlib
import itertools
import random as chance
import sys
import types
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch._dynamo  # torch 2.8 cannot import it while a model is recorded
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch import is_grad_enabled as asks
from torch import no_grad as quiet
from torch.utils.checkpoint import checkpoint as saving

import netsurgery
import oracles
from netsurgery.capture.side_effects import Effects
from netsurgery.passes import PruneChannels, RandomScore
from test_hard_coded import Net

X = torch.randint(-4, 5, (6, 8), generator=torch.Generator().manual_seed(0)) / 4
half = torch.autocast


class Rev(torch.autograd.Function):
    """The identity, with the gradient reversed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class Bare(Rev):
    """The same, without an operation in its forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x


class Late(torch.autograd.Function):
    """The same, with its context set up apart."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


rev, bare, late = Rev.apply, Bare.apply, Late.apply
turned = functools.partial(Rev.apply)


def helper(x: Tensor) -> Tensor:
    return rev(x)


@torch.no_grad()
def decorated(x: Tensor) -> Tensor:
    return torch.sigmoid(x)


class Store:
    """Somewhere to keep things."""

    shared: ClassVar[list[Any]] = []
    count = 0

    def __init__(self) -> None:
        self.items: list[Any] = []

    def add(self, item: Any) -> None:
        self.items.append(item)


LOG: list[Any] = []
CACHE: dict[str, Any] = {}
SEEN: set[int] = set()
QUEUE: collections.deque[Any] = collections.deque(maxlen=3)
SPACE = types.SimpleNamespace(count=0)
STORE = Store()
TICKS = itertools.count()
DICE = chance.Random(0)
number = 0


def counted() -> None:
    global number
    number += 1


def closure() -> Callable[[], None]:
    count = 0

    def step() -> None:
        nonlocal count
        count += 1

    return step


step = closure()


def kept(item: Any, memory: list[Any] = []) -> None:  # noqa: B006
    memory.append(item)


def named(item: Any) -> None:
    named.last = item  # type: ignore[attr-defined]


class Inside(nn.Module):
    """Its width is written in its code; between its layers something happens."""

    flip = staticmethod(Rev.apply)
    steps: ClassVar[list[int]] = []

    def __init__(self, between: Callable[[Any, Tensor], Tensor]):
        super().__init__()
        self.between = between
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16)
        self.f, self.ng, self.ac = Rev.apply, torch.no_grad(), torch.autocast("cpu", enabled=False)
        self.on, self.store, self.gain = True, Store(), nn.Parameter(torch.ones(1) / 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.between(self, self.a(x).relu().view(-1, 4, 8)).reshape(-1, 32))
        return out

    @torch.no_grad()
    def scale(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    def gained(self, x: Tensor) -> Tensor:
        return (x.float().transpose(1, 2) @ (torch.eye(4) / 3 + 0.3)).transpose(1, 2) * self.gain


def build(between: Callable[[Any, Tensor], Tensor]) -> Net:
    torch.manual_seed(0)
    net = Net(Inside(between))
    with torch.no_grad():  # numbers whose products and sums are exact, in bfloat16, too
        for parameter in net.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape) / 4)
    return net


def silenced(model: nn.Module, edit: netsurgery.Edit) -> nn.Module:
    """The model with zeros for all that the edit takes away."""
    silent, places = copy.deepcopy(model), edit.positions
    for name, parameter in silent.named_parameters():
        stays = places.cut(torch.arange(parameter.numel()).view(parameter.shape), edit.network.axes[name])
        mask = torch.zeros(parameter.numel()).index_fill_(0, stays.flatten(), 1).view(parameter.shape)
        parameter.data *= mask
    return silent


def trained(model: nn.Module, training: bool, half: bool) -> tuple[Tensor, list[Tensor | None]]:
    """The output of a model, and the gradients of its input and parameters."""
    torch.manual_seed(1)
    x = X.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        out = model.train(training)(x)
    model.zero_grad()
    (out.float() ** 2).sum().backward()
    return out, [tensor.grad for tensor in (x, *model.parameters())]


def check(between: Callable[[Any, Tensor], Tensor]) -> netsurgery.Edit:
    """Remove half of everything; the rest must be trained as it is where all that went is zero."""
    model = build(between)
    edit = netsurgery.plan(model, [oracles.RandomKeep(0, 0.5)], X)
    small, silent, places = netsurgery.rewrite(model, edit), silenced(model, edit), edit.positions
    names = [name for name, _ in model.named_parameters()]
    for training, low in itertools.product((False, True), (False, True)):
        (out, grads), (wanted, full) = (trained(one, training, low) for one in (small, silent))
        assert out.dtype == wanted.dtype and torch.allclose(out, wanted, rtol=1e-5)
        axes = [None, *(edit.network.axes[name] for name in names)]
        for found, whole, dims in zip(grads, full, axes, strict=True):
            assert (found is None) == (whole is None)
            if found is not None and whole is not None:
                torch.testing.assert_close(
                    found, whole if dims is None else places.cut(whole, dims), rtol=1e-4, atol=1e-6
                )
    return edit


def reasons(network: netsurgery.Network) -> str:
    return " ".join(group.locked or "" for group in network.groups)


def under(context: Any, x: Tensor) -> Tensor:
    with context:
        return torch.sigmoid(x)


def switched(flag: bool, x: Tensor) -> Tensor:
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(flag)
    y = torch.sigmoid(x)
    torch.set_grad_enabled(before)
    return y


def by_hand(m: Any, x: Tensor) -> Tensor:
    before = torch.is_autocast_enabled("cpu")
    torch.set_autocast_enabled("cpu", False)
    y = m.gained(x)
    torch.set_autocast_enabled("cpu", before)
    return y


def in_full(context: Any, m: Any, x: Tensor) -> Tensor:
    with context:
        y: Tensor = m.gained(x)
        return y


def hooked(x: Tensor) -> Tensor:
    y = x * 1
    if y.requires_grad:
        y.register_hook(lambda grad: -grad)
    return y


def through_hooks(m: Any, x: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.bfloat16(), lambda t: t.float()):
        return torch.sigmoid(x) * m.gain


def outside(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad(), torch.enable_grad():
        return torch.sigmoid(x)


#: what happens between the layers, and a part of the reason for the lock
GRADIENTS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "at module level": (lambda m, x: rev(x), "Function 'Rev'"),
    "in a helper": (lambda m, x: helper(x), "Function 'Rev'"),
    "as an attribute": (lambda m, x: m.f(x), "Function 'Rev'"),
    "as a class attribute": (lambda m, x: m.flip(x), "Function 'Rev'"),
    "by its name": (lambda m, x: Rev.apply(x), "Function 'Rev'"),
    "partial": (lambda m, x: turned(x), "Function 'Rev'"),
    "mapped": (lambda m, x: next(map(rev, [x])), "Function 'Rev'"),
    "returns its input": (lambda m, x: bare(x) * 2, "Function 'Bare'"),
    "set up apart": (lambda m, x: late(x), "Function 'Late'"),
    "in training": (lambda m, x: rev(x) if m.training else x, "Function 'Rev'"),
    "no_grad renamed": (lambda m, x: x * under(quiet(), x), "no_grad"),
    "no_grad stored": (lambda m, x: x * under(m.ng, x), "no_grad"),
    "decorated helper": (lambda m, x: x * decorated(x), "no_grad"),
    "decorated method": (lambda m, x: x * m.scale(x), "no_grad"),
    "set_grad_enabled": (lambda m, x: x * under(torch.set_grad_enabled(not m.on), x), "set_grad_enabled"),
    "set_grad_enabled, called": (lambda m, x: x * switched(not m.on, x), "grad_enabled"),
    "enable_grad": (lambda m, x: x * outside(m, x), "no_grad"),
    "asks for grad mode": (lambda m, x: x * (2 if asks() else 1), "is_grad_enabled"),
    "asks for requires_grad": (lambda m, x: x * (2 if x.requires_grad else 1), "requires_grad"),
    "hook": (lambda m, x: hooked(x), "requires_grad"),
    "saved tensors": (through_hooks, "saved_tensors_hooks"),
    "checkpoint": (lambda m, x: saving(torch.sigmoid, x, use_reentrant=False), "checkpoint"),
    "checkpoint, old": (lambda m, x: saving(torch.sigmoid, x, use_reentrant=True), "checkpoint"),
}
AUTOCAST: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "stored": (lambda m, x: in_full(m.ac, m, x), "autocast"),
    "renamed": (lambda m, x: in_full(half("cpu", enabled=False), m, x), "autocast"),
    "amp": (lambda m, x: in_full(torch.amp.autocast("cpu", enabled=False), m, x), "autocast"),
    "switched on": (lambda m, x: in_full(half("cpu", torch.bfloat16), m, x), "autocast"),
    "by hand": (by_hand, "autocast"),
    "asked for": (lambda m, x: x.bfloat16() if torch.is_autocast_enabled("cpu") else x, "autocast"),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch, where nothing is trained
@pytest.mark.parametrize(
    ("between", "why"),
    [*GRADIENTS.values(), *AUTOCAST.values()],
    ids=[*GRADIENTS, *(f"autocast {n}" for n in AUTOCAST)],
)
def test_what_gradients_and_autocast_need_is_locked_by_name(between: Callable[[Any, Tensor], Tensor], why: str) -> None:
    edit = check(between)
    assert "inside" not in edit.replaced
    found = reasons(netsurgery.trace(build(between), X))
    assert "the code of inside" in found and why in found and "test_rewritten_forwards.py:" in found


#: what leaves nothing in the record of the backward run: the calls alone tell
ALONE = ("asks for grad mode", "asks for requires_grad", "saved tensors", "checkpoint", "enable_grad")


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", [name for name in GRADIENTS if name not in ALONE])
def test_the_record_of_the_backward_run_shows_it_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Effects, "see", None)  # nobody watches the calls
    between, _ = GRADIENTS[name]
    assert "inside" not in check(between).replaced
    assert name == "hook" or "other gradients" in reasons(netsurgery.trace(build(between), X))


def of_another(m: Any, x: Tensor) -> Tensor:
    kind = m.gain.dtype
    y = m.b(x.reshape(-1, 32))
    assert y.dtype != torch.int64
    return m.a(y).view_as(x).to(kind)  # of the parameter, though another was asked for since


def test_dtypes_that_only_autocast_tells_apart() -> None:
    assert "inside" not in check(of_another).replaced
    assert "the code goes through ToCopyBackward0" in reasons(netsurgery.trace(build(of_another), X))


def straight(m: Any, x: Tensor) -> Tensor:
    return x + (torch.round(x * 4) / 4 - x).detach()


def stopped(m: Any, x: Tensor) -> Tensor:
    return x * torch.sigmoid(x.detach())


def random_name(m: Any, x: Tensor) -> Tensor:
    return types.SimpleNamespace(apply=F.relu, random=torch.tanh, autocast=1).apply(x)


def local_containers(m: Any, x: Tensor) -> Tensor:
    found: list[Tensor] = []
    total = 0

    def visit(y: Tensor, into: list[Tensor]) -> None:
        nonlocal total
        total += y.shape[-1]
        into.append(y * 2)

    for part in (x, x + 1):
        visit(part, found)
    table = {"parts": found}
    table["more"] = found[:1]
    return sum(table["parts"], x) * (2 if total > 3 else 1)


@pytest.mark.parametrize("between", [straight, stopped, random_name, local_containers, lambda m, x: m.gained(x)])
def test_what_a_graph_says_exactly_is_rewritten(between: Callable[[Any, Tensor], Tensor]) -> None:
    assert "inside" in check(between).replaced


def test_every_process_gives_a_rewritten_forward_the_same_file_name() -> None:
    """Lock reasons and tracebacks name the file, and caches of compilers go by it."""
    small: Any = netsurgery.apply(build(straight), [RandomScore(), PruneChannels(0.5)], X).get_submodule("inside")
    digest = hashlib.sha256(small.netsurgery_code.encode()).hexdigest()
    assert type(small).forward.__code__.co_filename == f"<netsurgery Inside {digest[:16]}>"


def by_key(m: Any, x: Tensor) -> Tensor:
    CACHE["a"] = x
    return x * 2


def logged(m: Any, x: Tensor) -> Tensor:
    LOG.append(x)
    return x * 2


def class_counter(m: Any, x: Tensor) -> Tensor:
    Store.count += 1
    return x * 2


def own_class(m: Any, x: Tensor) -> Tensor:
    type(m).steps.append(1)
    return x * 2


def of_a_part(m: Any, x: Tensor) -> Tensor:
    m.b.calls = getattr(m.b, "calls", 0) + 1
    return x * 2


def and_then(action: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Tensor]:
    def between(m: Any, x: Tensor) -> Tensor:
        action(m, x)
        return x * 2

    return between


def spaced() -> None:
    SPACE.count += 1


EVALUATED: list[int] = []


def evaluated() -> None:
    EVALUATED.append(1)


WRITES: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "list": (logged, "LOG"),
    "dictionary": (by_key, "CACHE"),
    "attribute of an attribute": (and_then(lambda m, x: m.store.items.append(x)), "store"),
    "by a method": (and_then(lambda m, x: m.store.add(x)), "store"),
    "by a method of a global": (and_then(lambda m, x: STORE.add(x)), "STORE"),
    "set": (and_then(lambda m, x: SEEN.add(len(SEEN))), "SEEN"),
    "deque": (and_then(lambda m, x: QUEUE.append(x)), "QUEUE"),
    "class attribute": (and_then(lambda m, x: Store.shared.append(x)), "Store"),
    "counter of a class": (class_counter, "Store"),
    "own class": (own_class, "steps"),
    "global number": (and_then(lambda m, x: counted()), "number"),
    "namespace": (and_then(lambda m, x: spaced()), "SPACE"),
    "nonlocal": (and_then(lambda m, x: step()), "count"),
    "default argument": (and_then(lambda m, x: kept(x)), "memory"),
    "attribute of a function": (and_then(lambda m, x: named(x)), "named"),
    "iterator": (and_then(lambda m, x: next(TICKS)), "TICKS"),
    "random numbers": (and_then(lambda m, x: chance.random()), "random"),
    "own random numbers": (and_then(lambda m, x: DICE.random()), "DICE"),
    "outside of training": (and_then(lambda m, x: None if m.training else evaluated()), "EVALUATED"),
    "of a part": (of_a_part, "calls"),
}


@pytest.mark.parametrize(("between", "why"), WRITES.values(), ids=WRITES)
def test_writes_to_what_others_see_are_locked_by_name(between: Callable[[Any, Tensor], Tensor], why: str) -> None:
    edit = check(between)
    assert "inside" not in edit.replaced
    found = reasons(netsurgery.trace(build(between), X))
    assert "the code of inside" in found and why in found and "test_rewritten_forwards.py:" in found


def test_recording_leaves_lists_and_profilers_of_the_user_as_they_are() -> None:
    LOG.clear()
    with cProfile.Profile() as profile:
        netsurgery.trace(build(logged), X)
    assert not LOG
    assert any(
        "test_rewritten_forwards" in entry.code.co_filename
        for entry in profile.getstats()
        if hasattr(entry.code, "co_name")
    )
    seen = []
    sys.setprofile(lambda *event: seen.append(event[1]))
    before = sys.getprofile()
    try:
        netsurgery.trace(build(logged), X)
        assert sys.getprofile() is before
    finally:
        sys.setprofile(None)
    assert seen


STATS: dict[str, Any] = {"means": [], "by name": collections.OrderedDict(), "last": torch.ones(2)}
LAST: Any = torch.zeros(3)


class Keeps(nn.Module):
    """Code that keeps tensors where others see them, in eight ways."""

    seen: ClassVar[list[Tensor]] = []
    table: ClassVar[dict[str, Tensor]] = {}
    newest: ClassVar[Any] = None
    few: ClassVar[collections.deque[Any]] = collections.deque([1, 2], maxlen=3)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        global LAST
        h = LAST = self.a(x).relu()
        STATS["means"].append(h.mean(0))
        STATS["by name"]["h"] = STATS["last"] = h
        Keeps.newest = self.table["h"] = h
        self.seen.append(h)
        self.few.append(h)
        return self.b(h)


def test_what_others_see_is_left_as_it_was() -> None:
    last, before = LAST, STATS["last"]
    model, x = Keeps().eval(), torch.randn(3, 4)
    small = netsurgery.apply(model, [RandomScore(), PruneChannels(0.5)], x)
    assert LAST is last and STATS["last"] is before and not STATS["means"] and not STATS["by name"]
    assert not Keeps.seen and not Keeps.table and Keeps.newest is None and [*Keeps.few] == [1, 2]
    assert small(x).shape == (3, 2) and LAST.shape == (3, 4) and len(STATS["means"]) == 1
