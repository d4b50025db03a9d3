"""Right after a removal, without fine-tuning: nothing made up for, biases, least squares.

    python benchmarks/compensation.py [--seeds 3]
    python benchmarks/compensation.py --network lite0 [--seeds 3] [--images 512] [--budgets 0.9 0.75] [--scores FOLDER]

digits: DigitsResNet on scikit-learn's handwritten digits, trained for 15 epochs without a penalty; units by magnitude,
the same share of every group; 512 training images as calibration data, accuracy on the test images.

lite0: EfficientNet-Lite0 as trained on ImageNet, and crops of 38 photographs, all from packages (``showcase.py``).
Units by Taylor (100 crops), the same share of every group; crops of 25 photographs as calibration data; agreement with
the original's classes and KL divergence on crops of the other 13, CPU seconds and peak memory. ``--scores`` keeps
scores in files.
"""

import argparse
import math
import random
import resource
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from models import Known, cpu_seconds
from showcase import DEALT_BY, agreement, lite0, logits, pictures_in_order
from torch import Tensor, nn

import netsurgery
from netsurgery.demo import accuracy, digits, fit
from netsurgery.models import DigitsResNet
from netsurgery.passes import MagnitudeScore, PruneChannels, TaylorScore
from netsurgery.passes.compensation import compensate

METHODS = (None, "bias", "least-squares")
RATIOS = (0.3, 0.5, 0.7)


def on_digits(seed: int) -> tuple[float, dict[tuple[float, str | None], float]]:
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


def digits_table(seeds: int) -> None:
    results = [on_digits(seed) for seed in range(seeds)]
    before = [whole for whole, _ in results]
    spread = stdev if seeds > 1 else lambda _: 0.0
    print(f"test accuracy in percent, {seeds} seeds, mean ± standard deviation; before: {mean(before):.2f}")
    print("| removed |", " | ".join(str(method) for method in METHODS), "|")
    print("| ---: |", " | ".join("---:" for _ in METHODS), "|")
    for ratio in RATIOS:
        columns = [[found[ratio, method] for _, found in results] for method in METHODS]
        print(f"| {ratio:.0%} |", " | ".join(f"{mean(c):.2f} ± {spread(c):.2f}" for c in columns), "|")


def network_and_crops(seed: int, count: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A trained network, images to measure on ``(n, 3, 224, 224)`` and images to report on, of other photographs."""
    files = pictures_in_order(DEALT_BY)
    random.Random(seed).shuffle(files)
    return lite0(), crops(files[13:], count, 0), crops(files[:13], 104, 1)


def crops(files: list[Path], count: int, seed: int) -> Tensor:
    """Random crops as networks are trained on, file after file."""
    import numpy
    from PIL import Image

    draw, found = random.Random(seed), []
    for index in range(count):
        image = Image.open(files[index % len(files)]).convert("RGB")
        (w, h), area, ratio = image.size, draw.uniform(0.35, 1), math.exp(draw.uniform(math.log(0.75), math.log(4 / 3)))
        width, height = (min(most, int(math.sqrt(area * w * h * r))) for most, r in ((w, ratio), (h, 1 / ratio)))
        x, y = draw.randint(0, w - width), draw.randint(0, h - height)
        crop = image.resize((224, 224), Image.Resampling.BICUBIC, box=(x, y, x + width, y + height))
        if draw.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        found.append(torch.from_numpy(numpy.array(crop)).permute(2, 0, 1).float() / 127.5 - 1)
    return torch.stack(found)


def taylor(network: nn.Module, images: Tensor, folder: Path | None, seed: int) -> dict[str, Tensor]:
    """Scores by the classes that the network itself gives."""
    file = folder / f"taylor-{seed}.pt" if folder else None
    if file and file.exists():
        return torch.load(file)
    images = images[:100]
    score = TaylorScore((images, logits(network, images, 6).argmax(1)), samples=100)
    found = dict(score.run(netsurgery.trace(network, (images[:1],))).scores)
    if file:
        torch.save(found, file)
    return found


def on_lite0(seed: int, given: argparse.Namespace) -> dict[tuple[float, str | None], tuple[float, float, float, Any]]:
    """Agreement, KL divergence and CPU seconds after each removal and compensation; and its report."""
    network, images, report = network_and_crops(seed, given.images)
    scores, base, found = taylor(network, images, given.scores, seed), logits(network, report, 6), {}
    for budget in given.budgets:
        edit = netsurgery.plan(network, [Known(scores), PruneChannels(macs=budget)], (images[:1],))
        for method in METHODS:
            start = cpu_seconds()
            one = compensate(edit, method, images, given.images) if method else edit
            taken = cpu_seconds() - start
            agree, divergence = agreement(base, logits(netsurgery.rewrite(network, one), report, 6))
            found[budget, method] = agree, divergence, taken, one.compensations
            print(
                f"split {seed}, {budget:.0%}, {method}: {agree:.1f}%, {taken:.0f} s",
                *map(str, one.compensations),
                flush=True,
            )
    return found


def lite0_table(given: argparse.Namespace) -> None:
    results = [on_lite0(seed, given) for seed in range(given.seeds)]
    print(
        f"agreement in percent (KL divergence) on 104 crops, {given.seeds} splits, {given.images} images; CPU seconds"
    )
    print("| MACs kept |", " | ".join(str(method) for method in METHODS), "|")
    print("| ---: |", " | ".join("---:" for _ in METHODS), "|")
    for budget in given.budgets:
        cells = []
        for method in METHODS:
            rows = [one[budget, method] for one in results]
            cells.append(
                "; ".join(f"{row[0]:.1f} ({row[1]:.2f})" for row in rows) + f"; {mean(r[2] for r in rows):.0f} s"
            )
        print(f"| {budget:.0%} |", " | ".join(cells), "|")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10:,} MiB, images and network included")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--network", choices=("digits", "lite0"), default="digits")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--images", type=int, default=512, help="calibration images of lite0")
    options.add_argument("--budgets", type=float, nargs="+", default=(0.9, 0.75), help="shares of lite0's MACs")
    options.add_argument("--scores", type=Path, help="a folder that scores are kept in")
    given = options.parse_args()
    if given.network == "digits":
        digits_table(given.seeds)
    else:
        lite0_table(given)


if __name__ == "__main__":
    main()
