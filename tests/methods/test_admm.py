"""ADMM: the steps are those of the equations, and they do to the weights what the paper says."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import tdlib
from tdlib.errors import CheckpointError, RankError, TdlibError, UnknownName
from tdlib.layers.formats import get_format, project
from tdlib.methods.admm import ADMM, pull, rho_for, train_admm
from tdlib.methods.direct import decompose_and_finetune, make_plan
from tdlib.methods.projection import group_layers, project_groups, truncation_error
from tdlib.train import evaluate, fit

TRAINING = {"batch_size": 32, "seed": 0, "device": "cpu", "progress": False}


@pytest.fixture(scope="module")
def digits():
    return tdlib.data.load("digits")


@pytest.fixture(scope="module")
def trained(digits) -> nn.Module:
    torch.manual_seed(0)
    model = tdlib.models.build("cnn", digits.classes, input_shape=digits.input_shape, width=16)
    fit(model, digits, epochs=8, lr=0.05, **TRAINING)
    return model


def small_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def small_plan(format: str = "tt", ranks: tuple[int, ...] = (3, 3)) -> tdlib.Plan:
    return tdlib.plan(small_net(), (3, 8, 8), format=format, ranks={"2": ranks, "4": ranks})


def context(model: nn.Module, epoch: int = 0, epochs: int = 4) -> SimpleNamespace:
    return SimpleNamespace(model=model, epoch=epoch, epochs=epochs, device=torch.device("cpu"), row={})


def started(model: nn.Module, plan: tdlib.Plan, **settings: object) -> ADMM:
    hook = ADMM(plan, **settings)
    hook.on_start(context(model))
    return hook


FORMATS = [(name, get_format(name).at((8, 8, 3, 3), 0.4)) for name in ("tt", "tucker2", "tr")]


@pytest.mark.parametrize(("format", "ranks"), FORMATS)
def test_batched_projection_is_the_formats_own(format: str, ranks: tuple[int, ...]) -> None:
    model, plan = small_net(), small_plan(format, ranks)
    groups = group_layers(model, plan)
    assert [group.names for group in groups] == [("2", "4")]
    kernels = {name: dict(model.named_modules())[name].weight for name in plan}
    for name, z in project_groups(kernels, groups).items():
        alone = project(kernels[name].detach(), format, plan[name])
        assert torch.allclose(z, alone, atol=1e-5)
        assert not z.requires_grad


@pytest.mark.parametrize(("format", "ranks"), FORMATS[:2])  # TR-SVD is no exact projection
def test_a_projected_kernel_stays_where_it_is_and_decomposes_without_loss(
    format: str, ranks: tuple[int, ...]
) -> None:
    model, plan = small_net(), small_plan(format, ranks)
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name in plan:
            modules[name].weight.copy_(project(modules[name].weight, format, plan[name]))
    assert truncation_error(model, plan)[0] < 1e-4
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(tdlib.decompose(model, plan)(x), model(x), atol=1e-4)


def test_first_projection_leaves_the_dual_at_zero_and_the_next_update_is_equations_2_and_3() -> None:
    model, plan = small_net(), small_plan()
    hook = started(model, plan, rho=0.1)
    w = dict(model.named_modules())["2"].weight.detach().clone()
    assert torch.equal(hook.u["2"], torch.zeros_like(w))
    assert torch.allclose(hook.z["2"], project(w, "tt", plan["2"]), atol=1e-6)
    hook.on_epoch_start(context(model))
    u = w - project(w, "tt", plan["2"])
    assert torch.allclose(hook.u["2"], u, atol=1e-6)
    hook.on_epoch_start(context(model, epoch=1))
    z = project(w + u, "tt", plan["2"])
    assert torch.allclose(hook.z["2"], z, atol=1e-5)
    assert torch.allclose(hook.u["2"], u + w - z, atol=1e-5)


def test_the_gradient_is_that_of_the_penalty() -> None:
    model, plan = small_net(), small_plan()
    hook = started(model, plan, rho=0.3)
    hook.on_epoch_start(context(model))
    x = torch.randn(4, 3, 8, 8)
    model(x).square().mean().backward()
    hook.before_step(context(model))
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    penalty = sum(
        (layer.weight - hook.z[name] + hook.u[name]).square().sum()
        for name, layer in model.named_modules() if name in plan
    )  # fmt: skip
    (model(x).square().mean() + 0.15 * penalty).backward()
    for name, p in model.named_parameters():
        assert torch.allclose(found[name], p.grad, atol=1e-6), name


def test_an_epoch_is_updated_once_even_if_it_is_begun_twice() -> None:
    model = small_net()
    hook = started(model, small_plan(), rho=0.1)
    hook.on_epoch_start(context(model))
    before = {name: u.clone() for name, u in hook.u.items()}
    hook.on_epoch_start(context(model))
    assert all(torch.equal(hook.u[name], before[name]) for name in before)


def test_a_change_of_rho_rescales_the_dual() -> None:
    model = small_net()
    hook = started(model, small_plan(), rho=0.1, rho_schedule=((0.5, 5.0),))
    hook.on_epoch_start(context(model))
    hook._set_rho(0.25)
    before = hook.u["2"].clone()
    assert hook.rho == 0.1
    hook._set_rho(0.5)
    assert hook.rho == pytest.approx(0.5)
    assert torch.allclose(hook.u["2"], before / 5)


def test_rho_zero_only_watches() -> None:
    model = small_net()
    hook = started(model, small_plan(), rho=0.0)
    hook.on_epoch_start(context(model))
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    grad = dict(model.named_modules())["2"].weight.grad.clone()
    hook.before_step(context(model))
    assert torch.equal(dict(model.named_modules())["2"].weight.grad, grad)
    assert all(not u.any() for u in hook.u.values())


def test_columns_and_that_the_reported_loss_is_the_tasks(digits, trained: nn.Module) -> None:
    plan = make_plan(trained, digits, "tt", 2.0, "params")
    model = copy.deepcopy(trained)
    history, _ = train_admm(model, digits, plan, epochs=1, rho=0.5, lr=1e-4, track_distance=True, **TRAINING)
    row = history.rows[0]
    assert {"gap", "penalty", "rho", "distance", "projection_seconds"} | {
        f"gap:{name}" for name in plan
    } <= set(row)
    other = fit(copy.deepcopy(trained), digits, epochs=1, lr=1e-4, **TRAINING).rows[0]
    assert row["penalty"] > 1 and row["train_loss"] == pytest.approx(other["train_loss"], abs=0.02)


def test_truncation_after_admm_costs_far_less_than_direct_and_the_gap_falls(
    digits, trained: nn.Module
) -> None:
    plan = make_plan(trained, digits, "tt", 4.0, "params")
    plain, pulled = copy.deepcopy(trained), copy.deepcopy(trained)
    fit(plain, digits, epochs=8, lr=0.05, **TRAINING)
    rho = rho_for(2.0, 0.05, len(digits.train) // 32)
    history, _ = train_admm(pulled, digits, plan, epochs=8, rho=rho, lr=0.05, track_distance=True, **TRAINING)
    dense = evaluate(plain, digits)["accuracy"]
    _, direct = decompose_and_finetune(plain, digits, plan, epochs=0)
    _, ours = decompose_and_finetune(pulled, digits, plan, epochs=0)
    assert dense > 90
    assert dense - ours["before"]["test"] < 0.5 * (dense - direct["before"]["test"])
    assert ours["before"]["test"] > direct["before"]["test"] + 10
    assert history.rows[-1]["distance"] < 0.5 * truncation_error(plain, plan)[0]
    assert history.rows[-1]["gap"] < 0.5 * history.rows[0]["gap"]


def test_a_resumed_run_ends_with_the_same_weights(digits, trained: nn.Module, tmp_path) -> None:
    plan = make_plan(trained, digits, "tt", 3.0, "params")

    def run(**extra: object) -> tuple[nn.Module, bool]:
        model = copy.deepcopy(trained)
        history, _ = train_admm(model, digits, plan, epochs=2, rho=0.2, lr=0.02, **TRAINING, **extra)
        return model, history.finished

    whole, _ = run()
    finished = False
    for _ in range(200):
        model, finished = run(checkpoint=tmp_path, checkpoint_steps=10, max_minutes=1e-6)
        if finished:
            break
    assert finished
    for (name, a), b in zip(whole.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_checkpoint_of_another_rho_or_plan_is_refused() -> None:
    model = small_net()
    state = started(model, small_plan(), rho=0.1).state_dict()
    for other in (started(model, small_plan(), rho=0.2), started(model, small_plan(ranks=(2, 2)), rho=0.1)):
        with pytest.raises(CheckpointError, match="ADMM"):
            other.load_state_dict(state)


def test_an_lstm_is_regularised_too(digits) -> None:
    torch.manual_seed(0)
    model = tdlib.models.build("lstm", digits.classes, input_shape=digits.input_shape, hidden=32)
    plan = make_plan(model, digits, "tt-matrix", 2.0, "params")
    start = truncation_error(model, plan)[0]
    train_admm(model, digits, plan, epochs=3, rho=0.5, lr=0.05, **TRAINING)
    assert truncation_error(model, plan)[0] < 0.5 * start


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ADMM(small_plan(), rho=-1.0), TdlibError, "negative"),
        (lambda: started(nn.Sequential(nn.Linear(2, 2)), small_plan()), UnknownName, "layer"),
        (lambda: group_layers(small_net(), {}), RankError, "empty"),
    ],
)
def test_wrong_settings_are_refused(make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_pull_and_its_inverse() -> None:
    assert pull(1e-3, 0.1, 391) == pytest.approx(0.391)
    assert rho_for(pull(0.02, 0.05, 40), 0.05, 40) == pytest.approx(0.02)
