"""CP: one 1×1 convolution, depthwise ones, one 1×1; spatial modes merged ("cp") or apart ("cp4", of which a
1-D convolution has three and a 3-D one five).

W[o, i, a, b] ≈ Σ_r A[o, r] B[i, r] C[(a, b), r], for cp4 C[a, r] D[b, r]; weights spread over the factors.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from tdlib.decompositions.cp import CP
from tdlib.decompositions.sigma import cp_sigma
from tdlib.errors import TdlibError
from tdlib.formats.base import SPATIAL, Factors, Format, KernelFormat, Ranks, Shape, register
from tdlib.formats.chains import Chain, Conv, all_axes, conv, finish
from tdlib.formats.svd import CHANNELS


class CP3(KernelFormat):
    """1×1 (I → R), depthwise k×k, 1×1 (R → O): factors (O, R), (I, R), (K, R)."""

    decomposition = CP

    def layout(self) -> Shape:
        o, i, *sizes = self.shape
        return o, i, math.prod(sizes)

    def macs(self, ranks: Ranks, hw_in: Shape, hw_out: Shape) -> int:
        o, i = self.shape[:2]
        return ranks[0] * (i * math.prod(hw_in) + self.depthwise_macs(hw_in, hw_out) + o * math.prod(hw_out))

    def depthwise_macs(self, hw_in: Shape, hw_out: Shape) -> int:
        """MACs of the depthwise part for one channel."""
        return math.prod(self.shape[2:]) * math.prod(hw_out)

    def module(self, layer: Conv, factors: Factors) -> nn.Module:
        u_out, u_in, *spatial = factors
        middle = self.depthwise(layer, spatial)
        return finish(layer, Chain(conv(layer, u_in.mT), *middle, conv(layer, u_out, last=True)))

    def depthwise(self, layer: Conv, spatial: Factors) -> list[nn.Module]:
        """The convolutions between the two 1×1, from the spatial factors."""
        kernel = spatial[0].mT.reshape(-1, 1, *self.shape[2:])
        return [conv(layer, kernel, axes=all_axes(layer), groups=len(kernel))]

    def decompose_sigma(self, weight: Tensor, ranks: Ranks, sigma: Tensor) -> Factors:
        if len(self.extents) == 5:
            raise TdlibError("cp4 has no data-aware decomposition of a 3-D convolution; choose cp or tucker2")
        return list(cp_sigma(weight, ranks[0], sigma, four=len(self.extents) == 4).factors)

    def on_output(self, factors: Factors, M: Tensor) -> Factors:
        return [M @ factors[0], *factors[1:]]


class CP4(CP3):
    """1×1 (I → R), depthwise k×1 and 1×k (one for each dimension), 1×1 (R → O): factors (O, R), (I, R),
    (kh, R), (kw, R)."""

    def layout(self) -> Shape:
        return self.shape

    def depthwise_macs(self, hw_in: Shape, hw_out: Shape) -> int:
        # The dimensions before the k-th have strided already.
        sizes = enumerate(self.shape[2:], start=1)
        return sum(size * math.prod(hw_out[:k]) * math.prod(hw_in[k:]) for k, size in sizes)

    def depthwise(self, layer: Conv, spatial: Factors) -> list[nn.Module]:
        members = []
        for axis, factor in enumerate(spatial):
            size = [-1 if k == axis else 1 for k in all_axes(layer)]
            rank = factor.shape[1]
            members.append(conv(layer, factor.mT.reshape(rank, 1, *size), axes=[axis], groups=rank))
        return members


register(
    Format("cp", "CP with the spatial modes merged", {**dict.fromkeys(SPATIAL, CP3), **CHANNELS}),
    Format("cp4", "CP with height and width apart", {**dict.fromkeys(SPATIAL, CP4), **CHANNELS}),
)
