"""The penalty's share of a training step: `python benchmarks/step.py`.

In each round a whole step is made (zero_grad, forward, backward, AdamW); between backward and the optimizer, where a
training loop has it, the penalty's gradient is added, and then made once more by `penalty()` and its own backward. The
time is the processor's, of all threads, so that other work on the machine is not counted; it still takes from the
caches. With ``--device cuda`` whole steps are timed by the clock instead, in bfloat16 under autocast, one without the
penalty, one with each way, in turns: what the host does while the GPU works costs nothing.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from itertools import product
from statistics import median, quantiles

import torch
import torch.nn.functional as F
from models import build, image, machine, print_table
from torch import Tensor, nn

from netsurgery.demo import STRENGTH, WIDTHS
from netsurgery.models import DigitsResNet
from netsurgery.passes import HGSR

ROUNDS = {"digits": 100, "resnet50": 5, "vit_b_16": 3}
GOAL = 3  # percent


def training(name: str, batch: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A network in training, and a batch: the demo's for `digits`, or torchvision's on images of 224 pixels."""
    torch.manual_seed(0)
    if name == "digits":
        return DigitsResNet(widths=WIDTHS).train(), torch.rand(batch, 1, 8, 8), torch.randint(10, (batch,))
    return build(name).train(), image(name, batch), torch.randint(1000, (batch,))


def spent(work: Callable[[], object]) -> float:
    """Milliseconds of the processor's time."""
    start = time.process_time()
    work()
    return 1e3 * (time.process_time() - start)


def rounds_on_gpu(name: str, batch: int, grouping: str, number: int) -> Iterator[tuple[float, float, float]]:
    """As `rounds`, by whole steps; each is the mean of ten."""
    model, x, y = (one.cuda() for one in training(name, batch))
    penalty = HGSR(model, x[:1], grouping=grouping, strength=STRENGTH)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(way: str) -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        (loss + penalty() if way == "penalty()" else loss).backward()
        if way == "add_gradient":
            penalty.add_gradient()
        optimizer.step()

    def timed(way: str, times: int = 10) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            step(way)
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start) / times

    for i in range(number + 1):
        plain, added, in_loss = map(timed, ("", "add_gradient", "penalty()"))
        if i:  # the first warms up
            yield plain, added - plain, in_loss - plain


def rounds(name: str, batch: int, grouping: str, number: int) -> Iterator[tuple[float, float, float]]:
    """Of each round the step without the penalty, `add_gradient`, and `penalty()` with its backward."""
    model, x, y = training(name, batch)
    penalty = HGSR(model, x[:1], grouping=grouping, strength=STRENGTH)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def backward() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()

    for i in range(number + 1):
        step = spent(backward)
        added = spent(penalty.add_gradient)
        in_loss = spent(lambda: penalty().backward())
        step += spent(optimizer.step)
        if i:  # the first warms up
            yield step, added, in_loss


def rows(names: list[str], groupings: list[str], batch: int, number: int | None, device: str) -> Iterator[list[str]]:
    """The table's rows, two of them for each network and grouping."""
    for name, grouping in product(names, groupings):
        taken = list((rounds if device == "cpu" else rounds_on_gpu)(name, batch, grouping, number or ROUNDS[name]))
        for way, at in (("add_gradient", 1), ("penalty() and backward", 2)):
            share = [100 * one[at] / one[0] for one in taken]
            low, middle, high = quantiles(share, n=4) if len(share) > 1 else share * 3
            yield [
                name, grouping, f"{median(one[0] for one in taken):,.1f}", way,
                f"{median(one[at] for one in taken):,.2f}", f"{middle:.2f} ({low:.2f} to {high:.2f})",
                f"{min(share):.2f}", "met" if middle < GOAL else "not met",
            ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(ROUNDS))
    parser.add_argument("--groupings", default="feature,coupled")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, help=f"default: {ROUNDS}")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{machine()}; batch {options.batch}; goal: under {GOAL}% of the step\n")
    header = ["network", "grouping", "step, ms", "way", "ms", "% of the step (quartiles)", "least", ""]
    print_table(
        header,
        rows(options.models.split(","), options.groupings.split(","), options.batch, options.rounds, options.device),
    )


if __name__ == "__main__":
    main()
