"""The ImageNet page's arithmetic against hand calculation."""

import pytest
import yaml

from tdbook import imagenet_cost
from tdbook.paths import ROOT
from tdlib.errors import DataError


def row(topic, name, ratio, speed):
    return {"topic": topic, "name": name, "ratio": ratio, "extra": {"images_per_second": speed}}


MACHINE = {"device": "cpu", "cpu": "Testium", "threads": 2}
RESULTS = {
    "machines": {"training": MACHINE, "calibration": MACHINE},
    "rows": [
        row("training", "training step of resnet18 at 224x224", 1.2, 50.0),
        row("training", "training step of resnet20 at 32x32", 1.2, 9e9),
        row("calibration", "exact statistics, resnet18 at 224x224", 2.5, 100.0),
    ],
}
LEDGER = {
    "images": {"train": 180_000},
    "price_per_hour": {"cpu core": 0.5, "cuda": 4.0},
    "currency": "USD",
    "runs": [
        {"chapter": "a", "what": "train", "epochs": [3, 7], "source": "ours"},
        {"chapter": "b", "what": "no training", "statistics": 1000, "forward": 70000, "source": "ours"},
    ],
}


def test_hours_by_hand():
    speed = imagenet_cost.measured(RESULTS)["Testium, 2 core(s)"]
    train, forward = LEDGER["runs"]
    assert imagenet_cost.hours(train, speed, 180_000)[0] == pytest.approx(10)  # 10 x 180,000 / 50 / 3600
    assert imagenet_cost.hours(forward, speed, 180_000)[0] == pytest.approx((2500 + 70000) / 100 / 3600)


def test_the_page_multiplies_by_cores_and_price_and_names_what_is_missing():
    page = imagenet_cost.page(RESULTS, LEDGER)
    assert "| 10 | 10.00 |" in page  # 10 hours x 2 cores x 0.5
    assert "(3 + 7) epochs × 180,000 images / 50 images/s" in page
    assert "**GPU**: not measured yet" in page
    assert "not measured yet" in imagenet_cost.page(None, LEDGER)


def test_a_speed_that_was_not_measured_gives_no_number():
    assert imagenet_cost.hours({"epochs": [1]}, {"forward": 3.0}, 10) is None
    with pytest.raises(DataError, match="expected epochs, statistics or forward"):
        imagenet_cost.hours({"chapter": "x"}, {"training": 1.0}, 10)


def test_the_committed_ledger_names_chapters_that_exist():
    ledger = yaml.safe_load((ROOT / "book" / "imagenet.yml").read_text(encoding="utf-8"))
    assert all((ROOT / "notebooks" / f"{run['chapter']}.ipynb").is_file() for run in ledger["runs"])
    assert imagenet_cost.generated()
