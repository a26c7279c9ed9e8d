"""``benchmarks.tuning.tune_cpu``: what it measures, and that it leaves everything as it was."""

import copy

import pytest
import torch

import tdlib
from benchmarks import tuning
from tdlib.errors import TdlibError, UnknownName


@pytest.fixture(scope="module")
def digits():
    return tdlib.data.load("digits", limit=64)


def small():
    torch.manual_seed(0)
    return tdlib.models.build("cnn", 10, width=4)


def test_measures_every_setting_and_chooses_the_fastest(digits):
    found = tuning.tune_cpu(small(), digits, batch_size=16, threads=(1,), precisions=("no", "bf16"), rounds=2)
    assert len(found.rows) == 4 and {"contiguous, float32, 1 thread", "channels_last, bf16, 1 thread"} <= {
        row["setting"] for row in found.rows
    }
    assert found.rows[0]["setting"] == str(found.best)
    assert found.rows == sorted(found.rows, key=lambda row: row["ms"])
    plain = next(row for row in found.rows if row["setting"] == "contiguous, float32, 1 thread")
    assert plain["speed-up"] == pytest.approx(1)
    assert all(row["speed-up"] == pytest.approx(plain["ms"] / row["ms"]) for row in found.rows)
    assert all(row["setting"] in str(found) for row in found.rows)


def test_chooses_by_the_clock_alone(digits, monkeypatch):
    wanted = tuning.Setting(channels_last=False, precision="bf16", threads=1)
    monkeypatch.setattr(tuning._Step, "__call__", lambda self: 0.5 if self.setting == wanted else 1.0)
    found = tuning.tune_cpu(small(), digits, threads=(1,), precisions=("no", "bf16"))
    assert found.best == wanted
    assert found.options == {"device": "cpu", "channels_last": False, "precision": "bf16"}
    assert found.rows[0]["speed-up"] == 2


def test_leaves_model_random_state_and_threads_alone(digits):
    model = small().eval()
    before, state, threads = copy.deepcopy(model.state_dict()), torch.get_rng_state(), torch.get_num_threads()
    found = tuning.tune_cpu(model, digits, batch_size=8, rounds=1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training and torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    with found.applied() as options:
        assert torch.get_num_threads() == found.best.threads
        history = tdlib.train.fit(model, digits, epochs=1, batch_size=16, lr=0.01, progress=False, **options)
    assert history.finished and torch.get_num_threads() == threads


def test_bad_arguments_are_named(digits):
    with pytest.raises(TdlibError, match="threads must be between 1 and"):
        tuning.tune_cpu(small(), digits, threads=(0,))
    with pytest.raises(TdlibError, match="rounds >= 1"):
        tuning.tune_cpu(small(), digits, rounds=0)
    with pytest.raises(UnknownName, match="fp8"):
        tuning.tune_cpu(small(), digits, precisions=("fp8",))
