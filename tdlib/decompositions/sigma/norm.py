"""Low-rank approximation in the norm of the layer's input: minimise ||(W - What) S^(1/2)||_F.

S = E[x x^T] is the uncentred second moment of the layer's input (patches for a convolution), so the squared
error is exactly the mean squared change of the layer's output. `S` has size (n, n) with n = I*kh*kw in the
order of `W.reshape(O, -1)`: channel, then kh, then kw.

S is singular more often than not (dead channels, constant padding, fewer patches than n), and its products
in float32 leave it with eigenvalues down to some -1e-6 * mean(diag S). Every solver therefore minimises the
norm of `S + ridge * mean(diag S) * I`: with a ridge of 1e-8, or as much more as makes this positive definite,
the Frobenius norm only decides among kernels which S cannot tell apart, and all projected systems are
positive definite. Everything runs in float64.

Source: Kalle et al., Distribution-aware tensor decomposition, NeurIPS 2025 (arXiv 2511.04494). The closed
forms for core and output factor together, and for TT, are ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tdlib.decompositions.linalg import full_precision
from tdlib.errors import DataError, NonFiniteError

RIDGE = 1e-8


def regularise(S: Tensor, ridge: float = RIDGE) -> Tensor:
    """`S + ridge * mean(diag S) * I` in float64, symmetric and positive definite: the ridge grows tenfold
    until it is. The identity where S is zero (a dead layer).

    Raises: DataError if S is not square or far from positive semi-definite, NonFiniteError for NaN or Inf.
    """
    if S.ndim != 2 or S.shape[0] != S.shape[1]:
        raise DataError(f"Sigma must be a square matrix, got shape {tuple(S.shape)}")
    S = S.double()
    if not torch.isfinite(S).all():
        raise NonFiniteError("Sigma holds NaN or Inf")
    scale = S.diagonal().mean()
    if scale <= 0:
        return torch.eye(S.shape[0], dtype=S.dtype, device=S.device)
    S = (S + S.T) / 2
    added = 0.0
    while ridge < 1e-2:
        S.diagonal().add_((ridge - added) * scale)
        if not torch.linalg.cholesky_ex(S).info:
            return S
        added, ridge = ridge, 10 * ridge
    raise DataError(
        "Sigma is no second moment: it has large negative eigenvalues (perhaps centred, of inputs all alike?)"
    )


def root(S: Tensor) -> Tensor:
    """L (n, n) with L L^T = S for any positive semi-definite S: eigenvectors times the root of the clipped
    eigenvalues.
    """
    values, vectors = torch.linalg.eigh(S.double())
    return vectors * values.clamp_min(0).sqrt()


@full_precision
def pinv_root(S: Tensor, rtol: float = 1e-12) -> tuple[Tensor, Tensor]:
    """(S^(1/2), S^(-1/2)), symmetric; eigenvalues below rtol * largest count as zero in the inverse."""
    values, vectors = torch.linalg.eigh(S.double())
    values = values.clamp_min(0)
    keep = values > rtol * values[-1]
    inverse = torch.where(keep, values, 1.0).rsqrt() * keep
    return (vectors * values.sqrt()) @ vectors.T, (vectors * inverse) @ vectors.T


def sigma_norm2(M: Tensor, S: Tensor) -> Tensor:
    """||M S^(1/2)||_F^2 for M (O, n): mean squared output of the layer with weight M (scalar, float64)."""
    M = M.double()
    return ((M @ S.double()) * M).sum()


@full_precision
def sigma_error(W: Tensor, What: Tensor, S: Tensor) -> float:
    """Relative error ||(W - What) S^(1/2)|| / ||W S^(1/2)|| in [0, inf): root mean squared output error over
    output.

    W and What: (O, I, kh, kw) or (O, I); S: (n, n).
    """
    W, What = W.double().flatten(1), What.double().flatten(1)
    check_size(W, S)
    error, total = sigma_norm2(W - What, S), sigma_norm2(W, S)
    if total <= 0:
        return 0.0 if error <= 0 else float("inf")
    return float((error.clamp_min(0) / total).sqrt())


def check_size(M: Tensor, S: Tensor) -> None:
    """Raises DataError unless S is (n, n) for the n columns of M."""
    if tuple(S.shape) != (M.shape[1], M.shape[1]):
        raise DataError(
            f"Sigma has shape {tuple(S.shape)}, but a weight with {M.shape[1]} inputs per output needs "
            f"({M.shape[1]}, {M.shape[1]}); statistics of another layer or model?"
        )


@full_precision
def svd_sigma(M: Tensor, r: int, S: Tensor, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """(A (O, r), B (r, n)): the rank-r matrix nearest to M (O, n) in the norm of S. Closed form, no inverse.

    With U the leading left singular vectors of M S^(1/2) (eigenvectors of M S M^T), the optimum is U U^T M:
    the truncated SVD of M S^(1/2) times S^(-1/2). A and B carry the root of the singular values each, as the
    plain SVD.
    """
    check_size(M, S)
    dtype, M = M.dtype, M.double()
    U, values = leading(M @ regularise(S, ridge) @ M.T, r)
    scale = balance(values)
    return (U * scale).to(dtype), ((U.T @ M) / scale[:, None]).to(dtype)


def leading(G: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Leading r eigenvectors (m, r) of the symmetric G (m, m) and their eigenvalues (r,), largest first."""
    values, vectors = torch.linalg.eigh((G + G.T) / 2)
    return vectors[:, -r:].flip(1), values[-r:].flip(0).clamp_min(0)


def balance(values: Tensor) -> Tensor:
    """Fourth root of the eigenvalues, floored: splits the singular values evenly over both factors without
    dividing by 0.
    """
    top = values[0].clamp_min(torch.finfo(values.dtype).tiny)
    return (values / top).clamp_min(1e-12).pow(0.25) * top.pow(0.25)


@full_precision
def corrected_target(W: Tensor, cross: Tensor, S: Tensor, ridge: float = 1e-6) -> Tensor:
    """The kernel that best gives the ORIGINAL output from the inputs of the compressed network (same shape as
    W).

    cross = E[x xhat^T] (n, n) with x the input in the dense network and xhat in the compressed one, S =
    E[xhat xhat^T]. argmin_M E||W x - M xhat||^2 = W cross S^-1, pulled towards W by the ridge; low-rank
    approximation of M under S is then the optimal asymmetric reconstruction (Zhang et al. 2015, arXiv
    1505.06798, for a matrix).
    """
    M, S64 = W.double().flatten(1), regularise(S, ridge)
    check_size(M, S)
    jitter = S64.diagonal().mean() - S.double().diagonal().mean()
    right = (M @ cross.double() + jitter * M).T
    return torch.linalg.solve(S64, right).T.reshape(W.shape).to(W.dtype)
