"""Ranks from the singular values of a matrix: by retained energy, and by Bayesian matrix factorisation."""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import minimize_scalar
from torch import Tensor

from tdlib.decompositions.linalg import check_finite, singular_values
from tdlib.errors import RankError


def energy_rank(M: Tensor, energy: float) -> int:
    """Smallest r ≥ 1 at which the leading singular values of M (m, n) hold `energy`, in (0, 1], of ||M||²."""
    if not 0 < energy <= 1:
        raise RankError(f"energy is the retained fraction of the squared norm, in (0, 1]; got {energy!r}")
    squares = singular_values(check_finite(M, "the matrix").double()).square().cpu().numpy()
    if squares[0] == 0:
        return 1
    squares[squares < squares[0] * 1e-15] = 0  # rounding noise of the Gram matrix
    held = np.cumsum(squares)
    return int(np.searchsorted(held, energy * held[-1] * (1 - 1e-14)) + 1)


def evbmf_rank(M: Tensor) -> int:
    """Rank of M (m, n) by empirical variational Bayes, with the noise variance estimated. May be 0.

    With L ≤ N the sides, a = L/N and x_h = γ_h²/(N σ²) the scaled squared singular values, components above
    x_min = (1 + τ)(1 + a/τ), τ = 2.5129 √a, are kept, and σ² minimises the free energy
    Σ_h x_h - log x_h + [x_h > x_min] (log(t_h + 1) + a log(t_h/a + 1) - t_h), where t_h solves
    x_h = (1 + t_h)(1 + a/t_h). Source: Nakajima et al., JMLR 14 (2013), the analytic empirical solution.
    """
    check_finite(M, "the matrix")
    short, long = sorted(M.shape)
    squares = singular_values(M.double()).square().cpu().numpy()
    if squares[0] == 0:
        return 0
    squares = np.maximum(squares, squares[0] * 1e-16)
    a = short / long
    tau = 2.5129 * math.sqrt(a)
    x_min = (1 + tau) * (1 + a / tau)

    def free_energy(log_variance: np.ndarray | float) -> np.ndarray:
        x = squares / (long * np.exp(np.asarray(log_variance, dtype=float)[..., None]))
        kept = x > x_min
        b = np.where(kept, x, x_min) - (1 + a)
        t = (b + np.sqrt(np.maximum(b * b - 4 * a, 0))) / 2
        gain = np.log1p(t) + a * np.log1p(t / a) - t
        return (x - np.log(x) + kept * gain).sum(-1)

    # The variance lies between these bounds; the free energy has kinks, so a grid precedes the refinement.
    most = min(math.ceil(short / (1 + a)) - 1, short - 1)
    lower = max(squares[most] / (long * x_min), squares[most:].mean() / long)
    upper = squares.sum() / (short * long)
    grid = np.linspace(math.log(lower), math.log(upper) + 1e-12, 256)
    best = int(np.argmin(free_energy(grid)))
    near = (grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)])
    found = minimize_scalar(free_energy, bounds=near, method="bounded", options={"xatol": 1e-10})
    log_variance = found.x if found.fun < free_energy(grid[best]) else grid[best]
    return int((squares > long * math.exp(log_variance) * x_min).sum())
