"""What the change of a layer does to the output: predicted, and measured."""

import copy

import pytest
import torch
from torch import nn

from tdlib.calibration import call_order, damped, divergence, fisher, logits, statistics
from tdlib.errors import DataError


def test_the_fisher_weight_predicts_the_divergence_of_small_changes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    x = torch.randn(4000, 6)
    H = fisher(model, [x], ["0"])["0"]
    sigma = statistics(model, [x], ["0"])["0"]
    changed = copy.deepcopy(model)
    D = 0.02 * torch.randn(8, 6)
    with torch.no_grad():
        changed[0].weight.add_(D)
        found = divergence(model(x), changed(x))
    D = D.double()
    predicted = 0.5 * float(torch.einsum("op,oi,ij,pj->", H, D, sigma, D))
    assert found == pytest.approx(predicted, rel=0.5)  # H and Sigma are taken as independent
    assert torch.linalg.eigvalsh(damped(torch.zeros(3, 3)))[0] == 1


def test_fisher_needs_inputs():
    with pytest.raises(DataError, match="empty"):
        fisher(nn.Sequential(nn.Linear(3, 2)), [], ["0"])


def test_outputs_are_those_of_evaluation_mode():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2)).train()
    x = torch.randn(10, 3)
    found = logits(model, [(x[:6], None), x[6:]])
    assert model.training and model[0].training
    torch.testing.assert_close(found, model.eval()(x).detach())
    assert divergence(found, found) == pytest.approx(0, abs=1e-6) and divergence(found, -found) > 0


def test_layers_are_listed_in_the_order_in_which_they_run():
    class Swapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.last(self.first(self.first(x)))

    assert call_order(Swapped(), ["last", "first"], torch.randn(1, 3)) == ["first", "last"]
