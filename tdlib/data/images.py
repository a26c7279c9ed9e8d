"""Image folders: scanned once, decoded one image at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from tdlib.data.augment import Augment, stream
from tdlib.errors import DataError

BORDER = 8 / 7  # large images are resized to size * BORDER before the centre crop (256 -> 224)
ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # as in torchvision
UNLABELLED = -1  # the label of images that have none
INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def scan(folder: Path, classes: Sequence[str] | None = None) -> tuple[list[str], list[Path], list[int]]:
    """(class names, image paths, labels) of a folder of class folders, sorted; of a folder of images alone
    (no names, image paths, UNLABELLED each). Raises DataError on an empty class or, where `classes` are
    given, on others than those.
    """
    names = sorted(
        entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )
    alone = [] if names else _images(folder)
    if len(names) < 2 and not alone:
        raise DataError(
            f"{folder} needs at least two class folders, or images and no folders where there are no labels; "
            f"found {names or 'neither'}"
        )
    if classes is not None and names != list(classes):
        odd = sorted(set(names) ^ set(classes))
        raise DataError(f"{folder} has other classes than the training folder: {', '.join(odd[:5])}")
    paths, labels = alone, [UNLABELLED] * len(alone)
    for label, name in enumerate(names):
        found = _images(folder / name)
        if not found:
            endings = ", ".join(ENDINGS)
            raise DataError(f"class {name!r} ({folder / name}) is empty: no files that end in {endings}")
        paths += found
        labels += [label] * len(found)
    return names, paths, labels


def _images(folder: Path) -> list[Path]:
    """The image files under a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)


def median_size(paths: Sequence[Path], cap: int = 224) -> int:
    """Median of the shorter sides of (a sample of) the images, at most ``cap`` and at least 8."""
    sides = []
    for path in paths[:: max(1, len(paths) // 200)]:
        with _open(path) as opened:
            sides.append(min(opened.size))  # the same for an image that lies on its side
    return int(min(cap, max(8, np.median(sides))))


def decode(path: Path) -> Image.Image:
    """The image as RGB with 8 bits per channel, upright as its EXIF tag says.

    16-bit grey is scaled (65535 becomes 255), a palette looked up, CMYK converted; an alpha channel is left
    out, what lies under it is seen. Raises DataError for images of floating-point or 32-bit numbers, whose
    range no file says, and for what cannot be decoded (damaged, cut off, too many pixels).
    """
    with _open(path) as opened:
        mode = opened.mode
        deep = mode.startswith("I;16") or (mode == "I" and opened.format in ("PNG", "PPM"))
        if mode in ("F", "I") and not deep:
            raise DataError(
                f"{path} holds {'floating-point' if mode == 'F' else '32-bit'} numbers (mode {mode!r}), and "
                "which of them is white is not known: save it with 8 or 16 bits per channel"
            )
        try:
            image = ImageOps.exif_transpose(opened)
            if deep:
                image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
            elif mode == "P":
                image = image.convert("RGBA")  # directly to RGB, Pillow warns of transparent colours
            return image.convert("RGB")
        except Exception as error:  # the decoders raise whatever a damaged file leads them to
            raise DataError(f"{path} (mode {mode!r}) cannot be decoded as an image: {error}") from error


def read(
    path: Path,
    size: int,
    augment: Augment | None = None,
    key: tuple[object, ...] = (),
    interpolation: str = "bilinear",
) -> np.ndarray[Any, Any]:
    """One image as (size, size, 3) uint8: resized and centre-cropped, or a random area drawn by ``key``."""
    image, resample = decode(path), INTERPOLATIONS[interpolation]
    if augment is not None and augment.scale < 1:
        box = random_area(image.size, augment.scale, stream(*key, path.name))
        image = image.resize((size, size), resample, box=box)
    elif image.size != (size, size):
        target = round(size * BORDER) if size >= 128 else size
        ratio = target / min(image.size)
        width, height = (max(size, round(side * ratio)) for side in image.size)
        if width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
            sides = f"{image.width} x {image.height}"
            raise DataError(f"{path} is too narrow to be brought to {size} pixels: it has {sides}")
        image = image.resize((width, height), resample)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    if augment is not None and augment.flip:
        if int(torch.randint(2, (1,), generator=stream(*key, path.name, 1))):
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(image)


def read_all(paths: Sequence[Path], size: int, interpolation: str = "bilinear") -> Tensor:
    """All images as one (N, size, size, 3) uint8 tensor."""
    out = torch.empty(len(paths), size, size, 3, dtype=torch.uint8)
    for i, path in enumerate(paths):
        out[i] = torch.from_numpy(read(path, size, interpolation=interpolation))
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
    except Exception as error:  # not an image, a bomb, or whatever its damaged header leads Pillow to
        raise DataError(f"{path} cannot be read as an image: {error}") from error
