"""Value and gradient of the HGSR penalty over all weights of a network, side by side: `python benchmarks/hgsr.py`.

The ways take turns in every round, and their agreement is checked before anything is timed. The formula as it is
written down has no gradient at some exact zeros; it is compared everywhere else. Bytes are those that must move: the
weights read for the value, read for the gradient, and the gradient written. On a GPU the rounds, and what is compiled,
are as many as leave the run under two minutes.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from statistics import median, quantiles

import torch
from models import build, machine, print_table
from torch import Tensor, nn

from netsurgery.kernels import CRITERIA, hgsr
from netsurgery.kernels.criteria import Name, reading
from netsurgery.kernels.hgsr_reference import reference
from netsurgery.kernels.layout import Layout
from netsurgery.kernels.sparsity import add_gradient

Way = Callable[[], Sequence[Tensor]]


def weights_of(name: str, device: str, dtype: torch.dtype) -> list[Tensor]:
    """The convolutions and linear layers of a network; `linear_0.25`: 0.25 billion in a transformer's layers."""
    if name.startswith("linear_"):
        width = 2048
        shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
        blocks = max(1, round(float(name.partition("_")[2]) * 1e9 / (12 * width * width)))
        generator = torch.Generator(device).manual_seed(0)
        return [
            (torch.randn(shape, device=device, dtype=dtype, generator=generator) / 50).requires_grad_()
            for _ in range(blocks)
            for shape in shapes
        ]
    layers = [m for m in build(name).modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.MultiheadAttention)]
    found = [m.in_proj_weight if isinstance(m, nn.MultiheadAttention) else m.weight for m in layers]
    return [weight.detach().to(device, dtype).requires_grad_() for weight in found]


def plain(weights: Sequence[Tensor], criterion: Name) -> Tensor:
    """As one would write it down, feature-wise; its gradient is NaN at zero kernels."""
    rule = CRITERIA[criterion]
    total = weights[0].new_zeros((), dtype=torch.float32)
    for weight in weights:
        norms = torch.linalg.vector_norm(weight.float().flatten(2), rule.norm, 2) if weight.dim() > 2 else weight.abs()
        total = total + norms.float().pow(rule.inner).sum(0).pow(rule.outer).sum()
    return total


def ways(weights: list[Tensor], criterion: Name) -> dict[str, Way]:
    """What is compared: each gives the gradients of all weights."""
    readings = [reading(weight.shape, "feature") for weight in weights]
    layout = Layout(tuple(readings), (False,) * len(weights))
    scale = torch.tensor([1.0, 0.0], device=weights[0].device)
    held = [torch.zeros_like(weight) for weight in weights]

    def graph(function: Callable[[], Tensor]) -> Way:
        return lambda: torch.autograd.grad(function(), weights)

    def in_place() -> Sequence[Tensor]:
        add_gradient(weights, layout, criterion, scale, held)
        return held

    compiled = torch.compile(lambda: reference(weights, criterion, readings))
    found = {
        "reference": graph(lambda: reference(weights, criterion, readings)),
        "as written down": graph(lambda: plain(weights, criterion)),
        "torch.compile": graph(compiled),
        "ours": graph(lambda: hgsr(weights, criterion)),
        "ours, add_gradient": in_place,
    }
    if weights[0].is_cuda:
        found["ours, add_gradient in a CUDA graph"] = graphed(in_place)
    return found


def graphed(way: Way) -> Way:
    """A way captured once, and replayed."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            out = way()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = way()

    def replay() -> Sequence[Tensor]:
        graph.replay()
        return out

    return replay


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(way: Way, device: str) -> float:
    """Milliseconds of one call; what it returns is dropped within, as a training loop does."""
    wait(device)
    start = time.perf_counter()
    way()
    wait(device)
    return 1e3 * (time.perf_counter() - start)


def extra_memory(way: Way, device: str) -> float:
    """Bytes allocated at the peak above what stood before and what is returned."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = way()
        peak, kept = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
        del out
        return peak - kept
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out = way()
    del out
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes, initial=0)) - sum(changes)


def agreement(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> tuple[float, int]:
    """The largest difference where a gradient is finite, and how many of its entries are not.

    The difference is relative to the largest gradient of the same weight.
    """
    worst, lost = 0.0, 0
    for a, b in zip(found, wanted, strict=True):
        finite = a.isfinite()
        difference = torch.where(finite, a.float() - b.float(), 0).abs().max()
        worst = max(worst, float(difference / b.float().abs().max()))
        lost += int(finite.logical_not().sum())
    return worst, lost


def check_agreement(found: dict[str, Way], wanted: Sequence[Tensor], limit: float) -> dict[str, int]:
    """How many entries of each way's gradients are not finite: some only of the formula as it is written down."""
    assert all(gradient.isfinite().all() for gradient in wanted), "ours has gradients that are not finite"
    lost = {}
    for label, way in found.items():
        if not label.startswith("ours, add_gradient"):  # these add to what is there
            difference, lost[label] = agreement(way(), wanted)
            assert difference < limit, f"{label} differs by {difference:.1e}"
            assert not lost[label] or label == "as written down", f"{label}: {lost[label]} entries are not finite"
    return lost


def bandwidth(device: str) -> float:
    """Bytes per second of a copy: what is read and what is written."""
    one = torch.ones(2**28 if device == "cuda" else 2**26, device=device)
    other = torch.empty_like(one)
    times = [timed(lambda: [other.copy_(one)], device) for _ in range(12)]
    return 2 * one.nbytes / (median(times[2:]) / 1e3)


class Clock:
    """Divides the time of a run among its tables: each has its share of what those before it have left.

    Args:
        seconds: for all.
        tables: their number.
    """

    def __init__(self, seconds: float, tables: int):
        self.end, self.left, self.compiling = time.perf_counter() + seconds, tables, 0.0

    def begin(self) -> None:
        """The next table begins."""
        self.stop = time.perf_counter() + (self.end - time.perf_counter()) / self.left
        self.left -= 1

    def over(self) -> bool:
        return time.perf_counter() > self.stop

    def allows_compiling(self) -> bool:
        """Whether another table may take as long to compile as the slowest before it."""
        return time.perf_counter() + self.compiling < self.stop


def measured(ways: dict[str, Way], device: str, rounds: int, clock: Clock) -> dict[str, list[float]]:
    """Milliseconds of each way in each round, after two to warm up: as many as the clock allows, at least two."""
    times: dict[str, list[float]] = {label: [] for label in ways}
    for i in range(rounds + 2):
        if i >= 4 and clock.over():
            break
        for label, way in ways.items():
            times[label].append(timed(way, device))
    return {label: taken[2:] for label, taken in times.items()}


def compare(
    name: str, criterion: Name, device: str, dtype: torch.dtype, rounds: int, skip: Sequence[str], clock: Clock
) -> None:
    """Measure one list of weights and print its table."""
    clock.begin()
    weights = weights_of(name, device, dtype)
    size = sum(weight.nbytes for weight in weights)
    found = {label: way for label, way in ways(weights, criterion).items() if label not in skip}
    start = time.perf_counter()
    if "torch.compile" in found and not clock.allows_compiling():
        del found["torch.compile"]
    if "torch.compile" in found:
        found["torch.compile"]()
    compile_s = time.perf_counter() - start
    clock.compiling = max(clock.compiling, compile_s)
    wanted = [gradient.clone() for gradient in found["ours"]()]
    lost = check_agreement(found, wanted, 1e-4 if dtype == torch.float32 else 2e-2)
    del wanted
    memory = {label: extra_memory(way, device) for label, way in found.items()}
    times = measured(found, device, rounds, clock)
    copied = bandwidth(device)
    ours = median(times["ours"])
    print(
        f"\n{name}, {criterion}, {str(dtype)[6:]}: {len(weights)} weights, {size / 2**20:,.0f} MiB; a copy moves "
        f"{copied / 1e9:,.0f} GB/s; {len(times['ours'])} rounds"
        + (f"; torch.compile took {compile_s:.0f} s" if "torch.compile" in found else "")
    )
    for label, count in lost.items():
        if count:
            print(f"{label}: {count:,} of {sum(w.numel() for w in weights):,} gradients are not finite, at exact zeros")
    print()
    rows = []
    for label, taken in times.items():
        low, middle, high = quantiles(taken, n=4)
        share = 3 * size / (middle / 1e3) / copied
        ratio = [t / o for t, o in zip(taken, times["ours"], strict=True)]
        spread = f"{middle / ours:.2f} ({min(ratio):.2f} to {max(ratio):.2f})"
        moved = f"{3 * size / (middle / 1e3) / 1e9:,.1f}"
        extra = f"{100 * memory[label] / size:.1f}%"
        rows.append([label, f"{middle:.2f} ({low:.2f} to {high:.2f})", spread, moved, f"{100 * share:.0f}%", extra])
    print_table(
        ["way", "ms (quartiles)", "of ours (min to max)", "GB/s", "of the copy", "extra memory, of the weights"], rows
    )


def main() -> None:
    """Print a table for each network."""
    parser = argparse.ArgumentParser(description=__doc__)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--weights", default="resnet50,vit_b_16," + ("linear_1" if cuda else "linear_0.25"))
    parser.add_argument("--criteria", default="hierarchical_sq_group_l12")
    parser.add_argument("--dtypes", default="float32")
    parser.add_argument("--rounds", type=int, help="default: 9, on a GPU 25")
    parser.add_argument("--seconds", type=float, help="of all tables, after which there are fewer rounds; GPU: 100")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--skip", help="ways to leave out; default: on a GPU torch.compile where weights are `linear_`")
    options = parser.parse_args()
    rounds = options.rounds or (25 if options.device == "cuda" else 9)
    names, criteria, dtypes = (one.split(",") for one in (options.weights, options.criteria, options.dtypes))
    seconds = options.seconds or (100 if options.device == "cuda" else float("inf"))
    clock = Clock(seconds, len(names) * len(criteria) * len(dtypes))
    torch.set_num_threads(options.threads)
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{machine()}; on {device}; {rounds} rounds")
    for name in names:
        # Compiling eighty large layers would not leave the run under two minutes.
        skip = "torch.compile" if options.device == "cuda" and name.startswith("linear_") else ""
        skip = (skip if options.skip is None else options.skip).split(",")
        for criterion in criteria:
            for dtype in dtypes:
                compare(name, criterion, options.device, getattr(torch, dtype), rounds, skip, clock)


if __name__ == "__main__":
    main()
