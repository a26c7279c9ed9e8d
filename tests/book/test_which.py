"""The tables and figures of "Which method when" follow from the rows."""

from types import SimpleNamespace

import numpy as np
import pandas as pd

from tdbook.experiment import Arm
from tdbook.figures import which
from tdlib.methods.direct import direct


def rows():
    table = [
        ("plain", 2, 50.0, 0, False, 0.0, 0.1, 2.0),
        ("aware", 2, 90.0, 100, False, 0.0, 1.0, 2.0),
        ("long", 2, 90.5, 9000, True, 20.0, 60.0, 2.5),
        ("plain", 4, 20.0, 0, False, 0.0, 0.1, 4.0),
        ("aware", 4, 70.0, 100, False, 0.0, 1.0, 3.8),
        ("long", 4, 90.0, 4500, True, 10.0, 60.0, 5.0),
    ]
    columns = ["method", "ratio", "test_accuracy", "images", "labels", "epochs", "seconds", "params_ratio"]
    frame = pd.DataFrame(table, columns=columns)
    frame = frame.assign(macs_ratio=frame["params_ratio"], val_accuracy=frame["test_accuracy"])
    return frame.assign(dense_test_accuracy=91.0, n=50, seed=0, by="params")


def seeds():
    """Two seeds, 1 point below and above `rows`."""
    parts = [rows().assign(seed=seed) for seed in (0, 1)]
    for sign, part in zip((-1, 1), parts, strict=True):
        for column in ("test_accuracy", "val_accuracy", "dense_test_accuracy"):
            part[column] += sign
    return pd.concat(parts, ignore_index=True)


def test_front_keeps_what_nothing_beats():
    table = rows().assign(cost=[50, 50, 45, 25, 26, 24])
    front = which.pareto_front(table, "cost", "test_accuracy")
    assert list(front["test_accuracy"]) == [90.0, 90.5] and list(front["cost"]) == [24, 45]
    assert list(which.pareto_front(table.iloc[[1]], "cost", "test_accuracy")["method"]) == ["aware"]


def test_decision_prefers_the_faster_of_equals_and_respects_what_is_there():
    train = "the training set, time to train"
    for given in (rows(), seeds()):
        table = which.decide(given, validated=100, short=5)
        assert table.loc["the trained network alone", "2×"].startswith("plain")
        assert table.loc["some inputs, no labels", "2×"] == "aware: 90.0 % (-1.0)"
        assert table.loc[train, "2×"].startswith("aware")  # 0.5 points: within the error
        assert table.loc[train, "4×"].startswith("long")
        assert table.loc["the training set, a few epochs", "4×"].startswith("aware")
    near = rows().replace({"val_accuracy": {90.0: 86.0}})  # one and a half standard errors below
    assert which.decide(near, validated=100, short=5).loc[train, "2×"].startswith("aware")
    exact = which.decide(rows(), validated=10**8, short=5)
    assert exact.loc[train, "2×"].startswith("long")
    alone = which.decide(rows().iloc[[2, 5]].drop(columns="val_accuracy"), validated=0, short=5)
    assert alone.iloc[0, 0] == "–" and alone.loc[train, "2×"].startswith("long")


def test_tables_show_every_row():
    asked = which.asks(rows(), {"long": "uniform", "plain": ""})
    assert list(asked.index) == ["plain", "aware", "long"]
    assert asked.loc["long"].tolist() == ["4,500 to 9,000", "yes", "10 to 20", "uniform"]
    assert asked.loc["aware"].tolist() == ["100", "no", "0", "–"]
    assert asked.loc["plain", "ranks by"] == "–"
    kept = which.keeps(seeds())
    assert kept.loc[(4, "aware"), "at the end (%)"] == "70.00 ± 1.41" and kept.loc[(4, "aware"), "n"] == 2
    assert kept.loc[(4, "aware"), "kept (points)"] == "-21.00 ± 0.00" and len(kept) == 6


def test_figures_show_every_row_and_seeds_as_their_mean():
    for given in (rows(), seeds()):
        for figure in (which.pareto(given), which.error_against_time(given)):
            drawn = [line.get_ydata() for ax in figure.axes for line in ax.get_lines()]
            drawn += [dots.get_offsets()[:, 1] for ax in figure.axes for dots in ax.collections]
            values = np.concatenate([np.asarray(line, dtype=float) for line in drawn])
            assert {50.0, 10.0, 9.5, 80.0, 30.0} <= set(values.round(6))
            assert {ax.get_ylim() for ax in figure.axes} == {figure.axes[0].get_ylim()}


def test_verdict_is_computed():
    lines = which.verdict(rows()).splitlines()
    assert lines[0] == (
        "- **2×**: without labels, aware with 90.0 % (-1.0 points, 1 s); "
        "with training, long with 90.5 % (-0.5 points, 60 s)."
    )
    assert lines[2].startswith("- With 50 test images") and "4.0 points" in lines[2]


def test_a_method_with_a_rule_of_its_own_is_not_credited_with_its_plans():
    def own(model, data, plan, *, rule="vbmf"):
        raise AssertionError("not to be run")

    arms = {"direct": Arm(direct, None), "own": Arm(own, None), "dense": Arm(direct, None)}
    plans = {(name, 2.0, 0): SimpleNamespace(rule="" if name == "dense" else "uniform") for name in arms}
    assert which.rank_rules(arms, plans) == {"direct": "uniform", "own": "vbmf, pass by pass", "dense": ""}


def test_limits_are_computed():
    lines = which.limits(rows().assign(macs_ratio=[1.5, 2.0, 1.9, 4.0, 3.0, 5.0])).splitlines()
    assert lines[0] == "- At **2×** in parameters the ratios in MACs go from 1.50 (plain) to 2.00 (aware)."
    assert lines[1].endswith("go from 3.00 (aware) to 5.00 (long).")
    assert lines[2].startswith("- 3 of 6 rows lie within two standard errors (8.1 points)")
    far = which.limits(rows().assign(test_accuracy=20.0, by="macs")).splitlines()
    assert "in MACs the ratios in parameters" in far[0] and far[2].startswith("- 0 of 6 rows")
