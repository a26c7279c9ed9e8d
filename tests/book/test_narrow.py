"""The narrower dense network: its width meets the budget, and it is trained, not decomposed."""

import pytest

import tdlib
from tdbook import narrow
from tdbook.experiment import experiment


@pytest.fixture(scope="module")
def data():
    return tdlib.data.load("digits", limit=60)


@pytest.mark.parametrize(("model", "by", "width"), [("cnn", "params", 16), ("resnet20", "macs", 8)])
def test_a_quarter_of_the_cost_is_half_the_width(model, by, width, data):
    assert narrow.width_at(model, data, 4.0, by) == width
    assert narrow.width_at(model, data, 1e9, by) == 1


def test_families_without_a_width_have_none(data):
    assert narrow.width_at("resnet18", data, 2.0) is None


def test_the_row_is_that_of_a_dense_network_trained_from_scratch(data):
    def dense(seed):
        return tdlib.models.build("cnn", data.classes, input_shape=data.input_shape)

    arms = {"narrower": narrow.arm("cnn", 8, epochs=1, lr=0.05)}
    training = {"device": "cpu", "batch_size": 16}
    found = experiment(dense, data, arms, ratios=[16.0], training=training)
    (row,) = found.rows
    network = found.networks["narrower", 16.0, 0]
    assert {type(m).__name__ for m in network.children()} >= {"Conv2d", "Linear"}
    assert network.conv1.out_channels == 8 and found.plans["narrower", 16.0, 0].ranks == {}
    assert row["epochs"] == 1 and row["labels"] and 10 < row["params_ratio"] < 20
    assert "test_accuracy_before" not in row
