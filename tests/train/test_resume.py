"""Runs that are killed and started again end as unbroken ones; checkpoints are refused where they must be."""

import errno
import multiprocessing
import os
import random
import shutil
import signal
import time

import pytest
import torch
from train_helpers import (
    Counting,
    compressed_run,
    long_run,
    one_of_two,
    tiny_bundle,
    tiny_model,
    two_process_run,
)

from tdlib import train
from tdlib.errors import CheckpointError, Interrupted
from tdlib.train import checkpoint as store

KILLS = 10


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    slow = ["torch._dynamo", "tdlib.methods.rstd", "sklearn.datasets"]  # to import, so once
    context.set_forkserver_preload(slow)
    return context


def _launch(processes, directory, delay):
    here, there = processes.Pipe(duplex=False)
    process = processes.Process(target=long_run, args=(directory, there, delay))
    process.start()
    there.close()
    return process, here


def test_sigkill_at_random_moments_changes_nothing(processes, tmp_path):
    """104 steps take at least 1.04 s; ten runs are killed, each within 0.1 s of its first step."""
    process, pipe = _launch(processes, tmp_path / "unbroken", 0.0)
    process.join(120)
    assert process.exitcode == 0
    moments = random.Random(0)
    for _ in range(KILLS):
        process, pipe = _launch(processes, tmp_path / "killed", 0.01)
        assert pipe.recv() == "training"
        time.sleep(moments.uniform(0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
    process, pipe = _launch(processes, tmp_path / "killed", 0.0)
    process.join(120)
    assert process.exitcode == 0
    whole, broken = (torch.load(tmp_path / name / "final.pt") for name in ("unbroken", "killed"))
    assert broken["rows"] == whole["rows"] and len(whole["rows"]) == 13
    for key, value in whole["weights"].items():
        assert torch.equal(value, broken["weights"][key]), key
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == [store.NAME, "final.pt"]


@pytest.mark.parametrize("method", ["rstd", "iterative"])
def test_sigkill_changes_nothing_in_what_compress_gives(processes, tmp_path, method):
    """Three kills, each within 0.1 s of a process's first step; every step takes 0.02 s or more."""
    moments = random.Random(1)
    for name, kills in (("unbroken", 0), ("killed", 3)):
        (tmp_path / name).mkdir()
        for attempt in range(kills + 1):
            here, there = processes.Pipe(duplex=False)
            delay = 0.02 if attempt < kills else 0.0
            process = processes.Process(target=compressed_run, args=(tmp_path / name, there, method, delay))
            process.start()
            there.close()
            if attempt < kills:
                assert here.recv() == "training"
                time.sleep(moments.uniform(0, 0.1))
                os.kill(process.pid, signal.SIGKILL)
            process.join(120)
            assert process.exitcode == (-signal.SIGKILL if attempt < kills else 0)
    whole, broken = (torch.load(tmp_path / name / "final.pt") for name in ("unbroken", "killed"))
    assert broken["rows"] == whole["rows"]
    assert all(torch.equal(value, broken["weights"][key]) for key, value in whole["weights"].items())


@pytest.mark.parametrize("norm", [False])
def test_two_processes_equal_one(processes, tmp_path, norm):
    port = 29500 + os.getpid() % 2000
    (tmp_path / "checkpoint").mkdir()
    children = [processes.Process(target=one_of_two, args=(rank, port, tmp_path, norm)) for rank in (0, 1)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0, 0]
    net, history = two_process_run(norm)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for key, value in net.state_dict().items():
        torch.testing.assert_close(first["weights"][key], value, rtol=1e-4, atol=1e-6)
        assert torch.equal(first["weights"][key], second["weights"][key])
    for row, other in zip(history.rows, first["rows"], strict=True):
        assert {k: v for k, v in other.items() if k != "seconds"} == pytest.approx(
            {k: v for k, v in row.items() if k != "seconds"}, rel=1e-4
        )
    state = store.read(tmp_path / "checkpoint")
    assert state is not None and state["finished"]


def _fit(net, directory, hooks=(), **changes):
    options = {"epochs": 3, "batch_size": 32, "lr": 0.05, "progress": False, "device": "cpu"} | changes
    return train.fit(net, tiny_bundle(), checkpoint=directory, hooks=hooks, **options)


def test_finished_run_returns_at_once_with_its_weights(tmp_path):
    net, hook = tiny_model(), Counting()
    first = _fit(net, tmp_path, [hook])
    other, again = tiny_model(), Counting()
    second = _fit(other, tmp_path, [again])
    assert second.finished and second.rows == first.rows
    assert "penalty" not in again.calls and again.count == hook.count
    for key, value in net.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)


def test_time_limit_stops_at_a_checkpoint_and_continues(tmp_path):
    whole = tiny_model()
    _fit(whole, None)
    net = tiny_model()
    stopped = _fit(net, tmp_path, max_minutes=1e-9)
    assert not stopped.finished and len(stopped.rows) < 3
    starts = 0
    while not _fit(net, tmp_path, max_minutes=1e-9).finished:
        starts += 1
        assert starts < 20
    for key, value in whole.state_dict().items():
        assert torch.equal(net.state_dict()[key], value), key


def test_time_limit_without_checkpoint_says_not_finished():
    assert not _fit(tiny_model(), None, max_minutes=1e-9).finished


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda raw: raw[: len(raw) // 2], "corrupt"),
        (lambda raw: raw[:-100] + bytes(100), "corrupt"),
        (lambda raw: b"PK" + raw, "not a tdlib checkpoint"),
        (lambda raw: b"", "not a tdlib checkpoint"),
    ],
)
def test_damaged_checkpoint_is_refused_and_kept(tmp_path, damage, message):
    _fit(tiny_model(), tmp_path, epochs=1)
    path = tmp_path / store.NAME
    path.write_bytes(damage(path.read_bytes()))
    before, net = path.read_bytes(), tiny_model()
    weights = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        _fit(net, tmp_path, epochs=1)
    assert path.read_bytes() == before
    assert all(torch.equal(value, weights[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"lr": 0.06}, "lr"),
        ({"seed": 1}, "seed"),
        ({"epochs": 4}, "epochs"),
        ({"hooks": [Counting()]}, "hooks"),
    ],
)
def test_checkpoint_of_another_run_is_refused(tmp_path, changes, named):
    _fit(tiny_model(), tmp_path)
    with pytest.raises(CheckpointError, match=f"another run.*{named}"):
        _fit(tiny_model(), tmp_path, **changes)


class Weighted(train.Hook):
    def __init__(self, strength, layers=()):
        self.strength, self.layers = strength, layers


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"seed": 5}, "weights"),
        ({"hooks": [Weighted(2.0, ["conv1"])]}, "hooks"),
        ({"hooks": [Weighted(1.0, ["conv2"])]}, "hooks"),
        ({"hooks": [train.EarlyStopping(3)]}, "hooks"),
        ({"origin": "another"}, "weights"),
    ],
)
def test_other_weights_or_hook_settings_are_another_run_whose_folder_stays_as_it_is(tmp_path, changes, named):
    def run(seed=0, hooks=(), **more):
        return _fit(tiny_model(seed=seed), tmp_path, hooks or [Weighted(1.0, ["conv1"])], epochs=1, **more)

    run()
    (tmp_path / f".{store.NAME}.99").write_bytes(b"the draft of another process")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=rf"another run: it differs in {named} \("):
        run(**changes)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert run().finished


def test_weights_that_differ_in_the_last_bits_continue_under_the_same_origin(tmp_path):
    first, second = tiny_model(), tiny_model()
    with torch.no_grad():
        second.conv1.weight.mul_(1 + 1e-7)
    _fit(first, tmp_path, origin="the same")
    assert _fit(second, tmp_path, origin="the same").finished
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in first.state_dict().items())


class Raising(train.Hook):
    """Sends this process a signal after a number of steps."""

    def __init__(self, number, step):
        self.number, self.step = number, step

    def identity(self):
        return "Raising"

    def after_step(self, ctx):
        if self.number and 3 * ctx.epoch + ctx.step == self.step:
            signal.raise_signal(self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [0, 2, 4, 8])  # the first, the last of an epoch, in the middle, the last
def test_ctrl_c_and_sigterm_end_at_a_checkpoint_and_the_same_run_goes_on(tmp_path, number, step):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    said = rf"{number.name} at epoch {(step + 1) // 3}, step .*same again"
    with pytest.raises(Interrupted, match=said) as caught:
        _fit(tiny_model(), tmp_path, [Raising(number, step)])
    assert caught.value.signal == number and isinstance(caught.value, KeyboardInterrupt)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    state = store.read(tmp_path)
    assert 3 * state["epoch"] + state["step"] == step + 1 and state["finished"] == (step == 8)
    whole, again = tiny_model(), tiny_model()
    _fit(whole, None, [Raising(None, 0)])
    assert _fit(again, tmp_path, [Raising(None, 0)]).finished
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in whole.state_dict().items())


def test_without_a_checkpoint_ctrl_c_is_pythons_own():
    with pytest.raises(KeyboardInterrupt) as caught:
        _fit(tiny_model(), None, [Raising(signal.SIGINT, 1)])
    assert not isinstance(caught.value, Interrupted)


def test_a_signal_that_is_ignored_outside_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert _fit(tiny_model(), tmp_path, [Raising(signal.SIGINT, 1)]).finished
    finally:
        signal.signal(signal.SIGINT, before)


def test_too_little_disk_is_said_before_training(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"0 MB free.*need"):
        _fit(tiny_model(), tmp_path)


def test_checkpoint_of_another_model_or_data_is_refused(tmp_path):
    _fit(tiny_model(), tmp_path)
    with pytest.raises(CheckpointError, match="model"):
        _fit(tiny_model(norm=False), tmp_path)
    with pytest.raises(CheckpointError, match="data"):
        train.fit(
            tiny_model(), tiny_bundle(n=93), epochs=3, batch_size=32, lr=0.05, progress=False, device="cpu",
            checkpoint=tmp_path,
        )  # fmt: skip


def test_full_disk_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    net = tiny_model()
    replace, calls = os.replace, []

    def failing(source, target):
        calls.append(target)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(CheckpointError, match=r"No space left.*last good checkpoint is kept"):
            _fit(net, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [store.NAME]
    state = store.read(tmp_path)
    assert state is not None and state["epoch"] == 2
    whole, resumed = tiny_model(), tiny_model()
    _fit(whole, None)
    assert _fit(resumed, tmp_path).finished
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in resumed.state_dict().items())


def test_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(CheckpointError, match="cannot be written"):
        _fit(tiny_model(), tmp_path / "file")


def test_remains_of_a_killed_write_are_removed(tmp_path):
    (tmp_path / f".{store.NAME}.12345").write_bytes(b"half")
    _fit(tiny_model(), tmp_path, epochs=1)
    assert [path.name for path in tmp_path.iterdir()] == [store.NAME]


@pytest.mark.parametrize(
    "entry, value",
    [
        ("epoch", None), ("epoch", -5), ("epoch", 99), ("step", "a"), ("model", {}), ("rows", "a"),
        ("hooks", [{}]), ("optimizer", "a"), ("totals", "a"), ("rng", "a"), ("finished", "a"),
    ],
)  # fmt: skip
def test_state_of_another_form_is_refused(tmp_path, entry, value):
    _fit(tiny_model(), tmp_path, max_minutes=1e-9)
    store.write(tmp_path, store.read(tmp_path) | {entry: value})
    with pytest.raises(CheckpointError, match="cannot be restored"):
        _fit(tiny_model(), tmp_path)


def test_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    store.write(tmp_path, {"identity": Evil()})
    with pytest.raises(CheckpointError, match="cannot be read"):
        store.read(tmp_path)
    assert not (tmp_path / "run").exists()
