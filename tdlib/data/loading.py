"""``load``: find a data set, divide it, bring it to one size, normalise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tdlib import memory
from tdlib.data import sources
from tdlib.data.augment import Augment
from tdlib.data.bundle import Bundle
from tdlib.data.images import INTERPOLATIONS, median_size, read_all
from tdlib.data.parts import Part, divide, limited
from tdlib.data.splits import ArraySplit, FileSplit
from tdlib.errors import DataError, unknown

CACHE_BYTES = 2**30  # image folders below this size (decoded) are kept in memory


def available() -> list[str]:
    """Names that ``load`` knows; the last two take a path after the colon."""
    return ["digits", *sources.TORCHVISION, "imagenet", "imagefolder:PATH", "npz:PATH"]


def load(
    name: str,
    root: str | Path | None = None,
    *,
    seed: int = 0,
    val_fraction: float = 0.1,
    image_size: int | None = None,
    limit: int | None = None,
    mean: Sequence[float] | str | None = None,
    std: Sequence[float] | str | None = None,
    interpolation: str = "bilinear",
) -> Bundle:
    """Load a data set.

    name: see ``available()``. ``digits`` comes with scikit-learn. The torchvision sets are looked for under
    ``root`` (default: the environment variable TDLIB_DATA, else ~/.cache/tdlib) as NAME.npz or torchvision's
    files, else downloaded there. ``imagenet`` is a folder ROOT/imagenet (or ROOT itself) with train/ and
    val/. ``imagefolder:PATH`` has train/, [val/], test/ or directly one folder per class (then a fifth is the
    test set). Where images lie there without class folders, they have no labels, which serves methods that
    need none: ``classes`` is empty and every label -1. Images are read upright, as RGB with 8 bits per
    channel; 16 bits are scaled, an alpha channel is left out. ``npz:PATH`` holds arrays as MedMNIST names
    them (without test_images a fifth is the test set).
    seed, val_fraction: which part of each class of the training set is held out for validation (not where the
    data come with their own validation set).
    image_size: resize to this side; image folders: default the median shorter side, at most 224.
    limit: at most this many images per split, evenly over the classes (quick runs).
    mean, std: per-channel normalisation in [0, 1] pixel units, as numbers or as text ("0.485, 0.456, 0.406");
    default the usual constants for CIFAR and image files, else computed from the training split.
    interpolation: how images are resized, "bilinear" or "bicubic".

    Raises DataError before any training starts, MemoryLimitError, UnknownName for unknown names.
    """
    if image_size is not None and image_size < 4:
        raise DataError(f"image_size must be at least 4, got {image_size}")
    if limit is not None and limit < 2:
        raise DataError(f"limit must be at least 2, got {limit}")
    if interpolation not in INTERPOLATIONS:
        raise unknown("interpolation", interpolation, INTERPOLATIONS)
    mean, std = _numbers("mean", mean), _numbers("std", std)
    found = _find(name, root)

    train, val, test = found.train, found.val, found.test
    if test is None:
        train, test = divide(train, 0.2, seed, "test")
    train = limited(train, limit, seed)
    if val is None:
        train, val = divide(train, val_fraction, seed, "validation")
    parts = [limited(part, limit, seed) for part in (train, val, test)]

    augment = found.augment
    if isinstance(train.items, list):
        size = image_size or (224 if name == "imagenet" else median_size(parts[0].items))
        if sum(map(len, parts)) * size * size * 3 < CACHE_BYTES:
            parts = [Part(read_all(part.items, size, interpolation), part.labels) for part in parts]
            augment = Augment(pad=max(1, size // 8), mode="reflect", flip=True)
        else:
            augment = Augment(flip=True, scale=0.25)
    elif image_size is not None:
        parts = [Part(_resized(part.items, image_size, interpolation), part.labels) for part in parts]

    mean, std = mean or found.mean, std or found.std
    if mean is None or std is None:
        computed = _moments(parts[0].items)
        mean, std = mean or computed[0], std or computed[1]
    mean, std = tuple(map(float, mean)), tuple(map(float, std))
    splits: list[ArraySplit | FileSplit] = [
        FileSplit(part.items, part.labels, size, mean, std, interpolation)
        if isinstance(part.items, list)
        else ArraySplit(part.items, part.labels, mean, std)
        for part in parts
    ]
    shape = splits[0].shape
    fits = len(mean) == len(std) == shape[0] and all(map(math.isfinite, mean + std))
    if not fits or min(std) <= 0:
        raise DataError(
            f"mean and std need {shape[0]} numbers, one for each of {name}'s channels, std > 0; "
            f"got {mean} and {std}"
        )
    return Bundle(
        name, found.classes, mean, std, shape, splits[0], splits[1], splits[2], augment, interpolation
    )


def _find(name: str, root: str | Path | None) -> sources.Found:
    """The data set of this name, as it is stored."""
    kind, _, path = name.partition(":")
    if kind == "imagefolder" and path:
        return sources.folder(Path(path).expanduser())
    if kind == "npz" and path:
        return sources.npz(Path(path).expanduser())
    if name == "imagenet":
        return sources.imagenet(root)
    if name == "digits":
        return sources.digits()
    if name in sources.TORCHVISION:
        return sources.torchvision_set(name, root)
    raise unknown("data set", name, available())


def _numbers(name: str, value: Sequence[float] | float | str | None) -> Sequence[float] | None:
    """Numbers given as such, one alone, or as text with commas."""
    if isinstance(value, int | float):
        return [float(value)]
    if not isinstance(value, str):
        return value
    try:
        return [float(part) for part in value.split(",")]
    except ValueError as error:
        raise DataError(f'{name} must be numbers like "0.485, 0.456, 0.406", got {value!r}') from error


def _resized(images: Tensor, size: int, interpolation: str) -> Tensor:
    """(N, H, W, C) uint8 -> (N, size, size, C) uint8."""
    if not len(images) or images.shape[1:3] == (size, size):
        return images
    need = len(images) * size * size * images.shape[3]
    memory.require(2 * need, f"{len(images)} images of {size} pixels", "choose a smaller image_size")
    chunks = []
    for chunk in images.split(1024):
        pixels = chunk.permute(0, 3, 1, 2).float()
        pixels = F.interpolate(pixels, (size, size), mode=interpolation, antialias=True)
        chunks.append(pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1))
    return torch.cat(chunks)


def _moments(images: Tensor) -> tuple[list[float], list[float]]:
    """Per-channel mean and standard deviation of [0, 1] pixels, exact (from a histogram)."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(images.shape[3]):
        counts = torch.bincount(images[..., channel].flatten(), minlength=256).double()
        means.append(float((counts * values).sum() / counts.sum()))
        variance = float((counts * (values - means[-1]) ** 2).sum() / counts.sum())
        stds.append(max(variance**0.5, 1e-3))
    return means, stds
