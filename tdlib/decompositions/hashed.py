"""One vector of d numbers for all n entries of a tensor: entry k is number k mod d, plus or minus.

The signs alternate from one run of d entries to the next. On entries in random order (`permutation`) every
number then stands for n / d random entries with random signs: what it can reach is a random linear subspace
of d dimensions, and the decomposition, a signed mean, is the orthogonal projection on it.

Source: W. Chen, J. Wilson, S. Tyree, K. Weinberger, Y. Chen, Compressing neural networks with the hashing
trick, ICML 2015 (arXiv 1504.04788); theirs draws a hash per entry, so that the shares are equal only on
average.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tdlib.decompositions.base import Decomposition, Ranks, Shape
from tdlib.decompositions.linalg import check_ranks


def hashed(n: int) -> Decomposition:
    """The decomposition of vectors of n entries; its one rank is d."""

    def signs(d: int, like: Tensor) -> Tensor:
        """+1, -1, +1, ...: one for every run of d entries, as a column."""
        return (1 - 2 * (torch.arange(-(-n // d), device=like.device) % 2)).to(like.dtype)[:, None]

    def decompose(W: Tensor, ranks: Ranks) -> list[Tensor]:
        (d,) = clip((n,), check_ranks(ranks, 1, "hashed"))
        sign = signs(d, W)
        runs, taken = (F.pad(v, (0, len(sign) * d - n)).reshape(-1, d) for v in (W, torch.ones_like(W)))
        return [(sign * runs).sum(0) / taken.sum(0)]

    def compose(factors: Sequence[Tensor]) -> Tensor:
        (numbers,) = factors
        return (signs(len(numbers), numbers) * numbers).reshape(-1)[:n]

    def shapes(shape: Shape, ranks: Ranks) -> list[Shape]:
        return [tuple(ranks)]

    def bounds(shape: Shape) -> Ranks:
        return (n,)

    def uniform(shape: Shape, fraction: float) -> Ranks:
        return (max(1, round(fraction * n)),)

    def clip(shape: Shape, ranks: Ranks) -> Ranks:
        return (min(ranks[0], n),)

    def compose_macs(shape: Shape, ranks: Ranks) -> int:
        return 0

    return Decomposition("hashed", decompose, compose, shapes, bounds, uniform, clip, compose_macs)
