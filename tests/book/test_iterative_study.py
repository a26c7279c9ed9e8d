"""What the chapter on iterative decomposition says and shows: its opponent, its road, its words."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

import tdlib
from tdbook import iterative_study as study
from tdbook.claims import load_claims
from tdbook.figures.iterative import roads
from tdlib.errors import BudgetError
from tdlib.planning.budget import make_budget
from tdlib.planning.candidates import candidates
from tdlib.planning.shrinking import check_reachable
from tdlib.train import recalibrated

STAGES = [
    {"pass": 1, "group": 0, "ratio": 1.8, "val_before": 60.0},
    {"pass": 2, "group": 0, "ratio": 2.0, "val_before": 75.0},
]
EPOCHS = [
    {"pass": 1, "group": 0, "val_accuracy": 80.0},
    {"pass": 1, "group": 0, "val_accuracy": 82.0},
    {"pass": 2, "group": 0, "val_accuracy": 81.0},
]


def rows(end: float, seeds: int = 2) -> pd.DataFrame:
    same = {"ratio": 4.0, "by": "macs", "epochs": 6}
    return pd.DataFrame([
        {**same, "method": name, "seed": n, "test_accuracy_recalibrated": then, "test_accuracy": last + n}
        for n in range(seeds)
        for name, then, last in (("iterative", 70.0, end), ("one-shot", 30.0, 90.0))
    ])  # fmt: skip


def test_lower_ranks_than_the_authors_have_the_name_that_the_ledger_keeps_apart():
    assert study.named(None) == "iterative" != study.named(2)
    ledger = {claim.id: claim for claim in load_claims()}
    assert ledger["iterative-beats-one-shot"].records.where["method"] == study.named(None)
    assert ledger["own-lower-ranks-beat-one-shot"].records.where["method"] == study.named(2)


def test_at_once_starts_fine_tuning_with_the_statistics_that_the_iteration_takes():
    digits = tdlib.data.load("digits")
    torch.manual_seed(0)
    net = tdlib.models.build("cnn", digits.classes, input_shape=digits.input_shape, width=8)
    plan, seen = tdlib.plan(net, digits.input_shape, "tucker2", 2.0), []
    small, tables = study.at_once(
        net, digits, plan, seed=1, on_decomposed=lambda network: seen.append(network.bn2.running_mean.clone())
    )
    assert tables == {} and torch.equal(seen[0], net.bn2.running_mean)
    fresh = recalibrated(tdlib.decompose(net, plan, progress=False), digits, seed=1)
    torch.testing.assert_close(small.bn2.running_mean, fresh.bn2.running_mean)


def test_the_road_goes_over_all_epochs_and_shows_every_decomposition():
    steps = study.road("iterative", {"stages": STAGES, "finetune": EPOCHS})
    assert steps[["epochs", "accuracy"]].values.tolist() == [[0, 60], [1, 80], [2, 82], [2, 75], [3, 81]]
    assert steps["state"].eq("decomposed").tolist() == [True, False, False, True, False]
    once = study.road("one-shot", {"finetune": [{"val_accuracy": 70.0}, {"val_accuracy": 79.0}]}, 20.0)
    assert once[["epochs", "accuracy"]].values.tolist() == [[0, 20], [1, 70], [2, 79]]
    (ax,) = roads(pd.concat([steps, once]), 92.0).axes
    assert [line.get_xdata().tolist() for line in ax.lines[:2]] == [[0, 1, 2, 2, 3], [0, 1, 2]]


@pytest.mark.parametrize(
    ("stages", "span"), [(STAGES, "2 decompositions takes the network from 1.80× to 2.00×"),
                         (STAGES[:1], "1 decompositions takes the network from 1.00× to 1.80×")],
)  # fmt: skip
def test_the_last_cut_is_stated(stages, span):
    assert span in study.last_cut(stages, 2.0, 0)


def test_the_rules_of_the_passes_are_counted():
    ranks = [{"pass": n, "layer": "a", "rule": rule} for n, rule in enumerate(("vbmf", "nx", "nx"), 1)]
    text = study.rules_used(ranks)
    assert "nx in 2 of 3 passes, vbmf in 1 of 3 passes (1: vbmf, 2: nx, 3: nx)" in text


@pytest.mark.parametrize(("end", "gap", "ahead"), [(92.0, "+2.00", 2), (89.5, "-0.50", 0)])
def test_words_follow_the_numbers(end, gap, ahead):
    text = study.against(rows(end), "iterative", "one-shot")
    assert f"{gap} points (by seed: {gap}, {gap})" in text and "+40.0 points" in text
    assert f"in 2 of 2 runs after the last decomposition and in {ahead} of 2 runs at the end" in text


def test_seeds_that_one_side_lacks_are_not_compared():
    table = rows(92.0, seeds=3).iloc[:-1]
    assert "2 of 2 runs" in study.against(table, "iterative", "one-shot")


def test_the_authors_comparison_is_computed_from_their_table(monkeypatch):
    assert "+2.60 to +3.39 points (top-5 and mAP), above zero on 4 of 4 networks" in study.reported()
    turned = pd.DataFrame({"iterative": [-3.0, -1.0], "one_shot": [-1.0, -2.0], "metric": "top-1"})
    monkeypatch.setattr(study.papers, "table", lambda *_: turned)
    assert "-2.00 to +1.00 points (top-1), above zero on 1 of 2 networks" in study.reported()


def test_the_authors_lowest_ranks_allow_4_times_fewer_macs_of_resnet20_and_not_8():
    net = tdlib.models.build("resnet20", 10)
    cost = tdlib.count(net, (3, 32, 32))
    layers = candidates(net, cost, "tucker2", "macs", ("conv1", "linear"), {})[0]
    check_reachable(layers, make_budget(cost.by("macs"), layers, 4.0, "macs"), None)
    with pytest.raises(BudgetError, match="authors' bounds"):
        check_reachable(layers, make_budget(cost.by("macs"), layers, 8.0, "macs"), None)
