"""One entry point for all methods: what every one promises, and that names are checked first."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

import tdlib
from tdlib import methods
from tdlib.errors import BudgetError, CheckpointError, DataError, TdlibError, UnknownName
from tdlib.methods.registry import METHODS
from tdlib.planning import Plan
from tdlib.train.run import Run

ALONE = {"device": "cpu", "progress": False}
QUICK = {**ALONE, "batch_size": 64}
# What makes a method quick, and the test accuracy that it has to reach at a ratio of 2 all the same.
SETTINGS = {
    "direct": ({"finetune_epochs": 2}, 90),
    "admm": ({"epochs": 2, "rho": 0.1, "finetune_epochs": 2}, 90),
    "iterative": ({"stage_epochs": 1}, 90),
    "rstd": ({"epochs": 5, "lr": 0.1}, 85),
    "distribution-aware": ({"samples": 300}, 90),
    "sequential": ({"samples": 300}, 95),
}


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rows_of(model: nn.Module) -> list[dict[str, object]]:
    return [row for table in tdlib.provenance(model).report["history"].values() for row in table]


@pytest.mark.parametrize("by", ["params", "macs"])
@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_meets_its_ratio_keeps_accuracy_and_leaves_the_model_alone(
    method, by, trained, digits, tmp_path
) -> None:
    if method == "rstd" and by == "macs":
        with pytest.raises(BudgetError, match="params"):
            tdlib.compress(trained, method, digits, ratio=2.0, by=by, **QUICK)
        return
    hyper, least = SETTINGS.get(method, ({}, 0))
    hyper = {**hyper, **(ALONE if METHODS[method].prepare else QUICK)}
    model = copy.deepcopy(trained)
    model.eval().bn1.train()
    model.note = "mine"
    before, modes = state(model), [m.training for m in model.modules()]
    attributes, about = set(vars(model)), copy.deepcopy(tdlib.provenance(model))

    small = tdlib.compress(model, method, digits, ratio=2.0, by=by, **hyper)

    assert equal(state(model), before) and [m.training for m in model.modules()] == modes
    assert set(vars(model)) == attributes and tdlib.provenance(model) == about
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    dense, cost = (tdlib.count(m, digits.input_shape).by(by) for m in (model, small))
    report = tdlib.provenance(small).report
    assert dense / cost == pytest.approx(2.0, rel=0.02)
    assert report[f"{by}_ratio"] == pytest.approx(dense / cost)
    assert report["after"] == tdlib.train.accuracies(small, digits)
    assert report["after"]["test"] > least
    tdlib.save(small, tmp_path / "small.safetensors")
    loaded, x = tdlib.load(tmp_path / "small.safetensors"), torch.randn(3, *digits.input_shape)
    torch.testing.assert_close(loaded(x), small.eval()(x), atol=1e-4, rtol=1e-3)
    assert tdlib.provenance(loaded).plan == report["plan"]


def test_the_report_says_what_was_done_and_measured(trained, digits) -> None:
    hyper = {"epochs": 2, "rho": 0.1, "format": "tucker2", "finetune_epochs": 3}
    small = tdlib.compress(trained, "admm", digits, ratio=2.0, **hyper, **QUICK)
    report = tdlib.provenance(small).report
    parts = {"method", "settings", "plan", "params_ratio", "macs_ratio", "history", "seconds"}
    assert set(report) == parts | {"dense", "before", "after"}
    assert report["method"] == "admm" and report["settings"]["rho"] == 0.1
    plan = Plan.from_dict(report["plan"])
    assert dict(plan) == tdlib.provenance(small).layers and plan.format == "tucker2"
    assert report["params_ratio"] == plan.params_ratio == pytest.approx(2.0, rel=0.02)
    assert [len(report["history"][stage]) for stage in ("admm", "finetune")] == [2, 3]
    assert report["dense"] == tdlib.train.accuracies(trained, digits)
    assert report["after"]["test"] > report["before"]["test"]
    best = max(row["val_accuracy"] for row in report["history"]["finetune"])
    assert report["after"]["val"] == pytest.approx(best)


def test_without_training_before_is_after(trained, digits) -> None:
    small = tdlib.compress(trained, "direct", digits, ratio=2.0, progress=False)
    report = tdlib.provenance(small).report
    assert report["before"] == report["after"] and report["history"] == {}


def test_direct_needs_nothing_but_the_shape_of_an_input(trained, digits) -> None:
    x = torch.randn(2, *digits.input_shape)
    a, b = (tdlib.compress(trained, "direct", data, ratio=2.0, progress=False) for data in (digits, [x]))
    assert equal(state(a), state(b)) and "dense" not in tdlib.provenance(b).report


def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(
    trained, digits, tmp_path, monkeypatch
) -> None:
    class Killed(Exception):
        pass

    def run(**extra: object) -> nn.Module:
        hyper = {"epochs": 1, "rho": 0.1, "finetune_epochs": 1}
        return tdlib.compress(trained, "admm", digits, ratio=2.0, **hyper, **QUICK, **extra)

    whole, kills, again, step = run(), 0, None, Run.step
    while again is None:
        left = iter(range(9))

        def limited(*args: object, left=left) -> None:
            if next(left, None) is None:
                raise Killed
            step(*args)

        monkeypatch.setattr(Run, "step", limited)
        try:
            again = run(checkpoint=tmp_path, checkpoint_steps=4)
        except Killed:
            kills += 1
            assert kills < 20
    assert kills >= 4
    assert equal(state(whole), state(again))
    for rows in zip(*(rows_of(net) for net in (whole, again)), strict=True):
        first, second = ({k: v for k, v in row.items() if "seconds" not in k} for row in rows)
        assert first == second


RUNS = {
    "direct": {"finetune_epochs": 1},
    "admm": {"epochs": 1, "rho": 0.1, "finetune_epochs": 1},
    "iterative": {"stage_epochs": 1, "rule": "nx"},
    "rstd": {"epochs": 1},
}


def contents(folder) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("method", RUNS)
def test_a_checkpoint_folder_belongs_to_one_run(method, trained, digits, tmp_path, monkeypatch) -> None:
    def run(model=trained, method=method, data=digits, **changes: object) -> nn.Module:
        given = {"ratio": 2.0, **RUNS[method], **QUICK, "batch_size": 256, "checkpoint": tmp_path, **changes}
        return tdlib.compress(model, method, data, **given)

    first = run()
    before = contents(tmp_path)
    other = copy.deepcopy(trained)
    with torch.no_grad():
        other.conv4.weight[0, 0, 0, 0] += 1e-6
    foreign = {
        "weights": {"model": other},
        "data": {"data": dataclasses.replace(digits, test=digits.val)},
        "method": {"method": "admm" if method == "direct" else "direct"},
        "ratio": {"ratio": 2.5},
        "skip": {"skip": ["conv2"]},
        "seed": {"seed": 1},
        "momentum": {"momentum": 0.8},
        "format": {"format": "cp"},
    }
    with monkeypatch.context() as patch:
        for name in ("accuracies", "plan", "rehearse"):
            patch.setattr(f"tdlib.methods.registry.{name}", lambda *_, **__: pytest.fail("work was done"))
        patch.setattr(Run, "step", lambda *_: pytest.fail("trained"))
        for name, changes in foreign.items():
            with pytest.raises(CheckpointError, match=rf"another run: it differs in .*{name} \("):
                run(**changes)
            assert contents(tmp_path) == before
    again = run(max_minutes=100)
    assert equal(state(first), state(again))


def test_the_table_has_a_row_for_every_method() -> None:
    table = methods.available()
    assert list(table.index) == list(METHODS)
    assert {"paper", "data", "labels", "training", "formats", "ratio"} == set(table.columns)
    assert not table.isna().any().any()


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("direct", {"statistics", "multiple", "batch_size"}),
        ("admm", {"rho", "epochs", "lr", "track_distance", "checkpoint"}),
        ("iterative", {"stage_epochs", "stage_lr", "weakening", "step_epochs"}),
        ("rstd", {"shuffle", "order", "modes", "epochs"}),
        ("distribution-aware", {"samples", "weigh_outputs", "sequential", "statistics", "recalibrate"}),
    ],
)
def test_hyperparameters_are_those_of_method_planner_and_training(method, names) -> None:
    found = methods.hyperparameters(method)
    assert names <= set(found) and len(found) == len(set(found))
    assert not {"ratio", "by", "format", "seed", "device", "progress", "hooks", "model"} & set(found)


@pytest.mark.parametrize(
    ("method", "hyper", "error", "message"),
    [
        ("adm", {}, UnknownName, "admm"),
        ("admm", {"rhoo": 1.0}, UnknownName, "rho"),
        ("direct", {"rho": 1.0}, UnknownName, "multiple"),
        ("direct", {"by": "flops"}, UnknownName, "macs"),
        ("direct", {"format": "tucker3"}, UnknownName, "tucker2"),
        ("direct", {"rule": "best"}, UnknownName, "uniform"),
        ("direct", {"ratio": 1000.0}, BudgetError, r"best reachable is \d"),
        ("direct", {"ratio": None}, TdlibError, "either"),
        ("direct", {"ranks": {"conv3": (4, 4)}}, TdlibError, "either"),
        ("iterative", {"rule": "uniform"}, UnknownName, "vbmf"),
        ("iterative", {"format": "tt"}, UnknownName, "tucker2"),
        ("iterative", {"ratio": None, "ranks": {"conv3": (4, 4)}}, TdlibError, "takes no ranks"),
        ("rstd", {"options": {"order": 2}}, TdlibError, "takes no options"),
        ("rstd", {"format": "svd"}, UnknownName, "tucker"),
        ("direct", {"ratio": float("nan")}, BudgetError, "larger than 1, got nan"),
        ("direct", {"ratio": float("inf")}, BudgetError, "larger than 1, got inf"),
        ("admm", {"ratio": 1}, BudgetError, "larger than 1, got 1"),
        ("direct", {"ratio": "2"}, TdlibError, "ratio must be a number or None, got '2'"),
        ("direct", {"ratio": None, "ranks": {"conv3": (4, 4)}, "rule": "energy"}, TdlibError, "rule"),
        ("direct", {"options": 5}, TdlibError, "options must be a table"),
        ("direct", {"seed": "a"}, TdlibError, "seed must be a whole number"),
        ("direct", {"multiple": 2.5}, TdlibError, "multiple must be a whole number"),
        ("distribution-aware", {"sequential": "maybe"}, TdlibError, "sequential must be True or False"),
        ("direct", {"finetune_lr": 0.1}, TdlibError, "finetune_lr would be ignored"),
        ("direct", {"batch_size": 8, "checkpoint": "c"}, TdlibError, "batch_size, checkpoint would be"),
        ("distribution-aware", {"momentum": 0.5}, TdlibError, "momentum would be ignored"),
        ("direct", {"finetune_epochs": -1}, TdlibError, "finetune_epochs"),
        ("direct", {"finetune_epochs": 1, "finetune_lr": float("nan")}, TdlibError, "finetune_lr"),
        ("direct", {"finetune_epochs": 1, "warmup_epochs": 1.0}, TdlibError, "warmup"),
        ("direct", {"finetune_epochs": 1, "precision": "fp8"}, UnknownName, "bf16"),
    ],
)
def test_what_cannot_be_is_named_before_anything_runs(
    trained, digits, method, hyper, error, message, monkeypatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(error, match=message):
        patch.setattr("tdlib.formats.replace.install", lambda *_: pytest.fail("decomposed"))
        tdlib.compress(trained, method, digits, **{"ratio": 2.0, "progress": False, **hyper})


def test_ranks_come_in_multiples(trained, digits) -> None:
    for method in ("direct", "sequential"):
        small = tdlib.compress(trained, method, digits, ratio=1.5, multiple=4, progress=False)
        layers = tdlib.provenance(small).layers
        assert layers and all(rank % 4 == 0 for layer in layers.values() for rank in layer.ranks)
        assert tdlib.provenance(small).report["settings"]["multiple"] == 4


@pytest.mark.parametrize(("method", "hyper"), [("admm", {}), ("direct", {"finetune_epochs": 1})])
def test_training_without_labels_is_refused(method, hyper, trained, digits) -> None:
    with pytest.raises(DataError, match="labels"):
        tdlib.compress(trained, method, [torch.randn(2, *digits.input_shape)], ratio=2.0, **hyper)
