"""What the change of a layer does to the output: predicted, and measured."""

import copy

import pytest
import torch
from torch import nn

from tdlib.calibration import call_order, damped, divergence, fisher, logits, statistics
from tdlib.errors import DataError, NonFiniteError


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


class Around(nn.Module):
    """A layer, then class scores that depend on every one of its outputs."""

    def __init__(self, layer, in_place=False, twice=False):
        super().__init__()
        self.layer, self.act, self.twice = layer, nn.ReLU(inplace=in_place), twice

    def forward(self, x):
        z = self.layer(x)
        if self.twice:
            z = self.layer(z)
        y = self.act(z).flatten(1)
        return torch.stack([(y * torch.cos(k * torch.arange(y.shape[1]))).mean(1) for k in range(3)], 1)


def by_brute_force(model, x, seed=0):
    """E[sum over positions of g g^T], one input and one position at a time; the channels are found by moving
    them last."""
    spatial = len(getattr(model.layer, "kernel_size", ()))
    found = []
    hook = model.layer.register_forward_hook(lambda *a: found.append(a[-1].clone()) or found[-1].clone())
    scores = model(x)
    hook.remove()
    drawn = torch.multinomial(scores.detach().softmax(-1), 1, generator=torch.Generator().manual_seed(seed))
    H = 0
    for n in range(len(x)):
        loss = torch.nn.functional.cross_entropy(scores[n], drawn[n, 0])
        for g in torch.autograd.grad(loss, found, retain_graph=True):
            g = g.movedim(g.ndim - 1 - spatial, -1).flatten(0, -2)
            H = H + sum(torch.outer(row, row).double() for row in g)
    return H / len(x)


LAYERS = [
    (nn.Linear(5, 4), (6, 5)),
    (nn.Linear(5, 4), (6, 3, 5)),
    (nn.Linear(5, 4), (6, 4, 3, 5)),  # as many rows as outputs: the axes cannot be told by their size
    (nn.Linear(4, 4), (6, 4, 4, 4)),
    (nn.Conv1d(2, 4, 2), (6, 2, 5)),
    (nn.Conv2d(2, 4, 2), (6, 2, 5, 4)),
    (nn.Conv3d(2, 4, 2), (6, 2, 3, 3, 2)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=str)
def test_fisher_weights_are_taken_over_the_channels_whatever_the_other_axes(layer, shape):
    torch.manual_seed(0)
    model, x = Around(layer), torch.randn(shape)
    torch.testing.assert_close(fisher(model, [x], ["layer"])["layer"], by_brute_force(model, x))


@pytest.mark.parametrize("options", [{"in_place": True}, {"twice": True}], ids=str)
def test_fisher_weights_see_the_output_itself_in_every_call(options):
    """Not what an in-place activation makes of it, nor the last call alone."""
    torch.manual_seed(0)
    model, x = Around(nn.Linear(4, 4), **options), torch.randn(8, 4)
    expected = by_brute_force(model, x)
    torch.testing.assert_close(fisher(model, [x], ["layer"])["layer"], expected)
    model.requires_grad_(False)
    if not options.get("twice"):
        torch.testing.assert_close(fisher(model, [x], ["layer"])["layer"], expected)


def test_fisher_weights_need_class_scores():
    class Giving(nn.Module):
        def __init__(self, give):
            super().__init__()
            self.layer, self.give = nn.Linear(4, 3), give

        def forward(self, x):
            return self.give(self.layer(x))

    x = torch.randn(5, 4)
    for give in (lambda y: {"out": y}, lambda y: (y, y), lambda y: y[:, :, None], lambda y: y.mean(0, True)):
        with pytest.raises(DataError, match=r"class scores .* 5 inputs .* weigh_outputs=False"):
            fisher(Giving(give), [x], ["layer"])
    with pytest.raises(NonFiniteError, match="the network's output"):
        fisher(Giving(lambda y: y / 0), [x], ["layer"])
