"""TT-matrix, for linear layers: row and column modes of one position share a core (r_{k-1}, o_k, i_k, r_k).

Source: Novikov et al. 2015 (arXiv 1509.06569).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tdlib.decompositions.tt import TT
from tdlib.decompositions.tt_matrix import matrix_to_tt_tensor, tt_tensor_to_matrix
from tdlib.errors import RankError
from tdlib.formats.base import Factors, Format, KernelFormat, Ranks, Shape, channel_modes, register
from tdlib.formats.chains import Factorised, Layer, bias_of, finish, parameter


class TTMatrix(KernelFormat):
    """The train of M[(o_1, i_1), ..., (o_d, i_d)]: cores (r_{k-1}, o_k i_k, r_k)."""

    decomposition = TT

    def resolve(self, options: dict[str, Any]) -> dict[str, Any]:
        modes = channel_modes(self.shape, options)
        if len(modes["out_modes"]) != len(modes["in_modes"]):
            raise RankError(
                "a TT-matrix pairs its modes and needs as many out_modes as in_modes, "
                f"got {modes['out_modes']} and {modes['in_modes']}"
            )
        return modes

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(o_k, i_k)."""
        return list(zip(self.options["out_modes"], self.options["in_modes"], strict=True))

    def layout(self) -> Shape:
        return tuple(o * i for o, i in self.pairs)

    def fold(self, weight: Tensor) -> Tensor:
        return matrix_to_tt_tensor(weight, self.options["out_modes"], self.options["in_modes"])

    def unfold(self, tensor: Tensor) -> Tensor:
        return tt_tensor_to_matrix(tensor, self.options["out_modes"], self.options["in_modes"])

    def macs(self, ranks: Ranks, hw_in: Shape, hw_out: Shape) -> int:
        closed, done, macs = (1, *ranks, 1), 1, 0
        for k in range(len(self.pairs), 0, -1):
            o, _ = self.pairs[k - 1]
            macs += math.prod(self.options["in_modes"][:k]) * done * closed[k] * closed[k - 1] * o
            done *= o
        return math.prod(hw_in) * macs

    def module(self, layer: Layer, factors: Factors) -> nn.Module:
        cores = [core.unflatten(1, pair) for core, pair in zip(factors, self.pairs, strict=True)]
        return finish(layer, TTMatrixLinear(layer, cores, self))


class TTMatrixLinear(Factorised):
    """y = W x + b with W (o_1⋯o_d, i_1⋯i_d) a TT-matrix; input (..., I). The matrix is never formed."""

    bias: nn.Parameter | None

    def __init__(self, layer: Layer, cores: Sequence[Tensor], bound: TTMatrix) -> None:
        super().__init__()
        self.cores = nn.ParameterList(parameter(layer, core) for core in cores)
        self.register_parameter("bias", bias_of(layer))
        self.bound = bound

    def forward(self, x: Tensor) -> Tensor:
        done, right = 1, 1
        t = x
        for core in reversed(list(self.cores)):
            left, o, i, right = core.shape
            # (B · rest, i, done, r) -> (B · rest, done, i, r), contracted over (i, r).
            t = t.reshape(-1, i, done, right).transpose(1, 2).reshape(-1, i * right)
            t = t @ core.permute(2, 3, 1, 0).reshape(i * right, o * left)
            t = t.reshape(-1, done, o, left).transpose(1, 2)
            done *= o
        y = t.reshape(*x.shape[:-1], done)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def kernel(self) -> Tensor:
        """The dense matrix (O, I); differentiable."""
        return self.bound.compose([core.flatten(1, 2) for core in self.cores])

    @torch.no_grad()
    def reset_parameters(self, gain: float = 2.0) -> None:
        """Random cores for which the composed matrix's entries have variance gain / fan-in."""
        for k, core in enumerate(self.cores):
            core.normal_(0.0, math.sqrt((gain if k == 0 else 1.0) / (core.shape[2] * core.shape[3])))

    def extra_repr(self) -> str:
        return f"cores={[tuple(core.shape) for core in self.cores]}"


register(
    Format(
        "tt-matrix",
        "train of paired row and column modes, for linear layers",
        kinds={"linear": TTMatrix},
        options=("out_modes", "in_modes", "order"),
    )
)
