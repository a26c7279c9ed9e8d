"""What tensor train and ring share: cores (r_k, n_k, r_{k+1}) over extents (n_0, ..., n_{d-1}), r_d = r_0.

A train is a ring whose closing rank r_0 is 1. Ring ranks are (r_0, ..., r_{d-1}).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from operator import mul

from torch import Tensor

from tdlib.decompositions.base import Ranks, Shape


def core_shapes(extents: Shape, ring: Ranks) -> list[Shape]:
    """The shapes (r_k, n_k, r_{k+1}) of the cores."""
    closed = (*ring, ring[0])
    return [(closed[k], n, closed[k + 1]) for k, n in enumerate(extents)]


def chain(cores: Sequence[Tensor]) -> Tensor:
    """Neighbouring cores (r_k, n_k, r_{k+1}) multiplied: (r_first, product of their n_k, r_last)."""
    out = cores[0]
    for core in cores[1:]:
        out = (out.flatten(0, 1) @ core.flatten(1)).reshape(out.shape[0], -1, core.shape[2])
    return out


def close(cores: Sequence[Tensor]) -> Tensor:
    """The tensor (n_0, ..., n_{d-1}) of a ring of cores. Differentiable.

    Two half chains, then one product over the bond between them and the closing one. From four modes on this
    is less work than from first to last, as TensorLy does it; at three it is the same.
    """
    half = len(cores) // 2
    if half == 0:
        return cores[0].diagonal(dim1=0, dim2=2).sum(-1)
    left, right = chain(cores[:half]), chain(cores[half:])  # (r_0, a, r), (r, b, r_0)
    full = left.transpose(0, 1).flatten(1) @ right.permute(2, 0, 1).flatten(0, 1)
    return full.reshape([core.shape[1] for core in cores])


def close_macs(extents: Shape, ring: Ranks) -> int:
    """Multiply-accumulates of `close`."""
    half, bonds = len(extents) // 2, (*ring, ring[0])
    if half == 0:
        return 0
    total = math.prod(extents) * bonds[0] * bonds[half]
    for first, last in ((0, half), (half, len(extents))):
        done = list(accumulate(extents[first:last], mul))
        for k in range(first + 1, last):
            total += bonds[first] * done[k - first] * bonds[k] * bonds[k + 1]
    return total
