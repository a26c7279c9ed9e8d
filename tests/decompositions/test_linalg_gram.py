"""Singular subspaces by the Gram matrix, and the shared checks."""

import numpy as np
import pytest
import torch

from tdlib.decompositions.linalg import (
    check_finite,
    check_ranks,
    leading_left,
    singular_values,
    truncated_svd,
)
from tdlib.errors import NonFiniteError, RankError

SHAPES = [(6, 20), (20, 6), (7, 7), (1, 5), (5, 1)]


def matrix(m, n, dtype=torch.float32):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(m * n), dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_truncated_svd_equals_torch(shape, dtype):
    M = matrix(*shape, dtype)
    for r in (1, min(shape) // 2 or 1, min(shape), 99):
        U, S, Vh = truncated_svd(M, r)
        k = min(r, *shape)
        u, s, v = torch.linalg.svd(M, full_matrices=False)
        assert U.shape == (shape[0], k) and Vh.shape == (k, shape[1]) and U.dtype == dtype
        torch.testing.assert_close(S, s[:k], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close((U * S) @ Vh, (u[:, :k] * s[:k]) @ v[:k], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_leading_left_is_orthonormal_even_beyond_the_rank(shape):
    rank_one = matrix(shape[0], 1) @ matrix(1, shape[1])
    for M in (matrix(*shape), rank_one, torch.zeros(shape)):
        for r in (1, shape[0]):
            U = leading_left(M, r)
            assert U.shape == (shape[0], r)
            torch.testing.assert_close(U.mT @ U, torch.eye(r), rtol=0, atol=1e-5)


def test_small_singular_values_survive_near_full_rank():
    # A float32 Gram matrix would lose everything below 3e-4 of the largest value.
    u, v = torch.linalg.qr(matrix(300, 300))[0], torch.linalg.qr(matrix(301, 400).mT)[0][:, :300]
    s = torch.logspace(0, -5, 300)
    M = (u * s) @ v.mT
    U = leading_left(M, 299)
    assert torch.linalg.norm(M - U @ (U.mT @ M)) < 1.05 * s[-1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_and_returned_in_float32(dtype):
    M = matrix(8, 12).to(dtype)
    assert leading_left(M, 3).dtype == torch.float32
    assert singular_values(M).dtype == torch.float32


def test_autocast_and_reduced_precision_change_nothing():
    M = matrix(40, 60)
    expected = leading_left(M, 5)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(leading_left(M, 5), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_singular_values():
    M = matrix(9, 30)
    torch.testing.assert_close(singular_values(M), torch.linalg.svdvals(M), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(singular_values(M.mT), torch.linalg.svdvals(M), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_check_finite_names_the_culprit(bad):
    M = matrix(3, 4)
    assert check_finite(M, "layer1.conv") is M
    M[1, 2] = bad
    with pytest.raises(NonFiniteError, match=r"layer1\.conv holds 1 NaN or infinite values of 12"):
        check_finite(M, "layer1.conv")


@pytest.mark.parametrize("ranks", [(0, 2), (2, -1), (1.5, 2), (True, 2), ("3", 2), (None, 1)])
def test_bad_ranks_are_refused_with_value_and_remedy(ranks):
    with pytest.raises(RankError, match="integer of at least 1"):
        check_ranks(ranks, 2, "tucker2")


def test_rank_counts_and_integer_types():
    assert check_ranks((np.int64(3), 4), 2, "x") == (3, 4)
    assert check_ranks(torch.tensor([3, 4]), 2, "x") == (3, 4)
    assert check_ranks(5, 1, "x") == (5,)
    with pytest.raises(RankError, match="tucker2 takes 2 ranks, got 3"):
        check_ranks((1, 2, 3), 2, "tucker2")
