"""Measured latency of pruned networks next to their drop in MACs: `python benchmarks/latency.py`.

A network and its pruned forms take turns in every round. Random weights: latency does not depend on their values.
"""

import argparse
import time
from statistics import median, quantiles

import torch
from models import build, image, machine, parameters, print_table
from torch import Tensor, nn

import netsurgery
from netsurgery.passes import MagnitudeScore, PruneChannels

MODELS = ("resnet50", "densenet121", "efficientnet_b0", "convnext_tiny", "mobilenet_v2")
SELECTIONS = {
    "macs=0.5, multiple_of=8": PruneChannels(macs=0.5, multiple_of=8),
    "ratio=0.5, multiple_of=8": PruneChannels(0.5, multiple_of=8),
}


@torch.inference_mode()
def latencies(models: list[nn.Module], x: Tensor, rounds: int) -> list[list[float]]:
    """Milliseconds of each forward pass, a list per model; the first two rounds warm up and are dropped."""
    times: list[list[float]] = [[] for _ in models]
    for _ in range(rounds + 2):
        for model, taken in zip(models, times, strict=True):
            start = time.perf_counter()
            model(x)
            taken.append(1e3 * (time.perf_counter() - start))
    return [taken[2:] for taken in times]


def spread(times: list[float]) -> str:
    """Median and quartiles."""
    low, _, high = quantiles(times, n=4)
    return f"{median(times):.1f} ({low:.1f} to {high:.1f})"


def rows(name: str, rounds: int, batches: list[int]) -> list[list[str]]:
    """The lines of one network: itself, then each selection, at each batch size."""
    model, x = build(name), image(name)
    whole = netsurgery.cost(model, (x,))
    networks = {"none": model}
    for label, selection in SELECTIONS.items():
        networks[label] = netsurgery.apply(model, [MagnitudeScore(), selection], (x,))
    measured = {batch: latencies(list(networks.values()), image(name, batch), rounds) for batch in batches}
    lines = []
    for index, (label, network) in enumerate(networks.items()):
        macs = netsurgery.cost(network, (x,)).macs
        line = [name, label, f"{parameters(network) / 1e6:.2f}", f"{macs / 1e9:.2f}", f"{macs / whole.macs:.2f}"]
        for times in measured.values():
            line += [spread(times[index]), f"{median(times[index]) / median(times[0]):.2f}"]
        lines.append(line)
    return lines


def main() -> None:
    """Print the table in markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batches", default="1,8")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    batches = [int(batch) for batch in options.batches.split(",")]
    header = ["model", "pruning", "params M", "GMACs", "of the original's"]
    for batch in batches:
        header += [f"batch {batch}: ms (quartiles)", "of the original's"]
    print(f"{machine()}; {options.rounds} rounds\n")
    print_table(header, (line for name in options.models.split(",") for line in rows(name, options.rounds, batches)))


if __name__ == "__main__":
    main()
