"""Chains of plain nn.Conv2d and nn.Linear that compute a factorised layer.

The first member sees the layer's input channels, the last one carries the bias. Stride, padding, dilation
and padding mode live in the spatial convolution(s); the 1×1 around them have none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tdlib.errors import TdlibError

Layer = nn.Conv2d | nn.Linear


#: What a layer says of itself.
GEOMETRY = (
    "in_features", "out_features", "in_channels", "out_channels",
    "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
)  # fmt: skip


class Factorised(nn.Module):
    """What stands in place of one layer. Some parents read a layer's attributes: here are the same ones.

    `GEOMETRY` is copied from the layer by `finish`. `weight` is composed anew at every access, so a parent
    that multiplies with it (nn.TransformerEncoderLayer in eval mode without gradients) computes the right
    output, but as slowly as a dense layer; `torch.backends.mha.set_fastpath_enabled(False)` makes that one
    call its layers instead.
    """

    __jit_unused_properties__ = ("weight", "bias")

    @property
    def weight(self) -> Tensor:
        """The composed kernel, read-only: no parameter, not in the state."""
        return self.kernel()

    def kernel(self) -> Tensor:
        """The kernel (O, I, kh, kw) or matrix (O, I); differentiable, bias left out."""
        raise TypeError(f"{type(self).__name__} must define kernel")


class Chain(Factorised, nn.Sequential):
    """Convolutions or linear layers one after the other, in place of one layer."""

    @property
    def bias(self) -> nn.Parameter | None:
        """The last member's."""
        last: Any = self[-1]
        return last.bias

    def kernel(self) -> Tensor:
        """The kernel (O, I, kh, kw) or matrix (O, I) of the whole chain; differentiable, bias left out."""
        first, *others = self
        return reduce(_after, others, to_dense(first))

    @torch.no_grad()
    def reset_parameters(self, gain: float = 2.0) -> None:
        """Random factors; the composed kernel's entries have variance gain / fan-in.

        Each member gets variance 1 / fan-in, the last one `gain` times that: the ranks cancel in the product.
        """
        weights = [member.get_parameter("weight") for member in self]
        for k, weight in enumerate(weights):
            scale = gain if k == len(weights) - 1 else 1.0
            weight.normal_(0.0, math.sqrt(scale / weight[0].numel()))


def computes_plainly(layer: nn.Module) -> bool:
    """Whether the layer computes what nn.Conv2d or nn.Linear compute, from a weight of its own: a subclass
    with a forward of its own does not, nor does a layer with a parametrised weight."""
    plain = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
    names = ("forward", "_conv_forward")
    same = all(getattr(type(layer), name, None) is getattr(plain, name, None) for name in names)
    return isinstance(layer, plain) and same and not parametrize.is_parametrized(layer)


def to_dense(module: nn.Module) -> Tensor:
    """The kernel (O, I, kh, kw) or matrix (O, I) that a layer applies, replaced or not; differentiable, bias
    left out. Raises: TdlibError for a module that has none."""
    own: Any = getattr(module, "kernel", None)
    if own is not None:
        return own()
    if not isinstance(module, nn.Conv2d | nn.Linear) or getattr(module, "groups", 1) != 1:
        raise TdlibError(
            f"{type(module).__name__} is no layer with a dense kernel (nor a grouped convolution)"
        )
    return module.weight


def _after(first: Tensor, member: nn.Module) -> Tensor:
    """The kernel of `member` applied after the kernel `first` (r, I, a, b) or (r, I).

    Along each axis only one of the two has extent, so spatial positions never add up.
    """
    if isinstance(member, nn.Conv2d) and member.groups > 1:  # depthwise
        product = torch.einsum("rcd,riab->riacbd", member.weight[:, 0], first)
        return product.flatten(4, 5).flatten(2, 3)
    second = to_dense(member)
    if first.ndim == 2:
        return second @ first
    return torch.einsum("orcd,riab->oiacbd", second, first).flatten(4, 5).flatten(2, 3)


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
    """Give `module` the layer's train/eval mode, memory format and description of itself."""
    for name in GEOMETRY:
        if hasattr(layer, name):
            setattr(module, name, getattr(layer, name))
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
        return finish(layer, Chain(linear(layer, b), linear(layer, a, last=True)))
    first = conv(layer, b[:, :, None, None], rows=True, cols=True)
    return finish(layer, Chain(first, conv(layer, a[:, :, None, None], last=True)))


def bottleneck_chain(layer: nn.Conv2d, core: Tensor, u_out: Tensor, u_in: Tensor) -> nn.Module:
    """1×1 (I → r_in), k×k (r_in → r_out), 1×1 (r_out → O): Tucker-2, and TT of three cores.

    core (r_out, r_in, kh, kw), u_out (O, r_out), u_in (I, r_in).
    """
    members = (
        conv(layer, u_in.mT[:, :, None, None]),
        conv(layer, core, rows=True, cols=True),
        conv(layer, u_out[:, :, None, None], last=True),
    )
    return finish(layer, Chain(*members))
