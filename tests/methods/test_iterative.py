"""Iterative decomposition: ranks of the next pass, shrinking a chain, the budget, its claim."""

from __future__ import annotations

import math
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import tdlib
from tdlib.decompositions.tucker import tucker2
from tdlib.errors import BudgetError, NonFiniteError, TdlibError, UnknownName
from tdlib.formats import get_format, to_dense
from tdlib.formats.recompression import Recompression
from tdlib.methods.iterative import goal, iterative
from tdlib.planning import Plan
from tdlib.planning.budget import make_budget, spent
from tdlib.planning.candidates import candidates
from tdlib.planning.shrinking import accept, coupling_of, lowest, next_ranks, trim, tucker_ranks, weaken
from tdlib.train import evaluate, learning_rate, recalibrated, reestimate_batchnorm

TRAINING = {"batch_size": 64, "device": "cpu", "progress": False}


def net(digits, name: str = "cnn", **kw: int) -> nn.Module:
    torch.manual_seed(0)
    return tdlib.models.build(name, digits.classes, input_shape=digits.input_shape, **kw)


def fresh_accuracy(model: nn.Module, digits) -> float:
    return evaluate(recalibrated(model, digits), digits)["accuracy"]


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
    bound, most = get_format("tucker2").bind(shape), math.prod(shape) / factor
    beta = coupling_of(shape)
    r_out, r_in = tucker_ranks(shape, most, beta)
    assert bound.cost((r_out, r_in))[0] <= most
    assert bound.cost((math.ceil(beta * (r_in + 1)) + 1, r_in + 1))[0] > most
    assert r_out == pytest.approx(beta * r_in, abs=beta + 1)


@pytest.mark.parametrize("format", ["tucker2", "cp"])
def test_next_ranks_only_fall_and_stay_above_the_least(format, digits, trained) -> None:
    for site in sites_of(trained, digits, format, skip=()):
        kernel, now = trained.get_submodule(site.name).weight.detach(), None
        for rule in ("nx", "vbmf", "nx", "nx"):
            ranks = next_ranks(site, now, kernel, rule, 0.5, 2.0, 2)
            assert len(ranks) == len(site.bounds)
            assert all(r <= s for r, s in zip(ranks, now or ranks, strict=True))
            assert all(r >= min(2, bound) for r, bound in zip(ranks, site.bounds, strict=True))
            now = ranks


@pytest.mark.parametrize("by", ["macs", "params"])
@pytest.mark.parametrize("ratio", [1.5, 3.0, 6.0])
def test_the_last_pass_is_trimmed_to_the_budget(by, ratio, digits) -> None:
    model = net(digits, "resnet20")
    sites = sites_of(model, digits, by=by)
    budget = make_budget(tdlib.count(model, digits.input_shape).by(by), sites, ratio, by)
    now, lowest = dict.fromkeys(s.name for s in sites), {s.name: (1, 1) for s in sites}
    choice = trim(sites, now, accept(sites, now, lowest), budget)
    assert budget.met(spent(sites, choice))
    assert all(choice[s.name] is None or s.cost(choice[s.name]) < s.cost(None) for s in sites)
    again = trim(sites, choice, lowest, make_budget(budget.total, sites, ratio * 1.3, by))
    for name, ranks in again.items():
        assert all(a <= b for a, b in zip(ranks, choice[name] or ranks, strict=True))


@pytest.mark.parametrize(
    ("format", "shape", "published", "of_three"),
    [
        ("tucker2", (64, 32, 3, 3), (8, 8), (3, 3)),
        ("tucker2", (16, 4, 3, 3), (8, 4), (3, 3)),  # no more than the full rank
        ("tucker2", (64, 32, 1, 1), (2,), (3,)),
        ("tucker2", (10, 64), (8,), (3,)),
        ("cp", (64, 32, 3, 3), (2,), (3,)),
    ],
)
def test_the_lowest_ranks_are_those_of_the_authors_code(format, shape, published, of_three) -> None:
    site = SimpleNamespace(kernel=get_format(format).bind(shape))
    site.bounds = site.kernel.bounds
    assert lowest(site, None) == published
    assert lowest(site, 3) == of_three


# -- shrinking a chain


CHAINS = [
    (lambda: nn.Conv2d(10, 12, 3, stride=2, padding=1, padding_mode="reflect"), (8, 7), (4, 3)),
    (lambda: nn.Conv2d(10, 12, (3, 1), dilation=2, bias=False), (6, 6), (6, 2)),
    (lambda: nn.Conv2d(10, 12, 1, stride=2), (7,), (3,)),
    (lambda: nn.Linear(10, 12), (8,), (2,)),
]


def site(layer: nn.Module, first: tuple[int, ...], orthogonal: bool) -> Recompression:
    """The layer decomposed at `first` and then changed as by fine-tuning: outer factors not orthonormal."""
    found = Recompression("layer", get_format("tucker2").bind(layer.weight.shape), layer, orthogonal)
    found.shrink(first)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in found.module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return found


@pytest.mark.parametrize(("make", "first", "second"), CHAINS)
def test_shrinking_again_is_the_projection_of_the_kernel_as_fine_tuned(make, first, second) -> None:
    torch.manual_seed(0)
    layer = make()
    found, published = site(layer, first, orthogonal=True), site(layer, first, orthogonal=False)
    bound, before = found.kernel, found.module
    kernel, bias = to_dense(before).detach(), before[-1].bias
    torch.testing.assert_close(to_dense(found.shrink(first)), kernel, atol=1e-5, rtol=1e-4)
    after = found.shrink(second)
    assert len(after) == len(before)  # the chain never grows
    assert [tuple(p.weight.shape[:2]) for p in after] != [tuple(p.weight.shape[:2]) for p in before]
    torch.testing.assert_close(to_dense(after), bound.project(kernel, second), atol=1e-3, rtol=1e-3)
    assert (bias is None and after[-1].bias is None) or torch.equal(after[-1].bias, bias)
    ours, theirs = ((kernel - to_dense(s)).norm() for s in (after, published.shrink(second)))
    assert ours <= theirs * (1 + 1e-5)


def test_the_published_step_decomposes_the_core_alone() -> None:
    torch.manual_seed(0)
    found = site(nn.Conv2d(10, 12, 3, padding=1), (8, 7), orthogonal=False)
    v, g, u = (member.weight.detach() for member in found.module)
    core, (a, b) = tucker2(g, (4, 3))
    by_hand = torch.einsum("oa,abkl,ib->oikl", u.flatten(1) @ a, core, v.flatten(1).mT @ b)
    torch.testing.assert_close(to_dense(found.shrink((4, 3))), by_hand, atol=1e-5, rtol=1e-4)


def test_a_cp_chain_is_fitted_to_its_kernel() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 8, 3, padding=1)
    bound = get_format("cp").bind(layer.weight.shape)
    found = Recompression("layer", bound, layer, True)
    found.shrink((20,))
    kernel = to_dense(found.module).detach()
    torch.testing.assert_close(to_dense(found.shrink((6,))), bound.project(kernel, (6,)))


# -- the method


@pytest.mark.parametrize(
    ("format", "rule", "by", "ratio"),
    [("tucker2", "nx", "macs", 4.0), ("tucker2", "vbmf", "params", 3.0), ("cp", "nx", "macs", 2.0)],
)
def test_the_way_to_the_budget(format, rule, by, ratio, digits, trained, tmp_path) -> None:
    plan, seen = goal(trained, digits, ratio=ratio, by=by, format=format, least=2), []

    def look(network: nn.Module) -> None:
        seen.append(tdlib.count(network, digits.input_shape).by(by))

    settings = {"rule": rule, "stage_epochs": 1, "least": 2, "group_size": 2, "on_decomposed": look}
    small, tables = iterative(trained, digits, plan, **settings, **TRAINING)
    dense, cost = (tdlib.count(m, digits.input_shape) for m in (trained, small))
    assert dense.by(by) / cost.by(by) == pytest.approx(plan.ratio, rel=0.02)
    made = Plan.from_dict(tdlib.provenance(small).plan)
    assert made.ratio == pytest.approx(dense.by(by) / cost.by(by))
    assert dict(made) == tdlib.provenance(small).layers
    once = tdlib.decompose(trained, made)
    assert {k: v.shape for k, v in once.state_dict().items()} == {
        k: v.shape for k, v in small.state_dict().items()
    }

    ranks, stages = tables["ranks"], tables["stages"]
    passes = ranks[-1]["pass"]
    assert passes > 1 and len(ranks) == passes * len(plan)
    for one, following in zip(ranks, ranks[len(plan) :], strict=False):
        assert all(b <= a for a, b in zip(one["ranks"], following["ranks"], strict=True))
    last = {row["layer"]: tuple(row["ranks"]) for row in ranks[-len(plan) :] if not row["dense"]}
    assert last == made.ranks
    assert len(seen) == len(stages) and seen == sorted(seen, reverse=True)  # called before every fine-tuning
    assert [stage["ratio"] for stage in stages] == pytest.approx([dense.by(by) / cost for cost in seen])
    assert len(tables["finetune"]) == sum(stage["epochs"] for stage in stages) == len(stages)
    if rule == "nx" and format == "tucker2":
        assert [s["layers"] for s in stages if s["pass"] == 1] == [["conv2", "conv3"], ["conv4"]]

    tdlib.save(small, tmp_path / "small.safetensors")
    x = torch.randn(3, *digits.input_shape)
    with torch.no_grad():
        loaded = tdlib.load(tmp_path / "small.safetensors")
        torch.testing.assert_close(loaded(x), small.eval()(x), atol=1e-4, rtol=1e-3)


def test_fine_tuning_stops_early_and_keeps_its_best_epoch(digits, trained) -> None:
    plan = goal(trained, digits, ratio=2.0, by="macs")
    settings = {"rule": "nx", "stage_epochs": 20, "patience": 2, "stage_lr": 0.5, "schedule": "constant"}
    small, tables = iterative(trained, digits, plan, **settings, **TRAINING)
    lost = []
    for stage in tables["stages"]:
        rows = [row["val_accuracy"] for row in tables["finetune"] if row["pass"] == stage["pass"]]
        assert stage["epochs"] == len(rows) < 20 and max(rows) in rows[:-2]
        assert stage["val_after"] == pytest.approx(max(rows))
        lost.append(max(rows) - rows[-1])
    assert max(lost) > 1  # points that the last epoch had lost again
    assert tdlib.train.accuracies(small, digits)["val"] == pytest.approx(stage["val_after"])
    assert [row["epoch"] for row in tables["finetune"]] == list(range(len(tables["finetune"])))


def test_one_schedule_goes_on_over_all_passes(digits, trained) -> None:
    plan = goal(trained, digits, ratio=4.0, by="macs", least=2)
    settings = {"rule": "nx", "factor": 2.0, "least": 2, "stage_epochs": 1, "stage_lr": 0.02}
    tables = iterative(trained, digits, plan, one_schedule=True, **settings, **TRAINING)[1]
    stages, steps = len(tables["stages"]), digits.steps("train", 64, drop_last=True)
    ends = [learning_rate(k + 1 - 1 / steps, base=0.02, epochs=stages) for k in range(stages)]
    assert stages > 1 and [row["lr"] for row in tables["finetune"]] == pytest.approx(ends)


def test_fine_tuning_starts_with_fresh_batchnorm_statistics(digits, trained) -> None:
    plan = goal(trained, digits, ratio=4.0, by="macs", least=2)
    decomposed: list[nn.Module] = []
    settings: dict[str, Any] = {"rule": "nx", "factor": 10.0, "stage_epochs": 0, "least": 2, "seed": 3}
    settings["on_decomposed"] = lambda network: decomposed.append(deepcopy(network))
    settings |= TRAINING
    fresh, kept = (iterative(trained, digits, plan, batchnorm=on, **settings) for on in (True, False))
    assert len(decomposed) == 2  # one step each, seen before the statistics are touched
    for network in (*decomposed, kept[0]):
        assert torch.equal(network.bn2.running_mean, trained.bn2.running_mean)
    reestimate_batchnorm(decomposed[0], digits, seed=3)
    torch.testing.assert_close(fresh[0].bn2.running_mean, decomposed[0].bn2.running_mean)
    assert not torch.equal(fresh[0].bn2.running_mean, trained.bn2.running_mean)
    assert fresh[1]["stages"][-1]["val_before"] > kept[1]["stages"][-1]["val_before"]


def test_the_same_seed_gives_the_same_network(digits, trained) -> None:
    plan = goal(trained, digits, ratio=2.0, by="macs")
    runs = [iterative(trained, digits, plan, rule="nx", stage_epochs=1, **TRAINING)[0] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*(run.state_dict().values() for run in runs), strict=True))


def test_biases_and_linear_layers_go_along(digits) -> None:
    model = net(digits, "lstm").eval()
    plan = goal(model, digits, ratio=1.5, skip=(), least=2)
    small, tables = iterative(model, digits, plan, rule="nx", stage_epochs=0, least=2, **TRAINING)
    assert list(plan) and all(isinstance(small.get_submodule(name), nn.Sequential) for name in plan)
    torch.testing.assert_close(small.input_to_hidden[-1].bias, model.input_to_hidden.bias)
    assert tables["finetune"] == [] and all(s["val_before"] == s["val_after"] for s in tables["stages"])


@pytest.mark.parametrize(
    ("goals", "settings", "error", "message"),
    [
        ({"ratio": 400.0}, {}, BudgetError, "reach"),
        ({"ratio": 12.0, "least": 12}, {}, BudgetError, "lower `least`"),
        ({"ratio": 12.0}, {}, BudgetError, "the authors' bounds.*least=2"),
        ({"ratio": 2.0}, {"rule": "nx", "weakening": 0.5}, TdlibError, "ignored"),
        ({"ratio": 2.0}, {"one_schedule": True}, TdlibError, "beforehand"),
        ({"ratio": 2.0}, {"rule": "best"}, UnknownName, "vbmf"),
        ({"ratio": 2.0, "format": "tt"}, {}, UnknownName, "tucker2"),
        ({"ratio": 2.0}, {"patience": 0}, TdlibError, "patience"),
        ({"ratio": 2.0}, {"group_size": 0}, TdlibError, "group_size"),
        ({"ratio": 2.0}, {"weakening": 0.0}, TdlibError, "weakening"),
        ({"ratio": 2.0}, {"factor": 1.0}, TdlibError, "factor"),
        ({"ratio": 2.0, "skip": ("nowhere",)}, {}, UnknownName, "conv2"),
    ],
)
def test_bad_input_is_named_before_anything_is_decomposed(goals, settings, error, message, digits) -> None:
    model, seen = net(digits, width=16), []
    with pytest.raises(error, match=message):
        plan = goal(model, digits, by="macs", **goals)
        iterative(model, digits, plan, on_decomposed=seen.append, **settings, **TRAINING)
    assert not seen


def test_non_finite_weights_name_their_layer(digits) -> None:
    model = net(digits, width=16)
    plan = goal(model, digits, ratio=2.0, by="macs")
    with torch.no_grad():
        model.conv3.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="conv3"):
        iterative(model, digits, plan, rule="nx", **TRAINING)


# -- the claim


def test_the_last_step_keeps_far_more_than_decomposing_at_once(digits, trained) -> None:
    """Right after the last decomposition, with fresh BatchNorm statistics, at equal ranks."""
    plan, after_step = goal(trained, digits, ratio=4.0, by="macs", least=2), []
    small, _ = iterative(
        trained, digits, plan, rule="nx", least=2, stage_epochs=3, patience=2, stage_lr=0.03,
        on_decomposed=lambda network: after_step.append(fresh_accuracy(network, digits)), **TRAINING,
    )  # fmt: skip
    once = tdlib.decompose(trained, Plan.from_dict(tdlib.provenance(small).plan))
    assert after_step[-1] > fresh_accuracy(once, digits) + 15
    assert fresh_accuracy(small, digits) > 90
