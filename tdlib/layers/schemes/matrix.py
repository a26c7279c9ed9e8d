"""Matrix factorisations: W = A B for linear layers and 1×1 convolutions, k×1 then 1×k for the others.

Spatial: W[o, i, a, b] ≈ Σ_r H[o, r, b] V[r, i, a] (Jaderberg et al. 2014), a matrix of shape (I·kh, O·kw).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tdlib.layers.chains import matrix_chain, spatial_chain
from tdlib.layers.scheme import Factors, Ranks, Scheme, Shape
from tdlib.tensor import matrix


def scaled(fraction: float, *sizes: int) -> Ranks:
    """`fraction` of each size, rounded, at least 1."""
    return tuple(max(1, round(fraction * size)) for size in sizes)


def _factorise(weight: Tensor, ranks: Ranks) -> Factors:
    return list(matrix.svd_factors(weight.reshape(weight.shape[:2]), ranks[0]))


def _factorise_sigma(weight: Tensor, ranks: Ranks, sigma: Any) -> Factors:
    from tdlib.tensor.sigma import svd_sigma

    return list(svd_sigma(weight.reshape(weight.shape[:2]), ranks[0], sigma))


def _compose(factors: Factors, shape: Shape) -> Tensor:
    return (factors[0] @ factors[1]).reshape(shape)


def _macs(shape: Shape, ranks: Ranks, hw_in: Shape, hw_out: Shape) -> int:
    # A stride sits on the first 1×1, so both factors run at output resolution.
    return ranks[0] * (shape[0] + shape[1]) * math.prod(hw_out)


MATRIX = Scheme(
    factorise=_factorise,
    compose=_compose,
    build=matrix_chain,
    shapes=lambda shape, ranks: [(shape[0], ranks[0]), (ranks[0], shape[1])],
    macs=_macs,
    bounds=lambda shape: (min(shape[:2]),),
    at=lambda shape, fraction: scaled(fraction, min(shape[:2])),
    unfoldings=lambda weight: [weight.reshape(weight.shape[:2])],
    factorise_sigma=_factorise_sigma,
    on_output=lambda factors, M: [M @ factors[0], *factors[1:]],
)


def _spatial_shapes(shape: Shape, ranks: Ranks) -> list[Shape]:
    o, i, kh, kw = shape
    return [(ranks[0], i, kh, 1), (o, ranks[0], 1, kw)]


def _spatial_macs(shape: Shape, ranks: Ranks, hw_in: Shape, hw_out: Shape) -> int:
    o, i, kh, kw = shape
    # The k×1 has already strided along the height when the 1×k runs.
    return ranks[0] * hw_out[0] * (i * kh * hw_in[1] + o * kw * hw_out[1])


def _spatial_compose(factors: Factors, shape: Shape) -> Tensor:
    return torch.einsum("riax,orxb->oiab", *factors)


def _spatial_bound(shape: Shape) -> int:
    return min(shape[1] * shape[2], shape[0] * shape[3])


def _spatial_unfolding(weight: Tensor) -> list[Tensor]:
    o, i, kh, kw = weight.shape
    return [weight.permute(1, 2, 0, 3).reshape(i * kh, o * kw)]


SPATIAL = Scheme(
    factorise=lambda weight, ranks: list(matrix.spatial_svd(weight, ranks[0])),
    compose=_spatial_compose,
    build=spatial_chain,
    shapes=_spatial_shapes,
    macs=_spatial_macs,
    bounds=lambda shape: (_spatial_bound(shape),),
    at=lambda shape, fraction: scaled(fraction, _spatial_bound(shape)),
    unfoldings=_spatial_unfolding,
)
