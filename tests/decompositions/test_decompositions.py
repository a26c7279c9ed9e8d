"""What holds for every decomposition: one table of projections, and the rank arithmetic of the five."""

import math
from itertools import pairwise

import pytest
import tensorly as tl
import torch
from decomposition_cases import error, kernel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tdlib.decompositions import (
    CP,
    SVD,
    TR,
    TT,
    TUCKER,
    tt_matrix,
    tt_matrix_compose,
    tucker2,
    tucker2_compose,
)
from tdlib.errors import RankError
from tdlib.formats import get_format

FIVE = (SVD, TUCKER, TT, TR, CP)


def projection(D):
    return lambda T, ranks: D.compose(D.decompose(T, ranks))


def spatial(W, ranks):
    bound = get_format("svd").bind(W.shape)
    return bound.compose(bound.decompose(W, ranks))


def ttm(M, ranks):
    return tt_matrix_compose(tt_matrix(M, (2, 3, 2), (4, 3, 6), ranks))


def cases():
    """Rows (projection, tensor's shape, ranks from coarse to exact, whether vmap maps it)."""
    for D in FIVE:
        for shape in [(12, 72)] if D is SVD else [(12, 9, 8), (4, 3, 9, 2, 4)]:
            ladder = [D.clip(shape, D.uniform(shape, fraction)) for fraction in (0.05, 0.2, 0.5, 0.8)]
            name = f"{D.name}-{len(shape)}"
            yield pytest.param(projection(D), shape, [*ladder, D.bounds(shape)], D.batched, id=name)
    for name, project, shape, ladder in (
        ("tucker2", lambda W, r: tucker2_compose(*tucker2(W, r)), (12, 8, 3, 3), [(1, 1), (4, 3), (12, 8)]),
        ("spatial", spatial, (12, 8, 3, 3), [(1,), (8,), (24,)]),
        ("tt-matrix", ttm, (12, 72), [(1, 1), (4, 4), (8, 12)]),
    ):
        yield pytest.param(project, shape, ladder, True, id=name)


CASES = list(cases())
COLUMNS = ("project", "shape", "ladder", "batched")
every = pytest.mark.parametrize(COLUMNS, CASES)
each = pytest.mark.parametrize("D", FIVE, ids=lambda D: D.name)


@every
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_full_rank_is_exact_and_the_error_does_not_rise_with_the_ranks(
    project, shape, ladder, batched, dtype, rounding
):
    T = kernel(shape, dtype=dtype)
    found = [project(T, ranks) for ranks in ladder]
    errors = [error(F, T) for F in found]
    assert {F.dtype for F in found} == {dtype} and {F.shape for F in found} == {T.shape}
    assert errors[-1] < rounding
    assert errors[-2] < 0.9 * errors[0]
    assert all(low <= high for high, low in pairwise(errors)), errors


@every
def test_a_stack_under_vmap_equals_one_by_one(project, shape, ladder, batched):
    stack = torch.stack([kernel(shape, seed=seed) for seed in range(3)])
    ranks = ladder[len(ladder) // 2]
    if batched:
        together = torch.vmap(lambda T: project(T, ranks))(stack)
        assert error(together, torch.stack([project(T, ranks) for T in stack])) < 1e-4
    else:
        with pytest.raises(RuntimeError, match="vmap"):
            torch.vmap(lambda T: project(T, ranks))(stack)


@pytest.mark.parametrize(COLUMNS, [case for case in CASES if not case.id.startswith(("tr-", "cp-"))])
def test_projecting_twice_is_projecting_once(project, shape, ladder, batched):
    once = project(kernel(shape), ladder[1])
    assert error(project(once, ladder[1]), once) < 1e-5


@every
def test_zero_strided_half_precision_and_training_tensors(project, shape, ladder, batched):
    assert not project(torch.zeros(shape), ladder[1]).any()
    T = kernel(shape)
    strided = T.transpose(0, 1).contiguous().transpose(0, 1)
    assert error(project(strided, ladder[1]), project(T, ladder[1])) < 1e-5
    assert not project(T.clone().requires_grad_(), ladder[1]).requires_grad
    assert project(T.half(), ladder[1]).dtype == project(T.bfloat16(), ladder[1]).dtype == torch.float32


@every
def test_wrong_ranks_are_errors(project, shape, ladder, batched):
    with pytest.raises(RankError, match="at least 1"):
        project(kernel(shape), (0, *ladder[0][1:]))
    with pytest.raises(RankError, match="rank"):
        project(kernel(shape), (*ladder[0], 2, 2) if len(ladder[0]) > 1 else ((1, 2),))


# -- the five objects ---------------------------------------------------------------------------------


@st.composite
def extents_and_ranks(draw, D):
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=2, max_size=2 if D is SVD else 4)))
    count = len(D.bounds(shape))
    return shape, tuple(draw(st.lists(st.integers(1, 12), min_size=count, max_size=count)))


@each
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_rank_arithmetic_agrees_with_the_factors(D, data):
    shape, wanted = data.draw(extents_and_ranks(D))
    ranks, bounds = D.clip(shape, wanted), D.bounds(shape)
    assert D.clip(shape, ranks) == ranks and all(1 <= r <= w for r, w in zip(ranks, wanted, strict=True))
    assert D.clip(shape, bounds) == bounds
    ladder = [D.uniform(shape, k / 8) for k in range(1, 9)]
    assert all(a <= b for low, high in pairwise(ladder) for a, b in zip(low, high, strict=True))
    assert len(ladder[0]) == len(bounds) and min(ladder[0]) >= 1

    T = kernel(shape)
    factors = D.decompose(T, wanted)
    assert [tuple(factor.shape) for factor in factors] == D.shapes(shape, ranks)
    if D.rough is not None:
        assert [tuple(factor.shape) for factor in D.rough(T, wanted)] == D.shapes(shape, ranks)
    with FlopCounterMode(display=False) as counter:
        found = D.compose(factors)
    assert counter.get_total_flops() // 2 == D.compose_macs(shape, ranks)
    torch.testing.assert_close(found, tensorlys(D, factors), rtol=1e-4, atol=1e-5)
    assert error(projection(D)(T, bounds), T) < 2e-6


def tensorlys(D, factors):
    with tl.backend_context("pytorch"):
        return {
            SVD: lambda: factors[0] @ factors[-1],
            TUCKER: lambda: tl.tucker_to_tensor((factors[0], factors[1:])),
            TT: lambda: tl.tt_to_tensor(factors),
            TR: lambda: tl.tr_to_tensor(factors),
            CP: lambda: tl.cp_to_tensor((None, factors)),
        }[D]()


@each
def test_compositions_are_differentiable(D):
    shape = (5, 4, 3)[: 2 if D is SVD else 3]
    factors = [f.double().requires_grad_() for f in D.decompose(kernel(shape), D.uniform(shape, 0.5))]
    assert torch.autograd.gradcheck(lambda *factors: D.compose(factors), factors)


@pytest.mark.parametrize("D", [D for D in FIVE if D.unfoldings], ids=lambda D: D.name)
def test_every_rank_is_the_rank_of_its_unfolding(D):
    shape = (12, 8) if D is SVD else (6, 5, 4, 3)
    T = kernel(shape, dtype=torch.float64)
    ranks = D.clip(shape, D.uniform(shape, 0.5))
    unfolded = D.unfoldings(projection(D)(T, ranks))
    assert tuple(int(torch.linalg.matrix_rank(M)) for M in unfolded) == ranks
    assert all(M.numel() == math.prod(shape) for M in unfolded)


@pytest.mark.parametrize("D", [TR, CP], ids=lambda D: D.name)
def test_rough_is_no_better_but_near(D):
    T = kernel((12, 9, 8), decay=0.2)
    ranks = D.uniform(T.shape, 0.3)
    full, rough = (error(D.compose(fit(T, ranks)), T) for fit in (D.decompose, D.rough))
    assert full < rough < 1.2 * full
