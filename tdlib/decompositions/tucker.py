"""Tucker-2 of a convolution kernel, W ≈ core ×_0 U_out ×_1 U_in with the spatial modes left whole, and the
Tucker decomposition of a tensor in all its modes.

Source: Kim et al. 2016 (arXiv 1511.06530) for the use on kernels; De Lathauwer et al. 2000 for HOOI.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from tensorly.tucker_tensor import TuckerTensor
from torch import Tensor

from tdlib.decompositions.base import Decomposition, Ranks, Shape
from tdlib.decompositions.linalg import check_ranks, full_precision, leading_left, working
from tdlib.errors import RankError


class Tucker2Tensor(TuckerTensor):
    """TensorLy's Tucker container with factors for the first two modes; unpacks as (core, [U_out, U_in]).

    TensorLy's own class wants one factor per mode. `tensorly.tucker_to_tensor((core, factors))` composes it.
    """

    def __init__(self, tucker_tensor: tuple[Tensor, Sequence[Tensor]]) -> None:
        core, factors = tucker_tensor
        self.core = core
        self.factors = list(factors)
        self.shape = (*(f.shape[0] for f in self.factors), *core.shape[2:])
        self.rank = tuple(f.shape[1] for f in self.factors)

    def to_tensor(self) -> Tensor:
        """The full kernel (O, I, kh, kw)."""
        return tucker2_compose(self.core, self.factors)


@full_precision
def tucker2(W: Tensor, ranks: Sequence[int], sweeps: int = 2) -> Tucker2Tensor:
    """Tucker-2 of W (O, I, kh, kw), or (O, I, K) or (O, I), at ranks (r_out, r_in), cut to (O, I).

    Returns core (r_out, r_in, kh, kw) and orthonormal factors [U_out (O, r_out), U_in (I, r_in)]. Exactly
    `sweeps` sweeps of HOOI after HOSVD (0: HOSVD alone); never an error above HOSVD's.
    Raises: RankError.
    """
    if W.ndim < 2:
        raise RankError(f"tucker2 needs a kernel (O, I, ...), got shape {tuple(W.shape)}")
    r_out, r_in = check_ranks(ranks, 2, "tucker2")
    n_out, n_in, *spatial = W.shape
    # Channels last, (O, K, I): every product below is a plain matrix product.
    T = working(W).reshape(n_out, n_in, -1).transpose(1, 2).contiguous()
    K = T.shape[1]
    rows, columns = T.reshape(n_out, K * n_in), T.reshape(n_out * K, n_in)
    U_in = leading_left(columns.mT, r_in)
    if sweeps == 0:
        U_out = leading_left(rows, r_out)
    for _ in range(sweeps):
        # HOSVD's output factor would be overwritten here before it is used, so it is not computed.
        U_out = leading_left((columns @ U_in).reshape(n_out, -1), r_out)
        U_in = leading_left((U_out.mT @ rows).reshape(-1, n_in).mT, r_in)
    core = (U_out.mT @ rows).reshape(-1, n_in) @ U_in
    core = core.reshape(U_out.shape[1], K, U_in.shape[1]).transpose(1, 2)
    return Tucker2Tensor((core.reshape(*core.shape[:2], *spatial).contiguous(), [U_out, U_in]))


def tucker2_compose(core: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """The kernel (O, I, kh, kw) of core (r_out, r_in, kh, kw) and [(O, r_out), (I, r_in)]. Differentiable."""
    U_out, U_in = factors
    T = torch.einsum("oa,ab...->ob...", U_out, core)
    return torch.einsum("ob...,ib->oi...", T, U_in)


@full_precision
def tucker(T: Tensor, ranks: Sequence[int], sweeps: int = 2) -> TuckerTensor:
    """Tucker of T (n_1, ..., n_d), d ≥ 2, in all modes at ranks (r_1, ..., r_d), cut to the extents.

    Returns core (r_1, ..., r_d) and orthonormal factors [(n_k, r_k)]: HOSVD, then `sweeps` sweeps of HOOI.
    Raises: RankError.
    """
    d = T.ndim
    if d < 2:
        raise RankError(f"Tucker needs at least two modes, got shape {tuple(T.shape)}")
    ranks = check_ranks(ranks, d, f"tucker of shape {tuple(T.shape)}")
    T = working(T)
    factors = [leading_left(T.movedim(k, 0).flatten(1), ranks[k]) for k in range(d)]
    for k in [*range(d)] * sweeps:
        rest = T
        for m in range(d):
            if m != k:
                rest = torch.tensordot(rest, factors[m], dims=([m], [0])).movedim(-1, m)
        factors[k] = leading_left(rest.movedim(k, 0).flatten(1), ranks[k])
    core = tucker_compose(T, [factor.mT for factor in factors])
    return TuckerTensor((core, factors))


def tucker_compose(core: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """The tensor (n_1, ..., n_d) of core (r_1, ..., r_d) and factors [(n_k, r_k)]. Differentiable."""
    T = core
    for factor in factors:  # the first mode is contracted and comes back last: d steps restore the order
        T = (T.flatten(1).mT @ factor.mT).reshape(*T.shape[1:], factor.shape[0])
    return T


def _decompose(T: Tensor, ranks: Ranks) -> list[Tensor]:
    core, factors = tucker(T, ranks)
    return [core, *factors]


def _compose(factors: Sequence[Tensor]) -> Tensor:
    return tucker_compose(factors[0], factors[1:])


def _shapes(shape: Shape, ranks: Ranks) -> list[Shape]:
    return [ranks, *zip(shape, ranks, strict=True)]


def _bounds(shape: Shape) -> Ranks:
    return tuple(shape)


def _uniform(shape: Shape, fraction: float) -> Ranks:
    return tuple(max(1, round(fraction * n)) for n in shape)


def _clip(shape: Shape, ranks: Ranks) -> Ranks:
    return tuple(map(min, ranks, shape))


def _compose_macs(shape: Shape, ranks: Ranks) -> int:
    return sum(math.prod(shape[: k + 1]) * math.prod(ranks[k:]) for k in range(len(shape)))


def _unfoldings(T: Tensor) -> list[Tensor]:
    return [T.movedim(k, 0).flatten(1) for k in range(T.ndim)]


TUCKER = Decomposition(
    name="tucker",
    decompose=_decompose,
    compose=_compose,
    shapes=_shapes,
    bounds=_bounds,
    uniform=_uniform,
    clip=_clip,
    compose_macs=_compose_macs,
    unfoldings=_unfoldings,
)


def _decompose2(T: Tensor, ranks: Ranks) -> list[Tensor]:
    core, factors = tucker2(T, ranks)
    return [core, *factors]


def _compose2(factors: Sequence[Tensor]) -> Tensor:
    return tucker2_compose(factors[0], factors[1:])


def _shapes2(shape: Shape, ranks: Ranks) -> list[Shape]:
    return [(*ranks, *shape[2:]), (shape[0], ranks[0]), (shape[1], ranks[1])]


def _bounds2(shape: Shape) -> Ranks:
    o, i, rest = shape[0], shape[1], math.prod(shape[2:])
    return min(o, i * rest), min(i, o * rest)


def _uniform2(shape: Shape, fraction: float) -> Ranks:
    return _uniform(shape[:2], fraction)


def _clip2(shape: Shape, ranks: Ranks) -> Ranks:
    """Each rank also cut to what the other and the rest can carry: r_out ≤ r_in K and r_in ≤ r_out K."""
    rest = math.prod(shape[2:])
    r_out, r_in = map(min, ranks, _bounds2(shape))
    r_out = min(r_out, r_in * rest)
    return r_out, min(r_in, r_out * rest)


def _compose_macs2(shape: Shape, ranks: Ranks) -> int:
    (o, i), (r_out, r_in), rest = shape[:2], ranks, math.prod(shape[2:])
    return o * rest * r_in * (r_out + i)


def _unfoldings2(T: Tensor) -> list[Tensor]:
    return [T.flatten(1), T.transpose(0, 1).flatten(1)]


#: Tucker along the first two modes, the others left whole: ranks (r_out, r_in).
TUCKER2 = Decomposition(
    name="tucker2",
    decompose=_decompose2,
    compose=_compose2,
    shapes=_shapes2,
    bounds=_bounds2,
    uniform=_uniform2,
    clip=_clip2,
    compose_macs=_compose_macs2,
    unfoldings=_unfoldings2,
)
