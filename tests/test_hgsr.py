"""The criteria as functions of weights, against numbers by hand, the reference in float64, and the limits at zero."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from netsurgery.kernels import CRITERIA, hgsr, hgsr_cpu, hgsr_flat
from netsurgery.kernels.criteria import Name, WeightView, reading
from netsurgery.kernels.hgsr_reference import reference
from netsurgery.kernels.layout import Layout
from netsurgery.kernels.sparsity import add_gradient, values

# METHODS: the criteria on [[1, 4], [9, 16]] (rows: outputs), feature-wise and neuron-wise
VECTORS = {
    "l1": (30, 30), "group_lasso": (25.548, 22.480), "hierarchical_sqrt_group_lasso": (7.634, 7.236),
    "hierarchical_sq_group_lasso": (500, 650), "exclusive_sparsity": (500, 650),
    "hierarchical_sqrt_exclusive": (25.548, 22.480), "hierarchical_sq_exclusive": (80708, 113858),
    "group_l12": (7.634, 7.236), "hierarchical_sqrt_group_l12": (4.449, 4.378),
    "hierarchical_sq_group_l12": (52, 58),
}  # fmt: skip
LAYERS: list[tuple[tuple[int, ...], int, bool]] = [  # shape, groups, transposed
    ((8, 6, 3, 3), 2, False), ((16, 8, 1, 1), 1, False), ((63, 65), 1, False), ((1025, 3), 1, False),
    ((12, 1, 7, 7), 12, False), ((6, 4, 3, 3), 2, True), ((8, 4, 2, 2, 3), 1, False), ((5, 7, 3), 1, False),
    ((1, 1), 1, False), ((4, 3, 0), 1, False), ((2, 3, 20, 20), 1, False),
]  # fmt: skip
SHAPES, GROUPS, TRANSPOSED = map(list, zip(*LAYERS, strict=True))
DTYPES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def strided(weight: Tensor, how: str) -> Tensor:
    """The same numbers in another arrangement."""
    if how == "channels_last" and weight.dim() in (4, 5):
        return weight.to(memory_format=torch.channels_last if weight.dim() == 4 else torch.channels_last_3d)
    if how == "transposed":
        return weight.transpose(0, 1).contiguous().transpose(0, 1)
    if how == "turned kernels":  # no view has their elements in one axis
        return weight.transpose(-1, -2).contiguous().transpose(-1, -2)
    if how == "sliced":
        return torch.stack([weight, weight + 1], -1).flatten(-2)[..., ::2]
    return weight


def some_weights(dtype: torch.dtype, how: str = "contiguous", *, seed: int = 0) -> list[Tensor]:
    """Weights with zero kernels, zero rows, zero columns and single zeros."""
    torch.manual_seed(seed)
    weights = []
    for shape in SHAPES:
        weight = (torch.randn(shape, dtype=torch.float64) / 50).to(dtype)
        weight[: len(weight) // 4] = 0
        weight[:, :: max(2, weight.shape[1] // 2)] = 0
        weight.flatten()[::7] = 0
        weights.append(strided(weight, how).requires_grad_())
    return weights


def expected(weights: Sequence[Tensor], criterion: Name, readings: Sequence[WeightView], *more: object) -> list[Tensor]:
    """Value and gradients of the reference in float64."""
    exact = [weight.detach().double().requires_grad_() for weight in weights]
    value = reference(exact, criterion, readings, *more)  # type: ignore[arg-type]
    return [value.detach(), *torch.autograd.grad(value, exact)]


def compare(found: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert bool(torch.isfinite(one).all())
        scale = float(other.abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * scale)
        assert bool((one[other == 0] == 0).all())


@pytest.mark.parametrize(("criterion", "wanted"), VECTORS.items())
def test_vectors(criterion: Name, wanted: tuple[float, float]) -> None:
    weight = torch.tensor([[1.0, 4.0], [9.0, 16.0]])
    for grouping, value in zip(("feature", "neuron"), wanted, strict=True):
        assert hgsr([weight], criterion, grouping).item() == pytest.approx(value, rel=2e-4)  # type: ignore[arg-type]
        assert hgsr([weight[..., None, None]], criterion, grouping).item() == pytest.approx(value, rel=2e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["contiguous", "channels_last", "transposed", "turned kernels", "sliced"])
@pytest.mark.parametrize("grouping", ["feature", "neuron"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_against_the_reference(criterion: Name, grouping: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hgsr_cpu, "PIECE", 500)  # every weight that is not small in several pieces
    readings = [reading(shape, grouping, n, turned) for shape, n, turned in LAYERS]
    for (dtype, tolerance), room in product(DTYPES.items(), (0, 4000, 1 << 19)):  # none, some, or all are small
        monkeypatch.setattr(hgsr_flat, "ROOM", room)
        weights = some_weights(dtype, how)
        value = hgsr(weights, criterion, grouping, groups=GROUPS, transposed=TRANSPOSED)  # type: ignore[arg-type]
        grads = torch.autograd.grad(value, weights)
        # sums of up to 10,000 terms in float32: half an ulp at each of about log2 n levels, and the last rounding
        wanted = expected(weights, criterion, readings)
        compare([value], wanted[:1], min(tolerance, 2e-6))
        compare(grads, wanted[1:], tolerance)
        assert all(
            grad.stride() == torch.empty_like(weight).stride() for grad, weight in zip(grads, weights, strict=True)
        )


@pytest.mark.parametrize("criterion", CRITERIA)
def test_any_grouping(criterion: Name) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(5, 4, 3, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)]
    index = [torch.tensor([0, 1, -1, 2]), torch.tensor([2, 2, 0, -1, 3, 1])]
    weights = [weight.requires_grad_() for weight in weights]
    value = hgsr(weights, criterion, index)
    rule = CRITERIA[criterion]
    total = 0.0
    for group in range(4):  # by loops
        terms = [
            weight[o, i].flatten().norm(rule.norm).item() ** rule.inner
            for weight, one in zip(weights, index, strict=True)
            for i in torch.where(one == group)[0]
            for o in range(weight.shape[0])
        ]
        total += sum(terms) ** rule.outer
    assert value.item() == pytest.approx(total, rel=1e-12)
    wanted = expected(weights, criterion, [reading(w.shape, "feature") for w in weights], torch.cat(index), 4)
    compare(torch.autograd.grad(value, weights), wanted[1:], 1e-12)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_gradient_by_differences(criterion: Name) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda *w: hgsr(w, criterion), weights, check_undefined_grad=False)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_zero_weights_have_gradient_zero(criterion: Name) -> None:
    weights = [torch.zeros(4, 3, 3, 3, requires_grad=True), torch.zeros(2, 3, requires_grad=True)]
    value = hgsr(weights, criterion)
    assert value.item() == 0
    assert all(bool((grad == 0).all()) for grad in torch.autograd.grad(value, weights))


def test_tiny_and_large_weights_stay_finite() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for size in (torch.finfo(dtype).tiny, torch.finfo(dtype).smallest_normal / 2, 100.0):
            for criterion in CRITERIA:
                weight = torch.full((2, 3, 2), size, dtype=dtype, requires_grad=True)
                value = hgsr([weight], criterion)
                (grad,) = torch.autograd.grad(value, weight)
                assert bool(torch.isfinite(value)) and not bool(grad.isnan().any())


def test_empty_list_and_weights_without_elements() -> None:
    assert hgsr([]).item() == 0
    weight = torch.zeros(0, 3, 2, requires_grad=True)
    hgsr([weight]).backward()
    assert weight.grad is not None and weight.grad.shape == (0, 3, 2)


def test_absolute_values_beside_the_criterion() -> None:
    weights = some_weights(torch.float64)[:3]
    for criterion in CRITERIA:
        how = tuple(reading(w.shape, "feature") for w in weights)
        layout = Layout(how, (True, False, True))
        found = values(weights, layout, criterion)
        want = weights[0].abs().sum() + weights[2].abs().sum()
        torch.testing.assert_close(found[1], want)
        mixed = torch.tensor([0.25, 0.75], dtype=torch.float64)
        torch.testing.assert_close(
            torch.autograd.grad((found * mixed).sum(), weights),
            torch.autograd.grad(0.25 * reference(weights, criterion, how) + 0.75 * want, weights),
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_adding_in_place_equals_autograd(dtype: torch.dtype) -> None:
    weights = some_weights(dtype)
    how = tuple(reading(shape, "feature", n, turned) for shape, n, turned in LAYERS)
    layout = Layout(how, (True,) * len(how))
    factors = torch.tensor([0.5, 2.0], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    wanted = torch.autograd.grad((values(weights, layout, "group_lasso") * factors).sum(), weights)
    outs: list[Tensor | None] = [torch.ones_like(weight) for weight in weights]
    outs[1] = None
    found = add_gradient(weights, layout, "group_lasso", factors, outs)
    torch.testing.assert_close(found, values(weights, layout, "group_lasso").detach())
    for out, grad in zip(outs, wanted, strict=True):
        if out is not None:
            torch.testing.assert_close(out, 1 + grad, rtol=2 * DTYPES[dtype], atol=2 * DTYPES[dtype])


def test_two_readings_of_one_weight() -> None:
    weight = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    layout = Layout((WeightView(1, (1,)), WeightView(1, (0,))), (True, False))
    out = torch.zeros_like(weight)
    factors = torch.tensor([1.0, 1.0], dtype=torch.float64)
    add_gradient([weight, weight], layout, "group_lasso", factors, [out, out])
    value = values([weight, weight], layout, "group_lasso").sum()
    torch.testing.assert_close(out, torch.autograd.grad(value, weight)[0])


def test_the_same_twice_is_the_same() -> None:
    weights = some_weights(torch.float32)
    first, second = (
        torch.autograd.grad(hgsr(weights, groups=GROUPS, transposed=TRANSPOSED), weights) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nothing_is_left_unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN here, and none of it is in the result."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        return empty(*args, **kwargs).fill_(float("nan"))  # type: ignore[call-overload]

    weights = some_weights(torch.bfloat16)
    monkeypatch.setattr(torch, "empty", poisoned)
    grads = torch.autograd.grad(hgsr(weights, groups=GROUPS, transposed=TRANSPOSED), weights)
    assert not any(bool(grad.isnan().any()) for grad in grads)


def test_errors() -> None:
    weight = torch.ones(4, 3)
    with pytest.raises(ValueError, match="there is no criterion 'l2': choose one of l1, group_lasso"):
        hgsr([weight], "l2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"hgsr\(grouping='unit'\): 'feature', 'neuron', or a tensor for each weight"):
        hgsr([weight], "l1", "unit")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"weight 0 of shape \(4,\) in 1 groups: expected \(out, in / groups"):
        hgsr([torch.ones(4)])
    with pytest.raises(ValueError, match=r"weight 0 of shape \(4, 3\) in 3 groups"):
        hgsr([weight], groups=3)
    with pytest.raises(ValueError, match="1 weights, but groups for 2 and transposed for 1"):
        hgsr([weight], groups=[1, 1])
    with pytest.raises(
        ValueError, match=r"weight 0 is of torch.int64, torch.strided: expected a dense tensor of float16"
    ):
        hgsr([weight.long()])
    with pytest.raises(ValueError, match=r"have \[3\] input channels, but grouping has shapes \[\(2,\)\]"):
        hgsr([weight], "l1", [torch.zeros(2, dtype=torch.int64)])
    for wrong in (torch.zeros(3), torch.tensor([0, -2, 1])):
        with pytest.raises(
            ValueError, match="something else than the numbers of outer groups, from 0 up, and -1 for none"
        ):
            hgsr([weight], "l1", [wrong])
    with pytest.raises(ValueError, match=r"weights on several devices \(cpu, meta\)"):
        hgsr([weight, weight.to("meta")])


def test_nan_is_not_lost() -> None:
    for criterion in CRITERIA:
        weight = torch.ones(3, 4, 2)
        weight[0, 1, 0] = float("nan")
        weight.requires_grad_()
        value = hgsr([weight], criterion)
        assert bool(value.isnan())
        (grad,) = torch.autograd.grad(value, weight)
        assert criterion == "l1" or bool(grad[0, 1, 0].isnan())  # torch's sign of NaN is 0
        assert bool(reference([weight], criterion, [reading(weight.shape, "feature")]).isnan())


def test_weights_that_need_no_gradient_cost_none() -> None:
    weight, frozen = torch.ones(2, 3, requires_grad=True), torch.ones(500, 500)
    value = hgsr([frozen, weight], "group_lasso")
    with torch.profiler.profile(
        profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True
    ) as profile:
        value.backward()
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert max(sizes, default=0) < frozen.nbytes / 10
    assert weight.grad is not None and frozen.grad is None


def test_derivatives_that_there_are_none_of_are_refused() -> None:
    weight = torch.ones(2, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(hgsr([weight], "group_lasso"), weight, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore")  # torch's own, as it loads what this takes
        dual = forward_ad.make_dual(weight.detach(), torch.ones(2, 3))
        with pytest.raises(ValueError, match="no forward-mode derivative: use backward"):
            hgsr([dual])


def test_gradients_that_cannot_be_added_to() -> None:
    weight = torch.ones(2, 3)
    layout = Layout((reading(weight.shape, "feature"),), (True,))
    for out in (torch.zeros(1, 1).expand(2, 3), torch.zeros(2, 3).to_sparse()):
        with pytest.raises(ValueError, match="gradient 0 is sparse, or expanded: make it dense"):
            add_gradient([weight], layout, "l1", torch.ones(2), [out])


@pytest.mark.parametrize("grouping", ["feature", "neuron"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_groups_are_layers_of_their_own_and_transposed_weights_are_turned(criterion: Name, grouping: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 4, 3, dtype=torch.float64)
    parts = hgsr(list(weight.chunk(2)), criterion, grouping)  # type: ignore[arg-type]
    torch.testing.assert_close(hgsr([weight], criterion, grouping, groups=2), parts)  # type: ignore[arg-type]
    turned = hgsr([weight.transpose(0, 1)], criterion, grouping)  # type: ignore[arg-type]
    torch.testing.assert_close(hgsr([weight], criterion, grouping, transposed=True), turned)  # type: ignore[arg-type]
    turned = hgsr([part.transpose(0, 1) for part in weight.chunk(2)], criterion, grouping)  # type: ignore[arg-type]
    torch.testing.assert_close(
        hgsr([weight], criterion, grouping, groups=[2], transposed=[True]),
        turned,  # type: ignore[arg-type]
    )
