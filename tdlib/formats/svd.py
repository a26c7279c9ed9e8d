"""Matrix factorisations: W = A B for linear layers and 1×1 convolutions, k×1 then 1×k for the others.

Spatial: W[o, i, a, b] ≈ Σ_r H[o, r, b] V[r, i, a] (Jaderberg et al. 2014, arXiv 1405.3866, scheme 2), which
is the SVD of a matrix of shape (I·kh, O·kw).
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from tdlib.decompositions.sigma import svd_sigma
from tdlib.decompositions.svd import SVD
from tdlib.formats.base import Factors, Format, KernelFormat, Ranks, Shape, register
from tdlib.formats.chains import Chain, Layer, conv, finish, matrix_chain


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


#: What formats make of layers without spatial extent.
MATRIX = {"pointwise": Matrix, "linear": Matrix}


class Spatial(KernelFormat):
    """A convolution k×1 (I → r) and one 1×k (r → O): factors (I·kh, r) and (r, O·kw)."""

    decomposition = SVD

    def layout(self) -> Shape:
        o, i, kh, kw = self.shape
        return i * kh, o * kw

    def fold(self, weight: Tensor) -> Tensor:
        return weight.permute(1, 2, 0, 3).reshape(self.extents)

    def unfold(self, tensor: Tensor) -> Tensor:
        o, i, kh, kw = self.shape
        return tensor.reshape(i, kh, o, kw).permute(2, 0, 1, 3)

    def macs(self, ranks: Ranks, hw_in: Shape, hw_out: Shape) -> int:
        o, i, kh, kw = self.shape
        # The k×1 has already strided along the height when the 1×k runs.
        return ranks[0] * hw_out[0] * (i * kh * hw_in[1] + o * kw * hw_out[1])

    def module(self, layer: nn.Conv2d, factors: Factors) -> nn.Module:
        a, b = factors
        o, i, kh, kw = self.shape
        v, h = a.mT.reshape(-1, i, kh, 1), b.reshape(-1, o, 1, kw).transpose(0, 1)
        return finish(layer, Chain(conv(layer, v, rows=True), conv(layer, h, cols=True, last=True)))


register(Format("svd", "matrix SVD; k×1 then 1×k for convolutions", {"conv": Spatial, **MATRIX}))
