"""The truncated SVD of a matrix, as two factors of equal norm."""

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
