"""Matrix factorisations: W = A B for linear layers and 1×1 convolutions, k×1 then 1×k for the others (1-D: k
then 1, 3-D: k×1×1 then 1×k×k).

Spatial: W[o, i, a, b] ≈ Σ_r H[o, r, b] V[r, i, a] (Jaderberg et al. 2014, arXiv 1405.3866, scheme 2), which
is the SVD of a matrix of shape (I·kh, O·kw).
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from tdlib.decompositions.sigma import svd_sigma
from tdlib.decompositions.svd import SVD
from tdlib.formats.base import POINTWISE, SPATIAL, Factors, Format, KernelFormat, Ranks, Shape, register
from tdlib.formats.chains import Chain, Conv, Layer, all_axes, conv, finish, matrix_chain


class Matrix(KernelFormat):
    """A linear layer or 1×1 convolution as two: factors A (O, r) and B (r, I)."""

    decomposition = SVD

    def layout(self) -> Shape:
        return self.shape[:2]

    def macs(self, ranks: Ranks, hw_in: Shape, hw_out: Shape) -> int:
        # A stride sits on the first 1×1, so both factors run at output resolution.
        return ranks[0] * (self.shape[0] + self.shape[1]) * math.prod(hw_out)

    def module(self, layer: Layer, factors: Factors) -> nn.Module:
        return matrix_chain(layer, factors)

    def decompose_sigma(self, weight: Tensor, ranks: Ranks, sigma: Tensor) -> Factors:
        return list(svd_sigma(self.fold(weight), ranks[0], sigma))

    def on_output(self, factors: Factors, M: Tensor) -> Factors:
        return [M @ factors[0], factors[1]]


#: What formats make of layers without spatial extent: linear ones and 2-D convolutions, or all.
MATRIX = {"pointwise": Matrix, "linear": Matrix}
CHANNELS = {**MATRIX, **dict.fromkeys(POINTWISE, Matrix)}


class Spatial(KernelFormat):
    """A convolution k×1 (I → r) and one 1×k (r → O): factors (I·kh, r) and (r, O·kw). In other dimensions:
    along the first, then along the rest."""

    decomposition = SVD

    def layout(self) -> Shape:
        o, i, k, *rest = self.shape
        return i * k, o * math.prod(rest)

    def fold(self, weight: Tensor) -> Tensor:
        return weight.movedim(0, 2).reshape(self.extents)

    def unfold(self, tensor: Tensor) -> Tensor:
        o, i, k, *rest = self.shape
        return tensor.reshape(i, k, o, *rest).movedim(2, 0)

    def macs(self, ranks: Ranks, hw_in: Shape, hw_out: Shape) -> int:
        o, i, k, *rest = self.shape
        # The k×1 has already strided along the height when the 1×k runs.
        first, second = i * k * math.prod(hw_in[1:]), o * math.prod(rest) * math.prod(hw_out[1:])
        return ranks[0] * hw_out[0] * (first + second)

    def module(self, layer: Conv, factors: Factors) -> nn.Module:
        a, b = factors
        o, i, k, *rest = self.shape
        v = a.mT.reshape(-1, i, k, *[1] * len(rest))
        h = b.reshape(-1, o, 1, *rest).transpose(0, 1)
        along, across = all_axes(layer)[:1], all_axes(layer)[1:]
        return finish(layer, Chain(conv(layer, v, axes=along), conv(layer, h, axes=across, last=True)))


register(
    Format(
        "svd",
        "matrix SVD; k×1 then 1×k for convolutions",
        {**dict.fromkeys(SPATIAL, Spatial), **CHANNELS},
    )
)
