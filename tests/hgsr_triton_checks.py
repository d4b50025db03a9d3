"""What the Triton kernels must satisfy, on the GPU, or, with TRITON_INTERPRET=1, in the interpreter on the CPU.

Not collected by itself, since Triton interprets either everything or nothing in a process: ``test_hgsr_triton.py`` runs it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from netsurgery.kernels import hgsr_triton
from netsurgery.kernels.criteria import CRITERIA, Criterion, Reading, canonical, reading
from netsurgery.kernels.hgsr_reference import column_sums, power, reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# Tiles so small that small weights have several of each kind, and several chunks.
SMALL = hgsr_triton.Sizes(chunk=96, unit=(2, 8), strided=(2, 8), window=64, wide=16)


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """What torch.empty returns is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def weights_and_readings(
    dtype: torch.dtype, grouping: str, seed: int = 0
) -> tuple[list[Tensor], list[Reading], list[bool]]:
    """A small network's weights: with a zero row, zero column, zero kernels, and single zeros."""
    torch.manual_seed(seed)
    layers = [((6, 5, 3, 3), 1, False), ((9, 40), 1, False), ((8, 1, 3, 3), 8, False), ((4, 3, 3), 2, True)]
    weights = [torch.randn(shape) for shape, *_ in layers]
    weights[0][:, 1], weights[0][2], weights[0][3, 3], weights[0][4, 0, 1, 1] = 0, 0, 0, 0
    weights[1][:, 7], weights[1][3], weights[1][0, 0] = 0, 0, 0
    readings = [reading(shape, grouping, groups, transposed) for shape, groups, transposed in layers]
    return [w.to(DEVICE, dtype) for w in weights], readings, [True, False, True, True]


def columns(weights: list[Tensor], readings: list[Reading]) -> int:
    return sum(canonical(w, how).shape[0] * canonical(w, how).shape[2] for w, how in zip(weights, readings, strict=True))


def longest(weights: list[Tensor], readings: list[Reading], index: Tensor | None) -> int:
    """No sum has more roundings: over a window, over rows and columns of a group, over groups."""
    views = [canonical(w, how) for w, how in zip(weights, readings, strict=True)]
    most = 1 if index is None else int(torch.bincount(index[index >= 0], minlength=1).max())
    rows = max((view.shape[1] for view in views), default=0)
    return 4 * (max((view.shape[3] for view in views), default=0) + 1) + 2 * rows * most + 2 * columns(weights, readings)


def relative(weights: list[Tensor], readings: list[Reading], index: Tensor | None) -> float:
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
    weights: list[Tensor], readings: list[Reading], rule: Criterion, counted: list[bool], index: Tensor | None = None,
    groups: int = 0,
) -> None:  # fmt: skip
    """Value, sums, slopes and gradient agree with the reference in float64."""
    name = next(name for name, each in CRITERIA.items() if each == rule)
    groups = groups if index is not None else columns(weights, readings)
    bound = relative(weights, readings, index)
    precise = [w.detach().double().requires_grad_() for w in weights]
    expected = reference(precise, name, readings, index, groups)
    gradients = torch.autograd.grad(expected, precise, allow_unused=True) if expected.requires_grad else []
    sums = torch.cat([column_sums(w.detach(), how, rule) for w, how in zip(precise, readings, strict=True)])
    if index is not None:
        sums = sums.new_zeros(groups).index_add(0, index[index >= 0], sums[index >= 0])
    l1 = sum(w.detach().abs().sum() for w, once in zip(precise, counted, strict=True) if once)
    wide = torch.float64 if any(w.dtype == torch.float64 for w in weights) else torch.float32

    arguments = (weights, readings, index, groups, rule, counted)
    values, slopes = hgsr_triton.value(*arguments)
    assert values.dtype == slopes.dtype == wide and values.shape == (2,) and slopes.shape == (groups,)
    close(values, torch.stack([expected.detach(), torch.as_tensor(l1, device=DEVICE)]), bound)
    close(slopes, rule.outer * power(sums, rule.outer - 1), bound)
    again = hgsr_triton.value(*arguments)
    assert torch.equal(again[0], values) and torch.equal(again[1], slopes), "a second call differs"
    found, absolute = hgsr_triton.sums(*arguments)
    close(found, sums, bound)
    close(absolute, torch.as_tensor(l1, device=DEVICE), bound)

    scale = torch.tensor([0.75, 0.5], device=DEVICE)
    expected_gradients = [
        0.75 * (0 if g is None else g) + (0.5 * w.detach().sign() if once else 0)
        for g, w, once in zip(gradients, precise, counted, strict=True)
    ]
    for accumulate in (False, True):
        outs = [torch.full_like(w, 0.25 if accumulate else torch.nan) for w in weights]
        hgsr_triton.gradient(weights, readings, index, slopes, rule, counted, scale, outs, accumulate)
        for out, each in zip(outs, expected_gradients, strict=True):
            # An addend of the other sign takes the error of the larger.
            grown = 2 * (bound + torch.finfo(out.dtype).eps) * (each.abs() + 0.25) if accumulate else 0
            if accumulate:
                assert ((out.double() - each - 0.25).abs() <= grown).all()
            else:
                close(out, each, bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grouping", ["feature", "neuron", "index"])
@pytest.mark.parametrize("name", CRITERIA)
def test_agrees_with_the_reference(name: str, grouping: str, dtype: torch.dtype) -> None:
    weights, readings, counted = weights_and_readings(dtype, "neuron" if grouping == "neuron" else "feature")
    index, groups = None, 0
    if grouping == "index":
        groups = 11  # the last of which no column is in
        index = torch.randint(-1, groups - 1, (columns(weights, readings),)).to(DEVICE)
    check(weights, readings, CRITERIA[name], counted, index, groups)
