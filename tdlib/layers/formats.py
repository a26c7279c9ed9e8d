"""The formats: one row ties a name to its factorisations. A row added here works everywhere else.

    FORMATS["mine"] = Format("mine", "what it is", schemes={"linear": Scheme(...)})

`project` and `decompose` share `Format.factorise`, so training regularises exactly the set in which the final
layer lives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tdlib.errors import unknown
from tdlib.layers.scheme import KINDS, Factors, Format, Ranks, Scheme, kind_of
from tdlib.layers.schemes.bottleneck import TT, TUCKER2
from tdlib.layers.schemes.matrix import MATRIX, SPATIAL
from tdlib.layers.schemes.paired import PAIRED
from tdlib.layers.schemes.polyadic import CP3, CP4
from tdlib.layers.schemes.ring import RING, TRAIN
from tdlib.layers.shuffled import SHUFFLED

_MATRIX = {"pointwise": MATRIX, "linear": MATRIX}
_MODES = ("out_modes", "in_modes", "order")

FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format(
            "tt",
            "tensor train over (O, K, I), channels optionally factorised",
            schemes={"conv": TT, **_MATRIX},
            factored=dict.fromkeys(KINDS, TRAIN),
            options=_MODES,
        ),
        Format("tucker2", "Tucker along output and input channels", schemes={"conv": TUCKER2, **_MATRIX}),
        Format("cp", "CP with the spatial modes merged", schemes={"conv": CP3, **_MATRIX}),
        Format("cp4", "CP with height and width apart", schemes={"conv": CP4, **_MATRIX}),
        Format("svd", "matrix SVD; k×1 then 1×k for convolutions", schemes={"conv": SPATIAL, **_MATRIX}),
        Format(
            "tr",
            "tensor ring over (O, K, I), channels optionally factorised",
            schemes={"conv": RING},
            factored=dict.fromkeys(KINDS, RING),
            always_factored=frozenset({"pointwise", "linear"}),
            options=_MODES,
        ),
        Format(
            "tt-matrix",
            "train of paired row and column modes, for linear layers",
            schemes={},
            factored={"linear": PAIRED},
            always_factored=frozenset({"linear"}),
            options=_MODES,
        ),
        *SHUFFLED,
    )
}


def get_format(name: str) -> Format:
    """The row of the registry. Raises UnknownName, which lists the valid ones."""
    if name not in FORMATS:
        raise unknown("format", name, FORMATS)
    return FORMATS[name]


def project(weight: Tensor, format: str, ranks: Sequence[int], **options: Any) -> Tensor:
    """The kernel of these ranks nearest to `weight` as the format's factorisation finds it; same shape and
    dtype.

    For formats with `batched`, torch.vmap maps it over a stack of kernels.
    """
    row = get_format(format)
    factors = row.factorise(weight, ranks, **options)
    return row.compose(factors, weight.shape, **options).to(weight.dtype)


__all__ = ["FORMATS", "Factors", "Format", "Ranks", "Scheme", "get_format", "kind_of", "project"]
