"""Tensor train over (O, K, I): the chain 1×1, k×k, 1×1; with factorised channels cores over (*out, K, *in).

A convolution's kernel is transposed to (*out_modes, K, *in_modes), a linear layer's reshaped to
(*out_modes, *in_modes). Sources: Oseledets 2011; Yin et al., CVPR 2021 (arXiv 2107.12422) for the layout.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tdlib.decompositions.sigma import tt_sigma
from tdlib.decompositions.tt import TT, conv_to_tt_tensor, tt_tensor_to_conv
from tdlib.formats.base import Factors, Format, KernelFormat, Ranks, Shape, channel_modes, register
from tdlib.formats.chains import bottleneck_chain, finish
from tdlib.formats.contraction import RingConv2d, RingLinear, ring_macs
from tdlib.formats.svd import MATRIX
from tdlib.formats.tucker2 import Bottleneck


class TrainChain(Bottleneck):
    """Three cores, (1, O, r_out), (r_out, K, r_in), (r_in, I, 1), as a chain of three convolutions."""

    decomposition = TT

    def layout(self) -> Shape:
        o, i, kh, kw = self.shape
        return o, kh * kw, i

    def fold(self, weight: Tensor) -> Tensor:
        return conv_to_tt_tensor(weight)

    def unfold(self, tensor: Tensor) -> Tensor:
        return tt_tensor_to_conv(tensor, self.shape)

    def module(self, layer: nn.Conv2d, factors: Factors) -> nn.Module:
        first, middle, last = factors
        core = middle.transpose(1, 2).unflatten(2, self.shape[2:])
        return bottleneck_chain(layer, core, first[0], last[:, :, 0].mT)

    def decompose_sigma(self, weight: Tensor, ranks: Ranks, sigma: Tensor) -> Factors:
        return list(tt_sigma(weight, ranks, sigma))

    def on_output(self, factors: Factors, M: Tensor) -> Factors:
        return [torch.einsum("ab,xbr->xar", M, factors[0]), *factors[1:]]


class Cores(KernelFormat):
    """Cores (r_k, n_k, r_{k+1}) over (*out_modes, K, *in_modes), contracted one by one in the layer."""

    def resolve(self, options: dict[str, Any]) -> dict[str, Any]:
        return channel_modes(self.shape, options)

    def layout(self) -> Shape:
        middle = (math.prod(self.shape[2:]),) if len(self.shape) == 4 else ()
        return (*self.out_modes, *middle, *self.in_modes)

    @property
    def out_modes(self) -> Shape:
        return self.options.get("out_modes", self.shape[:1])

    @property
    def in_modes(self) -> Shape:
        return self.options.get("in_modes", self.shape[1:2])

    def fold(self, weight: Tensor) -> Tensor:
        return conv_to_tt_tensor(weight, self.out_modes, self.in_modes)

    def unfold(self, tensor: Tensor) -> Tensor:
        return tt_tensor_to_conv(tensor, self.shape)

    def macs(self, ranks: Ranks, hw_in: Shape, hw_out: Shape) -> int:
        n_out, n_in = len(self.out_modes), len(self.in_modes)
        middle = self.extents[n_out : len(self.extents) - n_in]
        ring = self.ring(ranks)
        return ring_macs(self.out_modes, middle, self.in_modes, ring, math.prod(hw_in), math.prod(hw_out))

    def ring(self, ranks: Ranks) -> Ranks:
        """The ranks with the closing one first."""
        return ranks

    def module(self, layer: Any, factors: Factors) -> nn.Module:
        n_out = len(self.out_modes)
        outs, ins = factors[:n_out], factors[len(factors) - len(self.in_modes) :]
        if isinstance(layer, nn.Linear):
            return finish(layer, RingLinear(layer, outs, ins))
        return finish(layer, RingConv2d(layer, outs, factors[n_out], ins))


class TrainCores(Cores):
    """A train: a ring whose closing rank is 1. Its ranks are the inner ones."""

    decomposition = TT

    def ring(self, ranks: Ranks) -> Ranks:
        return (1, *ranks)

    def decompose_sigma(self, weight: Tensor, ranks: Ranks, sigma: Tensor) -> Factors:
        return list(tt_sigma(weight, ranks, sigma, self.out_modes, self.in_modes))


register(
    Format(
        "tt",
        "tensor train over (O, K, I), channels optionally factorised",
        kinds={"conv": TrainChain, **MATRIX},
        factored={"conv": TrainCores, "pointwise": TrainCores, "linear": TrainCores},
        options=("out_modes", "in_modes", "order"),
    )
)
