"""CP in the norm of the layer's input: every factor by least squares under Sigma, the others fixed.

What[o, i, k] = sum_r A[o, r] B[i, r] C[k, r], with k = (kh, kw) merged (CP3) or C the column-wise product of
a factor of kh and one of kw (CP4). A has a closed form, since Sigma does not touch the output mode. B and the
spatial factors couple through Sigma: preconditioned conjugate gradients from the current factor. A proximal
term (`prox` times the mean diagonal of the R x R system, times the squared step) keeps the solves positive
definite where rank-one terms are collinear. No block ever raises the error, so every sweep is monotone.
"""

from __future__ import annotations

import torch
from tensorly.cp_tensor import CPTensor
from torch import Tensor

from tdlib.decompositions.cp import cp3, cp4, khatri_rao, spread
from tdlib.decompositions.linalg import full_precision
from tdlib.decompositions.sigma.norm import RIDGE
from tdlib.decompositions.sigma.solve import conjugate_gradients, kronecker_inverse, nearest_kronecker
from tdlib.decompositions.sigma.tucker import Problem, problem

PROX = 1e-7


@full_precision
def cp_sigma(
    W: Tensor,
    rank: int,
    S: Tensor,
    sweeps: int = 12,
    tol: float = 1e-3,
    four: bool = False,
    ridge: float = RIDGE,
    iterations: int = 8,
    trace: list[float] | None = None,
) -> CPTensor:
    """CP of W (O, I, kh, kw) at `rank` in the norm of S, started from the plain CP. CP4 if `four`, else CP3.

    Returns unit weights and balanced factors (O, R), (I, R), then (kh*kw, R) or (kh, R), (kw, R). `trace`
    receives the relative squared error at the start and after every sweep; it never rises. Stops when a sweep
    lowers it by less than `tol` of itself. `iterations`: conjugate gradient steps per factor and sweep.
    """
    p = problem(W, S, ridge)
    first = (cp4 if four else cp3)(W.float() if W.dtype != torch.float64 else W, rank)
    A, B, *spatial = [f.double() for f in first.factors]
    trace = [] if trace is None else trace
    error = _error(p, A, B, khatri_rao(spatial))
    trace.append(float(error / p.total))
    for _ in range(sweeps if p.total > 0 else 0):  # a zero kernel is found at once
        C = khatri_rao(spatial)
        A = _output(p, A, B, C)
        MA = torch.einsum("oki,or->kir", p.MS, A)
        gram = A.T @ A
        B = _input(p, MA, gram, B, C, iterations)
        for j in range(len(spatial)):
            spatial[j] = _spatial(p, MA, gram, B, spatial, j, iterations)
        A, B, *spatial = spread([A, B, *spatial])
        new = _error(p, A, B, khatri_rao(spatial))
        gain, error = error - new, new
        trace.append(float(error / p.total))
        if gain <= tol * error.clamp_min(1e-14 * p.total):
            break
    factors = [f.to(W.dtype) for f in (A, B, *spatial)]
    return CPTensor((torch.ones(A.shape[1], dtype=W.dtype, device=W.device), factors))


def _error(p: Problem, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    P = khatri_rao([C, B])
    cross = ((p.MS.flatten(1) @ P) * A).sum()
    return (p.total - 2 * cross + ((P.T @ (p.S @ P)) * (A.T @ A)).sum()).clamp_min(0)


def _output(p: Problem, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    P = khatri_rao([C, B])
    N = P.T @ (p.S @ P)
    eps = PROX * N.diagonal().mean()
    N.diagonal().add_(eps)
    return torch.linalg.solve(N, (p.MS.flatten(1) @ P + eps * A).T).T


def _input(p: Problem, MA: Tensor, gram: Tensor, B: Tensor, C: Tensor, iterations: int) -> Tensor:
    K, I = p.M.shape[1:]  # noqa: E741

    def apply(X: Tensor) -> Tensor:
        Y = p.S @ (khatri_rao([C, X]) @ gram)
        return (Y.view(K, I, -1) * C[:, None]).sum(0)

    def inner(w: Tensor) -> Tensor:
        return gram * (C.T @ w @ C)

    def weights(N: Tensor) -> Tensor:
        return C @ (gram * N) @ C.T

    right = (MA * C[:, None]).sum(0)
    solve = kronecker_inverse(*nearest_kronecker(p.S.view(K, I, K, I), inner, weights))
    return conjugate_gradients(apply, right, B, solve, iterations, 1e-4)


def _spatial(
    p: Problem, MA: Tensor, gram: Tensor, B: Tensor, spatial: list[Tensor], j: int, iterations: int
) -> Tensor:
    """Factor j of the spatial ones; through `khatri_rao` it sees the full (K, R) gradient."""
    K, I = p.M.shape[1:]  # noqa: E741
    shape = [s.shape[0] for s in spatial]
    other = spatial[1 - j] if len(spatial) == 2 else None

    def grow(X: Tensor) -> Tensor:
        return X if other is None else khatri_rao([X, other] if j == 0 else [other, X])

    def shrink(Y: Tensor) -> Tensor:
        if other is None:
            return Y
        Y = Y.view(*shape, -1)
        return (Y * other).sum(1) if j == 0 else (Y * other[:, None]).sum(0)

    def apply(X: Tensor) -> Tensor:
        Y = p.S @ (khatri_rao([grow(X), B]) @ gram)
        return shrink((Y.view(K, I, -1) * B).sum(1))

    S4 = p.S.view(K, I, K, I)
    channels = torch.einsum("kikj->ij", S4)
    N = gram * (B.T @ channels @ B)
    places = torch.einsum("kilj,ij->kl", S4, channels) / (channels * channels).sum()
    if other is not None:
        grid = places.view(*shape, *shape)
        traced = torch.einsum("ajbj->ab", grid) if j == 0 else torch.einsum("jajb->ab", grid)
        N = N * (other.T @ other) / other.shape[0]
        places = traced
    right = shrink((MA * B).sum(1))
    return conjugate_gradients(apply, right, spatial[j], kronecker_inverse(places, N), iterations, 1e-4)
