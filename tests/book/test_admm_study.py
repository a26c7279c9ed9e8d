"""What the chapter on ADMM notes of each road: spectra, names, the words about its numbers, its recipes."""

import math
from fnmatch import fnmatchcase

import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex

import tdlib
from tdbook import admm_study as study
from tdbook import papers, style
from tdbook.figures import admm as figures
from tdbook.settings import recipe
from tdlib.errors import TdlibError
from tdlib.formats import get_format
from tdlib.methods.admm import pull
from tdlib.models import build
from tdlib.planning import end_layers


def row(method, before, fresh, end, uncut=99.0, off=0.5, **more):
    about = {"ratio": 2.0, "by": "macs", "seed": 0, "n": 200, "dense_test_accuracy": 90.0, "method": method}
    found = {"test_accuracy_before": before, "test_accuracy_recalibrated": fresh, "test_accuracy": end}
    return about | found | {"uncut_test_accuracy": uncut, "truncation_error": off} | more


@pytest.mark.parametrize("form", study.forms(build("cnn", 10)).values(), ids=str)
def test_a_decomposed_kernel_has_the_ranks_that_its_spectra_state(form):
    torch.manual_seed(0)
    net = build("cnn", 10)
    plan = tdlib.plan(net, (1, 8, 8), ratio=4.0, **form)
    layer = study.spectra(net, plan)[0]["layer"]
    net.get_submodule(layer).weight.data = tdlib.decompose(net, plan).get_submodule(layer).kernel().detach()
    for row in study.spectra(net, plan):
        kept = sum(value > 1e-4 * row["values"][0] for value in row["values"])
        assert row["rank"] == (None if form["format"] == "tr" else kept)


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
        row(method, before + 2 * seed, 50.0, after, ratio=ratio, seed=seed)
        for ratio, roads in ((2.0, both), (4.0, both[1:])) for seed in (0, 1)
        for method, before, after in roads
    ]  # fmt: skip
    text = study.in_words(pd.DataFrame(rows), "tt")
    assert "**2×** MACs" in text and "4×" not in text
    assert "ADMM-TT has 86.0 %" in text and "the plainly trained network 61.0 %" in text
    assert "0.50 points" in text and "mean of 2 seeds" in text


@pytest.mark.parametrize("profile", study.PROFILES)
def test_recipes_state_rho_and_pull(profile):
    chosen = recipe(profile, study.PROFILES)
    asked = chosen.rho, getattr(chosen, "pull", None)
    study.set_pull(chosen, 45000)
    assert chosen.pull == pytest.approx(pull(chosen.rho, chosen.lr, 45000 // chosen.batch_size))
    assert chosen.rho == asked[0] or chosen.pull == pytest.approx(asked[1])
    expected = {"quick": "quick", "full": "full"}.get(profile, "reduced")  # the modern one is ours
    assert study.recorder(chosen, 45000).scale.partition(":")[0] == expected


def test_the_full_recipe_is_the_authors_on_imagenet_too():
    chosen = recipe("full", study.profiles("imagenet"))
    assert (chosen.lr, chosen.epochs, chosen.finetune_epochs, chosen.rho) == (0.01, 150, 105, 1e-3)
    assert not chosen.changed and recipe("full", study.profiles("cifar10")).epochs == 200


@pytest.mark.parametrize(("kept", "said"), [(80.0, "30.0 points ahead of"), (40.0, "10.0 points behind"),
                                            (50.04, "level with")])  # fmt: skip
def test_the_cut_is_judged_by_the_better_of_both_and_its_direction_computed(kept, said):
    rows = [row("direct", 20.0, 50.0, 85.0), row("admm", kept, 10.0, 86.5), row("sequential", 1.0, 2.0, 88.0)]
    text = study.in_words(pd.DataFrame(rows), "tt")
    assert f"ADMM-TT is {said} it" in text
    assert "1.5 points ahead of direct (85.0 %)" in text
    assert "1.5 points behind Σ + harm + sequence (ours) (88.0 %)" in text


@pytest.mark.parametrize(("uncut", "said"), [(91.0, "1.0 points ahead of"), (88.0, "2.0 points behind")])
def test_how_close_training_came_is_said_with_what_it_cost(uncut, said):
    rows = [row("direct", 1.0, 1.0, 1.0, 90.0, 0.75), row("admm", 1.0, 1.0, 1.0, uncut, 0.25)]
    text = study.closeness(pd.DataFrame(rows), "tt")
    assert "0.25 of the weights' norm after ADMM-TT, 0.75 after plain training" in text and said in text


def test_the_cost_is_a_share_and_colours_stay_with_their_roads():
    times = pd.DataFrame({"seconds": [1.0, 2.0], "projection_seconds": [0.1, 0.2], "epoch": [0, 1]})
    history = pd.concat(times.assign(run=run, distance=0.5) for run in ("ADMM-TT 4×", "plain, seen from 4×"))
    assert study.cost(history).to_numpy() == pytest.approx(10.0)
    drawn = figures.convergence(history).axes[0].get_lines()
    assert [to_hex(line.get_color()).upper() for line in drawn[:2]] == [style.BLUE, style.GREY]


def test_what_lies_beyond_the_rank_is_the_share_that_the_cut_takes_off():
    rows = [{"layer": "a", "unfolding": "O × I", "rank": 1, "values": [2.0, 1.0]},
            {"layer": "a", "unfolding": "x", "rank": None, "values": [1.0]}]  # fmt: skip
    assert study.beyond_rank({"ADMM-TT": rows}).to_dict() == {"ADMM-TT": {"a  O × I": 20.0}}


def test_the_penalty_alone_swings_through_the_low_rank_set_at_every_pull():
    found = study.penalty_alone([0.39, math.log(2), 2.0], epochs=6)
    assert found["along"].tolist() == pytest.approx(found["theory"].tolist(), abs=0.1)
    swings = found.groupby("pull")["along"]
    assert swings.nth(1).tolist() == pytest.approx([0.35, 0.0, -0.73], abs=0.1)
    assert (swings.min() < -0.2).all()


def test_the_figure_of_the_stages_goes_through_all_roads():
    rows = [row("direct", 20.0, 50.0, 85.0), row("scratch", None, None, 80.0, None)]
    frame = pd.DataFrame(rows).assign(start_test_accuracy=89.0, test_accuracy_epoch=70.0)
    (ax,) = figures.stages(study.named(frame.assign(format="tt")), "macs").axes
    drawn = [line.get_ydata().tolist() for line in ax.get_lines() if len(line.get_xdata()) > 2]
    assert [89.0, 99.0, 20.0, 50.0, 70.0, 85.0] in drawn


@pytest.mark.parametrize("table", papers.load("admm-tt").ranks.values(), ids=papers.load("admm-tt").ranks)
def test_the_authors_rank_tables_have_the_ratios_that_follow_from_them(table):
    """Counted as they stand: with BatchNorm, layers that the table makes larger, and ranks above the
    bound."""
    net = build(table.network, 10)
    cost = tdlib.count(net, (3, 32, 32))
    dense, small = [0, 0], [0, 0]
    for layer in cost.layers:
        ranks = next((r for name, r in table.layers.items() if fnmatchcase(layer.name, name)), None)
        if ranks is None or layer.kind != "Conv2d":
            continue
        modes = {k: v for k, v in ranks.model_dump().items() if k != "ranks" and v}
        kernel = get_format(table.format).bind(net.get_submodule(layer.name).weight.shape, **modes)
        ((before, after),) = layer.calls
        dense = [dense[0] + layer.params, dense[1] + layer.macs]
        macs = kernel.macs(tuple(ranks.ranks), before[-2:], after[-2:])
        small = [small[0] + kernel.cost(tuple(ranks.ranks))[0], small[1] + macs]
    whole = cost.params, cost.macs
    found = [w / (w - d + s) for w, d, s in zip(whole, dense, small, strict=True)]
    found += [d / s for d, s in zip(dense, small, strict=True)]
    units = ("params", "macs", "layers_params", "layers_macs")
    assert found == pytest.approx([table.ratios[unit] for unit in units], abs=6e-4)


def test_a_published_table_is_a_plan_of_five_modes():
    with pytest.raises(TdlibError, match="'tt-r32-3x' is of resnet32, got the model 'cnn'"):
        papers.ranks("admm-tt", "tt-r32-3x", "cnn")
    net, table = build("resnet32", 10), papers.ranks("admm-tt", "tt-r32-3x", "resnet32")
    plan = tdlib.plan(net, (3, 32, 32), table["format"], skip=end_layers(net), ranks=table["ranks"],
                      **table["options"])  # fmt: skip
    assert plan["layer3.4.conv2"].ranks == (8, 15, 15, 8) and len(plan) == 19
    assert plan["layer2.0.conv2"].options == {"out_modes": (8, 4), "in_modes": (4, 8)}
    assert plan.ratio == pytest.approx(2.925, abs=1e-3)  # what the ledger calls it
    assert "not smaller" in plan.skipped["layer1.0.conv1"]
