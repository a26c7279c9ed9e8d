"""Chains of plain nn.Conv2d and nn.Linear that compute a factorised layer.

The first member sees the layer's input channels, the last one carries the bias. Stride, padding, dilation
and padding mode live in the spatial convolution(s); the 1×1 around them have none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

Layer = nn.Conv2d | nn.Linear


def parameter(layer: Layer, value: Tensor) -> nn.Parameter:
    """`value` as a parameter like the layer's weight: its dtype, device and requires_grad; never a view."""
    weight = layer.weight
    data = value.detach().to(device=weight.device, dtype=weight.dtype, copy=True).contiguous()
    return nn.Parameter(data, requires_grad=weight.requires_grad)


def bias_of(layer: Layer) -> nn.Parameter | None:
    """A copy of the layer's bias parameter, or None."""
    if layer.bias is None:
        return None
    return nn.Parameter(layer.bias.detach().clone(), requires_grad=layer.bias.requires_grad)


def finish(layer: Layer, module: nn.Module) -> nn.Module:
    """Give `module` the layer's train/eval mode and memory format."""
    weight = layer.weight
    if (
        weight.ndim == 4
        and weight.is_contiguous(memory_format=torch.channels_last)
        and not weight.is_contiguous()
    ):
        module = module.to(memory_format=torch.channels_last)
    return module.train(layer.training)


def linear(layer: Layer, weight: Tensor, last: bool = False) -> nn.Linear:
    """A linear member with weight (o, i); the last one takes the layer's bias."""
    member = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    member.weight = parameter(layer, weight)
    member.register_parameter("bias", bias_of(layer) if last else None)
    return member


def conv(
    layer: nn.Conv2d,
    weight: Tensor,
    *,
    rows: bool = False,
    cols: bool = False,
    groups: int = 1,
    last: bool = False,
) -> nn.Conv2d:
    """A convolution member with weight (o, i / groups, a, b).

    rows, cols: take over the layer's stride, padding and dilation along height, width (and the padding mode).
    """

    def pick(values: Sequence[int], otherwise: int) -> tuple[int, int]:
        return (values[0] if rows else otherwise, values[1] if cols else otherwise)

    padding: str | tuple[int, int] = (0, 0)
    if not isinstance(layer.padding, str):
        padding = pick(layer.padding, 0)
    elif rows or cols:
        padding = layer.padding
    member = nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        (weight.shape[2], weight.shape[3]),
        stride=pick(layer.stride, 1),
        padding=padding,
        dilation=pick(layer.dilation, 1),
        groups=groups,
        bias=False,
        padding_mode=layer.padding_mode if rows or cols else "zeros",
        device="meta",
    )
    member.weight = parameter(layer, weight)
    member.register_parameter("bias", bias_of(layer) if last else None)
    return member


def matrix_chain(layer: Layer, factors: Sequence[Tensor]) -> nn.Module:
    """W = A B for a linear layer or a 1×1 convolution: first B (r, I), with stride and padding, then A (O,
    r)."""
    a, b = factors
    if isinstance(layer, nn.Linear):
        return finish(layer, nn.Sequential(linear(layer, b), linear(layer, a, last=True)))
    first = conv(layer, b[:, :, None, None], rows=True, cols=True)
    return finish(layer, nn.Sequential(first, conv(layer, a[:, :, None, None], last=True)))


def bottleneck_chain(layer: nn.Conv2d, core: Tensor, u_out: Tensor, u_in: Tensor) -> nn.Module:
    """1×1 (I → r_in), k×k (r_in → r_out), 1×1 (r_out → O): Tucker-2, and TT of three cores.

    core (r_out, r_in, kh, kw), u_out (O, r_out), u_in (I, r_in).
    """
    members = (
        conv(layer, u_in.mT[:, :, None, None]),
        conv(layer, core, rows=True, cols=True),
        conv(layer, u_out[:, :, None, None], last=True),
    )
    return finish(layer, nn.Sequential(*members))


def spatial_chain(layer: nn.Conv2d, factors: Sequence[Tensor]) -> nn.Module:
    """k×1 (I → r) then 1×k (r → O): factors V (r, I, kh, 1) and H (O, r, 1, kw)."""
    v, h = factors
    return finish(layer, nn.Sequential(conv(layer, v, rows=True), conv(layer, h, cols=True, last=True)))


def cp_chain(layer: nn.Conv2d, factors: Sequence[Tensor]) -> nn.Module:
    """1×1 (I → R), one depthwise k×k (CP3) or k×1 then 1×k (CP4), 1×1 (R → O).

    factors: out (O, R), in (I, R), then spatial (K, R), or (kh, R) and (kw, R).
    """
    u_out, u_in, *spatial = factors
    rank = u_in.shape[1]
    members = [conv(layer, u_in.mT[:, :, None, None])]
    if len(spatial) == 1:
        kernel = spatial[0].mT.reshape(rank, 1, *layer.kernel_size)
        members.append(conv(layer, kernel, rows=True, cols=True, groups=rank))
    else:
        members.append(conv(layer, spatial[0].mT[:, None, :, None], rows=True, groups=rank))
        members.append(conv(layer, spatial[1].mT[:, None, None, :], cols=True, groups=rank))
    members.append(conv(layer, u_out[:, :, None, None], last=True))
    return finish(layer, nn.Sequential(*members))
