"""Leading singular subspaces by the Gram matrix of the short side, and the checks that every format shares.

The m×n unfolding of a kernel is usually wide: one product gives the small Gram matrix, whose eigenvectors are
the singular vectors. The Gram matrix squares the condition number, so in float32 directions below about 3e-4
of the largest singular value are lost. That does not matter while the cut is far above them (the projection
U Uᵀ M is accurate for any orthonormal U); where it could, the Gram matrix is in float64: see `gram_dtype`.

Nothing here branches on data, so `torch.vmap` maps all of it over a stack of matrices.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from tdlib.errors import NonFiniteError, RankError

CHEAP = 128  # short sides up to which a float64 Gram matrix costs nothing that can be noticed

SMALL = 2048  # longer sides of an unfolding below which several threads save little

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def one_thread(when: bool = True) -> Iterator[None]:
    """A single thread for torch on the CPU inside; afterwards as many as before.

    For work of many small products: threads meet after each of them, and where other processes want the
    processor too, every meeting waits for a time slice (0.4 s became 30 s).
    """
    before = torch.get_num_threads()
    if when and before > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def small(*tensors: Tensor) -> bool:
    """Whether the unfoldings along the first mode have sides below `SMALL` all."""
    return all(max(len(T), T.numel() // max(1, len(T))) < SMALL for T in tensors if T.ndim)


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Run `function` without gradients, autocast or reduced-precision matrix products (TF32, bfloat16); on
    one thread where all its tensors are `small`."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        precision = torch.get_float32_matmul_precision()
        if precision != "highest":
            torch.set_float32_matmul_precision("highest")
        try:
            with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                with one_thread(small(*tensors)):
                    return function(*args, **kwargs)
        finally:
            if precision != "highest":
                torch.set_float32_matmul_precision(precision)

    return wrapped


def working(T: Tensor) -> Tensor:
    """T in the type that decompositions compute in: float64 as it is, everything else in float32."""
    return T if T.dtype in (torch.float32, torch.float64) else T.float()


def magnitude(T: Tensor) -> Tensor:
    """A power of two near the largest absolute entry of T where that is below 2^-20 or above 2^20, else 1.

    T divided by it has the same digits, and its squares neither overflow nor vanish. 1 for T = 0.
    """
    top = T.abs().amax() if T.numel() else T.new_zeros(())
    power = top.clamp_min(torch.finfo(T.dtype).tiny).log2().floor().exp2()
    return torch.where((top > 2**20) | ((top > 0) & (top < 2**-20)), power, 1)


def check_finite(T: Tensor, what: str) -> Tensor:
    """T itself. Raises NonFiniteError, naming `what`, if it holds NaN or infinity. Not for use under vmap."""
    finite = torch.isfinite(T)
    if not finite.all():
        bad = int((~finite).sum())
        raise NonFiniteError(
            f"{what} holds {bad} NaN or infinite values of {T.numel()}; nothing can be decomposed. "
            "Was training unstable, or a checkpoint read wrongly?"
        )
    return T


def check_ranks(ranks: Sequence[int] | int, count: int, what: str) -> tuple[int, ...]:
    """The ranks as a tuple of `count` integers ≥ 1 (an int counts for one). Raises RankError otherwise."""
    try:
        given: tuple[Any, ...] = tuple(ranks)  # type: ignore[arg-type]
    except TypeError:  # one number, also as a tensor
        given = (ranks,)
    if len(given) != count:
        raise RankError(f"{what} takes {count} rank{'s' * (count != 1)}, got {len(given)}: {given}")
    for rank in given:
        try:
            whole = operator.index(rank)
        except TypeError:
            whole = 0
        if whole < 1 or isinstance(rank, bool):
            raise RankError(
                f"{what} got the rank {rank!r} in {given}; a rank is an integer of at least 1 "
                "(above the bound is fine, it is cut). To keep a layer dense, leave it out of the plan."
            )
    return tuple(operator.index(rank) for rank in given)


def gram_dtype(dtype: torch.dtype, side: int, r: int) -> torch.dtype:
    """The type for a Gram matrix of this side when r directions are kept.

    float64 where small singular values matter (more than half of the directions are kept) or where it is
    cheap; the input's type otherwise.
    """
    return torch.float64 if 2 * r > side or side <= CHEAP else dtype


def top_eigenvectors(G: Tensor, r: int) -> Tensor:
    """Eigenvectors (m, r) of the symmetric G (m, m) for its r largest eigenvalues, largest first."""
    return torch.linalg.eigh(G)[1][..., -r:].flip(-1)


@full_precision
def leading_left(M: Tensor, r: int, dtype: torch.dtype | None = None) -> Tensor:
    """Leading r left singular vectors (m, min(r, m)) of M (m, n), orthonormal.

    `dtype`: of the Gram matrix; None lets `gram_dtype` choose. More than n directions are completed to an
    orthonormal basis. Returned in M's type (half precision: float32).
    """
    (r,) = check_ranks(r, 1, "leading_left")
    M = working(M)
    M = M / magnitude(M)
    m, n = M.shape
    r = min(r, m)
    if m <= n or r > n:
        A = M.to(dtype or gram_dtype(M.dtype, m, r))
        return top_eigenvectors(A @ A.mT, r).to(M.dtype)
    A = M.to(dtype or gram_dtype(M.dtype, n, r))
    # M V has orthogonal columns; QR makes them orthonormal also where singular values vanish.
    return torch.linalg.qr(A @ top_eigenvectors(A.mT @ A, r))[0].to(M.dtype)


@full_precision
def split(M: Tensor, r: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """(A (m, r), B (r, n)) with A B the best rank-r approximation of M (m, n).

    One of the two, that of the short side, is orthonormal. r is cut to min(m, n).
    """
    M = working(M)
    m, n = M.shape
    r = min(r, m, n)
    if m <= n:
        U = leading_left(M, r, dtype)
        return U, U.mT @ M
    V = leading_left(M.mT, r, dtype)
    return M @ V, V.mT


@full_precision
def truncated_svd(M: Tensor, r: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(U (m, r), S (r,), Vh (r, n)), largest singular value first; r is cut to min(m, n).

    U diag(S) Vh is the projection of M on its leading subspace, to rounding. Vectors of the long side that
    belong to singular values at rounding level have unit length but are not orthogonal; where the value is
    zero, so are they.
    """
    (r,) = check_ranks(r, 1, "truncated_svd")
    A, B = split(M, r, dtype)
    tiny, size = torch.finfo(A.dtype).tiny, magnitude(M.to(A.dtype))
    if M.shape[0] <= M.shape[1]:
        S = torch.linalg.vector_norm(B / size, dim=1) * size
        return A, S, B / S.clamp_min(tiny)[:, None]
    S = torch.linalg.vector_norm(A / size, dim=0) * size
    return A / S.clamp_min(tiny), S, B


@full_precision
def singular_values(M: Tensor) -> Tensor:
    """All min(m, n) singular values of M (m, n), largest first, by a float64 Gram matrix.

    Values below 1e-8 of the largest are rounding noise.
    """
    A = working(M).double()
    G = A @ A.mT if A.shape[0] <= A.shape[1] else A.mT @ A
    return torch.linalg.eigvalsh(G).flip(-1).clamp_min(0).sqrt().to(working(M).dtype)
