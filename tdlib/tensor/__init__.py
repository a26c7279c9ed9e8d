"""Decompositions: pure functions from a dense tensor to factors, and back. The layers live elsewhere."""

from tdlib.tensor.cp import cp3, cp4, cp_als, cp_compose
from tdlib.tensor.linalg import check_finite, leading_left, singular_values, truncated_svd
from tdlib.tensor.matrix import factorise_modes, spatial_svd, svd_factors, tt_matrix, tt_matrix_compose
from tdlib.tensor.ranks import energy_rank, evbmf_rank
from tdlib.tensor.tr import tr_clip, tr_compose, tr_svd
from tdlib.tensor.tt import conv_to_tt_tensor, tt_compose, tt_rank_bounds, tt_svd, tt_tensor_to_conv
from tdlib.tensor.tucker import tucker2, tucker2_compose

__all__ = [
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
    "singular_values",
    "spatial_svd",
    "svd_factors",
    "tr_clip",
    "tr_compose",
    "tr_svd",
    "truncated_svd",
    "tt_compose",
    "tt_matrix",
    "tt_matrix_compose",
    "tt_rank_bounds",
    "tt_svd",
    "tt_tensor_to_conv",
    "tucker2",
    "tucker2_compose",
]
