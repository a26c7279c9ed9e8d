"""Decompositions in the norm of the layer's input: the properties that define them."""

import pytest
import torch
from sigma_cases import falls, kernel, patches, second_moment

from tdlib.errors import DataError, NonFiniteError
from tdlib.layers.formats import get_format
from tdlib.tensor import cp3, cp_compose, tt_compose, tucker2, tucker2_compose
from tdlib.tensor.sigma import (
    corrected_target,
    cp_sigma,
    root,
    sigma_error,
    svd_sigma,
    tt_sigma,
    tucker2_sigma,
    weigh_output,
)
from tdlib.tensor.sigma_tucker import DIRECT_LIMIT

W = kernel(10, 6, 3)
X = patches(6, 3, 400)
S = second_moment(X)


def composed(name, weight, ranks, sigma, **options):
    row = get_format(name)
    return row.compose(row.factorise_sigma(weight, ranks, sigma, **options), weight.shape, **options)


CASES = [
    ("tucker2", (4, 3), {}),
    ("tt", (4, 3), {}),
    ("tt", (3, 4, 3, 2), {"out_modes": (5, 2), "in_modes": (3, 2)}),
    ("cp", (14,), {}),
    ("cp4", (14,), {}),
]


@pytest.mark.parametrize(("name", "ranks", "options"), CASES)
def test_the_output_error_is_no_larger_than_the_plain_decomposition_s(name, ranks, options):
    row = get_format(name)
    plain = row.compose(row.factorise(W, ranks, **options), W.shape, **options)
    ours = composed(name, W, ranks, S, **options)
    assert sigma_error(W, ours, S) < 0.9 * sigma_error(W, plain, S)
    for a, b in zip(
        row.factorise(W, ranks, **options), row.factorise_sigma(W, ranks, S, **options), strict=True
    ):
        assert a.shape == b.shape


@pytest.mark.parametrize("dead", [0, 2])
@pytest.mark.parametrize("count", [400, 20])
def test_every_sweep_lowers_the_error_also_under_a_singular_sigma(dead, count):
    sigma = second_moment(patches(6, 3, count, dead=dead))
    traces = []
    for run in (
        lambda t: tucker2_sigma(W, (4, 3), sigma, tol=0, trace=t),
        lambda t: cp_sigma(W, 10, sigma, sweeps=6, tol=0, trace=t),
        lambda t: cp_sigma(W, 10, sigma, sweeps=6, tol=0, four=True, trace=t),
        lambda t: tt_sigma(W, (3, 4, 3, 2), sigma, (5, 2), (3, 2), tol=0, trace=t),
    ):
        traces.append([])
        run(traces[-1])
    assert all(len(t) > 1 and falls(t) for t in traces), traces


def test_the_reported_error_is_the_error():
    trace = []
    core, factors = tucker2_sigma(W, (4, 3), S, trace=trace)
    assert sigma_error(W, tucker2_compose(core, factors), S) ** 2 == pytest.approx(trace[-1], rel=1e-6)
    trace = []
    found = cp_compose(cp_sigma(W, 12, S, trace=trace)).reshape(W.shape)
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
    ("name", "ranks"), [("tucker2", (10, 6)), ("tt", (10, 6)), ("cp", (54,)), ("cp4", (54,))]
)
def test_full_rank_is_exact_also_where_sigma_is_blind(name, ranks):
    blind = second_moment(patches(6, 3, 20, dead=2))
    assert sigma_error(W, composed(name, W, ranks, S), S) < 1e-5
    if name in ("tucker2", "tt"):
        torch.testing.assert_close(composed(name, W, ranks, blind), W, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(10, 6), (6, 10), (10, 6, 1, 1)])
def test_the_matrix_case_is_the_closed_form(shape):
    M = kernel(shape[0], shape[1], 1).reshape(shape)
    sigma = second_moment(patches(shape[1], 1, 300))
    L = root(sigma)
    torch.testing.assert_close(L @ L.T, sigma)
    U, s, Vh = torch.linalg.svd(M.flatten(1) @ L, full_matrices=False)
    best = (U[:, :3] * s[:3] @ Vh[:3]) @ torch.linalg.inv(L)
    A, B = svd_sigma(M.flatten(1), 3, sigma)
    torch.testing.assert_close(A @ B, best, atol=1e-6, rtol=1e-6)
    for name in ("tucker2", "tt", "svd", "cp"):
        torch.testing.assert_close(composed(name, M, (3,), sigma).flatten(1), best, atol=1e-6, rtol=1e-6)


def test_the_train_is_tucker_s_optimum_in_other_clothes():
    found = tt_compose(tt_sigma(W, (4, 3), S)).permute(0, 2, 1).reshape(W.shape)
    torch.testing.assert_close(found, tucker2_compose(*tucker2_sigma(W, (4, 3), S)))


def test_conjugate_gradients_and_the_direct_solve_agree():
    big, sigma = kernel(12, 20, 3), second_moment(patches(20, 3, 600))
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


def test_an_output_weight_is_minimised_too():
    g = torch.Generator().manual_seed(3)
    H = torch.randn(10, 10, generator=g, dtype=torch.float64)
    H = H @ H.T * torch.logspace(0, -3, 10, dtype=torch.float64)
    H = (H + H.T) / 2 + 0.1 * torch.eye(10, dtype=torch.float64) * H.diagonal().abs().max()
    scaled, inverse = weigh_output(W, H)
    weighted = (inverse @ tucker2_compose(*tucker2_sigma(scaled, (4, 3), S)).flatten(1)).reshape(W.shape)
    plain = tucker2_compose(*tucker2_sigma(W, (4, 3), S))

    def harm(What):
        D = (W - What).flatten(1)
        return float(torch.einsum("op,oi,ij,pj->", H, D, S, D))

    assert harm(weighted) < harm(plain)


def test_the_corrected_target_gives_the_original_output_from_changed_inputs():
    changed = X @ (torch.eye(54, dtype=torch.float64) + 0.2 * kernel(54, 54, 1)[:, :, 0, 0] / 54**0.5)
    target = corrected_target(W, X.T @ changed / len(X), second_moment(changed), ridge=1e-10)
    before = (X @ W.flatten(1).T - changed @ W.flatten(1).T).square().sum()
    after = (X @ W.flatten(1).T - changed @ target.flatten(1).T).square().sum()
    assert after < 1e-3 * before
    same = corrected_target(W, S, S)
    torch.testing.assert_close(same, W, atol=1e-6, rtol=1e-6)


def test_dead_layer_and_bad_sigma():
    zero = torch.zeros(54, 54)
    plain = tucker2_compose(*tucker2(W, (4, 3), sweeps=30))
    ours = tucker2_compose(*tucker2_sigma(W, (4, 3), zero, sweeps=30))
    assert (W - ours).norm() == pytest.approx(float((W - plain).norm()), rel=1e-3)
    with pytest.raises(DataError, match="another layer"):
        tucker2_sigma(W, (4, 3), torch.eye(53))
    with pytest.raises(NonFiniteError):
        tucker2_sigma(W, (4, 3), torch.full((54, 54), float("nan")))
