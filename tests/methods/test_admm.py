"""ADMM: the steps are those of the equations, and they do to the weights what the paper says."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tdlib
from tdlib.data import ArraySplit, Bundle
from tdlib.errors import RankError, TdlibError, UnknownName
from tdlib.formats import get_format, project
from tdlib.formats.projection import Projection, truncation_error
from tdlib.methods.admm import ADMM, admm, pull, regularise, rho_for
from tdlib.methods.registry import planned
from tdlib.train import accuracies, fit

TRAINING = {"batch_size": 32, "seed": 0, "device": "cpu", "progress": False}


def small_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def small_data(n: int = 24) -> Bundle:
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 255, (n, 8, 8, 3), generator=g, dtype=torch.uint8)
    split = ArraySplit(images, torch.arange(n) % 4, (0.5,) * 3, (0.2,) * 3)
    return Bundle("noise", list("abcd"), (0.5,) * 3, (0.2,) * 3, (3, 8, 8), split, split, split)


def small_plan(format: str = "tt", ranks: tuple[int, ...] = (3, 3)) -> tdlib.Plan:
    return tdlib.plan(small_net(), (3, 8, 8), format=format, ranks={"2": ranks, "4": ranks})


def context(model: nn.Module, epoch: int = 0) -> SimpleNamespace:
    return SimpleNamespace(model=model, epoch=epoch, epochs=4, device=torch.device("cpu"), row={})


def started(model: nn.Module, plan: tdlib.Plan, **settings: object) -> ADMM:
    hook = ADMM(plan, **settings)
    hook.on_start(context(model))
    return hook


FORMATS = [(name, get_format(name).bind((8, 8, 3, 3)).uniform(0.4)) for name in ("tt", "tucker2", "tr")]


@pytest.mark.parametrize(("format", "ranks"), FORMATS)
def test_batched_projection_is_the_formats_own(format: str, ranks: tuple[int, ...]) -> None:
    model, plan = small_net(), small_plan(format, ranks)
    projection = Projection(model, plan)
    assert list(projection.groups.values()) == [["2", "4"]]
    kernels = {name: model.get_submodule(name).weight for name in plan}
    for name, z in projection(kernels).items():
        assert torch.allclose(z, project(kernels[name].detach(), format, ranks), atol=1e-5)
        assert not z.requires_grad


@pytest.mark.parametrize(("format", "ranks"), FORMATS[:2])  # TR-SVD is no exact projection
def test_a_projected_kernel_stays_where_it_is_and_decomposes_without_loss(
    format: str, ranks: tuple[int, ...]
) -> None:
    model, plan = small_net(), small_plan(format, ranks)
    with torch.no_grad():
        for name in plan:
            weight = model.get_submodule(name).weight
            weight.copy_(project(weight, format, ranks))
    assert truncation_error(model, plan)[0] < 1e-4
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(tdlib.decompose(model, plan)(x), model(x), atol=1e-4)


def test_training_with_the_hook_is_a_loop_written_by_hand() -> None:
    """Equations (2) to (4), the penalty differentiated by autograd, as the paper states them."""
    data, plan, rho, lr = small_data(), small_plan(), 0.3, 0.05
    hook, ours = ADMM(plan, rho), small_net()
    plain = {"batch_size": 8, "momentum": 0.9, "weight_decay": 0.0, "augment": None, "seed": 3}
    rows = fit(
        ours, data, epochs=3, lr=lr, schedule="constant", hooks=[hook],
        device="cpu", progress=False, **plain,
    ).rows  # fmt: skip

    model = small_net()
    w = {name: model.get_submodule(name).weight for name in plan}
    u = {name: torch.zeros_like(w[name]) for name in plan}
    sgd = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for epoch in range(3):
        z = {name: project(w[name].detach() + u[name], "tt", (3, 3)) for name in plan}
        u = {name: u[name] + w[name].detach() - z[name] for name in plan}
        for x, y in data.batches("train", 8, seed=3, epoch=epoch):
            penalty = sum((w[name] - z[name] + u[name]).square().sum() for name in plan)
            sgd.zero_grad()
            (F.cross_entropy(model(x), y) + rho / 2 * penalty).backward()
            sgd.step()
    assert len(rows) == 3
    for name in plan:
        torch.testing.assert_close(hook.z[name], z[name], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(hook.u[name], u[name], atol=1e-4, rtol=1e-3)
    for a, b in zip(ours.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    w = {name: w[name].detach() for name in plan}
    penalty = sum((w[name] - z[name] + u[name]).square().sum() for name in plan)
    assert rows[-1]["penalty"] == pytest.approx(rho / 2 * float(penalty), rel=1e-3)
    norm = torch.stack([w[name].square().sum() for name in plan]).sum()
    gap = sum((w[name] - z[name]).square().sum() for name in plan) / norm
    assert rows[-1]["gap"] == pytest.approx(float(gap.sqrt()), rel=1e-3)


def test_before_the_first_epoch_z_is_the_projection_and_the_dual_zero() -> None:
    model, plan = small_net(), small_plan()
    hook = started(model, plan, rho=0.1)
    for name in plan:
        z = project(model.get_submodule(name).weight, "tt", (3, 3))
        assert torch.allclose(hook.z[name], z, atol=1e-6)
        assert not hook.u[name].any()


def test_an_epoch_is_updated_once_even_if_it_is_begun_twice() -> None:
    model = small_net()
    hook = started(model, small_plan(), rho=0.1)
    hook.on_epoch_start(context(model))
    before = {name: u.clone() for name, u in hook.u.items()}
    hook.on_epoch_start(context(model))
    assert all(torch.equal(hook.u[name], before[name]) for name in before)


def test_rho_zero_only_watches() -> None:
    data, plan, nets = small_data(), small_plan(), [small_net(), small_net()]
    hook = ADMM(plan, rho=0.0, track_distance=True)
    for net, hooks in zip(nets, ([], [hook]), strict=True):
        row = fit(net, data, epochs=1, lr=0.05, hooks=hooks, **TRAINING).rows[0]
    assert all(torch.equal(a, b) for a, b in zip(*(net.parameters() for net in nets), strict=True))
    assert all(not u.any() for u in hook.u.values())
    assert row["penalty"] == row["rho"] == 0 and row["distance"] > 0 and row["gap"] > 0


def test_columns_and_that_the_reported_loss_is_the_tasks(digits, trained: nn.Module) -> None:
    plan = planned(trained, digits, format="tt", ratio=2.0)
    small, tables = admm(trained, digits, plan, epochs=1, rho=0.5, lr=1e-4, track_distance=True, **TRAINING)
    (row,) = tables["admm"]
    columns = {"gap", "penalty", "rho", "distance", "projection_seconds", *(f"gap:{name}" for name in plan)}
    assert columns <= set(row)
    other = fit(copy.deepcopy(trained), digits, epochs=1, lr=1e-4, **TRAINING).rows[0]
    assert row["penalty"] > 1 and row["train_loss"] == pytest.approx(other["train_loss"], abs=0.02)
    assert set(tdlib.provenance(small).layers) == set(plan)


def test_truncation_after_admm_costs_far_less_than_direct_and_the_gap_falls(digits, trained) -> None:
    plan = planned(trained, digits, format="tt", ratio=4.0)
    plain = copy.deepcopy(trained)
    fit(plain, digits, epochs=8, lr=0.05, **TRAINING)
    rho = rho_for(2.0, 0.05, len(digits.train) // 32)
    pulled, history = regularise(
        trained, digits, plan, epochs=8, rho=rho, lr=0.05, track_distance=True, **TRAINING
    )
    dense, direct, ours = (
        accuracies(net, digits)["test"]
        for net in (plain, tdlib.decompose(plain, plan), tdlib.decompose(pulled, plan))
    )
    assert dense > 90
    assert dense - ours < 0.5 * (dense - direct)
    assert ours > direct + 10
    assert history.rows[-1]["distance"] < 0.5 * truncation_error(plain, plan)[0]
    assert history.rows[-1]["gap"] < 0.5 * history.rows[0]["gap"]


def test_a_run_that_is_stopped_after_every_step_ends_with_the_same_weights(digits, trained, tmp_path) -> None:
    plan = planned(trained, digits, format="tt", ratio=3.0)

    def run(**extra: object) -> dict[str, torch.Tensor]:
        settings = {**TRAINING, "batch_size": 128, **extra}
        return admm(trained, digits, plan, epochs=2, rho=0.2, lr=0.02, **settings)[0].state_dict()

    whole, stops, again = run(), 0, None
    while again is None:
        try:
            again = run(checkpoint=tmp_path, max_minutes=1e-6)
        except TdlibError as error:
            assert "time limit" in str(error) and stops < 25
            stops += 1
    assert stops >= 19
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_hooks_of_another_rho_or_plan_are_told_apart() -> None:
    mine = ADMM(small_plan(), rho=0.1).identity()
    assert mine == ADMM(small_plan(), rho=0.1).identity()
    others = (ADMM(small_plan(), 0.2), ADMM(small_plan(ranks=(2, 2)), 0.1), ADMM(small_plan(), 0.1, True))
    assert all(other.identity() != mine for other in others)


def test_an_lstm_is_regularised_too(digits) -> None:
    torch.manual_seed(0)
    model = tdlib.models.build("lstm", digits.classes, input_shape=digits.input_shape, hidden=32)
    plan = planned(model, digits, format="tt-matrix", ratio=2.0)
    w, _ = regularise(model, digits, plan, epochs=3, rho=0.5, lr=0.05, **TRAINING)
    assert truncation_error(w, plan)[0] < 0.5 * truncation_error(model, plan)[0]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ADMM(small_plan(), rho=-1.0), TdlibError, "negative"),
        (lambda: started(nn.Sequential(nn.Linear(2, 2)), small_plan()), UnknownName, "layer"),
        (lambda: Projection(small_net(), {}), RankError, "empty"),
        (lambda: started(tdlib.decompose(small_net(), small_plan()), small_plan()), TdlibError, "dense"),
    ],
)
def test_wrong_settings_are_refused(make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_pull_and_its_inverse() -> None:
    assert pull(1e-3, 0.1, 391) == pytest.approx(0.391)
    assert rho_for(pull(0.02, 0.05, 40), 0.05, 40) == pytest.approx(0.02)
