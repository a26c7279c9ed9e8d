"""The baselines: direct decomposition, and training in compressed form from scratch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tdlib
from tdlib.methods.direct import direct, scratch, untrained
from tdlib.methods.registry import planned
from tdlib.network import Provenance, attach
from tdlib.planning import end_layers

TRAINING = {"batch_size": 64, "device": "cpu", "progress": False}


def test_end_layers_are_the_first_convolution_and_the_classifier(digits, trained) -> None:
    lstm = tdlib.models.build("lstm", digits.classes, input_shape=digits.input_shape, hidden=16)
    assert end_layers(trained) == ("conv1", "linear")
    assert end_layers(lstm) == ("linear",)
    assert end_layers(tdlib.models.build("resnet20", 10)) == ("conv1", "linear")


def test_direct_is_plain_decomposition(digits, trained) -> None:
    plan = planned(trained, digits, format="tt", ratio=2.0)
    small, tables = direct(trained, digits, plan)
    assert tables == {} and tdlib.provenance(small).layers == dict(plan)
    x = torch.randn(3, *digits.input_shape)
    assert torch.equal(small.eval()(x), tdlib.decompose(trained, plan).eval()(x))


@pytest.mark.parametrize("built", [True, False])
def test_an_untrained_network_keeps_nothing_and_depends_on_the_seed(digits, trained, built) -> None:
    model = tdlib.decompose(trained, {})
    if not built:  # as one that did not come from tdlib.models
        attach(model, Provenance())
    plan = planned(model, digits, format="tt", ratio=2.0)
    state = torch.random.get_rng_state()
    a, b, c = (untrained(model, plan, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert {k: v.shape for k, v in a.items()} == {
        k: v.shape for k, v in tdlib.decompose(model, plan).state_dict().items()
    }
    assert all(torch.equal(a[name], b[name]) for name in a)
    for name in ("conv1.weight", "conv4.1.weight", "linear.weight"):
        assert not torch.equal(a[name], c[name])
    assert not torch.equal(a["conv1.weight"], model.state_dict()["conv1.weight"])
    assert not a["bn2.running_mean"].any()


def test_an_untrained_kernel_has_the_variance_of_a_dense_start(digits) -> None:
    torch.manual_seed(0)
    model = tdlib.models.build("cnn", digits.classes, input_shape=digits.input_shape, width=32)
    fresh = untrained(model, planned(model, digits, format="tt", ratio=2.0))
    kernel = tdlib.to_dense(fresh.get_submodule("conv4")).detach()
    assert 0.3 < float(kernel.var() * kernel[0].numel()) / 2 < 3.0  # Kaiming: var = 2 / fan-in


def test_scratch_learns_and_keeps_the_best_epoch(digits, trained) -> None:
    plan = planned(trained, digits, format="tucker2", ratio=3.0)
    small, tables = scratch(trained, digits, plan, epochs=3, lr=0.1, **TRAINING)
    rows = tables["scratch"]
    assert len(rows) == 3 and rows[-1]["train_loss"] < rows[0]["train_loss"]
    best = max(row["val_accuracy"] for row in rows)
    assert tdlib.train.accuracies(small, digits)["val"] == pytest.approx(best)
    assert not isinstance(small.get_submodule("conv4"), nn.Conv2d)
