"""Factorisations that are matrix SVDs after a reshape: plain, spatial (k×1 then 1×k) and TT-matrix."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from tensorly.tt_matrix import TTMatrix
from torch import Tensor

from tdlib.errors import RankError
from tdlib.tensor.linalg import check_ranks, full_precision, truncated_svd
from tdlib.tensor.tt import tt_svd


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


@full_precision
def tt_matrix(M: Tensor, out_modes: Sequence[int], in_modes: Sequence[int], ranks: Sequence[int]) -> TTMatrix:
    """TT-matrix of M (O, I): a train over paired modes, cores (r_{k-1}, o_k, i_k, r_k); d - 1 inner ranks.

    Source: Novikov et al. 2015 (arXiv 1509.06569). Raises: RankError.
    """
    outs, ins, d = tuple(out_modes), tuple(in_modes), len(out_modes)
    if len(ins) != d or (math.prod(outs), math.prod(ins)) != tuple(M.shape):
        raise RankError(
            f"tt_matrix of shape {tuple(M.shape)} needs as many out_modes as in_modes that multiply to it, "
            f"got out_modes={outs} and in_modes={ins}"
        )
    check_ranks(ranks, d - 1, "tt_matrix")
    paired = M.reshape(*outs, *ins).permute([axis for k in range(d) for axis in (k, d + k)])
    cores = tt_svd(paired.reshape([o * i for o, i in zip(outs, ins, strict=True)]), ranks)
    return TTMatrix([c.reshape(c.shape[0], o, i, -1) for c, o, i in zip(cores, outs, ins, strict=True)])


def tt_matrix_compose(cores: Sequence[Tensor]) -> Tensor:
    """The matrix (Π o_k, Π i_k) of cores (r_{k-1}, o_k, i_k, r_k). Differentiable."""
    full = torch.ones_like(cores[0][:, 0, :1, :1])  # (rows, columns, r) with one row and one column
    for core in cores:
        full = torch.einsum("mnr,rois->monis", full, core)
        m, o, n, i, s = full.shape
        full = full.reshape(m * o, n * i, s)
    return full[:, :, 0]


@functools.cache
def factorise_modes(n: int, d: int) -> tuple[int, ...]:
    """n as a product of d whole numbers, as equal as possible (least sum), ascending: (48, 2) -> (6, 8)."""
    if n < 1 or d < 1:
        raise RankError(f"factorise_modes needs n ≥ 1 and d ≥ 1, got n={n}, d={d}")
    if d == 1:
        return (n,)
    # The smallest factor is at most the d-th root.
    small = (k for k in range(1, math.isqrt(n) + 1) if n % k == 0 and k**d <= n)
    options = (tuple(sorted((k, *factorise_modes(n // k, d - 1)))) for k in small)
    return min(options, key=lambda f: (sum(f), f[-1]))
