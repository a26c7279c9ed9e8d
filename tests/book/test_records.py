"""Records: written whole or not at all, checked on reading, found again by their parameters."""

import errno
import importlib
import json
import os

import numpy as np
import pandas
import pytest
import torch

from tdbook.paths import OLD_RESULTS, RESULTS
from tdlib.errors import DataError, NonFiniteError
from tdlib.train import History

rec = importlib.import_module("tdbook.records")  # the module: tdbook.records is its function
PARAMETERS = {"dataset": "digits", "ratio": 2.5, "seed": 3, "skip": ["conv1"]}


def test_round_trip_and_table(tmp_path):
    history = History([{"epoch": 0, "val_accuracy": 50.0}], True)
    tables = {"ratios": pandas.DataFrame({"ratio": [2, 3], "accuracy": [90.0, None]})}
    path = rec.record(
        "admm_tt", PARAMETERS, {"accuracy": np.float64(91.5), "ratio": 2.49, "n": torch.tensor(3)},
        directory=tmp_path, wall_seconds=12.5, data="abc", history=history, tables=tables,
        device="cpu", notes="a note",
    )  # fmt: skip
    content = rec.read_record(path)
    assert content["metrics"] == {"accuracy": 91.5, "ratio": 2.49, "n": 3}
    assert content["seed"] == 3 and content["scale"] == "quick" and content["data"] == "abc"
    assert content["history"] == [{"epoch": 0, "val_accuracy": 50.0}]
    assert content["tables"]["ratios"] == [{"ratio": 2, "accuracy": 90.0}, {"ratio": 3, "accuracy": None}]
    assert content["versions"]["torch"] == torch.__version__ and content["device"]["type"] == "cpu"
    rec.record(
        "other", {"seed": 0}, {"accuracy": 1}, directory=tmp_path / "deeper", scale="reduced: 2 epochs"
    )
    assert rec.records(tmp_path / "deeper")["chapter"].tolist() == ["other"]
    row = rec.records(tmp_path, chapter="admm_tt").iloc[0]
    assert row["dataset"] == "digits" and row["ratio"] == 2.5 and row["metric_ratio"] == 2.49
    assert row["accuracy"] == 91.5


def test_same_parameters_same_file(tmp_path):
    first = rec.record("a", PARAMETERS, {"x": 1}, directory=tmp_path)
    second = rec.record("a", dict(reversed(PARAMETERS.items())), {"x": 2}, directory=tmp_path)
    assert first == second and rec.read_record(first)["metrics"] == {"x": 2}
    assert rec.record("a", PARAMETERS | {"seed": 4}, {"x": 1}, directory=tmp_path) != first
    assert rec.record("a", PARAMETERS, {"x": 1}, directory=tmp_path, name="named").name == "named.json"


def test_history_by_stage_and_directory_from_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("TDLIB_RECORDS", str(tmp_path / "here"))
    stages = {"dense": History([{"epoch": 0}]), "admm": [{"epoch": 0}]}
    path = rec.record("a", {}, {"x": 1}, history=stages)
    assert path.parent == tmp_path / "here"
    assert rec.read_record(path)["history"] == {"dense": [{"epoch": 0}], "admm": [{"epoch": 0}]}


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"metrics": {"x": float("nan")}}, NonFiniteError, "metrics/x"),
        ({"metrics": {"x": [1.0, float("inf")]}}, NonFiniteError, "metrics/x/1"),
        ({"parameters": {"lr": float("inf")}}, NonFiniteError, "parameters/lr"),
        ({"metrics": {}}, DataError, "metrics"),
        ({"metrics": {"x": object()}}, DataError, "no JSON form"),
        ({"chapter": "a b/c"}, DataError, "chapter"),
        ({"scale": "large"}, DataError, "scale"),
        ({"history": 3}, DataError, "list of rows"),
        ({"wall_seconds": "long"}, DataError, "wall_seconds"),
    ],
)
def test_bad_records_are_not_written(tmp_path, change, error, message):
    arguments = {"chapter": "a", "parameters": {}, "metrics": {"x": 1}} | change
    with pytest.raises(error, match=message):
        rec.record(**arguments, directory=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is not a record"),
        ("[]", "top level"),
        ('{"schema": 1}', "chapter: Field required"),
        (None, "schema"),
    ],
)
def test_bad_files_are_refused_on_reading(tmp_path, text, message):
    path = rec.record("a", {}, {"x": 1}, directory=tmp_path)
    if text is None:
        text = json.dumps(rec.read_record(path) | {"schema": 99})
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        rec.records(tmp_path)


def test_full_disk_leaves_the_old_record(tmp_path, monkeypatch):
    path = rec.record("a", {}, {"x": 1}, directory=tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DataError, match="No space left"):
        rec.record("a", {}, {"x": 2}, directory=tmp_path)
    assert rec.read_record(path)["metrics"] == {"x": 1} and len(list(tmp_path.iterdir())) == 1


def test_git_state(monkeypatch):
    answers = {"rev-parse --show-toplevel": None}
    monkeypatch.setattr(rec, "_git", lambda *a: answers.get(" ".join(a[:2])))
    assert rec.git_state() is None
    root = str(rec.ROOT)
    answers |= {"rev-parse --show-toplevel": root, "rev-parse HEAD": "a" * 40, "status --porcelain": ""}
    assert rec.git_state() == {"commit": "a" * 40, "dirty": False}
    answers["status --porcelain"] = "M book/tdbook/records.py"
    assert rec.git_state() == {"commit": "a" * 40, "dirty": True}
    answers["rev-parse --show-toplevel"] = "/"
    assert rec.git_state() is None


def test_no_folder(tmp_path):
    with pytest.raises(DataError, match="not a folder"):
        rec.records(tmp_path / "none")


def test_hash_depends_on_values_not_on_order_or_containers():
    assert rec.parameter_hash({"a": 1, "b": (1, 2)}) == rec.parameter_hash({"b": [1, 2], "a": 1})
    assert rec.parameter_hash({"a": 1}) != rec.parameter_hash({"a": 2})
    with pytest.raises(DataError, match="finite"):
        rec.parameter_hash({"a": float("nan")})


@pytest.mark.parametrize("folder, schema", [(RESULTS, rec.SCHEMA_VERSION), (OLD_RESULTS, 1)])
def test_every_committed_record_lies_where_its_schema_belongs(folder, schema):
    for path in folder.glob("*.json"):
        content = rec.read_record(path)
        named = content["parameters"]
        if schema > 1:
            named = {name: content[name] for name in ("parameters", "settings", "data")}
        assert content["schema"] == schema, f"{path} belongs to the other folder"
        assert path.stem == f"{content['chapter']}-{rec.parameter_hash(named)}"


def test_the_old_records_are_kept():
    assert len(rec.records(OLD_RESULTS)) > 100
