"""Distribution-aware compression of a trained network: the paper's method, and what our steps gain."""

from __future__ import annotations

import pytest
import torch

import tdlib
from tdlib.calibration import calibration_batches, divergence, logits
from tdlib.errors import (
    BudgetError,
    CheckpointError,
    DataError,
    MemoryLimitError,
    NonFiniteError,
    TdlibError,
    UnknownName,
)
from tdlib.formats import get_format
from tdlib.methods.distribution_aware import distribution_aware, in_sequence
from tdlib.methods.registry import planned

SAMPLES = 600


@pytest.fixture(scope="module")
def batches(digits):
    return calibration_batches(digits, SAMPLES)


@pytest.fixture(scope="module")
def stats(trained, batches):
    """Sigma and H of the layers in the middle."""
    return tdlib.statistics(trained, batches, ["conv[234]"], output_weights=True)


@pytest.fixture(scope="module")
def uniform(trained, digits):
    return planned(trained, digits, format="tucker2", ratio=3)


@pytest.fixture(scope="module")
def by_harm(trained, digits, stats):
    return planned(trained, digits, format="tucker2", ratio=3, rule="global", statistics=stats)


@pytest.fixture(scope="module")
def kl(trained, batches):
    """Compressed network -> divergence of its outputs from the dense network's on the calibration inputs."""
    reference = logits(trained, batches)
    return lambda network: divergence(reference, logits(network, batches))


def without_fisher(stats):
    return tdlib.Statistics(stats, stats.means, stats.counts)


def same_weights(a, b):
    states = (a.state_dict().values(), b.state_dict().values())
    return all(torch.equal(x, y) for x, y in zip(*states, strict=True))


# -- the paper


def test_the_default_is_the_papers_method(digits, trained, stats, uniform):
    small, tables = distribution_aware(trained, digits, uniform, samples=SAMPLES)
    assert same_weights(small, tdlib.decompose(trained, uniform, without_fisher(stats)))
    assert same_weights(small, distribution_aware(trained, digits, uniform, statistics=stats)[0])
    plain = tdlib.decompose(trained, uniform)
    for row in tables["layers"]:
        layers = (network.get_submodule(row["layer"]) for network in (trained, small, plain))
        W, What, other = (tdlib.to_dense(layer).detach() for layer in layers)
        assert row["ranks"] == list(uniform[row["layer"]].ranks)
        assert row["frobenius_error"] == pytest.approx(float((W - What).norm() / W.norm()), rel=1e-4)
        assert row["frobenius_error"] > float((W - other).norm() / W.norm())
        sigma = stats[row["layer"]].float()
        error, worse = (float(((W - k).flatten(1) @ sigma * (W - k).flatten(1)).sum()) for k in (What, other))
        assert error < worse
    assert [row["layer"] for row in tables["layers"]] == list(uniform)


def test_sigma_brings_the_outputs_far_closer(trained, digits, uniform, kl):
    small, _ = distribution_aware(trained, digits, uniform, samples=SAMPLES)
    assert kl(small) < 0.3 * kl(tdlib.decompose(trained, uniform))


@pytest.mark.parametrize(("format", "options"), [("cp", {}), ("cp4", {}), ("tt", {}), ("tt", {"order": 2})])
def test_other_formats(trained, digits, format, options, kl):
    plan = planned(trained, digits, format=format, ratio=2, options=options)
    small, _ = distribution_aware(trained, digits, plan, samples=200)
    assert kl(small) < kl(tdlib.decompose(trained, plan))


# -- the steps beyond it


def test_ranks_by_harm_and_weighted_outputs(trained, digits, uniform, by_harm, stats, kl):
    plain, harm = (distribution_aware(trained, digits, p, samples=SAMPLES)[0] for p in (uniform, by_harm))
    weighed, _ = distribution_aware(trained, digits, by_harm, samples=SAMPLES, weigh_outputs=True)
    assert kl(harm) < 0.4 * kl(plain)
    assert kl(weighed) < 0.7 * kl(harm)
    assert same_weights(weighed, tdlib.decompose(trained, by_harm, stats))
    taken_here, _ = distribution_aware(
        trained, digits, by_harm, samples=SAMPLES, statistics=without_fisher(stats), weigh_outputs=True
    )
    assert same_weights(weighed, taken_here)


@pytest.mark.parametrize(("format", "ranks"), [("tucker2", (5, 4)), ("tt", (5, 4)), ("cp", (20,))])
def test_weighing_outputs_lowers_the_weighted_error(trained, stats, format, ranks):
    W, H, sigma = trained.get_parameter("conv3.weight").detach(), stats.weights["conv3"], stats["conv3"]
    bound, errors = get_format(format).bind(W.shape), []
    for fisher in (H, None):
        D = (W - bound.compose(bound.decompose(W, ranks, sigma, fisher))).double().flatten(1)
        errors.append(float(torch.einsum("op,oi,ij,pj->", H, D, sigma, D)))
    assert errors[0] < 0.95 * errors[1]


def test_fitting_in_sequence_undoes_errors(trained, digits, uniform, by_harm, kl):
    at_once, fitted, best = (
        distribution_aware(trained, digits, plan, samples=SAMPLES, **steps)[0]
        for plan, steps in (
            (uniform, {}),
            (uniform, {"sequential": True}),
            (by_harm, {"sequential": True, "weigh_outputs": True}),
        )
    )
    assert kl(fitted) < 0.3 * kl(at_once)
    assert kl(best) < 0.5 * kl(fitted)
    about = tdlib.provenance(fitted)
    assert about.plan == uniform.to_dict() and about.layers == dict(uniform)


def test_one_layer_in_sequence_is_that_layer_at_once(trained, batches, stats):
    plan = tdlib.plan(trained, (1, 8, 8), "tucker2", ranks={"conv2": (4, 4)})
    at_once = tdlib.decompose(trained, plan, without_fisher(stats))
    fitted = in_sequence(trained, plan, batches, {})
    torch.testing.assert_close(
        tdlib.to_dense(at_once.conv2), tdlib.to_dense(fitted.conv2), atol=1e-3, rtol=1e-3
    )


def test_a_model_that_is_one_layer_is_fitted_in_sequence_too():
    torch.manual_seed(0)
    layer, x = torch.nn.Conv2d(6, 8, 3), torch.randn(64, 6, 6, 6)
    plan = tdlib.plan(layer, x.shape[1:], "tucker2", 1.5)
    small, _ = distribution_aware(layer, [x], plan, sequential=True)
    assert tdlib.count(small, x.shape[1:]).params == plan.params
    assert tdlib.provenance(small).layers == dict(plan) and tdlib.provenance(small).plan == plan.to_dict()


@pytest.mark.parametrize("sequential", [False, True])
def test_nan_in_a_weight_names_the_layer(sequential):
    model, x = torch.nn.Sequential(torch.nn.Conv2d(6, 8, 3)), torch.randn(64, 6, 6, 6)
    plan = tdlib.plan(model, x.shape[1:], "tucker2", 1.5)
    torch.nn.init.constant_(model[0].weight, float("nan"))
    with pytest.raises(NonFiniteError, match="layer '0'"):
        distribution_aware(model, [x], plan, sequential=sequential)


@pytest.mark.parametrize("sequential", [False, True])
def test_bias_correction_restores_mean_outputs(trained, digits, batches, sequential):
    plan = tdlib.plan(trained, (1, 8, 8), "tucker2", ranks={"conv2": (4, 4)})

    def shift(network):
        """Of the mean output of the BatchNorm behind the layer, per channel."""
        found = []
        for net in (trained, network):
            with net.bn2.register_forward_hook(lambda _, __, out: found.append(out.mean((0, 2, 3)))):
                logits(net, [torch.cat(batches)])
        return float((found[0] - found[1]).norm() / found[0].norm())

    plain, corrected = (
        distribution_aware(
            trained, digits, plan, samples=SAMPLES, sequential=sequential, bias_correction=correction
        )[0]
        for correction in (False, True)
    )
    assert shift(corrected) < 0.02 < 0.05 < shift(plain)


def test_recalibration_takes_batchnorm_statistics_of_the_calibration_inputs(
    trained, digits, uniform, batches, kl
):
    plain, fresh = (
        distribution_aware(trained, digits, uniform, samples=SAMPLES, recalibrate=again)[0]
        for again in (False, True)
    )
    assert kl(fresh) < 0.6 * kl(plain)
    assert same_weights(fresh, tdlib.recalibrate_batchnorm(plain, batches))


# -- through compress


def test_the_papers_method_and_ours_have_names_of_their_own(trained, digits, uniform, by_harm):
    quiet = {"samples": SAMPLES, "progress": False}
    best = tdlib.compress(trained, "sequential", digits, ratio=3, **quiet)
    steps = {"sequential": True, "weigh_outputs": True}
    assert same_weights(best, distribution_aware(trained, digits, by_harm, samples=SAMPLES, **steps)[0])
    settings = tdlib.provenance(best).report["settings"]
    assert settings.items() >= {**steps, "rule": "global"}.items()
    paper = tdlib.compress(trained, "distribution-aware", digits, ratio=3, **quiet)
    assert same_weights(paper, distribution_aware(trained, digits, uniform, samples=SAMPLES)[0])
    steps |= {"rule": "global"}  # under either name the arguments decide
    switched = tdlib.compress(trained, "distribution-aware", digits, ratio=3, **steps, **quiet)
    off = {"rule": "uniform", "weigh_outputs": False, "sequential": False}
    plain = tdlib.compress(trained, "sequential", digits, ratio=3, **off, **quiet)
    assert same_weights(switched, best) and same_weights(plain, paper)
    theirs, ours = (tdlib.provenance(net).report["after"]["test"] for net in (paper, best))
    assert theirs < ours - 10


def test_unlabelled_batches_are_enough_and_gone_through_once(trained, digits):
    inputs = [x for x, _ in digits.batches("train", 100)]
    settings = {"ratio": 3, "samples": 250, "progress": False}
    listed, once = (
        tdlib.compress(trained, "sequential", source, **settings) for source in (inputs, iter(inputs))
    )
    assert same_weights(listed, once)
    assert not {"dense", "before", "after"} & set(tdlib.provenance(once).report)
    assert tdlib.train.accuracies(once, digits)["test"] > 90


def test_statistics_of_other_data_can_be_used(trained, digits, tmp_path):
    inputs = [x.flip(3) for x, _ in digits.batches("train", 200)]
    found = tdlib.statistics(trained, inputs)
    found.save(tmp_path / "other.safetensors")
    settings = {"ratio": 2, "samples": 200, "sequential": False, "progress": False}
    small = tdlib.compress(
        trained, "sequential", digits, statistics=str(tmp_path / "other.safetensors"), **settings
    )
    report = tdlib.provenance(small).report
    assert report["settings"]["sequential"] is False and report["before"]["test"] > 50
    assert {row["layer"] for row in report["history"]["layers"]} == set(report["plan"]["layers"])
    # ranks by harm and outputs weighed all the same: H is taken from the data, Sigma from the file
    batches = calibration_batches(digits, 200)
    H = tdlib.statistics(trained, batches, ["conv[234]"], output_weights=True).weights
    both = tdlib.Statistics(found, found.means, found.counts, H)
    plan = planned(trained, digits, format="tucker2", ratio=2, rule="global", statistics=both)
    assert same_weights(small, tdlib.decompose(trained, plan, both))
    with pytest.raises(CheckpointError):
        tdlib.compress(trained, "sequential", digits, statistics="nowhere.safetensors", **settings)
    paper = tdlib.compress(trained, "distribution-aware", digits, ratio=2, statistics=found, progress=False)
    plan = planned(trained, digits, format="tucker2", ratio=2)
    assert same_weights(paper, tdlib.decompose(trained, plan, found))


@pytest.mark.parametrize(
    ("method", "asked", "excluded"),
    [
        ("distribution-aware", {"sequential": True}, "sequential"),
        ("distribution-aware", {"samples": 200}, "samples"),
        ("sequential", {}, "sequential"),
    ],
)
def test_what_statistics_exclude_is_refused(trained, digits, method, asked, excluded):
    found = tdlib.statistics(trained, [x for x, _ in digits.batches("train", 200)])
    with pytest.raises(TdlibError, match=f"{excluded} and statistics exclude one another"):
        tdlib.compress(trained, method, digits, ratio=2, statistics=found, progress=False, **asked)


def test_a_ratio_that_cannot_be_reached_is_named_before_anything_is_measured(trained, digits, monkeypatch):
    monkeypatch.setattr("tdlib.calibration.statistics", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(BudgetError, match="best reachable"):
        tdlib.compress(trained, "distribution-aware", digits, ratio=1e4, progress=False)


def test_explicit_ranks(trained, digits):
    small = tdlib.compress(
        trained, "sequential", digits, ranks={"conv[34]": (6, 6)}, samples=200, progress=False
    )
    about = tdlib.provenance(small)
    assert {n: layer.ranks for n, layer in about.layers.items()} == {"conv3": (6, 6), "conv4": (6, 6)}
    assert about.plan["rule"] == "explicit"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"ratio": 1e4}, BudgetError, "best reachable"),
        ({"ratio": 2, "format": "tr"}, UnknownName, "cp, cp4, tt, tucker2"),
        ({"ratio": 2, "format": "svd"}, UnknownName, "cp, cp4, tt, tucker2"),
        ({"ratio": 2, "by": "flops"}, UnknownName, "macs"),
        ({"ratio": 2, "skip": ["conv*", "linear"]}, TdlibError, "nothing to compress"),
        ({"ranks": {"conv9": (2, 2)}}, UnknownName, "conv2"),
    ],
)
def test_what_cannot_be_done_says_so(trained, digits, settings, error, message):
    with pytest.raises(error, match=message):
        tdlib.compress(trained, "distribution-aware", digits, samples=100, progress=False, **settings)


def test_no_inputs_are_an_error(trained, uniform):
    for run in (
        lambda: tdlib.compress(trained, "distribution-aware", [], ratio=2),
        lambda: distribution_aware(trained, [], uniform),
    ):
        with pytest.raises(DataError, match="no calibration inputs"):
            run()


@pytest.mark.parametrize("sequential", [True, False])
def test_progress_shows_every_stage_and_changes_nothing(trained, digits, capsys, sequential):
    arguments = {"ratio": 2.0, "samples": 40, "sequential": sequential}
    quiet = tdlib.compress(trained, "sequential", digits, progress=False, **arguments)
    assert capsys.readouterr().err == ""
    shown = tdlib.compress(trained, "sequential", digits, **arguments)
    bars = capsys.readouterr().err
    assert all(stage in bars for stage in ("statistics", "sensitivity", "ranks", "decomposition"))
    assert same_weights(quiet, shown)


class Grid(torch.nn.Module):
    """As ConvNeXt and Swin have it: linear layers on (N, H, W, C), here with H equal to their outputs."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 2, 2)
        self.wide, self.narrow = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)
        self.head = torch.nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x).permute(0, 2, 3, 1)
        x = x + self.narrow(torch.nn.functional.gelu(self.wide(x)))
        return self.head(x.mean((1, 2)))


@pytest.mark.parametrize("size", [32, 16, 12])
def test_linear_layers_on_grids_are_compressed_by_default(size):
    torch.manual_seed(0)
    model, batches = Grid().eval(), [torch.randn(20, 3, size, size) for _ in range(2)]
    small = tdlib.compress(model, "sequential", batches, ratio=1.3, progress=False)
    assert {"wide", "narrow"} & set(tdlib.provenance(small).layers)
    assert small(batches[0]).shape == (20, 5)


def test_memory_is_asked_for_before_anything_is_measured():
    """Also what the decomposition takes beside the statistics."""
    model, batches = Grid().eval(), [torch.randn(20, 3, 16, 16)]
    sigmas = 8 * (8**2 + 16**2)
    for limit in (0, sigmas + 2 * 8 * 16**2):  # enough for the statistics alone
        with pytest.raises(MemoryLimitError, match=r"Sigma of 2 layers \(the largest: narrow"):
            tdlib.compress(model, "sequential", batches, ratio=1.3, memory_limit=limit, progress=False)
    small = tdlib.compress(model, "sequential", batches, ratio=1.3, memory_limit=2**20, progress=False)
    assert tdlib.provenance(small).layers


def test_a_decomposition_under_sigma_asks_for_memory_first(monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(30, 20))
    statistics = tdlib.statistics(model, [torch.randn(50, 30)])
    plan = {"0": {"format": "svd", "ranks": [2]}}
    monkeypatch.setattr("tdlib.memory.free", lambda device: 1000)
    with pytest.raises(MemoryLimitError, match=r"layer '0' under its Sigma \(30 x 30\)"):
        tdlib.decompose(model, plan, statistics)
    assert tdlib.decompose(model, plan)


@pytest.mark.parametrize("format", ["tucker2", "tt", "cp"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_blank_images_still_give_a_network(trained, format, value):
    batches = [torch.full((8, 1, 8, 8), value)] * 2
    with pytest.warns(UserWarning, match="only .* patches"):
        small = tdlib.compress(trained, "sequential", batches, ratio=2, format=format, progress=False)
    assert all(bool(torch.isfinite(p).all()) for p in small.parameters())
