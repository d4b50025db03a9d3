"""The command for GPUs: its checks hold on the CPU where they need no CUDA, and what fails is said."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gpu
import netsurgery
from netsurgery.passes import HGSR

# What torch.compile imports says so on Python 3.13.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
ROOT = Path(__file__).resolve().parent.parent
ANYWHERE = [check for check in gpu.CHECKS if not check.cuda]


def chosen(check: gpu.Check) -> Any:
    """From an empty cache a compilation takes up to a minute."""
    return pytest.param(check, id=check.name, marks=[pytest.mark.slow] * ("torch.compile" in check.name))


@pytest.mark.parametrize("check", [chosen(check) for check in ANYWHERE])
def test_on_the_cpu(check: gpu.Check, capsys: pytest.CaptureFixture[str]) -> None:
    if "torch.compile" in check.name and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no compiler of C++ for torch.compile")
    assert gpu.carry_out(check, "cpu"), capsys.readouterr().out
    line = capsys.readouterr().out
    assert line.startswith(f"ok     {check.name} ") and line.count("\n") == 1 and f"at most {check.bound:.0e}" in line


# What needs CUDA, as far as a CPU can show it ------------------------------------------------------------------------


@pytest.mark.parametrize("in_place", [False, True])
def test_what_a_graph_gives_is_compared(in_place: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of a graph, the step itself, into the same tensors; and a graph that does nothing is found."""

    def rerun(step: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        found = step()

        def replay() -> None:
            for old, new in zip(found, step(), strict=True):
                old.copy_(new)

        return found, replay

    monkeypatch.setattr(gpu, "captured", rerun)
    assert gpu.in_a_graph("cpu", in_place) < 1e-5
    monkeypatch.setattr(gpu, "captured", lambda step: (step(), lambda: None))
    assert gpu.in_a_graph("cpu", in_place) > 0.1


def test_half_precision_under_autocast() -> None:
    assert gpu.mixed_precision("cpu", torch.float16) < 1e-5


# Each check can fail -------------------------------------------------------------------------------------------------


def test_a_wrong_gradient_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    right = HGSR.__call__
    monkeypatch.setattr(HGSR, "__call__", lambda self: right(self) * 1.001)
    assert gpu.whole_network("cpu", "feature") == pytest.approx(1e-3, rel=0.01)
    assert gpu.mixed_precision("cpu", torch.bfloat16) == pytest.approx(1e-3, rel=0.01)


def test_a_lost_momentum_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    right = netsurgery.rewrite

    def forgetful(model: nn.Module, edit: netsurgery.Edit, **options: Any) -> nn.Module:
        small = right(model, edit, **options)
        for state in options["optimizer"].state.values() if options else ():
            state["momentum_buffer"].zero_()
        return small

    monkeypatch.setattr(netsurgery, "rewrite", forgetful)
    assert gpu.training_goes_on("cpu", gpu.OPTIMIZERS["SGD, fused"]) > 1e-6


def test_numbers_that_are_none_do_not_pass() -> None:
    nan = torch.tensor([1.0, float("nan")])
    assert math.isnan(gpu.relative(nan, torch.ones(2))) and math.isnan(gpu.worst([0.0, float("nan")]))


# The command ---------------------------------------------------------------------------------------------------------


def test_what_fails_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(device: str) -> float:
        raise ValueError(f"nothing works on {device}")

    assert not gpu.carry_out(gpu.Check("far off", lambda device: 0.5, 1e-3), "cpu")
    assert not gpu.carry_out(gpu.Check("no number", lambda device: float("nan"), 1e-3), "cpu")
    assert not gpu.carry_out(gpu.Check("broken", broken, 1e-3), "cpu")
    first, second, third, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("FAILED far off ") and first.endswith(" s  error 5.0e-01, at most 1e-03")
    assert second.startswith("FAILED no number ") and second.endswith(" s  error nan, at most 1e-03")
    assert third.startswith("FAILED broken ") and third.endswith(" s  ValueError: nothing works on cpu")
    assert rest[0].startswith("Traceback")


def test_the_kernels_are_dealt_over_processes(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    parts = [gpu.Slice.begin(number, 1000, TRITON_INTERPRET="1", OMP_NUM_THREADS="1") for number in (139, 999)]
    assert [part.end() for part in parts] == [True, False]  # the last has nothing to do, which is no success
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ok     kernels, part 140 of 1000 ") and " 1 passed" in lines[0]
    assert lines[1].startswith("FAILED kernels, part 1000 of 1000 ") and "deselected" in lines[1]


@pytest.mark.parametrize("error", [0.0, 1.0])
def test_the_exit_status(error: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(gpu, "CHECKS", [gpu.Check("one", lambda device: error * (device == "cuda"), 0.5)])
    monkeypatch.setattr(gpu.Slice, "begin", classmethod(lambda cls, number, of: cls(number, of, None, None, 0.0)))
    monkeypatch.setattr(gpu.Slice, "end", lambda self: True)
    assert gpu.main(["--processes", "2"]) == error
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("a GPU, torch ")
    assert lines[-1].startswith(f"{3 - int(error)} of 3 passed in ")


def run() -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tests/gpu.py"], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    done = run()
    assert done.returncode == 2, done.stderr
    assert done.stdout == f"No GPU: torch {torch.__version__} finds no CUDA device, and nothing was checked.\n"


@pytest.mark.gpu
def test_on_the_gpu() -> None:
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
