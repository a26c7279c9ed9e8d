"""Image folders: scanned once, decoded one image at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tdlib.data.augment import Augment, stream
from tdlib.errors import DataError

BORDER = 8 / 7  # large images are resized to size * BORDER before the centre crop (256 -> 224)


def scan(folder: Path, classes: Sequence[str] | None = None) -> tuple[list[str], list[Path], list[int]]:
    """(class names, image paths, labels) of a folder of class folders, sorted. Raises DataError on an empty
    class or, where `classes` are given, on others than those.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS  # slow to import, not needed for arrays

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
        found = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
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
    with _open(path) as opened:
        try:
            image = opened.convert("RGB")
        except OSError as error:
            raise DataError(f"{path} cannot be decoded as an image: {error}") from error
    if augment is not None and augment.scale < 1:
        box = random_area(image.size, augment.scale, stream(*key, path.name))
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    elif image.size != (size, size):
        target = round(size * BORDER) if size >= 128 else size
        ratio = target / min(image.size)
        width, height = (max(size, round(side * ratio)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    if augment is not None and augment.flip:
        if int(torch.randint(2, (1,), generator=stream(*key, path.name, 1))):
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(image)


def read_all(paths: Sequence[Path], size: int) -> Tensor:
    """All images as one (N, size, size, 3) uint8 tensor."""
    out = torch.empty(len(paths), size, size, 3, dtype=torch.uint8)
    for i, path in enumerate(paths):
        out[i] = torch.from_numpy(read(path, size))
    return out


def random_area(
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


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except OSError as error:  # also PIL's UnidentifiedImageError
        raise DataError(f"{path} cannot be read as an image: {error}") from error
