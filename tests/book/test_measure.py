"""What a method asks is counted, and the tables of "Which method when" follow from the rows."""

import numpy as np
import pandas as pd
import pytest
import torch

import tdlib
from tdbook.figures import which
from tdbook.measure import CountedBundle, describe, measure

QUIET = {"device": "cpu", "progress": False, "batch_size": 16}


@pytest.fixture(scope="module")
def trained():
    data = tdlib.data.load("digits", limit=120)
    torch.manual_seed(0)
    model = tdlib.models.build("cnn", data.classes, input_shape=data.input_shape, width=8)
    tdlib.train.fit(model, data, epochs=2, lr=0.05, **QUIET)
    return model, data


def test_counting_changes_neither_the_data_nor_their_order(trained):
    _, data = trained
    counted = CountedBundle.of(data)
    assert counted.fingerprint == data.fingerprint
    for a, b in zip(counted.batches("train", 16, seed=3), data.batches("train", 16, seed=3), strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    drawn = sum(len(x) for x, _ in data.batches("train", 16, seed=3))
    assert counted.drawn == {"train": drawn} and len(counted.batches("train", 16)) == drawn // 16


def test_a_method_without_data_draws_none_and_training_is_counted_in_epochs(trained):
    model, data = trained
    plain, row = measure(model, "direct", data, ratio=2, hyper={"format": "tucker2", **QUIET})
    assert row["images"] == 0 and row["epochs"] == 0 and not row["labels"]
    assert row["params_ratio"] == pytest.approx(2, rel=0.02) and row["seconds"] > 0
    assert row["accuracy"] == describe(plain, data, "cpu")["accuracy"]
    assert row["kept"] == pytest.approx(row["accuracy"] - describe(model, data, "cpu")["accuracy"])
    tuned = measure(
        model, "direct", data, ratio=2, hyper={"format": "tucker2", **QUIET}, finetune={"epochs": 3, **QUIET}
    )[1]
    steps = data.steps("train", 16, drop_last=True)
    assert tuned["labels"] and tuned["images"] == 3 * 16 * steps
    assert tuned["epochs"] == pytest.approx(tuned["images"] / len(data.train))


def rows():
    table = [
        ("plain", 2, 50.0, 0, False, 0.0, 0.1, 50),
        ("aware", 2, 90.0, 100, False, 0.0, 1.0, 50),
        ("long", 2, 90.5, 9000, True, 20.0, 60.0, 45),
        ("plain", 4, 20.0, 0, False, 0.0, 0.1, 25),
        ("aware", 4, 70.0, 100, False, 0.0, 1.0, 26),
        ("long", 4, 90.0, 9000, True, 20.0, 60.0, 24),
    ]
    columns = ["name", "ratio", "accuracy", "images", "labels", "epochs", "seconds", "params"]
    frame = pd.DataFrame(table, columns=columns)
    return frame.assign(
        macs=frame["params"] * 10, kept=frame["accuracy"] - 91, val_accuracy=frame["accuracy"], macs_ratio=2.0
    )


def test_front_keeps_what_nothing_beats():
    front = which.pareto_front(rows(), "params")
    assert list(front["accuracy"]) == [90.0, 90.5] and list(front["params"]) == [24, 45]
    assert list(which.pareto_front(rows().iloc[[1]], "params")["name"]) == ["aware"]


def test_decision_prefers_the_faster_of_equals_and_respects_what_is_there():
    table = which.decide(rows(), validated=100, short=5)
    assert table.loc["the trained network alone", "2×"].startswith("plain")
    assert table.loc["some inputs, no labels", "2×"] == "aware: 90.0 % (-1.0)"
    assert table.loc["the training set, time to train", "2×"].startswith(
        "aware"
    )  # 0.5 points: within the error
    assert table.loc["the training set, time to train", "4×"].startswith("long")
    assert table.loc["the training set, a few epochs", "4×"].startswith("aware")
    exact = which.decide(rows(), validated=10**8, short=5)
    assert exact.loc["the training set, time to train", "2×"].startswith("long")
    assert which.decide(rows().iloc[[2, 5]], validated=0, short=5).iloc[0, 0] == "–"


def test_tables_and_figures_show_every_row():
    table, dense = rows(), {"params": 100, "macs": 1000, "accuracy": 91.0}
    side = which.side_by_side(table)
    assert list(side.index) == ["plain", "aware", "long"]
    assert (
        side[("4×", "accuracy")].tolist() == [20.0, 70.0, 90.0] and side[("asks", "labels")]["long"] == "yes"
    )
    for figure in (which.pareto(table, dense, 50), which.error_against_time(table, dense, 50)):
        lines = [line.get_ydata() for ax in figure.axes for line in ax.get_lines()]
        points = [dots.get_offsets()[:, 1] for ax in figure.axes for dots in ax.collections]
        values = np.concatenate([np.asarray(column, dtype=float) for column in lines + points])
        assert {50.0, 10.0, 9.5, 80.0, 30.0} <= set(values.round(6))
        assert {ax.get_ylim() for ax in figure.axes} == {figure.axes[0].get_ylim()}
