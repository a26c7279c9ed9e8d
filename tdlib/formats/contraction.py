"""One convolution and one linear layer for tensor trains with factorised channels and tensor rings.

Cores (r_k, n_k, r_{k+1}) in the order (*out, K, *in), the last right rank closing the ring with r_0 (1 for a
train). The input modes are contracted per pixel from the last to the first, the middle core is an ordinary
k×k convolution with the closing rank in the batch, then come the output modes, last to first. The dense
kernel is never formed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tdlib.decompositions.tr import tr_compose
from tdlib.decompositions.tt import tt_tensor_to_conv
from tdlib.formats.chains import Factorised, Layer, bias_of, conv, parameter, to_dense


def contract_in(x: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """x (B, I) through the input cores: (B · ring, r), r the left rank of the first core."""
    *head, last = cores
    left, size, ring = last.shape
    x = x.reshape(-1, size) @ last.permute(1, 2, 0).reshape(size, ring * left)
    for core in reversed(head):
        left, size, right = core.shape
        x = x.reshape(-1, size, ring, right).transpose(1, 2).reshape(-1, size * right)
        x = x @ core.permute(1, 2, 0).reshape(size * right, left)
    return x.reshape(-1, left)


def contract_out(x: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """x (B · ring, r) through the output cores: (B, O), r the right rank of the last core."""
    first, *tail = cores
    done = 1
    for core in reversed(tail):
        left, size, right = core.shape
        x = x.reshape(-1, right) @ core.permute(2, 1, 0).reshape(right, size * left)
        x = x.reshape(-1, done, size, left).transpose(1, 2)
        done *= size
    ring, size, right = first.shape
    x = x.reshape(-1, ring, done, right).transpose(1, 2).reshape(-1, ring * right)
    x = x @ first.transpose(1, 2).reshape(ring * right, size)
    return x.reshape(-1, done, size).transpose(1, 2).reshape(-1, size * done)


def ring_macs(
    out_modes: Sequence[int],
    middle: Sequence[int],
    in_modes: Sequence[int],
    ranks: Sequence[int],
    positions_in: int,
    positions_out: int,
) -> int:
    """MACs of the contraction above; ranks (r_0, ..., r_{d-1}) with r_0 the closing rank."""
    closed = (*ranks, ranks[0])
    ring, n_out, n_core = ranks[0], len(out_modes), len(ranks)
    macs = 0
    for k in range(len(in_modes), 0, -1):
        left, right = closed[n_core - len(in_modes) + k - 1], closed[n_core - len(in_modes) + k]
        carried = 1 if k == len(in_modes) else ring
        macs += positions_in * math.prod(in_modes[:k]) * carried * left * right
    if middle:
        macs += positions_out * middle[0] * ring * closed[n_out] * closed[n_out + 1]
    done = 1
    for k in range(n_out, 0, -1):
        carried = 1 if k == 1 else ring
        macs += positions_out * carried * done * closed[k - 1] * out_modes[k - 1] * closed[k]
        done *= out_modes[k - 1]
    return macs


def _scale(cores: Sequence[Tensor], contracted: Sequence[int], gain: float) -> None:
    """Normal entries with variance 1 / contracted size, the last step with `gain` on top, in place."""
    for k, (core, size) in enumerate(zip(cores, contracted, strict=True)):
        core.normal_(0.0, math.sqrt((gain if k == 0 else 1.0) / size))


class _Ring(Factorised):
    """Output and input cores with a bias; the two layers differ in what stands between them."""

    out_cores: nn.ParameterList
    in_cores: nn.ParameterList
    bias: nn.Parameter | None

    def __init__(self, layer: Layer, out_cores: Sequence[Tensor], in_cores: Sequence[Tensor]) -> None:
        super().__init__()
        self.out_cores = nn.ParameterList(parameter(layer, core) for core in out_cores)
        self.in_cores = nn.ParameterList(parameter(layer, core) for core in in_cores)
        self.register_parameter("bias", bias_of(layer))

    def _output(self, x: Tensor) -> Tensor:
        y = contract_out(x, list(self.out_cores))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def reset_parameters(self, gain: float = 2.0) -> None:
        """Random cores for which the composed kernel's entries have variance gain / fan-in."""
        ins, outs = list(self.in_cores), list(self.out_cores)
        _scale(outs, [c.shape[2] * (c.shape[0] if k == 0 else 1) for k, c in enumerate(outs)], gain)
        _scale(ins, [c.shape[1] * (1 if k == len(ins) - 1 else c.shape[2]) for k, c in enumerate(ins)], 1.0)

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}={[tuple(c.shape) for c in getattr(self, name)]}" for name in ("out_cores", "in_cores")
        )


class RingLinear(_Ring):
    """A linear layer with weight Σ of ring cores over (*out_modes, *in_modes); input (..., I)."""

    def kernel(self) -> Tensor:
        """The dense matrix (O, I); differentiable."""
        outputs = math.prod(core.shape[1] for core in self.out_cores)
        return tr_compose([*self.out_cores, *self.in_cores]).reshape(outputs, -1)

    def forward(self, x: Tensor) -> Tensor:
        y = self._output(contract_in(x.reshape(-1, x.shape[-1]), list(self.in_cores)))
        return y.reshape(*x.shape[:-1], y.shape[-1])


class RingConv2d(_Ring):
    """A convolution with kernel Σ of ring cores over (*out_modes, K, *in_modes); input (N, I, H, W)."""

    def __init__(
        self, layer: nn.Conv2d, out_cores: Sequence[Tensor], middle: Tensor, in_cores: Sequence[Tensor]
    ) -> None:
        super().__init__(layer, out_cores, in_cores)
        self.middle = conv(layer, middle.transpose(1, 2).unflatten(2, layer.kernel_size), axes=(0, 1))

    def kernel(self) -> Tensor:
        """The dense kernel (O, I, kh, kw); differentiable."""
        middle = to_dense(self.middle)
        tensor = tr_compose([*self.out_cores, middle.flatten(2).transpose(1, 2), *self.in_cores])
        sizes = [math.prod(core.shape[1] for core in cores) for cores in (self.out_cores, self.in_cores)]
        return tt_tensor_to_conv(tensor, (*sizes, *middle.shape[2:]))

    def forward(self, x: Tensor) -> Tensor:
        n, channels, h, w = x.shape
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        t = contract_in(x.permute(0, 2, 3, 1).reshape(-1, channels), list(self.in_cores))
        ring, r = self.out_cores[0].shape[0], t.shape[-1]
        t = t.reshape(n, h, w, ring, r).permute(0, 3, 4, 1, 2).reshape(n * ring, r, h, w)
        t = self.middle(t)
        _, r, h, w = t.shape
        t = t.reshape(n, ring, r, h, w).permute(0, 3, 4, 1, 2).reshape(-1, r)
        y = self._output(t)
        y = y.reshape(n, h, w, y.shape[-1]).permute(0, 3, 1, 2)
        return y.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

    @torch.no_grad()
    def reset_parameters(self, gain: float = 2.0) -> None:
        """Random cores for which the composed kernel's entries have variance gain / fan-in."""
        super().reset_parameters(gain)
        self.middle.weight.normal_(0.0, 1 / math.sqrt(self.middle.weight[0].numel()))
