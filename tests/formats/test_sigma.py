"""Factors in the norm of a layer's inputs (sigma) and outputs (H, the Fisher information there)."""

import pytest
import torch

from tdlib.decompositions.sigma import pinv_root, sigma_error
from tdlib.errors import DataError, TdlibError
from tdlib.formats import get_format

SHAPES = {"conv": (12, 8, 3, 3), "pointwise": (12, 8, 1, 1), "linear": (12, 8)}
AWARE = [
    ("conv", "tucker2", {}, (4, 3)),
    ("conv", "tt", {}, (4, 3)),
    ("conv", "tt", {"order": 2}, (3, 4, 4, 3)),
    ("conv", "cp", {}, (8,)),
    ("conv", "cp4", {}, (10,)),
    ("linear", "tt", {"order": 2}, (3, 4, 3)),
    ("pointwise", "tucker2", {}, (3,)),
    ("linear", "svd", {}, (3,)),
]


def moments(n, seed):
    """A positive definite matrix of fast falling spectrum."""
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(n, n, generator=g, dtype=torch.float64) * torch.arange(1, n + 1) ** -0.8
    return root @ root.T + 1e-3 * torch.eye(n, dtype=torch.float64)


def problem(kind):
    """(kernel, Σ of its inputs, H at its outputs)."""
    weight = torch.randn(SHAPES[kind], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return weight, moments(weight[0].numel(), 1), moments(len(weight), 2)


def weighted_error(weight, found, sigma, H):
    """tr(H D Σ D^T) with D the error of the kernel."""
    D = (weight - found).flatten(1)
    return float(((H @ D) * (D @ sigma)).sum())


@pytest.mark.parametrize(("kind", "format", "options", "ranks"), AWARE)
def test_sigma_lowers_the_output_error_and_fisher_the_weighted_one(kind, format, options, ranks):
    weight, sigma, H = problem(kind)
    bound = get_format(format).bind(weight.shape, **options)
    plain, aware, both = (bound.decompose(weight, ranks, *norm) for norm in ((), (sigma,), (sigma, H)))
    for factors in (plain, aware, both):
        assert [tuple(f.shape) for f in factors] == bound.shapes(ranks)
        assert {f.dtype for f in factors} == {weight.dtype}
    plain, aware, both = map(bound.compose, (plain, aware, both))
    assert sigma_error(weight, aware, sigma) < 0.95 * sigma_error(weight, plain, sigma)
    if bound.on_output is None:  # no factor of a train over factorised channels carries the whole output mode
        assert torch.equal(both, aware)
    else:
        by_both = weighted_error(weight, both, sigma, H)
        assert by_both < 0.99 * weighted_error(weight, aware, sigma, H)


@pytest.mark.parametrize("kind", ["linear", "pointwise"])
def test_matrices_have_the_closed_form(kind):
    """The error is what the singular values of H^1/2 W Σ^1/2 beyond the rank leave."""
    weight, sigma, H = problem(kind)
    bound = get_format("svd").bind(weight.shape)
    for fisher in (None, H):
        left = torch.eye(12, dtype=torch.float64) if fisher is None else fisher
        found = bound.compose(bound.decompose(weight, (3,), sigma, fisher))
        tail = torch.linalg.svdvals(pinv_root(left)[0] @ weight.flatten(1) @ pinv_root(sigma)[0])[3:]
        assert weighted_error(weight, found, sigma, left) == pytest.approx(
            float(tail.square().sum()), rel=1e-5
        )


@pytest.mark.parametrize(
    ("kind", "format", "options", "ranks"),
    [case for case in AWARE if case[1] not in ("cp", "cp4")],  # a CP is fitted, also at its bound
)
def test_at_full_rank_the_norm_does_not_matter(kind, format, options, ranks):
    weight, sigma, H = problem(kind)
    bound = get_format(format).bind(weight.shape, **options)
    found = bound.compose(bound.decompose(weight, bound.bounds, sigma, H))
    assert sigma_error(weight, found, sigma) < 1e-4


@pytest.mark.parametrize(
    ("kind", "format"),
    [("conv", "svd"), ("conv", "tr"), ("linear", "tr"), ("linear", "tt-matrix"), ("conv", "shuffled-tt")],
)
def test_formats_without_it_say_so(kind, format):
    weight, sigma, _ = problem(kind)
    bound = get_format(format).bind(weight.shape)
    with pytest.raises(TdlibError, match=f"'{format}' has no data-aware decomposition for a {kind} layer"):
        bound.decompose(weight, (1,) * len(bound.bounds), sigma)
    with pytest.raises(DataError, match="statistics of another layer"):
        get_format("tucker2").bind(weight.shape).decompose(weight, (1, 1)[: weight.ndim // 2], sigma[1:, 1:])


def test_rows_say_whether_some_kind_of_layer_has_it():
    assert get_format("tucker2").sigma and get_format("svd").sigma
    assert not get_format("tr").sigma and not get_format("shuffled-tt").sigma
