"""The two kinds of split: images held as one tensor, and images that stay on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tdlib.data.augment import NONE, Augment, draw, gather, stream
from tdlib.data.images import read


def normalise(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(N, H, W, C) pixels 0..255 -> (N, C, H, W) float32 in channels_last layout, (x / 255 - mean) / std per
    channel.
    """
    scale = torch.tensor([1 / (255 * s) for s in std]).to(x.device, non_blocking=True)
    offset = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).to(x.device, non_blocking=True)
    return torch.addcmul(offset, x, scale).permute(0, 3, 1, 2)


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

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        _, height, width, channels = self.images.shape
        return channels, height, width

    def batches(
        self,
        order: Tensor,
        slices: Sequence[slice],
        augment: Augment,
        key: tuple[int, int],
        device: torch.device,
        workers: int | None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches ``order[slice]``, augmented by ``key`` (seed, epoch). The data are copied to the device
        once.
        """
        if device not in self._placed:
            self._placed[device] = (self.images.to(device), self.labels.to(device))
        images, labels = self._placed[device]
        order = order.to(device, non_blocking=True)
        draws = None
        if augment != NONE:
            draws = draw(len(self), augment, *key).to(device, non_blocking=True)
        for part in slices:
            index = order[part]
            x = gather(images, index, None if draws is None else draws[part], augment)
            yield normalise(x, self.mean, self.std), labels[index]

    def digest(self) -> str:
        """SHA-256 of the images and labels."""
        sha = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        sha.update(self.images.numpy().data)
        sha.update(self.labels.numpy().data)
        return sha.hexdigest()


class FileSplit(Dataset[tuple[Tensor, int]]):
    """Images that stay on disk. ``split[i]`` is (normalised centre crop (3, size, size), label)."""

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Tensor,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str = "bilinear",
    ) -> None:
        self.paths, self.labels = list(paths), labels.to(torch.int64)
        self.size, self.mean, self.std = size, tuple(mean), tuple(std)
        self.interpolation = interpolation

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image = torch.from_numpy(read(self.paths[i], self.size, interpolation=self.interpolation)).float()
        return normalise(image[None], self.mean, self.std)[0], int(self.labels[i])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return 3, self.size, self.size

    def batches(
        self,
        order: Tensor,
        slices: Sequence[slice],
        augment: Augment,
        key: tuple[int, int],
        device: torch.device,
        workers: int | None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As ``ArraySplit.batches``; ``workers`` (default one per core but one, at most 8) decode, the device
        normalises.
        """
        if workers is None:
            workers = max(0, min(8, (os.cpu_count() or 1) - 1))
        loader: DataLoader[Any] = DataLoader(
            _Raw(self, augment, key),
            batch_sampler=[order[part].tolist() for part in slices],
            num_workers=min(workers, len(slices)),
            generator=stream(*key, "workers"),  # leaves the global random state alone
            pin_memory=device.type == "cuda",
        )
        for pixels, labels in loader:
            x = pixels.to(device, non_blocking=True).float()
            yield normalise(x, self.mean, self.std), labels.to(device, non_blocking=True)

    def digest(self) -> str:
        """SHA-256 of names, sizes and labels of the files (their contents are not read)."""
        sha = hashlib.sha256(f"{self.size} {self.interpolation}".encode())
        for path, label in zip(self.paths, self.labels.tolist(), strict=True):
            sha.update(f"{path.parent.name}/{path.name}:{path.stat().st_size}:{label}\n".encode())
        return sha.hexdigest()


class _Raw(Dataset[tuple[Tensor, int]]):
    """uint8 images of a FileSplit, augmented by (seed, epoch, file)."""

    def __init__(self, split: FileSplit, augment: Augment, key: tuple[int, int]) -> None:
        self.split, self.augment, self.key = split, augment, key

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        split = self.split
        image = read(split.paths[i], split.size, self.augment, (*self.key, i), split.interpolation)
        return torch.from_numpy(image), int(split.labels[i])
