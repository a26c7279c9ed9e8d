"""Kernels and errors for the tests of decompositions."""

from __future__ import annotations

import torch
from torch import Tensor


def kernel(
    shape: tuple[int, ...] = (12, 8, 3, 3),
    decay: float = 0.7,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Random tensor whose first two modes have a power-law spectrum, as channels of trained kernels do."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(shape, generator=g, dtype=dtype)
    for mode in (0, 1):
        n = shape[mode]
        Q = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=dtype))[0]
        Q = Q * torch.arange(1, n + 1, dtype=dtype) ** -decay
        W = torch.tensordot(Q, W.movedim(mode, 0), dims=1).movedim(0, mode)
    return W


def error(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted||."""
    return float(torch.linalg.norm((found - wanted).double()) / torch.linalg.norm(wanted.double()))
