"""Ranks from singular values: energy and the analytic variational Bayesian factorisation."""

import pytest
import torch

from tdlib.decompositions import energy_rank, evbmf_rank
from tdlib.errors import NonFiniteError, RankError


def noisy(m, n, rank, signal=3.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    A, B = torch.randn(m, rank, generator=g), torch.randn(rank, n, generator=g)
    return signal * A @ B / max(rank, 1) ** 0.5 + torch.randn(m, n, generator=g)


@pytest.mark.parametrize(
    "m, n, rank", [(100, 300, 10), (60, 60, 5), (128, 1152, 20), (40, 200, 1), (64, 576, 0)]
)
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
def test_evbmf_finds_the_rank_whatever_the_scale_and_orientation(m, n, rank, scale):
    M = noisy(m, n, rank) * scale
    assert evbmf_rank(M) == rank
    assert evbmf_rank(M.mT) == rank


def test_evbmf_of_noiseless_and_empty_signals():
    g = torch.Generator().manual_seed(0)
    assert evbmf_rank(torch.randn(40, 3, generator=g) @ torch.randn(3, 50, generator=g)) == 3
    assert evbmf_rank(torch.zeros(4, 6)) == 0


def test_evbmf_drops_a_signal_below_the_noise():
    assert evbmf_rank(noisy(100, 200, 5, signal=0.05)) == 0


def test_energy_rank():
    M = torch.diag(torch.tensor([3.0, 2.0, 1.0]))  # squares 9, 4, 1 of 14
    assert [energy_rank(M, e) for e in (0.5, 9 / 14, 0.65, 13 / 14, 0.95, 1.0)] == [1, 1, 2, 2, 3, 3]
    assert energy_rank(torch.zeros(3, 4), 0.9) == 1
    assert energy_rank(torch.outer(torch.arange(1.0, 4.0), torch.arange(1.0, 9.0)).double(), 1.0) == 1


@pytest.mark.parametrize("energy", [0, -1, 1.01, float("nan")])
def test_energy_outside_its_range(energy):
    with pytest.raises(RankError, match="retained fraction"):
        energy_rank(torch.eye(3), energy)


@pytest.mark.parametrize("rule", [evbmf_rank, lambda M: energy_rank(M, 0.5)])
def test_nonfinite_input(rule):
    with pytest.raises(NonFiniteError):
        rule(torch.full((3, 3), float("nan")))
