from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from netsurgery.kernels import hgsr_kernels, hgsr_triton
from netsurgery.kernels.criteria import CRITERIA, reading

ROOT = Path(__file__).parent.parent


def run_checks(**environment: str) -> None:
    """The checks, in a process of their own: Triton interprets either everything or nothing in one."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "TRITON_INTERPRET"))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "hgsr_triton_checks.py")],
        cwd=ROOT, env=kept | {"PYTHONPATH": str(ROOT)} | environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-20000:] + done.stderr[-5000:]


def test_in_the_interpreter() -> None:
    run_checks(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


class Nothing:
    """A kernel that is launched and does nothing."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None


def captured(weights: list[torch.Tensor], outs: list[torch.Tensor | None], indexed: bool) -> None:
    """The launches of a step, as they are captured."""
    readings = tuple(reading(tuple(weight.shape), "feature") for weight in weights)
    groups = sum(weight.shape[1] for weight in weights)
    index = torch.arange(groups) if indexed else None
    rule, in_l1, scale = CRITERIA["group_l12"], (True,) * len(weights), torch.ones(2)
    _, slopes = hgsr_triton.value(weights, readings, index, groups, rule, in_l1)
    hgsr_triton.gradient(weights, readings, index, slopes, rule, in_l1, scale, outs, accumulate=True)


def kept() -> list[Any]:
    gc.collect()
    return [one for each in hgsr_triton._CAPTURED.values() for one in each.values()] + hgsr_triton._CAPTURED_FOR_GOOD


@pytest.fixture
def _captures(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a GPU whose stream is being captured, on the CPU; nothing is launched."""
    monkeypatch.setattr(hgsr_triton, "_capturing", lambda device: True)
    for name in ("value_kernel", "gradient_kernel"):
        monkeypatch.setattr(hgsr_triton, name, Nothing())
    gc.collect()
    gc.freeze()  # what is there already need not be walked through each time that a test collects
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("_captures")
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize(
    "kind", ["parameters", "frozen", "leaves", "views of parameters", "computed beside parameters"]
)
def test_what_graphs_use_is_kept_as_long_as_the_weights(kind: str, indexed: bool) -> None:
    """The tables of many models that were captured and are gone are gone, too; those of one that is there are not."""
    before = len(kept())
    for _ in range(5):
        held = [torch.nn.Parameter(torch.randn(shape), requires_grad=kind != "frozen") for shape in ((4, 3), (5, 6))]
        weights: list[torch.Tensor] = list(held)
        if kind == "leaves":
            weights = [torch.randn(4, 3, requires_grad=True), torch.randn(5, 6, requires_grad=True)]
        elif kind == "views of parameters":  # they go first; what they are views of stays
            weights = [held[0], held[1].detach()[1:]]
        elif kind == "computed beside parameters":
            weights = [held[0] * 2, held[1]]
        captured(weights, [torch.zeros_like(weight) for weight in weights], indexed)
        tables = len(kept()) - before
        assert tables >= 4, "plans and tables of value and gradient"
        captured(weights, [None, torch.zeros_like(weights[1])], indexed)
        if kind == "views of parameters":
            del weights
            assert len(kept()) > before + tables, "what a graph still reads is gone"
        weights = held = []
    assert len(kept()) == before


@pytest.mark.usefixtures("_captures")
def test_what_was_made_before_a_capture_is_kept_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weights: list[torch.Tensor] = [torch.nn.Parameter(torch.randn(4, 3))]
    outs: list[torch.Tensor | None] = [torch.zeros(4, 3)]
    with monkeypatch.context() as eager:
        eager.setattr(hgsr_triton, "_capturing", lambda device: False)
        captured(weights, outs, indexed=False)
    before = len(kept())
    for _ in range(4):
        captured(weights, outs, indexed=False)
    assert len(kept()) == before + 4  # a plan and a table each for the value and the gradient


def kinds(writes: bool) -> list[hgsr_kernels.Tile]:
    """Every kind of tile that the launcher can choose, for a value or a gradient."""
    found = {}
    for window, by_rows, near in product((1, 2, 3, 9, 27, 49, 128, 200), (False, True), (False, True)):
        # The window is the fastest axis in memory, or the second.
        one, other = 64 * window, window if near else 1
        strides = [0, other, one, 1 if near else 64] if by_rows else [0, one, other, 1 if near else 64]
        for aligned in (False, True):
            sizes, each = (1, 64, 64, window), [strides] * (1 + writes)
            found[hgsr_triton._tile(sizes, each, aligned, writes, hgsr_triton.SIZES)] = None
    return list(found)


SIGNATURE = {
    "table": "*i64", "owners": "*i32", "pointers": "*i64", "counters": "*i32", "order": "*i64", "starts": "*i64",
    "tiles": "i32", "groups": "i32", "index": "*i64",
}  # fmt: skip
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}


def compiled(kernel: Any, capability: int, dtype: torch.dtype, **constants: Any) -> Any:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    constants |= {"DTYPE": hgsr_triton._DTYPES[dtype], "ACC": hgsr_triton._DTYPES[wide]}
    signature = {
        name: "constexpr" if name in constants else SIGNATURE.get(name, "*" + TYPES[wide]) for name in kernel.arg_names
    }
    source = ASTSource(kernel, signature, constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": True})


def check_builds(
    capability: int, dtype: torch.dtype, norm: int, power: float, outer: float, indexed: bool, only: bool | None = None
) -> None:
    """Both kernels build, with every kind of tile (or only those along rows, or columns), and are what they should."""

    def fields(writes: bool) -> dict[str, tuple[int, ...]]:
        return hgsr_kernels.tile_fields([kind for kind in kinds(writes) if kind.by_rows != only])

    read = fields(writes=False)
    common = {"NORM": norm, "POWER": power, "INDEXED": indexed}
    value = compiled(
        hgsr_kernels.value_kernel, capability, dtype, **common, OUTER=outer, **read,
        WIDE=hgsr_triton.SIZES.wide, MEMBERS=4,
    ).asm["ptx"]  # fmt: skip
    assert re.search(rf"\.target sm_{capability}a?\b", value)
    # Per kind of tile, one arrival at the tile's end and one at that of all; partial sums come from the second cache.
    assert (
        len(re.findall(r"atom\S*\.acq_rel\S*\.add", value))
        == len(re.findall(r"\batom\.", value))
        == 2 * len(read["SLOW"])
    )
    assert "ld.global.cg" in value and ".local" not in value
    gradient = compiled(
        hgsr_kernels.gradient_kernel, capability, dtype, **common, TARGET=hgsr_triton._DTYPES[dtype], ACCUMULATE=True,
        **fields(writes=True),
    ).asm["ptx"]  # fmt: skip
    assert not re.search(r"\b(atom|red)\.", gradient) and ".local" not in gradient
    words = r"\.v2\.b64" if dtype == torch.float64 else r"\.v4\.b32"
    assert re.search(rf"ld\.global{words}", value) and re.search(rf"st\.global{words}", gradient)


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_ahead_of_time(capability: int) -> None:
    old = capability == 80
    check_builds(capability, torch.float32 if old else torch.bfloat16, 2, 0.5, 0.5, indexed=not old, only=old)


def words(ptx: str, operation: str) -> list[str]:
    """The width of each access to memory that is wider or narrower than an address or a number of float32."""
    found = re.findall(rf"\b{operation}\.global((?:\.[a-z0-9_]+(?:::[a-z0-9_]+)*)*)", ptx)
    return [kind for kind in found if kind not in (".b32", ".b64", ".cg.b32")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neighbours_are_read_and_written_in_words_of_16_bytes(dtype: torch.dtype) -> None:
    """All of a tile's elements, in types of two bytes as in float32; 128 threads take a tile."""
    kind = hgsr_kernels.Tile(False, True, *hgsr_triton.SIZES.unit, 1)
    each = kind.slow * kind.fast * dtype.itemsize // (128 * 16)
    common = {"NORM": 1, "POWER": 0.5, "INDEXED": False, **hgsr_kernels.tile_fields([kind])}
    value = compiled(hgsr_kernels.value_kernel, 90, dtype, **common, OUTER=2, WIDE=1024, MEMBERS=4).asm["ptx"]
    assert words(value, "ld") == [".v4.b32"] * each
    gradient = compiled(
        hgsr_kernels.gradient_kernel, 90, dtype, **common, TARGET=hgsr_triton._DTYPES[dtype], ACCUMULATE=True
    ).asm["ptx"]
    # The weight, what is there, and, in a window of several elements, both of another and the weight once more.
    assert words(gradient, "ld") == [".v4.b32"] * 5 * each
    assert words(gradient, "st") == [".v4.b32"] * 2 * each


RULES = sorted({(rule.norm, rule.inner / rule.norm, rule.outer) for rule in CRITERIA.values()})


# Each takes half a minute: every criterion once; every type; either capability.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "dtype", "capability"),
    [(rule, list(TYPES)[i % 4], 80 if i // 4 % 2 else 90) for i, rule in enumerate(RULES)],
)
def test_every_criterion_compiles(rule: tuple[int, float, float], dtype: torch.dtype, capability: int) -> None:
    check_builds(capability, dtype, *rule, indexed=rule[0] == 1)
