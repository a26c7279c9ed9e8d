"""A data set with train, validation and test splits; batches are a pure function of (seed, epoch, step)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tdlib.data.augment import NONE, Augment, stream
from tdlib.data.splits import ArraySplit, FileSplit
from tdlib.errors import DataError, unknown

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Bundle:
    """What ``tdlib.data.load`` returns.

    mean, std: per channel, in units of the [0, 1] pixel range. input_shape: (C, H, W) of one image.
    train, val, test: torch Datasets of (normalised image (C, H, W), label). Model selection uses val, never
    test. Images without labels: no classes, and every label -1.
    augment: what "auto" means for this data. interpolation: how images were brought to their size.
    """

    name: str
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_shape: tuple[int, int, int]
    train: ArraySplit | FileSplit
    val: ArraySplit | FileSplit
    test: ArraySplit | FileSplit
    augment: Augment = NONE
    interpolation: str = "bilinear"

    @property
    def description(self) -> dict[str, Any]:
        """What a network that is trained on these data must remember of them, as JSON: classes (None
        where there are no labels), input_shape, mean, std and interpolation."""
        return {
            "classes": list(self.classes) or None, "input_shape": list(self.input_shape),
            "mean": list(map(float, self.mean)), "std": list(map(float, self.std)),
            "interpolation": self.interpolation,
        }  # fmt: skip

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all splits, their normalisation and class names: equal data, equal fingerprint."""
        sha = hashlib.sha256(repr((self.classes, self.mean, self.std)).encode())
        for split in (self.train, self.val, self.test):
            sha.update(split.digest().encode())
        return sha.hexdigest()

    def require_labels(self, purpose: str) -> None:
        """Raises DataError where the images have no labels, which the `purpose` needs."""
        if not self.classes:
            raise DataError(
                f"{purpose} needs labels, and {self.name} has none: put the images into one folder per "
                "class, or use what needs no labels (the methods direct, distribution-aware and sequential)"
            )

    def split(self, name: str) -> ArraySplit | FileSplit:
        """The split called ``train``, ``val`` or ``test``. Raises UnknownName."""
        if name not in SPLITS:
            raise unknown("split", name, SPLITS)
        return getattr(self, name)

    def steps(self, split: str, batch_size: int, *, drop_last: bool = False) -> int:
        """Batches in one epoch of ``split``."""
        n = len(self.split(split))
        return max(1, n // batch_size) if drop_last and n else -(-n // batch_size)

    def batches(
        self,
        split: str,
        batch_size: int,
        *,
        device: str | torch.device = "cpu",
        seed: int = 0,
        epoch: int = 0,
        augment: Augment | str | None = None,
        shuffle: bool | None = None,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        drop_last: bool | None = None,
        workers: int | None = None,
    ) -> Batches:
        """Iterate (x float32 (N, C, H, W) normalised, y int64 (N,)) on ``device``; ``len()`` is the steps
        left.

        Order and augmentation depend on (seed, epoch, step) alone: ``start_step`` continues an epoch exactly.
        In a run of ``world`` processes each takes its slice ``rank::world`` of every global batch of
        ``batch_size``.
        augment: an Augment, "auto" (this data's own), or None/"none". shuffle, drop_last: default only for
        train. workers: processes that decode images that stay on disk.

        Raises DataError, and UnknownName for a split.
        """
        if batch_size < 1 or not 0 <= rank < world:
            raise DataError(f"need batch_size >= 1 and 0 <= rank < world, got {batch_size}, {rank}, {world}")
        source, train = self.split(split), split == "train"
        n = len(source)
        steps = self.steps(split, batch_size, drop_last=train if drop_last is None else drop_last)
        order = torch.arange(n)
        if train if shuffle is None else shuffle:
            order = torch.randperm(n, generator=stream(seed, epoch, "order"))
        firsts = [step * batch_size for step in range(start_step, steps)]
        slices = [slice(first + rank, min(first + batch_size, n), world) for first in firsts]
        return Batches(
            source, order, slices, self.resolve(augment), (seed, epoch), torch.device(device), workers
        )

    def resolve(self, augment: Augment | str | None) -> Augment:
        """The Augment that ``augment`` stands for."""
        if isinstance(augment, Augment):
            return augment
        if augment not in (None, "auto", "none"):
            raise DataError(f"unknown augment {augment!r}; valid: an Augment, 'auto', 'none' or None")
        return self.augment if augment == "auto" else NONE


@dataclass(frozen=True)
class Batches:
    """One epoch of one split: the batches ``order[slice]``, see ``Bundle.batches``."""

    data: ArraySplit | FileSplit
    order: Tensor
    slices: list[slice]
    augment: Augment
    key: tuple[int, int]  # seed and epoch
    device: torch.device
    workers: int | None

    def __len__(self) -> int:
        return len(self.slices)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.data.batches(self.order, self.slices, self.augment, self.key, self.device, self.workers)
