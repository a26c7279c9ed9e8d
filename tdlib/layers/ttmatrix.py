"""A linear layer held as a TT-matrix: cores (r_{k-1}, o_k, i_k, r_k), contracted from the last to the
first."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tdlib.layers.chains import bias_of, parameter


def ttmatrix_macs(
    out_modes: Sequence[int], in_modes: Sequence[int], ranks: Sequence[int], positions: int
) -> int:
    """MACs of the contraction in TTMatrixLinear.forward; ranks are the inner ones."""
    closed = (1, *ranks, 1)
    macs, done = 0, 1
    for k in range(len(out_modes), 0, -1):
        macs += math.prod(in_modes[:k]) * done * closed[k] * closed[k - 1] * out_modes[k - 1]
        done *= out_modes[k - 1]
    return positions * macs


class TTMatrixLinear(nn.Module):
    """y = W x + b with W (o_1⋯o_d, i_1⋯i_d) a TT-matrix; input (..., I). Novikov et al. 2015."""

    bias: nn.Parameter | None

    def __init__(self, layer: nn.Linear, cores: Sequence[Tensor]) -> None:
        super().__init__()
        self.cores = nn.ParameterList(parameter(layer, core) for core in cores)
        self.register_parameter("bias", bias_of(layer))

    @classmethod
    def replacing(cls, layer: nn.Linear, cores: Sequence[Tensor]) -> TTMatrixLinear:
        """The layer in place of `layer`, from its cores."""
        return cls(layer, cores)

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

    @torch.no_grad()
    def reset_parameters(self, gain: float = 2.0) -> None:
        """Random cores for which the composed matrix's entries have variance gain / fan-in."""
        for k, core in enumerate(self.cores):
            core.normal_(0.0, math.sqrt((gain if k == 0 else 1.0) / (core.shape[2] * core.shape[3])))

    def extra_repr(self) -> str:
        return f"cores={[tuple(c.shape) for c in self.cores]}"
