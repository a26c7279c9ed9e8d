"""Chains of plain convolutions (in one to three dimensions) or nn.Linear that compute a factorised layer.

The first member sees the layer's input channels, the last one carries the bias. Stride, padding, dilation
and padding mode live in the spatial convolution(s); the 1×1 around them have none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tdlib.errors import TdlibError

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
Layer = Conv | nn.Linear


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
        """The kernel (O, I, ...) or matrix (O, I); differentiable, bias left out."""
        raise TypeError(f"{type(self).__name__} must define kernel")


class Chain(Factorised, nn.Sequential):
    """Convolutions or linear layers one after the other, in place of one layer."""

    @property
    def bias(self) -> nn.Parameter | None:
        """The last member's."""
        last: Any = self[-1]
        return last.bias

    def kernel(self) -> Tensor:
        """The kernel (O, I, ...) or matrix (O, I) of the whole chain; differentiable, bias left out."""
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
    """Whether the layer computes what torch's convolutions or nn.Linear compute, from a weight of its own: a
    subclass with a forward of its own does not, nor does a layer with a parametrised weight."""
    plain = next((kind for kind in get_args(Layer) if isinstance(layer, kind)), None)
    names = ("forward", "_conv_forward")
    same = all(getattr(type(layer), name, None) is getattr(plain, name, None) for name in names)
    return plain is not None and same and not parametrize.is_parametrized(layer)


def to_dense(module: nn.Module) -> Tensor:
    """The kernel (O, I, ...) or matrix (O, I) that a layer applies, replaced or not; differentiable, bias
    left out. Raises: TdlibError for a module that has none."""
    own: Any = getattr(module, "kernel", None)
    if own is not None:
        return own()
    if not isinstance(module, Layer) or getattr(module, "groups", 1) != 1:
        raise TdlibError(
            f"{type(module).__name__} is no layer with a dense kernel (nor a grouped convolution)"
        )
    return module.weight


def _after(first: Tensor, member: nn.Module) -> Tensor:
    """The kernel of `member` applied after the kernel `first` (r, I, ...) or (r, I).

    Along each axis only one of the two has extent, so spatial positions never add up.
    """
    axes = range(first.ndim - 2)
    a, b, both = "abc"[: len(axes)], "xyz"[: len(axes)], "axbycz"[: 2 * len(axes)]
    if isinstance(member, Conv) and member.groups > 1:  # depthwise
        product = torch.einsum(f"r{b},ri{a}->ri{both}", member.weight[:, 0], first)
    else:
        second = to_dense(member)
        if not axes:
            return second @ first
        product = torch.einsum(f"or{b},ri{a}->oi{both}", second, first)
    for axis in reversed(axes):
        product = product.flatten(2 + 2 * axis, 3 + 2 * axis)
    return product


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
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.ndim)
    if last and weight.is_contiguous(memory_format=last) and not weight.is_contiguous():
        module = module.to(memory_format=last)
    return module.train(layer.training)


def linear(layer: Layer, weight: Tensor, last: bool = False) -> nn.Linear:
    """A linear member with weight (o, i); the last one takes the layer's bias."""
    member = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    member.weight = parameter(layer, weight)
    member.register_parameter("bias", bias_of(layer) if last else None)
    return member


def conv(
    layer: Any,
    weight: Tensor,
    *,
    axes: Iterable[int] = (),
    groups: int = 1,
    last: bool = False,
) -> Any:
    """A convolution member of the layer's number of dimensions with weight (o, i / groups, ...); a matrix
    (o, i) is of size 1 along all of them.

    axes: the dimensions (0, 1, ...) along which the layer's stride, padding and dilation are taken over (and
    the padding mode); `all_axes` gives every one.
    """
    chosen, dimensions = set(axes), len(layer.kernel_size)
    weight = weight.reshape(*weight.shape[:2], *(weight.shape[2:] or [1] * dimensions))

    def pick(values: Sequence[int], otherwise: int) -> tuple[int, ...]:
        return tuple(values[k] if k in chosen else otherwise for k in range(dimensions))

    padding: Any = (0,) * dimensions
    if not isinstance(layer.padding, str):
        padding = pick(layer.padding, 0)
    elif chosen:
        padding = layer.padding
    kind: Any = next(kind for kind in get_args(Conv) if isinstance(layer, kind))
    member = kind(
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        stride=pick(layer.stride, 1),
        padding=padding,
        dilation=pick(layer.dilation, 1),
        groups=groups,
        bias=False,
        padding_mode=layer.padding_mode if chosen else "zeros",
        device="meta",
    )
    member.weight = parameter(layer, weight)
    member.register_parameter("bias", bias_of(layer) if last else None)
    return member


def all_axes(layer: Any) -> range:
    """The dimensions of a convolution."""
    return range(len(layer.kernel_size))


def matrix_chain(layer: Layer, factors: Sequence[Tensor]) -> nn.Module:
    """W = A B for a linear layer or a 1×1 convolution: first B (r, I), with stride and padding, then A (O,
    r)."""
    a, b = factors
    if isinstance(layer, nn.Linear):
        return finish(layer, Chain(linear(layer, b), linear(layer, a, last=True)))
    return finish(layer, Chain(conv(layer, b, axes=all_axes(layer)), conv(layer, a, last=True)))


def bottleneck_chain(layer: Conv, core: Tensor, u_out: Tensor, u_in: Tensor) -> nn.Module:
    """1×1 (I → r_in), k×k (r_in → r_out), 1×1 (r_out → O): Tucker-2, and TT of three cores.

    core (r_out, r_in, ...), u_out (O, r_out), u_in (I, r_in).
    """
    members = (
        conv(layer, u_in.mT),
        conv(layer, core, axes=all_axes(layer)),
        conv(layer, u_out, last=True),
    )
    return finish(layer, Chain(*members))
