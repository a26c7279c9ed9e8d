"""What the chapter on ADMM notes of each road: spectra, names, the words about its numbers, its recipes."""

import pandas as pd
import pytest
import torch

import tdlib
from tdbook import admm_study as study
from tdbook.settings import recipe
from tdlib.methods.admm import pull
from tdlib.models import build


@pytest.mark.parametrize("format", ["tt", "tucker2"])
def test_a_decomposed_kernel_has_the_ranks_that_its_spectra_state(format):
    torch.manual_seed(0)
    net = build("cnn", 10)
    plan = tdlib.plan(net, (1, 8, 8), format, 4.0)
    layer = study.spectra(net, plan)[0]["layer"]
    net.get_submodule(layer).weight.data = tdlib.decompose(net, plan).get_submodule(layer).kernel().detach()
    for row in study.spectra(net, plan):
        assert sum(value > 1e-4 * row["values"][0] for value in row["values"]) == row["rank"]


@pytest.mark.parametrize("format", ["tr", "svd"])
def test_formats_of_other_matrices_state_no_rank(format):
    net = build("cnn", 10)
    assert {row["rank"] for row in study.spectra(net, tdlib.plan(net, (1, 8, 8), format, 4.0))} == {None}


def test_only_admm_with_tt_is_called_as_in_the_paper():
    frame = pd.DataFrame({"method": ["admm", "admm", "scratch"], "format": ["tt", "tucker2", "tt"]})
    assert study.named(frame)["method"].tolist() == ["ADMM-TT", "ADMM-Tucker-2", "from scratch"]


def test_words_are_means_over_seeds_and_leave_out_what_did_not_run():
    both = [("direct", 60.0, 88.0), ("admm", 85.0, 90.0)]
    rows = [
        {"ratio": ratio, "by": "macs", "seed": seed, "method": method, "n": 200, "dense_test_accuracy": 90.0,
         "test_accuracy_before": before + 2 * seed, "test_accuracy": after}
        for ratio, roads in ((2.0, both), (4.0, both[1:])) for seed in (0, 1)
        for method, before, after in roads
    ]  # fmt: skip
    text = study.in_words(pd.DataFrame(rows), "tt")
    assert "**2×** (macs)" in text and "4×" not in text
    assert "plainly trained network 29.0 points and the ADMM-TT-trained one 4.0" in text
    assert "0.50 points" in text and "mean of 2 seeds" in text


@pytest.mark.parametrize("profile", study.PROFILES)
def test_recipes_state_rho_and_pull(profile):
    chosen = recipe(profile, study.PROFILES)
    asked = chosen.rho, getattr(chosen, "pull", None)
    study.set_pull(chosen, 45000)
    assert chosen.pull == pytest.approx(pull(chosen.rho, chosen.lr, 45000 // chosen.batch_size))
    assert chosen.rho == asked[0] or chosen.pull == pytest.approx(asked[1])
    assert study.recorder(chosen, 45000).scale.partition(":")[0] in ("quick", "full", "reduced")
