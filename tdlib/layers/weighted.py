"""Factors that are best for the network: layer errors weighted on the input side and on the output side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tdlib.errors import TdlibError
from tdlib.layers.scheme import Format
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

    H is used where one factor carries the whole output mode (`Scheme.on_output`) and undone on that factor.
    Trains over factorised output channels have none; for them H is left out.
    """
    options = dict(options or {})
    weight, sigma = weight.detach(), sigma.to(weight.device)
    if row.factorise_sigma is None:
        raise TdlibError(f"format {row.name!r} has no data-aware factorisation")
    on_output = row.scheme(weight.shape, **options).on_output
    if H is None or on_output is None:
        return row.factorise_sigma(weight, ranks, sigma, **options)
    half, inverse = pinv_root(H.to(weight.device))
    scaled = (half @ weight.double().flatten(1)).reshape(weight.shape)
    factors = on_output([f.double() for f in row.factorise_sigma(scaled, ranks, sigma)], inverse)
    return [f.to(weight.dtype) for f in factors]
