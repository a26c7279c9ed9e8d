"""Where data come from: scikit-learn, npz files, torchvision, image folders. Each source gives checked
parts.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
import zipfile
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tdlib import memory
from tdlib.data import names
from tdlib.data.augment import NONE, Augment
from tdlib.data.images import scan
from tdlib.data.parts import Part, divide
from tdlib.errors import DataError, MemoryLimitError, needs

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP_FLIP = Augment(pad=4, flip=True)
ARRAYS = ("train_images", "train_labels", "val_images", "val_labels", "test_images", "test_labels", "classes")


@dataclass
class Found:
    """A data set as it is stored. val and test may be absent; mean and std are the usual ones, if any;
    augment is what "auto" means for arrays.
    """

    train: Part
    val: Part | None
    test: Part | None
    classes: list[str]
    augment: Augment = NONE
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Source:
    """One torchvision data set: class name there, class names, "auto" augmentation, image shape (H, W, C),
    usual constants.
    """

    torchvision: str
    classes: list[str]
    augment: Augment
    shape: tuple[int, int, int]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


# Means and standard deviations of the CIFAR training pixels, as in most published recipes; the others are
# computed from the training split. MNIST is not augmented; house numbers must not be mirrored.
TORCHVISION = {
    "mnist": Source("MNIST", names.DIGITS, NONE, (28, 28, 1)),
    "fashion_mnist": Source("FashionMNIST", names.FASHION, Augment(pad=2, flip=True), (28, 28, 1)),
    "cifar10": Source(
        "CIFAR10", names.CIFAR10, CROP_FLIP, (32, 32, 3), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    ),
    "cifar100": Source(
        "CIFAR100", names.CIFAR100, CROP_FLIP, (32, 32, 3), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    ),
    "svhn": Source("SVHN", names.DIGITS, Augment(pad=4), (32, 32, 3)),
}


def data_root(root: str | Path | None) -> Path:
    """The folder of data sets: ``root``, else the environment variable TDLIB_DATA, else ~/.cache/tdlib."""
    found = root if root is not None else os.environ.get("TDLIB_DATA") or "~/.cache/tdlib"
    return Path(found).expanduser()


def digits() -> Found:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, 0..16 stretched to 0..255; a fifth (stratified, the
    same for every seed) is the test set.
    """
    data = needs("sklearn.datasets", "train").load_digits()
    pixels = np.rint(data.images * (255 / 16)).astype(np.uint8)
    train, test = divide(check(pixels, data.target, "digits", 10), 0.2, 0, "test")
    return Found(train, None, test, names.DIGITS)


def torchvision_set(name: str, root: str | Path | None) -> Found:
    """A torchvision data set: ROOT/NAME.npz if it exists, else torchvision's own folder under ROOT, else a
    download.
    """
    source, folder = TORCHVISION[name], data_root(root)
    file = folder / f"{name}.npz"
    if file.is_file():
        found = npz(file, source.classes)
        shape = tuple(found.train.items.shape[1:])
        if shape != source.shape:
            raise DataError(f"{file}: images are {shape}, {name} has {source.shape}")
    else:
        train, test = (_torchvision_part(name, folder, file, train) for train in (True, False))
        found = Found(train, None, test, source.classes)
    return replace(found, augment=source.augment, mean=source.mean, std=source.std)


def _torchvision_part(name: str, folder: Path, file: Path, train: bool) -> Part:
    import torchvision

    source = TORCHVISION[name]
    which: dict[str, Any] = {"train": train}
    if name == "svhn":
        which = {"split": "train" if train else "test"}
    try:
        with redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's complaint about how old pickles of CIFAR were written
            data = getattr(torchvision.datasets, source.torchvision)(folder, download=True, **which)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"{name} was not found: looked for {file} and torchvision's files under {folder}, and "
            f"downloading failed ({type(error).__name__}: {error}). Set TDLIB_DATA (or root=, data_dir=) "
            f"to a folder that holds them, or run once with network access; an .npz needs train_images, "
            f"train_labels, test_images and test_labels"
        ) from error
    pixels, labels = np.asarray(data.data), data.labels if name == "svhn" else data.targets
    if name == "svhn":
        pixels = pixels.transpose(0, 2, 3, 1)
    return check(pixels, np.asarray(labels), name, len(source.classes))


def npz(path: Path, classes: list[str] | None = None) -> Found:
    """An .npz as MedMNIST names its arrays: train_images, train_labels and optional val_*, test_*, classes.

    images: uint8, grey (N, H, W) or colour (N, H, W, 1 or 3); labels: integers (N,) or (N, 1). Raises
    DataError; MemoryLimitError where the arrays are larger than the memory.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist (looked in {path.parent.resolve()})")
    arrays = _arrays(path)
    for key in ("train_images", "train_labels"):
        if key not in arrays:
            raise DataError(f"{path} has no array {key!r}; it has {', '.join(sorted(arrays)) or 'none'}")
    if "classes" in arrays:
        classes = [str(name) for name in arrays["classes"].ravel()]
    count = len(classes) if classes else None
    train = check(arrays["train_images"], arrays["train_labels"], f"{path}: train", count, every_class=True)
    classes = classes or [str(i) for i in range(int(train.labels.max()) + 1)]
    held: dict[str, Part] = {}
    for part in ("val", "test"):
        if f"{part}_images" not in arrays:
            continue
        if f"{part}_labels" not in arrays:
            raise DataError(f"{path} has {part}_images but no {part}_labels")
        where = f"{path}: {part}"
        found = check(arrays[f"{part}_images"], arrays[f"{part}_labels"], where, len(classes))
        have, want = tuple(found.items.shape[1:]), tuple(train.items.shape[1:])
        if have != want:
            raise DataError(f"{where} images are {have}, train images {want}")
        held[part] = found
    augment = Augment(pad=max(1, train.items.shape[1] // 8))
    return Found(train, held.get("val"), held.get("test"), classes, augment)


def _arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Those of ARRAYS that an .npz holds, refused where they do not fit into memory."""
    try:
        with zipfile.ZipFile(path) as file:
            held = {name.removesuffix(".npy"): file.getinfo(name) for name in file.namelist()}
            entries = {key: held[key] for key in ARRAYS if key in held}
            size = sum(entry.file_size for entry in entries.values())
            memory.require(2 * size, f"unpacking {path}", "leave images out or make them smaller")
            return {key: _array(file, entry) for key, entry in entries.items()}
    except MemoryLimitError:
        raise
    except Exception as error:  # zipfile and numpy raise whatever a damaged file leads them to
        raise DataError(f"{path} cannot be read as an .npz of plain arrays: {error}") from error


def _array(file: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray[Any, Any]:
    """The array of one entry; numpy allocates what its header says, so that is first held against the entry's
    size.
    """
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with file.open(entry) as stream:
        shape, _, dtype = readers[np.lib.format.read_magic(stream)](stream)
        if math.prod(shape) * dtype.itemsize != entry.file_size - stream.tell():
            raise DataError(f"{entry.filename} is too short or too long for {dtype} of shape {shape}")
    with file.open(entry) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def check(
    images: np.ndarray[Any, Any],
    labels: np.ndarray[Any, Any],
    where: str,
    classes: int | None = None,
    every_class: bool = False,
) -> Part:
    """Images as (N, H, W, C) uint8, labels as (N,) int64 tensors. Raises DataError saying what is wrong."""
    if images.dtype != np.uint8:
        raise DataError(
            f"{where} images must be uint8 (0..255), not {images.dtype}: scale and convert them first"
        )
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        raise DataError(f"{where} images must be (N, H, W) or (N, H, W, 1 or 3), not {images.shape}")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(
            f"{where} labels must be integers of shape (N,) or (N, 1), not {labels.dtype} {labels.shape}"
        )
    if len(images) != len(labels):
        raise DataError(f"{where} has {len(images)} images but {len(labels)} labels")
    labels = labels.astype(np.int64)
    most = len(labels) if classes is None else classes  # no class is empty
    if int(labels.min()) < 0 or int(labels.max()) >= most:
        last = "the number of classes - 1" if classes is None else str(classes - 1)
        raise DataError(
            f"{where} labels are out of range: from {labels.min()} to {labels.max()}, expected 0 to {last}"
        )
    present = np.bincount(labels, minlength=classes or 0)
    if every_class and (present == 0).any():
        empty = np.flatnonzero(present == 0)[:5].tolist()
        raise DataError(f"{where}: empty class, no images with label {', '.join(map(str, empty))}")
    if every_class and len(present) < 2:
        raise DataError(f"{where} has one class only, a classifier needs at least two")
    return Part(torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels))


def folder(path: Path) -> Found:
    """An image folder with train/, [val/ or valid/], [test/] or, without train/, one folder per class. Where
    there are images and no folders, they have no labels, and there are no classes.
    """
    if not path.is_dir():
        raise DataError(f"{path} does not exist or is not a folder")
    flat = not (path / "train").is_dir()
    classes, paths, labels = scan(path if flat else path / "train")
    held: dict[str, Part] = {}
    for part, names_of_it in {"val": ("val", "valid"), "test": ("test",)}.items():
        for name in names_of_it:
            if not flat and (path / name).is_dir():
                _, files, answers = scan(path / name, classes)
                held[part] = Part(files, torch.tensor(answers))
    train = Part(paths, torch.tensor(labels))
    return Found(train, held.get("val"), held.get("test"), classes, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def imagenet(root: str | Path | None) -> Found:
    """ImageNet as its folders train/ and val/; its public validation images are the literature's test set."""
    base = data_root(root)
    for path in (base / "imagenet", base):
        if (path / "train").is_dir() and (path / "val").is_dir():
            found = folder(path)
            return replace(found, val=None, test=found.val)
    raise DataError(
        f"imagenet was not found: looked for folders train/ and val/ (one sub-folder per class) in "
        f"{base / 'imagenet'} and {base}. It cannot be downloaded; set TDLIB_DATA or root= to where it is"
    )
