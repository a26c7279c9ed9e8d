"""Selection on the validation split, early stopping, and the options that stages of training share."""

import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from train_helpers import tiny_bundle, tiny_model

from tdlib import train
from tdlib.errors import TdlibError
from tdlib.train import EarlyStopping, KeepBest

QUIET = {"progress": False, "device": "cpu", "batch_size": 16}


def _context() -> train.Context:
    model = tiny_model()
    return train.Context(model, tiny_bundle(), torch.optim.SGD(model.parameters()), torch.device("cpu"), 9, 1)


def test_keep_best_survives_a_checkpoint():
    keep = KeepBest()
    keep.epoch, keep.accuracy, keep.weights = 3, 71.0, {"weight": torch.ones(2, 2), "bias": torch.zeros(2)}
    other = KeepBest()
    other.load_state_dict(keep.state_dict())
    layer = nn.Linear(2, 2)
    other.restore(layer)
    assert (other.epoch, other.accuracy) == (3, 71.0)
    assert torch.equal(layer.weight, torch.ones(2, 2))


def test_early_stopping_counts_epochs_without_a_rise():
    ctx, hook, stops = _context(), EarlyStopping(patience=2), []
    for ctx.epoch, accuracy in enumerate((50.0, 60.0, 60.0, 59.0)):
        ctx.row = {"val_accuracy": accuracy}
        hook.after_epoch(ctx)
        stops.append(ctx.stop)
    assert stops == [False, False, False, True]
    assert hook.epoch == 2 and hook.accuracy == 60.0  # the later of equals is kept
    other = EarlyStopping(patience=2)
    other.load_state_dict(hook.state_dict())
    assert (other.stale, other.epoch) == (hook.stale, hook.epoch)


def test_training_ends_when_a_hook_asks_for_it():
    hooks = (EarlyStopping(patience=2),)
    history = train.fit(tiny_model(), tiny_bundle(), epochs=30, lr=1e-8, hooks=hooks, **QUIET)
    assert history.finished and 3 <= len(history.rows) <= 8


def test_fit_selected_has_the_weights_of_the_best_epoch_on_validation():
    net, data = tiny_model(), tiny_bundle()
    history, found = train.fit_selected(net, data, epochs=6, lr=0.5, schedule="constant", **QUIET)
    accuracies = [row["val_accuracy"] for row in history.rows]
    assert accuracies[found["epoch"]] == max(accuracies)
    assert found["selected"] == train.accuracies(net, data)
    assert found["selected"]["val"] == pytest.approx(max(accuracies))
    assert found["last"]["val"] == pytest.approx(accuracies[-1])
    with pytest.raises(TdlibError, match="time limit came after 0 epochs"):
        train.fit_selected(net, data, epochs=6, max_minutes=1e-9, **QUIET)


def test_fresh_batchnorm_statistics_restore_a_network_that_lost_them():
    net, data = tiny_model(), tiny_bundle()
    train.fit(net, data, epochs=10, **QUIET)
    good = train.accuracies(net, data)["test"]
    net.bn2.running_mean += 3
    lost = net.bn2.running_mean.clone()
    assert train.accuracies(net, data)["test"] < good - 20
    assert train.evaluate(train.recalibrated(net, data), data)["accuracy"] > good - 10
    assert torch.equal(net.bn2.running_mean, lost)
    first, again, other = (train.recalibrated(net, data, images=16, seed=seed).bn2 for seed in (1, 1, 2))
    assert torch.equal(first.running_mean, again.running_mean)
    assert not torch.equal(first.running_mean, other.running_mean)
    plain = tiny_model(norm=False)
    assert train.accuracies(train.recalibrated(plain, data), data) == train.accuracies(plain, data)


def test_composed_kernels_are_composed_once_in_an_evaluation():
    class Twice(nn.Module):
        calls = 0

        def forward(self, weight):
            self.calls += 1
            return 2 * weight

    net, twice = tiny_model(), Twice()
    parametrize.register_parametrization(net.conv1, "weight", twice)
    twice.calls = 0
    train.evaluate(net, tiny_bundle(), batch_size=8)
    assert twice.calls == 1


def test_stages_have_their_own_folders_and_share_the_time(tmp_path):
    options = train.stage({"checkpoint": tmp_path, "max_minutes": 5.0, "lr": 0.1}, "dense", started=0.0)
    assert options["checkpoint"] == tmp_path / "dense" and options["lr"] == 0.1
    assert options["max_minutes"] < 5.0
    assert train.stage({"lr": 0.1}, "dense", started=0.0) == {"lr": 0.1}


def test_training_without_accelerate_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(TdlibError, match=r"this needs accelerate.*pip install 'tdlib\[train\]'"):
        train.fit(tiny_model(), tiny_bundle(), epochs=1, **QUIET)
