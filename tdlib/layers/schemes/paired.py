"""TT-matrix (Novikov et al. 2015): row and column modes of the same position share a core (r, o_k, i_k,
r')."""

from __future__ import annotations

import math

from torch import Tensor, nn

from tdlib.layers.chains import finish
from tdlib.layers.scheme import Factors, Ranks, Scheme, Shape
from tdlib.layers.ttmatrix import TTMatrixLinear, ttmatrix_macs
from tdlib.tensor import matrix

Modes = tuple[int, ...]


def _factorise(weight: Tensor, ranks: Ranks, out_modes: Modes, in_modes: Modes) -> Factors:
    return list(matrix.tt_matrix(weight, out_modes, in_modes, ranks))


def _bounds(shape: Shape, out_modes: Modes, in_modes: Modes) -> Ranks:
    pairs = [o * i for o, i in zip(out_modes, in_modes, strict=True)]
    return tuple(min(math.prod(pairs[:k]), math.prod(pairs[k:])) for k in range(1, len(pairs)))


def _clip(shape: Shape, ranks: Ranks, out_modes: Modes, in_modes: Modes) -> Ranks:
    clipped = list(map(min, ranks, _bounds(shape, out_modes, in_modes)))
    for k in range(len(clipped)):
        clipped[k] = min(clipped[k], (clipped[k - 1] if k else 1) * out_modes[k] * in_modes[k])
    for k in reversed(range(len(clipped) - 1)):
        clipped[k] = min(clipped[k], out_modes[k + 1] * in_modes[k + 1] * clipped[k + 1])
    return tuple(clipped)


def _at(shape: Shape, fraction: float, out_modes: Modes, in_modes: Modes) -> Ranks:
    return tuple(max(1, round(fraction * b)) for b in _bounds(shape, out_modes, in_modes))


def _shapes(shape: Shape, ranks: Ranks, out_modes: Modes, in_modes: Modes) -> list[Shape]:
    closed = (1, *ranks, 1)
    return [
        (closed[k], o, i, closed[k + 1]) for k, (o, i) in enumerate(zip(out_modes, in_modes, strict=True))
    ]


def _unfoldings(weight: Tensor, out_modes: Modes, in_modes: Modes) -> list[Tensor]:
    d = len(out_modes)
    paired = [axis for k in range(d) for axis in (k, d + k)]
    tensor = weight.reshape(*out_modes, *in_modes).permute(paired)
    return [tensor.reshape(math.prod(tensor.shape[: 2 * k]), -1) for k in range(1, d)]


def _build(layer: nn.Linear, cores: Factors, out_modes: Modes, in_modes: Modes) -> nn.Module:
    return finish(layer, TTMatrixLinear.replacing(layer, cores))


def _macs(shape: Shape, ranks: Ranks, hw_in: Shape, hw_out: Shape, out_modes: Modes, in_modes: Modes) -> int:
    return ttmatrix_macs(out_modes, in_modes, ranks, math.prod(hw_in))


PAIRED = Scheme(
    factorise=_factorise,
    compose=lambda cores, shape, **modes: matrix.tt_matrix_compose(cores).reshape(shape),
    build=_build,
    shapes=_shapes,
    macs=_macs,
    bounds=_bounds,
    at=_at,
    clip=_clip,
    unfoldings=_unfoldings,
)
