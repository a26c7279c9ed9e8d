"""Tucker-2 and the tensor train of three cores: both are the chain 1×1, k×k, 1×1.

Tucker-2: W = core ×_0 U_out ×_1 U_in, factors [core (r_out, r_in, kh, kw), U_out (O, r_out), U_in (I, r_in)].
TT: the kernel transposed to (O, K, I), cores [(1, O, r_out), (r_out, K, r_in), (r_in, I, 1)].
Ranks are (r_out, r_in) in both; the same matrices govern them, W unfolded along outputs and along inputs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tdlib.layers.chains import bottleneck_chain
from tdlib.layers.scheme import Factors, Ranks, Scheme, Shape
from tdlib.layers.schemes.matrix import scaled
from tdlib.tensor import tt, tucker


def _bounds(shape: Shape) -> Ranks:
    o, i, kh, kw = shape
    return min(o, i * kh * kw), min(i, o * kh * kw)


def _clip(shape: Shape, ranks: Ranks) -> Ranks:
    """Each rank also cut to what the other and the K positions can carry: r_out ≤ r_in K and r_in ≤ r_out
    K."""
    positions = math.prod(shape[2:])
    r_out, r_in = map(min, ranks, _bounds(shape))
    r_out = min(r_out, r_in * positions)
    return r_out, min(r_in, r_out * positions)


def _macs(shape: Shape, ranks: Ranks, hw_in: Shape, hw_out: Shape) -> int:
    (o, i, kh, kw), (r_out, r_in) = shape, ranks
    return r_in * i * math.prod(hw_in) + r_out * (r_in * kh * kw + o) * math.prod(hw_out)


def _at(shape: Shape, fraction: float) -> Ranks:
    return scaled(fraction, shape[0], shape[1])


def _unfoldings(weight: Tensor) -> list[Tensor]:
    return [weight.flatten(1), weight.transpose(0, 1).flatten(1)]


def _tucker(weight: Tensor, ranks: Ranks) -> Factors:
    core, factors = tucker.tucker2(weight, ranks)
    return [core, *factors]


def _tucker_sigma(weight: Tensor, ranks: Ranks, sigma: Any) -> Factors:
    from tdlib.tensor.sigma import tucker2_sigma

    core, factors = tucker2_sigma(weight, ranks, sigma)
    return [core, *factors]


def _tucker_shapes(shape: Shape, ranks: Ranks) -> list[Shape]:
    (o, i, kh, kw), (r_out, r_in) = shape, ranks
    return [(r_out, r_in, kh, kw), (o, r_out), (i, r_in)]


def _tucker_on_output(factors: Factors, M: Tensor) -> Factors:
    core, out, inp = factors
    Q, R = torch.linalg.qr(M @ out)  # the factor stays orthonormal
    return [torch.einsum("ab,b...->a...", R, core), Q, inp]


TUCKER2 = Scheme(
    factorise=_tucker,
    compose=lambda factors, shape: tucker.tucker2_compose(factors[0], factors[1:]),
    build=lambda layer, factors: bottleneck_chain(layer, *factors),
    shapes=_tucker_shapes,
    macs=_macs,
    bounds=_bounds,
    at=_at,
    clip=_clip,
    unfoldings=_unfoldings,
    factorise_sigma=_tucker_sigma,
    on_output=_tucker_on_output,
)


def _tt_sigma(weight: Tensor, ranks: Ranks, sigma: Any) -> Factors:
    from tdlib.tensor.sigma import tt_sigma

    return list(tt_sigma(weight, ranks, sigma))


def _tt_chain(layer: nn.Conv2d, cores: Factors) -> nn.Module:
    first, middle, last = cores
    core = middle.transpose(1, 2).unflatten(2, layer.kernel_size)
    return bottleneck_chain(layer, core, first[0], last[:, :, 0].mT)


def _tt_shapes(shape: Shape, ranks: Ranks) -> list[Shape]:
    (o, i, kh, kw), (r_out, r_in) = shape, ranks
    return [(1, o, r_out), (r_out, kh * kw, r_in), (r_in, i, 1)]


TT = Scheme(
    factorise=lambda weight, ranks: list(tt.tt_svd(tt.conv_to_tt_tensor(weight), ranks)),
    compose=lambda cores, shape: tt.tt_tensor_to_conv(tt.tt_compose(cores), shape),
    build=_tt_chain,
    shapes=_tt_shapes,
    macs=_macs,
    bounds=_bounds,
    at=_at,
    clip=_clip,
    unfoldings=_unfoldings,
    factorise_sigma=_tt_sigma,
    on_output=lambda cores, M: [torch.einsum("ab,xbr->xar", M, cores[0]), *cores[1:]],
)
