"""RsTD: plans of shuffled kernels, training of their cores, and the claim for it."""

from __future__ import annotations

import pytest
import torch

import tdlib
from tdlib.errors import BudgetError, UnknownName
from tdlib.methods.rstd import FORMATS, rstd, shuffled_plan

TRAINING = {"batch_size": 64, "device": "cpu", "progress": False}


def net(digits, width: int = 16) -> torch.nn.Module:
    torch.manual_seed(0)
    return tdlib.models.build("cnn", digits.classes, input_shape=digits.input_shape, width=width)


@pytest.mark.parametrize("format", FORMATS)
def test_plans_meet_the_ratio_with_permutations_of_their_own(format, digits) -> None:
    plan = shuffled_plan(net(digits), digits, format=format, ratio=4.0, seed=1)
    assert plan.params_ratio == pytest.approx(4.0, rel=0.02) and plan.macs_ratio < 1
    seeds = [layer.options["seed"] for layer in plan.values()]
    assert len(set(seeds)) == len(seeds) == 3
    again = shuffled_plan(net(digits), digits, format=f"shuffled-{format}", ratio=4.0, seed=1)
    other = shuffled_plan(net(digits), digits, format=format, ratio=4.0, seed=2)
    assert dict(again) == dict(plan) and not set(seeds) & {layer.options["seed"] for layer in other.values()}


def test_the_unshuffled_counterparts(digits) -> None:
    arms = {
        "shuffled": {}, "folded": {"shuffle": False}, "three": {"order": 3},
        "kernel": {"shuffle": False, "modes": "kernel"},
    }  # fmt: skip
    layers = {arm: shuffled_plan(net(digits), digits, ratio=4.0, **arms[arm])["conv4"] for arm in arms}
    extents = {arm: layer.bind((32, 32, 3, 3)).extents for arm, layer in layers.items()}
    assert [arm for arm, layer in layers.items() if layer.options["shuffle"]] == ["shuffled", "three"]
    assert extents["shuffled"] == extents["folded"] and len(extents["folded"]) == 4
    assert len(extents["three"]) == 3 and extents["kernel"] == (32, 32, 3, 3)


@pytest.mark.parametrize("format", FORMATS)
def test_cores_train_from_scratch_and_are_saved_and_loaded(format, digits, trained, tmp_path) -> None:
    plan = shuffled_plan(trained, digits, ratio=2.0, seed=2, format=format)
    small, tables = rstd(trained, digits, plan, epochs=2, seed=2, **TRAINING)
    rows = tables["cores"]
    assert len(rows) == 2 and rows[1]["train_loss"] < rows[0]["train_loss"]
    dense, cost = (tdlib.count(m, digits.input_shape).weights for m in (trained, small))
    assert dense / cost == pytest.approx(plan.params_ratio)
    tdlib.save(small, tmp_path / "small.safetensors")
    loaded = tdlib.load(tmp_path / "small.safetensors")
    x = torch.randn(4, *digits.input_shape)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), small.eval()(x))


def test_the_result_is_a_function_of_the_seed_alone(digits) -> None:
    data, model = tdlib.data.load("digits", limit=128), net(digits, width=8)

    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed + 10)
        plan = shuffled_plan(model, data, ratio=2.0, seed=seed)
        small, _ = rstd(model, data, plan, epochs=1, seed=seed, **TRAINING)
        return tdlib.to_dense(small.conv4).detach()

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))


def test_trained_kernels_can_be_projected_instead(digits, trained) -> None:
    plan = shuffled_plan(trained, digits, ratio=2.0)
    small = tdlib.decompose(trained, plan)
    for name, layer in plan.items():
        weight = trained.get_submodule(name).weight.detach()
        nearest = layer.bind(weight.shape).project(weight, layer.ranks)
        torch.testing.assert_close(tdlib.to_dense(small.get_submodule(name)), nearest, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"ratio": 2.0, "by": "macs"}, BudgetError, "params"),
        ({"ratio": 2.0, "format": "svd"}, UnknownName, "tucker"),
        ({"ratio": 500.0}, BudgetError, "reach"),
    ],
)
def test_what_cannot_be_planned_says_so(settings, error, message, digits) -> None:
    with pytest.raises(error, match=message):
        shuffled_plan(net(digits), digits, **settings)


def test_shuffled_networks_keep_their_accuracy_over_a_wide_range_of_ratios(digits) -> None:
    model, found = net(digits), {}
    for arm, options in {"shuffled": {}, "kernel": {"shuffle": False, "modes": "kernel"}}.items():
        for ratio in (2.0, 16.0):
            plan = shuffled_plan(model, digits, ratio=ratio, **options)
            small, _ = rstd(model, digits, plan, epochs=7, lr=0.1, **TRAINING)
            found[arm, ratio] = tdlib.train.accuracies(small, digits)["test"]
    assert min(found["shuffled", 2.0], found["shuffled", 16.0]) > 85
    fall = {arm: found[arm, 2.0] - found[arm, 16.0] for arm in ("shuffled", "kernel")}
    assert fall["shuffled"] < fall["kernel"] - 5
