"""fit: reproducible, correct arithmetic, hooks, schedules, and errors before anything happens."""

import math

import pytest
import torch
import torch.nn.functional as F
from train_helpers import Counting, tiny_bundle, tiny_model

import tdlib
from tdlib import models, train
from tdlib.errors import DataError, NonFiniteError, TdlibError, UnknownName

QUIET = {"progress": False, "device": "cpu"}


def _plain(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_same_seed_same_weights_and_global_random_state_untouched(dropout):
    runs = []
    for _ in range(2):
        state = torch.get_rng_state()
        net = tiny_model(dropout=dropout)
        history = train.fit(net, tiny_bundle(), epochs=2, batch_size=16, **QUIET)
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(3)  # another global state must not matter
        runs.append((net.state_dict(), history))
    for key, value in runs[0][0].items():
        assert torch.equal(value, runs[1][0][key])
    assert _plain(runs[0][1].rows) == _plain(runs[1][1].rows)


def test_equals_a_loop_written_out():
    """One epoch of fit is SGD with momentum on the batches of Bundle.batches, nothing else."""
    data, net, plain = tiny_bundle(), tiny_model(), tiny_model()
    options = {"momentum": 0.9, "weight_decay": 1e-3, "nesterov": True}
    train.fit(
        net,
        data,
        epochs=1,
        lr=0.1,
        batch_size=20,
        schedule="constant",
        label_smoothing=0.1,
        **options,
        **QUIET,
    )
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, **options)
    for x, y in data.batches("train", 20, augment="auto"):
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y, label_smoothing=0.1).backward()
        optimizer.step()
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(net.state_dict()[key], value, rtol=1e-4, atol=1e-5)


def test_learns_and_reports(capsys):
    net, data = tiny_model(), tiny_bundle()
    history = train.fit(net, data, epochs=10, lr=0.1, batch_size=16, device="cpu")
    frame = history.to_frame()
    assert history.finished and list(frame["epoch"]) == list(range(10))
    assert {"lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "seconds"} <= set(frame.columns)
    test = train.evaluate(net, data)
    assert test["accuracy"] > 90 and test["n"] == len(data.test)
    shown = capsys.readouterr().err
    assert "60/60" in shown and "loss" in shown and "acc" in shown


def test_validation_row_is_evaluate_on_val():
    net, data = tiny_model(), tiny_bundle()
    history = train.fit(net, data, epochs=1, batch_size=16, **QUIET)
    measured = train.evaluate(net, data, "val")
    assert history.rows[-1]["val_accuracy"] == pytest.approx(measured["accuracy"])
    assert history.rows[-1]["val_loss"] == pytest.approx(measured["loss"], rel=1e-5)


def test_evaluate_by_hand_and_keeps_modes():
    net, data = tiny_model(), tiny_bundle()
    net.train()
    net.bn1.eval()
    found = train.evaluate(net, data, "test", batch_size=7)
    assert net.training and not net.bn1.training
    net.eval()
    x = torch.stack([data.test[i][0] for i in range(len(data.test))])
    with torch.no_grad():
        scores = net(x)
    assert found["loss"] == pytest.approx(float(F.cross_entropy(scores, data.test.labels)), rel=1e-5)
    assert found["accuracy"] == pytest.approx(
        100 * float((scores.argmax(1) == data.test.labels).float().mean())
    )


def test_agreement():
    data, net, other = tiny_bundle(), tiny_model(), tiny_model(seed=3)
    assert train.agreement(net, net, data) == pytest.approx({"agreement": 100, "kl": 0, "n": 48}, abs=1e-6)
    found = train.agreement(net, other, data)
    assert found["agreement"] < 100 and found["kl"] > 0


def test_hooks_are_called_in_order_and_add_columns():
    hook = Counting()
    history = train.fit(tiny_model(), tiny_bundle(), epochs=2, batch_size=32, hooks=[hook], **QUIET)
    step = ["penalty", "before_step", "after_step"]
    assert hook.calls == ["on_start", *(2 * ["on_epoch_start", *3 * step, "after_epoch"])]
    assert [row["count"] for row in history.rows] == [3, 6]


def test_penalty_changes_gradients():
    plain, decayed = tiny_model(), tiny_model()
    train.fit(plain, tiny_bundle(), epochs=1, batch_size=32, **QUIET)
    train.fit(decayed, tiny_bundle(), epochs=1, batch_size=32, hooks=[Counting()], **QUIET)
    assert not torch.equal(plain.conv1.weight, decayed.conv1.weight)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_optimizers_and_precisions(optimizer, precision):
    net = tiny_model()
    history = train.fit(
        net, tiny_bundle(), epochs=2, lr=0.01, batch_size=16, optimizer=optimizer, precision=precision,
        clip_norm=1.0, channels_last=False, **QUIET,
    )  # fmt: skip
    assert history.rows[1]["train_loss"] < history.rows[0]["train_loss"]
    assert all(p.dtype == torch.float32 for p in net.parameters())


def test_lstm_trains():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = models.build("lstm", 3, input_shape=(1, 8, 8), hidden=16)
    history = train.fit(net, tiny_bundle(), epochs=5, optimizer="adam", lr=0.02, batch_size=16, **QUIET)
    assert history.rows[-1]["train_accuracy"] > 60


def test_frozen_parameters_stay():
    net = tiny_model()
    net.conv1.weight.requires_grad_(False)
    before = net.conv1.weight.clone()
    train.fit(net, tiny_bundle(), epochs=1, batch_size=32, **QUIET)
    assert torch.equal(net.conv1.weight, before)


def test_non_finite_loss_names_epoch_and_step(tmp_path):
    with pytest.raises(NonFiniteError, match=r"epoch 0, step \d+ of 3"):
        train.fit(
            tiny_model(norm=False), tiny_bundle(), epochs=2, lr=1e18, batch_size=32, schedule="constant",
            checkpoint=tmp_path, **QUIET,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_weights_that_the_last_step_made_infinite_are_named():
    class Spoiling(train.Hook):
        def after_step(self, ctx):
            if ctx.step == ctx.steps - 1:
                ctx.model.conv1.weight.data.fill_(math.inf)

    with pytest.raises(NonFiniteError, match="weights became NaN or infinite at the end of epoch 0"):
        train.fit(tiny_model(), tiny_bundle(), epochs=1, batch_size=32, hooks=[Spoiling()], **QUIET)


def test_a_float64_model_is_trained_and_measured_in_float64():
    net, single = tiny_model().double(), tiny_model()
    for model in (net, single):
        train.fit(model, tiny_bundle(), epochs=1, lr=0.01, batch_size=32, **QUIET)
    assert net.conv1.weight.dtype == torch.float64
    torch.testing.assert_close(net.conv1.weight.float(), single.conv1.weight, rtol=1e-3, atol=1e-5)
    assert train.agreement(net, single, tiny_bundle())["agreement"] == 100


class Auxiliary(torch.nn.Module):
    """Gives a tuple while it is trained, as GoogLeNet does."""

    def __init__(self):
        super().__init__()
        self.net = tiny_model()

    def forward(self, x):
        scores = self.net(x)
        return (scores, scores) if self.training else scores


@pytest.mark.parametrize(
    "model, data, error, message",
    [
        (lambda: tiny_model().half(), tiny_bundle, TdlibError, r"float16.*model\.float\(\)"),
        (lambda: tiny_model().bfloat16(), tiny_bundle, TdlibError, r"bfloat16.*model\.float\(\)"),
        (Auxiliary, tiny_bundle, TdlibError, "gives tuple.*aux_logits=False"),
        (lambda: tiny_model().requires_grad_(False), tiny_bundle, TdlibError, "no trainable"),
        (
            lambda: models.build("cnn", 2, input_shape=(1, 8, 8), width=4), tiny_bundle, TdlibError,
            "2 outputs, tiny has 3 classes",
        ),
        (tiny_model, lambda: [torch.zeros(2, 1, 8, 8)], DataError, r"tdlib\.data\.load.*not a list"),
    ],
)  # fmt: skip
def test_networks_and_data_that_cannot_be_trained_say_why(model, data, error, message):
    with pytest.raises(error, match=message):
        train.fit(model(), data(), epochs=1, batch_size=32, **QUIET)


def test_a_rehearsal_finds_what_only_a_step_shows_and_changes_nothing():
    net, state = Auxiliary(), torch.get_rng_state()
    with pytest.raises(TdlibError, match="aux_logits"):
        train.rehearse(net, tiny_bundle(), epochs=9, **QUIET)
    before = {key: value.clone() for key, value in net.net.state_dict().items()}
    train.rehearse(net.net, tiny_bundle(), epochs=9, **QUIET)
    assert all(torch.equal(value, before[key]) for key, value in net.net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_no_epochs_changes_nothing():
    net = tiny_model()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    history = train.fit(net, tiny_bundle(), epochs=0, **QUIET)
    assert history.finished and history.rows == []
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_batch_larger_than_the_data():
    history = train.fit(tiny_model(), tiny_bundle(), epochs=1, batch_size=1000, **QUIET)
    assert math.isfinite(history.rows[0]["train_loss"])


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"epochs": -1}, TdlibError, "epochs"),
        ({"epochs": 1, "lr": 0.0}, TdlibError, "lr"),
        ({"epochs": 1, "batch_size": 0}, TdlibError, "batch_size"),
        ({"epochs": 1, "label_smoothing": 1.0}, TdlibError, "label_smoothing"),
        ({"epochs": 1, "checkpoint_steps": 0}, TdlibError, "checkpoint_steps"),
        ({"epochs": 1, "max_minutes": 0}, TdlibError, "max_minutes"),
        ({"epochs": 1, "schedule": "linear"}, UnknownName, "constant, cosine, step"),
        ({"epochs": 2, "warmup_epochs": 2}, TdlibError, "warmup"),
        ({"epochs": 1, "optimizer": "sdg"}, UnknownName, "adam, adamw, sgd"),
        ({"epochs": 1, "precision": "fp8"}, UnknownName, "bf16"),
        ({"epochs": 1, "augment": "strong"}, TdlibError, "augment"),
        ({"epochs": 1, "step_epochs": 2}, TdlibError, "belongs to schedule"),
        ({"epochs": 1, "nesterov": True, "optimizer": "adam"}, TdlibError, "belongs to the optimizer"),
        ({"epochs": 1, "nesterov": True, "momentum": 0.0}, TdlibError, "Nesterov momentum requires"),
        ({"epochs": 1, "weight_decay": -1.0}, TdlibError, "weight_decay"),
        ({"epochs": 1, "precision": None}, UnknownName, "bf16"),
    ],
)
def test_bad_options(options, error, message):
    net = tiny_model()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(error, match=message):
        train.fit(net, tiny_bundle(), **(QUIET | options))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_schedules():
    rate = train.learning_rate
    cosine = {"base": 0.1, "epochs": 10, "schedule": "cosine"}
    assert rate(0, **cosine) == 0.1 and rate(5, **cosine) == pytest.approx(0.05)
    assert rate(10, **cosine) == pytest.approx(0, abs=1e-12)
    warm = cosine | {"warmup_epochs": 2}
    assert rate(1, **warm) == pytest.approx(0.05) and rate(2, **warm) == pytest.approx(0.1)
    assert 0 < rate(0, **warm) < 0.01
    step = {"base": 0.1, "epochs": 200, "schedule": "step", "step_epochs": 55, "step_gamma": 0.2}
    assert [rate(p, **step) for p in (0, 54.9, 55, 110, 199)] == pytest.approx(
        [0.1, 0.1, 0.02, 0.004, 0.0008]
    )
    assert rate(7.3, base=0.1, epochs=10, schedule="constant") == 0.1


def test_a_trained_network_remembers_its_inputs_also_compressed_and_saved(tmp_path):
    data, model = tiny_bundle(), tiny_model()
    assert tdlib.provenance(model).inputs is None
    train.fit(model, data, epochs=1, device="cpu", progress=False)
    assert tdlib.provenance(model).inputs == data.description
    small = tdlib.compress(model, "direct", data, ratio=1.2, device="cpu", progress=False)
    tdlib.save(small, tmp_path / "small.safetensors")
    inputs = tdlib.provenance(tdlib.load(tmp_path / "small.safetensors")).inputs
    assert inputs == {
        "classes": ["a", "b", "c"], "mean": [0.3], "std": [0.2], "input_shape": [1, 8, 8],
        "interpolation": "bilinear",
    }  # fmt: skip
