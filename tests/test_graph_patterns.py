"""The notation for series of operations."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import netsurgery
from netsurgery import Pattern
from netsurgery.analysis.graph_patterns import _recorded
from netsurgery.errors import InputError


class Net(nn.Module):
    """A residual block, an addition, attention by hand, functional layers, and a convolution with a computed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 1)
        self.kernel = nn.Parameter(torch.randn(4, 4, 1, 1))
        self.head = nn.Linear(4, 5)
        self.tail = nn.Linear(5, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.norm(self.first(x)))
        y = F.silu(self.second(x)) + x
        y = F.conv2d(y, torch.tanh(self.kernel))
        y = self.tail(F.gelu(self.head(y.flatten(2).transpose(1, 2))))
        weights = (y @ y.transpose(1, 2)).softmax(-1)
        return (weights @ y).mean((1, 2))


NET = netsurgery.trace(Net(), torch.randn(2, 3, 4, 4), try_sizes=False)

FOUND: dict[str, list[tuple[str | None, ...]]] = {
    "convolution": [("first",), ("second",), (None,)],
    "convolution -> batch_norm": [("first", "norm")],
    "convolution -> batch_norm -> relu": [("first", "norm", None)],
    "convolution -> batch_norm? -> relu?": [("first", "norm", None), ("second", None, None), (None, None, None)],
    "relu -> convolution": [],  # the addition reads it, too
    "relu => convolution": [(None, "second")],
    "relu => add": [(None, None)],
    "silu -> add": [(None, None)],
    "silu -> add.other": [],
    "silu -> add.self -> convolution": [(None, None, None)],
    "tanh -> convolution": [],  # it is the weight
    "tanh -> convolution.weight": [(None, None)],
    "linear -> activation -> linear": [("head", None, "tail")],
    "linear -> silu|gelu": [("head", None)],
    "linear": [("head",), ("tail",)],
    "_softmax -> bmm.self": [(None, None)],
    "_softmax -> bmm.mat2": [],
}


@pytest.mark.parametrize("text", FOUND)
def test_matches(text: str) -> None:
    assert [match.modules for match in Pattern(text).find(NET)] == FOUND[text]


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("aten.convolution", "convolution"),
        ("aten::convolution", "convolution"),
        ("aten.convolution.default -> aten.native_batch_norm.default", "convolution -> batch_norm"),
        ("aten.relu_ => aten.add.Tensor", "relu => add"),
        ("linear -> aten.gelu|aten.silu?", "linear -> gelu|silu?"),
        ("aten._softmax.default -> aten.bmm.self", "_softmax -> bmm.self"),
    ],
)
def test_operations_as_nodes_print_them(text: str, same: str) -> None:
    assert [match.nodes for match in Pattern(text).find(NET)] == [match.nodes for match in Pattern(same).find(NET)]
    assert Pattern(text).find(NET)


def test_what_patterns_suggest_can_be_recorded() -> None:
    names = {
        node.target.name().removeprefix("aten::").partition(".")[0].rstrip("_") for node in NET.programs[0].operations
    }
    assert names <= _recorded()
    assert not {"conv2d", "gelu_backward", "softmax", "name"} & _recorded()


def test_patterns_are_sought_in_networks() -> None:
    with pytest.raises(InputError, match=r"Pattern\('relu'\).find takes a Network, got ReLU: netsurgery.trace"):
        Pattern("relu").find(nn.ReLU())  # type: ignore[arg-type]


def test_nodes_of_a_match() -> None:
    (match,) = Pattern("convolution -> batch_norm -> gelu?").find(NET)
    assert [str(node and node.target) for node in match.nodes] == [
        "aten.convolution.default",
        "aten.native_batch_norm.default",
        "None",
    ]
    assert match.forwards == ("first", "norm", None)
    assert [match.forwards for match in Pattern("silu -> add").find(NET)] == [("", "")]
    assert Pattern("add") == Pattern("add") and len({Pattern("add"), Pattern("add")}) == 1


class Does(nn.Module):
    """A SiLU, and what is named."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.drop, self.layer = what, nn.Dropout(), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.what == "convolution":
            x = self.layer(x)
        y = F.silu(x)
        if self.what == "twice":
            y = F.silu(y)
        if self.what == "dropout":
            y = self.drop(y)
        if self.what == "flattened":
            y = y.flatten(1)
        if self.what == "turned":
            y = y.transpose(2, 3)
        if self.what == "other":
            return x
        if self.what == "more in training" and self.training:
            y = y * 2
        return (y, x) if self.what == "two results" else y


class Before(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.first, self.act = nn.Conv2d(3, 3, 1), act

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.first(x))
        return y[0] if isinstance(y, tuple) else y


OTHERS = ("convolution", "twice", "dropout", "flattened", "turned", "other", "more in training", "two results")


@pytest.mark.parametrize("what", [*OTHERS, "no more"])
def test_modules_of_a_match_do_nothing_else(what: str) -> None:
    network = netsurgery.trace(Before(Does(what)), torch.randn(2, 3, 4, 5), try_sizes=False)
    found = {match.modules for match in Pattern("silu").find(network)}
    assert found == {("act",) if what == "no more" else (None,)}
    assert {match.forwards for match in Pattern("silu").find(network)} == {("act",)}


def test_modules_with_views_paddings_and_computed_weights_are_named() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        weight_norm(nn.Conv2d(4, 4, 1)),
        nn.PReLU(),
        nn.Flatten(2),
        nn.Linear(20, 6),
        nn.Softmax(-1),
    )
    network = netsurgery.trace(model, torch.randn(2, 3, 4, 5), try_sizes=False)
    found = [match.modules[0] for match in Pattern("convolution|linear|activation|_softmax").find(network)]
    assert found == ["0", "1", "2", "4", "5"]


def test_a_block_is_not_replaced_for_an_operation_in_its_code() -> None:
    @dataclasses.dataclass(frozen=True)
    class Hard(netsurgery.ModuleRewrite):
        exact = False

        def build(self, module: nn.Module) -> nn.Module:
            return nn.Hardswish()

    network = netsurgery.trace(Before(Does("convolution")), torch.randn(2, 3, 4, 5), try_sizes=False)
    modules: dict[Any, Any] = {match.modules[0]: Hard() for match in Pattern("silu").find(network)}
    with pytest.raises(InputError, match="the operation runs in the forward of a module that does more"):
        netsurgery.Edit(network, {}, modules=modules)


@torch.library.custom_op("graphpatterns::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return 2 * x


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_operations_of_other_libraries() -> None:
    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return twice(self.layer(x)).relu()

    network = netsurgery.trace(Custom(), torch.randn(2, 3), try_sizes=False)
    assert [m.modules for m in Pattern("linear -> graphpatterns::twice -> relu").find(network)] == [
        ("layer", None, None)
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("batchnorm", r"Pattern\('batchnorm'\): 'batchnorm' is no operation; did you mean batch_norm"),
        ("convolution -> qqqqqq", "'qqqqqq' is no operation of ATen, nor a role"),
        ("convolution ->", "'' is no step: an operation, or several"),
        ("convolution relu", "'convolution relu' is no step"),
        ("relu? -> gelu", "the first step is an operation, neither optional nor read"),
        ("add.other -> gelu", "the first step is an operation"),
        ("lineer", r"'lineer' is no operation; did you mean linear"),
        ("relu7", r"'relu7' is no operation; did you mean relu or rrelu or relu6\?"),
        ("softmaxx", r"did you mean _softmax or _log_softmax"),
        ("sigmiod", r"did you mean sigmoid"),
        ("aten.batchnorm", r"'batchnorm' is no operation; did you mean batch_norm"),
        (3, r"Pattern\(3\): a text, such as"),
    ],
)
def test_what_is_no_pattern(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Pattern(text)
