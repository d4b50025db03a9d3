"""The data sets of recipes: torchvision's own loaders read tiny files of the published formats, written here."""

import hashlib
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import datasets

from netsurgery.errors import InputError
from netsurgery.training.data import TINY, Images, load
from netsurgery.training.recipe import Data

CLASSES = 3


def images(count: int, side: int, seed: int) -> np.ndarray:
    """Random bytes `(count, 3, side, side)`."""
    return np.random.default_rng(seed).integers(0, 256, (count, 3, side, side), dtype=np.uint8)


def stored(path: Path, content: bytes) -> str:
    """Write a file; its md5."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return hashlib.md5(content).hexdigest()


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch, cls: type, label: str, meta: str) -> None:
    """Pickled batches as the source has them, and their md5 sums where the loader looks for them."""
    folder = root / cls.base_folder
    for which in ("train_list", "test_list"):
        sums = []
        for seed, (name, _) in enumerate(getattr(cls, which)):
            pixels = images(4, 32, seed)
            batch = {"data": pixels.reshape(4, -1), label: [i % CLASSES for i in range(4)]}
            sums.append([name, stored(folder / name, pickle.dumps(batch))])
        monkeypatch.setattr(cls, which, sums)
    names = pickle.dumps({cls.meta["key"]: ["a", "b", "c"]})
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": stored(folder / meta, names)})


def write_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(root, monkeypatch, datasets.CIFAR10, "labels", "batches.meta")


def write_cifar100(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(root, monkeypatch, datasets.CIFAR100, "fine_labels", "meta")


def write_stl10(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns first, labels from 1, as the source has them."""
    folder, cls = root / "stl10_binary", datasets.STL10
    labels = np.arange(5, dtype=np.uint8) % CLASSES + 1
    contents = {"train_X.bin": images(5, 96, 0), "test_X.bin": images(5, 96, 1), "unlabeled_X.bin": images(1, 96, 2)}
    contents |= {"train_y.bin": labels, "test_y.bin": labels}
    for which in ("train_list", "test_list"):
        sums = [[name, stored(folder / name, contents[name].tobytes())] for name, _ in getattr(cls, which)]
        monkeypatch.setattr(cls, which, sums)


def write_tinyimagenet(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder for each class, and a list with boxes for the other images."""
    from PIL import Image

    wnids, folder = ["n02", "n01", "n03"], root / TINY
    for seed, wnid in enumerate(wnids):
        (folder / "train" / wnid / "images").mkdir(parents=True)
        for index, pixels in enumerate(images(4, 64, seed)):
            Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / "train" / wnid / "images" / f"{wnid}_{index}.JPEG")
    (folder / "val" / "images").mkdir(parents=True)
    lines = []
    for index, pixels in enumerate(images(4, 64, 9)):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / "val" / "images" / f"val_{index}.JPEG")
        lines.append(f"val_{index}.JPEG\t{wnids[index % 3]}\t0\t0\t62\t62")
    (folder / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")


WRITERS = {
    "cifar10": (write_cifar10, 32, 20, 4),
    "cifar100": (write_cifar100, 32, 4, 4),
    "stl10": (write_stl10, 96, 5, 5),
    "tinyimagenet": (write_tinyimagenet, 64, 12, 4),
}


def opened(root: Path, monkeypatch: pytest.MonkeyPatch, name: str, **options: Any) -> Images:
    WRITERS[name][0](root, monkeypatch)
    return load(Data(name, folder=str(root), **options), 0)


@pytest.fixture(autouse=True)
def afresh() -> None:
    load.cache_clear()


@pytest.mark.parametrize("name", WRITERS)
def test_sizes_classes_and_normalisation(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = opened(tmp_path, monkeypatch, name)
    _, side, trains, tests = WRITERS[name]
    assert (len(found.train), len(found.plain), len(found.test)) == (trains, trains, tests)
    for pairs in (found.train, found.plain, found.test):
        x, y = pairs[1]
        assert (x.shape, x.dtype, 0 <= y < CLASSES) == ((3, side, side), torch.float32, True)
    assert found.example.shape == (1, 3, side, side)
    mean = torch.stack([found.plain[i][0] for i in range(trains)]).mean()
    assert abs(float(mean)) < 0.3  # bytes around the middle
    assert sorted({found.plain[i][1] for i in range(trains)}) == list(range(CLASSES))


def test_the_pixels_of_cifar_are_those_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = opened(tmp_path, monkeypatch, "cifar10")
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    wanted = (torch.from_numpy(images(4, 32, 0)[2]) / 255 - mean[:, None, None]) / std[:, None, None]
    assert torch.allclose(found.plain[2][0], wanted, atol=1e-6)
    assert found.plain[2][1] == 2


def test_labels_of_tinyimagenet_are_those_of_the_sorted_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = opened(tmp_path, monkeypatch, "tinyimagenet")
    assert [found.test[i][1] for i in range(4)] == [1, 0, 2, 1]  # n02, n01, n03, n02
    assert [found.plain[i][1] for i in (0, 4, 8)] == [0, 1, 2]


def test_augmentation_moves_and_mirrors_what_is_learnt_from_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = opened(tmp_path, monkeypatch, "cifar100")
    seen = [found.train[0][0] for _ in range(20)]
    assert any(not one.equal(seen[0]) for one in seen)
    assert all(found.plain[0][0].equal(found.plain[0][0]) and found.test[0][0].equal(found.test[0][0]) for _ in seen)
    inside = found.plain[0][0]
    values = set(inside[0].flatten().tolist())
    assert all(sum(v in values for v in one[0].flatten().tolist()) > 700 for one in seen)  # shifted by at most 4


def test_without_augmentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = opened(tmp_path, monkeypatch, "stl10", augment=False)
    assert all(found.train[0][0].equal(found.plain[0][0]) for _ in range(9))


def test_a_limit_takes_images_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = opened(tmp_path, monkeypatch, "cifar10", limit=7)
    assert (len(found.train), len(found.plain), len(found.test)) == (7, 7, 4)
    assert found.plain.indices == [0, 2, 5, 8, 11, 14, 17]
    whole = opened(tmp_path, monkeypatch, "cifar10")
    for at, index in enumerate(found.plain.indices):  # as they are, though those to learn from are augmented
        assert all(found.plain[at][0].equal(whole.plain[index][0]) for _ in range(5))
    assert any(not found.train[at][0].equal(found.plain[at][0]) for at in range(7) for _ in range(5))
    with pytest.raises(InputError, match=r"^data\.limit = 99: cifar10 has 20 images$"):
        load(Data("cifar10", folder=str(tmp_path), limit=99), 0)


@pytest.mark.parametrize("name", WRITERS)
def test_where_there_are_no_files(name: str, tmp_path: Path) -> None:
    wanted = re.escape(f"{name}: no complete data set in '{tmp_path}' (")
    with pytest.raises(InputError, match=f"^{wanted}.*name its folder by --data DIR, or fetch it by --download$"):
        load(Data(name, folder=str(tmp_path)), 0)


def test_a_file_that_was_changed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar10(tmp_path, monkeypatch)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"other")
    with pytest.raises(InputError, match=r"cifar10: no complete data set .*corrupted"):
        load(Data("cifar10", folder=str(tmp_path)), 0)


def test_an_image_of_the_list_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tinyimagenet(tmp_path, monkeypatch)
    (tmp_path / TINY / "val" / "images" / "val_2.JPEG").unlink()
    with pytest.raises(InputError, match=r"tinyimagenet: no complete data set .*val_2\.JPEG is missing"):
        load(Data("tinyimagenet", folder=str(tmp_path)), 0)


@pytest.mark.parametrize("line", ["val_0.JPEG", "val_0.JPEG\tn99\t0\t0\t1\t1"])
def test_a_line_of_the_list_that_names_no_class(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tinyimagenet(tmp_path, monkeypatch)
    (tmp_path / TINY / "val" / "val_annotations.txt").write_text(f"\n{line}\n")
    with pytest.raises(InputError, match=r"tinyimagenet: no complete data set .*\['val_0.JPEG'.*\] names no class"):
        load(Data("tinyimagenet", folder=str(tmp_path)), 0)


def test_nothing_is_downloaded_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(url: str, root: str, **_: Any) -> None:
        asked.append((url, root))
        write_tinyimagenet(Path(root), monkeypatch)

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", fetch)
    with pytest.raises(InputError):
        load(Data("tinyimagenet", folder=str(tmp_path)), 0)
    assert asked == []
    assert len(load(Data("tinyimagenet", folder=str(tmp_path)), 0, True).test) == 4
    assert asked == [("http://cs231n.stanford.edu/tiny-imagenet-200.zip", str(tmp_path))]


def test_digits_are_split_by_the_seed() -> None:
    first, second = load(Data("digits"), 0), load(Data("digits"), 1)
    assert (len(first.train), len(first.test), first.example.shape) == (1347, 450, (1, 1, 8, 8))
    assert not torch.equal(first.test[0][0], second.test[0][0])


@pytest.mark.parametrize("name", [*WRITERS, "digits"])
def test_the_plain_images_of_a_limited_set_are_plain(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores are measured on them: the same as those that are learnt from, in the same order, but not augmented."""
    if name != "digits":
        WRITERS[name][0](tmp_path, monkeypatch)
    whole = load(Data(name, folder=str(tmp_path)), 0)
    count = len(whole.plain)
    limited = load(Data(name, folder=str(tmp_path), limit=3), 0)
    for index, at in enumerate((0, count // 3, 2 * count // 3)):
        for _ in range(8):
            (x, y), (wanted, label) = limited.plain[index], whole.plain[at]
            assert x.equal(wanted) and y == label == limited.train[index][1]
    if name != "digits":  # which are not augmented
        seen = [limited.train[1][0] for _ in range(20)]
        assert any(not one.equal(seen[0]) for one in seen)
    unlimited = load(Data(name, folder=str(tmp_path), limit=count), 0)
    assert all(unlimited.plain[at][0].equal(whole.plain[at][0]) for at in range(min(count, 20)))
    assert len(limited.test) == len(whole.test)
