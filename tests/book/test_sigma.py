"""The experiments of the chapter on distribution-aware decomposition."""

from functools import partial

import pandas as pd
import pytest
import torch
from PIL import Image

import tdlib
from tdbook import sigma
from tdbook import sigma_tables as told
from tdbook.experiment import Arm, Recorder, described, experiment
from tdbook.other_images import SOURCES
from tdbook.records import read_record
from tdlib.calibration import calibration_batches
from tdlib.errors import DataError, UnknownName
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


def test_the_settings_of_an_arm_name_the_other_images_by_their_content(digits):
    few = tdlib.data.load("digits", limit=100)
    other = sigma.Calibrated(digits, "tucker2", SAMPLES, images=few).arm()
    own = sigma.Calibrated(digits, "tucker2", SAMPLES).arm()
    assert described(other, {})["run"]["calibration"] == few.fingerprint != digits.fingerprint
    assert "calibration" not in described(own, {})["run"]


def test_the_new_error_ranks_the_harm_of_single_layers_better(net, digits, stats):
    single = sigma.single_layers(net, digits, stats, "tucker2", (0.2, 0.4), limit=2)
    assert single["layer"].unique().tolist() == ["conv2", "conv4"] and len(single) == 8
    order = single[["frobenius_error", "sigma_error", "kl"]].corr("spearman")["kl"]
    assert order["sigma_error"] > order["frobenius_error"]
    assert (
        "nearer in 4, the network's (KL) in 4. The error of the output orders the harm better"
        in told.truth(single)
    )
    turned = single.rename(columns={"frobenius_error": "sigma_error", "sigma_error": "frobenius_error"})
    assert "no better than that of the kernel" in told.truth(turned)


def test_a_sample_of_positions_comes_near_and_all_of_them_are_left_out(net, batches, stats):
    found = sigma.sampling_errors(net, batches, stats)
    small = found[found["layer"] == "conv4"].set_index("positions")["error"]
    assert small[8] < small[1] and 16 not in small.index  # 4 x 4 positions


def test_other_images_are_worse_and_named_in_records(run, digits, tmp_path):
    def arms(**images):
        return {
            name: sigma.Calibrated(digits, "tucker2", SAMPLES, images=x).arm() for name, x in images.items()
        }

    found = run(arms(sigma=None, source=SOURCES["noise"]), seeds=[0, 1])
    margins = told.margins(
        told.named(found.frame.assign(calibration=[None, "noise"] * 2)), "output error (Σ)"
    )
    assert margins.iloc[0, :2].tolist() == ["3×", "Σ of noise"] and margins["draws"].tolist() == [2]
    assert margins["as is"][0].startswith("-") and "[" in margins["as is"][0]
    recorder = Recorder("distribution_aware", {"calibration": "noise"}, directory=tmp_path)
    again = run(arms(source=SOURCES["noise"]), recorder=recorder).frame
    (path,) = tmp_path.glob("*.json")
    assert read_record(path)["parameters"].items() >= {"method": "source", "calibration": "noise"}.items()
    assert path.stat().st_size < 10_000  # no images in its settings
    assert again["test_accuracy"][0] == found.frame["test_accuracy"][1]


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_has_the_shape_of_the_network_s_images_and_is_drawn_by_the_seed(name):
    batches = [torch.rand(40, 3, 16, 16), torch.rand(20, 3, 16, 16)]
    found = torch.cat(SOURCES[name](batches, 0))
    assert found.shape[1:] == batches[0].shape[1:] and found.dtype == batches[0].dtype
    assert torch.equal(found, torch.cat(SOURCES[name](batches, 0)))
    random = name in ("shuffled pixels", "noise", "photograph")
    assert torch.equal(found, torch.cat(SOURCES[name](batches, 1))) != random


def test_the_better_of_as_is_and_re_estimated_counts_on_either_side():
    rows = [("a", 0, 80.0, 85.0), ("b", 0, 70.0, 60.0), ("a", 1, 80.0, 87.0), ("b", 1, 74.0, 60.0)]
    frame = pd.DataFrame(rows, columns=["method", "seed", *told.BEST]).assign(ratio=2.0)
    (row,) = told.margins(frame, "b").to_dict("records")
    assert row["as is"].startswith("+8.00 [") and row["the better of as is and BatchNorm"].startswith(
        "+14.00 ["
    )
    once = frame[frame["seed"] == 0].assign(test_accuracy_epoch=[88.0, 90.0])
    assert told.margins(once, "b")[["as is", "after one epoch"]].values.tolist() == [
        ["+10.00 points", "-2.00 points"]
    ]


def test_the_energy_of_a_flat_and_of_a_steep_spectrum():
    text = told.energy({"flat": torch.eye(100), "steep": torch.diag(torch.tensor([1.0] + 99 * [1e-6]))})
    assert "1 % of the directions in `steep`" in text and "99 % in `flat`" in text


def test_the_layers_as_published_are_the_spatial_convolutions(digits):
    model = tdlib.models.build("resnet18", 10, input_shape=(3, 32, 32))
    assert sigma.dense_layers(model) == ("conv1", "fc")
    published = sigma.dense_layers(model, "published")
    assert published == ("layer2.0.downsample.0", "layer3.0.downsample.0", "layer4.0.downsample.0", "fc")
    with pytest.raises(UnknownName, match="published"):
        sigma.dense_layers(model, "all")


def test_a_plan_and_its_statistics_follow_the_choice_of_layers(net, digits):
    paper = sigma.Calibrated(digits, "tucker2", SAMPLES, layers="published")
    paper.start(net, digits)
    assert "conv1" in paper.statistics[net]
    skipped = paper.uniform(net, 3).skipped
    assert skipped["linear"] == "skipped on request" != skipped.get("conv1")


def test_more_images_bring_the_output_closer(net, digits):
    plan = sigma.Calibrated(digits, "tucker2", SAMPLES).uniform(net, 4)
    found = sigma.calibration_sizes(net, digits, plan, (10, 600), (0, 1))
    kl = found.groupby("images")["kl"].mean()
    assert kl[600] < kl[10] and len(found) == 4


def test_drift_is_the_error_of_what_the_layers_put_out(net, digits, stats):
    plan = sigma.Calibrated(digits, "tucker2", SAMPLES).uniform(net, 4)
    images, _ = next(iter(digits.batches("test", 64)))
    small = tdlib.decompose(net, plan, stats)
    found = sigma.drift(net, {"same": net, "sigma": small}, list(plan), images)
    errors = found.set_index(["method", "layer"])["error"]
    assert errors["same"].max() == 0 and errors["sigma"].min() > 0
    assert not any(module._forward_hooks for module in small.modules())


@pytest.mark.parametrize("by", ["params", "macs"])
def test_a_ratio_may_be_that_of_the_decomposed_layers(net, digits, by):
    plan = sigma.Calibrated(digits, "tucker2", SAMPLES, by, "layers").uniform(net, 2.0)
    cost, layers = tdlib.count(net, digits.input_shape).by(by), sigma.decomposable(net, digits, "tucker2", by)
    before = sum(layers.values())
    assert before / (before - cost + cost / plan.ratio) == pytest.approx(2, rel=0.03)


def test_tables_over_ratios_keep_the_order_of_the_story():
    rows = [("global", 2.0), ("sigma", 4.0), ("frobenius", 2.0), ("sigma", 2.0)]
    frame = pd.DataFrame(rows, columns=["method", "ratio"]).assign(test_accuracy=50.0, kl=0.5, agreement=70.0)
    table = told.over_ratios(told.named(frame))
    assert [name.split()[0] for name in table.index] == ["kernel", "output", "+"]
    assert table["KL", "4×"].tolist() == ["–", "0.50", "–"] and "accuracy (%)" in table
    sample = told.over_ratios(told.named(frame.assign(measured_on="500 training images")))
    assert "accuracy on 500 training images (%)" in sample and "accuracy (%)" not in sample


def test_halves_keeps_the_networks_class_order(tmp_path):
    for k in range(4):
        (tmp_path / f"{k:03d}_class").mkdir()
        Image.new("RGB", (8, 8), (k, 0, 0)).save(tmp_path / f"{k:03d}_class" / "a.png")
    data = sigma.halves(tmp_path)
    assert data.train.labels.tolist() == [0, 2] and data.test.labels.tolist() == [1, 3]
    assert data.input_shape == (3, 8, 8) and len(data.val) == 0
    assert sigma.halves(tmp_path, limit=1).test.labels.tolist() == [1]
    assert sigma.reduced(data) == {"profile": "reduced", "measured_on": "2 training images"}
    Image.new("RGB", (9, 8)).save(tmp_path / "000_class" / "b.png")
    with pytest.raises(DataError, match="one size"):
        sigma.halves(tmp_path)
