"""Arms × ratios × seeds: equal columns, what is shared and counted, records, and what seconds leave out."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

import tdlib
from tdbook import experiment as module
from tdbook import read_record
from tdbook.experiment import Arm, CountedBundle, Recorder, Watch, experiment
from tdbook.numerics import numerics
from tdlib.calibration import sensitivity
from tdlib.errors import BudgetError, DataError
from tdlib.methods.direct import direct, scratch
from tdlib.methods.distribution_aware import distribution_aware
from tdlib.methods.iterative import iterative
from tdlib.network import fingerprint
from tdlib.train import recalibrated

TRAINING = {"device": "cpu", "batch_size": 16}
TUNED = {"epochs": 2, "lr": 0.01}
ALWAYS = {
    "method", "ratio", "by", "seed", "dense_test_accuracy", "start_test_accuracy", "test_accuracy",
    "test_accuracy_last",
    "val_accuracy", "agreement", "kl", "n", "params_ratio", "macs_ratio", "speedup", "seconds", "images",
    "labels", "epochs",
}  # fmt: skip
DECOMPOSED = {"test_accuracy_before", "test_accuracy_recalibrated"}
TIMES = ["seconds", "speedup"]


@pytest.fixture(scope="module")
def data():
    return tdlib.data.load("digits", limit=120)


@pytest.fixture(scope="module")
def dense(data):
    def make(seed):
        torch.manual_seed(seed)
        model = tdlib.models.build("cnn", data.classes, input_shape=data.input_shape, width=8)
        tdlib.train.fit(model, data, epochs=2, lr=0.05, seed=seed, progress=False, **TRAINING)
        return model

    made = {seed: make(seed) for seed in (0, 1)}
    return made.__getitem__


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass where a test says so: clock.now += 5."""
    fake = SimpleNamespace(now=0.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: fake.now))
    return fake


@pytest.fixture
def plan(data):
    return lambda network, ratio, seed: tdlib.plan(network, data.input_shape, "tucker2", ratio)


@pytest.fixture
def run(dense, data):
    def run(arms, ratios=(2,), **options):
        return experiment(dense, data, arms, ratios=ratios, training=TRAINING, **options)

    return run


def test_a_row_for_each_arm_ratio_and_seed_with_what_it_kept_and_cost(run, plan, data, dense):
    arms = {"direct": Arm(direct, plan), "tuned": Arm(direct, plan, finetune=TUNED)}
    found = run(arms, ratios=(2, 4), seeds=(0, 1))
    rows = found.frame
    assert len(rows) == 8 and set(rows.columns) == ALWAYS | DECOMPOSED
    assert set(zip(rows["method"], rows["ratio"], rows["seed"], strict=True)) == set(found.networks)
    row = rows.iloc[0]
    small = found.networks["direct", 2.0, 0]
    assert row["test_accuracy"] == tdlib.train.evaluate(small, data)["accuracy"]
    assert row["test_accuracy"] == row["test_accuracy_before"]
    assert row["dense_test_accuracy"] == tdlib.train.evaluate(dense(0), data)["accuracy"]
    assert row["n"] == len(data.test)
    assert row["params_ratio"] == pytest.approx(found.plans["direct", 2.0, 0].params_ratio)
    tuned = rows[rows["method"] == "tuned"]
    assert (tuned["test_accuracy_before"] == rows.loc[tuned.index - 1, "test_accuracy_before"].values).all()
    assert len(found.tables["tuned", 4.0, 1]["finetune"]) == 2 and found.tables["direct", 4.0, 1] == {}
    assert found.starts["direct", 0] is found.dense[0] is dense(0)


def test_the_plan_of_a_row_has_the_ranks_that_the_method_ended_with(run, plan):
    found = run({"iterative": Arm(partial(iterative, rule="nx", stage_epochs=0, least=2), plan, trains=True)})
    (key,) = found.plans
    last = {row["layer"]: row["ranks"] for row in found.tables[key]["ranks"]}
    assert {name: list(ranks) for name, ranks in found.plans[key].ranks.items()} == last
    assert found.plans[key].ranks != plan(found.dense[key[2]], *key[1:]).ranks


def test_images_labels_and_epochs_are_counted(run, plan, data):
    aware = partial(distribution_aware, samples=30)
    trained = partial(iterative, stage_epochs=1, least=2, batchnorm=False)
    arms = {
        "direct": Arm(direct, plan), "tuned": Arm(direct, plan, finetune=TUNED), "aware": Arm(aware, plan),
        "iterative": Arm(trained, plan, trains=True),
        "scratch": Arm(partial(scratch, epochs=3), plan, trains=True, scratch=True),
    }  # fmt: skip
    rows = run(arms).frame.set_index("method")
    epoch = 16 * data.steps("train", 16, drop_last=True)
    assert rows.loc["direct", ["images", "labels", "epochs"]].tolist() == [0, False, 0]
    assert rows.loc["tuned", ["images", "labels"]].tolist() == [2 * epoch, True]
    assert rows.loc["tuned", "epochs"] == 2
    assert rows.loc["aware", ["images", "labels", "epochs"]].tolist() == [30, False, 0]
    assert rows.loc["iterative", "images"] % epoch == 0 and rows.loc["iterative", "labels"]
    assert rows.loc["scratch", "images"] == 3 * epoch
    assert rows[sorted(DECOMPOSED)].isna().any(axis=1).to_dict() == {name: name == "scratch" for name in arms}
    assert (rows["seconds"] > 0).all()


def test_a_start_is_run_once_for_all_who_share_it_and_counts_in_each(run, plan, data, clock):
    begun = []

    def start(model, data, *, seed, batch_size):
        begun.append(seed)
        network = tdlib.formats.decompose(model, {})
        history = tdlib.train.fit(network, data, epochs=1, seed=seed, batch_size=batch_size, progress=False)
        clock.now += 60
        return network, {"start": history.rows}

    arms = {"one": Arm(direct, plan, start), "two": Arm(direct, plan, start), "none": Arm(direct, plan)}
    found = run(arms, ratios=(2, 4), seeds=(0, 1))
    rows = found.frame
    assert begun == [0, 1]
    assert found.starts["one", 1] is found.starts["two", 1] is not found.dense[1]
    shared = rows[rows["method"] != "none"]
    assert set(shared["images"]) == {16 * data.steps("train", 16, drop_last=True)} and shared["labels"].all()
    assert set(shared["seconds"]) == {60} and set(rows["seconds"]) == {0, 60}
    assert all(len(found.tables[name, 4.0, 1]["start"]) == 1 for name in ("one", "two"))
    assert not rows.loc[rows["method"] == "none", "labels"].any()


def test_statistics_of_a_start_need_no_labels(run, plan):
    def start(model, data):
        next(iter(data.batches("train", 16)))
        return model, {}

    (row,) = run({"looks": Arm(direct, plan, start)}).rows
    assert row["images"] == 16 and row["labels"] is False and row["epochs"] == 0


def test_records_are_written_and_read_instead_of_run(run, plan, tmp_path, data, dense):
    recorder = Recorder("toy", {"dataset": "digits", "lr": 0.01}, directory=tmp_path)
    arms = {"tuned": Arm(direct, plan, finetune=TUNED)}
    first = run(arms, seeds=(0, 1), recorder=recorder)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2
    untuned = {"direct": Arm(direct, plan)}  # a number that was not measured is a column all the same
    rows = [run(untuned, recorder=recorder).rows for _ in range(2)]
    assert rows[0] == rows[1] and set(rows[1][0]) == ALWAYS | DECOMPOSED
    content = next(row for row in map(read_record, files) if row["seed"] == 0)
    assert content["chapter"] == "toy" and content["scale"] == "quick"
    assert content["parameters"].keys() == {"dataset", "lr", "method", "ratio", "by", "seed"}
    assert len(content["history"]["finetune"]) == 2 and content["wall_seconds"] > 0
    assert content["splits"] == {"train": len(data.train), "val": len(data.val), "test": len(data.test)}
    assert content["start"] == fingerprint(dense(0)) and content["data"] == data.fingerprint
    tuning = content["settings"]["finetune"]
    assert tuning["lr"] == 0.01 and tuning["batch_size"] == 16 and tuning["weight_decay"] == 5e-4
    assert content["settings"]["run"] == {"function": "tdlib.methods.direct.direct"}
    assert {row["layer"] for row in content["tables"]["ranks"]} == set(first.plans["tuned", 2.0, 0])

    def never(*_, **__):
        raise AssertionError("a recorded row must not run")

    again = run({"tuned": Arm(direct, never, finetune=TUNED)}, seeds=(0, 1), recorder=recorder)
    assert again.rows == first.rows and again.tables == first.tables
    assert again.networks == again.dense == {}
    other = Recorder("toy", {"dataset": "digits", "lr": 0.02}, directory=tmp_path)
    with pytest.raises(AssertionError, match="must not run"):
        run({"tuned": Arm(direct, never, finetune=TUNED)}, recorder=other)
    for changed in (TUNED | {"epochs": 3}, TUNED | {"weight_decay": 0.0}):  # another run, another record
        with pytest.raises(AssertionError, match="must not run"):
            run({"tuned": Arm(direct, never, finetune=changed)}, recorder=recorder)
    with pytest.raises(AssertionError, match="must not run"):
        run({"tuned": Arm(partial(scratch, epochs=1), never, finetune=TUNED)}, recorder=recorder)


def test_a_changed_number_inside_a_solver_is_another_record(monkeypatch, run, plan, tmp_path):
    recorder, arms = Recorder("toy", {}, directory=tmp_path), {"direct": Arm(direct, plan)}
    run(arms, recorder=recorder)
    (before,) = tmp_path.iterdir()
    assert read_record(before)["settings"]["numerics"] == numerics()
    assert numerics()["tdlib.decompositions.tucker"]["tucker2.sweeps"] == 2
    assert numerics()["tdlib.train.stages"]["recalibrated.images"] == 2000
    monkeypatch.setattr(recalibrated, "__defaults__", (None, 1000, 0))
    run(arms, recorder=recorder)
    (after,) = set(tmp_path.iterdir()) - {before}
    monkeypatch.undo()
    monkeypatch.setattr(sensitivity, "TEMPERATURE", 2.0)
    run(arms, recorder=recorder)
    assert len(set(tmp_path.iterdir()) - {before, after}) == 1


def test_rows_of_one_seed_begin_from_the_same_weights(plan, dense, data, tmp_path):
    recorder = Recorder("toy", {"dataset": "digits"}, directory=tmp_path)
    about = {"ratios": (2,), "training": TRAINING, "recorder": recorder}
    experiment(dense, data, {"direct": Arm(direct, plan)}, **about)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def other(seed):
        network = tdlib.formats.decompose(dense(seed), {})
        with torch.no_grad():
            network.conv1.weight.mul_(1.001)
        return network

    arms = {"direct": Arm(direct, plan), "tuned": Arm(direct, plan, finetune=TUNED)}
    with pytest.raises(DataError, match="records of seed 0 began from other weights"):
        experiment(other, data, arms, **about)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    assert len(experiment(dense, data, arms, **about).rows) == 2


def test_what_cannot_be_reached_has_no_row_and_says_why(run, plan, capsys):
    def limited(network, ratio, seed):
        if ratio > 2:
            raise BudgetError("too small")
        return plan(network, ratio, seed)

    found = run({"direct": Arm(direct, plan), "limited": Arm(direct, limited)}, ratios=(2, 4))
    kept = [(row["method"], row["ratio"]) for row in found.rows]
    assert kept == [("direct", 2), ("limited", 2), ("direct", 4)]
    assert "limited at 4×: too small" in capsys.readouterr().out
    with pytest.raises(BudgetError, match=r"no ratio was reached.*limited at 4×: too small"):
        run({"limited": Arm(direct, limited)}, ratios=(4,))


def test_equal_seeds_give_equal_rows(run, plan):
    arms = {"tuned": Arm(direct, plan, finetune=TUNED)}
    one, two = (run(arms, seeds=(1,)).frame.drop(columns=TIMES) for _ in range(2))
    assert one.equals(two)
    assert not one.equals(run(arms, seeds=(0,)).frame.drop(columns=TIMES))


def test_one_epoch_of_fine_tuning_is_measured_beside_the_run(run, plan, data, dense, tmp_path):
    begins = []

    def method(model, data, plan, *, on_decomposed=lambda network: None):
        small = direct(model, data, plan)[0]
        on_decomposed(small)
        with torch.no_grad():
            small.conv1.weight.add_(0.1)  # training after the decomposition, which the epoch does not see
        begins.append(fingerprint(small))
        return small, {}

    arms = {
        "direct": Arm(direct, plan), "tuned": Arm(direct, plan, finetune=TUNED), "goes on": Arm(method, plan),
        "scratch": Arm(partial(scratch, epochs=1), plan, trains=True, scratch=True),
    }  # fmt: skip
    recorder = Recorder("toy", {"dataset": "digits"}, directory=tmp_path)
    found = run(arms, epoch={"lr": 0.02}, recorder=recorder)
    small = tdlib.decompose(dense(0), plan(dense(0), 2, 0))
    tdlib.train.fit(small, data, epochs=1, lr=0.02, progress=False, **TRAINING)
    expected = tdlib.train.evaluate(small, data)["accuracy"]
    rows = found.frame.set_index("method")
    assert rows["test_accuracy_epoch"].drop("scratch").tolist() == [expected] * 3
    assert rows.loc["direct", "test_accuracy_before"] != expected and "scratch" in rows.index
    assert rows["test_accuracy_epoch"].isna()["scratch"]
    assert fingerprint(found.networks["goes on", 2.0, 0]) == begins[0]

    plain = run(arms).frame.set_index("method")
    same = plain.columns.drop([*TIMES, "by"])
    assert plain[same].equals(rows[same])  # nothing else has changed, epochs and images included
    settings = {row["parameters"]["method"]: row["settings"] for row in map(read_record, tmp_path.iterdir())}
    assert settings["direct"]["epoch"]["lr"] == 0.02 and settings["direct"]["epoch"]["batch_size"] == 16
    assert settings["direct"]["epoch"]["epochs"] == 1 and "epoch" not in settings["scratch"]


def test_rows_are_compared_with_the_reference(run, plan, data, dense):
    def longer(network, seed):
        trained = tdlib.formats.decompose(network, {})
        tdlib.train.fit(trained, data, epochs=4, lr=0.05, seed=seed, progress=False, **TRAINING)
        return trained

    found = run({"direct": Arm(direct, plan)}, reference=longer)
    accuracy = tdlib.train.evaluate(longer(dense(0), 0), data)["accuracy"]
    assert found.rows[0]["dense_test_accuracy"] == accuracy
    assert found.dense[0] is dense(0)


def test_an_arms_own_settings_go_before_the_common_ones_and_add_columns(run, plan):
    seen = []

    def method(model, data, plan, *, seed=0, batch_size=1, **training):
        seen.append((seed, batch_size, training.get("lr")))
        return direct(model, data, plan)[0], {"steps": [{"x": 1}, {"x": 2}]}

    own = partial(method, batch_size=4, lr=0.3)
    (row,) = run({"own": Arm(own, plan, columns=lambda tables: tables["steps"][-1])}).rows
    assert seen == [(0, 4, 0.3)] and row["x"] == 2


def test_checkpoints_of_every_stage_have_a_folder_of_their_own(dense, data, plan, tmp_path):
    arms = {"tuned": Arm(direct, plan, finetune=TUNED)}
    training = TRAINING | {"checkpoint": tmp_path}
    first = experiment(dense, data, arms, ratios=(2, 4), training=training, epoch={"lr": 0.01})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tuned-2-params-0", "tuned-4-params-0"]
    again = experiment(dense, data, arms, ratios=(2, 4), training=training)
    assert again.frame["test_accuracy"].equals(first.frame["test_accuracy"])


def test_measuring_on_the_way_is_not_timed(run, plan, clock, monkeypatch):
    measured = module.recalibrated

    def recalibrated(*given, seed):
        clock.now += 100
        return measured(*given)

    def fit(*_, **__):
        clock.now += 1000

    def method(model, data, plan, *, on_decomposed=lambda network: None):
        clock.now += 1
        small = direct(model, data, plan)[0]
        on_decomposed(small)
        clock.now += 2
        return small, {}

    def silent(model, data, plan):
        return method(model, data, plan)

    monkeypatch.setattr(module, "recalibrated", recalibrated)
    monkeypatch.setattr(module, "fit", fit)
    rows = run({"calls back": Arm(method, plan), "does not": Arm(silent, plan)}, epoch={"lr": 0.01}).frame
    assert rows["seconds"].tolist() == [3, 3] and clock.now == 2206


def test_the_watch_counts_what_runs_and_not_what_pauses_it(clock):
    watch = Watch(5.0)
    with watch.running():
        clock.now += 2
        with watch.paused():
            clock.now += 30
    clock.now += 400
    assert watch.seconds == 7


def test_counting_changes_neither_the_data_nor_their_order(data):
    counted = CountedBundle.of(data)
    assert counted.fingerprint == data.fingerprint
    for a, b in zip(counted.batches("train", 16, seed=3), data.batches("train", 16, seed=3), strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    drawn = sum(len(x) for x, _ in data.batches("train", 16, seed=3))
    assert counted.drawn == {"train": drawn} and len(counted.batches("train", 16)) == drawn // 16
