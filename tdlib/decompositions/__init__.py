"""Decompositions: pure functions from a dense tensor to factors, and back. Layers live in `tdlib.formats`.

`SVD`, `TUCKER`, `TT`, `TR` and `CP` each hold all functions of one decomposition; see `Decomposition`.
The same in the norm of a layer's inputs: `tdlib.decompositions.sigma`.
"""

from tdlib.decompositions.base import Decomposition
from tdlib.decompositions.cp import CP, cp3, cp4, cp_als, cp_compose
from tdlib.decompositions.linalg import check_finite, leading_left, singular_values, truncated_svd
from tdlib.decompositions.modes import factorise_modes
from tdlib.decompositions.ranks import energy_rank, evbmf_rank
from tdlib.decompositions.svd import SVD, svd_factors
from tdlib.decompositions.tr import TR, tr_clip, tr_compose, tr_svd
from tdlib.decompositions.tt import (
    TT,
    conv_to_tt_tensor,
    tt_clip,
    tt_compose,
    tt_rank_bounds,
    tt_svd,
    tt_tensor_to_conv,
)
from tdlib.decompositions.tt_matrix import (
    matrix_to_tt_tensor,
    tt_matrix,
    tt_matrix_compose,
    tt_tensor_to_matrix,
)
from tdlib.decompositions.tucker import TUCKER, tucker, tucker2, tucker2_compose, tucker_compose

__all__ = [
    "CP",
    "SVD",
    "TR",
    "TT",
    "TUCKER",
    "Decomposition",
    "check_finite",
    "conv_to_tt_tensor",
    "cp3",
    "cp4",
    "cp_als",
    "cp_compose",
    "energy_rank",
    "evbmf_rank",
    "factorise_modes",
    "leading_left",
    "matrix_to_tt_tensor",
    "singular_values",
    "svd_factors",
    "tr_clip",
    "tr_compose",
    "tr_svd",
    "truncated_svd",
    "tt_clip",
    "tt_compose",
    "tt_matrix",
    "tt_matrix_compose",
    "tt_rank_bounds",
    "tt_svd",
    "tt_tensor_to_conv",
    "tt_tensor_to_matrix",
    "tucker",
    "tucker2",
    "tucker2_compose",
    "tucker_compose",
]
