"""The notation for series of operations."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import netsurgery
from netsurgery import Pattern
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
    "convolution": [("first",), ("second",), ("",)],
    "convolution -> batch_norm": [("first", "norm")],
    "convolution -> batch_norm -> relu": [("first", "norm", "")],
    "convolution -> batch_norm? -> relu?": [("first", "norm", ""), ("second", None, None), ("", None, None)],
    "relu -> convolution": [],  # the addition reads it, too
    "relu => convolution": [("", "second")],
    "relu => add": [("", "")],
    "silu -> add": [("", "")],
    "silu -> add.other": [],
    "silu -> add.self -> convolution": [("", "", "")],
    "tanh -> convolution": [],  # it is the weight
    "tanh -> convolution.weight": [("", "")],
    "linear -> activation -> linear": [("head", "", "tail")],
    "linear -> silu|gelu": [("head", "")],
    "linear": [("head",), ("tail",)],
    "_softmax -> bmm.self": [("", "")],
    "_softmax -> bmm.mat2": [],
}


@pytest.mark.parametrize("text", FOUND)
def test_matches(text: str) -> None:
    assert [match.modules for match in Pattern(text).find(NET)] == FOUND[text]


def test_nodes_of_a_match() -> None:
    (match,) = Pattern("convolution -> batch_norm -> gelu?").find(NET)
    assert [str(node and node.target) for node in match.nodes] == [
        "aten.convolution.default",
        "aten.native_batch_norm.default",
        "None",
    ]
    assert Pattern("add") == Pattern("add") and len({Pattern("add"), Pattern("add")}) == 1


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
    assert [m.modules for m in Pattern("linear -> graphpatterns::twice -> relu").find(network)] == [("layer", "", "")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("batchnorm", r"Pattern\('batchnorm'\): 'batchnorm' is no operation; did you mean batch_norm"),
        ("convolution -> qqqqqq", "'qqqqqq' is no operation of ATen, nor a role"),
        ("convolution ->", "'' is no step: an operation, or several"),
        ("convolution relu", "'convolution relu' is no step"),
        ("relu? -> gelu", "the first step is an operation, neither optional nor read"),
        ("add.other -> gelu", "the first step is an operation"),
        (3, r"Pattern\(3\): a text, such as"),
    ],
)
def test_what_is_no_pattern(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Pattern(text)
