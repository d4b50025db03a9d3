"""What the Triton kernels must satisfy, on the GPU, or, with TRITON_INTERPRET=1, in the interpreter on the CPU.

Not collected by itself, since Triton interprets either everything or nothing in a process; ``test_hgsr_triton.py``
runs it in the interpreter, and ``gpu.py`` on a GPU.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from netsurgery.kernels import hgsr_kernels, hgsr_triton
from netsurgery.kernels.criteria import CRITERIA, WeightView, canonical, reading
from netsurgery.kernels.hgsr_reference import column_sums, power, reference
from netsurgery.kernels.placed import Placed

# Triton's interpreter did so itself up to 3.6.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# Tiles so small that small weights have several of each kind, and several chunks.
SMALL = hgsr_triton.Sizes(chunk=16, unit=(2, 8), strided=(2, 8), window=64, wide=8)


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """What torch.empty returns is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="module")
def _quicker() -> Iterator[None]:
    """The interpreter patches the language at every call of a function, on top of itself: once per module is enough."""
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            from triton.runtime import interpreter

            patch_language = functools.cache(lambda module, function: interpreter._patch_lang(function))
            first: dict[str, Any] = {}

            def call(self: Any, *args: Any, **kwargs: Any) -> Any:
                if self.fn.__module__ != hgsr_kernels.__name__:  # the launch does its own
                    patch_language(self.fn.__module__, first.setdefault(self.fn.__module__, self.fn))
                return self.rewrite()(*args, **kwargs)

            patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield


def weights_and_readings(
    dtype: torch.dtype, grouping: str, seed: int = 0
) -> tuple[list[Tensor], list[WeightView], list[bool]]:
    """A small network's weights: with a zero row, zero column, zero kernels, and single zeros."""
    torch.manual_seed(seed)
    layers = [((5, 6, 2, 2), 1, False), ((9, 40), 1, False), ((8, 1, 3), 8, False)]
    weights = [torch.randn(shape) for shape, *_ in layers]
    weights[0][:, 1], weights[0][2], weights[0][3, 3], weights[0][4, 0, 1, 1] = 0, 0, 0, 0
    weights[1][:, 7], weights[1][3], weights[1][0, 0] = 0, 0, 0
    readings = [reading(shape, grouping, groups, transposed) for shape, groups, transposed in layers]
    return [w.to(DEVICE, dtype) for w in weights], readings, [True, False, True]


def columns(weights: list[Tensor], readings: list[WeightView]) -> int:
    views = (canonical(w, how) for w, how in zip(weights, readings, strict=True))
    return sum(view.shape[0] * view.shape[2] for view in views)


def longest(weights: list[Tensor], readings: list[WeightView], index: Tensor | None) -> int:
    """No sum has more roundings: over a window, over rows and columns of a group, over groups."""
    views = [canonical(w, how) for w, how in zip(weights, readings, strict=True)]
    most = 1 if index is None else int(torch.bincount(index[index >= 0], minlength=1).max())
    rows, window = max(view.shape[1] for view in views), max(view.shape[3] for view in views)
    return 4 * (window + 1) + 2 * rows * most + 2 * columns(weights, readings)


def relative(weights: list[Tensor], readings: list[WeightView], index: Tensor | None) -> float:
    """A bound for the relative error of the value, slopes and gradient.

    A sum of n terms of one sign, added in any order, has a relative error of at most (n - 1) u, to first order (Higham,
    Accuracy and Stability of Numerical Algorithms, 2002, section 4.2); a power e multiplies it by e <= 2; and each of
    the at most 8 single operations on the way adds at most 2 units in the last place (roots and quotients on a GPU).
    """
    double = any(w.dtype == torch.float64 for w in weights)
    unit = torch.finfo(torch.float64 if double else torch.float32).eps / 2
    return (longest(weights, readings, index) + 32) * unit


def close(found: Tensor, expected: Tensor, bound: float) -> None:
    """Of relative error under the bound and that of storing in the type found; 0 where 0 is expected."""
    bound = bound + torch.finfo(found.dtype).eps
    least = torch.finfo(found.dtype).smallest_normal * torch.finfo(found.dtype).eps if found.dtype.itemsize == 2 else 0
    excess = (found.double() - expected.double()).abs() - bound * expected.double().abs()
    assert not found.isnan().any()
    assert (excess <= least).all(), f"{excess.max().item():.3g} over the bound {bound:.3g}"


def check(
    weights: list[Tensor], readings: list[WeightView], name: str, in_l1: list[bool] | None = None,
    index: Tensor | None = None, groups: int = 0, outs: list[Tensor] | None = None, thorough: bool = True,
) -> None:  # fmt: skip
    """Value, sums, slopes and gradient agree with the reference in float64."""
    rule, in_l1 = CRITERIA[name], in_l1 or [True] * len(weights)
    groups = groups if index is not None else columns(weights, readings)
    bound = relative(weights, readings, index)
    precise = [w.detach().double().requires_grad_() for w in weights]
    expected = reference(precise, name, readings, index, groups)
    gradients = torch.autograd.grad(expected, precise)
    sums = torch.cat([column_sums(w.detach(), how, rule) for w, how in zip(precise, readings, strict=True)])
    if index is not None:
        sums = sums.new_zeros(groups).index_add(0, index[index >= 0], sums[index >= 0])
    l1 = torch.stack([w.detach().abs().sum() * once for w, once in zip(precise, in_l1, strict=True)]).sum()
    wide = torch.float64 if any(w.dtype == torch.float64 for w in weights) else torch.float32

    readings, in_l1 = tuple(readings), tuple(in_l1)
    arguments = (weights, readings, index, groups, rule, in_l1)
    values, slopes = hgsr_triton.value(*arguments)
    assert values.dtype == slopes.dtype == wide and values.shape == (2,) and slopes.shape == (groups,)
    close(values, torch.stack([expected.detach(), l1]), bound)
    close(slopes, rule.outer * power(sums, rule.outer - 1), bound)
    if thorough:
        again = hgsr_triton.value(*arguments)
        assert torch.equal(again[0], values) and torch.equal(again[1], slopes), "a second call differs"
        found, absolute = hgsr_triton.sums(*arguments)
        close(found, sums, bound)
        close(absolute, l1, bound)

    slopes = torch.cat([slopes.new_full((1,), 1e3), slopes])[1:]  # -1, no group, would find what stands before
    scale = torch.tensor([0.75, 0.5], device=DEVICE)
    expected_gradients = [
        0.75 * g + 0.5 * w.detach().sign() * once for g, w, once in zip(gradients, precise, in_l1, strict=True)
    ]
    outs = outs or [torch.empty_like(w) for w in weights]
    hgsr_triton.gradient(weights, readings, index, slopes, rule, in_l1, scale, outs, False)
    for out, each in zip(outs, expected_gradients, strict=True):
        close(out, each, bound)
    if thorough:
        before = [out.clone() for out in outs]
        hgsr_triton.gradient(weights, readings, index, slopes, rule, in_l1, scale, outs, True)
        for out, old, each in zip(outs, before, expected_gradients, strict=True):
            close(out, old.double() + each, bound)  # of one sign


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grouping", ["feature", "neuron", "index"])
@pytest.mark.parametrize("name", CRITERIA)
def test_agrees_with_the_reference(name: str, grouping: str, dtype: torch.dtype) -> None:
    weights, readings, in_l1 = weights_and_readings(dtype, "neuron" if grouping == "neuron" else "feature")
    index, groups = None, 0
    if grouping == "index":
        groups = 11  # no column is in the last
        index = torch.randint(-1, groups - 1, (columns(weights, readings),)).to(DEVICE)
    check(weights, readings, name, in_l1, index, groups, thorough=dtype == torch.float32)


ODD = [
    ((1, 1), 1, False), ((3, 1025), 1, False), ((63, 2), 1, False), ((1, 1, 1, 1), 1, False), ((2, 2, 7, 7), 1, False),
    ((2, 3, 1, 3, 2), 1, False), ((4, 3, 3), 2, True), ((6, 2, 3), 3, False), ((0, 3, 3, 3), 1, False),
    ((4, 0), 1, False), ((1, 2, 13, 11), 1, False), ((3, 4, 0), 1, False),
]  # fmt: skip


@pytest.mark.parametrize("name", ["hierarchical_sq_group_lasso", "hierarchical_sqrt_group_l12"])
@pytest.mark.parametrize("grouping", ["feature", "neuron"])
def test_odd_shapes(grouping: str, name: str) -> None:
    torch.manual_seed(1)
    weights = [torch.randn(shape, device=DEVICE) for shape, *_ in ODD]
    readings = [reading(shape, grouping, groups, transposed) for shape, groups, transposed in ODD]
    check(weights, readings, name, thorough=grouping == "feature")


@pytest.mark.parametrize("grouping", ["feature", "neuron"])
def test_strides(grouping: str) -> None:
    """Of weights and of gradients, also where no view of four axes exists."""
    torch.manual_seed(2)
    fill = functools.partial(torch.randn, device=DEVICE)
    weights = [
        fill(8, 8, 2, 2).contiguous(memory_format=torch.channels_last), fill(5, 14)[:, ::2], fill(7, 5).t(),
        fill(3, 4, 6, 6)[:, :, ::2, 1:4], fill(1, 6).expand(4, 6), fill(9, 16)[1:],
    ]  # fmt: skip
    readings = [reading(tuple(w.shape), grouping) for w in weights]
    outs = [fill(w.shape) for w in weights]
    outs[2], outs[3] = fill(7, 5).t(), fill(6, 6, 4, 3)[::2, 1:4].permute(3, 2, 0, 1)
    outs[1] = fill(5, 16)[:, 1:8]
    (plan,) = hgsr_triton._plans(weights, readings, [True] * len(weights), outs)
    assert plan.copied == plan.buffered == {3}
    check(weights, readings, "hierarchical_sq_group_l12", outs=outs)
    check(weights, readings, "hierarchical_sq_group_l12", outs=weights_like(weights), thorough=False)


def weights_like(weights: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(w, memory_format=torch.contiguous_format) for w in weights]


@pytest.mark.parametrize("grouping", ["feature", "neuron", "index"])
def test_many_tiles_and_chunks(grouping: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sum over programs takes place: chunks, more than are added at a time; tiles; members of groups."""
    monkeypatch.setattr(hgsr_triton, "SIZES", SMALL)
    torch.manual_seed(3)
    shapes = ((18, 16), (16, 80), (5, 16, 2, 2), (2, 17), (17, 2))
    weights = [torch.randn(shape, device=DEVICE) for shape in shapes]
    readings = [reading(tuple(w.shape), "neuron" if grouping == "neuron" else "feature") for w in weights]
    (plan,) = hgsr_triton._plans(weights, readings, [True] * 5, None)
    table = plan.table.cpu()
    chunks = table[:, hgsr_kernels.FIELDS.index("CHUNKS")]
    assert chunks.max() > hgsr_kernels.FOLD.value and chunks.min() == 1
    assert plan.tiles > SMALL.wide
    assert {(grouping == "neuron", unit) for unit in (False, True)} <= {
        (bool(by_rows), bool(unit)) for by_rows, unit in zip(plan.kinds["BY_ROWS"], plan.kinds["UNIT"], strict=True)
    }
    index, groups = None, 0
    if grouping == "index":
        groups = 20
        index = torch.randint(-1, groups, (columns(weights, readings),)).to(DEVICE)
        index[:90] = 4  # many more than the others have
    check(
        weights,
        readings,
        "hierarchical_sqrt_group_lasso",
        [True, False, True, True, True],
        index,
        groups,
        thorough=grouping == "feature",
    )


@pytest.mark.parametrize("name", CRITERIA)
def test_zeros(name: str) -> None:
    weights, readings, in_l1 = weights_and_readings(torch.float32, "feature")
    weights, rule = [torch.zeros_like(w) for w in weights], CRITERIA[name]
    arguments = (weights, readings, None, columns(weights, readings), rule, in_l1)
    values, slopes = hgsr_triton.value(*arguments)
    assert not values.any() and not slopes.any()
    outs = [torch.empty_like(w) for w in weights]
    # A slope that is not 0, as from columns of other weights.
    hgsr_triton.gradient(
        weights, readings, None, slopes + 1, rule, in_l1, torch.ones(2, device=DEVICE), outs, accumulate=False
    )
    assert not any(out.any() for out in outs)


def test_nothing() -> None:
    rule = CRITERIA["l1"]
    for weights in ([], [torch.empty(3, 0, device=DEVICE)]):
        readings = [reading(tuple(w.shape), "feature") for w in weights]
        index = torch.empty(0, dtype=torch.int64, device=DEVICE)
        for each, groups in ((None, 0), (index, 3)):
            values, slopes = hgsr_triton.value(weights, readings, each, groups, rule, [True] * len(weights))
            assert values.tolist() == [0, 0] and slopes.tolist() == [0] * groups
            scale = torch.ones(2, device=DEVICE)
            hgsr_triton.gradient(weights, readings, each, slopes, rule, [True] * len(weights), scale, weights, False)


@pytest.mark.parametrize("indexed", [False, True])
def test_mixed_dtypes(indexed: bool) -> None:
    weights, readings, in_l1 = weights_and_readings(torch.float32, "feature")
    weights[1], weights[2] = weights[1].double(), weights[2].bfloat16()
    index = torch.arange(columns(weights, readings), device=DEVICE) % 7 if indexed else None
    rule, groups = CRITERIA["hierarchical_sqrt_group_l12"], 7 if indexed else columns(weights, readings)
    values, slopes = hgsr_triton.value(weights, readings, index, groups, rule, in_l1)
    assert values.dtype == slopes.dtype == torch.float64
    same = [w.double() for w in weights]
    expected, expected_slopes = hgsr_triton.value(same, readings, index, groups, rule, in_l1)
    bound = relative([w.float() for w in weights], readings, index)
    close(values, expected, bound)
    close(slopes, expected_slopes, bound)
    outs, exact = [torch.empty_like(w) for w in weights], [torch.empty_like(w) for w in same]
    for read, written in ((weights, outs), (same, exact)):
        hgsr_triton.gradient(read, readings, index, slopes, rule, in_l1, torch.ones(2, device=DEVICE), written, False)
    for out, each in zip(outs, exact, strict=True):
        close(out, each, bound)


def test_a_weight_that_stands_twice() -> None:
    """Under two readings: both gradients are added, L1 counts it once."""
    weight = torch.randn(6, 8, 3, 3, device=DEVICE)
    readings = [reading(tuple(weight.shape), grouping) for grouping in ("feature", "neuron", "feature")]
    weights, in_l1, rule = [weight] * 3, [True, False, False], CRITERIA["hierarchical_sq_group_l12"]
    precise = weight.double().requires_grad_()
    expected = reference([precise] * 3, "hierarchical_sq_group_l12", readings)
    expected.backward()
    values, slopes = hgsr_triton.value(weights, readings, None, columns(weights, readings), rule, in_l1)
    bound = relative(weights, readings, None)
    close(values, torch.stack([expected.detach(), precise.detach().abs().sum()]), bound)
    out, scale = torch.zeros_like(weight), torch.tensor([1.0, 0.5], device=DEVICE)
    plans = hgsr_triton._plans(weights, readings, in_l1, [out] * 3)
    assert [plan.members for plan in plans] == [(0,), (1,), (2,)]
    hgsr_triton.gradient(weights, readings, None, slopes, rule, in_l1, scale, [out] * 3, accumulate=True)
    close(out, precise.grad + 0.5 * weight.double().sign(), 2 * bound)


def test_what_moved_is_found() -> None:
    """Tables are kept between calls; weights elsewhere, and an index changed in place, are seen."""
    weights, readings, _ = weights_and_readings(torch.float32, "feature")
    index = torch.zeros(columns(weights, readings), dtype=torch.int64, device=DEVICE)
    check(weights, readings, "group_l12", index=index, groups=2, thorough=False)
    moved = [w.neg() * 2 for w in weights]
    check(moved, readings, "group_l12", index=index, groups=2, thorough=False)
    index[::2] = 1
    check(moved, readings, "group_l12", index=index, groups=2, thorough=False)


def test_tensors_that_moved_are_found_in_a_steady_loop() -> None:
    """The same lists of readings, call after call, while weights and gradients are replaced, one by one."""
    placed = Placed(())
    weights, found, given = weights_and_readings(torch.float32, "feature")
    readings, in_l1 = tuple(found), tuple(given)
    rule, groups = CRITERIA["hierarchical_sq_group_l12"], columns(weights, found)
    scale = torch.tensor([1.0, 0.5], device=DEVICE)
    outs = [torch.zeros_like(w) for w in weights]
    for i in (None, 0, 1, 2, 0):
        if i is not None:
            weights[i] = weights[i] * 3
            outs[i] = torch.zeros_like(weights[i])
        for repeated in range(2):
            before = [out.clone() for out in outs]
            placed = placed if placed.still(weights) else Placed(weights)
            assert bool(placed.kept) == bool(repeated), "what was kept is not used"
            values, slopes = hgsr_triton.value(placed, readings, None, groups, rule, in_l1)
            hgsr_triton.gradient(placed, readings, None, slopes, rule, in_l1, scale, outs, accumulate=True)
            expected, exact = hgsr_triton.value([w.clone() for w in weights], found, None, groups, rule, given)
            assert torch.equal(values, expected) and torch.equal(slopes, exact), (i, repeated)
            fresh = [torch.zeros_like(w) for w in weights]
            hgsr_triton.gradient(weights, found, None, exact, rule, given, scale, fresh, accumulate=False)
            for out, old, each in zip(outs, before, fresh, strict=True):
                torch.testing.assert_close(out, old + each, rtol=1e-6, atol=1e-6)


def test_gradients_that_moved_alone_are_found() -> None:
    """Also to where they are aligned otherwise, lie on each other, have other strides, or are not wanted."""
    given, found, once = weights_and_readings(torch.float32, "feature")
    weights, readings, in_l1 = Placed(given), tuple(found), tuple(once)
    rule, groups = CRITERIA["hierarchical_sq_group_l12"], columns(given, found)
    scale = torch.tensor([1.0, 0.5], device=DEVICE)
    _, slopes = hgsr_triton.value(weights, readings, None, groups, rule, in_l1)
    expected = [torch.zeros_like(w) for w in given]
    hgsr_triton.gradient(given, found, None, slopes, rule, once, scale, expected, accumulate=False)
    skewed = torch.zeros(given[1].numel() + 1, device=DEVICE)[1:].view_as(given[1])
    for change in (
        {},
        {1: torch.zeros_like(given[1])},
        {1: skewed},
        {0: None},
        {1: torch.zeros(40, 9, device=DEVICE).t()},
        {},
    ):
        outs: list[Tensor | None] = [change.get(i, torch.zeros_like(w)) for i, w in enumerate(given)]
        for repeated in (1, 2):
            hgsr_triton.gradient(weights, readings, None, slopes, rule, in_l1, scale, outs, accumulate=True)
            for out, each in zip(outs, expected, strict=True):
                assert out is None or torch.allclose(out, repeated * each, rtol=1e-6, atol=1e-6)
    twice, both, counts = Placed([given[1], given[1]]), readings[1:2] * 2, in_l1[:2]
    _, slopes = hgsr_triton.value(twice, both, None, 80, rule, counts)
    for together in (False, True, False):
        outs = [torch.zeros_like(w) for w in twice]
        pair = [torch.zeros_like(w) for w in twice]
        outs = [outs[0]] * 2 if together else outs
        hgsr_triton.gradient(twice, both, None, slopes, rule, counts, scale, outs, accumulate=True)
        hgsr_triton.gradient(list(twice), both, None, slopes, rule, counts, scale, pair, accumulate=True)
        for out, each in zip(outs, [pair[0] + pair[1]] * 2 if together else pair, strict=True):
            torch.testing.assert_close(out, each, rtol=1e-6, atol=1e-6)


def test_a_single_element_is_not_squared() -> None:
    """So that its norm is exact where the square is 0 in float32."""
    weights = [torch.full((5, 6), 1e-30, device=DEVICE)]
    check(weights, [reading((5, 6), "feature")], "hierarchical_sqrt_group_lasso")


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_a_graph_replays_with_other_weights() -> None:
    weights, readings, in_l1 = weights_and_readings(torch.float32, "feature")
    rule, groups = CRITERIA["hierarchical_sq_group_l12"], columns(weights, readings)
    scale = torch.tensor([0.5, 0.25], device=DEVICE)

    def step(outs: list[Tensor]) -> tuple[Tensor, Tensor]:
        values, slopes = hgsr_triton.value(weights, readings, None, groups, rule, in_l1)
        hgsr_triton.gradient(weights, readings, None, slopes, rule, in_l1, scale, outs, accumulate=False)
        return values, slopes

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step([torch.empty_like(w) for w in weights])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [torch.empty_like(w) for w in weights]  # as gradients made by a captured backward pass
        captured = step(outs)
    for seed in (1, 2, 3):
        for w, other in zip(weights, weights_and_readings(torch.float32, "feature", seed)[0], strict=True):
            w.copy_(other)
        graph.replay()
        got = [*(each.clone() for each in captured), *(out.clone() for out in outs)]
        fresh = [torch.empty_like(w) for w in weights]
        for one, other in zip(got, [*step(fresh), *fresh], strict=True):
            assert torch.equal(one, other)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_the_same_bits_every_time() -> None:
    torch.manual_seed(4)
    shapes = [(512, 512, 3, 3), (2048, 1000), (1000, 2048), (64, 3, 7, 7)]
    weights = [torch.randn(shape, device=DEVICE) for shape in shapes]
    readings = [reading(shape, grouping) for shape, grouping in zip(shapes, ("feature", "neuron") * 2, strict=True)]
    groups = columns(weights, readings)
    index = torch.randint(-1, 300, (groups,), device=DEVICE)
    for each, number in ((None, groups), (index, 300)):
        arguments = (weights, readings, each, number, CRITERIA["hierarchical_sqrt_group_l12"], [True] * 4)
        first = hgsr_triton.value(*arguments)
        for _ in range(100):
            for one, other in zip(first, hgsr_triton.value(*arguments), strict=True):
                assert torch.equal(one, other)
    check(weights, readings, "hierarchical_sqrt_group_l12", thorough=False)
    check(weights, readings, "hierarchical_sqrt_group_l12", index=index, groups=300, thorough=False)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_little_memory(dtype: torch.dtype) -> None:
    weights = [torch.randn(2048, 512, 3, 3, device=DEVICE, dtype=dtype) for _ in range(8)]
    readings = [reading(tuple(w.shape), "feature") for w in weights]
    outs = [torch.empty_like(w) for w in weights]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    arguments = (weights, readings, None, columns(weights, readings), CRITERIA["group_l12"], [True] * 8)
    _, slopes = hgsr_triton.value(*arguments)
    scale = torch.ones(2, device=DEVICE)
    hgsr_triton.gradient(*arguments[:3], slopes, *arguments[4:], scale, outs, accumulate=False)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 0.05 * sum(w.nbytes for w in weights)


def test_gradients_that_are_not_wanted_and_what_has_strides() -> None:
    weights = [torch.randn(shape, device=DEVICE) for shape in ((8, 4, 3, 3), (5, 6), (6, 6, 2))]
    readings = [reading(tuple(w.shape), "feature") for w in weights]
    index = torch.stack([torch.arange(16, device=DEVICE), torch.full((16,), -1, device=DEVICE)], 1)[:, 0]
    arguments = (weights, readings, index, 16, CRITERIA["group_lasso"], [True] * 3)
    _, slopes = hgsr_triton.value(*arguments)
    scale = torch.tensor([0.5, 3.0], device=DEVICE)[:1].expand(2)  # as a sum's backward makes it
    whole = [torch.empty_like(w) for w in weights]
    hgsr_triton.gradient(weights, readings, index, slopes, *arguments[4:], scale, whole, False)
    outs = [torch.zeros_like(weights[0]), None, torch.zeros_like(weights[2])]
    dense = torch.full((2,), 0.5, device=DEVICE)
    hgsr_triton.gradient(weights, readings, index.contiguous(), slopes, *arguments[4:], dense, outs, True)
    for out, one in zip(outs, whole, strict=True):
        assert out is None or torch.equal(out, one)


@pytest.mark.parametrize("name", CRITERIA)
def test_nan_is_not_lost(name: str) -> None:
    weight = torch.ones(4, 3, 2, device=DEVICE)
    weight[0, 1, 0] = float("nan")
    values, slopes = hgsr_triton.value([weight], [reading((4, 3, 2), "feature")], None, 3, CRITERIA[name], [True])
    assert values.isnan().all()
    assert name == "l1" or slopes[1].isnan()
