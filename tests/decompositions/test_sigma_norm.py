"""Decompositions in the norm of the layer's input: the properties that define them."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tdlib.decompositions import (
    conv_to_tt_tensor,
    cp3,
    cp4,
    cp_compose,
    tt_compose,
    tt_svd,
    tt_tensor_to_conv,
    tucker2,
    tucker2_compose,
)
from tdlib.decompositions.sigma import (
    corrected_target,
    cp_sigma,
    pinv_root,
    root,
    sigma_error,
    svd_sigma,
    tt_sigma,
    tucker2_sigma,
)
from tdlib.decompositions.sigma.tucker import DIRECT_LIMIT
from tdlib.errors import DataError, NonFiniteError


def patches(inputs: int, size: int, count: int, dead: int = 0) -> Tensor:
    """(count, inputs * size * size) correlated non-negative patches, `dead` channels always zero; float64."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(count, inputs, size + 2, size + 2, generator=g, dtype=torch.float64)
    mix = torch.randn(inputs, inputs, 3, 3, generator=g, dtype=torch.float64)
    scale = torch.logspace(0, -1.5, inputs, dtype=torch.float64)[None, :, None, None]
    x = torch.nn.functional.conv2d(x, mix * scale).relu()[:, :, :size, :size]
    x[:, inputs - dead :] = 0
    return x.flatten(1)


def gaussian(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def second_moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


W = gaussian(10, 6, 3, 3)
X = patches(6, 3, 400)
S = second_moment(X)
MODES = (5, 2), (3, 2)


def of_tucker(found):
    return tucker2_compose(*found)


def of_cp(found):
    return cp_compose(found).reshape(W.shape)


def of_tt(found):
    return tt_tensor_to_conv(tt_compose(found), W.shape)


# name: (plain decomposition of W, the same under Sigma (with `trace=`), composition)
CASES = {
    "tucker2": (lambda: tucker2(W, (4, 3)), lambda S, **o: tucker2_sigma(W, (4, 3), S, **o), of_tucker),
    "tt": (
        lambda: tt_svd(conv_to_tt_tensor(W), (4, 3)), lambda S, **o: tt_sigma(W, (4, 3), S, **o), of_tt
    ),
    "tt factored": (
        lambda: tt_svd(conv_to_tt_tensor(W, *MODES), (3, 4, 3, 2)),
        lambda S, **o: tt_sigma(W, (3, 4, 3, 2), S, *MODES, **o),
        of_tt,
    ),
    "cp3": (lambda: cp3(W, 14), lambda S, **o: cp_sigma(W, 14, S, **o), of_cp),
    "cp4": (lambda: cp4(W, 14), lambda S, **o: cp_sigma(W, 14, S, four=True, **o), of_cp),
}  # fmt: skip


def tensors(found):
    return [t for part in found for t in (part if isinstance(part, list) else [part])]


@pytest.mark.parametrize("name", CASES)
def test_the_output_error_is_smaller_than_the_plain_decomposition_s(name):
    plain, ours, compose = CASES[name]
    assert sigma_error(W, compose(ours(S)), S) < 0.9 * sigma_error(W, compose(plain()), S)
    assert [t.shape for t in tensors(ours(S))] == [t.shape for t in tensors(plain())]


@pytest.mark.parametrize("dead", [0, 2])
@pytest.mark.parametrize("count", [400, 20])
@pytest.mark.parametrize("name", CASES)
def test_every_sweep_lowers_the_error_also_under_a_singular_sigma(name, dead, count):
    trace: list[float] = []
    CASES[name][1](second_moment(patches(6, 3, count, dead)), sweeps=6, tol=0, trace=trace)
    assert len(trace) > 1 and all(b <= a * (1 + 1e-9) + 1e-14 for a, b in pairwise(trace)), trace


@pytest.mark.parametrize("name", CASES)
def test_the_reported_error_is_the_error(name):
    trace: list[float] = []
    found = CASES[name][2](CASES[name][1](S, trace=trace))
    assert sigma_error(W, found, S) ** 2 == pytest.approx(trace[-1], rel=1e-5)


def test_identity_gives_the_plain_tucker_and_cp():
    eye = torch.eye(54, dtype=torch.float64)
    ours = tucker2_compose(*tucker2_sigma(W, (4, 3), eye, sweeps=100, tol=0))
    plain = tucker2_compose(*tucker2(W, (4, 3), sweeps=100))
    assert (W - ours).norm() == pytest.approx(float((W - plain).norm()), rel=1e-4)
    ours = cp_compose(cp_sigma(W, 12, eye)).reshape(W.shape)
    plain = cp_compose(cp3(W, 12)).reshape(W.shape)
    assert (W - ours).norm() <= (W - plain).norm() * (1 + 1e-6)
    A, B = svd_sigma(W.flatten(1), 4, eye)
    U, s, Vh = torch.linalg.svd(W.flatten(1), full_matrices=False)
    torch.testing.assert_close(A @ B, U[:, :4] * s[:4] @ Vh[:4])


def test_squared_error_is_the_mean_squared_change_of_the_output():
    What = tucker2_compose(*tucker2_sigma(W, (3, 2), S))
    change = ((W - What).flatten(1) @ X.T).square().sum(0).mean()
    output = (W.flatten(1) @ X.T).square().sum(0).mean()
    assert sigma_error(W, What, S) ** 2 == pytest.approx(float(change / output), rel=1e-9)


@pytest.mark.parametrize(
    ("fit", "compose"),
    [
        (lambda S: tucker2_sigma(W, (10, 6), S), of_tucker),
        (lambda S: tt_sigma(W, (10, 6), S), of_tt),
        (lambda S: cp_sigma(W, 54, S), of_cp),
        (lambda S: cp_sigma(W, 54, S, four=True), of_cp),
    ],
)
def test_full_rank_is_exact_also_where_sigma_is_blind(fit, compose):
    blind = second_moment(patches(6, 3, 20, dead=2))
    assert sigma_error(W, compose(fit(S)), S) < 1e-5
    if compose is not of_cp:
        torch.testing.assert_close(compose(fit(blind)), W, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(10, 6), (6, 10)])
def test_the_matrix_case_is_the_closed_form(shape):
    M = gaussian(*shape)
    sigma = second_moment(patches(shape[1], 1, 300))
    L = root(sigma)
    torch.testing.assert_close(L @ L.T, sigma)
    U, s, Vh = torch.linalg.svd(M @ L, full_matrices=False)
    best = (U[:, :3] * s[:3] @ Vh[:3]) @ torch.linalg.inv(L)
    A, B = svd_sigma(M, 3, sigma)
    torch.testing.assert_close(A @ B, best, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(tt_compose(tt_sigma(M, (3,), sigma)), best, atol=1e-6, rtol=1e-6)


def test_roots_of_a_singular_matrix():
    sigma = second_moment(patches(6, 3, 20, dead=2))
    half, inverse = pinv_root(sigma)
    torch.testing.assert_close(half @ half, sigma)
    torch.testing.assert_close(half @ inverse @ half, half, atol=1e-6, rtol=1e-5)
    assert torch.linalg.matrix_rank(half @ inverse) == 20


def test_the_train_is_tucker_s_optimum_in_other_clothes():
    torch.testing.assert_close(of_tt(tt_sigma(W, (4, 3), S)), of_tucker(tucker2_sigma(W, (4, 3), S)))


def test_conjugate_gradients_and_the_direct_solve_agree():
    big, sigma = gaussian(12, 20, 3, 3), second_moment(patches(20, 3, 600))
    assert 20 * 14 > DIRECT_LIMIT >= 20 * 12
    errors = [
        sigma_error(big, tucker2_sigma(big, (8, r), sigma, sweeps=40).to_tensor(), sigma)
        for r in (12, 13, 14)
    ]
    assert errors[0] >= errors[1] >= errors[2]  # the solver changes between the first and the last


def test_outer_factors_are_orthonormal():
    _, (U, V) = tucker2_sigma(W, (4, 3), S)
    torch.testing.assert_close(U.T @ U, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(V.T @ V, torch.eye(3, dtype=torch.float64))


def test_the_corrected_target_gives_the_original_output_from_changed_inputs():
    changed = X @ (torch.eye(54, dtype=torch.float64) + 0.2 * gaussian(54, 54) / 54**0.5)
    target = corrected_target(W, X.T @ changed / len(X), second_moment(changed), ridge=1e-10)
    before = (X @ W.flatten(1).T - changed @ W.flatten(1).T).square().sum()
    after = (X @ W.flatten(1).T - changed @ target.flatten(1).T).square().sum()
    assert after < 1e-3 * before
    same = corrected_target(W, S, S)
    torch.testing.assert_close(same, W, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_sigma_that_rounding_left_indefinite_will_do(name):
    blind = second_moment(patches(6, 3, 20, dead=2))
    rounded = blind - 1e-6 * blind.diagonal().mean() * torch.eye(54)  # products in float32 leave as much
    plain, ours, compose = CASES[name]
    assert sigma_error(W, compose(ours(rounded)), blind) < sigma_error(W, compose(plain()), blind)


@pytest.mark.parametrize(
    "fit",
    [
        lambda V: of_tucker(tucker2_sigma(V, (4, 3), S)),
        lambda V: of_tt(tt_sigma(V, (4, 3), S)),
        lambda V: tt_compose(tt_sigma(V, (3, 4, 3, 2), S, *MODES)),
        lambda V: cp_compose(cp_sigma(V, 14, S)),
        lambda V: cp_compose(cp_sigma(V, 14, S, four=True)),
        lambda V: torch.matmul(*svd_sigma(V.flatten(1), 3, S)),
    ],
)
def test_a_kernel_of_zeros_stays_one(fit):
    assert fit(torch.zeros_like(W)).abs().max() < 1e-12


def test_dead_layer_and_bad_sigma():
    zero = torch.zeros(54, 54)
    plain = tucker2_compose(*tucker2(W, (4, 3), sweeps=30))
    ours = tucker2_compose(*tucker2_sigma(W, (4, 3), zero, sweeps=30))
    assert (W - ours).norm() == pytest.approx(float((W - plain).norm()), rel=1e-3)
    with pytest.raises(DataError, match="another layer"):
        tucker2_sigma(W, (4, 3), torch.eye(53))
    with pytest.raises(NonFiniteError):
        tucker2_sigma(W, (4, 3), torch.full((54, 54), float("nan")))
