"""Grids of the distribution-aware chapter's experiments with a record for every cell, and images for them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tdbook.records import parameter_hash, read_record, record
from tdbook.sigma_study import TRANSFER, Study
from tdlib.data import IMAGENET_MEAN, IMAGENET_STD, ArraySplit, Bundle
from tdlib.errors import DataError

CHAPTER = "distribution_aware"


def sweep(
    study: Study,
    variants: Sequence[str],
    formats: Sequence[str],
    ratios: Sequence[float],
    by: str,
    of: str = "network",
    *,
    parameters: Mapping[str, Any] | None = None,
    scale: str = "quick",
    directory: str | Path | None = None,
    notes: str | None = None,
) -> list[dict[str, Any]]:
    """Rows of `Study.run` over the grid. With `parameters` (what identifies the run beside the grid) every
    row becomes a record as soon as it is there, and rows whose record exists are read instead of run: a
    stopped sweep continues."""
    rows = []
    folder = Path(directory or os.environ.get("TDLIB_RECORDS") or "book/results")
    for format in formats:
        for ratio in ratios:
            for variant in variants:
                full = {
                    **(parameters or {}),
                    **_identity(variant),
                    "format": format,
                    "ratio": ratio,
                    "by": by,
                    "of": of,
                }
                path = folder / f"{CHAPTER}-{parameter_hash(full)}.json"
                if parameters is not None and path.is_file():
                    found = read_record(path)
                    rows.append(full | found["metrics"] | {"ranks": found["tables"]["ranks"]})
                    continue
                row = study.run(variant, format, ratio, by, of) | _identity(variant)
                rows.append(row)
                if parameters is not None:
                    metrics = {k: v for k, v in row.items() if k not in full and k != "ranks"}
                    ranks = [{"layer": n, "ranks": r} for n, r in row["ranks"].items()]
                    record(
                        CHAPTER,
                        full,
                        metrics,
                        directory=folder,
                        scale=scale,
                        device=study.device,
                        data=study.data,
                        wall_seconds=row["seconds"],
                        tables={"ranks": ranks},
                        notes=notes,
                    )
    return rows


def _identity(variant: str) -> dict[str, str]:
    """How a record names the variant."""
    if variant.startswith(TRANSFER):
        return {"method": "transfer", "calibration": variant.removeprefix(TRANSFER)}
    return {"method": variant}


def halves(folder: str | Path) -> Bundle:
    """A folder with one sub-folder per class, named so that their order is that of the network's outputs:
    classes with even index for calibration (train), with odd index for evaluation (test). Images as they are,
    ImageNet's constants.

    For collections with about one image a class, where a class cannot be divided. Raises: DataError.
    """
    from PIL import Image

    classes = sorted(p for p in Path(folder).expanduser().iterdir() if p.is_dir())
    found: list[tuple[int, np.ndarray]] = []
    for index, place in enumerate(classes):
        for file in sorted(place.iterdir()):
            with Image.open(file) as image:
                found.append((index, np.asarray(image.convert("RGB"))))
    shapes = {a.shape for _, a in found}
    if len(shapes) != 1:
        raise DataError(
            f"{folder}: expected images of one size in class folders, found sizes {sorted(shapes) or 'none'}"
        )
    parts = []
    for odd in (0, 1):
        part = [(i, a) for i, a in found if i % 2 == odd]
        images, labels = np.stack([a for _, a in part]), torch.tensor([i for i, _ in part])
        parts.append(ArraySplit(torch.from_numpy(images), labels, IMAGENET_MEAN, IMAGENET_STD))
    empty = ArraySplit(parts[0].images[:0], parts[0].labels[:0], IMAGENET_MEAN, IMAGENET_STD)
    height, width, _ = found[0][1].shape
    return Bundle(
        "imagenet-sample",
        [p.name for p in classes],
        IMAGENET_MEAN,
        IMAGENET_STD,
        (3, height, width),
        parts[0],
        empty,
        parts[1],
    )
