"""Tensor train in the norm of the layer's input.

With whole channels the train (O, K, I) at ranks (r_out, r_in) is the same set of kernels as Tucker-2, so its
optimum is `tucker2_sigma` rewritten as cores. With factorised channels (or linear layers as trains) every
core in turn solves its normal equations by conjugate gradients, the cores left of it kept orthonormal;
monotone, but not in closed form.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensorly.tt_tensor import TTTensor
from torch import Tensor

from tdlib.decompositions.cores import chain
from tdlib.decompositions.linalg import full_precision
from tdlib.decompositions.sigma.norm import RIDGE, svd_sigma
from tdlib.decompositions.sigma.solve import conjugate_gradients
from tdlib.decompositions.sigma.tucker import Problem, problem, tucker2_sigma
from tdlib.decompositions.tt import conv_to_tt_tensor, tt_compose, tt_svd


@full_precision
def tt_sigma(
    W: Tensor,
    ranks: Sequence[int],
    S: Tensor,
    out_modes: Sequence[int] | None = None,
    in_modes: Sequence[int] | None = None,
    sweeps: int = 30,
    tol: float = 1e-3,
    ridge: float = RIDGE,
    trace: list[float] | None = None,
) -> TTTensor:
    """Train of W (O, I, kh, kw) over (*out_modes, K, *in_modes), or of (O, I) over (*out_modes, *in_modes).

    Cores (r_{k-1}, n_k, r_k); `ranks` are the inner ones. `trace` as for `tucker2_sigma`.
    """
    whole = all(m is None or len(tuple(m)) == 1 for m in (out_modes, in_modes))
    if whole and W.ndim == 2:
        A, B = svd_sigma(W, ranks[0], S, ridge)
        return TTTensor([A[None], B[:, :, None]])
    if whole:
        core, (U, V) = tucker2_sigma(W, (ranks[0], ranks[1]), S, sweeps, tol, ridge, trace=trace)
        return TTTensor([U[None], core.flatten(2).transpose(1, 2).contiguous(), V.T[:, :, None].contiguous()])
    p = problem(W, S, ridge)
    start = tt_svd(conv_to_tt_tensor(W, out_modes, in_modes).double(), ranks)
    cores = _als(p, list(start), sweeps, tol, [] if trace is None else trace)
    return TTTensor([c.to(W.dtype) for c in cores])


def _als(p: Problem, cores: list[Tensor], sweeps: int, tol: float, trace: list[float]) -> list[Tensor]:
    """Alternating least squares over the cores from first to last, with QR to the right after each."""
    error = _error(p, cores)
    trace.append(float(error / p.total))
    for _ in range(sweeps):
        cores = _orthogonal_from_the_right(cores)
        for k in range(len(cores)):
            cores[k] = _core(p, cores, k)
            if k + 1 < len(cores):
                a, n, b = cores[k].shape
                Q, R = torch.linalg.qr(cores[k].reshape(a * n, b))
                cores[k] = Q.reshape(a, n, -1)
                cores[k + 1] = torch.tensordot(R, cores[k + 1], dims=1)
        new = _error(p, cores)
        gain, error = error - new, new
        trace.append(float(error / p.total))
        if gain <= tol * error.clamp_min(1e-14 * p.total):
            break
    return cores


def _core(p: Problem, cores: list[Tensor], k: int, iterations: int = 20) -> Tensor:
    """Core k (a, n, b) by least squares under Sigma, started from its present value."""
    O, n_in = p.M.shape[0], p.M.shape[1] * p.M.shape[2]  # noqa: E741
    end = cores[k].new_ones(1, 1, 1)  # chains may be empty
    left = chain([end, *cores[:k]])[0]  # (rows, a)
    right = chain([*cores[k + 1 :], end])[..., 0]  # (b, columns)
    values, vectors = torch.linalg.eigh(right @ right.T)
    values = values.clamp_min(1e-10 * values[-1].clamp_min(torch.finfo(values.dtype).tiny))

    def back(Y: Tensor) -> Tensor:
        Y = Y.reshape(left.shape[0], -1, right.shape[1])
        return torch.tensordot(left.T, Y @ right.T, dims=1)

    def apply(X: Tensor) -> Tensor:
        full = torch.tensordot(left, X, dims=1) @ right
        return back(full.reshape(O, n_in) @ p.S)

    def precondition(R: Tensor) -> Tensor:
        return ((R @ vectors) / values) @ vectors.T

    return conjugate_gradients(apply, back(p.MS.flatten(1)), cores[k], precondition, iterations, 1e-4)


def _orthogonal_from_the_right(cores: list[Tensor]) -> list[Tensor]:
    cores = list(cores)
    for k in range(len(cores) - 1, 0, -1):
        a, n, b = cores[k].shape
        Q, R = torch.linalg.qr(cores[k].reshape(a, n * b).T)
        cores[k] = Q.T.reshape(-1, n, b)
        cores[k - 1] = torch.tensordot(cores[k - 1], R.T, dims=1)
    return cores


def _error(p: Problem, cores: list[Tensor]) -> Tensor:
    rest = p.M.flatten(1) - tt_compose(cores).reshape(p.M.shape[0], -1)
    return ((rest @ p.S) * rest).sum().clamp_min(0)
