"""CP with the spatial modes merged (CP3) and kept apart (CP4), fitted by alternating least squares.

W[o, i, a, b] ≈ Σ_r A[o, r] B[i, r] C[(a, b), r], for CP4 C[a, r] D[b, r]; the weights are absorbed evenly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tdlib.layers.chains import cp_chain
from tdlib.layers.scheme import Factors, Ranks, Scheme, Shape
from tdlib.tensor import cp


def _absorb(container: Any) -> Factors:
    """The factors of a CPTensor (weights, factors) with |weights|^(1/d) on each, signs on the first."""
    weights, factors = container
    if weights is None:
        return list(factors)
    share = weights.abs() ** (1 / len(factors))
    return [factors[0] * (share * weights.sign()), *(f * share for f in factors[1:])]


def _sigma(four: bool) -> Callable[..., Factors]:
    def factorise_sigma(weight: Tensor, ranks: Ranks, sigma: Any) -> Factors:
        from tdlib.tensor.sigma import cp_sigma

        return _absorb(cp_sigma(weight, ranks[0], sigma, four=four))

    return factorise_sigma


def _modes(shape: Shape, four: bool) -> Shape:
    o, i, kh, kw = shape
    return (o, i, kh, kw) if four else (o, i, kh * kw)


def _scheme(four: bool) -> Scheme:
    fit = cp.cp4 if four else cp.cp3
    equation = "or,ir,ar,br->oiab" if four else "or,ir,kr->oik"

    def compose(factors: Factors, shape: Shape) -> Tensor:
        return torch.einsum(equation, *factors).reshape(shape)

    def shapes(shape: Shape, ranks: Ranks) -> list[Shape]:
        return [(n, ranks[0]) for n in _modes(shape, four)]

    def bounds(shape: Shape) -> Ranks:
        modes = _modes(shape, four)
        return (math.prod(modes) // max(modes),)

    def at(shape: Shape, fraction: float) -> Ranks:
        # The fraction is one of parameters: at 1 the chain is as large as the dense kernel.
        modes = _modes(shape, four)
        return (max(1, round(fraction * math.prod(modes) / sum(modes))),)

    def macs(shape: Shape, ranks: Ranks, hw_in: Shape, hw_out: Shape) -> int:
        o, i, kh, kw = shape
        depthwise = kh * hw_in[1] + kw * hw_out[1] if four else kh * kw * hw_out[1]
        return ranks[0] * (i * math.prod(hw_in) + hw_out[0] * depthwise + o * math.prod(hw_out))

    return Scheme(
        factorise=lambda weight, ranks: _absorb(fit(weight, ranks[0])),
        compose=compose,
        build=cp_chain,
        shapes=shapes,
        macs=macs,
        bounds=bounds,
        at=at,
        factorise_sigma=_sigma(four),
        on_output=lambda factors, M: [M @ factors[0], *factors[1:]],
        rough=lambda weight, ranks: _absorb(fit(weight, ranks[0], sweeps=10)),
        batched=False,
    )


CP3 = _scheme(four=False)
CP4 = _scheme(four=True)
