"""Tensor train by successive truncated SVDs, and the layout that turns a kernel into a tensor.

A kernel (O, I, kh, kw) becomes (*out_modes, K, *in_modes), K = kh·kw: the spatial mode sits in the middle
core and the channels may be factorised.
Sources: Oseledets 2011 for TT-SVD; Yin et al., CVPR 2021 (arXiv 2107.12422) for the layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from operator import mul

from tensorly.tt_tensor import TTTensor
from torch import Tensor

from tdlib.decompositions.base import Decomposition, Ranks, Shape
from tdlib.decompositions.cores import close, close_macs, core_shapes
from tdlib.decompositions.linalg import check_ranks, full_precision, leading_left, split, working
from tdlib.errors import RankError


def tt_rank_bounds(shape: Sequence[int]) -> tuple[int, ...]:
    """The ndim - 1 inner ranks at which a train of this shape is exact: the unfoldings' short sides."""
    return tuple(min(math.prod(shape[:k]), math.prod(shape[k:])) for k in range(1, len(shape)))


def tt_clip(shape: Sequence[int], ranks: Sequence[int]) -> tuple[int, ...]:
    """Effective inner ranks: within `tt_rank_bounds`, r_k ≤ r_{k-1} n_k and r_k ≤ n_{k+1} r_{k+1}."""
    cut = list(map(min, ranks, tt_rank_bounds(shape)))
    for k in range(len(cut)):
        cut[k] = min(cut[k], (cut[k - 1] if k else 1) * shape[k])
    for k in reversed(range(len(cut) - 1)):
        cut[k] = min(cut[k], shape[k + 1] * cut[k + 1])
    return tuple(cut)


@full_precision
def tt_svd(T: Tensor, ranks: Sequence[int]) -> TTTensor:
    """TT-SVD of T (n_1, ..., n_d) at the d - 1 inner ranks, cut by `tt_clip`.

    Returns cores (r_{k-1}, n_k, r_k), r_0 = r_d = 1; all but the last two are left-orthonormal. The squared
    error is at most the sum of the squared errors of the d - 1 unfoldings. Raises: RankError.
    """
    if T.ndim < 1:
        raise RankError("tt_svd needs a tensor with at least one mode, got a number")
    sizes = tuple(T.shape)
    wanted = tt_clip(sizes, check_ranks(ranks, len(sizes) - 1, f"tt_svd of shape {sizes}"))
    cores, rest, r = [], working(T).reshape(1, -1), 1
    for k, (n, new) in enumerate(zip(sizes[:-1], wanted, strict=True)):
        M = rest.reshape(r * n, -1)
        if k == len(sizes) - 2:  # nothing is cut after this one, so either side may carry the norm
            left, rest = split(M, new)
        else:
            left = leading_left(M, new)
            rest = left.mT @ M
        cores.append(left.reshape(r, n, -1))
        r = cores[-1].shape[2]
    cores.append(rest.reshape(r, sizes[-1], 1))
    return TTTensor(cores)


def tt_compose(cores: Sequence[Tensor]) -> Tensor:
    """The tensor (n_1, ..., n_d) of cores (r_{k-1}, n_k, r_k) with r_0 = r_d = 1. Differentiable."""
    return close(cores)


def conv_to_tt_tensor(
    W: Tensor, out_modes: Sequence[int] | None = None, in_modes: Sequence[int] | None = None
) -> Tensor:
    """(O, I, kh, kw) to (*out_modes, K, *in_modes); (O, I) to (*out_modes, *in_modes). Default: whole modes.

    Raises: RankError if the modes do not multiply to the channels.
    """
    modes = []
    for name, chosen, size in (("out_modes", out_modes, W.shape[0]), ("in_modes", in_modes, W.shape[1])):
        modes.append((size,) if chosen is None else tuple(chosen))
        if math.prod(modes[-1]) != size:
            raise RankError(
                f"{name}={modes[-1]} multiply to {math.prod(modes[-1])}, but there are {size} channels"
            )
    if W.ndim == 2:
        return W.reshape(*modes[0], *modes[1])
    return W.flatten(2).transpose(1, 2).reshape(*modes[0], -1, *modes[1])


def tt_tensor_to_conv(T: Tensor, shape: Sequence[int]) -> Tensor:
    """Inverse of `conv_to_tt_tensor`: the kernel of this shape, (O, I, kh, kw) or (O, I)."""
    shape = tuple(shape)
    if len(shape) == 2:
        return T.reshape(shape)
    return T.reshape(shape[0], -1, shape[1]).transpose(1, 2).reshape(shape)


def _decompose(T: Tensor, ranks: Ranks) -> list[Tensor]:
    return list(tt_svd(T, ranks))


def _shapes(shape: Shape, ranks: Ranks) -> list[Shape]:
    return core_shapes(shape, (1, *ranks))


def _uniform(shape: Shape, fraction: float) -> Ranks:
    return tuple(max(1, round(fraction * bound)) for bound in tt_rank_bounds(shape))


def _compose_macs(shape: Shape, ranks: Ranks) -> int:
    return close_macs(shape, (1, *ranks))


def _unfoldings(T: Tensor) -> list[Tensor]:
    return [T.reshape(rows, -1) for rows in list(accumulate(T.shape, mul))[:-1]]


TT = Decomposition(
    name="tt",
    decompose=_decompose,
    compose=tt_compose,
    shapes=_shapes,
    bounds=tt_rank_bounds,
    uniform=_uniform,
    clip=tt_clip,
    compose_macs=_compose_macs,
    unfoldings=_unfoldings,
)
