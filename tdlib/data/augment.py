"""Batched random crops and flips: drawn per epoch from (seed, epoch), applied on the device in one gather."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from tdlib.errors import DataError


@dataclass(frozen=True)
class Augment:
    """What is drawn at random for each training image.

    pad: the image is shifted by up to ``pad`` pixels in each direction (a crop out of the padded image).
    mode: what comes in at the border: ``"zero"`` (black pixels) or ``"reflect"``.
    flip: mirror left-right with probability one half.
    scale: image folders too large for memory: crop a random area of at least this fraction and resize it (1 =
    off).
    """

    pad: int = 0
    mode: str = "zero"
    flip: bool = False
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.mode not in ("zero", "reflect"):
            raise DataError(f"augment mode must be 'zero' or 'reflect', not {self.mode!r}")
        if self.pad < 0 or not 0 < self.scale <= 1:
            raise DataError(
                f"augment needs pad >= 0 and 0 < scale <= 1, got pad={self.pad}, scale={self.scale}"
            )


NONE = Augment()


def stream(*key: object) -> torch.Generator:
    """A CPU generator that is a pure function of ``key`` (seed, epoch, purpose)."""
    digest = hashlib.sha256("/".join(str(part) for part in key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def draw(n: int, augment: Augment, seed: int, epoch: int) -> Tensor:
    """(n, 3) int64: row shift, column shift in [-pad, pad] and flip in {0, 1}, for the n places of an epoch's
    order.
    """
    generator = stream(seed, epoch, "augment")
    shifts = torch.randint(-augment.pad, augment.pad + 1, (n, 2), generator=generator)
    flips = torch.randint(0, 2, (n, 1), generator=generator) * int(augment.flip)
    return torch.cat([shifts, flips], dim=1)


def gather(images: Tensor, index: Tensor, draws: Tensor | None, augment: Augment) -> Tensor:
    """Images (N, H, W, C) uint8 at ``index`` (B,), shifted and flipped by ``draws`` (B, 3) -> (B, H, W, C)
    float32.

    One gather: the source row and column of every output pixel are computed, so nothing is padded or copied
    twice.
    """
    if draws is None or augment == NONE:
        return images[index].float()
    height, width = images.shape[1:3]
    rows = torch.arange(height, device=images.device) + draws[:, :1]  # (B, H)
    columns = torch.arange(width, device=images.device).expand(len(index), width)
    columns = torch.where(draws[:, 2:] == 1, width - 1 - columns, columns) + draws[:, 1:2]  # (B, W)
    if augment.mode == "reflect":
        rows, columns = _reflect(rows, height), _reflect(columns, width)
        inside = None
    else:
        inside = _within(rows, height)[:, :, None] & _within(columns, width)[:, None, :]  # (B, H, W)
        rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    out = images[index[:, None, None], rows[:, :, None], columns[:, None, :]].float()
    return out if inside is None else out * inside[..., None]


def _within(places: Tensor, size: int) -> Tensor:
    return (places >= 0) & (places < size)


def _reflect(places: Tensor, size: int) -> Tensor:
    places = places.abs()
    return torch.where(places >= size, 2 * (size - 1) - places, places)
