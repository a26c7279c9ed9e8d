"""Decompositions that minimise the error of the layer's OUTPUT, ||(W - What) S^(1/2)||, instead of the
kernel's.

One place to import from; the mathematics is in `sigma_norm` (the norm, matrices), `sigma_tucker`, `sigma_cp`
and `sigma_tt`.
"""

from tdlib.tensor.sigma_cp import cp_sigma
from tdlib.tensor.sigma_norm import (
    corrected_target,
    pinv_root,
    regularise,
    root,
    sigma_error,
    sigma_norm2,
    svd_sigma,
    weigh_output,
)
from tdlib.tensor.sigma_tt import tt_sigma
from tdlib.tensor.sigma_tucker import tucker2_sigma

__all__ = [
    "corrected_target",
    "cp_sigma",
    "pinv_root",
    "regularise",
    "root",
    "sigma_error",
    "sigma_norm2",
    "svd_sigma",
    "tt_sigma",
    "tucker2_sigma",
    "weigh_output",
]
