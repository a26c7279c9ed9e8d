"""The baselines: direct decomposition, training in compressed form from scratch, selection by validation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tdlib
from tdlib.errors import TdlibError, UnknownName
from tdlib.methods import direct
from tdlib.train import History

TRAINING = {"batch_size": 64, "seed": 0, "device": "cpu", "progress": False}


@pytest.fixture(scope="module")
def digits():
    return tdlib.data.load("digits")


def net(digits, name: str = "cnn", **kw: int) -> nn.Module:
    torch.manual_seed(0)
    return tdlib.models.build(name, digits.classes, input_shape=digits.input_shape, **(kw or {"width": 8}))


def test_end_layers_are_the_first_convolution_and_the_classifier(digits) -> None:
    assert direct.end_layers(net(digits)) == ("conv1", "linear")
    assert direct.end_layers(net(digits, "lstm", hidden=16)) == ("linear",)
    assert direct.end_layers(tdlib.models.build("resnet20", 10)) == ("conv1", "linear")


def test_no_training_is_plain_decomposition(digits) -> None:
    model = net(digits).eval()
    before = copy.deepcopy(model.state_dict())
    small = direct.compress(model, digits, ratio=2.0, finetune_epochs=0)
    report = small._tdlib["report"]
    assert report["before"] == report["after"] and report["params_ratio"] == pytest.approx(2.0, rel=0.02)
    same = tdlib.decompose(model, direct.make_plan(model, digits, "tt", 2.0, "params")).eval()
    x = torch.randn(3, *digits.input_shape)
    assert torch.allclose(small.eval()(x), same(x), atol=1e-6)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_fine_tuning_helps_and_keeps_the_selected_epoch(digits) -> None:
    model = net(digits)
    tdlib.train.fit(model, digits, epochs=4, lr=0.05, **TRAINING)
    small = direct.compress(model, digits, ratio=4.0, finetune_epochs=3, finetune_lr=0.02, **TRAINING)
    report = small._tdlib["report"]
    assert report["after"]["test"] > report["before"]["test"]
    best = max(row["val_accuracy"] for row in report["history"]["finetune"])
    assert report["after"]["val"] == pytest.approx(best)
    assert direct.accuracies(small, digits) == report["after"]


def test_from_scratch_keeps_nothing_and_depends_on_the_seed(digits) -> None:
    model = net(digits)
    plan = direct.make_plan(model, digits, "tt", 2.0, "params")
    a, b, c = (direct.from_scratch(model, plan, seed) for seed in (0, 0, 1))
    assert all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )
    assert not torch.equal(a.state_dict()["conv1.weight"], c.state_dict()["conv1.weight"])
    assert not torch.equal(c.state_dict()["conv1.weight"], model.state_dict()["conv1.weight"])
    shapes = {k: v.shape for k, v in tdlib.decompose(model, plan).state_dict().items()}
    assert {k: v.shape for k, v in a.state_dict().items()} == shapes
    state = torch.random.get_rng_state()
    direct.from_scratch(model, plan, 3)
    assert torch.equal(state, torch.random.get_rng_state())


def test_from_scratch_starts_at_the_variance_of_a_dense_start(digits) -> None:
    torch.manual_seed(0)
    model = tdlib.models.build("cnn", digits.classes, input_shape=digits.input_shape, width=32)
    plan = direct.make_plan(model, digits, "tt", 2.0, "params")
    fresh = direct.from_scratch(model, plan, 0)
    kernel = tdlib.to_dense(fresh.get_submodule("conv4"))
    fan_in = kernel[0].numel()
    assert 0.3 < float(kernel.detach().var() * fan_in) / 2 < 3.0  # Kaiming: var = 2 / fan_in


def test_keep_best_survives_a_checkpoint() -> None:
    keep = direct.KeepBest()
    keep.epoch, keep.accuracy, keep.weights = 3, 71.0, {"weight": torch.ones(2, 2), "bias": torch.zeros(2)}
    other = direct.KeepBest()
    other.load_state_dict(keep.state_dict())
    layer = nn.Linear(2, 2)
    other.restore(layer)
    assert (other.epoch, other.accuracy) == (3, 71.0)
    assert torch.equal(layer.weight, torch.ones(2, 2))


def test_stages_have_their_own_folders_and_share_the_time(tmp_path) -> None:
    options = direct.stage({"checkpoint": tmp_path, "max_minutes": 5.0, "lr": 0.1}, "dense", started=0.0)
    assert (
        options["checkpoint"] == tmp_path / "dense" and options["max_minutes"] < 5.0 and options["lr"] == 0.1
    )
    assert direct.stage({"lr": 0.1}, "dense", started=0.0) == {"lr": 0.1}


def test_a_stage_that_ran_out_of_time_stops_the_chain() -> None:
    with pytest.raises(TdlibError, match="2 epochs"):
        direct.require_finished(History([{}, {}], finished=False))


def test_unknown_training_options_are_listed() -> None:
    with pytest.raises(UnknownName, match="batch_size"):
        direct.training_options({"batchsize": 3})
