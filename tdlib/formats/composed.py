"""Layers whose kernel is composed from its factors in every forward pass: plain nn.Conv2d and nn.Linear with
a parametrisation of their weight (torch.nn.utils.parametrize).

Such a layer saves parameters, not MACs. `parametrize.cached()` keeps the kernel between calls.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tdlib.formats.base import Factors, KernelFormat, Ranks, Shape
from tdlib.formats.chains import Layer, finish


class Composition(nn.Module):
    """The parametrisation: factors -> kernel."""

    def __init__(self, bound: KernelFormat, factors: Factors) -> None:
        super().__init__()
        self.bound = bound
        self._given: Factors = factors  # until the layer has taken them as its parameters

    def forward(self, *factors: Tensor) -> Tensor:
        return self.bound.compose(list(factors))

    def right_inverse(self, weight: Tensor) -> Sequence[Tensor]:
        """The factors to start from, like the weight in type and device; torch asks for them once."""
        given, self._given = self._given, []
        return [f.detach().to(weight, copy=True).contiguous() for f in given]


def composed(layer: Layer, composition: Composition) -> nn.Module:
    """A copy of the layer with its weight composed of the composition's factors."""
    result = copy.deepcopy(layer)
    composition.to(layer.weight.device)
    parametrize.register_parametrization(result, "weight", composition, unsafe=True)
    return finish(layer, result)


class ComposedFormat(KernelFormat):
    """A format whose layer composes its kernel: MACs are those of the dense layer and of composing."""

    def macs(self, ranks: Ranks, hw_in: Shape, hw_out: Shape) -> int:
        dense = math.prod(self.shape) * math.prod(hw_out)
        return dense + self.decomposition.compose_macs(self.extents, tuple(ranks))

    def module(self, layer: Layer, factors: Factors) -> nn.Module:
        return composed(layer, Composition(self, factors))

    @torch.no_grad()
    def random(self, layer: Layer, ranks: Sequence[int], gain: float = 2.0) -> nn.Module:
        """Normal factors of one variance, such that the kernel's entries have variance gain / fan-in."""
        shapes = self.affordable(layer, ranks)
        # Entries are sums of as many products as there are multiplications by ones.
        ones = [torch.ones(shape, dtype=torch.float64) for shape in shapes]
        paths = float(self.decomposition.compose(ones).flatten()[0])
        std = (gain / math.prod(self.shape[1:]) / paths) ** (0.5 / len(shapes))
        return self.module(layer, [torch.randn(shape) * std for shape in shapes])
