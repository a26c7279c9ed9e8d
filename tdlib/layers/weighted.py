"""Factors that are best for the network: layer errors weighted on the input side and on the output side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tdlib.errors import TdlibError
from tdlib.layers.scheme import Format, kind_of
from tdlib.tensor.sigma_norm import pinv_root


def factorise_weighted(
    row: Format,
    weight: Tensor,
    ranks: Sequence[int],
    sigma: Tensor,
    H: Tensor | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[Tensor]:
    """Factors of `weight` that minimise tr(H (W-What) Sigma (W-What)^T); the plain output error if H is None.

    H is used where one factor carries the whole output mode: it is undone on that factor, and a Tucker factor
    is made orthonormal again. Trains over factorised output channels have none; for them H is left out.
    """
    options = dict(options or {})
    weight, sigma = weight.detach(), sigma.to(weight.device)
    if row.factorise_sigma is None:
        raise TdlibError(f"format {row.name!r} has no data-aware factorisation")
    place = None if options else output_factor(row, weight)
    if H is None or place is None:
        return row.factorise_sigma(weight, ranks, sigma, **options)
    half, inverse = pinv_root(H.to(weight.device))
    scaled = (half @ weight.double().flatten(1)).reshape(weight.shape)
    factors = row.factorise_sigma(scaled, ranks, sigma)
    output = factors[place]
    if output.ndim == 3:  # a train's first core (1, O, r)
        factors[place] = (inverse @ output[0])[None]
    else:
        factors[place] = inverse @ output
    if row.name == "tucker2" and place == 1:
        Q, R = torch.linalg.qr(factors[1])
        factors[0], factors[1] = torch.einsum("ab,b...->a...", R, factors[0]), Q
    return [f.to(weight.dtype) for f in factors]


def output_factor(row: Format, weight: Tensor) -> int | None:
    """Index of the factor that carries the output mode of this kernel, None if there is not one alone."""
    conv = kind_of(weight.shape) == "conv"
    table = {"tucker2": 1 if conv else 0, "tt": 0, "cp": 0, "cp4": 0, "svd": None if conv else 0}
    return table.get(row.name)
