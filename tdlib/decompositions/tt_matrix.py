"""TT-matrix: a train over paired modes, the k-th of the outputs and the k-th of the inputs in one core.

Source: Novikov et al. 2015 (arXiv 1509.06569).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tensorly.tt_matrix import TTMatrix
from torch import Tensor

from tdlib.decompositions.linalg import full_precision
from tdlib.decompositions.tt import tt_compose, tt_svd
from tdlib.errors import RankError


def matrix_to_tt_tensor(M: Tensor, out_modes: Sequence[int], in_modes: Sequence[int]) -> Tensor:
    """(Π o_k, Π i_k) to (o_1 i_1, ..., o_d i_d), the tensor of which a TT-matrix is the train.

    Raises: RankError if the modes are not as many or do not multiply to the matrix.
    """
    outs, ins, d = tuple(out_modes), tuple(in_modes), len(out_modes)
    if len(ins) != d or (math.prod(outs), math.prod(ins)) != tuple(M.shape):
        raise RankError(
            f"tt_matrix of shape {tuple(M.shape)} needs as many out_modes as in_modes that multiply to it, "
            f"got out_modes={outs} and in_modes={ins}"
        )
    paired = M.reshape(*outs, *ins).permute([axis for k in range(d) for axis in (k, d + k)])
    return paired.reshape([o * i for o, i in zip(outs, ins, strict=True)])


def tt_tensor_to_matrix(T: Tensor, out_modes: Sequence[int], in_modes: Sequence[int]) -> Tensor:
    """Inverse of `matrix_to_tt_tensor`: the matrix (Π o_k, Π i_k)."""
    d = len(out_modes)
    T = T.reshape([n for pair in zip(out_modes, in_modes, strict=True) for n in pair])
    return T.permute(*range(0, 2 * d, 2), *range(1, 2 * d, 2)).reshape(math.prod(out_modes), -1)


@full_precision
def tt_matrix(M: Tensor, out_modes: Sequence[int], in_modes: Sequence[int], ranks: Sequence[int]) -> TTMatrix:
    """TT-matrix of M (O, I): cores (r_{k-1}, o_k, i_k, r_k) at the d - 1 inner ranks. Raises: RankError."""
    cores = tt_svd(matrix_to_tt_tensor(M, out_modes, in_modes), ranks)
    pairs = zip(cores, out_modes, in_modes, strict=True)
    return TTMatrix([core.reshape(core.shape[0], o, i, -1) for core, o, i in pairs])


def tt_matrix_compose(cores: Sequence[Tensor]) -> Tensor:
    """The matrix (Π o_k, Π i_k) of cores (r_{k-1}, o_k, i_k, r_k). Differentiable."""
    full = tt_compose([core.flatten(1, 2) for core in cores])
    return tt_tensor_to_matrix(full, [core.shape[1] for core in cores], [core.shape[2] for core in cores])
