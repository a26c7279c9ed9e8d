"""Data sets by name: ``load(name)`` gives a Bundle with train, validation and test splits."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DataError, UnknownName
from . import sources
from .augment import NONE, Augment
from .bundle import ArraySplit, Batches, Bundle, FileSplit
from .files import CACHE_BYTES, median_size, read_all, scan

__all__ = ["ArraySplit", "Augment", "Batches", "Bundle", "FileSplit", "available", "load"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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
) -> Bundle:
    """Load a data set.

    name: see ``available()``. ``digits`` is embedded. The torchvision sets are looked for under ``root``
    (default: the environment variable TDLIB_DATA, else ~/.cache/tdlib) as NAME.npz or torchvision's files,
    else downloaded there. ``imagenet`` is a folder ROOT/imagenet (or ROOT itself) with train/ and val/.
    ``imagefolder:PATH`` has train/, [val/], test/ or directly one folder per class (then a fifth is the test
    set). ``npz:PATH`` holds arrays as MedMNIST names them (without test_images a fifth is the test set).
    seed, val_fraction: which part of each class of the training set is held out for validation (not where the
    data come with their own validation set).
    image_size: resize to this side; image folders: default the median shorter side, at most 224.
    limit: at most this many images per split, evenly over the classes (quick runs).
    mean, std: per-channel normalisation in [0, 1] pixel units, as numbers or as text ("0.485, 0.456, 0.406");
    default the usual constants for CIFAR and image files, else computed from the training split.

    Raises DataError before any training starts, UnknownName for unknown names.
    """
    if image_size is not None and image_size < 4:
        raise DataError(f"image_size must be at least 4, got {image_size}")
    if limit is not None and limit < 2:
        raise DataError(f"limit must be at least 2, got {limit}")
    mean, std = _numbers("mean", mean), _numbers("std", std)
    kind, _, path = name.partition(":")
    if kind == "imagefolder" and path:
        return _folder(name, Path(path).expanduser(), seed, val_fraction, image_size, limit, mean, std)
    if name == "imagenet":
        return _folder(name, _imagenet(root), seed, val_fraction, image_size or 224, limit, mean, std)
    augment = NONE
    if kind == "npz" and path:
        arrays = sources.npz(Path(path).expanduser())
        shape = arrays.train[0].shape
        augment = Augment(pad=max(1, shape[1] // 8), flip=False)
    elif name == "digits":
        arrays = sources.digits(seed)
    elif name in sources.TORCHVISION:
        arrays, source = sources.torchvision_set(name, root), sources.TORCHVISION[name]
        augment, mean, std = source.augment, mean or source.mean, std or source.std
    else:
        close = difflib.get_close_matches(name, available(), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UnknownName(f"unknown data set {name!r}.{hint} Valid: {', '.join(available())}")
    return _bundle(name, arrays, augment, seed, val_fraction, image_size, limit, mean, std)


def _numbers(name: str, value: Sequence[float] | str | None) -> Sequence[float] | None:
    """Numbers given as such or as text with commas."""
    if not isinstance(value, str):
        return value
    try:
        return [float(part) for part in value.split(",")]
    except ValueError as error:
        raise DataError(f'{name} must be numbers like "0.485, 0.456, 0.406", got {value!r}') from error


def _bundle(
    name: str,
    arrays: sources.Arrays,
    augment: Augment,
    seed: int,
    val_fraction: float,
    image_size: int | None,
    limit: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Bundle:
    train, val, test = arrays.train, arrays.val, arrays.test
    if test is None:
        train, test = _divide(train, 0.2, seed, "test")
    train = _limited(train, limit, seed)
    if val is None:
        train, val = _divide(train, val_fraction, seed, "validation")
    parts = [_resized(_limited(part, limit, seed), image_size) for part in (train, val, test)]
    computed_mean, computed_std = _moments(parts[0][0])
    mean, std = _constants(mean or computed_mean, std or computed_std, parts[0][0].shape[3])
    splits = [ArraySplit(images, labels, mean, std) for images, labels in parts]
    _, height, width, channels = splits[0].images.shape
    train_split, val_split, test_split = splits
    shape = (channels, height, width)
    return Bundle(name, arrays.classes, mean, std, shape, train_split, val_split, test_split, augment)


def _divide(
    part: tuple[Tensor, Tensor], fraction: float, seed: int, label: str
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    keep, held = sources.split_off(part[1], fraction, seed, label)
    return (part[0][keep], part[1][keep]), (part[0][held], part[1][held])


def _limited(part: tuple[Tensor, Tensor], limit: int | None, seed: int) -> tuple[Tensor, Tensor]:
    if limit is None or len(part[1]) <= limit:
        return part
    chosen = _choose(part[1], limit, seed)
    return part[0][chosen], part[1][chosen]


def _choose(labels: Tensor, limit: int, seed: int) -> Tensor:
    """``limit`` image numbers, classes in turn: sort a shuffle by its place within the class."""
    from .augment import stream

    order = torch.randperm(len(labels), generator=stream(seed, "limit"))
    shuffled = labels[order]
    place = torch.empty_like(order)
    for value in shuffled.unique().tolist():
        members = (shuffled == value).nonzero()[:, 0]
        place[members] = torch.arange(len(members))
    return order[torch.sort(place, stable=True).indices[:limit]].sort().values


def _resized(part: tuple[Tensor, Tensor], size: int | None) -> tuple[Tensor, Tensor]:
    images, labels = part
    if size is None or not len(labels) or images.shape[1:3] == (size, size):
        return part
    out = [
        F.interpolate(chunk.permute(0, 3, 1, 2).float(), (size, size), mode="bilinear", antialias=True)
        for chunk in images.split(1024)
    ]
    return torch.cat(
        [chunk.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1) for chunk in out]
    ), labels


def _moments(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel mean and standard deviation of [0, 1] pixels, exact (from a histogram)."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(images.shape[3]):
        counts = torch.bincount(images[..., channel].flatten(), minlength=256).double()
        mean = float((counts * values).sum() / counts.sum())
        means.append(mean)
        stds.append(max(float((counts * (values - mean) ** 2).sum() / counts.sum()) ** 0.5, 1e-3))
    return tuple(means), tuple(stds)


def _constants(
    mean: Sequence[float], std: Sequence[float], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    mean, std = tuple(float(m) for m in mean), tuple(float(s) for s in std)
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise DataError(
            f"mean and std need {channels} values, one per channel, std > 0; got {mean} and {std}"
        )
    return mean, std


def _imagenet(root: str | Path | None) -> Path:
    base = sources.data_root(root)
    for folder in (base / "imagenet", base):
        if (folder / "train").is_dir() and (folder / "val").is_dir():
            return folder
    raise DataError(
        f"imagenet was not found: looked for folders train/ and val/ (one sub-folder per class) in "
        f"{base / 'imagenet'} and {base}. It cannot be downloaded; set TDLIB_DATA or root= to where it is"
    )


def _folder(
    name: str,
    path: Path,
    seed: int,
    val_fraction: float,
    image_size: int | None,
    limit: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Bundle:
    """A Bundle of an image folder: in memory where the decoded images are small, else read by workers."""
    if not path.is_dir():
        raise DataError(f"{path} does not exist or is not a folder")
    flat = not (path / "train").is_dir()
    classes, paths, labels = scan(path if flat else path / "train")
    held: dict[str, tuple[list[Path], list[int]]] = {}
    for part, folders in {"val": ["val", "valid"], "test": ["test"]}.items():
        for folder in folders:
            if not flat and (path / folder).is_dir():
                held[part] = scan(path / folder, classes)[1:]
    if name == "imagenet":
        held = {"test": held["val"]}  # its public validation images are the test set of the literature
    train = (paths, labels)
    for part, fraction in (("test", 0.2), ("val", val_fraction)):
        if part == "val":
            train = _limited_files(train, limit, seed)
        if part not in held:
            keep, out = sources.split_off(torch.tensor(train[1]), fraction, seed, part)
            held[part] = _take(train, out)
            train = _take(train, keep)
    parts = [_limited_files(part, limit, seed) for part in (train, held["val"], held["test"])]
    size = image_size or median_size(parts[0][0])
    use_mean, use_std = _constants(mean or IMAGENET_MEAN, std or IMAGENET_STD, 3)
    splits: list[Any]
    if sum(len(part[1]) for part in parts) * size * size * 3 < CACHE_BYTES:
        splits = [ArraySplit(read_all(p, size), torch.tensor(y), use_mean, use_std) for p, y in parts]
        augment = Augment(pad=max(1, size // 8), mode="reflect", flip=True)
    else:
        splits = [FileSplit(p, y, size, use_mean, use_std) for p, y in parts]
        augment = Augment(flip=True, scale=0.25)
    train_split, val_split, test_split = splits
    shape = (3, size, size)
    return Bundle(name, classes, use_mean, use_std, shape, train_split, val_split, test_split, augment)


def _take(part: tuple[list[Path], list[int]], index: Tensor) -> tuple[list[Path], list[int]]:
    chosen = index.tolist()
    return [part[0][i] for i in chosen], [part[1][i] for i in chosen]


def _limited_files(
    part: tuple[list[Path], list[int]], limit: int | None, seed: int
) -> tuple[list[Path], list[int]]:
    if limit is None or len(part[1]) <= limit:
        return part
    return _take(part, _choose(torch.tensor(part[1]), limit, seed))
