"""Time that the penalty takes on the host beside the kernels: `python benchmarks/host.py`; needs no GPU.

The kernels' launches are replaced by nothing, and the weights lie on the CPU, so that what is left is what Python and
torch do around them, in time of the thread. On a GPU the launches themselves (two for each call) and its own allocator
come on top.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any
from unittest import mock

import torch
from models import build, machine, print_table
from torch import nn

import netsurgery
from netsurgery.kernels import hgsr_triton, sparsity
from netsurgery.passes import HGSR, PruneChannels, RandomScore

IMAGE = torch.zeros(1, 3, 224, 224)


class Nothing:
    """A kernel that is launched and does nothing."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def ways(penalty: HGSR) -> dict[str, Callable[[], object]]:
    return {"add_gradient": penalty.add_gradient, "penalty() and backward": lambda: penalty().backward()}


def timed(way: Callable[[], object], model: nn.Module, grads: bool, rounds: int) -> list[float]:
    """Milliseconds of each call, with gradients that stay where they are, or without any before."""
    times = []
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(rounds + 10):
        model.zero_grad(set_to_none=not grads)
        start = time.thread_time()
        way()
        times.append(1e3 * (time.thread_time() - start))
    return times[10:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="resnet50,vit_b_16")
    parser.add_argument("--groupings", default="feature,coupled")
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}; launches do nothing; {options.rounds} rounds\n")
    rows = []
    nothing = {"value_kernel": Nothing(), "gradient_kernel": Nothing()}
    with mock.patch.multiple(hgsr_triton, **nothing), mock.patch.object(sparsity, "backend", return_value=hgsr_triton):
        for name in options.models.split(","):
            # As many weights, but small: what the CPU does with their elements is not the question.
            model = netsurgery.apply(build(name), [RandomScore(), PruneChannels(0.9)], IMAGE)
            for grouping in options.groupings.split(","):
                penalty = HGSR(model, IMAGE, grouping=grouping)
                for label, way in ways(penalty).items():
                    times = timed(way, model, label == "add_gradient", options.rounds)
                    low, _, high = quantiles(times, n=4)
                    spread = f"{median(times):.3f} ({low:.3f} to {high:.3f})"
                    rows.append([name, grouping, str(len(penalty.layers)), label, spread, f"{min(times):.3f}"])
    print_table(["network", "grouping", "weights", "way", "host, ms (quartiles)", "least"], rows)


if __name__ == "__main__":
    main()
