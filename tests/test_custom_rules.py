"""Rules that a user teaches: operations, whole modules, and what is wrong with a rule."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import netsurgery
from netsurgery.analysis.rules import CUSTOM_RULES
from netsurgery.capture.custom_modules import operation_of
from netsurgery.errors import InputError, TraceError
from netsurgery.notation import Op
from netsurgery.passes import PruneChannels, RandomScore
from oracles import check

X = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@torch.library.custom_op("netsurgery_tests::scale", mutates_args=())
def scale(x: Tensor, by: Tensor | None, times: int = 1) -> Tensor:
    """A C++ or Triton kernel as far as tracing can see."""
    return x.clone() if by is None else x * by * times


@scale.register_fake
def _(x: Tensor, by: Tensor | None, times: int = 1) -> Tensor:
    return torch.empty_like(x)


class Scales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.z, self.by = nn.Linear(4, 8), nn.Linear(8, 3), nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.z(scale(self.a(x), self.by, 3))


class Heads(nn.Module):
    """Looks at values and hard-codes sizes: nothing that could be traced."""

    def __init__(self, heads: int = 4, width: int = 2):
        super().__init__()
        self.heads, self.drop = heads, nn.Dropout()
        self.proj = nn.Linear(8, heads * width)
        self.gain = nn.Buffer(torch.rand(heads))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if x.sum().item() > 1e9:
            raise ValueError("too large")
        h = self.drop(self.proj(x)).view(*x.shape[:-1], self.heads, -1) * self.gain[:, None]
        return h.flatten(-2), h.sum(-1)


HEADS: dict[str, Any] = {
    "says": "*b i -> *b (h d), *b h",
    "operands": "x",
    "parameters": {"proj.weight": "(h d) i", "proj.bias": "(h d)", "gain": "h"},
    "sizes": {"h": "heads"},
}


class Uses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.heads, self.z, self.y = nn.Linear(4, 8), Heads(), nn.Linear(8, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, sums = self.heads(self.a(x))
        return self.z(h) + self.y(sums)


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    before = dict(CUSTOM_RULES)
    yield
    assert before == CUSTOM_RULES, "a test left a rule behind"


def free(model: nn.Module, x: Tensor = X) -> list[str]:
    return [group.name for group in netsurgery.trace(model, (x,)).prunable]


def test_an_operation() -> None:
    model = Scales().double().eval()
    why = netsurgery.trace(model, (X,))["a"].locked or ""
    assert "the operation has no rule (add one with netsurgery.rule): netsurgery_tests.scale at tests/" in why
    for target in ("netsurgery_tests::scale", scale, torch.ops.netsurgery_tests.scale.default):
        with netsurgery.rule(target, "*s c, c -> *s c") as handle:
            assert free(model) == ["a"]
            check(model, (X,), 1e-9)
            assert "netsurgery_tests" in repr(handle) and repr(handle).endswith(": *s c, c -> *s c>")
    assert free(model) == []


def test_operands_by_name_and_what_is_not_named() -> None:
    with netsurgery.rule(scale, "*s -> *s", operands="x"):
        reasons = [group.locked or "" for group in netsurgery.trace(Scales().double(), (X,)).groups]
        assert free(Scales().double()) == ["a"]  # which is wrong, as verify would show: by is added to nothing
        assert any("the rule does not name this tensor: netsurgery_tests.scale" in reason for reason in reasons)
    with netsurgery.rule(scale, "c, *s c -> *s c", operands="by x"):
        check(Scales().double().eval(), (X,), 1e-9)


def test_brackets_lock_one_dimension() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).double()
    with netsurgery.rule(torch.ops.aten.addmm, "n, m k, k [n] -> m n"):
        assert "identified by position: aten.addmm in 0" in (netsurgery.trace(model, X[0])["0"].locked or "")


def test_functions_and_locks() -> None:
    def says(op: Op) -> list[Any]:
        return [op.dims(op["x"])]

    model = Scales().double().eval()
    with netsurgery.rule(scale, says):
        assert free(model) == ["by", "a"]  # the function says nothing of by
        with netsurgery.rule(scale, None):
            assert "netsurgery.rule locks the operation: netsurgery_tests.scale" in (
                netsurgery.trace(model, (X,))["a"].locked or ""
            )
        assert free(model) == ["by", "a"]  # the rule before holds again
    with (
        netsurgery.rule(scale, lambda op: [op.dims(op["by"])]),
        pytest.raises(InputError, match=r"gives dimensions of sizes \[\(8,\)\] to results of \[torch.Size\(\[2, 5, 8"),
    ):
        netsurgery.trace(model, (X,))


def test_a_built_in_rule_is_overruled() -> None:
    class Backwards(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flip(-1).flip(-1)

    model = nn.Sequential(nn.Linear(4, 8), Backwards(), nn.Linear(8, 3)).double()
    assert free(model) == []
    handle = netsurgery.rule("aten::flip", "*s -> *s")
    assert free(model) == ["0"]
    handle.remove()
    handle.remove()
    assert free(model) == []


def test_a_module() -> None:
    torch.manual_seed(0)
    model = Uses().double().eval()
    for size in ("gain", "proj.weight"):
        assert size in dict(model.heads.named_parameters()) | dict(model.heads.named_buffers())
    with netsurgery.rule(Heads, **HEADS):
        network = netsurgery.trace(model, (X,))
        assert {group.name: group.size for group in network.prunable} == {"a": 8, "heads.proj": 4, "heads.proj:2": 2}
        for seed in range(3):
            small, edit = check(model, (X,), 1e-9, seed)
            assert small.heads.heads == edit.counts.get("heads.proj", 4)
        assert [node.target.__name__ for node in network.ir.nodes if "Heads" in str(node.target)] == ["Heads"]


def test_a_module_in_code_that_looks_at_values() -> None:
    class Looks(Uses):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            return out * 2 if out.sum().item() > 0 else out

    model = Looks().double().eval()
    with netsurgery.rule(Heads, **HEADS):
        for seed in range(2):
            check(model, (X,), 1e-9, seed)


def test_tensors_of_a_module_that_are_not_named_are_locked() -> None:
    partly = {**HEADS, "parameters": {"proj.weight": "(h d) i", "proj.bias": "(h d)"}}
    with netsurgery.rule(Heads, **partly):
        network = netsurgery.trace(Uses().double(), (X,))
        (group,) = (g for g in network.groups for m in g.members if m.parameter == "heads.gain")
        assert (group.locked or "").startswith(
            "the rule does not name this tensor: Heads in heads at tests/test_custom_rules.py"
        )


@pytest.mark.parametrize(
    ("target", "says", "options", "message"),
    [
        ("netsurgery_tests::none", "a -> a", {}, "no such operation is registered; import the library"),
        ("nonsense", "a -> a", {}, "no such operation is registered"),
        (nn.Linear(2, 2), "a -> a", {}, "expected an operation such as 'mylib::scale', or a class of modules"),
        (scale, "a, b", {}, "expected one '->'"),
        (scale, "(a b, b -> a", {}, r"'\(' in '\(a b' is out of place"),
        (scale, "a 3, b -> a", {}, "'3' in 'a 3' is out of place"),
        (scale, "(a), b -> a", {}, "needs two names or more"),
        (scale, "a *a, b -> a", {}, "'a' stands for one dimension and for any number of them"),
        (scale, "a -> a", {}, r"has 1 operands for 2 tensors \(x, by\): name those that are meant, as in operands='x'"),
        (scale, "a, a -> a", {"operands": "x y"}, "has no argument 'y', only x, by, times"),
        (scale, "a, a -> a", {"sizes": {"c": "times"}}, "sizes has the name 'c', which"),
        (scale, "a, a -> a", {"sizes": {"a": "often"}}, "has no argument 'often', only x, by, times"),
        (Heads, "*b i -> *b o, *b", {"operands": "x"}, "the size of 'o' is not known"),
        (Heads, None, {}, "a module needs a notation"),
        (nn.Sequential, "a -> a", {"parameters": {"w": "("}}, r"'\(' is out of place|out of place"),
    ],
)  # fmt: skip
def test_mistakes_in_rules(target: Any, says: Any, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        netsurgery.rule(target, says, **options)


def test_rules_that_do_not_fit() -> None:
    with (
        netsurgery.rule(scale, "b c, c -> b c"),
        pytest.raises(
            InputError, match=r"'b c, c -> b c' does not fit netsurgery_tests.scale at .*\(x 2x5x8, by 8\): 3"
        ),
    ):
        netsurgery.trace(Scales().double(), (X,))
    with (
        netsurgery.rule(scale, "b n c, n -> b n c"),
        pytest.raises(InputError, match="'n' is 5 in one place and 8 in another"),
    ):
        netsurgery.trace(Scales().double(), (X,))
    with (
        netsurgery.rule(Heads, **{**HEADS, "parameters": {"weight": "(h d)"}}),
        pytest.raises(InputError, match=r"Heads has no tensor 'self.weight' as its rule says, only self.proj.weight, "),
    ):
        netsurgery.trace(Uses().double(), (X,))
    with (
        netsurgery.rule(Heads, **{**HEADS, "says": "b i -> b (h d), b h"}),
        pytest.raises(TraceError, match=r"does not fit x 2x5x8, .*: 3 dimensions do not fit 'b i'"),
    ):
        netsurgery.trace(Uses().double(), (X,))


def test_modules_whose_inputs_have_no_names() -> None:
    class Any_(nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return inputs[0]

    with pytest.raises(InputError, match=r"no rule for .*Any_: Any_.forward takes \*args or \*\*kwargs"):
        netsurgery.rule(Any_, "a -> a")


def test_a_rule_does_not_keep_a_model_alive() -> None:
    model = Uses().double()
    with netsurgery.rule(Heads, **HEADS):
        network = netsurgery.trace(model, (X,))
        edit = netsurgery.Edit(network, {"a": (0, 3)})
        small, gone = netsurgery.rewrite(model, edit), weakref.ref(model.heads)
        other, operation = copy.deepcopy(model), operation_of(model.heads)
        del network, edit, model
        gc.collect()
        assert gone() is None
        with pytest.raises(InputError, match="the model that was traced is gone, and with it the code of Heads"):
            _ = operation.module
        edit = netsurgery.plan(other, [RandomScore(), PruneChannels(0.5)], X)
        assert isinstance(small, Uses) and edit.counts["heads.proj"] == 2
