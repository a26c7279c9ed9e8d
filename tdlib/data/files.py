"""Image folders: scanned once, kept as one tensor where that is small, else read by DataLoader workers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import DataError
from .augment import Augment, stream

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff"}
CACHE_BYTES = 2**30  # folders below this size (decoded) are kept in memory
BORDER = 8 / 7  # images are resized to size * BORDER before the centre crop of large sizes (256 -> 224)


def scan(folder: Path, classes: Sequence[str] | None = None) -> tuple[list[str], list[Path], list[int]]:
    """(class names, image paths, labels) of a folder of class folders, sorted. Raises DataError on an empty
    class.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; expected one sub-folder of images per class")
    names = sorted(
        entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )
    if len(names) < 2:
        raise DataError(f"{folder} needs at least two class folders, found {names or 'none'}")
    if classes is not None and names != list(classes):
        odd = sorted(set(names) ^ set(classes))
        raise DataError(f"{folder} has other classes than the training folder: {', '.join(odd[:5])}")
    paths, labels = [], []
    for label, name in enumerate(names):
        found = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in EXTENSIONS)
        if not found:
            raise DataError(f"class {name!r} is empty: no image files under {folder / name}")
        paths += found
        labels += [label] * len(found)
    return names, paths, labels


def median_size(paths: Sequence[Path], cap: int = 224) -> int:
    """Median of the shorter sides of (a sample of) the images, at most ``cap`` and at least 8."""
    sides = []
    for path in paths[:: max(1, len(paths) // 200)]:
        with _open(path) as opened:
            sides.append(min(opened.size))
    return int(min(cap, max(8, np.median(sides))))


def read(
    path: Path, size: int, augment: Augment | None = None, key: tuple[object, ...] = ()
) -> np.ndarray[Any, Any]:
    """One image as (size, size, 3) uint8: resized and centre-cropped, or a random area drawn by ``key``."""
    from PIL import Image

    with _open(path) as opened:
        try:
            image = opened.convert("RGB")
        except OSError as error:
            raise DataError(f"{path} cannot be decoded as an image: {error}") from error
    if augment is not None and augment.scale < 1:
        box = _random_area(image.size, augment.scale, stream(*key, path.name))
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    elif image.size != (size, size):
        target = round(size * BORDER) if size >= 128 else size
        ratio = target / min(image.size)
        width, height = (max(size, round(side * ratio)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    array = np.array(image)
    if (
        augment is not None
        and augment.flip
        and int(torch.randint(2, (1,), generator=stream(*key, path.name, 1)))
    ):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)


def read_all(paths: Sequence[Path], size: int) -> Tensor:
    """All images as one (N, size, size, 3) uint8 tensor."""
    out = np.empty((len(paths), size, size, 3), np.uint8)
    for i, path in enumerate(paths):
        out[i] = read(path, size)
    return torch.from_numpy(out)


class FileSplit(Dataset[tuple[Tensor, int]]):
    """Images that stay on disk. ``split[i]`` is (normalised centre crop (3, size, size), label)."""

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Sequence[int],
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.paths, self.labels = list(paths), torch.tensor(list(labels), dtype=torch.int64)
        self.size, self.mean, self.std = size, tuple(mean), tuple(std)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        from .bundle import normalise

        image = torch.from_numpy(read(self.paths[i], self.size)).float()
        return normalise(image[None], self.mean, self.std)[0], int(self.labels[i])

    def batches(
        self,
        parts: list[list[int]],
        augment: Augment,
        key: tuple[object, ...],
        device: torch.device,
        workers: int | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the given image numbers; workers decode, the device normalises."""
        from .bundle import normalise

        count = max(0, min(8, (os.cpu_count() or 1) - 1)) if workers is None else workers
        loader: DataLoader[Any] = DataLoader(
            _Raw(self, augment, key),
            batch_sampler=parts,
            num_workers=min(count, len(parts)),
            generator=stream(*key, "workers"),  # leaves the global random state alone
            pin_memory=device.type == "cuda",
        )
        for pixels, labels in loader:
            x = pixels.to(device, non_blocking=True).float()
            yield normalise(x, self.mean, self.std), labels.to(device, non_blocking=True)

    def digest(self) -> str:
        """SHA-256 of names, sizes and labels of the files (their contents are not read)."""
        sha = hashlib.sha256(str(self.size).encode())
        for path, label in zip(self.paths, self.labels.tolist(), strict=True):
            sha.update(f"{path.parent.name}/{path.name}:{path.stat().st_size}:{label}\n".encode())
        return sha.hexdigest()


class _Raw(Dataset[tuple[Tensor, int]]):
    """uint8 images of a FileSplit, augmented by (seed, epoch, file)."""

    def __init__(self, split: FileSplit, augment: Augment, key: tuple[object, ...]) -> None:
        self.split, self.augment, self.key = split, augment, key

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image = read(self.split.paths[i], self.split.size, self.augment, (*self.key, i))
        return torch.from_numpy(image), int(self.split.labels[i])


def _open(path: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(path)
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{path} cannot be read as an image: {error}") from error


def _random_area(
    size: tuple[int, int], scale: float, generator: torch.Generator
) -> tuple[float, float, float, float]:
    """A random box (left, top, right, bottom): area fraction in [scale, 1], aspect ratio in [3/4, 4/3]
    (log-uniform).
    """
    width, height = size
    a, b, c, d = torch.rand(4, generator=generator).tolist()
    area = width * height * (scale + (1 - scale) * a)
    aspect = (3 / 4) ** (1 - 2 * b)
    w, h = min(width, (area * aspect) ** 0.5), min(height, (area / aspect) ** 0.5)
    left, top = c * (width - w), d * (height - h)
    return left, top, left + w, top + h
