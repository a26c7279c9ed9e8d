"""Decompositions of a kernel in any unit: the relative error is that of the kernel itself."""

import pytest
import torch

from tdlib.decompositions.linalg import magnitude, singular_values, truncated_svd
from tdlib.formats import FORMATS, get_format

SCALES = (1e-30, 1e-24, 1e-18, 1e-9, 1e9, 1e18, 1e20, 1e30)
generator = torch.Generator().manual_seed(0)
KERNEL = torch.randn(8, 6, 3, 3, generator=generator) * torch.logspace(0, -2, 8)[:, None, None, None]
X = torch.randn(200, 54, generator=generator, dtype=torch.float64)
SIGMA = X.mT @ X / 200
OPTIONS = {"tt-matrix": {"order": 2}}


def relative_error(name, scale, sigma=None):
    weight = KERNEL * scale
    if "linear" in FORMATS[name].kinds and "conv" not in FORMATS[name].kinds:
        weight = weight.flatten(1)
    bound = get_format(name).bind(weight.shape, **OPTIONS.get(name, {}))
    factors = bound.decompose(weight, bound.uniform(0.5), sigma)
    assert all(bool(torch.isfinite(f).all()) for f in factors)
    found = bound.compose([f.double() for f in factors])
    return float((found - weight.double()).norm() / weight.double().norm())


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_the_relative_error_does_not_depend_on_the_unit(name):
    plain = relative_error(name, 1.0)
    assert 0 < plain < 1
    for scale in SCALES:
        assert relative_error(name, scale) == pytest.approx(plain, abs=1e-3), scale


@pytest.mark.parametrize("name", ["tucker2", "cp", "cp4", "tt"])
def test_nor_under_sigma(name):
    plain = relative_error(name, 1.0, SIGMA)
    for scale in (1e-30, 1e-18, 1e20, 1e30):
        assert relative_error(name, scale, SIGMA) == pytest.approx(plain, abs=1e-3), scale
    for unit in (1e-30, 1e30):
        assert relative_error(name, 1.0, unit * SIGMA) == pytest.approx(plain, abs=1e-3), unit


@pytest.mark.parametrize("scale", SCALES)
def test_singular_values_come_in_the_unit_of_the_matrix(scale):
    M = KERNEL.flatten(1) * scale
    expected = torch.linalg.svdvals(M.double()).float()
    for found in (singular_values(M), truncated_svd(M, 8)[1], truncated_svd(M.mT, 8)[1]):
        torch.testing.assert_close(found / scale, expected / scale, rtol=1e-4, atol=1e-6)


def test_usual_kernels_are_left_in_their_unit():
    for usual in (KERNEL, 1e-6 * KERNEL, torch.zeros(3, 3)):
        assert float(magnitude(usual)) == 1
    for scale in SCALES:
        size = magnitude(KERNEL * scale)
        assert torch.frexp(size).mantissa == 0.5  # dividing by it keeps all digits
        assert 0.5 < float((KERNEL * scale / size).abs().max()) < 4
    stacked = torch.stack([KERNEL, 1e20 * KERNEL])
    assert torch.vmap(magnitude)(stacked).tolist() == [float(magnitude(T)) for T in stacked]
