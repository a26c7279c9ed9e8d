"""CP by Tucker and accelerated ALS: exact cases, TensorLy as the yardstick, monotone, balanced."""

import warnings
from itertools import pairwise

import pytest
import tensorly as tl
import torch
from decomposition_cases import error, kernel
from tensorly.cp_tensor import CPTensor
from tensorly.decomposition import parafac

from tdlib.decompositions import cp3, cp4, cp_als, cp_compose
from tdlib.errors import RankError


def low_rank(shape, rank, seed=0):
    g = torch.Generator().manual_seed(seed)
    return cp_compose((None, [torch.randn(n, rank, generator=g) for n in shape]))


@pytest.mark.parametrize("shape, rank", [((12, 10, 9), 4), ((8, 8, 3, 3), 3), ((80, 70, 9), 5), ((9, 20), 4)])
def test_a_tensor_of_low_rank_is_recovered(shape, rank):
    T = low_rank(shape, rank)
    assert error(cp_compose(cp_als(T, rank, ridge=0.0, sweeps=300, tol=1e-9)), T) < 2e-3


@pytest.mark.parametrize("decay", [0.0, 0.7])
@pytest.mark.parametrize(
    "shape, rank, fit", [((32, 24, 3, 3), 12, cp3), ((32, 24, 3, 3), 24, cp4), ((90, 80, 3, 3), 8, cp4)]
)
def test_as_good_as_tensorly_by_default(shape, rank, fit, decay):
    W = kernel(shape, decay)
    T = W.flatten(2) if fit is cp3 else W
    with tl.backend_context("pytorch"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # TensorLy fills missing singular vectors and says so
        theirs = tl.cp_to_tensor(parafac(T, rank, random_state=0))
    assert error(cp_compose(fit(W, rank)), T) <= 1.01 * error(theirs, T)


@pytest.mark.parametrize("ridge", [0.0, 1e-6, 1e-2])
@pytest.mark.parametrize("shape", [(20, 16, 9), (90, 70, 3, 3)])
def test_the_objective_never_rises(shape, ridge):
    trace: list[float] = []
    T = kernel(shape)
    fit = cp_als(T, 10, ridge=ridge, trace=trace)
    assert len(trace) > 5
    assert all(b <= a for a, b in pairwise(trace))
    got = error(cp_compose(fit), T)
    assert got <= trace[-1] + 1e-5
    if ridge == 0:
        assert got == pytest.approx(trace[-1], abs=1e-5)


def test_columns_are_balanced_and_weights_are_one():
    fit = cp4(kernel((16, 12, 3, 3)), 8)
    assert isinstance(fit, CPTensor)
    weights, factors = fit
    assert torch.equal(weights, torch.ones(8))
    norms = torch.stack([f.norm(dim=0) for f in factors])
    torch.testing.assert_close(norms, norms[:1].expand_as(norms), rtol=1e-4, atol=1e-6)


def test_the_ridge_bounds_degenerate_terms():
    # a⊗a⊗b + a⊗b⊗a + b⊗a⊗a has rank 3 but is a limit of rank 2 with terms that grow without bound.
    a, b = torch.eye(4)[0], torch.eye(4)[1]
    T = sum(torch.einsum("i,j,k->ijk", *v) for v in ((a, a, b), (a, b, a), (b, a, a)))

    def largest(ridge):
        _, factors = cp_als(T, 2, sweeps=150, tol=0.0, ridge=ridge)
        return float(torch.stack([f.norm(dim=0) for f in factors]).prod(0).max())

    bounded, free = largest(1e-3), largest(1e-8)
    assert bounded < 5 < free, (bounded, free)


def test_shapes_of_factors_and_reproducibility():
    W = kernel((16, 12, 3, 5))
    assert [tuple(f.shape) for f in cp3(W, 7).factors] == [(16, 7), (12, 7), (15, 7)]
    assert [tuple(f.shape) for f in cp4(W, 7).factors] == [(16, 7), (12, 7), (3, 7), (5, 7)]
    for a, b in zip(cp4(W, 7, seed=3).factors, cp4(W, 7, seed=3).factors, strict=True):
        assert torch.equal(a, b)
    state = torch.random.get_rng_state()
    cp4(W, 20, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_compose_weighs_the_terms():
    T, weights = kernel((6, 5, 4)), torch.tensor([2.0, -1.0, 0.5])
    _, factors = cp_als(T, 3)
    torch.testing.assert_close(
        cp_compose((weights, factors)), cp_compose((None, [factors[0] * weights, *factors[1:]]))
    )


def test_bad_ranks_and_vectors():
    for rank in (0, -1, 1.5, (1, 2)):
        with pytest.raises(RankError):
            cp3(torch.ones(4, 3, 3, 3), rank)
    with pytest.raises(RankError, match="two modes"):
        cp_als(torch.ones(4), 1)
