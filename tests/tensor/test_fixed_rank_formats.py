"""Tucker-2, TT, TR, SVD, spatial SVD, TT-matrix: one table of properties; TensorLy as the yardstick."""

from itertools import pairwise

import pytest
import tensorly as tl
import torch
from tensorly.decomposition import partial_tucker, tensor_train
from tensorly.tr_tensor import TRTensor
from tensorly.tt_matrix import TTMatrix
from tensorly.tt_tensor import TTTensor
from tensorly.tucker_tensor import TuckerTensor

from tdlib.errors import RankError
from tdlib.tensor import (
    conv_to_tt_tensor,
    factorise_modes,
    spatial_svd,
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
    tucker2,
    tucker2_compose,
)

SHAPE = (12, 8, 3, 3)
FACTORED = {"out_modes": (4, 3), "in_modes": (2, 4)}


def kernel(shape=SHAPE, decay=0.7, seed=0, dtype=torch.float32):
    """Random kernel whose channel modes have a power-law spectrum, as trained ones do."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(shape, generator=g, dtype=dtype)
    for mode in (0, 1):
        n = shape[mode]
        Q = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=dtype))[0]
        Q = Q * torch.arange(1, n + 1, dtype=dtype) ** -decay
        W = torch.tensordot(Q, W.movedim(mode, 0), dims=1).movedim(0, mode)
    return W


def error(a, b):
    return float(torch.linalg.norm((a - b).double()) / torch.linalg.norm(b.double()))


def via_tucker(W, ranks):
    return tucker2_compose(*tucker2(W, ranks))


def via_tt(W, ranks, **modes):
    return tt_tensor_to_conv(tt_compose(tt_svd(conv_to_tt_tensor(W, **modes), ranks)), W.shape)


def via_tr(W, ranks, **modes):
    return tt_tensor_to_conv(tr_compose(tr_svd(conv_to_tt_tensor(W, **modes), ranks)), W.shape)


def via_svd(W, ranks):
    A, B = svd_factors(W.flatten(1), ranks[0])
    return (A @ B).reshape(W.shape)


def via_spatial(W, ranks):
    V, H = spatial_svd(W, ranks[0])
    return torch.einsum("riax,orxb->oiab", V, H)


def via_tt_matrix(W, ranks):
    M = W.flatten(1)  # (12, 72)
    return tt_matrix_compose(tt_matrix(M, (2, 3, 2), (4, 3, 6), ranks)).reshape(W.shape)


# name: (projection, ranks from coarse to exact)
FORMATS = {
    "tucker2": (via_tucker, [(1, 1), (4, 3), (8, 6), (12, 8)]),
    "tt": (via_tt, [(1, 1), (4, 3), (8, 6), (12, 8)]),
    "tt factored": (
        lambda W, r: via_tt(W, r, **FACTORED),
        [(1,) * 4, (2, 4, 4, 2), (4, 8, 6, 4), (4, 12, 8, 4)],
    ),
    "tr": (via_tr, [(1, 1, 1), (3, 3, 3), (3, 4, 12), (3, 4, 24)]),
    "tr factored": (lambda W, r: via_tr(W, r, **FACTORED), [(1,) * 5, (2,) * 5, (3,) * 5, (2, 2, 6, 16, 8)]),
    "svd": (via_svd, [(1,), (4,), (8,), (12,)]),
    "spatial svd": (via_spatial, [(1,), (8,), (16,), (24,)]),
    "tt-matrix": (via_tt_matrix, [(1, 1), (4, 4), (8, 6), (8, 12)]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_full_rank_is_exact_and_error_falls_with_rank(name):
    project, ladder = FORMATS[name]
    W = kernel()
    errors = [error(project(W, ranks), W) for ranks in ladder]
    assert errors[-1] < 2e-6
    assert all(low < high for high, low in pairwise(errors)), errors


@pytest.mark.parametrize("name", FORMATS)
def test_float64_full_rank_is_exact_to_float64(name):
    project, ladder = FORMATS[name]
    W = kernel(dtype=torch.float64)
    got = project(W, ladder[-1])
    assert got.dtype == torch.float64
    assert error(got, W) < 1e-12


@pytest.mark.parametrize("name", FORMATS)
def test_vmap_over_a_stack_equals_one_by_one(name):
    project, ladder = FORMATS[name]
    stack = torch.stack([kernel(seed=s) for s in range(3)])
    for ranks in ladder[1:3]:
        together = torch.vmap(lambda W, ranks=ranks: project(W, ranks))(stack)
        assert error(together, torch.stack([project(W, ranks) for W in stack])) < 1e-4


@pytest.mark.parametrize("name", [n for n in FORMATS if not n.startswith("tr")])
def test_projection_is_idempotent(name):
    project, ladder = FORMATS[name]
    once = project(kernel(), ladder[1])
    assert error(project(once, ladder[1]), once) < 1e-5


@pytest.mark.parametrize("name", FORMATS)
def test_zero_kernels_noncontiguous_kernels_and_gradients(name):
    project, ladder = FORMATS[name]
    assert not project(torch.zeros(SHAPE), ladder[1]).any()
    W = kernel()
    strided = W.transpose(0, 1).contiguous().transpose(0, 1).to(memory_format=torch.channels_last)
    assert error(project(strided, ladder[1]), project(W, ladder[1])) < 1e-5
    assert not project(W.clone().requires_grad_(), ladder[1]).requires_grad


@pytest.mark.parametrize("name", FORMATS)
def test_a_zero_rank_is_an_error(name):
    project, ladder = FORMATS[name]
    with pytest.raises(RankError, match="at least 1"):
        project(kernel(), (0, *ladder[0][1:]))
    with pytest.raises(RankError):
        project(kernel(), (*ladder[0], *ladder[0])) if len(ladder[0]) > 1 else project(kernel(), ((1, 2),))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_float32_factors(dtype):
    core, factors = tucker2(kernel().to(dtype), (4, 3))
    assert {core.dtype, *(f.dtype for f in factors)} == {torch.float32}
    assert tr_svd(kernel().flatten(2).to(dtype), (2, 2, 2))[0].dtype == torch.float32


def test_containers_are_tensorlys_and_the_backend_is_left_alone():
    before = tl.get_backend()
    W = kernel()
    tucker, tt, tr = tucker2(W, (4, 3)), tt_svd(W.flatten(2), (4, 3)), tr_svd(W.flatten(2), (2, 3, 2))
    ttm = tt_matrix(W.flatten(1), (3, 4), (8, 9), (5,))
    assert tl.get_backend() == before
    assert isinstance(tucker, TuckerTensor) and tucker.shape == SHAPE and tucker.rank == (4, 3)
    assert isinstance(tt, TTTensor) and tt.rank == (1, 4, 3, 1)
    assert isinstance(tr, TRTensor) and tr.rank == (2, 3, 2, 2)
    assert isinstance(ttm, TTMatrix) and ttm.rank == (1, 5, 1)
    with tl.backend_context("pytorch"):
        assert error(tl.tucker_to_tensor((tucker.core, tucker.factors)), tucker.to_tensor()) < 1e-6
        assert error(tl.tt_to_tensor(tt), tt_compose(tt)) < 1e-6
        assert error(tl.tr_to_tensor(tr), tr_compose(tr)) < 1e-6
        assert error(tl.tt_matrix_to_tensor(ttm).reshape(12, 72), tt_matrix_compose(ttm)) < 1e-6


@pytest.mark.parametrize("decay", [0.0, 0.7])
@pytest.mark.parametrize("ranks", [(16, 12), (8, 8), (24, 4)])
def test_tucker2_is_as_good_as_tensorly(ranks, decay):
    W = kernel((32, 24, 3, 3), decay)
    with tl.backend_context("pytorch"):
        (core, factors), _ = partial_tucker(W, rank=list(ranks), modes=[0, 1])
    assert error(via_tucker(W, ranks), W) <= 1.01 * error(tucker2_compose(core, factors), W)


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


def test_tucker_sweeps_never_raise_the_error_and_factors_are_orthonormal():
    W = kernel((32, 24, 3, 3), decay=0.2)
    errors = [error(tucker2_compose(*tucker2(W, (6, 5), sweeps)), W) for sweeps in range(5)]
    assert all(b <= a + 1e-7 for a, b in pairwise(errors))
    _, (U, V) = tucker2(W, (6, 5))
    torch.testing.assert_close(U.mT @ U, torch.eye(6), rtol=0, atol=1e-5)
    torch.testing.assert_close(V.mT @ V, torch.eye(5), rtol=0, atol=1e-5)


def test_ranks_above_the_bounds_are_cut_and_reported_by_the_shapes():
    W = kernel()
    assert tucker2(W, (99, 99)).rank == (12, 8)
    assert tucker2(W, (12, 1)).rank == (12, 1)  # more output ranks than columns: completed orthonormally
    assert tt_svd(conv_to_tt_tensor(W), (99, 99)).rank == (1, 12, 8, 1)
    assert tt_rank_bounds((12, 9, 8)) == (12, 8)
    assert svd_factors(W.flatten(1), 99)[0].shape == (12, 12)
    V, H = spatial_svd(W, 99)
    assert V.shape == (24, 8, 3, 1) and H.shape == (12, 24, 1, 3)
    assert tr_clip((12, 9, 8), (99, 2, 99)) == (24, 2, 18)
    for ranks in [(3, 4, 99), (8, 8, 8), (99, 2, 99), (1, 12, 8)]:
        assert tr_svd(conv_to_tt_tensor(W), ranks).rank[:-1] == tr_clip((12, 9, 8), ranks)


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


def test_ring_is_reproducible_and_needs_two_modes():
    T = kernel().flatten(2)
    for a, b in zip(tr_svd(T, (5, 5, 5)), tr_svd(T, (5, 5, 5)), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RankError, match="two modes"):
        tr_svd(torch.ones(3), (1,))


@pytest.mark.parametrize("modes", [{}, FACTORED, {"out_modes": (12,), "in_modes": (2, 2, 2)}])
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


def test_compositions_are_differentiable():
    core, factors = tucker2(kernel(), (4, 3))
    core.requires_grad_()
    tucker2_compose(core, factors).sum().backward()
    assert core.grad is not None
    for decompose, ranks, compose in ((tt_svd, (2, 2, 2), tt_compose), (tr_svd, (2,) * 4, tr_compose)):
        cores = decompose(kernel(), ranks)
        first = cores[0].requires_grad_()
        compose(list(cores)).sum().backward()
        assert first.grad is not None
