"""A decomposed layer at smaller ranks: what is decomposed again is the core, so that a chain never grows.

Of a Tucker-2 chain only the core G (of the two factors of an SVD, the second) is decomposed, and the new
outer factors A, B are multiplied into the 1×1 convolutions around it:

    W = G x_0 U x_1 V,   G ~ G' x_0 A x_1 B   =>   W ~ G' x_0 (U A) x_1 (V B)                       (3)

Training makes U and V lose their orthonormal columns; the core nearest to G is then not the one nearest to W.
With `orthogonal` the triangular factors of U and V move into G first, which makes (3) the Tucker-2 projection
of W itself. A CP core is diagonal, so a smaller rank is fitted to the kernel.

Source: Gusak et al., ICCV Workshops 2019 (arXiv 1903.09973), and their code; `orthogonal` is ours.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tdlib.decompositions.svd import SVD, svd_factors
from tdlib.decompositions.tucker import TUCKER2, tucker2
from tdlib.errors import NonFiniteError
from tdlib.formats.base import Factors, KernelFormat, Ranks
from tdlib.formats.chains import bias_of, to_dense


class Recompression:
    """One layer on its way: the geometry it started from, the module it is now, and how to shrink that."""

    def __init__(self, name: str, kernel: KernelFormat, dense: nn.Module, orthogonal: bool) -> None:
        self.name, self.kernel, self.orthogonal = name, kernel, orthogonal
        self.geometry: Any = copy.deepcopy(dense)
        self.module: Any = dense
        self.dense = True

    @property
    def refitted(self) -> bool:
        """Whether a smaller rank is fitted to the whole kernel: the first pass, and CP in every pass."""
        return self.dense or self.kernel.decomposition not in (TUCKER2, SVD)

    def core(self) -> Tensor:
        """What the next pass decomposes; its unfoldings are those that EVBMF sees."""
        return to_dense(self.module).detach() if self.refitted else self._factors()[0]

    def shrink(self, ranks: Ranks) -> nn.Module:
        """The module of these (smaller) ranks, from now on the present one. Raises NonFiniteError."""
        if not all(bool(torch.isfinite(p).all()) for p in self.module.parameters()):
            raise NonFiniteError(
                f"layer {self.name!r} has NaN or Inf in its weights: lower the fine-tuning lr"
            )
        if self.refitted:
            factors = self.kernel.decompose(to_dense(self.module).detach(), ranks)
        else:
            factors = recompress(self._factors(), ranks)
        last = self.module if self.dense else self.module[-1]
        self.geometry.to(last.weight.device, last.weight.dtype).train(self.module.training)
        self.geometry.bias = bias_of(last)
        self.module, self.dense = self.kernel.module(self.geometry, factors), False
        return self.module

    def _factors(self) -> Factors:
        """[core (r_out, r_in, kh, kw), U (O, r_out), V (I, r_in)] of the chain, or [A (O, r), B (r, I)]."""
        weights = [member.weight.detach().float() for member in self.module]
        if len(weights) == 2:
            factors = [weights[1].flatten(1), weights[0].flatten(1)]
        else:
            factors = [weights[1], weights[2].flatten(1), weights[0].flatten(1).mT]
        return orthogonalise(factors) if self.orthogonal else factors


def orthogonalise(factors: Factors) -> Factors:
    """The same kernel with orthonormal outer factors: their triangular parts are multiplied into the core."""
    if len(factors) == 2:
        q, r = torch.linalg.qr(factors[1].mT)
        return [factors[0] @ r.mT, q.mT]
    core, u, v = factors
    (q_u, r_u), (q_v, r_v) = torch.linalg.qr(u), torch.linalg.qr(v)
    return [torch.einsum("ab,bc...,dc->ad...", r_u, core, r_v), q_u, q_v]


def recompress(factors: Factors, ranks: Sequence[int]) -> Factors:
    """Equation (3): decompose the core (or A of A B) at `ranks`, multiply the new outer factors outwards."""
    if len(factors) == 2:
        second, first = svd_factors(factors[0], ranks[0])
        return [second, first @ factors[1]]
    core, (a, b) = tucker2(factors[0], ranks)
    return [core, factors[1] @ a, factors[2] @ b]
