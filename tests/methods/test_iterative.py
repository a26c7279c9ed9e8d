"""Iterative decomposition: ranks of the next pass, shrinking a chain, budget, early stopping, its claim."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import tdlib
from tdlib.errors import BudgetError, NonFiniteError, TdlibError, UnknownName
from tdlib.layers import get_format, project, to_dense
from tdlib.layers.recompress import chain_factors, orthogonalise, shrink
from tdlib.methods import iterative
from tdlib.methods.stepwise import EarlyStopping, recalibrated
from tdlib.planning.budget import make_budget, spent
from tdlib.planning.candidates import candidates
from tdlib.planning.shrinking import accept, coupling_of, next_ranks, trim, tucker_ranks, weaken
from tdlib.train import Context

TRAINING = {"batch_size": 64, "device": "cpu", "progress": False}


@pytest.fixture(scope="module")
def digits():
    return tdlib.data.load("digits")


def net(digits, seed: int = 0, width: int = 16, name: str = "cnn") -> nn.Module:
    torch.manual_seed(seed)
    kw = {"width": width} if name == "cnn" else {}
    return tdlib.models.build(name, digits.classes, input_shape=digits.input_shape, **kw)


@pytest.fixture(scope="module")
def trained(digits):
    model = net(digits)
    tdlib.train.fit(model, digits, epochs=8, lr=0.1, **TRAINING)
    return model


def sites_of(model: nn.Module, data, format: str = "tucker2", by: str = "macs", skip=("conv1", "linear")):
    return candidates(model, tdlib.count(model, data.input_shape), format, by, skip, {})[0]


# -- ranks of the next pass


@pytest.mark.parametrize(
    ("size", "found", "weakening", "least", "expected"),
    [
        (64, 24, 0.8, 1, 32),  # 64 - 0.8 * 40
        (64, 24, 1.0, 1, 24),
        (64, 0, 0.8, 1, 64),  # nothing but noise: kept
        (64, 2, 1.0, 8, 8),  # lower bound
        (4, 1, 1.0, 8, 4),  # a bound above the extent does not raise it
        (10, 10, 0.5, 1, 10),
    ],
)
def test_weakening(size, found, weakening, least, expected) -> None:
    assert weaken(size, found, weakening, least) == expected


@pytest.mark.parametrize("shape", [(64, 64, 3, 3), (128, 32, 3, 3), (16, 48, 5, 5), (32, 32, 1, 7)])
@pytest.mark.parametrize("factor", [1.5, 3.0])
def test_constant_reduction_solves_its_quadratic(shape, factor) -> None:
    goal, row = math.prod(shape) / factor, get_format("tucker2")
    beta = coupling_of(shape, None)
    r_out, r_in = tucker_ranks(shape, goal, beta)
    assert row.cost(shape, (r_out, r_in))[0] <= goal
    assert row.cost(shape, (math.ceil(beta * (r_in + 1)) + 1, r_in + 1))[0] > goal
    assert r_out == pytest.approx(beta * r_in, abs=beta + 1)


def test_next_ranks_only_fall_and_stay_above_the_least(digits, trained) -> None:
    for format in ("tucker2", "cp"):
        for site in sites_of(trained, digits, format, skip=()):
            kernel = trained.get_submodule(site.name).weight.detach()
            now, core = None, kernel
            for rule in ("nx", "vbmf", "nx", "nx"):
                ranks = next_ranks(site, now, core, rule, 0.5, 2.0, 2)
                assert len(ranks) == len(site.bounds)
                assert all(r <= s for r, s in zip(ranks, now or ranks, strict=True))
                assert all(r >= min(2, bound) for r, bound in zip(ranks, site.bounds, strict=True))
                now = ranks


@pytest.mark.parametrize("by", ["macs", "params"])
@pytest.mark.parametrize("ratio", [1.5, 3.0, 6.0])
def test_the_last_pass_is_trimmed_to_the_budget(by, ratio, digits) -> None:
    model = net(digits, name="resnet20")
    sites = sites_of(model, digits, by=by)
    budget = make_budget(tdlib.count(model, digits.input_shape).by(by), sites, ratio, by)
    now = dict.fromkeys((s.name for s in sites), None)
    wanted = accept(sites, now, {s.name: (1, 1) for s in sites})
    choice = trim(sites, now, wanted, budget)
    assert budget.met(spent(sites, choice))
    assert all(choice[s.name] is None or s.cost(choice[s.name]) < s.cost(None) for s in sites)
    again = trim(
        sites, choice, {s.name: (1, 1) for s in sites}, make_budget(budget.total, sites, ratio * 1.3, by)
    )
    for name, ranks in again.items():
        assert all(a <= b for a, b in zip(ranks, choice[name] or ranks, strict=True))


# -- shrinking a chain


CHAINS = [
    (lambda: nn.Conv2d(10, 12, 3, stride=2, padding=1, padding_mode="reflect"), "tucker2", (8, 7), (4, 3)),
    (lambda: nn.Conv2d(10, 12, (3, 1), dilation=2, bias=False), "tucker2", (6, 6), (6, 2)),
    (lambda: nn.Conv2d(10, 12, 1, stride=2), "tucker2", (7,), (3,)),
    (lambda: nn.Linear(10, 12), "tucker2", (8,), (2,)),
]


def untuned(module: nn.Module) -> nn.Module:
    """As after fine-tuning: outer factors that are not orthonormal."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize(("make", "format", "first", "second"), CHAINS)
def test_shrinking_keeps_the_chain_as_short_as_it_was(make, format, first, second) -> None:
    torch.manual_seed(0)
    layer, row = make(), get_format(format)
    chain = untuned(row.build(layer, row.factorise(layer.weight.detach(), first)))
    kernel = to_dense(chain).detach()
    factors = chain_factors(chain)
    torch.testing.assert_close(row.compose(factors, layer.weight.shape), kernel)
    fixed = orthogonalise(factors)
    torch.testing.assert_close(row.compose(fixed, layer.weight.shape), kernel, atol=1e-5, rtol=1e-4)
    smaller = shrink(fixed, second)
    assert [tuple(f.shape) for f in smaller] == row.shapes(layer.weight.shape, second)
    rebuilt = row.build(layer, smaller)
    assert len(rebuilt) == len(chain)
    # With orthonormal outer factors it is the projection of the whole kernel, not only of the core.
    torch.testing.assert_close(to_dense(rebuilt), project(kernel, format, second), atol=1e-3, rtol=1e-3)
    best = (kernel - to_dense(rebuilt)).norm()
    published = row.compose(shrink(factors, second), layer.weight.shape)
    assert best <= (kernel - published).norm() * (1 + 1e-5)
    full = row.compose(shrink(factors, first), layer.weight.shape)
    torch.testing.assert_close(full, kernel, atol=1e-5, rtol=1e-4)


# -- early stopping


def test_early_stopping_counts_epochs_without_a_rise(digits) -> None:
    model = net(digits, width=8)
    ctx = Context(model, digits, torch.optim.SGD(model.parameters()), torch.device("cpu"), 9, 1)
    hook, stops = EarlyStopping(patience=2), []
    for ctx.epoch, accuracy in enumerate((50.0, 60.0, 60.0, 59.0)):
        ctx.row = {"val_accuracy": accuracy}
        hook.after_epoch(ctx)
        stops.append(ctx.stop)
    assert stops == [False, False, False, True]
    assert hook.epoch == 2 and hook.accuracy == 60.0  # the later of equals is kept
    other = EarlyStopping(patience=2)
    other.load_state_dict(hook.state_dict())
    assert (other.stale, other.epoch) == (hook.stale, hook.epoch)


def test_training_ends_when_a_hook_asks_for_it(digits) -> None:
    history = tdlib.train.fit(
        net(digits, width=8), digits, epochs=30, lr=1e-8, hooks=(EarlyStopping(patience=2),), **TRAINING
    )
    assert history.finished and 3 <= len(history.rows) <= 8


# -- the method


@pytest.mark.parametrize(
    ("format", "rule", "by", "ratio"),
    [("tucker2", "nx", "macs", 4.0), ("tucker2", "vbmf", "params", 3.0), ("cp", "nx", "macs", 2.0)],
)
def test_budget_path_and_report(format, rule, by, ratio, digits, trained, tmp_path) -> None:
    before = copy.deepcopy(trained.state_dict())
    small = iterative.compress(
        trained,
        digits,
        ratio=ratio,
        by=by,
        format=format,
        rule=rule,
        finetune_epochs=1,
        group_size=2,
        **TRAINING,
    )
    report = small._tdlib["report"]
    assert report[f"{by}_ratio"] == pytest.approx(ratio, rel=0.02)
    dense, cost = (tdlib.count(m, digits.input_shape) for m in (trained, small))
    assert dense.by(by) / cost.by(by) == pytest.approx(report[f"{by}_ratio"])
    assert all(torch.equal(before[k], v) for k, v in trained.state_dict().items())
    for name in iterative.final_ranks(small):
        assert len(small.get_submodule(name)) == 3  # however many passes
    assert report["passes"] > 1 and report["epochs"] == sum(s["epochs"] for s in report["stages"])
    assert len(report["ranks"]) == report["passes"] * 3
    last = {row["layer"]: row for row in report["ranks"] if row["pass"] == report["passes"]}
    for name, ranks in iterative.final_ranks(small).items():
        assert list(ranks) == last[name]["ranks"]
    for one, following in zip(report["stages"], report["stages"][1:], strict=False):
        assert following["ratio"] >= one["ratio"] * (1 - 1e-9)
    first = [stage["layers"] for stage in report["stages"] if stage["pass"] == 1]
    if rule == "nx" and format == "tucker2":
        assert first == [["conv4", "conv3"], ["conv2"]]  # last layers first
    tdlib.save(small, tmp_path / "small.safetensors")
    x = torch.randn(3, *digits.input_shape)
    with torch.no_grad():
        loaded = tdlib.load(tmp_path / "small.safetensors")
        torch.testing.assert_close(loaded(x), small.eval()(x), atol=1e-4, rtol=1e-3)


def test_one_shot_has_the_same_ranks_and_cost(digits, trained) -> None:
    small = iterative.compress(
        trained, digits, ratio=3.0, by="macs", rule="nx", finetune_epochs=1, **TRAINING
    )
    ranks, report = iterative.final_ranks(small), small._tdlib["report"]
    once = iterative.one_shot(trained, digits, ranks, epochs=1, by="macs", **TRAINING)
    assert iterative.final_ranks(once) == ranks
    assert once._tdlib["report"]["macs_ratio"] == pytest.approx(report["macs_ratio"])
    x = torch.randn(2, *digits.input_shape)
    assert tdlib.count(once, x.shape[1:]).macs == tdlib.count(small, x.shape[1:]).macs


def test_the_same_seed_gives_the_same_network(digits, trained) -> None:
    def run() -> dict[str, torch.Tensor]:
        settings = {"ratio": 2.0, "by": "macs", "rule": "nx", "finetune_epochs": 1}
        return iterative.compress(trained, digits, **settings, **TRAINING).state_dict()

    assert all(torch.equal(a, b) for a, b in zip(run().values(), run().values(), strict=True))


def test_biases_and_linear_layers_go_along(digits) -> None:
    """Without training the network of full-rank steps is the same function, biases included."""
    model = net(digits, name="lstm").eval()
    small = iterative.compress(
        model, digits, ratio=1.5, rule="nx", skip=(), finetune_epochs=0, **TRAINING
    ).eval()
    names = iterative.final_ranks(small)
    assert names and all(isinstance(small.get_submodule(name), nn.Sequential) for name in names)
    torch.testing.assert_close(small.input_to_hidden[-1].bias, model.input_to_hidden.bias)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"ratio": 400.0}, BudgetError, "reach"),
        ({"ratio": 12.0, "least": 12}, BudgetError, "least"),
        ({"ratio": 2.0, "rule": "best"}, UnknownName, "vbmf"),
        ({"ratio": 2.0, "format": "tt"}, UnknownName, "tucker2"),
        ({"ratio": 2.0, "patience": 0}, TdlibError, "patience"),
        ({"ratio": 2.0, "weakening": 0.0}, TdlibError, "weakening"),
        ({"ratio": 2.0, "factor": 1.0}, TdlibError, "factor"),
        ({"ratio": 2.0, "skip": ("nowhere",)}, UnknownName, "conv2"),
        ({"ratio": 2.0, "epoch": 3}, UnknownName, "valid|Valid"),
    ],
)
def test_bad_input_is_named_before_training(settings, error, message, digits) -> None:
    with pytest.raises(error, match=message):
        iterative.compress(net(digits), digits, by="macs", **settings, **TRAINING)


def test_non_finite_weights_name_their_layer(digits) -> None:
    model = net(digits)
    with torch.no_grad():
        model.conv3.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="conv3"):
        iterative.compress(model, digits, ratio=2.0, by="macs", rule="nx", **TRAINING)


# -- the claim


def test_the_last_step_keeps_far_more_than_decomposing_at_once(digits, trained) -> None:
    """Equal ranks, equal total epochs. Right after the last decomposition (fresh BatchNorm statistics)
    the iteration is far ahead; after all fine-tuning the two are level on these easy data."""
    settings = {"ratio": 4.0, "by": "macs", "rule": "nx", "factor": 1.5, "patience": 2}
    small = iterative.compress(trained, digits, finetune_epochs=3, finetune_lr=0.03, **settings, **TRAINING)
    report = small._tdlib["report"]
    once = iterative.one_shot(
        trained,
        digits,
        iterative.final_ranks(small),
        epochs=report["epochs"],
        by="macs",
        finetune_lr=0.03,
        **TRAINING,
    )
    other = once._tdlib["report"]
    assert other["epochs"] == report["epochs"] and other["macs_ratio"] == pytest.approx(report["macs_ratio"])
    assert report["recalibrated"]["test"] > other["recalibrated"]["test"] + 15
    assert report["after"]["test"] > other["after"]["test"] - 2.5
    assert recalibrated(small, digits)["test"] > 90
