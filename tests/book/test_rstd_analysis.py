"""What shuffling does to kernels, and what similar pixels do."""

from __future__ import annotations

import itertools

import pandas as pd
import pytest
import torch
from torch import nn

import tdlib
from tdbook import rstd_analysis, rstd_training
from tdlib.errors import BudgetError, DataError
from tdlib.methods.rstd import shuffled_plan

ARMS = {"shuffled": {}, "folded": {"shuffle": False}, "kernel": {"shuffle": False, "modes": "kernel"}}
TRAINING = {"batch_size": 64, "device": "cpu", "progress": False}


@pytest.fixture(scope="module")
def digits():
    return tdlib.data.load("digits")


def net(digits) -> nn.Module:
    torch.manual_seed(0)
    return tdlib.models.build("cnn", digits.classes, input_shape=digits.input_shape, width=16)


def test_shuffled_structure_decomposes_like_noise(digits) -> None:
    """Post hoc, shuffling hurts: a low-rank kernel is no easier than Gaussian noise once it is shuffled."""
    model = net(digits)
    with torch.no_grad():
        kernel = torch.einsum("or,ir,kr->oik", *(torch.randn(n, 3) for n in (32, 32, 9)))
        model.conv4.weight.copy_(kernel.reshape(32, 32, 3, 3))
    errors = rstd_analysis.projection_errors(model, shuffled_plan(model, digits, ratio=4.0), ARMS)
    at = errors[errors["layer"] == "conv4"].set_index("variant")
    assert at["error"]["kernel"] < 0.05 and at["error"]["folded"] < 0.8 * at["error"]["shuffled"]
    assert at["error"]["shuffled"] == pytest.approx(at["error"]["noise"], abs=0.08)
    assert at["params"].max() < 1.2 * at["params"].min()


def test_images_make_kernels_of_lower_spatial_rank_than_shuffled_pixels(digits) -> None:
    scrambled = rstd_analysis.shuffle_pixels(digits)
    assert (
        rstd_analysis.neighbour_similarity(digits) > 0.4 > 0.1 > rstd_analysis.neighbour_similarity(scrambled)
    )
    nets = {}
    for name, data in (("images", digits), ("pixels", scrambled)):
        nets[name] = net(digits)
        tdlib.train.fit(nets[name], data, epochs=16, lr=0.1, weight_decay=1e-2, **TRAINING)
    low = {name: rstd_analysis.low_rankness(one).set_index("layer")["spatial"] for name, one in nets.items()}
    assert (low["images"] < low["pixels"] - 0.02).loc[["conv2", "conv3"]].all()
    mean = rstd_analysis.spatial_effective_rank(nets["images"])["spatial_effective_rank"]
    assert mean == pytest.approx(low["images"].mean()) and 0 < mean < 1


def test_shuffled_pixels_keep_images_labels_and_statistics(digits) -> None:
    scrambled = rstd_analysis.shuffle_pixels(digits, 1)
    x, y = digits.train[5]
    shuffled, label = scrambled.train[5]
    assert y == label and not torch.equal(x, shuffled)
    assert torch.equal(x.flatten().sort().values, shuffled.flatten().sort().values)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(x.flatten()[order], shuffled.flatten())

    class OnDisk(tdlib.data.FileSplit):
        def __init__(self) -> None:
            pass

    with pytest.raises(DataError, match="limit"):
        rstd_analysis.shuffle_pixels(
            tdlib.data.Bundle(
                "photos", digits.classes, (0.5,), (0.5,), (1, 8, 8), OnDisk(), OnDisk(), OnDisk()
            )
        )


def test_effective_rank_of_known_spectra() -> None:
    assert rstd_analysis.effective_rank(torch.ones(8)) == pytest.approx(1.0)
    assert rstd_analysis.effective_rank(torch.tensor([1.0, 0, 0, 0])) == pytest.approx(0.25)


def test_every_arm_reaches_the_ratios_of_the_grid(digits) -> None:
    model, arms = net(digits), rstd_training.plans(digits, "tt", None)
    grid = rstd_analysis.ratio_grid(model, arms)
    assert len(grid) == 3 and 1 < grid[0] < grid[-1] <= 16
    for ratio, planned in itertools.product(grid, arms.values()):
        assert planned(model, ratio, 0).params_ratio == pytest.approx(ratio, rel=0.02)
    table = rstd_analysis.ranks(model, arms, grid)
    assert list(table.index) == list(arms) and len(table.loc["kernel"].iloc[0]) == 3
    assert all(a > b for a, b in itertools.pairwise(ranks[0] for ranks in table.loc["random subspace"]))
    with pytest.raises(BudgetError, match="skip fewer layers"):
        narrow = {
            "classifier": lambda *about: shuffled_plan(about[0], digits, ratio=about[1], skip=["conv*"])
        }
        rstd_analysis.ratio_grid(model, narrow)


@pytest.mark.parametrize(("shift", "positive", "sign"), [(0.1, 4, "+0.10"), (-0.1, 0, "-0.10")])
def test_the_sentence_on_similarity_follows_the_ranks(shift, positive, sign) -> None:
    rows = itertools.product(("images", "pixels shuffled", "before training"), (0, 1), ("conv1", "conv2"))
    ranked = pd.DataFrame(rows, columns=["network", "seed", "layer"])
    ranked["spatial"] = 0.5 + shift * (ranked["network"] == "pixels shuffled")
    words = rstd_analysis.similarity_in_words(ranked)
    assert f"n = 2: {sign} [" in words and f"in {positive} of 4 kernels" in words and "0.500 after" in words


def test_stability_is_the_range_over_ratios_of_each_seed() -> None:
    rows = itertools.product(("shuffled", "kernel"), (2.0, 4.0), (0, 1))
    table = pd.DataFrame(rows, columns=["method", "ratio", "seed"])
    table["test_accuracy"] = [90.0, 92, 89, 91, 90, 90, 80, 70]
    found = rstd_analysis.stability(table)
    assert found["range_over_ratios"].to_dict() == {"shuffled": 1.0, "kernel": 15.0}
    assert found["worst"].to_dict() == {"shuffled": 90.0, "kernel": 75.0}


@pytest.mark.parametrize(
    ("kernel", "gap"), [(70.0, "+20.00 [+20.00; +20.00]"), (95.0, "-5.00 [-5.00; -5.00]")]
)
def test_the_sentence_on_accuracy_follows_the_runs(kernel, gap) -> None:
    rows = itertools.product(("shuffled", "kernel"), (2.0, 4.0), (0, 1))
    table = pd.DataFrame(rows, columns=["method", "ratio", "seed"])
    table["test_accuracy"] = [92.0, 92, 88, 88, *[kernel] * 4]
    words = rstd_analysis.in_words(table, 99.0, 10.0)
    assert (
        "**4.0 points** in the shuffled arm (kernel 0.0)" in words and f"n = 2: kernel {gap} points" in words
    )
