"""Small weights, which are worked on together, beside large ones, and what is kept for them between calls."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from netsurgery.kernels import CRITERIA, hgsr_flat
from netsurgery.kernels.criteria import Name, WeightView, column_count, reading
from netsurgery.kernels.hgsr_reference import reference
from netsurgery.kernels.layout import Layout
from netsurgery.kernels.sparsity import add_gradient, values

F16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
# Two windows and two types to add in; a weight of strange strides; groups; one that only its window's axes tell apart.
SHAPES = [
    ((4, 6, 3, 3), F32), ((5, 4), F32), ((6, 2, 3, 3), F16), ((7, 5), F64), ((3, 4, 3, 3), F64), ((40, 30), F32),
    ((4, 6, 3, 3), F32), ((6, 5), F16),
]  # fmt: skip
READINGS = [
    reading((4, 6, 3, 3), "feature"), reading((5, 4), "neuron"), reading((6, 2, 3, 3), "feature", groups=2),
    reading((7, 5), "feature"), reading((3, 4, 3, 3), "neuron"), reading((40, 30), "feature"),
    WeightView(1, (1, 3), (0, 2)), WeightView(2, (0,), (1,)),
]  # fmt: skip
COUNTED = (True, False, True, False, True, True, False, True)


def weights_of(seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    found = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape, dtype in SHAPES]
    for weight in found:
        weight[:, 1], weight[1], weight.flatten()[::5] = 0, 0, 0
    found[4] = found[4].transpose(2, 3).contiguous().transpose(2, 3)
    return [weight.requires_grad_() for weight in found]


def layout_of(indexed: bool) -> Layout:
    sizes = [column_count(shape, how) for (shape, _), how in zip(SHAPES, READINGS, strict=True)]
    index = torch.arange(sum(sizes)) * 7 % 12 - 1  # some are in no group
    return Layout(tuple(READINGS), COUNTED, *((index, 11) if indexed else (None, sum(sizes))))


def expected(weights: list[Tensor], layout: Layout, criterion: Name, scale: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The two values, and the gradient of their sum with the given factors; in float64."""
    exact = [weight.detach().double().requires_grad_() for weight in weights]
    first = reference(exact, criterion, layout.readings, layout.index, layout.groups)
    second = torch.stack([one.abs().sum() * count for one, count in zip(exact, COUNTED, strict=True)]).sum()
    found = torch.stack([first, second])
    return found.detach(), list(torch.autograd.grad((found * scale).sum(), exact))


def check(found: list[Tensor], wanted: list[Tensor], start: float = 0.0) -> None:
    """Groups have kernels of several types, so that all are as precise as float32 at most."""
    for one, other in zip(found, wanted, strict=True):
        eps = max(torch.finfo(one.dtype).eps, torch.finfo(torch.float32).eps)
        bound = 8 * eps * (float(other.abs().max()) + abs(start))
        torch.testing.assert_close(one.double(), other + start, rtol=8 * eps, atol=bound)


@pytest.mark.parametrize("room", [0, 200, 1 << 19])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_small_beside_large(criterion: Name, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By autograd and added in place, with and without an index; also where some gradients are not wanted."""
    monkeypatch.setattr(hgsr_flat, "ROOM", room)
    for indexed, level in product((False, True), (0.0, 0.5)):
        weights, layout = weights_of(), layout_of(indexed)
        scale = torch.tensor([0.75, level], dtype=torch.float64)
        wanted_values, wanted = expected(weights, layout, criterion, scale)
        found = values(weights, layout, criterion)
        torch.testing.assert_close(found, wanted_values, rtol=1e-6, atol=0)
        check(list(torch.autograd.grad((found * scale).sum(), weights)), wanted)
        outs: list[Tensor | None] = [torch.ones_like(weight) for weight in weights]
        outs[0] = outs[3] = None
        torch.testing.assert_close(
            add_gradient(weights, layout, criterion, scale, outs), wanted_values, rtol=1e-6, atol=0
        )
        pairs = [(out, one) for out, one in zip(outs, wanted, strict=True) if out is not None]
        check([out for out, _ in pairs], [one for _, one in pairs], start=1.0)


def test_the_smallest_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [torch.zeros(shape) for shape in ((5, 8), (3, 3), (100, 100), (2, 0), (4, 4))]
    readings = [reading(tuple(weight.shape), "feature") for weight in weights]
    for room, small in {0: set(), 9: {1}, 25: {1, 4}, 64: {1, 4}, 65: {0, 1, 4}, 1 << 19: {0, 1, 2, 4}}.items():
        monkeypatch.setattr(hgsr_flat, "ROOM", room)
        found = hgsr_flat.flat(weights, readings, [True] * 5)
        assert (set() if found is None else found.numbers) == small
    assert hgsr_flat.flat([torch.zeros(2, 2, device="meta")], readings[:1], [True]) is None


def test_values_that_wait_for_their_gradients() -> None:
    """Another value over weights of the same shapes comes between; gradients twice; and an index changed in place."""
    layout, name, scale = layout_of(indexed=True), "hierarchical_sq_group_l12", torch.tensor([0.75, 0.5])
    assert layout.index is not None
    lists = [weights_of(seed) for seed in (1, 2)]
    found = [(values(weights, layout, name) * scale).sum() for weights in lists]
    for weights, value in zip(lists, found, strict=True):
        _, wanted = expected(weights, layout, name, scale)
        for _ in range(2):
            check(list(torch.autograd.grad(value, weights, retain_graph=True)), wanted)
    layout.index.copy_(layout.index.flip(0))
    _, wanted = expected(lists[0], layout, name, scale)
    check(list(torch.autograd.grad((values(lists[0], layout, name) * scale).sum(), lists[0])), wanted)


def test_one_weight_listed_twice() -> None:
    weight, out = torch.randn(4, 6, 3, dtype=torch.float64), torch.zeros(4, 6, 3, dtype=torch.float64)
    layout = Layout((reading((4, 6, 3), "feature"), reading((4, 6, 3), "neuron")), (True, False), groups=10)
    scale = torch.tensor([1.0, 2.0], dtype=torch.float64)
    exact = weight.clone().requires_grad_()
    wanted = reference([exact, exact], "group_l12", layout.readings) + 2 * exact.abs().sum()
    add_gradient([weight, weight], layout, "group_l12", scale, [out, out])
    torch.testing.assert_close(out, torch.autograd.grad(wanted, exact)[0])


def test_what_is_small_is_not_lost_in_what_is_kept() -> None:
    """Weights that change between calls, and what was kept for others of the same shapes in between."""
    layout, scale = layout_of(indexed=False), torch.tensor([1.0, 0.25])
    for seed in (3, 4, 3):
        weights = weights_of(seed)
        outs: list[Tensor | None] = [torch.zeros_like(weight) for weight in weights]
        with torch.inference_mode():  # what is kept must be of use outside
            values([weight.detach() for weight in weights], layout, "group_lasso")
        add_gradient(weights, layout, "group_lasso", scale, outs)
        _, wanted = expected(weights, layout, "group_lasso", scale)
        check([out for out in outs if out is not None], wanted)


def test_other_defaults_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept is float32 and on the CPU, whatever is made by default where it is made."""
    monkeypatch.setattr(hgsr_flat, "ROOM", 12345)  # so that nothing has been made for it
    torch.manual_seed(0)
    weights = [torch.randn(shape, requires_grad=True) for shape in ((4, 3, 3, 3), (5, 4))]
    layout = Layout(tuple(reading(tuple(weight.shape), "feature") for weight in weights), (True, True), groups=7)
    wanted = torch.autograd.grad(reference(weights, "group_lasso", layout.readings), weights)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = torch.autograd.grad(values(weights, layout, "group_lasso")[0], weights)
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
