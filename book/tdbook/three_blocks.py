"""Tucker2-ALS-Σ as its authors run it: the reference beside which this library's solver is held.

Kalle et al., NeurIPS 2025, Algorithm 2, after the authors' `Tucker_Sigma.py`: input factor, output factor and
core in turn, each by least squares with the other two fixed. Ours instead, in float64 and with an exact solve
where they run MINRES in float32. `tdlib.decompositions.sigma.tucker2_sigma` minimises the same error in two
blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from inspect import signature
from itertools import product
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from tdlib.decompositions import tucker2
from tdlib.decompositions.sigma import regularise, sigma_error, tucker2_sigma
from tdlib.decompositions.tucker import Tucker2Tensor
from tdlib.formats import get_format


def tucker2_three_blocks(
    W: Tensor, ranks: Sequence[int], S: Tensor, iterations: int = 100, tol: float = 1e-6
) -> tuple[Tucker2Tensor, list[float]]:
    """(core (r_out, r_in, kh, kw) and factors [(O, r_out), (I, r_in)], relative Σ-errors from the start on).

    W: (O, I, kh, kw); S: (I*kh*kw, I*kh*kw). Starts at HOSVD's factors; stops after `iterations`, when the
    error changes by less than `tol`, or when it rises, with what came before.
    """
    O, I = W.shape[:2]  # noqa: E741
    M = W.double().reshape(O, I, -1)
    K = M.shape[2]
    S = regularise(S).reshape(I, K, I, K)
    MS = torch.einsum("oik,ikjl->ojl", M, S)
    V = _directions(M.transpose(0, 1), ranks[1])
    U = _directions(M, ranks[0])
    G = _core(S, MS, U, V)
    errors = [_error(S, M, U, G, V)]
    for _ in range(iterations):
        before = U, G, V
        V = _input(S, MS, U, G)
        U = _output(S, MS, G, V)
        G = _core(S, MS, U, V)
        errors.append(_error(S, M, U, G, V))
        if len(errors) > 2 and errors[-1] > errors[-2]:
            U, G, V = before
            break
        if len(errors) > 2 and errors[-2] - errors[-1] < tol:
            break
    return Tucker2Tensor((G.reshape(*G.shape[:2], *W.shape[2:]), [U, V])), errors


def _directions(unfolded: Tensor, rank: int) -> Tensor:
    return torch.linalg.svd(unfolded.flatten(1), full_matrices=False)[0][:, :rank]


def _core(S: Tensor, MS: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """Best G (r_out, r_in, K)."""
    r, K = V.shape[1], S.shape[1]
    A = torch.einsum("ib,ikjl,jc->bkcl", V, S, V).reshape(r * K, r * K)
    X = torch.linalg.solve(A, torch.einsum("oik,ib->bko", MS, V).reshape(r * K, -1))
    return torch.linalg.solve(U.T @ U, U.T @ X.T).reshape(-1, r, K)


def _input(S: Tensor, MS: Tensor, U: Tensor, G: Tensor) -> Tensor:
    """Best V (I, r_in), by its normal equations in all I * r_in unknowns."""
    I, r = S.shape[0], G.shape[1]  # noqa: E741
    N = torch.einsum("abk,ad,dcl->bkcl", G, U.T @ U, G)
    A = torch.einsum("ikjl,bkcl->ibjc", S, N).reshape(I * r, I * r)
    right = torch.einsum("oik,oa,abk->ib", MS, U, G)
    return torch.linalg.solve(A, right.reshape(-1)).view(I, r)


def _output(S: Tensor, MS: Tensor, G: Tensor, V: Tensor) -> Tensor:
    """Best U (O, r_out)."""
    P = torch.einsum("abk,ib->aik", G, V)
    A = torch.einsum("aik,ikjl,cjl->ac", P, S, P)
    return torch.linalg.solve(A, torch.einsum("oik,aik->ao", MS, P)).T


def _error(S: Tensor, M: Tensor, U: Tensor, G: Tensor, V: Tensor) -> float:
    found = torch.einsum("oa,abk,ib->oik", U, G, V)
    return sigma_error(M, found, S.flatten(2).flatten(0, 1))


def solvers(
    kernels: Mapping[str, Tensor], statistics: Mapping[str, Tensor], fractions: Iterable[float]
) -> pd.DataFrame:
    """Layers × shares of the channels: relative Σ-errors of either solver at the same ranks, and its sweeps.

    Columns: layer, ranks, frobenius (plain Tucker-2), authors, authors_sweeps, ours, ours_sweeps.
    """
    rows: list[dict[str, Any]] = []
    for name, fraction in product(kernels, fractions):
        W, S = kernels[name].double(), statistics[name]
        ranks = get_format("tucker2").bind(W.shape).uniform(fraction)
        trace: list[float] = []
        errors = tucker2_three_blocks(W, ranks, S)[1]
        ours = tucker2_sigma(W, ranks, S, trace=trace)
        rows.append({
            "layer": name, "ranks": ranks, "frobenius": sigma_error(W, tucker2(W, ranks).to_tensor(), S),
            "authors": min(errors), "authors_sweeps": len(errors) - 1,
            "ours": sigma_error(W, ours.to_tensor(), S), "ours_sweeps": len(trace) - 1,
        })  # fmt: skip
    return pd.DataFrame(rows)


def shown(found: pd.DataFrame) -> pd.DataFrame:
    """The table of `solvers` in words, a star where the authors' algorithm ran into its last sweep."""
    last = signature(tucker2_three_blocks).parameters["iterations"].default
    sweeps = [f"{n} *" if n == last else str(n) for n in found["authors_sweeps"]]
    heads = {
        "frobenius": "plain Tucker-2", "authors": "the authors'", "authors_sweeps": "their sweeps (*: all)",
        "ours": "this library's", "ours_sweeps": "its sweeps",
    }  # fmt: skip
    table = found.assign(authors_sweeps=sweeps).set_index(["layer", "ranks"])
    return table.round(4).rename(columns=heads)


def limits() -> str:
    """When either solver stops, in words, from their default arguments."""
    theirs, ours = (
        {name: given.default for name, given in signature(solver).parameters.items()}
        for solver in (tucker2_three_blocks, tucker2_sigma)
    )
    return (
        f"The authors' algorithm stops after at most {theirs['iterations']} sweeps, or when one changes the "
        f"relative error by less than {theirs['tol']:g}; this library's after at most {ours['sweeps']}, or "
        f"when one lowers the squared error by less than {ours['tol']:g} of itself."
    )


def compared(found: pd.DataFrame) -> str:
    """How far apart the two errors of `solvers` are, in words."""
    excess = 100 * (found["ours"] / found["authors"] - 1)
    sides = {"above": excess.max(), "below": -excess.min()}
    most = [f"at most {part:.2f} % {side}" if part > 0 else f"never {side}" for side, part in sides.items()]
    return (
        f"Over {len(found)} kernels and ranks, the error of this library's solver is {most[0]} and {most[1]} "
        "that of the authors' algorithm."
    )
