"""Make a factorised chain smaller without making it longer: decompose its core, merge the new factors
outwards.

    W = G x_0 U x_1 V,   G ~ G' x_0 A x_1 B   =>   W ~ G' x_0 (U A) x_1 (V B)
    W = A B,             A ~ A' C             =>   W ~ A' (C B)

Source: the second and later passes of Gusak et al., ICCV Workshops 2019 (arXiv 1903.09973).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..tensor.matrix import svd_factors
from ..tensor.tucker import tucker2
from .scheme import Factors


def chain_factors(chain: nn.Sequential) -> Factors:
    """[core (r_out, r_in, kh, kw), U (O, r_out), V (I, r_in)] of a Tucker-2 chain, [A (O, r), B (r, I)] of an
    SVD's.
    """
    weights = [member.get_parameter("weight").detach() for member in chain]
    if len(weights) == 3:
        return [weights[1], weights[2].flatten(1), weights[0].flatten(1).mT]
    return [weights[1].flatten(1), weights[0].flatten(1)]


def orthogonalise(factors: Factors) -> Factors:
    """The same kernel with orthonormal outer factors: their triangular parts are multiplied into the core."""
    if len(factors) == 2:
        q, r = torch.linalg.qr(factors[1].mT)
        return [factors[0] @ r.mT, q.mT]
    core, u, v = factors
    (q_u, r_u), (q_v, r_v) = torch.linalg.qr(u), torch.linalg.qr(v)
    return [torch.einsum("ab,bckl,dc->adkl", r_u, core, r_v), q_u, q_v]


def shrink(factors: Factors, ranks: Sequence[int]) -> Factors:
    """Decompose the core (or the second factor A) at `ranks` and multiply the new outer factors into the
    others.
    """
    if len(factors) == 2:
        second, first = svd_factors(factors[0], ranks[0])
        return [second, first @ factors[1]]
    core, (a, b) = tucker2(factors[0], ranks)
    return [core, factors[1] @ a, factors[2] @ b]
