"""Tucker-2 (and the three-core TT, the same set of kernels) in the norm of the layer's input.

The kernel is What[o, i, k] = sum_ab Uo[o, a] G[a, b, k] Ui[i, b]. Blocks:
- for a fixed input factor Ui, core and output factor together are a reduced-rank regression: with P = Ui x
  I_K, the best unconstrained B = M S P (P^T S P)^-1, and cutting it to rank r_out in the metric P^T S P is
  one `eigh` of an (O, O) matrix. The error falls out: ||M||_S^2 minus the kept eigenvalues.
- for fixed core and output factor, Ui solves a linear system with matrix sum_kk' S_kk' x N_kk' (N = G^T G),
  by Cholesky when it is small and by preconditioned conjugate gradients from the current Ui otherwise. Both
  blocks minimise the same convex function exactly, or at least never raise it, so every sweep is monotone.

Inside, kernels are (O, K, I) and S is (K*I, K*I) with the channel fastest: all products are plain GEMMs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tdlib.decompositions.linalg import full_precision
from tdlib.decompositions.sigma.norm import RIDGE, check_size, leading, regularise
from tdlib.decompositions.sigma.solve import conjugate_gradients, kronecker_inverse, nearest_kronecker
from tdlib.decompositions.tucker import Tucker2Tensor

DIRECT_LIMIT = 256  # unknowns of the input factor up to which Cholesky beats conjugate gradients (measured)


@dataclass(frozen=True)
class Problem:
    """M (O, K, I) kernel, S (K*I, K*I), MS = M S (O, K, I), total = ||M||_S^2; float64."""

    M: Tensor
    S: Tensor
    MS: Tensor
    total: Tensor


def problem(W: Tensor, S: Tensor, ridge: float) -> Problem:
    """Reorder W (O, I, ...) and S (I*K, I*K) to the channel-fastest order of this file."""
    O, I = W.shape[:2]  # noqa: E741
    M = W.double().reshape(O, I, -1)
    check_size(M.flatten(1), S)
    K = M.shape[2]
    S = regularise(S, ridge).reshape(I, K, I, K).permute(1, 0, 3, 2).reshape(K * I, K * I).contiguous()
    M = M.transpose(1, 2).contiguous()
    MS = (M.flatten(1) @ S).view(O, K, I)
    return Problem(M, S, MS, (M * MS).sum())


def core_and_output(p: Problem, V: Tensor, r_out: int) -> tuple[Tensor, Tensor, Tensor]:
    """Best (U (O, r_out) orthonormal, G (r_out, K, r_in), squared error) for the input factor V (I, r_in)."""
    O, K, I = p.M.shape  # noqa: E741
    r = V.shape[1]
    SV = (p.S.view(K * I * K, I) @ V).view(K, I, K * r)
    Sp = torch.matmul(V.T, SV).reshape(K * r, K * r)
    C = (p.MS.reshape(O * K, I) @ V).view(O, K * r)
    L = torch.linalg.cholesky((Sp + Sp.T) / 2)
    Z = torch.linalg.solve_triangular(L, C.T, upper=False)
    U, kept = leading(Z.T @ Z, min(r_out, O))
    G = torch.linalg.solve_triangular(L.T, Z @ U, upper=True).T.reshape(-1, K, r)
    return U, G, p.total - kept.sum()


def input_factor(
    p: Problem, U: Tensor, G: Tensor, V: Tensor, iterations: int = 12, rtol: float = 1e-3
) -> Tensor:
    """Best V (I, r_in) for core G (r_out, K, r_in) and orthonormal U (O, r_out), starting from V."""
    O, K, I = p.M.shape  # noqa: E741
    r = V.shape[1]
    right = (U.T @ p.MS.reshape(O, K * I)).reshape(-1, I).T @ G.reshape(-1, r)
    if I * r <= DIRECT_LIMIT:
        N = torch.einsum("akb,alc->klbc", G, G).reshape(K * K, r * r)
        A = p.S.view(K, I, K, I).permute(1, 3, 0, 2).reshape(I * I, K * K) @ N
        A = A.view(I, I, r, r).transpose(1, 2).reshape(I * r, I * r)
        A.diagonal().add_(1e-13 * A.diagonal().mean())
        return torch.cholesky_solve(right.reshape(-1, 1), torch.linalg.cholesky(A)).view(I, r)

    def apply(X: Tensor) -> Tensor:
        Y = torch.matmul(G, X.T).flatten(1) @ p.S
        return torch.einsum("aki,akb->ib", Y.view(-1, K, I), G)

    def inner(w: Tensor) -> Tensor:
        return torch.einsum("akb,kl,alc->bc", G, w, G)

    def weights(B: Tensor) -> Tensor:
        return torch.einsum("akb,bc,alc->kl", G, B, G)

    A, B = nearest_kronecker(p.S.view(K, I, K, I), inner, weights)
    return conjugate_gradients(apply, right, V, kronecker_inverse(A, B), iterations, rtol)


def starts(p: Problem, r_in: int) -> list[Tensor]:
    """Two first input factors (I, r_in): HOSVD's, and HOSVD's in the metric of the channel covariance."""
    O, K, I = p.M.shape  # noqa: E741
    M = p.M.reshape(O * K, I)
    plain, _ = leading(M.T @ M, r_in)
    A = torch.einsum("kikj->ij", p.S.view(K, I, K, I))
    values, vectors = torch.linalg.eigh(A)
    half = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    Q, _ = leading(half @ (M.T @ M) @ half, r_in)
    inverse = vectors * values.clamp_min(1e-8 * values[-1]).rsqrt()
    return [plain, torch.linalg.qr(inverse @ (vectors.T @ Q))[0]]


@full_precision
def tucker2_sigma(
    W: Tensor,
    ranks: Sequence[int],
    S: Tensor,
    sweeps: int = 30,
    tol: float = 1e-3,
    ridge: float = RIDGE,
    start: Tensor | None = None,
    trace: list[float] | None = None,
) -> Tucker2Tensor:
    """Tucker-2 of W (O, I, kh, kw) with ranks (r_out, r_in) that minimises the error in the norm of S.

    Returns core (r_out, r_in, kh, kw) and factors [U_out (O, r_out), U_in (I, r_in)], both orthonormal.
    `start`: a first input factor (I, r_in) instead of the better of two built in. `trace` receives the
    relative squared error after every sweep, which never rises. Stops when it falls by less than `tol` of
    itself.
    """
    p = problem(W, S, ridge)
    O, K, I = p.M.shape  # noqa: E741
    r_out, r_in = min(ranks[0], O), min(ranks[1], I)
    r_out, r_in = min(r_out, r_in * K), min(r_in, r_out * K)
    candidates = starts(p, r_in) if start is None else [torch.linalg.qr(start.double())[0]]
    (U, G, error), V = min(
        ((core_and_output(p, V, r_out), V) for V in candidates), key=lambda c: float(c[0][2])
    )
    trace = [] if trace is None else trace
    trace.append(float(error / p.total))
    for _ in range(sweeps if r_in < I and p.total > 0 else 0):  # else found at once
        V = torch.linalg.qr(input_factor(p, U, G, V))[0]
        U, G, new = core_and_output(p, V, r_out)
        gain, error = error - new, new
        trace.append(float(error / p.total))
        if gain <= tol * error.clamp_min(1e-14 * p.total):
            break
    core = G.transpose(1, 2).reshape(r_out, r_in, *W.shape[2:])
    return Tucker2Tensor((core.to(W.dtype), [U.to(W.dtype), V.to(W.dtype)]))
