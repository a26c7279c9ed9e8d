"""The experiments of the chapter on distribution-aware decomposition."""

from functools import partial

import pandas as pd
import pytest
import torch
from PIL import Image

import tdlib
from tdbook import sigma
from tdbook.experiment import Arm, Recorder, experiment
from tdbook.figures.sigma import rank_correlation
from tdbook.records import read_record
from tdlib.calibration import calibration_batches
from tdlib.errors import DataError
from tdlib.methods.direct import direct

SAMPLES = 600


@pytest.fixture(scope="module")
def digits():
    return tdlib.data.load("digits")


@pytest.fixture(scope="module")
def net(digits):
    torch.manual_seed(0)
    model = tdlib.models.build("cnn", digits.classes, input_shape=digits.input_shape, width=16)
    tdlib.train.fit(model, digits, epochs=5, lr=0.05, batch_size=32, progress=False)
    return model.eval()


@pytest.fixture(scope="module")
def batches(digits):
    return calibration_batches(digits, SAMPLES)


@pytest.fixture(scope="module")
def stats(net, digits, batches):
    return tdlib.statistics(net, batches, sigma.decomposable(net, digits, "tucker2"))


@pytest.fixture(scope="module")
def run(net, digits):
    """Arms -> the results of an experiment on one network."""
    return lambda arms, **settings: experiment(lambda seed: net, digits, arms, **{"ratios": [3]} | settings)


def test_each_step_brings_the_outputs_closer_to_the_dense_network(run, digits):
    paper = sigma.Calibrated(digits, "tucker2", SAMPLES)
    ours = sigma.Calibrated(digits, "tucker2", SAMPLES, weigh_outputs=True)
    found = run({
        "frobenius": Arm(direct, paper.uniform), "sigma": paper.arm(),
        "global": Arm(ours.decompose, ours.by_harm, start=ours.start),
        "sequential": Arm(partial(ours.decompose, sequential=True), ours.by_harm, start=ours.start),
    })  # fmt: skip
    frame = found.frame.set_index("method")
    kl = frame["kl"]
    assert kl["sigma"] < 0.3 * kl["frobenius"]
    assert kl["global"] < kl["sigma"]
    assert kl["sequential"] < 1.2 * kl["global"]
    assert frame["images"].to_dict() == {"frobenius": 0, "sigma": 600, "global": 600, "sequential": 600}
    assert not frame["labels"].any()
    assert found.plans["frobenius", 3, 0].ranks == found.plans["sigma", 3, 0].ranks


def test_the_new_error_ranks_the_harm_of_single_layers_better(net, digits, stats):
    single = sigma.single_layers(net, digits, stats, "tucker2", (0.2, 0.4), limit=2)
    assert single["layer"].unique().tolist() == ["conv2", "conv4"] and len(single) == 8
    found = rank_correlation(single)
    assert found.iloc[1, 0] > found.iloc[0, 0]


def test_a_sample_of_positions_comes_near_and_all_of_them_are_left_out(net, batches, stats):
    found = sigma.sampling_errors(net, batches, stats)
    small = found[found["layer"] == "conv4"].set_index("positions")["error"]
    assert small[8] < small[1] and 16 not in small.index  # 4 x 4 positions


def test_other_images_are_worse_and_named_in_records(run, digits, batches, stats, tmp_path):
    images = sigma.other_images(batches, digits)
    own, noise = images["its own training images"], images["noise"]
    arms = {
        name: sigma.Calibrated(digits, "tucker2", SAMPLES, images=x).arm()
        for name, x in {"own": own, "transfer": noise}.items()
    }
    found = run(arms)
    errors = sigma.with_errors(found, stats).set_index("method")["error"]
    assert errors["own"] < errors["transfer"]
    recorder = Recorder("distribution_aware", {"calibration": "noise"}, directory=tmp_path)
    again = run({"transfer": arms["transfer"]}, recorder=recorder).frame
    (path,) = tmp_path.glob("*.json")
    assert read_record(path)["parameters"].items() >= {"method": "transfer", "calibration": "noise"}.items()
    assert again["test_accuracy"][0] == found.frame["test_accuracy"][1]
    assert sigma.named(again.assign(calibration="noise"))["method"].tolist() == ["Σ of noise"]


@pytest.mark.parametrize("by", ["params", "macs"])
def test_a_ratio_may_be_that_of_the_decomposed_layers(net, digits, by):
    plan = sigma.Calibrated(digits, "tucker2", SAMPLES, by, "layers").uniform(net, 2.0)
    cost, layers = tdlib.count(net, digits.input_shape).by(by), sigma.decomposable(net, digits, "tucker2", by)
    before = sum(layers.values())
    assert before / (before - cost + cost / plan.ratio) == pytest.approx(2, rel=0.03)


def test_tables_over_ratios_keep_the_order_of_the_story():
    rows = [("global", 2.0), ("sigma", 4.0), ("frobenius", 2.0), ("sigma", 2.0)]
    frame = pd.DataFrame(rows, columns=["method", "ratio"]).assign(test_accuracy=50.0, kl=0.5, agreement=70.0)
    table = sigma.over_ratios(sigma.named(frame))
    assert [name.split()[0] for name in table.index] == ["kernel", "output", "+"]
    assert table["KL", "4×"].tolist() == ["–", "0.50", "–"]


def test_halves_keeps_the_networks_class_order(tmp_path):
    for k in range(4):
        (tmp_path / f"{k:03d}_class").mkdir()
        Image.new("RGB", (8, 8), (k, 0, 0)).save(tmp_path / f"{k:03d}_class" / "a.png")
    data = sigma.halves(tmp_path)
    assert data.train.labels.tolist() == [0, 2] and data.test.labels.tolist() == [1, 3]
    assert data.input_shape == (3, 8, 8) and len(data.val) == 0
    assert sigma.halves(tmp_path, limit=1).test.labels.tolist() == [1]
    Image.new("RGB", (9, 8)).save(tmp_path / "000_class" / "b.png")
    with pytest.raises(DataError, match="one size"):
        sigma.halves(tmp_path)
