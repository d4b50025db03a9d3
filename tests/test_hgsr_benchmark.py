"""The benchmark of the penalty's kernels: what it compares, and that it says where a way has no gradient."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import hgsr as benchmark  # type: ignore[import-not-found]

# What torch.compile imports says so on Python 3.13.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")


def weights() -> list[Tensor]:
    """A linear layer with one exact zero, and a convolution with a kernel of zeros."""
    torch.manual_seed(0)
    linear, convolution = torch.randn(12, 8), torch.randn(6, 5, 3, 3)
    linear[2, 3], convolution[1, 4] = 0, 0
    return [linear.requires_grad_(), convolution.requires_grad_()]


# A root has no slope at 0: of the kernel's nine entries and of the single one. A norm has one there.
@pytest.mark.parametrize(
    ("criterion", "lost"), [("hierarchical_sq_group_l12", 10), ("hierarchical_sqrt_group_lasso", 0)]
)
def test_exact_zeros_are_counted_and_the_rest_compared(
    criterion: str, lost: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "weights_of", lambda name, device, dtype: weights())
    monkeypatch.setattr(benchmark, "bandwidth", lambda device: 1e9)
    monkeypatch.setattr(benchmark, "extra_memory", lambda way, device: 0.0)  # the profiler warns without a GPU
    benchmark.compare("two", criterion, "cpu", torch.float32, 2, ["torch.compile"], benchmark.Clock(60, 1))
    out = capsys.readouterr().out
    said = f"\nas written down: {lost} of 366 gradients are not finite, at exact zeros\n"
    assert (said in out) == (lost > 0) and out.count("not finite") == (lost > 0)
    assert "| ours, add_gradient |" in out and "torch.compile" not in out


class Ticks:
    """A clock of its own, in place of the machine's."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_a_run_keeps_to_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow ways get fewer rounds, at least two; and what one table has not used, those after it have."""
    ticks = Ticks()
    monkeypatch.setattr(benchmark, "time", ticks)

    def slow(seconds: float) -> Callable[[], list[Tensor]]:
        def way() -> list[Tensor]:
            ticks.now += seconds
            return []

        return way

    clock = benchmark.Clock(100, 4)
    found = []
    for seconds in (1.0, 0.1, 1.0, 1000.0):
        clock.begin()
        found.append(len(benchmark.measured({"ours": slow(seconds)}, "cpu", 40, clock)["ours"]))
    assert found == [24, 40, 33, 2]
    assert ticks.now == pytest.approx(26 + 4.2 + 35 + 4000)


def test_what_takes_too_long_to_compile_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = Ticks()
    monkeypatch.setattr(benchmark, "time", ticks)
    clock = benchmark.Clock(100, 3)
    clock.begin()
    assert clock.allows_compiling()
    ticks.now, clock.compiling = 40, 35
    clock.begin()
    assert not clock.allows_compiling()
    ticks.now = 41
    clock.begin()
    assert clock.allows_compiling()


def test_agreement() -> None:
    nan = float("nan")
    one, other = torch.tensor([1.0, nan, -4.0]), torch.tensor([1.0, 2.0, -4.0])
    assert benchmark.agreement([one], [other]) == (0, 1)
    assert benchmark.agreement([one, other], [other, 2 * other]) == (0.5, 1)


def way(*values: float) -> Callable[[], list[Tensor]]:
    return lambda: [torch.tensor(values)]


def test_what_is_refused() -> None:
    nan, wanted = float("nan"), way(1.0, 2.0)()
    assert benchmark.check_agreement({"as written down": way(1, nan), "reference": way(1, 2)}, wanted, 1e-4) == {
        "as written down": 1,
        "reference": 0,
    }
    with pytest.raises(AssertionError, match=r"^as written down differs by 5\.0e-01"):
        benchmark.check_agreement({"as written down": way(2, nan)}, wanted, 1e-4)
    with pytest.raises(AssertionError, match=r"^reference: 1 entries are not finite"):
        benchmark.check_agreement({"reference": way(1, nan)}, wanted, 1e-4)
    with pytest.raises(AssertionError, match=r"^ours has gradients that are not finite"):
        benchmark.check_agreement({}, way(1, nan)(), 1e-4)
