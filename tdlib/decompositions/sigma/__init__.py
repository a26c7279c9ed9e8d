"""Decompositions that minimise the error of the layer's OUTPUT, ||(W - What) S^(1/2)||, not of the kernel.

One place to import from. `norm` has the norm itself and matrices, `tucker`, `cp` and `tt` the rest.
"""

from tdlib.decompositions.sigma.cp import cp_sigma
from tdlib.decompositions.sigma.norm import (
    corrected_target,
    pinv_root,
    regularise,
    root,
    sigma_error,
    sigma_norm2,
    svd_sigma,
)
from tdlib.decompositions.sigma.tt import tt_sigma
from tdlib.decompositions.sigma.tucker import tucker2_sigma

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
]
