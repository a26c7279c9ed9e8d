"""Images with their labels, and how they are divided: the same choices for arrays and for files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tdlib.data.augment import stream
from tdlib.errors import DataError


@dataclass
class Part:
    """items: images (N, H, W, C) uint8 or a list of N image files. labels: (N,) int64."""

    items: Any
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> Part:
        """The images of these numbers."""
        items = [self.items[i] for i in index.tolist()] if isinstance(self.items, list) else self.items[index]
        return Part(items, self.labels[index])


def divide(part: Part, fraction: float, seed: int, purpose: str) -> tuple[Part, Part]:
    """(kept, held out): ``fraction`` of each class, drawn by ``seed``; at least one image of a class is kept.

    Raises DataError naming the ``purpose`` for a fraction outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise DataError(f"the {purpose} fraction must be in [0, 1), not {fraction}")
    order = torch.randperm(len(part), generator=stream(seed, "split"))
    held = torch.zeros(len(part), dtype=torch.bool)
    for value in part.labels.unique():
        members = order[part.labels[order] == value]
        held[members[: min(round(len(members) * fraction), len(members) - 1)]] = True
    return part.take((~held).nonzero()[:, 0]), part.take(held.nonzero()[:, 0])


def limited(part: Part, limit: int | None, seed: int) -> Part:
    """At most ``limit`` images, classes in turn: a shuffle is sorted by the place within the class."""
    if limit is None or len(part) <= limit:
        return part
    order = torch.randperm(len(part), generator=stream(seed, "limit"))
    shuffled = part.labels[order]
    place = torch.empty_like(order)
    for value in shuffled.unique():
        members = shuffled == value
        place[members] = torch.arange(int(members.sum()))
    return part.take(order[torch.sort(place, stable=True).indices[:limit]].sort().values)
