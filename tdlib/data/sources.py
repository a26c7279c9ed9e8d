"""Where arrays come from: scikit-learn, npz files, torchvision. Each source gives checked uint8 arrays."""

from __future__ import annotations

import os
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from . import names
from .augment import NONE, Augment

CROP_FLIP = Augment(pad=4, flip=True)


@dataclass
class Arrays:
    """Splits of a data set as (images (N, H, W, C) uint8, labels (N,) int64); val and test may be absent."""

    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor] | None
    test: tuple[Tensor, Tensor] | None
    classes: list[str]


@dataclass(frozen=True)
class Source:
    """One torchvision data set: class name there, class names, "auto" augmentation, usual constants, image
    shape.
    """

    torchvision: str
    classes: list[str]
    augment: Augment
    shape: tuple[int, int, int]  # (H, W, C)
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


def digits(seed: int) -> Arrays:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, 0..16 stretched to 0..255; a fifth (stratified) is
    the test set.

    The test set is the same for every seed.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = np.rint(data.images * (255 / 16)).astype(np.uint8)
    images, labels = check(pixels, data.target, "digits", 10)
    keep, held = split_off(labels, 0.2, seed=0)
    return Arrays((images[keep], labels[keep]), None, (images[held], labels[held]), names.DIGITS)


def torchvision_set(name: str, root: str | Path | None) -> Arrays:
    """A torchvision data set: ROOT/NAME.npz if it exists, else torchvision's own folder under ROOT, else a
    download.
    """
    source, folder = TORCHVISION[name], data_root(root)
    file = folder / f"{name}.npz"
    if file.is_file():
        arrays = npz(file, source.classes)
        if tuple(arrays.train[0].shape[1:]) != source.shape:
            raise DataError(
                f"{file}: images are {tuple(arrays.train[0].shape[1:])}, {name} has {source.shape}"
            )
        return arrays
    import torchvision

    make = getattr(torchvision.datasets, source.torchvision)

    def both(download: bool) -> list[Any]:
        with warnings.catch_warnings():  # numpy's complaint about how old pickles of CIFAR were written
            warnings.simplefilter("ignore")
            if name == "svhn":
                return [make(folder, split=part, download=download) for part in ("train", "test")]
            return [make(folder, train=part, download=download) for part in (True, False)]

    try:
        parts = both(download=False)
    except (RuntimeError, OSError):
        parts = _download(name, folder, file, both)
    return Arrays(
        _torchvision_arrays(parts[0], name, source),
        None,
        _torchvision_arrays(parts[1], name, source),
        source.classes,
    )


def _download(name: str, folder: Path, file: Path, both: Callable[[bool], list[Any]]) -> list[Any]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return both(True)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"{name} was not found: looked for {file} and torchvision's files under {folder}, and "
            f"downloading failed ({type(error).__name__}: {error}). Set TDLIB_DATA (or root=, data_dir=) "
            f"to a folder that holds them, or run once with network access; an .npz needs train_images, "
            f"train_labels, test_images and test_labels"
        ) from error


def _torchvision_arrays(part: Any, name: str, source: Source) -> tuple[Tensor, Tensor]:
    pixels = np.asarray(part.data)
    if name == "svhn":
        pixels = pixels.transpose(0, 2, 3, 1)
    labels = np.asarray(part.targets if hasattr(part, "targets") else part.labels)
    return check(pixels, labels, name, len(source.classes))


def npz(path: Path, classes: list[str] | None = None) -> Arrays:
    """An .npz as MedMNIST names its arrays: train_images, train_labels and optional val_*, test_*, classes.

    images: uint8, grey (N, H, W) or colour (N, H, W, 1 or 3); labels: integers (N,) or (N, 1). Raises
    DataError.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist (looked in {path.parent.resolve()})")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, AttributeError) as error:
        raise DataError(f"{path} cannot be read as an .npz of plain arrays: {error}") from error
    for key in ("train_images", "train_labels"):
        if key not in arrays:
            raise DataError(f"{path} has no array {key!r}; it has {', '.join(sorted(arrays)) or 'none'}")
    if "classes" in arrays:
        classes = [str(name) for name in arrays["classes"].ravel()]
    where = f"{path}: train"
    train = check(
        arrays["train_images"],
        arrays["train_labels"],
        where,
        len(classes) if classes else None,
        every_class=True,
    )
    classes = classes or [str(i) for i in range(int(train[1].max()) + 1)]
    held: list[tuple[Tensor, Tensor] | None] = []
    for part in ("val", "test"):
        if f"{part}_images" not in arrays:
            held.append(None)
            continue
        if f"{part}_labels" not in arrays:
            raise DataError(f"{path} has {part}_images but no {part}_labels")
        found = check(arrays[f"{part}_images"], arrays[f"{part}_labels"], f"{path}: {part}", len(classes))
        if found[0].shape[1:] != train[0].shape[1:]:
            raise DataError(
                f"{path}: {part} images are {tuple(found[0].shape[1:])}, "
                f"train images {tuple(train[0].shape[1:])}"
            )
        held.append(found)
    return Arrays(train, held[0], held[1], classes)


def check(
    images: np.ndarray[Any, Any],
    labels: np.ndarray[Any, Any],
    where: str,
    classes: int | None = None,
    every_class: bool = False,
) -> tuple[Tensor, Tensor]:
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
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{where} labels must be integers of shape (N,) or (N, 1), not {labels.dtype} {labels.shape}"
        )
    if len(images) != len(labels):
        raise DataError(f"{where} has {len(images)} images but {len(labels)} labels")
    labels = labels.astype(np.int64)
    if int(labels.min()) < 0 or (classes is not None and int(labels.max()) >= classes):
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
    return torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels)


def split_off(labels: Tensor, fraction: float, seed: int, label: str = "validation") -> tuple[Tensor, Tensor]:
    """(kept, held out) sorted image numbers: ``fraction`` of each class, drawn by ``seed``, at least one kept
    each.
    """
    from .augment import stream

    if not 0 <= fraction < 1:
        raise DataError(f"the {label} fraction must be in [0, 1), not {fraction}")
    order = torch.randperm(len(labels), generator=stream(seed, "split"))
    held = []
    for value in labels.unique().tolist():
        members = order[labels[order] == value]
        held.append(members[: min(round(len(members) * fraction), len(members) - 1)])
    out = torch.cat(held).sort().values
    mask = torch.ones(len(labels), dtype=torch.bool)
    mask[out] = False
    return mask.nonzero()[:, 0], out
