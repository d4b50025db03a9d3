"""Accuracy right after removal, without fine-tuning: nothing made up for, biases, least squares.

    python benchmarks/compensation.py [SEEDS]

DigitsResNet on scikit-learn's handwritten digits, trained for 15 epochs without a penalty; units by magnitude, the same
share of every group; 512 training images as calibration data, accuracy on the test images.
"""

import sys
from statistics import mean, stdev

import torch

import netsurgery
from netsurgery.demo import accuracy, digits, fit
from netsurgery.models import DigitsResNet
from netsurgery.passes import MagnitudeScore, PruneChannels

METHODS = (None, "bias", "least-squares")
RATIOS = (0.3, 0.5, 0.7)


def measured(seed: int) -> tuple[float, dict[tuple[float, str | None], float]]:
    """Accuracy before, and after each removal and compensation."""
    data = digits(seed)
    torch.manual_seed(seed)
    model = DigitsResNet()
    fit(model, data.train, 15, 3e-3, seed, lambda: None)
    found = {}
    for ratio in RATIOS:
        for method in METHODS:
            passes = [MagnitudeScore(), PruneChannels(ratio, compensate=method, data=data.train)]
            found[ratio, method] = accuracy(netsurgery.apply(model, passes, (data.test[0],)), data.test)
    return accuracy(model, data.test), found


def main(seeds: int) -> None:
    results = [measured(seed) for seed in range(seeds)]
    before = [whole for whole, _ in results]
    spread = stdev if seeds > 1 else lambda _: 0.0
    print(f"test accuracy in percent, {seeds} seeds, mean ± standard deviation; before: {mean(before):.2f}")
    print("| removed |", " | ".join(str(method) for method in METHODS), "|")
    print("| ---: |", " | ".join("---:" for _ in METHODS), "|")
    for ratio in RATIOS:
        columns = [[found[ratio, method] for _, found in results] for method in METHODS]
        print(f"| {ratio:.0%} |", " | ".join(f"{mean(c):.2f} ± {spread(c):.2f}" for c in columns), "|")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
