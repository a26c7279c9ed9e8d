"""One entry point for all methods: names and hyper-parameters are checked before anything runs."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import tdlib
from tdlib import methods
from tdlib.errors import BudgetError, UnknownName

QUICK = {"device": "cpu", "progress": False, "batch_size": 64}


@pytest.fixture(scope="module")
def digits():
    return tdlib.data.load("digits")


@pytest.fixture
def net(digits):
    torch.manual_seed(0)
    return tdlib.models.build("cnn", digits.classes, input_shape=digits.input_shape, width=8)


def test_the_table_has_a_row_for_every_method() -> None:
    table = methods.available()
    assert list(table.index) == list(methods.METHODS)
    assert {"paper", "data", "labels", "training", "formats", "ratio"} == set(table.columns)
    assert not table.isna().any().any()


@pytest.mark.parametrize("name", list(methods.METHODS))
def test_every_method_has_its_module_and_takes_hyper_parameters(name: str) -> None:
    assert importlib.util.find_spec(methods.METHODS[name].module) is not None
    assert methods.hyperparameters(name)


@pytest.mark.parametrize(
    ("method", "hyper", "message"),
    [
        ("adm", {}, "admm"),
        ("admm", {"rhoo": 1.0}, "rho"),
        ("direct", {"rho": 1.0}, "finetune_epochs"),
        ("direct", {"by": "flops"}, "macs"),
        ("direct", {"format": "tucker3"}, "tucker2"),
    ],
)
def test_unknown_names_list_the_valid_ones(net, digits, method: str, hyper: dict, message: str) -> None:
    with pytest.raises(UnknownName, match=message):
        tdlib.compress(net, method, digits, ratio=2.0, **hyper)


def test_an_unreachable_ratio_says_the_best_one(net, digits) -> None:
    with pytest.raises(BudgetError, match=r"\d"):
        tdlib.compress(net, "direct", digits, ratio=1000.0)


@pytest.mark.parametrize("by", ["params", "macs"])
def test_direct_meets_the_ratio_and_leaves_the_model_alone(net, digits, by: str) -> None:
    before = {k: v.clone() for k, v in net.state_dict().items()}
    small = tdlib.compress(net, "direct", digits, ratio=2.0, by=by)
    assert small._tdlib["report"][f"{by}_ratio"] == pytest.approx(2.0, rel=0.02)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_admm_reports_every_stage(net, digits) -> None:
    small = tdlib.compress(
        net, "admm", digits, ratio=2.0, format="tucker2",
        dense_epochs=1, epochs=2, finetune_epochs=1, rho=0.1, **QUICK,
    )  # fmt: skip
    report = small._tdlib["report"]
    assert {"dense", "admm", "before", "after", "params_ratio", "macs_ratio", "plan"} <= set(report)
    assert [len(report["history"][stage]) for stage in ("dense", "admm", "finetune")] == [1, 2, 1]
    assert report["plan"]["format"] == "tucker2"
    assert report["params_ratio"] == pytest.approx(2.0, rel=0.02)
    x = torch.randn(2, *digits.input_shape)
    assert small.eval()(x).shape == (2, len(digits.classes))
