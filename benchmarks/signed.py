"""The rise of the loss beside its absolute change, as scores, on five trained networks; and scoring in rounds.

    OMP_NUM_THREADS=1 python benchmarks/signed.py [digits] [mnist] [shapes] [minilm] [lite0] [--rounds]

Each unit is cut out for itself on a few samples, once for all readings; then the same share of each scored group is cut
out, the lowest first, without fine-tuning or compensation. Held-out samples are split: choices were made on the first
half, the table shows the second. "Agreement" is with the label, for lite0 with the original's own first class.

Needs the packages of ``showcase.py``.
"""

import argparse
import copy
import random
from collections.abc import Callable
from statistics import mean
from typing import Any

import showcase
import torch
from torch import Tensor, nn

import netsurgery
from netsurgery.models import DigitsResNet
from netsurgery.passes import PruneChannels, TaylorScore
from netsurgery.passes.ablation import Ablation, AblationSettings
from netsurgery.passes.calibration import draw_samples
from netsurgery.passes.gate_gradients import gate_slopes
from netsurgery.passes.score_checkpoint import ScoreCheckpoint

Data = showcase.Rows
Subject = showcase.Subject

# Networks --------------------------------------------------------------------------------------------------------


def digits() -> Subject:
    """A small residual network on scikit-learn's digits."""
    from netsurgery.demo import digits as load
    from netsurgery.demo import fit

    data = load(0)
    torch.manual_seed(0)
    model = DigitsResNet()
    fit(model, data.train, 15, 3e-3, 0, lambda: None)
    return model, data.train, data.test


def mnist() -> Subject:
    """LeNet-5 on the 5,000 images of MNIST that a package holds."""
    train, test = showcase.mnist(0)
    torch.manual_seed(0)
    return showcase.fitted(showcase.LeNet(), *train, 8, 2e-3, 64), train, test


def lite0() -> Subject:
    """EfficientNet-Lite0 trained on ImageNet, on crops of pictures that packages hold; 13 pictures are held out."""
    model, files = showcase.lite0(), showcase.pictures_in_order(showcase.DEALT_BY)
    random.Random(0).shuffle(files)
    x, held_out = (
        showcase.crops(files[13:], 6, 0),
        showcase.crops(files[:13], 10, 1).unflatten(0, (13, 10))[:, :4].flatten(0, 1),
    )
    return model, (x, outputs(model, x).argmax(1)), (held_out, outputs(model, held_out).argmax(1))


#: Samples that units are tried on, shares of each group that go, and the groups that are scored.
SUBJECTS: dict[str, tuple[Callable[[], Subject], int, tuple[float, ...], tuple[str, ...]]] = {
    "digits": (digits, 256, (0.25, 0.5), ("",)),
    "mnist": (mnist, 256, (0.25, 0.5), ("",)),
    "shapes": (showcase.shapes, 128, (0.125, 0.25), ("",)),
    "minilm": (showcase.minilm, 32, (0.25, 0.5), ("bert.encoder.layer.5.",)),
    "lite0": (lite0, 12, (0.25, 0.5), ("blocks.5.3.", "blocks.6.0.")),
}

# Measuring -------------------------------------------------------------------------------------------------------


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    return showcase.logits(model, x, 16)


def changes(network: netsurgery.Network, data: Data, count: int, seed: int) -> dict[str, dict[str, Tensor]]:
    """By method, the change of each sample's loss without each unit: ``(units, samples)`` for each group."""
    samples = draw_samples(data, count, seed)
    slopes = {name: slope.T for name, slope in gate_slopes(Ablation(AblationSettings(), network, samples)).items()}
    trials = Ablation(AblationSettings(), network, samples)
    exact = {group.name: torch.empty(group.size, samples.count, dtype=torch.float64) for group in network.prunable}

    def kept(name: str, units: list[int], found: Tensor, start: int) -> Tensor:
        exact[name][units, start : start + found.shape[1]] = found
        return found.sum(1)[None]

    trials.extend(ScoreCheckpoint("", None), trials.everything(), samples.count, kept)
    second = {name: slope.square() / 2 - slope for name, slope in slopes.items()}
    return {"exact": exact, "Taylor 2": second, "Taylor 1": slopes}


READINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "rise": lambda change: change.mean(1),
    "of the mean": lambda change: change.mean(1).abs(),
    "effect": lambda change: change.abs().mean(1),
    "square": lambda change: change.square().mean(1),
}


class Judge:
    """What is left of a network, on the second half of the held-out samples."""

    def __init__(self, model: nn.Module, held_out: Data):
        count = len(held_out[1])
        half = slice(24 if count == 52 else count // 2, None)  # crops of one picture stay together
        self.x, self.labels = held_out[0][half], held_out[1][half]
        self.before = outputs(model, self.x).log_softmax(1)

    def of(self, small: nn.Module) -> tuple[float, float]:
        """Agreement with the labels in percent, and the divergence from the original's outputs."""
        after = outputs(small, self.x).log_softmax(1)
        right = 100 * float((after.argmax(1) == self.labels).double().mean())
        return right, float((self.before.exp() * (self.before - after)).sum(1).mean())


def said(found: list[tuple[float, float]]) -> str:
    right = [one for one, _ in found]
    spread = f" ({min(right):.1f} to {max(right):.1f})" if len(found) > 1 else ""
    return f"{mean(right):.1f}{spread}, {mean(kl for _, kl in found):.3f}"


def scored_groups(model: nn.Module, x: Any, prefixes: tuple[str, ...]) -> netsurgery.Network:
    network = netsurgery.trace(model, x[slice(0, 2)])
    rest = [group.name for group in network.prunable if not group.name.startswith(prefixes)]
    return network.with_locked(dict.fromkeys(rest, "not scored"))


def table(name: str, seeds: int) -> None:
    build, count, ratios, prefixes = SUBJECTS[name]
    model, data, held_out = build()
    network, judge = scored_groups(model, data[0], prefixes), Judge(model, held_out)
    print(f"{name}: {judge.of(copy.deepcopy(model))[0]:.1f} before, {len(judge.labels)} samples", flush=True)
    found: dict[tuple[str, str, float], list[tuple[float, float]]] = {}
    for seed in range(seeds):
        for method, groups in changes(network, data, count, seed).items():
            if method == "exact":
                loss_deltas = torch.cat([change.mean(1) for change in groups.values()])
                print(
                    f"seed {seed}: {float((loss_deltas < 0).double().mean()):.1%} of the rises are negative", flush=True
                )
            for reading, read in READINGS.items():
                scored = network.with_scores({group: read(change) for group, change in groups.items()}, comparable=True)
                for ratio in ratios if (method, reading) != ("Taylor 1", "rise") else ():
                    small = netsurgery.rewrite(model, PruneChannels(ratio).run(scored))
                    found.setdefault((method, reading, ratio), []).append(judge.of(small))
    for (method, reading, ratio), results in found.items():
        print(f"| {name} | {ratio:.1%} | {method} | {reading} | {said(results)} |", flush=True)


def rounds(name: str, seeds: int) -> None:
    """One look beside several, each at what those before have left."""
    build, count, ratios, _ = SUBJECTS[name]
    model, data, held_out = build()
    judge, example = Judge(model, held_out), data[0][slice(0, 2)]
    whole = netsurgery.trace(model, example)
    for ratio in ratios:
        for times in (1, 5, 10):
            found = []
            for seed in range(seeds):
                score = TaylorScore(data, samples=count, seed=seed)
                steps = [PruneChannels(ratio * (step + 1) / times, of=whole) for step in range(times)]
                passes = [one for step in steps for one in (score, step)]
                found.append(judge.of(netsurgery.apply(model, passes, example)))
            print(f"| {name} | {ratio:.1%} | {times} | {said(found)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", choices=[*SUBJECTS, []])
    parser.add_argument("--rounds", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for one in given.names or SUBJECTS:
        (rounds if given.rounds else table)(one, given.seeds)
