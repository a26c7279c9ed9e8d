"""Streamed second moments of convolution patches and of linear inputs: three ways to the same exact sum.

- stride 1, dilation 1 (`Shifted`): sum_q x[q+k] x[q+k']^T depends on k and k' almost only by the displacement
  d = k' - k, so (2kh-1)(2kw-1)/2 products of one buffer with itself, shifted, replace the (kh*kw)^2/2 of
  im2col. The window of positions q differs between k: rows and columns at the border that fall outside are
  subtracted (inclusion, exclusion). The buffer is (H, W, N, C), so that any crop of rows and columns is a
  batch of contiguous matrices: no copies.
- any other convolution, of one to three dimensions (`Unfolded`): im2col of a few images at a time, or of
  random positions only.
- linear layers (`Flat`): rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import repeat
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdlib.errors import DataError
from tdlib.formats.chains import Conv

Key = tuple[tuple[int, int], int | None, int | None]

CHUNK = 1 << 22  # float32 elements in a work buffer (16 MiB)


class Moments(Protocol):
    """Accumulates patches; `count` is the number of patches so far."""

    count: int

    def update(self, x: Tensor, other: Tensor | None = None) -> None:
        """Take the layer's input; with `cross`, also the same layer's input in another network."""

    def result(self) -> tuple[Tensor, Tensor]:
        """(Sigma (n, n), mean (n,)), float64 on the CPU. Once, at the end: the sums are used up."""


def accumulator(
    module: nn.Module,
    name: str,
    positions: int | None = None,
    generator: torch.Generator | None = None,
    cross: bool = False,
) -> Moments:
    """The accumulator that fits the layer; with `cross`, of E[x other^T] (and E[x]) instead of E[x x^T]."""
    if isinstance(module, nn.Linear):
        return Flat(module.in_features, cross)
    if not isinstance(module, Conv):
        raise DataError(
            f"layer {name!r} is a {type(module).__name__}; only convolutions and Linear have statistics"
        )
    plain = module.kernel_size != (1, 1) and module.stride == (1, 1) and module.dilation == (1, 1)
    if isinstance(module, nn.Conv2d) and positions is None and plain:
        return Shifted(module, cross)
    return Unfolded(module, positions, generator, cross)


def product(a: Tensor, b: Tensor) -> Tensor:
    """sum_h a[h]^T b[h] for a and b (h, m, C), in the inputs' precision."""
    if len(a) == 1:
        return a[0].T @ b[0]
    if len(a) * a.shape[2] ** 2 <= 1 << 20:
        return torch.bmm(a.transpose(1, 2), b).sum(0)
    return torch.addbmm(a.new_zeros(a.shape[2], b.shape[2]), a.transpose(1, 2), b)


def add_gram(total: Tensor, rows: Tensor, block: int = 384) -> None:
    """total (n, n) += rows^T rows in the upper block triangle only."""
    for at in range(0, rows.shape[1], block):
        total[at : at + block, at:] += rows[:, at : at + block].T @ rows[:, at:]


def mirror(total: Tensor, block: int = 384) -> None:
    """Copy the upper triangle to the lower one in place: a second (n, n) may be gigabytes."""
    for at in range(0, len(total), block):
        corner = total[at : at + block, at : at + block]
        corner.copy_(corner.triu() + corner.triu(1).T)
        total[at + block :, at : at + block] = total[at : at + block, at + block :].T


class Flat:
    """Second moment of the rows of x (..., n), or of the rows of x against those of another input."""

    def __init__(self, n: int, cross: bool = False) -> None:
        self.count = 0
        self.n, self.cross = n, cross
        self.total = torch.zeros(0, 0, dtype=torch.float64)
        self.first = torch.zeros(0, dtype=torch.float64)

    def update(self, x: Tensor, other: Tensor | None = None) -> None:
        self.add(x.reshape(-1, self.n), None if other is None else other.reshape(-1, self.n))

    def add(self, rows: Tensor, others: Tensor | None) -> None:
        """rows and others (m, n)."""
        rows = wide(rows)
        if self.count == 0:
            self.total = torch.zeros(self.n, self.n, dtype=torch.float64, device=rows.device)
            self.first = torch.zeros(self.n, dtype=torch.float64, device=rows.device)
        size = max(1, CHUNK // self.n)
        for at in range(0, len(rows), size):
            part = rows[at : at + size]
            self.first += part.sum(0)
            if others is None:
                add_gram(self.total, part)
            else:
                self.total += part.T @ wide(others[at : at + size])
        self.count += len(rows)

    def result(self) -> tuple[Tensor, Tensor]:
        if not self.cross:
            mirror(self.total)
        return self.total.div_(self.count).cpu(), self.first.div_(self.count).cpu()


class Unfolded(Flat):
    """Patches by im2col, or by gathering `positions` random output positions per image: of a few images at a
    time, of a large one a few rows.
    """

    def __init__(
        self, conv: Conv, positions: int | None, generator: torch.Generator | None, cross: bool = False
    ) -> None:
        super().__init__(conv.in_channels * math.prod(conv.kernel_size), cross)
        self.conv, self.positions, self.generator = conv, positions, generator

    def update(self, x: Tensor, other: Tensor | None = None) -> None:
        size = max(1, CHUNK // (self.n * output_positions(self.conv, x)))
        for at in range(0, len(x), size):
            seconds = repeat(None) if other is None else self.patches(other[at : at + size])
            for rows, others in zip(self.patches(x[at : at + size]), seconds, strict=False):
                self.add(rows, others)

    def patches(self, x: Tensor) -> Iterator[Tensor]:
        """(patches, n) of x (N, C, *map), in parts."""
        windows = padded(self.conv, wide(x))
        geometry = zip(self.conv.kernel_size, self.conv.stride, self.conv.dilation, strict=True)
        for axis, (k, s, d) in enumerate(geometry, start=2):
            windows = windows.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
        places = windows.shape[2 : x.ndim]  # of (N, C, *places, *kernel), a view
        count = math.prod(places)
        if self.positions is None or self.positions >= count:
            band = max(1, CHUNK * places[0] // (self.n * count * len(x)))
            for part in windows.split(band, dim=2):
                yield part.movedim(1, x.ndim - 1).reshape(-1, self.n)
            return
        at = torch.randperm(count, generator=self.generator)[: self.positions].to(x.device)
        where: Any = torch.unravel_index(at, places)
        picked = windows[:, :, *where]  # (N, C, positions, *kernel)
        yield picked.transpose(1, 2).reshape(-1, self.n)


class Shifted:
    """Exact second moment of the patches of a stride-1 convolution from products of shifted views."""

    def __init__(self, conv: nn.Conv2d, cross: bool = False) -> None:
        self.conv, self.cross = conv, cross
        self.count = 0
        self.kh, self.kw = conv.kernel_size
        self.totals: dict[tuple[int, int], Sums] = {}

    def update(self, x: Tensor, other: Tensor | None = None) -> None:
        x, offset = self.ready(x), explicit(self.conv) if self.conv.padding_mode == "zeros" else (0, 0, 0, 0)
        other = None if other is None else self.ready(other)
        height, width = x.shape[2:]
        out = (height + offset[0] + offset[1] - self.kh + 1, width + offset[2] + offset[3] - self.kw + 1)
        if (height, width) not in self.totals:
            kernel = (self.kh, self.kw)
            self.totals[height, width] = Sums(kernel, x, (offset[0], offset[2]), out, self.cross)
        size = max(1, CHUNK // (x.shape[1] * height * width))
        for at in range(0, len(x), size):
            self.totals[height, width].add(
                x[at : at + size], None if other is None else other[at : at + size]
            )
        self.count += len(x) * out[0] * out[1]

    def ready(self, x: Tensor) -> Tensor:
        """x in float32 or wider; padding other than zeros is made explicit, zeros are left out."""
        return wide(x) if self.conv.padding_mode == "zeros" else padded(self.conv, wide(x))

    def result(self) -> tuple[Tensor, Tensor]:
        sigma, mean = (
            sum(parts[1:], parts[0])
            for parts in zip(*(s.assemble() for s in self.totals.values()), strict=True)
        )
        return sigma.div_(self.count).cpu(), mean.div_(self.count).cpu()


class Sums:
    """Running sums of `Shifted` for one input size: products over the whole image, border rows, columns and
    corners.
    """

    def __init__(
        self, kernel: tuple[int, int], x: Tensor, offset: tuple[int, int], out: tuple[int, int], cross: bool
    ) -> None:
        kh, kw = self.kernel = kernel
        self.size, self.channels, self.cross = tuple(x.shape[2:]), x.shape[1], cross
        lost_rows = [lost(k, offset[0], out[0], self.size[0]) for k in range(kh)]
        lost_columns = [lost(k, offset[1], out[1], self.size[1]) for k in range(kw)]
        self.pairs = []  # (k, k', displacement, rows to leave out, columns to leave out)
        for k in range(kh * kw):
            for j in range(0 if cross else k, kh * kw):
                d = (j // kw - k // kw, j % kw - k % kw)
                self.pairs.append((k, j, d, lost_rows[k // kw], lost_columns[k % kw]))
        self.lost = lost_rows, lost_columns
        self.image = torch.zeros(*self.size, self.channels, dtype=torch.float64, device=x.device)
        keys = dict.fromkeys(
            key for *_, d, rows, columns in self.pairs for key in self.terms(d, rows, columns)
        )
        self.sums = {key: self.image.new_zeros(self.channels, self.channels) for key in keys}

    def terms(self, d: tuple[int, int], rows: list[int], columns: list[int]) -> dict[Key, int]:
        """Key (d, row or None, column or None) -> sign of the sums that make up one pair; terms known to be 0
        left out.

        Displacements that leave the image entirely make no term either.
        """
        (H, W), (dy, dx) = self.size, d
        if abs(dy) >= H or abs(dx) >= W:
            return {}
        rows = [y for y in rows if 0 <= y + dy < H]
        columns = [x for x in columns if 0 <= x + dx < W]
        found: dict[Key, int] = {(d, None, None): 1}
        found |= {(d, y, None): -1 for y in rows} | {(d, None, x): -1 for x in columns}
        return found | {(d, y, x): 1 for y in rows for x in columns}

    def add(self, x: Tensor, other: Tensor | None) -> None:
        """x and other (N, C, H, W): a few images."""
        H, W = self.size
        buffer = x.permute(2, 3, 0, 1).contiguous()
        second = buffer if other is None else other.permute(2, 3, 0, 1).contiguous()
        self.image += buffer.sum(2)
        for key, total in self.sums.items():
            (dy, dx), row, column = key
            rows = slice(max(0, -dy), H - max(0, dy)) if row is None else slice(row, row + 1)
            columns = slice(max(0, -dx), W - max(0, dx)) if column is None else slice(column, column + 1)
            here = buffer[rows, columns].flatten(1, 2)
            there = second[moved(rows, dy), moved(columns, dx)].flatten(1, 2)
            total += product(here, there)

    def assemble(self) -> tuple[Tensor, Tensor]:
        """Sum over all patches of x x^T (n, n) and of x (n,), order channel, kh, kw."""
        K, C = self.kernel[0] * self.kernel[1], self.channels
        blocks = self.image.new_zeros(K, K, C, C)  # taps first: every block is written in one piece
        for k, j, d, rows, columns in self.pairs:
            for key, sign in self.terms(d, rows, columns).items():
                blocks[k, j].add_(self.sums[key], alpha=sign)
            if not self.cross and j != k:
                blocks[j, k] = blocks[k, j].T
        mean = self.image.new_zeros(C, K)
        for k in range(K):
            rows, columns = self.lost[0][k // self.kernel[1]], self.lost[1][k % self.kernel[1]]
            keep_rows = [y for y in range(self.size[0]) if y not in rows]
            keep_columns = [x for x in range(self.size[1]) if x not in columns]
            mean[:, k] = self.image[keep_rows][:, keep_columns].sum((0, 1))
        return blocks.permute(2, 0, 3, 1).reshape(C * K, C * K), mean.reshape(-1)


def moved(part: slice, d: int) -> slice:
    """The slice shifted by d."""
    return slice(part.start + d, part.stop + d)


def lost(k: int, offset: int, out: int, size: int) -> list[int]:
    """Rows (or columns) of the data that tap k never sees: outside [k - offset, k - offset + out)."""
    return [y for y in range(size) if not k - offset <= y < k - offset + out]


def wide(x: Tensor) -> Tensor:
    """x as float32, or float64 if it is already."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def explicit(conv: Conv) -> tuple[int, ...]:
    """Padding as (top, bottom, left, right), two for every dimension of the convolution; 'same' puts the odd
    cell last, as torch does."""
    if conv.padding == "valid":
        return (0, 0) * len(conv.kernel_size)
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return tuple(cells for n in total for cells in (n // 2, n - n // 2))
    return tuple(int(cells) for cells in conv.padding for _ in "ab")


def padded(conv: Conv, x: Tensor) -> Tensor:
    """x (N, C, *map) with the convolution's own padding applied."""
    cells = explicit(conv)
    last_first = [n for k in range(len(cells) - 2, -1, -2) for n in cells[k : k + 2]]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(x, last_first, mode=mode) if any(cells) else x


def output_positions(conv: Conv, x: Tensor) -> int:
    """About the number of output positions of one image."""
    return max(1, math.prod(x.shape[2:]) // math.prod(conv.stride))
