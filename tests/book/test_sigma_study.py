"""The experiments of the chapter on distribution-aware decomposition, and their records."""

import pytest
import torch

import tdlib
from tdbook.figures.sigma import rank_correlation
from tdbook.records import read_record
from tdbook.sigma_study import VARIANTS, Study
from tdbook.sigma_sweep import halves, sweep
from tdlib.errors import DataError, UnknownName


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
def study(net, digits):
    return Study(net, digits, samples=600)


def test_each_step_brings_the_outputs_closer_to_the_dense_network(study):
    kl = {v: study.run(v, "tucker2", 3)["kl"] for v in VARIANTS[:4]}
    assert kl["sigma"] < 0.3 * kl["frobenius"]
    assert kl["global"] < kl["sigma"]
    assert kl["sequential"] < 1.2 * kl["global"]


def test_the_new_error_ranks_the_harm_of_single_layers_better(study):
    found = rank_correlation(study.layer_drops("tucker2", (0.2, 0.4)))
    assert found.iloc[1, 0] > found.iloc[0, 0]


def test_a_sweep_with_the_moments_of_other_images_names_them(study, tmp_path):
    noise = [torch.randn_like(x) for x in study.batches[:2]]
    study.others["noise"] = noise
    grid = (["transfer:noise"], ["tucker2"], [2.0], "params")
    row = sweep(study, *grid, parameters={"dataset": "digits"}, directory=tmp_path)[0]
    (path,) = tmp_path.glob("*.json")
    assert read_record(path)["parameters"].items() >= {"method": "transfer", "calibration": "noise"}.items()
    again = study.transfer({"noise": noise}, "tucker2", 2.0)[0]
    assert row["test_accuracy"] == again["test_accuracy"]
    with pytest.raises(UnknownName, match="transfer:noise"):
        study.run("transfer:snow", "tucker2", 2.0)


def test_sweeps_leave_records_and_continue(study, tmp_path):
    grid = (["frobenius", "sigma"], ["tucker2"], [2.0], "params", "layers")
    first = sweep(study, *grid, parameters={"dataset": "digits"}, directory=tmp_path)
    assert len(list(tmp_path.glob("distribution_aware-*.json"))) == 2
    assert first[0]["layers_ratio"] == pytest.approx(2, rel=0.03)
    again = sweep(study, *grid, parameters={"dataset": "digits"}, directory=tmp_path)
    assert [r["kl"] for r in again] == [r["kl"] for r in first]


def test_halves_keeps_the_networks_class_order(tmp_path):
    from PIL import Image

    for k in range(4):
        (tmp_path / f"{k:03d}_class").mkdir()
        Image.new("RGB", (8, 8), (k, 0, 0)).save(tmp_path / f"{k:03d}_class" / "a.png")
    data = halves(tmp_path)
    assert data.train.labels.tolist() == [0, 2] and data.test.labels.tolist() == [1, 3]
    assert data.input_shape == (3, 8, 8) and len(data.val) == 0
    Image.new("RGB", (9, 8)).save(tmp_path / "000_class" / "b.png")
    with pytest.raises(DataError, match="one size"):
        halves(tmp_path)
