"""Images that take the place of the network's own where second moments are gathered."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

#: Batches of the network's own images and a seed -> batches of others.
Source = Callable[[Sequence[Tensor], int], list[Tensor]]


def few(batches: Sequence[Tensor], seed: int) -> list[Tensor]:
    """The first 50."""
    return [torch.cat(list(batches))[:50]]


def mirrored(batches: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Left for right."""
    return [x.flip(3) for x in batches]


def shuffled(batches: Sequence[Tensor], seed: int) -> list[Tensor]:
    """The pixels of all images in one random order: each keeps its colours and loses its shapes."""
    order = torch.randperm(batches[0][0, 0].numel(), generator=torch.Generator().manual_seed(seed))
    return [x.flatten(2)[:, :, order.to(x.device)].reshape(x.shape) for x in batches]


def noise(batches: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Independent standard normal pixels: the mean and variance to which the network's own are brought."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=generator).to(x) for x in batches]


def photograph(batches: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Patches of one grey photograph (scikit-learn's china.jpg), in a random order."""
    from sklearn.datasets import load_sample_images

    channels, height, width = batches[0].shape[1:]
    photo = torch.tensor(load_sample_images().images[0]).float().mean(2)
    tiles = photo.unfold(0, height, height).unfold(1, width, width).reshape(-1, 1, height, width)
    tiles = ((tiles - tiles.mean()) / tiles.std()).expand(-1, channels, -1, -1).to(batches[0])
    order = torch.randperm(len(tiles), generator=torch.Generator().manual_seed(seed))
    return list(tiles[order].split(100))


#: By the names that the chapter's parameter `sources` takes.
SOURCES: dict[str, Source] = {
    "50 own images": few, "mirrored": mirrored, "shuffled pixels": shuffled, "noise": noise,
    "photograph": photograph,
}  # fmt: skip
