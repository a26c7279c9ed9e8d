"""Tucker-2 of a convolution kernel: W ≈ core ×_0 U_out ×_1 U_in, the spatial modes left whole.

Source: Kim et al. 2016 (arXiv 1511.06530) for the use on kernels; De Lathauwer et al. 2000 for HOOI.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensorly.tucker_tensor import TuckerTensor
from torch import Tensor

from tdlib.errors import RankError
from tdlib.tensor.linalg import check_ranks, full_precision, leading_left, working


class Tucker2Tensor(TuckerTensor):
    """TensorLy's Tucker container with factors for the first two modes; unpacks as (core, [U_out, U_in]).

    TensorLy's own class wants one factor per mode. `tensorly.tucker_to_tensor((core, factors))` composes it.
    """

    def __init__(self, tucker_tensor: tuple[Tensor, Sequence[Tensor]]) -> None:
        core, factors = tucker_tensor
        self.core = core
        self.factors = list(factors)
        self.shape = (*(f.shape[0] for f in self.factors), *core.shape[2:])
        self.rank = tuple(f.shape[1] for f in self.factors)

    def to_tensor(self) -> Tensor:
        """The full kernel (O, I, kh, kw)."""
        return tucker2_compose(self.core, self.factors)


@full_precision
def tucker2(W: Tensor, ranks: Sequence[int], sweeps: int = 2) -> Tucker2Tensor:
    """Tucker-2 of W (O, I, kh, kw), or (O, I, K) or (O, I), at ranks (r_out, r_in), cut to (O, I).

    Returns core (r_out, r_in, kh, kw) and orthonormal factors [U_out (O, r_out), U_in (I, r_in)]. Exactly
    `sweeps` sweeps of HOOI after HOSVD (0: HOSVD alone); never an error above HOSVD's.
    Raises: RankError.
    """
    if W.ndim < 2:
        raise RankError(f"tucker2 needs a kernel (O, I, ...), got shape {tuple(W.shape)}")
    r_out, r_in = check_ranks(ranks, 2, "tucker2")
    n_out, n_in, *spatial = W.shape
    # Channels last, (O, K, I): every product below is a plain matrix product.
    T = working(W).reshape(n_out, n_in, -1).transpose(1, 2).contiguous()
    K = T.shape[1]
    rows, columns = T.reshape(n_out, K * n_in), T.reshape(n_out * K, n_in)
    U_in = leading_left(columns.mT, r_in)
    if sweeps == 0:
        U_out = leading_left(rows, r_out)
    for _ in range(sweeps):
        # HOSVD's output factor would be overwritten here before it is used, so it is not computed.
        U_out = leading_left((columns @ U_in).reshape(n_out, -1), r_out)
        U_in = leading_left((U_out.mT @ rows).reshape(-1, n_in).mT, r_in)
    core = (U_out.mT @ rows).reshape(-1, n_in) @ U_in
    core = core.reshape(U_out.shape[1], K, U_in.shape[1]).transpose(1, 2)
    return Tucker2Tensor((core.reshape(*core.shape[:2], *spatial).contiguous(), [U_out, U_in]))


def tucker2_compose(core: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """The kernel (O, I, kh, kw) of core (r_out, r_in, kh, kw) and [(O, r_out), (I, r_in)]. Differentiable."""
    U_out, U_in = factors
    T = torch.einsum("oa,ab...->ob...", U_out, core)
    return torch.einsum("ob...,ib->oi...", T, U_in)
