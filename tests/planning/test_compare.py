"""Two networks side by side."""

import pytest
import torch
from torch import nn

import tdlib
from tdlib.errors import TdlibError


def test_rows_ratios_and_bytes():
    dense = tdlib.models.build("cnn", 10, input_shape=(1, 8, 8)).train()
    plan = tdlib.plan(dense, (1, 8, 8), format="tucker2", ratio=2)
    small = tdlib.decompose(dense, plan)
    rng = torch.get_rng_state()
    result = tdlib.compare(dense, small, (1, 8, 8), batch=2, repeats=2)
    assert torch.equal(rng, torch.get_rng_state()) and dense.training and small.training
    rows = {row["layer"]: row for row in result.rows}
    assert plan.keys() <= rows.keys() and not any("." in n and n.split(".")[-1].isdigit() for n in plan)
    for name, cost in plan.costs.items():
        row = rows[name]
        assert row["format"] == "tucker2"
        assert (row["dense_macs"], row["macs"]) == (cost.dense[1], cost.planned[1])
        assert row["bytes"] == 4 * row["params"] and row["dense_ms"] > 0 and row["ms"] > 0
    whole = result.whole
    assert whole["params"] == plan.params and whole["params_ratio"] == pytest.approx(plan.params_ratio)
    assert whole["macs_ratio"] == pytest.approx(plan.macs_ratio) and whole["bytes_ratio"] > 1.5
    assert whole["dense_params"] == sum(row["dense_params"] for row in result.rows[:-1])
    text = str(result)
    assert "leaves norm layers out" in text and "whole network" in text
    assert list(result.to_frame().layer)[-1] == "whole network"


def test_a_network_with_itself_and_bad_requests():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    result = tdlib.compare(model, model, (4,), repeats=1)
    assert all(row["params_ratio"] == 1 for row in result.rows)
    for bad in ({"repeats": 0}, {"batch": 0}):
        with pytest.raises(TdlibError, match="at least 1"):
            tdlib.compare(model, model, (4,), **bad)
    with pytest.raises(TdlibError, match="does not run"):
        tdlib.compare(model, model, (5,))
