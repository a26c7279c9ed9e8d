"""The learning rate of each arm, and the records of networks that are no arm."""

from __future__ import annotations

import pytest
import torch

import tdlib
from tdbook import rstd_analysis, rstd_training
from tdbook.experiment import Recorder
from tdbook.figures import rstd as figures
from tdbook.records import read_record

TRAINING = {"batch_size": 32, "device": "cpu", "progress": False}


@pytest.fixture(scope="module")
def digits():
    return tdlib.data.load("digits", limit=96)


def net(digits) -> torch.nn.Module:
    torch.manual_seed(0)
    return tdlib.models.build("cnn", digits.classes, input_shape=digits.input_shape, width=8)


def epochs(first: float, *accuracies: float) -> list[dict[str, float]]:
    return [{"train_loss": first, "val_accuracy": accuracy} for accuracy in accuracies]


def test_a_rate_is_chosen_on_validation_among_those_that_start_well() -> None:
    found = {
        "dense, 0.1": epochs(2.0, 50, 40), "dense, 0.2": epochs(2.4, 90), "dense, 0.4": [],
        "kernel, 0.1": epochs(2.4, 20), "kernel, 0.2": epochs(2.5, 30), "kernel, 0.4": [],
    }  # fmt: skip
    table = rstd_training.choice(found, classes=10)
    assert rstd_training.chosen(table) == {"dense": 0.1, "kernel": 0.2}  # 2.4 is above ln 10
    assert rstd_training.ends(table).startswith(
        "The smallest or largest rate of the grid was chosen for: dense."
    )
    assert rstd_training.ends(table[table["method"] == "kernel"]).startswith("No chosen rate")
    shown = figures.rates(table)
    assert "**50.0 (2.00)**" in shown and "0.0 (inf)" in shown and shown.count("**") == 4


def test_trials_never_look_at_the_test_split_and_are_read_from_their_record(digits, tmp_path, monkeypatch):
    arms = {"random subspace": rstd_training.plans(digits, "tt", None)["random subspace"]}
    recorder, seen, batches = Recorder("rstd", {}, directory=tmp_path), set(), tdlib.data.Bundle.batches

    def spied(self, split, *about, **options):
        seen.add(split)
        return batches(self, split, *about, **options)

    def run():
        return rstd_training.trials(
            net(digits), digits, arms, (0.1, 1e9), ratio=4.0, recorder=recorder, epochs=2, **TRAINING
        )

    monkeypatch.setattr(tdlib.data.Bundle, "batches", spied)
    first = run()
    assert seen == {"train", "val"} and first["dense, 1e+09"] == [] != first["random subspace, 0.1"]
    monkeypatch.setattr(rstd_training, "untrained", lambda *about: pytest.fail("trained again"))
    assert run() == first
    record = read_record(next(tmp_path.glob("*.json")))
    rates = rstd_training.chosen(rstd_training.choice(first, len(digits.classes)))
    assert record["metrics"] == {f"lr of {name}": rate for name, rate in rates.items()}
    assert record["parameters"]["seed"] == rstd_training.TRIAL and record["history"] == first


def test_a_dense_network_is_recorded_beside_the_images_that_it_saw_in_another_form(digits, tmp_path):
    recorder, rows = Recorder("rstd", {"dataset": "digits", "format": "tt"}, directory=tmp_path), []
    for method, data in (("images", digits), ("pixels shuffled", rstd_analysis.shuffle_pixels(digits))):
        rows.append(
            rstd_training.dense_network(
                net(digits),
                data,
                method,
                seed=0,
                select=False,
                images=digits,
                epochs=1,
                lr=0.1,
                measure=rstd_analysis.spatial_effective_rank,
                recorder=recorder,
                **TRAINING,
            )
        )
    found = {r["parameters"]["method"]: r for r in map(read_record, tmp_path.glob("*.json"))}
    ours, theirs = found["pixels shuffled"], found["images"]
    for name in ("data", "start", "splits"):  # what the ledger wants both sides to share
        assert ours[name] == theirs[name]
    assert ours["parameters"]["format"] is ours["parameters"]["ratio"] is ours["parameters"]["by"] is None
    assert ours["settings"]["images"] != theirs["settings"]["images"] and ours["settings"]["run"]["lr"] == 0.1
    assert ours["metrics"]["epochs"] == 1 and ours["metrics"]["spatial_effective_rank"] > 0
    assert {row["method"]: row["test_accuracy"] for row in rows} == {
        name: r["metrics"]["test_accuracy"] for name, r in found.items()
    }


def test_the_arms_have_equal_parameters_and_only_one_has_no_tensor(digits):
    model = net(digits)
    plans = {name: of(model, 4.0, 1) for name, of in rstd_training.plans(digits, "tt", None).items()}
    assert {plan.format for plan in plans.values()} == {"shuffled-tt", "hashed"}
    assert {name: plan.params_ratio for name, plan in plans.items()} == pytest.approx(
        dict.fromkeys(plans, 4.0), rel=0.02
    )
    seeds = [{k: v.options["seed"] for k, v in plans[n].items()} for n in ("shuffled", "random subspace")]
    assert seeds[0] == seeds[1]
