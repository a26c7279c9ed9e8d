"""A data set with train, validation and test splits; batches are a pure function of (seed, epoch, step)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import DataError
from .augment import NONE, Augment, draw, gather, stream
from .files import FileSplit


class ArraySplit(Dataset[tuple[Tensor, int]]):
    """Images held as one uint8 tensor (N, H, W, C), labels (N,) int64. ``split[i]`` is (normalised image,
    label).
    """

    def __init__(self, images: Tensor, labels: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
        self.images, self.labels = images.contiguous(), labels.to(torch.int64)
        self.mean, self.std = tuple(mean), tuple(std)
        self._placed: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        image = normalise(self.images[i][None].float(), self.mean, self.std)[0]
        return image, int(self.labels[i])

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(images, labels) on ``device``, copied once."""
        if device not in self._placed:
            self._placed[device] = (self.images.to(device), self.labels.to(device))
        return self._placed[device]

    def digest(self) -> str:
        """SHA-256 of the images and labels."""
        sha = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        sha.update(self.images.numpy().data)
        sha.update(self.labels.numpy().data)
        return sha.hexdigest()


def normalise(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(N, H, W, C) pixels 0..255 -> (N, C, H, W) float32 in channels_last layout, (x / 255 - mean) / std per
    channel.
    """
    scale = torch.tensor([1 / (255 * s) for s in std]).to(x.device, non_blocking=True)
    offset = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).to(x.device, non_blocking=True)
    return torch.addcmul(offset, x, scale).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Bundle:
    """What ``tdlib.data.load`` returns.

    mean, std: per channel, in units of the [0, 1] pixel range. input_shape: (C, H, W) of one image.
    train, val, test: torch Datasets of (normalised image (C, H, W), label). Model selection uses val, never
    test.
    augment: what "auto" means for this data.
    """

    name: str
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_shape: tuple[int, int, int]
    train: ArraySplit | FileSplit
    val: ArraySplit | FileSplit
    test: ArraySplit | FileSplit
    augment: Augment = field(default=NONE)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all splits, their normalisation and class names: equal data, equal fingerprint."""
        sha = hashlib.sha256(repr((self.classes, self.mean, self.std)).encode())
        for split in (self.train, self.val, self.test):
            sha.update(split.digest().encode())
        return sha.hexdigest()

    def split(self, name: str) -> ArraySplit | FileSplit:
        """The split called ``train``, ``val`` or ``test``."""
        if name not in ("train", "val", "test"):
            raise DataError(f"unknown split {name!r}; valid: train, val, test")
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
        train.
        """
        if batch_size < 1 or not 0 <= rank < world:
            raise DataError(f"need batch_size >= 1 and 0 <= rank < world, got {batch_size}, {rank}, {world}")
        train = split == "train"
        return Batches(
            data=self.split(split),
            batch_size=batch_size,
            device=torch.device(device),
            seed=seed,
            epoch=epoch,
            augment=self.resolve(augment),
            shuffle=train if shuffle is None else shuffle,
            rank=rank,
            world=world,
            start=start_step,
            steps=self.steps(split, batch_size, drop_last=train if drop_last is None else drop_last),
            workers=workers,
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
    """One epoch of one split, see ``Bundle.batches``."""

    data: ArraySplit | FileSplit
    batch_size: int
    device: torch.device
    seed: int
    epoch: int
    augment: Augment
    shuffle: bool
    rank: int
    world: int
    start: int
    steps: int
    workers: int | None

    def __len__(self) -> int:
        return max(0, self.steps - self.start)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n = len(self.data)
        order = torch.randperm(n, generator=stream(self.seed, self.epoch, "order")) if self.shuffle else None
        if isinstance(self.data, FileSplit):
            plain = torch.arange(n) if order is None else order
            parts = [plain[self._slice(step, n)].tolist() for step in range(self.start, self.steps)]
            key = (self.seed, self.epoch)
            yield from self.data.batches(parts, self.augment, key, self.device, self.workers)
            return
        images, labels = self.data.on(self.device)
        draws = None
        if self.augment != NONE:
            draws = draw(n, self.augment, self.seed, self.epoch).to(self.device, non_blocking=True)
        if order is not None:
            order = order.to(self.device, non_blocking=True)
        for step in range(self.start, self.steps):
            part = self._slice(step, n)
            index = torch.arange(n, device=self.device)[part] if order is None else order[part]
            x = gather(images, index, None if draws is None else draws[part], self.augment)
            yield normalise(x, self.data.mean, self.data.std), labels[index]

    def _slice(self, step: int, n: int) -> slice:
        first = step * self.batch_size
        return slice(first + self.rank, min(first + self.batch_size, n), self.world)
