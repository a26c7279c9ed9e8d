"""CP (canonical polyadic) decomposition: Tucker first, then accelerated alternating least squares.

A kernel of CP rank R lives in subspaces of at most R dimensions per mode, so ALS runs on a core of at most 2R
per mode and costs little per sweep; a few sweeps on the full kernel end it. Between sweeps the factors are
extrapolated, and a sweep that does not lower the objective is taken back.
Objective: ||T - That||² + ridge Σ_r w_r² with w_r the norms of the rank-one terms; the ridge keeps terms from
growing without bound against each other (the best CP of a kernel need not exist).

Sources: Kolda and Bader 2009, section 3.4 (ALS); Bro and Andersson 1998 (compression); Ang et al. 2020
(arXiv 2001.04321) for extrapolation with restarts. Phan et al. 2020 (arXiv 2008.05441) on degenerate kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from tensorly.cp_tensor import CPTensor
from torch import Tensor

from tdlib.decompositions.base import Decomposition, Ranks, Shape
from tdlib.decompositions.linalg import check_ranks, full_precision, leading_left, magnitude, working
from tdlib.errors import RankError

SWEEPS = 100
TOL = 1e-5  # stop when PATIENCE sweeps on end each lower the relative error by less
PATIENCE = 3
RIDGE = 1e-6
NOISE = 0.01  # added to the starting vectors, which have unit length
FLOOR = 1e-13  # ridge that keeps the linear systems regular when none is asked for
SHORT = 64  # modes up to this length are not compressed: it would cost accuracy and save no time
POLISH = 5  # sweeps on the full tensor after those on the core


@full_precision
def cp_als(
    T: Tensor,
    rank: int,
    sweeps: int = SWEEPS,
    tol: float = TOL,
    seed: int = 0,
    ridge: float = RIDGE,
    trace: list[float] | None = None,
) -> CPTensor:
    """CP of T (n_1, ..., n_d), d ≥ 2; `rank` is cut to the product of all modes but the longest, exact.

    Returns unit weights (R,) and factors (n_k, R); every rank-one term is spread evenly over its d columns.
    At most `sweeps` sweeps, ended earlier when three on end each lower the relative error by less than `tol`.
    `seed` draws the part of the start that is random. `trace` receives the root of the objective over
    ||T||² (for ridge 0 the relative error) after every accepted sweep; it never rises. Not for vmap.
    Raises: RankError.
    """
    if T.ndim < 2:
        raise RankError(f"CP needs at least two modes, got shape {tuple(T.shape)}")
    (rank,) = check_ranks(rank, 1, "cp_als")
    T = working(T)
    longest = max(range(T.ndim), key=lambda k: T.shape[k])
    bound = T.numel() // T.shape[longest]
    if rank >= bound:
        return CPTensor((T.new_ones(bound), spread(_exact(T, longest))))
    size = magnitude(T)
    T = T / size
    total = float(torch.linalg.vector_norm(T.double()) ** 2)
    trace = [] if trace is None else trace
    core, bases = _compress(T, rank)
    weights, factors = _als(core, _start(core, rank, seed), sweeps, tol, ridge, total, trace)
    if any(U is not None for U in bases):
        factors = [f if U is None else U @ f for U, f in zip(bases, factors, strict=True)]
        weights, factors = _als(T, factors, min(sweeps, POLISH), tol, ridge, total, trace)
    share = size ** (1 / T.ndim)
    factors = [f * share for f in spread([factors[0] * weights, *factors[1:]])]
    return CPTensor((torch.ones_like(weights), factors))


def cp3(
    W: Tensor, rank: int, sweeps: int = SWEEPS, tol: float = TOL, seed: int = 0, ridge: float = RIDGE
) -> CPTensor:
    """CP of W (O, I, kh, kw), spatial modes merged: factors (O, R), (I, R), (kh kw, R). See `cp_als`."""
    return cp_als(W.flatten(2), rank, sweeps, tol, seed, ridge)


def cp4(
    W: Tensor, rank: int, sweeps: int = SWEEPS, tol: float = TOL, seed: int = 0, ridge: float = RIDGE
) -> CPTensor:
    """CP of W (O, I, kh, kw): factors (O, R), (I, R), (kh, R), (kw, R). See `cp_als`."""
    return cp_als(W, rank, sweeps, tol, seed, ridge)


def cp_compose(cp: CPTensor | tuple[Tensor | None, Sequence[Tensor]]) -> Tensor:
    """The tensor (n_1, ..., n_d), d ≥ 2, of (weights (R,) or None, factors (n_k, R)). Differentiable.

    The Khatri-Rao products of two halves, then one matrix product: less work than TensorLy's one of all.
    """
    weights, factors = cp
    half = len(factors) // 2
    left, right = khatri_rao(factors[:half]), khatri_rao(factors[half:])
    if weights is not None:
        left = left * weights
    return (left @ right.mT).reshape([factor.shape[0] for factor in factors])


def khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    """(Π n_k, R): in every column the Kronecker product of the columns of the factors (n_k, R)."""
    out, *rest = factors
    for factor in rest:
        out = (out[:, None] * factor).flatten(0, 1)
    return out


def spread(factors: list[Tensor]) -> list[Tensor]:
    """Every column scaled to the geometric mean of its term's norms; a zero term becomes zero columns."""
    norms = torch.stack([torch.linalg.vector_norm(f, dim=0) for f in factors])
    share = norms.double().clamp_min(1e-300).log().mean(0).exp()
    scale = torch.where((norms > 0).all(0), share / norms.double().clamp_min(1e-300), 0.0)
    return [f * s.to(f.dtype) for f, s in zip(factors, scale, strict=True)]


def _exact(T: Tensor, longest: int) -> list[Tensor]:
    """The CP of one term per fibre along the longest mode."""
    others = [n for k, n in enumerate(T.shape) if k != longest]
    fibres = torch.cartesian_prod(*(torch.arange(n) for n in others)).reshape(-1, len(others)).T.to(T.device)
    factors = [torch.eye(n, device=T.device).to(T)[:, i] for n, i in zip(others, fibres, strict=True)]
    factors.insert(longest, T.movedim(longest, 0).flatten(1))
    return factors


def _compress(T: Tensor, rank: int) -> tuple[Tensor, list[Tensor | None]]:
    """(core, bases): long modes projected on their leading directions, at least 2·rank; None where not."""
    bases: list[Tensor | None] = [None] * T.ndim
    size = max(2 * rank, SHORT)
    for k in sorted(range(T.ndim), key=lambda k: -T.shape[k]):
        if T.shape[k] > size:
            bases[k] = U = leading_left(T.movedim(k, 0).flatten(1), size)
            T = torch.tensordot(U.mT, T.movedim(k, 0), dims=1).movedim(0, k)
    return T.contiguous(), bases


def _start(T: Tensor, rank: int, seed: int) -> list[Tensor]:
    """Leading left singular vectors of every unfolding, missing columns drawn at random; with a little noise,
    because singular vectors alone can be a saddle point."""
    generator = np.random.default_rng(seed)
    factors = []
    for k, n in enumerate(T.shape):
        U = leading_left(T.movedim(k, 0).flatten(1), min(rank, n))
        drawn = torch.as_tensor(generator.standard_normal((n, rank)) / math.sqrt(n)).to(T)
        drawn[:, : U.shape[1]] = U + NOISE * drawn[:, : U.shape[1]]
        factors.append(drawn)
    return factors


def _als(
    T: Tensor, factors: list[Tensor], sweeps: int, tol: float, ridge: float, total: float, trace: list[float]
) -> tuple[Tensor, list[Tensor]]:
    """(weights, unit-norm factors) by accelerated ALS from `factors`; `total`: ||T||² before compression."""
    if total == 0:
        return T.new_zeros(factors[0].shape[1]), factors
    weights, factors, best = _sweep(T, factors, ridge, total)
    trace.append(math.sqrt(max(best, 0) / total))
    start, momentum, ceiling, still = factors, 0.5, 1.0, 0
    for _ in range(sweeps - 1):
        new_weights, new, objective = _sweep(T, start, ridge, total)
        if not objective <= best:  # extrapolated too far, or at rounding level: again from where it was good
            if start is factors:
                break
            start, ceiling, momentum = factors, momentum, momentum / 2
            continue
        trace.append(math.sqrt(max(objective, 0) / total))
        start = [f + momentum * (f - old) for f, old in zip(new, factors, strict=True)]
        gain, best = trace[-2] - trace[-1], objective
        weights, factors = new_weights, new
        ceiling, momentum = min(1.0, 1.05 * ceiling), min(ceiling, 1.1 * momentum)
        still = still + 1 if gain < tol else 0
        if still == PATIENCE:
            break
    return weights, factors


def _sweep(
    T: Tensor, factors: list[Tensor], ridge: float, total: float
) -> tuple[Tensor, list[Tensor], float]:
    """One pass of ALS over all modes: (weights, unit-norm factors, objective)."""
    factors, d = list(factors), T.ndim
    grams = [(f.mT @ f).double() for f in factors]
    eye = torch.eye(factors[0].shape[1], dtype=torch.float64, device=T.device)
    # Two large products per sweep: T with the longest other mode for mode 0, T with mode 0 for all others.
    for k in range(d):
        if k < 2:
            away = max(range(1, d), key=lambda m: T.shape[m]) if k == 0 else 0
            partial = torch.tensordot(T, factors[away], dims=([away], [0]))
            modes = [m for m in range(d) if m != away]
        right = _reduce(partial, factors, modes, k).double()
        gram = math.prod([grams[m] for m in range(d) if m != k], start=torch.ones_like(eye))
        new = torch.linalg.solve(gram + max(ridge, FLOOR) * eye, right.mT).mT
        weights = torch.linalg.vector_norm(new, dim=0).clamp_min(torch.finfo(T.dtype).tiny)
        unit = new / weights
        factors[k], grams[k] = unit.to(T.dtype), unit.mT @ unit
    fit = total - 2 * float((right * new).sum()) + float(((new.mT @ new) * gram).sum())
    return weights.to(T.dtype), factors, fit + ridge * float((weights**2).sum())


def _reduce(X: Tensor, factors: list[Tensor], modes: list[int], k: int) -> Tensor:
    """X, of axes `modes` and a last one R, summed against the factors of its modes other than k: (n_k, R)."""
    for axis in reversed(range(len(modes))):
        if modes[axis] != k:
            factor = factors[modes[axis]]
            X = (X * factor.reshape(factor.shape[0], *[1] * (X.ndim - axis - 2), -1)).sum(axis)
    return X


def _decompose(T: Tensor, ranks: Ranks, sweeps: int = SWEEPS) -> list[Tensor]:
    (rank,) = check_ranks(ranks, 1, "CP")
    return list(cp_als(T, rank, sweeps).factors)


def _rough(T: Tensor, ranks: Ranks) -> list[Tensor]:
    return _decompose(T, ranks, sweeps=10)


def _compose(factors: Sequence[Tensor]) -> Tensor:
    return cp_compose((None, factors))


def _shapes(shape: Shape, ranks: Ranks) -> list[Shape]:
    return [(n, ranks[0]) for n in shape]


def _bounds(shape: Shape) -> Ranks:
    return (math.prod(shape) // max(shape),)


def _uniform(shape: Shape, fraction: float) -> Ranks:
    """The fraction is one of parameters: at 1 the factors are as large as the tensor."""
    return (max(1, round(fraction * math.prod(shape) / sum(shape))),)


def _clip(shape: Shape, ranks: Ranks) -> Ranks:
    return (min(ranks[0], *_bounds(shape)),)


def _compose_macs(shape: Shape, ranks: Ranks) -> int:
    return math.prod(shape) * ranks[0]


CP = Decomposition(
    name="cp",
    decompose=_decompose,
    compose=_compose,
    shapes=_shapes,
    bounds=_bounds,
    uniform=_uniform,
    clip=_clip,
    compose_macs=_compose_macs,
    rough=_rough,
    batched=False,
)
