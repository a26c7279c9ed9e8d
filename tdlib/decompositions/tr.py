"""Tensor ring: TR-SVD at prescribed ranks, then alternating least squares from there.

TR-SVD alone is far from the best ring of its ranks, because the first split decides the closing rank
blindly; and it cannot use r_0 r_1 > n_0 at all. Least-squares sweeps over the cores mend both. Each is a
proximal step in float64, so the error never rises, and nothing branches on data: `torch.vmap` maps it.
Source: Zhao et al. 2016 (arXiv 1606.05535), algorithms 1 and 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from tensorly.tr_tensor import TRTensor
from torch import Tensor

from tdlib import memory
from tdlib.decompositions.base import Decomposition, Ranks, Shape
from tdlib.decompositions.cores import LARGE, close, close_macs, core_shapes
from tdlib.decompositions.linalg import check_ranks, full_precision, leading_left, magnitude, split, working
from tdlib.errors import RankError

SWEEPS = 4
LARGEST_SYSTEM = 1024  # unknowns per slice, r_k r_{k+1}, above which sweeps cost more than they give
PROXIMAL = 1e-10  # weight of the distance to the current core, relative to the normal matrix


def tr_clip(shape: Sequence[int], ranks: Sequence[int]) -> tuple[int, ...]:
    """Effective ring ranks: r_0 ≤ n_0 r_1; r_k ≤ r_{k-1} n_{k-1} and r_k ≤ r_0 n_k ... n_{d-1} for k ≥ 1."""
    clipped = [min(ranks[0], shape[0] * ranks[1])]
    for k in range(1, len(shape)):
        clipped.append(min(ranks[k], clipped[-1] * shape[k - 1], math.prod(shape[k:]) * clipped[0]))
    return tuple(clipped)


@full_precision
def tr_svd(T: Tensor, ranks: Sequence[int], sweeps: int = SWEEPS) -> TRTensor:
    """Tensor ring of T (n_0, ..., n_{d-1}), d ≥ 2, at ring ranks (r_0, ..., r_{d-1}), cut by `tr_clip`.

    Returns cores (r_k, n_k, r_{k+1}) with r_d = r_0. `sweeps` of least squares follow TR-SVD (0: none;
    none either where a system would exceed LARGEST_SYSTEM unknowns). Raises: RankError; MemoryLimitError
    where the sweeps, which open the ring, would take more memory than there is.
    """
    sizes = tuple(T.shape)
    if len(sizes) < 2:
        raise RankError(f"a tensor ring needs at least two modes, got shape {sizes}")
    ring = tr_clip(sizes, check_ranks(ranks, len(sizes), f"tr_svd of shape {sizes}"))
    T = working(T)
    size = magnitude(T)
    T = T / size
    cores = _grow(_tr_svd(T, ring), ring)
    if max(a * b for a, b in zip(ring, (*ring[1:], ring[0]), strict=True)) > LARGEST_SYSTEM:
        sweeps = 0
    if sweeps:
        _require(sizes, ring, T.device)
        T64, cores = T.double(), [core.double() for core in cores]
        for _ in range(sweeps):
            for k in range(len(cores)):
                cores[k] = _update(T64, cores, k)
        cores = [core.to(T.dtype) for core in _balance(cores)]
    share = size ** (1 / len(cores))
    return TRTensor([core * share for core in cores])


def tr_compose(cores: Sequence[Tensor]) -> Tensor:
    """The tensor (n_0, ..., n_{d-1}) of ring cores (r_k, n_k, r_{k+1}). Differentiable."""
    return close(cores)


def _first_split(ring: Sequence[int], first: int) -> tuple[int, int]:
    """(a_0, a_1) ≤ (r_0, r_1) of the largest product ≤ `first`, the unfolding's rank; the most even such."""
    r0, r1 = ring[:2]
    pairs = ((a, min(r1, first // a)) for a in range(1, min(r0, first) + 1))
    return max(pairs, key=lambda p: (p[0] * p[1], min(p)))


def _tr_svd(T: Tensor, ring: Sequence[int]) -> list[Tensor]:
    """TR-SVD at ranks within `ring` (less where r_0 r_1 exceeds the rank of the first unfolding)."""
    sizes = tuple(T.shape)
    d = len(sizes)
    a0, a1 = _first_split(ring, min(sizes[0], math.prod(sizes[1:])))
    left, rest = split(T.reshape(sizes[0], -1), a0 * a1)
    cores = [left.reshape(sizes[0], a0, a1).transpose(0, 1)]
    rest = rest.reshape(a0, a1, -1).permute(1, 2, 0)  # (a_1, n_1 ... n_{d-1}, a_0)
    r = a1
    for k in range(1, d - 1):
        M = rest.reshape(r * sizes[k], -1)
        new = min(ring[k + 1], *M.shape)
        left = leading_left(M, new)
        rest = left.mT @ M
        cores.append(left.reshape(r, sizes[k], new))
        r = new
    cores.append(rest.reshape(r, sizes[-1], a0))
    return cores


def _grow(cores: list[Tensor], ring: Sequence[int]) -> list[Tensor]:
    """Pad the cores to the ring's ranks without changing their tensor.

    Of a new bond index the core after the bond gets noise and the one before it zeros: the sweeps fill them.
    """
    generator = np.random.default_rng(0)
    grown = []
    for k, core in enumerate(cores):
        left, right = ring[k] - core.shape[0], ring[(k + 1) % len(ring)] - core.shape[2]
        if left:
            noise = generator.standard_normal((left, *core.shape[1:]))
            scale = core.square().mean().sqrt()
            core = torch.cat([core, torch.as_tensor(noise, dtype=core.dtype, device=core.device) * scale])
        if right:
            core = torch.cat([core, core.new_zeros(*core.shape[:2], right)], dim=2)
        grown.append(core)
    return grown


def _require(sizes: Shape, ring: Ranks, device: torch.device) -> None:
    """Raises MemoryLimitError where `_contract` needs more than there is: its first product, which is its
    largest, is held once as it comes and once in the order that the next one wants."""
    open_ = 0
    for k in range(len(sizes)):
        m = _order(sizes, k)[0]
        open_ = max(open_, math.prod(sizes) // sizes[m] * ring[m] * ring[(m + 1) % len(ring)])
    need = 8 * (2 * math.prod(sizes) + 2 * open_)
    if need > LARGE:
        what = f"the tensor ring of extents {sizes} at ranks {ring}"
        memory.require(
            need, what, "lower the ranks, or factorise the channels into fewer modes", device=device
        )


def _update(T: Tensor, cores: list[Tensor], k: int) -> Tensor:
    """The core k that fits T best with the others fixed, held a little to its current value."""
    d = len(cores)
    before, n, after = cores[k].shape
    right = _contract(T, cores, k).reshape(n, before * after)
    normal = torch.eye(after * after, dtype=T.dtype, device=T.device)
    for m in range(k + 1, k + d):
        core = cores[m % d]
        normal = normal @ torch.einsum("anb,cnd->acbd", core, core).flatten(2).flatten(0, 1)
    normal = normal.reshape(after, after, before, before).permute(2, 0, 3, 1).reshape(before * after, -1)
    normal = (normal + normal.mT) / 2
    scale = normal.diagonal().mean()
    scale = torch.where(scale > 0, scale, 1.0)  # a zero tensor
    system = normal + PROXIMAL * scale * torch.eye(before * after, dtype=T.dtype, device=T.device)
    old = cores[k].transpose(0, 1).reshape(n, before * after)
    step = torch.linalg.solve(system, (right - old @ normal).mT).mT
    return (old + step).reshape(n, before, after).transpose(0, 1)


def _contract(T: Tensor, cores: list[Tensor], k: int) -> Tensor:
    """T contracted with all cores but k: (n_k, r_k, r_{k+1})."""
    d = len(cores)
    modes = [chr(ord("a") + m) for m in range(d)]
    bonds = [chr(ord("A") + m) for m in range(d)]
    names = [bonds[m] + modes[m] + bonds[(m + 1) % d] for m in range(d)]
    X, name = T, "".join(modes)
    for m in _order(T.shape, k):
        open_ = [c for c in name + names[m] if (c in name) != (c in names[m])]
        X, name = torch.einsum(f"{name},{names[m]}->{''.join(open_)}", X, cores[m]), "".join(open_)
    return torch.einsum(f"{name}->{modes[k]}{bonds[k]}{bonds[(k + 1) % d]}", X)


def _order(sizes: Shape, k: int) -> list[int]:
    """The modes other than k in the order of contraction: from the longest on, neighbours first."""
    others = [(k + 1 + m) % len(sizes) for m in range(len(sizes) - 1)]
    start = max(range(len(others)), key=lambda position: sizes[others[position]])
    return [*others[start:], *reversed(others[:start])]


def _balance(cores: list[Tensor]) -> list[Tensor]:
    """Cores of equal norm with the same tensor."""
    norms = torch.stack([torch.linalg.vector_norm(core) for core in cores])
    norms = norms.clamp_min(1e-100)  # in float64
    mean = norms.log().mean().exp()
    return [core * (mean / norm) for core, norm in zip(cores, norms, strict=True)]


def _decompose(T: Tensor, ranks: Ranks) -> list[Tensor]:
    return list(tr_svd(T, ranks))


def _rough(T: Tensor, ranks: Ranks) -> list[Tensor]:
    return list(tr_svd(T, ranks, sweeps=1))


def _bounds(shape: Shape) -> Ranks:
    """Ranks at which TR-SVD is exact: r_0 r_1 is the rank of the first unfolding, split evenly."""
    first = min(shape[0], math.prod(shape[1:]))
    r0 = max(r for r in range(1, math.isqrt(first) + 1) if first % r == 0)
    bounds = [r0, first // r0]
    for k in range(2, len(shape)):
        bounds.append(min(bounds[-1] * shape[k - 1], math.prod(shape[k:]) * r0))
    return tuple(bounds)


def _uniform(shape: Shape, fraction: float) -> Ranks:
    """All ranks alike; at fraction 1 the ring is as large as the tensor."""
    rank = max(1, round(fraction * math.sqrt(math.prod(shape) / sum(shape))))
    return (rank,) * len(shape)


TR = Decomposition(
    name="tr",
    decompose=_decompose,
    compose=tr_compose,
    shapes=core_shapes,
    bounds=_bounds,
    uniform=_uniform,
    clip=tr_clip,
    compose_macs=close_macs,
    rough=_rough,
)
