"""Factorisations that are a matrix SVD: plain, and spatial (k×1 then 1×k)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tdlib.decompositions.base import Decomposition, Ranks, Shape
from tdlib.decompositions.linalg import check_ranks, full_precision, truncated_svd


@full_precision
def svd_factors(M: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """(A (m, r), B (r, n)): A B is the best rank-r approximation of M (m, n), r cut to min(m, n).

    Both carry the root of the singular values, so training moves them at the same rate. Raises: RankError.
    """
    (r,) = check_ranks(r, 1, "svd_factors")
    U, S, Vh = truncated_svd(M, r)
    root = S.sqrt()
    return U * root, root[:, None] * Vh


@full_precision
def spatial_svd(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """(V (r, I, kh, 1), H (O, r, 1, kw)), W[o, i, a, b] ≈ Σ_r H[o, r, b] V[r, i, a]; r ≤ min(I kh, O kw).

    Source: Jaderberg et al. 2014 (arXiv 1405.3866), scheme 2, solved in closed form. Raises: RankError.
    """
    n_out, n_in, kh, kw = W.shape
    A, B = svd_factors(W.permute(1, 2, 0, 3).reshape(n_in * kh, n_out * kw), r)
    V = A.mT.reshape(-1, n_in, kh, 1)
    H = B.reshape(-1, n_out, 1, kw).transpose(0, 1)
    return V.contiguous(), H.contiguous()


def _decompose(M: Tensor, ranks: Ranks) -> list[Tensor]:
    (r,) = check_ranks(ranks, 1, "SVD")
    return list(svd_factors(M, r))


def _compose(factors: Sequence[Tensor]) -> Tensor:
    A, B = factors
    return A @ B


def _shapes(shape: Shape, ranks: Ranks) -> list[Shape]:
    return [(shape[0], ranks[0]), (ranks[0], shape[1])]


def _bounds(shape: Shape) -> Ranks:
    return (min(shape),)


def _uniform(shape: Shape, fraction: float) -> Ranks:
    return (max(1, round(fraction * min(shape))),)


def _clip(shape: Shape, ranks: Ranks) -> Ranks:
    return (min(ranks[0], *shape),)


def _compose_macs(shape: Shape, ranks: Ranks) -> int:
    return shape[0] * ranks[0] * shape[1]


def _unfoldings(M: Tensor) -> list[Tensor]:
    return [M]


SVD = Decomposition(
    name="svd",
    decompose=_decompose,
    compose=_compose,
    shapes=_shapes,
    bounds=_bounds,
    uniform=_uniform,
    clip=_clip,
    compose_macs=_compose_macs,
    unfoldings=_unfoldings,
)
