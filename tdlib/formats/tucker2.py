"""Tucker along output and input channels: the chain 1×1 (I → r_in), k×k (r_in → r_out), 1×1 (r_out → O).

W = core ×_0 U_out ×_1 U_in, factors [core (r_out, r_in, ...), U_out (O, r_out), U_in (I, r_in)].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tdlib.decompositions.sigma import tucker2_sigma
from tdlib.decompositions.tucker import TUCKER2
from tdlib.formats.base import SPATIAL, Factors, Format, KernelFormat, Ranks, Shape, register
from tdlib.formats.chains import Conv, bottleneck_chain
from tdlib.formats.svd import CHANNELS


class Bottleneck(KernelFormat):
    """What Tucker-2 and the train of three cores share: ranks (r_out, r_in) and the cost of the chain."""

    def uniform(self, fraction: float) -> Ranks:
        # The same share of the channels in every layer, also where a kernel's rank is bounded below them.
        o, i = self.shape[:2]
        return self.clip((max(1, round(fraction * o)), max(1, round(fraction * i))))

    def macs(self, ranks: Ranks, hw_in: Shape, hw_out: Shape) -> int:
        (o, i, *sizes), (r_out, r_in) = self.shape, ranks
        return r_in * i * math.prod(hw_in) + r_out * (r_in * math.prod(sizes) + o) * math.prod(hw_out)


class Tucker2(Bottleneck):
    decomposition = TUCKER2

    def layout(self) -> Shape:
        return self.shape

    def module(self, layer: Conv, factors: Factors) -> nn.Module:
        return bottleneck_chain(layer, *factors)

    def decompose_sigma(self, weight: Tensor, ranks: Ranks, sigma: Tensor) -> Factors:
        core, factors = tucker2_sigma(weight, ranks, sigma)
        return [core, *factors]

    def on_output(self, factors: Factors, M: Tensor) -> Factors:
        core, out, inp = factors
        Q, R = torch.linalg.qr(M @ out)  # the factor stays orthonormal
        return [torch.einsum("ab,b...->a...", R, core), Q, inp]


register(
    Format(
        "tucker2",
        "Tucker along output and input channels",
        {**dict.fromkeys(SPATIAL, Tucker2), **CHANNELS},
    )
)
