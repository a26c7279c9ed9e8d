"""CP: one 1×1 convolution, depthwise ones, one 1×1; spatial modes merged ("cp") or apart ("cp4").

W[o, i, a, b] ≈ Σ_r A[o, r] B[i, r] C[(a, b), r], for cp4 C[a, r] D[b, r]; weights spread over the factors.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from tdlib.decompositions.cp import CP
from tdlib.decompositions.sigma import cp_sigma
from tdlib.formats.base import Factors, Format, KernelFormat, Ranks, Shape, register
from tdlib.formats.chains import Chain, conv, finish
from tdlib.formats.svd import MATRIX


class CP3(KernelFormat):
    """1×1 (I → R), depthwise k×k, 1×1 (R → O): factors (O, R), (I, R), (K, R)."""

    decomposition = CP

    def layout(self) -> Shape:
        o, i, kh, kw = self.shape
        return o, i, kh * kw

    def macs(self, ranks: Ranks, hw_in: Shape, hw_out: Shape) -> int:
        kh, kw = self.shape[2:]
        return self._macs(ranks[0], hw_in, hw_out, kh * kw * hw_out[1])

    def _macs(self, rank: int, hw_in: Shape, hw_out: Shape, depthwise: int) -> int:
        """`depthwise`: MACs of the depthwise part for one channel and one row of the output."""
        o, i = self.shape[:2]
        return rank * (i * math.prod(hw_in) + hw_out[0] * depthwise + o * math.prod(hw_out))

    def module(self, layer: nn.Conv2d, factors: Factors) -> nn.Module:
        u_out, u_in, *spatial = factors
        first, last = u_in.mT[:, :, None, None], u_out[:, :, None, None]
        middle = self.depthwise(layer, spatial)
        return finish(layer, Chain(conv(layer, first), *middle, conv(layer, last, last=True)))

    def depthwise(self, layer: nn.Conv2d, spatial: Factors) -> list[nn.Module]:
        """The convolutions between the two 1×1, from the spatial factors."""
        kernel = spatial[0].mT.reshape(-1, 1, *self.shape[2:])
        return [conv(layer, kernel, rows=True, cols=True, groups=len(kernel))]

    def decompose_sigma(self, weight: Tensor, ranks: Ranks, sigma: Tensor) -> Factors:
        return list(cp_sigma(weight, ranks[0], sigma, four=len(self.extents) == 4).factors)

    def on_output(self, factors: Factors, M: Tensor) -> Factors:
        return [M @ factors[0], *factors[1:]]


class CP4(CP3):
    """1×1 (I → R), depthwise k×1 and 1×k, 1×1 (R → O): factors (O, R), (I, R), (kh, R), (kw, R)."""

    def layout(self) -> Shape:
        return self.shape

    def macs(self, ranks: Ranks, hw_in: Shape, hw_out: Shape) -> int:
        kh, kw = self.shape[2:]
        return self._macs(ranks[0], hw_in, hw_out, kh * hw_in[1] + kw * hw_out[1])

    def depthwise(self, layer: nn.Conv2d, spatial: Factors) -> list[nn.Module]:
        rows, columns = spatial[0].mT[:, None, :, None], spatial[1].mT[:, None, None, :]
        rank = len(rows)
        return [conv(layer, rows, rows=True, groups=rank), conv(layer, columns, cols=True, groups=rank)]


register(
    Format("cp", "CP with the spatial modes merged", {"conv": CP3, **MATRIX}),
    Format("cp4", "CP with height and width apart", {"conv": CP4, **MATRIX}),
)
