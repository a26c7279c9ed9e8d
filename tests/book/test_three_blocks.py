"""The authors' algorithm beside this library's solver of the same problem."""

import pandas as pd
import pytest
import torch

from tdbook import three_blocks
from tdbook.three_blocks import compared, solvers, tucker2_three_blocks
from tdlib.decompositions.sigma import sigma_error, tucker2_sigma


@pytest.fixture(scope="module")
def layer():
    """A kernel and the second moments of correlated, non-negative patches."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(800, 8, 5, 5, generator=g, dtype=torch.float64)
    mix = torch.randn(8, 8, 3, 3, generator=g, dtype=torch.float64)
    mix *= torch.logspace(0, -1.5, 8, dtype=torch.float64)[None, :, None, None]
    x = torch.nn.functional.conv2d(x, mix).relu().flatten(1)
    return torch.randn(10, 8, 3, 3, generator=g, dtype=torch.float64), x.T @ x / len(x)


@pytest.mark.parametrize("ranks", [(3, 2), (5, 4), (8, 6)])
def test_both_solvers_reach_the_same_error(layer, ranks):
    W, S = layer
    found, errors = tucker2_three_blocks(W, ranks, S)
    assert errors[0] > 1.02 * errors[-1] and errors[-2] - errors[-1] < 1e-6
    assert sigma_error(W, found.to_tensor(), S) == pytest.approx(errors[-1], rel=1e-6)
    assert [f.shape for f in found.factors] == [(10, ranks[0]), (8, ranks[1])]
    converged = tucker2_sigma(W, ranks, S, sweeps=100, tol=1e-6)
    assert sigma_error(W, converged.to_tensor(), S) == pytest.approx(errors[-1], rel=2e-3)
    as_used = tucker2_sigma(W, ranks, S)
    assert sigma_error(W, as_used.to_tensor(), S) < 1.0016 * errors[-1]  # one sweep stays above


def test_the_bounds_are_those_that_the_solvers_have(monkeypatch):
    monkeypatch.setattr(three_blocks, "tucker2_sigma", lambda W, ranks, S, sweeps=7, tol=0.5: None)
    text = three_blocks.limits()
    assert "after at most 100 sweeps" in text and "less than 1e-06" in text
    assert "at most 7, or when one lowers the squared error by less than 0.5 of itself" in text


def test_the_table_and_its_sentence(layer):
    W, S = layer
    found = solvers({"a": W.float()}, {"a": S}, (0.3, 0.6))
    shown = three_blocks.shown(found.assign(authors_sweeps=[99, 100]))
    assert shown["their sweeps (*: all)"].tolist() == ["99", "100 *"]
    assert (found["ours"] < found["frobenius"]).all() and found["ranks"].tolist() == [(3, 2), (6, 5)]
    text = compared(pd.DataFrame({"authors": [0.2, 0.1], "ours": [0.21, 0.099]}))
    assert "5.00 % above" in text and "1.00 % below" in text
    below = compared(pd.DataFrame({"authors": [0.2], "ours": [0.1]}))
    assert "never above and at most 50.00 % below" in below
