"""What tensor train and ring share: cores (r_k, n_k, r_{k+1}) over extents (n_0, ..., n_{d-1}), r_d = r_0.

A train is a ring whose closing rank r_0 is 1. Ring ranks are (r_0, ..., r_{d-1}).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from operator import mul

from torch import Tensor

from tdlib import memory
from tdlib.decompositions.base import Ranks, Shape

LARGE = 2**30  # bytes from which on the memory is asked for before it is taken


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

    Two chains, then one product over the bond between them and the closing one; where they meet is chosen for
    the least work (from first to last, as TensorLy does it, they meet before the last core). Where channels
    are factorised that is between outputs O and inputs I, and O·I + (O + I)·r·r_0 numbers are held.
    Raises: MemoryLimitError.
    """
    if len(cores) == 1:
        return cores[0].diagonal(dim1=0, dim2=2).sum(-1)
    extents, ring = tuple(core.shape[1] for core in cores), tuple(core.shape[0] for core in cores)
    at = _meeting(extents, ring)
    sides = math.prod(extents[:at]) + math.prod(extents[at:])
    need = (math.prod(extents) + 2 * sides * ring[0] * ring[at]) * cores[0].element_size()
    if need > LARGE:
        memory.require(
            need,
            f"composing a tensor of extents {extents} from cores of ranks {ring}",
            "lower the ranks, or factorise the channels into fewer modes",
            device=cores[0].device,
        )
    left = chain(cores[:at]).transpose(0, 1).flatten(1)  # (r_0, a, r) -> (a, r_0 r)
    right = chain(cores[at:]).permute(2, 0, 1).flatten(0, 1)  # (r, b, r_0) -> (r_0 r, b)
    return (left @ right).reshape(extents)


def close_macs(extents: Shape, ring: Ranks) -> int:
    """Multiply-accumulates of `close`."""
    return 0 if len(extents) == 1 else _macs(extents, ring, _meeting(extents, ring))


def _meeting(extents: Shape, ring: Ranks) -> int:
    """Number of cores in the first of the two chains that `close` multiplies; of equals the most even."""
    d = len(extents)
    return min(range(1, d), key=lambda at: (_macs(extents, ring, at), abs(2 * at - d), at))


def _macs(extents: Shape, ring: Ranks, at: int) -> int:
    """Multiply-accumulates where the chains meet after `at` cores."""
    bonds = (*ring, ring[0])
    total = math.prod(extents) * bonds[0] * bonds[at]
    for first, last in ((0, at), (at, len(extents))):
        done = list(accumulate(extents[first:last], mul))
        for k in range(first + 1, last):
            total += bonds[first] * done[k - first] * bonds[k] * bonds[k + 1]
    return total
