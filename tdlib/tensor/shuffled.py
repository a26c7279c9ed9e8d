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
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from operator import mul
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import RankError
from .cp import cp_als
from .linalg import leading_left
from .matrix import factorise_modes
from .tr import tr_svd
from .tt import tt_rank_bounds, tt_svd

ORDER = 4  # modes of the folded tensor where the caller does not say
Shape = tuple[int, ...]
Cores = list[Tensor]


@lru_cache(maxsize=64)
def _drawn(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """(permutation, its inverse), int32; shared, so never written to."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order.int(), torch.argsort(order).int()


def permutation(n: int, seed: int | None) -> Tensor:
    """pi (n,) int32: entry k of the folded tensor is entry pi[k] of the kernel. seed None: the identity."""
    return torch.arange(n, dtype=torch.int32) if seed is None else _drawn(n, seed)[0].clone()


def inverse_permutation(n: int, seed: int | None) -> Tensor:
    """The inverse of ``permutation(n, seed)``."""
    return torch.arange(n, dtype=torch.int32) if seed is None else _drawn(n, seed)[1].clone()


def checksum(order: Tensor) -> int:
    """CRC-32 of a permutation: tells whether another version of torch draws the same one from a seed."""
    return zlib.crc32(order.cpu().numpy().astype("<i4").tobytes())


def fold_modes(
    shape: Sequence[int], order: int | None = None, modes: Sequence[int] | str | None = None
) -> Shape:
    """Extents of the folded tensor: ``modes`` as given ("kernel": the kernel's own), else ``order``
    near-equal ones.

    Raises RankError where the modes do not multiply to the number of entries.
    """
    n = math.prod(shape)
    if modes == "kernel":
        return tuple(int(s) for s in shape if s > 1) or (1,)
    if isinstance(modes, str):
        raise RankError(f"modes must be a list of extents or 'kernel', not {modes!r}")
    if modes is None:
        if order is not None and order < 2:
            raise RankError(f"a folded kernel needs an order of at least 2, got {order}")
        return tuple(sorted(factorise_modes(n, order or ORDER), reverse=True))
    if math.prod(modes) != n or min(modes) < 1:
        raise RankError(
            f"modes {tuple(modes)} multiply to {math.prod(modes)}, but the kernel has {n} entries"
        )
    return tuple(int(m) for m in modes)


def fold(weight: Tensor, modes: Sequence[int], seed: int | None) -> Tensor:
    """Kernel of any shape -> shuffled, folded tensor (n_1, ..., n_d)."""
    flat = weight.reshape(-1)
    if seed is not None:
        flat = flat.index_select(0, _drawn(math.prod(modes), seed)[0].to(flat.device))
    return flat.reshape(tuple(modes))


def unfold(folded: Tensor, shape: Sequence[int], seed: int | None) -> Tensor:
    """The inverse of ``fold``: folded tensor (in any shape of n entries) -> kernel."""
    flat = folded.reshape(-1)
    if seed is not None:
        flat = flat.index_select(0, _drawn(math.prod(shape), seed)[1].to(flat.device))
    return flat.reshape(tuple(shape))


def _chain(cores: Sequence[Tensor]) -> Tensor:
    """Cores (r_k, n_k, r_{k+1}) multiplied in a row -> (r_0, n_1 ... n_m, r_m)."""
    out = cores[0]
    for core in cores[1:]:
        out = (out.flatten(0, 1) @ core.flatten(1)).reshape(out.shape[0], -1, core.shape[2])
    return out


def compose_ring(cores: Sequence[Tensor]) -> Tensor:
    """TT and TR cores -> tensor: two half chains, then one product over the bond in the middle and the
    ring's.
    """
    half = len(cores) // 2
    if half == 0:
        return cores[0].diagonal(dim1=0, dim2=2).sum(-1)
    left, right = _chain(cores[:half]), _chain(cores[half:])  # (r_0, a, r_m), (r_m, b, r_0)
    return left.permute(1, 0, 2).flatten(1) @ right.permute(2, 0, 1).flatten(0, 1)


def compose_cp(factors: Sequence[Tensor]) -> Tensor:
    """Factors (n_k, R) -> tensor: the Khatri-Rao products of two halves, then one matrix product."""
    half = max(1, len(factors) // 2)
    if len(factors) == 1:
        return factors[0].sum(1)
    return _khatri_rao(factors[:half]) @ _khatri_rao(factors[half:]).T


def _khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    out = factors[0]
    for factor in factors[1:]:
        out = (out[:, None, :] * factor[None, :, :]).flatten(0, 1)
    return out


def compose_tucker(cores: Sequence[Tensor]) -> Tensor:
    """Core (r_1, ..., r_d) and factors (n_k, r_k) -> tensor."""
    out = cores[0]
    for factor in cores[
        1:
    ]:  # contracting the first mode moves its extent to the end: d steps restore the order
        out = (out.flatten(1).T @ factor.T).reshape(*out.shape[1:], factor.shape[0])
    return out


def hooi(tensor: Tensor, ranks: Sequence[int], sweeps: int = 2) -> Cores:
    """Tucker decomposition in all modes, HOSVD and then HOOI sweeps: core, then orthonormal factors (n_k,
    r_k).
    """
    d = tensor.dim()
    factors = [leading_left(tensor.movedim(k, 0).flatten(1), ranks[k]) for k in range(d)]
    for k in [*range(d)] * sweeps:
        rest = tensor
        for m in range(d):
            if m != k:
                rest = torch.tensordot(rest, factors[m], dims=([m], [0])).movedim(-1, m)
        factors[k] = leading_left(rest.movedim(k, 0).flatten(1), ranks[k])
    core = tensor
    for factor in factors:
        core = torch.tensordot(core, factor, dims=([0], [0]))
    return [core, *factors]


def _cp(tensor: Tensor, ranks: Sequence[int]) -> Cores:
    weights, factors = cp_als(tensor, ranks[0])
    share = weights.abs() ** (1 / len(factors))
    return [factors[0] * (share * weights.sign()), *(f * share for f in factors[1:])]


class Fold(NamedTuple):
    """One format of the folded tensor; `modes` are its extents (n_1, ..., n_d)."""

    decompose: Callable[[Tensor, Sequence[int]], Cores]
    compose: Callable[[Sequence[Tensor]], Tensor]  # any shape of n entries, in order
    shapes: Callable[[Shape, Shape], list[Shape]]  # of the cores
    macs: Callable[[Shape, Shape], int]  # of compose
    bounds: Callable[[Shape], Shape]
    clip: Callable[[Shape, Shape], Shape]
    at: Callable[[Shape, float], Shape]  # the uniform family


def _ring_shapes(modes: Shape, ring: Shape) -> list[Shape]:
    closed = (*ring, ring[0])
    return [(closed[k], n, closed[k + 1]) for k, n in enumerate(modes)]


def _ring_macs(modes: Shape, ring: Shape) -> int:
    closed, half = (*ring, ring[0]), len(modes) // 2
    if half == 0:
        return 0
    total = math.prod(modes) * closed[0] * closed[half]
    for first, last in ((0, half), (half, len(modes))):
        done = list(accumulate(modes[first:last], mul))
        total += sum(
            closed[first] * done[k] * closed[first + k] * closed[first + k + 1]
            for k in range(1, last - first)
        )
    return total


def _tt_clip(modes: Shape, ranks: Shape) -> Shape:
    out = list(map(min, ranks, tt_rank_bounds(modes)))
    for k in range(len(out)):
        out[k] = min(out[k], (out[k - 1] if k else 1) * modes[k])
    return tuple(out)


def _tt_at(modes: Shape, fraction: float) -> Shape:
    bounds = tt_rank_bounds(modes)
    rank = max(1, round(fraction * max(bounds, default=1)))
    return tuple(min(rank, b) for b in bounds)


def _tr_clip(modes: Shape, ranks: Shape) -> Shape:
    """r_0 r_1 is the rank of the first unfolding; later ranks are bounded by what is left on either side."""
    if len(modes) == 1:
        return (1,)
    first = min(modes[0], math.prod(modes[1:]))
    r0 = min(ranks[0], first)
    out = [r0, min(ranks[1], max(1, first // r0))]
    for k in range(2, len(modes)):
        out.append(min(ranks[k], out[-1] * modes[k - 1], math.prod(modes[k:]) * r0))
    return tuple(out)


def _tr_bounds(modes: Shape) -> Shape:
    first = min(modes[0], math.prod(modes[1:]))
    r0 = max(r for r in range(1, math.isqrt(first) + 1) if first % r == 0)
    return _tr_clip(modes, (r0, *[math.prod(modes)] * (len(modes) - 1)))


def _tr_at(modes: Shape, fraction: float) -> Shape:
    """Equal ranks, the closing one at most the root of n_1; at fraction 1 about the dense kernel's size."""
    rank = max(1, round(fraction * math.sqrt(math.prod(modes) / max(1, sum(modes[1:])))))
    return (min(rank, math.isqrt(modes[0])), *[rank] * (len(modes) - 1))


def _tucker_macs(modes: Shape, ranks: Shape) -> int:
    sizes, total = list(ranks), 0
    for k, n in enumerate(modes):
        total += math.prod(sizes) * n
        sizes[k] = n
    return total


FOLDS: dict[str, Fold] = {
    "tt": Fold(
        lambda t, ranks: list(tt_svd(t, ranks)), compose_ring,
        lambda modes, ranks: _ring_shapes(modes, (1, *ranks)),
        lambda modes, ranks: _ring_macs(modes, (1, *ranks)),
        lambda modes: tuple(tt_rank_bounds(modes)), _tt_clip, _tt_at,
    ),
    "tr": Fold(
        lambda t, ranks: list(tr_svd(t, ranks)), compose_ring, _ring_shapes, _ring_macs, _tr_bounds,
        _tr_clip, _tr_at,
    ),
    "cp": Fold(
        _cp, compose_cp, lambda modes, ranks: [(n, ranks[0]) for n in modes],
        lambda modes, ranks: math.prod(modes) * ranks[0] if len(modes) > 1 else 0,
        lambda modes: (math.prod(modes) // max(modes),),
        lambda modes, ranks: (min(ranks[0], math.prod(modes) // max(modes)),),
        lambda modes, f: (max(1, round(f * math.prod(modes) / sum(modes))),),
    ),
    "tucker": Fold(
        hooi, compose_tucker, lambda modes, ranks: [ranks, *zip(modes, ranks, strict=True)], _tucker_macs,
        lambda modes: modes, lambda modes, ranks: tuple(map(min, ranks, modes)),
        lambda modes, f: tuple(max(1, round(f * n)) for n in modes),
    ),
}  # fmt: skip
