"""The penalty in training loops: mixed precision, accumulation, torch.compile, copies; and in several processes."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrizations

import netsurgery
from netsurgery.errors import InputError
from netsurgery.kernels import hgsr
from netsurgery.kernels.hgsr_reference import reference
from netsurgery.passes import HGSR, PruneChannels, RandomScore

GROUPINGS = ("feature", "neuron", "coupled")
HERE = Path(__file__).resolve().parent
Values = dict[str, Tensor | None]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.shortcut = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 6, 1)
        self.depthwise, self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 6, 3, padding=1, groups=2)
        self.hidden, self.last = nn.Linear(6 * 16, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.depthwise(F.relu(self.first(x))))
        y = F.relu(self.grouped(y) + self.shortcut(x))
        return self.last(F.relu(self.hidden(F.avg_pool2d(y, 2).flatten(1))))


def net(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.first.weight[2] = 0  # kernels, and outer groups of either kind, that are zero
        model.grouped.weight[:, 1] = 0
        model.hidden.weight[3] = 0
    return model.to(dtype)


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(4, 3, 8, 8).to(dtype), torch.randn(4, 5).to(dtype)


def penalty_of(model: nn.Module, grouping: str = "coupled", **options: Any) -> HGSR:
    x, _ = batch(next(model.parameters()).dtype)
    return HGSR(model, x, grouping=grouping, **{"strength": 0.1, **options})  # type: ignore[arg-type]


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().mean()


def gradients(model: nn.Module) -> Values:
    """They are taken out: the model has none afterwards."""
    found = {name: one.grad for name, one in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def parameters(model: nn.Module) -> Values:
    return {name: one.detach().clone() for name, one in model.named_parameters()}


def assert_equal(found: Values, expected: Values, tolerance: float = 1e-12) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
        else:
            bound = tolerance * max(1.0, float(value.abs().max()))
            torch.testing.assert_close(found[name], value, rtol=0, atol=bound, msg=lambda text, name=name: name + text)


def by_reference(penalty: HGSR, model: nn.Module, strength: float = 0.1, ratio: float = 0.5) -> Tensor:
    """The penalty, from the meaning of the criterion and the parameters as they are."""
    names, layout = dict(model.named_parameters(remove_duplicate=False)), penalty._groups.layout
    weights = [names[layer.name] for layer in penalty._groups.layers]
    value = reference(weights, penalty.criterion, layout.readings, layout.index, layout.groups)
    plain = sum(names[name].abs().sum().to(value.dtype) for name in penalty.layers)
    return strength * ((1 - ratio) * value + ratio * plain)


def expected_gradients(penalty: HGSR, model: nn.Module, *with_loss: Tensor) -> tuple[float, Values]:
    """Of the penalty, and of the loss if a batch is given."""
    value = by_reference(penalty, model)
    (value + loss_of(model, *with_loss) if with_loss else value).backward()
    return value.item(), gradients(model)


# One step, several ways ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.0, 0.5])
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_training_with_the_penalty_in_the_loss_and_with_its_gradient_added(grouping: str, ratio: float) -> None:
    x, y = batch()
    ways: dict[str, tuple[list[float], Values]] = {}
    for how in ("reference", "loss", "add"):
        model, values = net(), []
        penalty = penalty_of(model, grouping, l1_ratio=ratio, strength=lambda step: 0.1 * (step + 1))
        optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
        for i in range(3):
            optimizer.zero_grad()
            loss = loss_of(model, x, y)
            if how == "add":
                loss.backward()
                value = penalty.add_gradient()
            else:
                value = penalty() if how == "loss" else by_reference(penalty, model, 0.1 * (i + 1), ratio)
                (loss + value).backward()
            values.append(value.item())
            optimizer.step()
            penalty.step()
        ways[how] = values, parameters(model)
    for how in ("loss", "add"):
        assert ways[how][0] == pytest.approx(ways["reference"][0], rel=1e-12)
        assert_equal(ways[how][1], ways["reference"][1])
    assert any(not torch.allclose(a, b) for a, b in zip(ways["add"][1].values(), net().parameters(), strict=True))


def test_gradients_start_from_none_from_zero_or_from_what_is_there() -> None:
    model = net()
    penalty = penalty_of(model)
    value, expected = expected_gradients(penalty, model)
    for set_to_none in (True, False):
        model.zero_grad(set_to_none=set_to_none)
        assert penalty.add_gradient().item() == pytest.approx(value, rel=1e-12)
        taking_part = {name: model.get_parameter(name).grad for name in penalty.layers}
        assert_equal(taking_part, {name: expected[name] for name in penalty.layers})
    assert model.last.bias.grad is None
    penalty.add_gradient()
    twice = {name: None if one is None else 2 * one for name, one in expected.items()}
    assert_equal(gradients(model), twice)
    (penalty() + penalty()).backward()
    assert_equal(gradients(model), twice)


@pytest.mark.parametrize("how", ["loss", "add"])
def test_a_frozen_weight_counts_but_gets_no_gradient(how: str) -> None:
    model = net()
    penalty = penalty_of(model)
    value, expected = expected_gradients(penalty, model)
    model.grouped.weight.requires_grad_(False)
    found = penalty() if how == "loss" else penalty.add_gradient()
    if how == "loss":
        found.backward()
    assert found.item() == pytest.approx(value, rel=1e-12)
    assert_equal(gradients(model), {**expected, "grouped.weight": None})
    model.requires_grad_(False)
    assert not penalty().requires_grad and penalty.add_gradient().item() == pytest.approx(value, rel=1e-12)
    assert all(one.grad is None for one in model.parameters())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(torch.tanh(self.inner(x)))))


@pytest.mark.parametrize("grouping", ["feature", "neuron"])
def test_a_tied_weight_counts_once(grouping: str) -> None:
    torch.manual_seed(0)
    model = Tied().double()
    penalty = HGSR(
        model, torch.zeros(1, 6, dtype=torch.float64), grouping=grouping, strength=1.0, criterion="group_lasso",
        roles=("linear", "classifier"), l1_ratio=1.0,
    )  # fmt: skip
    value = penalty()
    expected = sum(one.weight.abs().sum().item() for one in (model.inner, model.a))
    assert value.item() == pytest.approx(expected, rel=1e-12)
    value.backward()
    found = gradients(model)
    assert_equal(found, {**found, "a.weight": model.a.weight.detach().sign()})
    penalty.add_gradient()
    assert_equal(gradients(model), found)


def test_gradient_accumulation() -> None:
    x, y = batch()
    model = net()
    penalty = penalty_of(model)
    _, expected = expected_gradients(penalty, model, x, y)
    for part, goal in zip(x.chunk(4), y.chunk(4), strict=True):
        ((loss_of(model, part, goal) + penalty()) / 4).backward()
    assert_equal(gradients(model), expected)
    for part, goal in zip(x.chunk(4), y.chunk(4), strict=True):
        (loss_of(model, part, goal) / 4).backward()
    penalty.add_gradient()
    assert_equal(gradients(model), expected)


def test_a_second_derivative_is_an_error() -> None:
    model = net()
    (first, *_) = torch.autograd.grad(penalty_of(model)(), [model.hidden.weight], create_graph=True)
    with pytest.raises(RuntimeError, match="netsurgery"):
        first.square().sum().backward()


# Mixed precision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["hierarchical_sq_group_l12", "group_lasso", "hierarchical_sqrt_exclusive"])
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_autocast_changes_nothing(grouping: str, criterion: str) -> None:
    model = net(torch.float32)
    penalty = penalty_of(model, grouping, criterion=criterion)
    value, expected = expected_gradients(penalty, model)
    with torch.autocast("cpu", torch.bfloat16):
        inside = penalty()
        inside.backward()
    assert inside.dtype == torch.float32 and inside.item() == pytest.approx(value, rel=1e-6)
    assert_equal(gradients(model), expected, 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert penalty.add_gradient().item() == pytest.approx(value, rel=1e-6)
    assert_equal(gradients(model), expected, 1e-6)


def test_autocast_of_a_whole_step() -> None:
    x, y = batch(torch.float32)
    model = net(torch.float32)
    penalty = penalty_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model, x, y).backward()
    alone = gradients(model)
    _, of_penalty = expected_gradients(penalty, model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, x, y) + penalty()
    loss.backward()
    both = {name: a if of_penalty[name] is None else a + of_penalty[name] for name, a in alone.items()}  # type: ignore[operator]
    assert_equal(gradients(model), both, 1e-6)


@pytest.mark.parametrize("how", ["in the scaled loss", "after unscale_", "before unscale_"])
def test_grad_scaler(how: str) -> None:
    x, y = batch(torch.float32)
    model, plain = net(torch.float32), net(torch.float32)
    penalty = penalty_of(model, strength=0.01)
    (loss_of(plain, x, y) + by_reference(penalty, plain, 0.01)).backward()
    torch.optim.SGD(plain.parameters(), 0.1).step()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loss = loss_of(model, x, y)
    scaler.scale(loss + penalty() if how == "in the scaled loss" else loss).backward()
    if how == "before unscale_":
        penalty.add_gradient(scale=scaler.get_scale())
    scaler.unscale_(optimizer)
    if how == "after unscale_":
        penalty.add_gradient()
    scaler.step(optimizer)
    scaler.update()
    assert_equal(parameters(model), parameters(plain), 1e-6)
    assert not torch.allclose(model.hidden.weight, net(torch.float32).hidden.weight, atol=1e-4)


# torch.compile --------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("grouping", "dynamic"),
    [("feature", False), ("coupled", False), pytest.param("neuron", True, marks=pytest.mark.slow)],
)
def test_compiled_step(grouping: str, dynamic: bool, backend: str) -> None:
    x, y = batch()
    model, twin = net(), net()
    schedule = lambda step: 0.1 * (step + 1)  # noqa: E731
    penalty, eager = penalty_of(model, grouping, strength=schedule), penalty_of(twin, grouping, strength=schedule)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(lambda: loss_of(model, x, y) + penalty(), fullgraph=True, dynamic=dynamic, backend=counter)
    optimizers = [torch.optim.SGD(one.parameters(), 1e-3) for one in (model, twin)]
    found = []
    for _ in range(3):
        loss, expected = compiled(), loss_of(twin, x, y) + eager()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
        found.append(loss.item())
        for one in (loss, expected):
            one.backward()
        for optimizer in optimizers:
            optimizer.step()
        assert_equal(gradients(model), gradients(twin))
        for one in (penalty, eager):
            one.step()
    assert found[2] > 2 * found[0], "the strength did not grow"
    assert counter.frame_count == 1, "compiled more than once"


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_in_float32_from_the_first_call() -> None:
    x, y = batch(torch.float32)
    model = net(torch.float32)
    penalty = penalty_of(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda: loss_of(model, x, y) + penalty(), fullgraph=True, backend=counter)
    for strength in (0.1, 0.2):
        penalty.strength = strength
        penalty.step()
        expected = loss_of(model, x, y) + by_reference(penalty, model, strength)
        assert compiled().item() == pytest.approx(expected.item(), rel=1e-6)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_bare_function_compiles(dynamic: bool) -> None:
    weights = [one.weight for one in (net().first, net().hidden)]
    compiled = torch.compile(hgsr, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    value = compiled(weights, criterion="group_lasso", grouping="neuron")
    assert value.item() == pytest.approx(hgsr(weights, "group_lasso", "neuron").item(), rel=1e-12)
    value.backward()
    found = [one.grad.clone() for one in weights]
    for one in weights:
        one.grad = None
    hgsr(weights, "group_lasso", "neuron").backward()
    for grad, one in zip(found, weights, strict=True):
        torch.testing.assert_close(grad, one.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("wrapped", ["compiled", "compiled in place", "compiled in parts", "data parallel"])
def test_built_from_a_wrapped_model(wrapped: str) -> None:
    model = net()
    outer: nn.Module = model
    if wrapped == "compiled":
        outer = torch.compile(model, backend="eager")  # type: ignore[assignment]
    elif wrapped == "compiled in place":
        model.compile(backend="eager")
    elif wrapped == "compiled in parts":
        model.first.compile(backend="eager")
    else:
        outer = nn.DataParallel(model)
    penalty = penalty_of(outer)
    assert penalty.layers == penalty_of(net()).layers
    x, y = batch()
    _, expected = expected_gradients(penalty, model, x, y)
    (loss_of(outer, x, y) + penalty()).backward()
    assert_equal(gradients(model), expected)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_copy_of_what_is_compiled_in_place_runs_its_own_layers() -> None:
    model, (x, _) = net(), batch()
    model.compile(backend="eager")
    model.first.compile(backend="eager")
    edit = netsurgery.plan(model, [RandomScore(), PruneChannels(0.5)], (x,))
    small = netsurgery.rewrite(model, edit)
    netsurgery.verify(model, small, edit, (x,))
    assert not torch.allclose(small(x), model(x))


# A model that changes after the penalty was built --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("start", [torch.float32, torch.float64])
def test_changed_precision(start: torch.dtype, dtype: torch.dtype) -> None:
    model = net(start)
    penalty = penalty_of(model)
    penalty()
    model.to(dtype)
    exact = copy.deepcopy(model).double()
    expected = by_reference(penalty, exact)
    expected.backward()
    value = penalty.add_gradient()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12 if dtype == torch.float64 else 1e-5)
    eps = max(torch.finfo(dtype).eps, 1e-15)
    for name in penalty.layers:
        torch.testing.assert_close(
            model.get_parameter(name).grad.double(), exact.get_parameter(name).grad, rtol=16 * eps, atol=16 * eps
        )


def test_loaded_and_replaced_parameters() -> None:
    model, other = net(), net()
    penalty = penalty_of(model)
    before = penalty().item()
    with torch.no_grad():
        for one in other.parameters():
            one.mul_(2)
    for assign in (False, True):
        model.load_state_dict(net().state_dict())
        assert penalty().item() == pytest.approx(before, rel=1e-12)
        model.load_state_dict(other.state_dict(), assign=assign)
        value, expected = expected_gradients(penalty, model)
        assert value > 1.5 * before
        assert penalty.add_gradient().item() == pytest.approx(value, rel=1e-12)
        assert_equal(gradients(model), expected)
    model.hidden.weight = nn.Parameter(torch.ones_like(model.hidden.weight))
    assert penalty().item() == pytest.approx(by_reference(penalty, model).item(), rel=1e-12)


def test_copies_follow_their_own_model() -> None:
    model = net()
    penalty = penalty_of(model, strength=lambda step: 0.1 * (step + 1))
    twin, its = copy.deepcopy((model, penalty))
    with torch.no_grad():
        twin.hidden.weight.zero_()
    assert its().item() == pytest.approx(by_reference(its, twin).item(), rel=1e-12)
    assert penalty().item() == pytest.approx(by_reference(penalty, model).item(), rel=1e-12)
    its.step()
    assert (its.steps, penalty.steps) == (1, 0)
    assert penalty().item() == pytest.approx(by_reference(penalty, model).item(), rel=1e-12)
    its.add_gradient()
    assert twin.first.weight.grad is None or model.first.weight.grad is None


def test_a_resumed_schedule() -> None:
    model = net()
    first, second = (penalty_of(model, strength=lambda step: 0.1 * (step + 1)) for _ in range(2))
    first.step()
    second.load_state_dict(first.state_dict())
    assert second().item() == first().item() == pytest.approx(2 * penalty_of(model)().item(), rel=1e-12)


def test_parametrized_after_it_was_built() -> None:
    model = net()
    penalty = penalty_of(model)
    with torch.no_grad():
        model.hidden.weight[3] = 1  # weight_norm has no direction for zeros
    parametrizations.weight_norm(model.hidden)
    with torch.no_grad():
        model.hidden.parametrizations.weight.original1[4] += 1
    plain = net()
    with torch.no_grad():
        plain.hidden.weight.copy_(model.hidden.weight)
    value = penalty()
    assert value.item() == pytest.approx(by_reference(penalty, plain).item(), rel=1e-12)
    value.backward()
    assert model.hidden.parametrizations.weight.original0.grad is not None
    with pytest.raises(InputError, match=r"hidden\.weight is computed from other parameters: add the penalty to the"):
        penalty.add_gradient()


def test_pruned_after_it_was_built() -> None:
    model = net()
    penalty = penalty_of(model)
    small = netsurgery.apply(model, [RandomScore(), PruneChannels(0.5)], batch()[:1])
    penalty()  # of the original, which is as it was
    model.hidden.weight = small.get_submodule("hidden").weight
    with pytest.raises(InputError, match=r"hidden\.weight had shape \(10, 96\) and has .* build the penalty again"):
        penalty()


# Several processes ---------------------------------------------------------------------------------------------------

QUICK = (
    "ddp", "fsdp", "nothing_here", "frozen", "other_placements", "replicated", "meta", "mixed_precision", "errors",
)  # fmt: skip
THOROUGH = (*QUICK, "fsdp_everything", "fsdp_criteria", "fsdp_kept_whole", "compiled")


@cache
def ranks(size: int, checks: tuple[str, ...]) -> str:
    """What is printed by a run of ``ranks.py``, at the first test that asks."""
    run = subprocess.run(
        [sys.executable, str(HERE / "ranks.py"), str(size), *checks],
        capture_output=True, text=True, check=False, cwd=HERE, timeout=500,
        env={**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return run.stdout + run.stderr


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("check", QUICK)
def test_on_two_ranks(check: str) -> None:
    output = ranks(2, QUICK)
    assert f"passed {check}\n" in output, output[-4000:]


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("size", [2, 3, 4])
def test_on_several_ranks(size: int) -> None:
    output = ranks(size, THOROUGH)
    assert all(f"passed {check}\n" in output for check in THOROUGH), output[-4000:]


def test_what_is_compiled_keeps_nothing() -> None:
    """The memory of a compiled run may be overwritten by the next, as CUDA graphs do: none of it may be held."""
    model = net(torch.float32)
    penalty = penalty_of(model)
    model.double()  # so that the factors have to be of another type
    held, layout = penalty._factors, penalty._layout
    compiled = torch.compile(penalty.__call__, backend="aot_eager", fullgraph=True)
    value, _ = expected_gradients(penalty, model)
    for _ in range(2):
        assert compiled().item() == pytest.approx(value, rel=1e-6)  # the strength was rounded for float32
        assert penalty._factors is held and penalty._layout is layout
    assert penalty().item() == pytest.approx(value, rel=1e-12)
    assert penalty._factors.dtype == torch.float64


def test_a_layer_that_is_replaced_is_found() -> None:
    """The way to a parameter is walked anew: another module, another parameter, a weight that is computed."""
    model = net()
    penalty = penalty_of(model, "feature")
    before = penalty().item()
    model.hidden = nn.Linear(6 * 16, 10).double()
    changed = penalty().item()
    assert changed == pytest.approx(by_reference(penalty, model).item(), rel=1e-12) != before
    model.first.weight = nn.Parameter(model.first.weight.detach() * 2)
    assert penalty().item() == pytest.approx(by_reference(penalty, model).item(), rel=1e-12) != changed
    parametrizations.weight_norm(model.hidden)
    with pytest.raises(InputError, match=r"hidden\.weight is computed from other parameters"):
        penalty.add_gradient()
    model.hidden = nn.Linear(5, 10).double()
    with pytest.raises(InputError, match=r"hidden\.weight had shape \(10, 96\) and has \(10, 5\) now"):
        penalty()


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [None, "default", "reduce-overhead"])
def test_on_the_gpu(mode: str | None) -> None:
    model = net(torch.float32)
    penalty = penalty_of(model)
    value, expected = expected_gradients(penalty, model)
    model.cuda()
    step = penalty if mode is None else torch.compile(penalty.__call__, mode=mode)
    for _ in range(3):
        model.zero_grad()
        found = step()
        found.backward()
    assert found.item() == pytest.approx(value, rel=1e-5)
    found_gradients = {name: None if one is None else one.cpu() for name, one in gradients(model).items()}
    assert_equal(found_gradients, expected, 1e-5)
    penalty.add_gradient()
    assert_equal({n: None if one is None else one.cpu() for n, one in gradients(model).items()}, expected, 1e-5)
