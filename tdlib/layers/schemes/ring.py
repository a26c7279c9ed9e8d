"""Tensor train with factorised channels, and tensor ring: cores (r_k, n_k, r_{k+1}) over (*out, K, *in).

A convolution's kernel is transposed to (*out_modes, K, *in_modes), a linear layer's reshaped to
(*out_modes, *in_modes). A train is a ring whose closing rank is 1, so both share one module and one cost.
Ranks: a train's are its inner ones; a ring's start with the closing rank r_0.
"""

from __future__ import annotations

import math
from itertools import accumulate
from operator import mul
from typing import Any

from torch import Tensor, nn

from tdlib.layers.chains import Layer, finish
from tdlib.layers.ring import RingConv2d, RingLinear, ring_macs
from tdlib.layers.scheme import Factors, Ranks, Scheme, Shape
from tdlib.tensor import tr, tt

Modes = tuple[int, ...] | None


def _modes(shape: Shape, out_modes: Modes, in_modes: Modes) -> tuple[Shape, Shape, Shape]:
    """(out, middle, in): `middle` is (K,) for a convolution and empty for a linear layer."""
    middle = (math.prod(shape[2:]),) if len(shape) == 4 else ()
    return tuple(out_modes or shape[:1]), middle, tuple(in_modes or shape[1:2])


def _tensor(weight: Tensor, out_modes: Modes, in_modes: Modes) -> Tensor:
    if weight.ndim == 4:
        return tt.conv_to_tt_tensor(weight, out_modes, in_modes)
    out, _, ins = _modes(tuple(weight.shape), out_modes, in_modes)
    return weight.reshape(*out, *ins)


def _kernel(tensor: Tensor, shape: Shape) -> Tensor:
    return tt.tt_tensor_to_conv(tensor, shape) if len(shape) == 4 else tensor.reshape(shape)


def _build(layer: Layer, cores: Factors, out_modes: Modes = None, in_modes: Modes = None) -> nn.Module:
    n_out = len(out_modes or (0,))
    if isinstance(layer, nn.Linear):
        return finish(layer, RingLinear.replacing(layer, cores, n_out))
    return finish(layer, RingConv2d.replacing(layer, cores, n_out))


def _macs(ring: bool, shape: Shape, ranks: Ranks, hw_in: Shape, hw_out: Shape, **modes: Any) -> int:
    out, middle, ins = _modes(shape, modes.get("out_modes"), modes.get("in_modes"))
    return ring_macs(out, middle, ins, ranks if ring else (1, *ranks), math.prod(hw_in), math.prod(hw_out))


def _sizes(shape: Shape, modes: dict[str, Any]) -> Shape:
    out, middle, ins = _modes(shape, modes.get("out_modes"), modes.get("in_modes"))
    return (*out, *middle, *ins)


def _core_shapes(sizes: Shape, ring: Ranks) -> list[Shape]:
    closed = (*ring, ring[0])
    return [(closed[k], n, closed[k + 1]) for k, n in enumerate(sizes)]


# -- train --------------------------------------------------------------------------------------------


def _train_bounds(shape: Shape, **modes: Any) -> Ranks:
    return tuple(tt.tt_rank_bounds(_sizes(shape, modes)))


def _train_clip(shape: Shape, ranks: Ranks, **modes: Any) -> Ranks:
    """Cut to what the neighbouring ranks allow as well: r_k ≤ r_{k-1} n_k and r_k ≤ n_{k+1} r_{k+1}."""
    sizes = _sizes(shape, modes)
    cut = list(map(min, ranks, _train_bounds(shape, **modes)))
    for k in range(len(cut)):
        cut[k] = min(cut[k], (cut[k - 1] if k else 1) * sizes[k])
    for k in reversed(range(len(cut) - 1)):
        cut[k] = min(cut[k], sizes[k + 1] * cut[k + 1])
    return tuple(cut)


def _train_at(shape: Shape, fraction: float, **modes: Any) -> Ranks:
    return tuple(max(1, round(fraction * b)) for b in _train_bounds(shape, **modes))


def _train_unfoldings(weight: Tensor, **modes: Any) -> list[Tensor]:
    tensor = _tensor(weight, modes.get("out_modes"), modes.get("in_modes"))
    rows = list(accumulate(tensor.shape, mul))[:-1]
    return [tensor.reshape(n, -1) for n in rows]


def _train_sigma(
    weight: Tensor, ranks: Ranks, sigma: Any, out_modes: Modes = None, in_modes: Modes = None
) -> Factors:
    from tdlib.tensor.sigma import tt_sigma

    return list(tt_sigma(weight, ranks, sigma, out_modes, in_modes))


TRAIN = Scheme(
    factorise=lambda w, ranks, out_modes=None, in_modes=None: list(
        tt.tt_svd(_tensor(w, out_modes, in_modes), ranks)
    ),
    compose=lambda cores, shape, **modes: _kernel(tt.tt_compose(cores), shape),
    build=_build,
    shapes=lambda shape, ranks, **modes: _core_shapes(_sizes(shape, modes), (1, *ranks)),
    macs=lambda *args, **modes: _macs(False, *args, **modes),
    bounds=_train_bounds,
    at=_train_at,
    clip=_train_clip,
    unfoldings=_train_unfoldings,
    factorise_sigma=_train_sigma,
)

# -- ring ---------------------------------------------------------------------------------------------


def _ring_clip(shape: Shape, ranks: Ranks, **modes: Any) -> Ranks:
    return tr.tr_clip(_sizes(shape, modes), ranks)


def _ring_bounds(shape: Shape, **modes: Any) -> Ranks:
    """Ranks at which TR-SVD is exact: r_0 r_1 is the rank of the first unfolding, split evenly."""
    sizes = _sizes(shape, modes)
    first = min(sizes[0], math.prod(sizes[1:]))
    r0 = max(r for r in range(1, math.isqrt(first) + 1) if first % r == 0)
    bounds = [r0, first // r0]
    for k in range(2, len(sizes)):
        bounds.append(min(bounds[-1] * sizes[k - 1], math.prod(sizes[k:]) * r0))
    return tuple(bounds)


def _ring_at(shape: Shape, fraction: float, **modes: Any) -> Ranks:
    # All ranks alike; at fraction 1 the ring is as large as the dense kernel.
    sizes = _sizes(shape, modes)
    rank = max(1, round(fraction * math.sqrt(math.prod(sizes) / sum(sizes))))
    return (rank,) * len(sizes)


RING = Scheme(
    factorise=lambda w, ranks, out_modes=None, in_modes=None: list(
        tr.tr_svd(_tensor(w, out_modes, in_modes), ranks)
    ),
    compose=lambda cores, shape, **modes: _kernel(tr.tr_compose(cores), shape),
    build=_build,
    shapes=lambda shape, ranks, **modes: _core_shapes(_sizes(shape, modes), ranks),
    macs=lambda *args, **modes: _macs(True, *args, **modes),
    bounds=_ring_bounds,
    at=_ring_at,
    rough=lambda w, ranks, out_modes=None, in_modes=None: list(
        tr.tr_svd(_tensor(w, out_modes, in_modes), ranks, sweeps=1)
    ),
    clip=_ring_clip,
)
