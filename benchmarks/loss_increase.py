"""LossIncreaseScore beside the loop that people write: cut each unit out, run the network on all samples.

    OMP_NUM_THREADS=2 python benchmarks/loss_increase.py

The network is ResNet-20 (16, 32, 64 channels), trained for a moment on digits scaled to 32x32 so that units differ.
The naive loop is timed on some units of every group, in turns with the rest, and scaled by the number of units; its
batch is the fastest of three. Scores are compared before a time is printed.

    python benchmarks/loss_increase.py --calls

counts the operations that are called for each unit, which is what takes the time on a GPU: on small images, with as
many removals at once as a card of 80 GB takes of full ones (32), batches chosen as for a GPU.

    OMP_NUM_THREADS=2 python benchmarks/loss_increase.py --network lite0 --file scores.safetensors

races all units of EfficientNet-Lite0 on 96 crops of pictures, half of each group to be removed, and compares the
selection with the exact one on whole groups, late and early. Network and pictures come from packages (see
``showcase.py``).
"""

import argparse
import logging
import statistics
import sys
import time
from pathlib import Path

import showcase
import torch
import torch.nn.functional as F
from models import cpu_seconds
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import netsurgery
from netsurgery.demo import digits
from netsurgery.models import resnet20
from netsurgery.passes import LossIncreaseScore, sample_losses
from netsurgery.passes.calibration import draw_samples


def trained(side: int, epochs: int, device: str) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    x, y = (one.to(device) for one in digits(0).train)
    x = F.interpolate(x, side, mode="bilinear").expand(-1, 3, -1, -1).contiguous()
    model = resnet20().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model.eval(), (x, y)


@torch.no_grad()
def loss(model: nn.Module, x: Tensor, y: Tensor, batch: int) -> float:
    parts = zip(x.split(batch), y.split(batch), strict=True)
    return sum(float(F.cross_entropy(model(a), b, reduction="sum")) for a, b in parts) / len(y)


def without(model: nn.Module, network: netsurgery.Network, name: str, unit: int) -> nn.Module:
    stay = tuple(u for u in range(network[name].size) if u != unit)
    return netsurgery.rewrite(model, netsurgery.Edit(network, {name: stay}))


class Calls(TorchDispatchMode):
    """Counts the operations that are called."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def calls(samples: int = 64, copies: int = 32) -> None:
    """Operations called for each unit: the loop over units, exact scores, racing."""
    torch.manual_seed(0)
    model, data = resnet20().eval(), (torch.randn(samples, 3, 8, 8), torch.arange(samples) % 10)
    network = netsurgery.trace(model, data[0][:2])
    units = [(group.name, unit) for group in network.prunable for unit in range(group.size)]
    with Calls() as running:
        loss(model, *data, samples)
    with Calls() as naive:
        for name, unit in units[::20]:
            loss(without(model, network, name, unit), *data, samples)
    each = len(units[::20])
    print(f"loop over units: {naive.count / each:.0f} calls a unit, {running.count} of them to run the network")
    settings = {"samples": samples, "rows": copies * samples, "progress": False}
    for dear in (False, True):
        sample_losses.calls_are_dear = lambda device, dear=dear: dear
        for racing in (False, True):
            with Calls() as ours:
                LossIncreaseScore(data, racing=racing, **settings).run(network)
            print(
                f"{'racing' if racing else 'exact'}, batches as for a {'GPU' if dear else 'CPU'}: "
                f"{ours.count / len(units):.1f} calls a unit"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tried", type=int, default=2, help="units of each group that the naive loop is timed on")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--calls", action="store_true", help="count calls instead")
    parser.add_argument("--network", choices=("resnet20", "lite0"), default="resnet20")
    parser.add_argument("--file", help="of --network lite0: where what is known is kept")
    parser.add_argument("--confidence", type=float, default=0.9)
    options = parser.parse_args()
    if options.calls:
        calls()
    elif options.network == "lite0":
        real_size(options)
    else:
        compare(options)


def lite0(crops: int = 96) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """EfficientNet-Lite0 as trained on ImageNet, and crops of pictures with what it takes them for."""
    names = "astronaut camera chelsea coffee rocket motorcycle_left grass gravel brick coins retina color"
    model, files = showcase.lite0(), showcase.pictures_in_order(names)
    cut = torch.Generator().manual_seed(0)
    x = torch.stack([_crop(files[i % len(files)], cut) for i in range(crops)])
    return model, (x, showcase.logits(model, x).argmax(1))


def _crop(file: Path, generator: torch.Generator) -> Tensor:
    from PIL import Image

    image = Image.open(file).convert("RGB")
    share, left, top = torch.rand(3, generator=generator).tolist()
    side = int(min(image.size) * (0.6 + 0.4 * share))
    x, y = int(left * (image.width - side)), int(top * (image.height - side))
    small = image.resize((224, 224), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))
    return (
        torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(224, 224, 3).permute(2, 0, 1) / 127.5 - 1
    )


CHECKED = (
    "conv_head", "blocks.6.0.conv_pwl", "blocks.6.0.conv_pw", "blocks.4.0.conv_pwl", "blocks.2.0.conv_pwl",
    "blocks.1.0.conv_pwl", "conv_stem",
)  # fmt: skip


def real_size(options: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    model, data = lite0()
    model = model.to(options.device)
    network = netsurgery.trace(model, data[0][:1].to(options.device))
    units = sum(group.size for group in network.prunable)
    settings = {"samples": len(data[0]), "file": options.file}
    race = LossIncreaseScore(data, racing=True, confidence=options.confidence, **settings)
    start, used = time.perf_counter(), cpu_seconds()
    raced = race.run(network).scores
    print(f"racing, {units:,} units: {cpu_seconds() - used:.0f} CPU s, {time.perf_counter() - start:.0f} s", flush=True)
    for name in CHECKED:
        used = cpu_seconds()
        exact = LossIncreaseScore(data, samples=len(data[0]), include=name).run(network).scores[name]
        half = len(exact) // 2
        same = {*exact.argsort()[:half].tolist()} & {*raced[name].argsort()[:half].tolist()}
        print(f"{name}: {len(same) / half:.1%} of {half} as in exact, {cpu_seconds() - used:.0f} CPU s", flush=True)


def compare(options: argparse.Namespace) -> None:
    model, data = trained(options.side, options.epochs, options.device)
    network = netsurgery.trace(model, data[0][:2])
    units = sum(group.size for group in network.prunable)
    drawn = draw_samples(data, options.samples)
    (x,), _ = drawn.inputs
    x, y = x.to(options.device), drawn.targets.to(options.device)
    settings = {"samples": options.samples, "progress": False}
    base = loss(model, x, y, 128)
    times = {b: min(_timed(lambda b=b: loss(model, x, y, b)) for _ in range(3)) for b in (64, 128, 512)}
    batch = min(times, key=times.get)
    print(
        f"{units} units in {len(network.prunable)} groups, {options.samples} samples, {torch.get_num_threads()} threads"
    )
    print(f"naive loop in batches of {batch}; loss {base:.4f}")
    ratios: dict[str, list[float]] = {"exact": [], "racing": []}
    agreement: list[float] = []
    for _ in range(options.rounds):
        picked = [(g.name, u) for g in network.prunable for u in torch.randperm(g.size)[: options.tried].tolist()]
        weights = {g.name: g.size / options.tried for g in network.prunable}
        naive, loss_deltas = 0.0, []
        for name, unit in picked:
            start = time.perf_counter()
            loss_deltas.append(loss(without(model, network, name, unit), x, y, batch) - base)
            naive += weights[name] * (time.perf_counter() - start)
        start = time.perf_counter()
        exact = LossIncreaseScore(data, **settings).run(network).scores
        taken = time.perf_counter() - start
        pairs = [(rise, float(exact[name][unit])) for rise, (name, unit) in zip(loss_deltas, picked, strict=True)]
        worst = max(abs(rise - found) / max(abs(rise), 1e-3) for rise, found in pairs)
        assert worst < 1e-2, f"scores differ: {worst}"
        race = LossIncreaseScore(data, racing=True, **settings)
        start = time.perf_counter()
        raced = race.run(network).scores
        raced_in = time.perf_counter() - start
        lower = {name: len(score) // 2 for name, score in exact.items()}
        halves = [{name: one[name].argsort()[:n].tolist() for name, n in lower.items()} for one in (exact, raced)]
        common = sum(len({*halves[0][name]} & {*halves[1][name]}) for name in exact)
        same = common / sum(lower.values())
        agreement.append(same)
        ratios["exact"].append(naive / taken)
        ratios["racing"].append(naive / raced_in)
        print(
            f"naive {naive:6.1f} s (scaled)  exact {taken:5.1f} s  racing {raced_in:5.1f} s, {same:.1%} the same;"
            f" largest difference of scores {worst:.1e} (relative)"
        )
    for name, found in ratios.items():
        print(f"{name}: {statistics.median(found):.1f} times faster ({min(found):.1f} to {max(found):.1f})")
    print(f"racing agrees with the exact selection of the lower half by {statistics.median(agreement):.1%}")


def _timed(work: object) -> float:
    start = time.perf_counter()
    work()  # type: ignore[operator]
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
