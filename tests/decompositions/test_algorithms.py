"""Single decompositions against TensorLy, closed forms and their own sweeps; the layouts of kernels."""

from itertools import pairwise

import pytest
import tensorly as tl
import torch
from decomposition_cases import error, kernel
from tensorly.decomposition import partial_tucker, tensor_train
from tensorly.decomposition import tucker as tucker_tensorly
from tensorly.tr_tensor import TRTensor
from tensorly.tt_matrix import TTMatrix
from tensorly.tt_tensor import TTTensor
from tensorly.tucker_tensor import TuckerTensor
from torch import nn

from tdlib.decompositions import (
    conv_to_tt_tensor,
    factorise_modes,
    matrix_to_tt_tensor,
    svd_factors,
    tr_clip,
    tr_compose,
    tr_svd,
    tt_compose,
    tt_matrix,
    tt_matrix_compose,
    tt_rank_bounds,
    tt_svd,
    tt_tensor_to_conv,
    tt_tensor_to_matrix,
    tucker,
    tucker2,
    tucker2_compose,
    tucker_compose,
)
from tdlib.errors import RankError
from tdlib.formats import get_format


def test_containers_are_tensorlys_and_the_backend_is_left_alone():
    before = tl.get_backend()
    W = kernel()
    two, full = tucker2(W, (4, 3)), tucker(W, (4, 3, 2, 2))
    tt, tr = tt_svd(W.flatten(2), (4, 3)), tr_svd(W.flatten(2), (2, 3, 2))
    ttm = tt_matrix(W.flatten(1), (3, 4), (8, 9), (5,))
    assert tl.get_backend() == before
    assert isinstance(two, TuckerTensor) and two.shape == W.shape and two.rank == (4, 3)
    assert isinstance(full, TuckerTensor) and full.shape == W.shape and full.rank == (4, 3, 2, 2)
    assert isinstance(tt, TTTensor) and tt.rank == (1, 4, 3, 1)
    assert isinstance(tr, TRTensor) and tr.rank == (2, 3, 2, 2)
    assert isinstance(ttm, TTMatrix) and ttm.rank == (1, 5, 1)
    with tl.backend_context("pytorch"):
        assert error(tl.tucker_to_tensor((two.core, two.factors)), two.to_tensor()) < 1e-6
        assert error(tl.tt_matrix_to_tensor(ttm).reshape(12, 72), tt_matrix_compose(ttm)) < 1e-6


@pytest.mark.parametrize("decay", [0.0, 0.7])
@pytest.mark.parametrize("ranks", [(16, 12), (8, 8), (24, 4)])
def test_tucker2_is_as_good_as_tensorly(ranks, decay):
    W = kernel((32, 24, 3, 3), decay)
    with tl.backend_context("pytorch"):
        (core, factors), _ = partial_tucker(W, rank=list(ranks), modes=[0, 1])
    assert error(tucker2(W, ranks).to_tensor(), W) <= 1.01 * error(tucker2_compose(core, factors), W)


@pytest.mark.parametrize("ranks", [(8, 6, 9), (4, 4, 4)])
def test_tucker_is_as_good_as_tensorly(ranks):
    T = kernel((16, 12, 9), decay=0.2)
    with tl.backend_context("pytorch"):
        core, factors = tucker_tensorly(T, rank=list(ranks))
    assert error(tucker_compose(*tucker(T, ranks)), T) <= 1.01 * error(tucker_compose(core, factors), T)


@pytest.mark.parametrize("modes", [{}, {"out_modes": (4, 8), "in_modes": (6, 4)}])
def test_tt_equals_tensorly(modes):
    T = conv_to_tt_tensor(kernel((32, 24, 3, 3)), **modes)
    ranks = [max(1, b // 2) for b in tt_rank_bounds(T.shape)]
    with tl.backend_context("pytorch"):
        theirs = tl.tt_to_tensor(tensor_train(T, [1, *ranks, 1]))
    assert error(tt_compose(tt_svd(T, ranks)), T) <= (1 + 1e-5) * error(theirs, T)


def test_svd_is_the_best_matrix_of_its_rank():
    M = kernel((64, 64, 3, 3)).flatten(1)
    tail = torch.linalg.svdvals(M)[16:]
    A, B = svd_factors(M, 16)
    assert error(A @ B, M) == pytest.approx(float(tail.norm() / M.norm()), rel=1e-4)
    torch.testing.assert_close(A.norm(dim=0), B.norm(dim=1), rtol=1e-4, atol=1e-6)  # evenly spread


@pytest.mark.parametrize(
    ("fit", "compose", "ranks"), [(tucker2, tucker2_compose, (6, 5)), (tucker, tucker_compose, (6, 5, 2, 2))]
)
def test_tucker_sweeps_never_raise_the_error_and_factors_are_orthonormal(fit, compose, ranks):
    W = kernel((32, 24, 3, 3), decay=0.2)
    errors = [error(compose(*fit(W, ranks, sweeps)), W) for sweeps in range(5)]
    assert all(b <= a + 1e-7 for a, b in pairwise(errors))
    for U in fit(W, ranks).factors:
        torch.testing.assert_close(U.mT @ U, torch.eye(U.shape[1]), rtol=0, atol=1e-5)


def test_ranks_above_the_bounds_are_cut_and_reported_by_the_shapes():
    W = kernel()
    assert tucker2(W, (99, 99)).rank == (12, 8)
    assert tucker2(W, (12, 1)).rank == (12, 1)  # more output ranks than columns: completed orthonormally
    assert tt_svd(conv_to_tt_tensor(W), (99, 99)).rank == (1, 12, 8, 1)
    assert tt_svd(torch.ones(5), ()).rank == (1, 1)
    assert tt_rank_bounds((12, 9, 8)) == (12, 8)
    assert svd_factors(W.flatten(1), 99)[0].shape == (12, 12)
    spatial = get_format("svd").bind(W.shape)
    V, H = spatial.module(nn.Conv2d(8, 12, 3), spatial.decompose(W, 99))
    assert V.weight.shape == (24, 8, 3, 1) and H.weight.shape == (12, 24, 1, 3)
    assert tr_clip((12, 9, 8), (99, 2, 99)) == (24, 2, 18)


@pytest.mark.parametrize(
    "shape, ranks", [((12, 9, 8), (3, 3, 3)), ((12, 9, 8), (6, 6, 6)), ((4, 3, 9, 4, 2), (3,) * 5)]
)
def test_ring_sweeps_never_raise_the_error(shape, ranks):
    T = kernel().flatten(2).transpose(1, 2).reshape(shape)
    errors = [error(tr_compose(tr_svd(T, ranks, sweeps)), T) for sweeps in range(6)]
    assert all(b <= a + 1e-6 for a, b in pairwise(errors)), errors
    assert errors[-1] < 0.97 * errors[0]


def test_ring_of_closing_rank_one_is_as_good_as_the_train():
    T = conv_to_tt_tensor(kernel())
    assert error(tr_compose(tr_svd(T, (1, 4, 3))), T) <= error(tt_compose(tt_svd(T, (4, 3))), T) + 1e-6


def test_ring_is_reproducible():
    T = kernel().flatten(2)
    for a, b in zip(tr_svd(T, (5, 5, 5)), tr_svd(T, (5, 5, 5)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("fit", [tr_svd, tucker])
def test_a_vector_has_no_ring_and_no_tucker(fit):
    with pytest.raises(RankError, match="two modes"):
        fit(torch.ones(3), (1,))


@pytest.mark.parametrize(
    "modes", [{}, {"out_modes": (4, 3), "in_modes": (2, 4)}, {"out_modes": (12,), "in_modes": (2, 2, 2)}]
)
def test_kernel_layout_round_trip(modes):
    W = kernel()
    T = conv_to_tt_tensor(W, **modes)
    assert T.shape == (*modes.get("out_modes", (12,)), 9, *modes.get("in_modes", (8,)))
    assert torch.equal(tt_tensor_to_conv(T, W.shape), W)
    M = W[:, :, 0, 0]
    assert torch.equal(tt_tensor_to_conv(conv_to_tt_tensor(M, **modes), M.shape), M)


def test_kernel_layout_puts_the_spatial_mode_in_the_middle():
    W = kernel()
    assert conv_to_tt_tensor(W)[5, 3 * 1 + 2, 7] == W[5, 7, 1, 2]
    with pytest.raises(RankError, match="multiply to 10"):
        conv_to_tt_tensor(W, out_modes=(5, 2))


def test_tt_matrix_pairs_the_modes():
    a, b = kernel((2, 3, 1, 1))[:, :, 0, 0], kernel((4, 5, 1, 1), seed=1)[:, :, 0, 0]
    cores = tt_matrix(torch.kron(a, b), (2, 4), (3, 5), (1,))  # a Kronecker product has TT-matrix rank 1
    assert [tuple(c.shape) for c in cores] == [(1, 2, 3, 1), (1, 4, 5, 1)]
    assert error(tt_matrix_compose(cores), torch.kron(a, b)) < 1e-6
    M = kernel((12, 30))
    T = matrix_to_tt_tensor(M, (3, 4), (5, 6))
    assert T.shape == (15, 24) and T[1 * 5 + 2, 3 * 6 + 4] == M[1 * 4 + 3, 2 * 6 + 4]
    assert torch.equal(tt_tensor_to_matrix(T, (3, 4), (5, 6)), M)
    with pytest.raises(RankError, match="as many out_modes as in_modes"):
        tt_matrix(torch.kron(a, b), (2, 4), (15,), (1,))


@pytest.mark.parametrize(
    "n, d, modes",
    [
        (512, 3, (8, 8, 8)),
        (64, 2, (8, 8)),
        (48, 2, (6, 8)),
        (7, 2, (1, 7)),
        (1, 3, (1, 1, 1)),
        (30, 1, (30,)),
        (512 * 512 * 9, 4, (32, 32, 48, 48)),
    ],
)
def test_factorise_modes(n, d, modes):
    assert factorise_modes(n, d) == modes
