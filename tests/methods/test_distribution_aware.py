"""Distribution-aware compression end to end, on a small trained network."""

import copy

import pytest
import torch

import tdlib
from tdbook.sigma_study import Study
from tdlib.errors import BudgetError, CheckpointError, DataError, TdlibError
from tdlib.harm import HarmCurves, between
from tdlib.layers.formats import get_format
from tdlib.layers.weighted import factorise_weighted
from tdlib.methods.distribution_aware import at_once, calibration_batches, in_sequence
from tdlib.sensitivity import call_order, divergence, logits


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


def same_weights(a, b):
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("by", ["params", "macs"])
@pytest.mark.parametrize("sequential", [False, True])
def test_the_ratio_is_met_and_the_input_untouched(net, digits, by, sequential):
    before = copy.deepcopy(net)
    small = tdlib.compress(
        net, "distribution-aware", digits, ratio=3, by=by, samples=200, sequential=sequential, evaluate=False
    )
    assert same_weights(net, before) and not hasattr(net[0] if hasattr(net, "__getitem__") else net, "report")
    dense, cost = (tdlib.count(m, digits.input_shape) for m in (net, small))
    found = dense.macs / cost.macs if by == "macs" else dense.weights / cost.weights
    assert found == pytest.approx(3, rel=0.02)
    report = small._tdlib["report"]
    assert report[f"{by}_ratio"] == pytest.approx(found, rel=1e-6)
    assert {row["layer"] for row in report["layers"]} == set(small._tdlib["layers"])
    assert report["calibration_kl"] < 0.5 and report["sequential"] is sequential


def test_the_compressed_network_is_saved_and_loaded(net, digits, tmp_path):
    small = tdlib.compress(
        net, "distribution-aware", digits, ratio=3, samples=200, bias_correction=True, evaluate=False
    )
    tdlib.save(small, tmp_path / "small.safetensors")
    back = tdlib.load(tmp_path / "small.safetensors").eval()
    x = torch.randn(3, *digits.input_shape)
    torch.testing.assert_close(back(x), small.eval()(x))


@pytest.mark.parametrize(("format", "options"), [("cp", {}), ("cp4", {}), ("tt", {}), ("tt", {"order": 2})])
def test_other_formats(net, digits, format, options):
    rule = "uniform" if options or format.startswith("cp") else "global"
    small = tdlib.compress(
        net, "distribution-aware", digits, ratio=2, format=format, rule=rule, options=options, samples=200,
        sequential=False, evaluate=False,
    )  # fmt: skip
    plain = tdlib.compress(net, "direct", digits, ratio=2, format=format, options=options)
    batches = calibration_batches(digits, 200)
    reference = logits(net, batches)
    ours, theirs = (divergence(reference, logits(m, batches)) for m in (small, plain))
    assert ours < theirs


def test_unlabelled_batches_are_enough(net, digits):
    inputs = [x for x, _ in digits.batches("train", 100)]
    small = tdlib.compress(net, "distribution-aware", inputs, ratio=3, samples=250)
    assert small._tdlib["report"]["samples"] == 250
    assert "dense" not in small._tdlib["report"]


def test_statistics_of_other_data_can_be_used(net, digits, tmp_path):
    inputs = [x.flip(3) for x, _ in digits.batches("train", 200)]
    tdlib.statistics(net, inputs).save(tmp_path / "other.safetensors")
    small = tdlib.compress(
        net,
        "distribution-aware",
        digits,
        ratio=2,
        statistics=str(tmp_path / "other.safetensors"),
        samples=200,
    )
    report = small._tdlib["report"]
    assert report["sequential"] is False and report["before"]["test"] > 50
    with pytest.raises(CheckpointError):
        tdlib.compress(net, "distribution-aware", digits, ratio=2, statistics="nowhere.safetensors")


def test_recalibration_and_explicit_ranks_are_reported(net, digits):
    small = tdlib.compress(
        net, "distribution-aware", digits, ratio=2, ranks={"conv*": (6, 6)}, samples=200, recalibrate=True
    )
    report = small._tdlib["report"]
    assert report["rule"] == "explicit" and "recalibrated_kl" in report
    assert set(report["before"]) == set(report["after"]) == {"val", "test"}


def test_what_cannot_be_done_says_so(net, digits):
    with pytest.raises(BudgetError, match="best reachable"):
        tdlib.compress(net, "distribution-aware", digits, ratio=1e4, samples=100)
    with pytest.raises(TdlibError, match="there is one for tucker2"):
        tdlib.compress(net, "distribution-aware", digits, ratio=2, format="tr")
    with pytest.raises(DataError, match="no calibration inputs"):
        tdlib.compress(net, "distribution-aware", [], ratio=2)


def test_measured_harm_corrects_the_prediction(study):
    found = HarmCurves(study.model, study.statistics(), study.weights(), study.batches[:2], points=3)
    before = copy.deepcopy(study.model)
    tdlib.plan(study.model, (1, 8, 8), "tucker2", 3, skip=study.skip, rule="global", curves=found)
    assert same_weights(before, study.model)
    assert {row["layer"] for row in found.rows} == set(study.names("tucker2"))
    assert all(row["predicted"] > 0 and row["measured"] >= 0 for row in found.rows)
    assert between([(0.0, 1.0), (1.0, 3.0)], 0.5) == 2 and between([(0.0, 1.0), (1.0, 3.0)], 9) == 3


def test_output_weights_are_undone_on_the_output_factor(study):
    name = study.names("tucker2")[0]
    W, H, sigma = study.model.get_parameter(f"{name}.weight"), study.weights()[name], study.statistics()[name]
    for format, ranks in (("tucker2", (5, 4)), ("tt", (5, 4)), ("cp", (20,))):
        row = get_format(format)
        errors = []
        for weight in (H, None):
            What = row.compose(factorise_weighted(row, W, ranks, sigma, weight), tuple(W.shape))
            D = (W - What).detach().double().flatten(1)
            errors.append(float(torch.einsum("op,oi,ij,pj->", H, D, sigma, D)))
        assert errors[0] <= errors[1]


def test_statistics_with_output_weights_steer_plan_and_decompose(net, digits, tmp_path):
    batches = calibration_batches(digits, 300)
    reference, kl = logits(net, batches), []
    for output_weights in (False, True):
        tdlib.statistics(net, batches, ["conv[234]"], output_weights=output_weights).save(tmp_path / "s")
        stats = tdlib.load_statistics(tmp_path / "s")
        assert set(stats.weights) == (set(stats) if output_weights else set())
        table = tdlib.plan(
            net, (1, 8, 8), "tucker2", 3, skip=("conv1", "linear"), rule="global", statistics=stats
        )
        kl.append(divergence(reference, logits(tdlib.decompose(net, table, stats), batches)))
    assert kl[1] < kl[0]


def test_layers_are_replaced_in_the_order_in_which_they_run(net, digits):
    x = torch.randn(1, *digits.input_shape)
    assert call_order(net, ["conv3", "conv1", "conv2"], x) == ["conv1", "conv2", "conv3"]


def test_one_layer_in_sequence_equals_that_layer_at_once(study):
    table = tdlib.plan(study.model, (1, 8, 8), "tucker2", ranks={"conv2": (4, 4)})
    a = at_once(study.model, table, study.statistics())
    b = in_sequence(study.model, table, study.batches)
    torch.testing.assert_close(tdlib.to_dense(a.conv2), tdlib.to_dense(b.conv2), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("sequential", [True, False])
def test_progress_shows_every_stage(study, capsys, sequential):
    arguments = dict(ratio=2.0, samples=40, sequential=sequential, evaluate=False)
    quiet = tdlib.compress(study.model, "distribution-aware", study.data, **arguments)
    assert capsys.readouterr().err == ""
    shown = tdlib.compress(study.model, "distribution-aware", study.data, progress=True, **arguments)
    bars = capsys.readouterr().err
    assert all(stage in bars for stage in ("statistics", "sensitivity", "ranks", "decomposition"))
    assert all(torch.equal(a, b) for a, b in zip(quiet.parameters(), shown.parameters(), strict=True))
