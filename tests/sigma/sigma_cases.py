"""Kernels and inputs for the Sigma tests."""

import itertools

import torch
from torch import Tensor


def patches(inputs: int, size: int, count: int, seed: int = 0, dead: int = 0) -> Tensor:
    """(count, inputs * size * size) correlated non-negative patches, `dead` channels always zero; float64."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, inputs, size + 2, size + 2, generator=g, dtype=torch.float64)
    mix = torch.randn(inputs, inputs, 3, 3, generator=g, dtype=torch.float64)
    scale = torch.logspace(0, -1.5, inputs, dtype=torch.float64)[None, :, None, None]
    x = torch.nn.functional.conv2d(x, mix * scale).relu()[:, :, :size, :size]
    x[:, inputs - dead :] = 0
    return x.flatten(1)


def kernel(outputs: int, inputs: int, size: int, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(outputs, inputs, size, size, generator=g, dtype=torch.float64)


def second_moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def falls(trace: list[float]) -> bool:
    """Never rises, up to rounding."""
    return all(b <= a * (1 + 1e-9) + 1e-14 for a, b in itertools.pairwise(trace))
