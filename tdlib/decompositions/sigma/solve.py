"""Solvers shared by the decompositions in the norm of Sigma: conjugate gradients and Kronecker
preconditioners.

All unknowns are factors X (m, r) whose normal equations are sum_kl S_kl X N_kl^T over pairs of spatial
positions, with S_kl (m, m) blocks of Sigma and N_kl (r, r) products of the other factors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Linear = Callable[[Tensor], Tensor]


def conjugate_gradients(
    apply: Linear, right: Tensor, x: Tensor, precondition: Linear, iterations: int, rtol: float
) -> Tensor:
    """Solve apply(x) = right from x; stops at `rtol` times the first preconditioned residual.

    Every iteration lowers the quadratic x·apply(x)/2 - x·right, so stopping early never raises the error.
    """
    residual = right - apply(x)
    direction = z = precondition(residual)
    rho = first = (residual * z).sum()
    for _ in range(iterations):
        if rho <= rtol**2 * first or rho <= 0:
            break
        image = apply(direction)
        curvature = (direction * image).sum()
        if curvature <= 0:
            break
        step = rho / curvature
        x, residual = x + step * direction, residual - step * image
        z = precondition(residual)
        rho, previous = (residual * z).sum(), rho
        direction = z + (rho / previous) * direction
    return x


def nearest_kronecker(S4: Tensor, inner: Linear, weights: Linear, steps: int = 2) -> tuple[Tensor, Tensor]:
    """(A (m, m), B (r, r)) with A x B near sum_kl S_kl x N_kl (Van Loan and Pitsianis 1993, by power
    iteration).

    S4: (K, m, K, m). inner(w (K, K)) = sum_kl w_kl N_kl; weights(B)[k, l] = <N_kl, B>.
    """
    K = S4.shape[0]
    A = torch.einsum("kikj->ij", S4)
    B = inner(torch.eye(K, dtype=S4.dtype, device=S4.device))
    for _ in range(steps):
        B = inner(torch.einsum("kilj,ij->kl", S4, A) / (A * A).sum())
        A = torch.einsum("kl,kilj->ij", weights(B) / (B * B).sum(), S4)
    return A, B


def kronecker_inverse(A: Tensor, B: Tensor) -> Linear:
    """R (m, r) -> A^-1 R B^-1, with eigenvalues of either below 1e-6 of its largest raised to that."""
    (a, U), (b, V) = _spectrum(A), _spectrum(B)

    def solve(R: Tensor) -> Tensor:
        return U @ ((U.T @ R @ V) / (a[:, None] * b)) @ V.T

    return solve


def _spectrum(A: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh((A + A.T) / 2)
    return values.clamp_min(1e-6 * values[-1].clamp_min(torch.finfo(A.dtype).tiny)), vectors
