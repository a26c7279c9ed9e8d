"""Kernels folded to high-order tensors after a fixed random permutation of their entries.

A kernel with n entries is flattened, permuted and folded into a tensor of d near-equal modes n_1 ... n_d = n,

    T = reshape(vec(W)[pi], (n_1, ..., n_d)),        T in TT, TR, CP or Tucker format of low rank.

The permutation pi is a pure function of (n, seed), drawn on the CPU; without shuffling it is the identity.

Source: C. Li, Z. Sun, J. Yu, M. Hou, Q. Zhao, Low-rank embedding of kernels in convolutional neural networks
under random shuffling, ICASSP 2019 (arXiv 1810.13098).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from tdlib.decompositions.base import Shape
from tdlib.decompositions.modes import factorise_modes, whole_numbers
from tdlib.errors import RankError

ORDER = 4  # modes of the folded tensor where the caller does not say


@lru_cache(maxsize=64)
def _drawn(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """(permutation, its inverse), int32; shared, so never written to."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order.int(), torch.argsort(order).int()


def permutation(n: int, seed: int | None) -> Tensor:
    """pi (n,) int32: entry k of the folded tensor is entry pi[k] of the kernel. seed None: the identity."""
    return torch.arange(n, dtype=torch.int32) if seed is None else _drawn(n, seed)[0].clone()


def inverse_permutation(n: int, seed: int | None) -> Tensor:
    """The inverse of `permutation(n, seed)`."""
    return torch.arange(n, dtype=torch.int32) if seed is None else _drawn(n, seed)[1].clone()


def checksum(order: Tensor) -> int:
    """CRC-32 of a permutation: tells whether another version of torch draws the same one from a seed."""
    return zlib.crc32(order.cpu().numpy().astype("<i4").tobytes())


def fold_modes(
    shape: Sequence[int], order: int | None = None, modes: Sequence[int] | str | None = None
) -> Shape:
    """Extents of the folded tensor: `modes` ("kernel": the kernel's own), or else `order` near-equal ones.

    Raises: RankError if the modes do not multiply to the number of entries, the order is below 2, or both
    are given.
    """
    n = math.prod(shape)
    if modes is not None and order is not None:
        raise RankError(f"order={order!r} is unused beside modes={modes!r}: drop one of them")
    if modes == "kernel":
        return tuple(int(s) for s in shape if s > 1) or (1,)
    if isinstance(modes, str):
        raise RankError(f"modes must be a list of extents or 'kernel', not {modes!r}")
    if modes is None:
        if order == 1:
            raise RankError("a folded kernel needs an order of at least 2, got 1")
        return tuple(sorted(factorise_modes(n, ORDER if order is None else order), reverse=True))
    extents = whole_numbers(modes, "modes")
    if math.prod(extents) != n:
        raise RankError(f"modes {extents} multiply to {math.prod(extents)}, but the kernel has {n} entries")
    return extents


def fold(weight: Tensor, modes: Sequence[int], seed: int | None) -> Tensor:
    """The shuffled, folded tensor (n_1, ..., n_d) of a kernel of any shape."""
    flat = weight.reshape(-1)
    if seed is not None:
        flat = flat.index_select(0, _drawn(math.prod(modes), seed)[0].to(flat.device))
    return flat.reshape(tuple(modes))


def unfold(folded: Tensor, shape: Sequence[int], seed: int | None) -> Tensor:
    """Inverse of `fold`: the kernel of a folded tensor, which may have any shape of n entries."""
    flat = folded.reshape(-1)
    if seed is not None:
        flat = flat.index_select(0, _drawn(math.prod(shape), seed)[1].to(flat.device))
    return flat.reshape(tuple(shape))
