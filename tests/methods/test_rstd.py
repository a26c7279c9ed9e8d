"""RsTD: shuffled kernels as a format and as layers, training from scratch, and the claims of its chapter."""

from __future__ import annotations

import copy
import math
import pickle

import pandas as pd
import pytest
import torch
from torch import nn

import tdlib
from tdbook import rstd_analysis
from tdlib.errors import BudgetError, CheckpointError, RankError, UnknownName
from tdlib.layers import get_format, project, to_dense
from tdlib.layers.replace import reset_parameters
from tdlib.methods import rstd
from tdlib.tensor.shuffled import FOLDS, checksum, fold, fold_modes, inverse_permutation, permutation, unfold

TRAINING = {"batch_size": 64, "device": "cpu", "progress": False}
OPTIONS = ({}, {"shuffle": False}, {"modes": "kernel", "shuffle": False}, {"order": 3, "seed": 5})
LAYERS = (
    (lambda: nn.Conv2d(6, 8, 3, stride=(2, 1), padding=1, padding_mode="reflect"), (2, 6, 9, 9)),
    (lambda: nn.Conv2d(6, 8, (3, 5), padding="same", dilation=(2, 1), bias=False), (2, 6, 9, 9)),
    (lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular", dilation=2), (2, 4, 8, 8)),
    (lambda: nn.Conv2d(8, 6, 1, stride=2), (2, 8, 7, 7)),
    (lambda: nn.Linear(12, 10), (3, 12)),
    (lambda: nn.Linear(7, 11, bias=False), (2, 5, 7)),
)


@pytest.fixture(scope="module")
def digits():
    return tdlib.data.load("digits")


def net(digits, seed: int = 0, width: int = 16) -> nn.Module:
    torch.manual_seed(seed)
    return tdlib.models.build("cnn", digits.classes, input_shape=digits.input_shape, width=width)


def modules(format: str, k: int, options: dict, fraction: float | None = None):
    torch.manual_seed(k)
    layer, row = LAYERS[k][0](), get_format(format)
    weight = layer.weight.detach()
    ranks = (
        row.bounds(weight.shape, **options) if fraction is None else row.at(weight.shape, fraction, **options)
    )
    return layer, row, ranks, row.build(layer, row.factorise(weight, ranks, **options), **options)


# -- permutations


def test_a_permutation_is_a_pure_function_of_length_and_seed() -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = permutation(60, 3)
    assert torch.equal(first, permutation(60, 3)) and torch.equal(state, torch.random.get_rng_state())
    assert not torch.equal(first, permutation(60, 4))
    assert torch.equal(first.sort().values, torch.arange(60, dtype=torch.int32))
    assert torch.equal(first[inverse_permutation(60, 3).long()], torch.arange(60, dtype=torch.int32))
    assert torch.equal(permutation(5, None), torch.arange(5, dtype=torch.int32))


def test_seeds_mean_the_same_permutation_in_every_version_of_torch() -> None:
    # Saved networks hold the seed only: if this number changes, they can no longer be loaded.
    assert checksum(permutation(9216, 0)) == 2085215368


@pytest.mark.parametrize("shape", [(8, 6, 3, 3), (10, 7), (5, 3, 1, 1), (11, 13)])
@pytest.mark.parametrize("seed", [None, 0, 7])
def test_unfolding_undoes_folding(shape, seed) -> None:
    weight = torch.randn(shape)
    for order in (2, 3, 4):
        modes = fold_modes(shape, order)
        assert len(modes) == order and math.prod(modes) == weight.numel()
        assert torch.equal(unfold(fold(weight, modes, seed), shape, seed), weight)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"modes": (7, 7)}, RankError),
        ({"modes": "other"}, RankError),
        ({"order": 1}, RankError),
        ({"seed": -1}, RankError),
        ({"out_modes": (2, 4)}, UnknownName),
    ],
)
def test_wrong_options_are_named(arguments, error) -> None:
    with pytest.raises(error):
        get_format("shuffled-tt").bounds((8, 6, 3, 3), **arguments)


# -- formats and layers


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", FOLDS)
def test_at_full_rank_the_layer_is_the_same_function(kind, options) -> None:
    for k in range(len(LAYERS)):
        layer, _, _, module = modules(f"shuffled-{kind}", k, options)
        x = torch.randn(LAYERS[k][1])
        torch.testing.assert_close(module(x), layer(x), atol=5e-4 if kind == "cp" else 5e-5, rtol=1e-3)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", FOLDS)
def test_costs_and_kernels_agree_with_the_counter_and_the_projection(kind, options) -> None:
    for k in (0, 3, 4):
        layer, row, ranks, module = modules(f"shuffled-{kind}", k, options, 0.4)
        x = torch.randn(1, *LAYERS[k][1][1:])
        maps = (x.shape[2:], layer(x).shape[2:]) if layer.weight.ndim == 4 else ((1, 1), (1, 1))
        params, macs = row.cost(layer.weight.shape, ranks, *maps, **options)
        with torch.no_grad():
            module.eval()(x)  # a kept kernel must not hide products from the counter
        cost = tdlib.count(module, x.shape[1:])
        assert (params, macs) == (cost.params - (0 if layer.bias is None else layer.bias.numel()), cost.macs)
        torch.testing.assert_close(
            to_dense(module), project(layer.weight.detach(), row.name, ranks, **options)
        )


@pytest.mark.parametrize("kind", FOLDS)
def test_error_falls_with_rank(kind) -> None:
    torch.manual_seed(0)
    weight, row = torch.randn(8, 6, 3, 3), get_format(f"shuffled-{kind}")
    errors = [
        float((weight - project(weight, row.name, row.at(weight.shape, f))).norm()) for f in (0.2, 0.5, 0.8)
    ]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("kind", ["tt", "tr", "tucker"])
def test_projection_maps_over_a_stack(kind) -> None:
    torch.manual_seed(0)
    stack, ranks = torch.randn(3, 8, 6, 3, 3), get_format(f"shuffled-{kind}").at((8, 6, 3, 3), 0.5)
    mapped = torch.vmap(lambda w: project(w, f"shuffled-{kind}", ranks))(stack)
    single = torch.stack([project(w, f"shuffled-{kind}", ranks) for w in stack])
    torch.testing.assert_close(mapped, single, atol=1e-4, rtol=1e-3)


def test_the_kernel_kept_in_evaluation_follows_its_factors() -> None:
    _, _, _, module = modules("shuffled-tt", 0, {}, 0.5)
    x, module = torch.randn(LAYERS[0][1]), module.eval()
    with torch.no_grad():
        first = module(x)
        assert torch.equal(module(x), first) and module._kept is not None
        module.cores[0].mul_(2.0)
        torch.testing.assert_close(
            module(x) - module.bias[:, None, None], 2 * (first - module.bias[:, None, None])
        )
        state = copy.deepcopy(module.state_dict())
        state["cores.0"] = state["cores.0"] / 2
        module.load_state_dict(state)
        torch.testing.assert_close(module(x), first)
        clone = pickle.loads(pickle.dumps(copy.deepcopy(module)))
        assert clone._kept is None and torch.equal(clone(x), module(x))
        torch.testing.assert_close(module.double()(x.double()).float(), first, atol=1e-5, rtol=1e-4)
    module.train().float()(x).sum().backward()
    assert all(core.grad is not None and bool(core.grad.abs().sum() > 0) for core in module.cores)


def test_the_state_brings_its_permutation_along() -> None:
    layer, row, ranks, module = modules("shuffled-tt", 0, {"seed": 3}, 0.5)
    other = row.blank(layer, ranks, seed=4).eval()
    other.load_state_dict(module.state_dict())
    x = torch.randn(LAYERS[0][1])
    assert other.seed == 3
    torch.testing.assert_close(other(x), module(x))
    plain = row.blank(layer, ranks, shuffle=False)
    other.load_state_dict(plain.state_dict())
    assert other.seed is None and other.order is None
    state = module.state_dict()
    state["shuffle"] = state["shuffle"] + torch.tensor([0, 1])
    with pytest.raises(CheckpointError, match="seed 3"):
        other.load_state_dict(state)


@pytest.mark.parametrize("kind", FOLDS)
def test_random_factors_give_kernels_of_kaiming_variance(kind) -> None:
    layer, row = nn.Conv2d(64, 64, 3), get_format(f"shuffled-{kind}")
    ranks = row.at(layer.weight.shape, 0.5)
    values = []
    for seed in range(3):
        torch.manual_seed(seed)
        module = row.blank(layer, ranks)
        reset_parameters(module)
        values.append(float(to_dense(module).detach().var()))
    assert sum(values) / 3 == pytest.approx(2 / (64 * 9), rel=0.35)


def test_export_compile_and_autocast() -> None:
    _, _, _, module = modules("shuffled-tt", 0, {}, 0.5)
    module, x = module.eval(), torch.randn(LAYERS[0][1])
    with torch.no_grad():
        expected = module(x)
        exported = torch.export.export(module, (x,)).module()
        torch.testing.assert_close(exported(x), expected)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(module(x).float(), expected, atol=0.1, rtol=0.1)
        torch.testing.assert_close(module(x), expected)  # what was kept under autocast is not reused


# -- the method


def test_plans_meet_the_ratio_with_permutations_of_their_own(digits) -> None:
    for format in FOLDS:
        plan = rstd.shuffled_plan(net(digits), digits, format, 4.0, seed=1)
        assert plan.ratio == pytest.approx(4.0, rel=0.02) and plan.macs_ratio < 1
        seeds = [options["seed"] for options in plan.options.values()]
        assert len(set(seeds)) == len(seeds) == 3
    grid = rstd.ratio_grid(net(digits), digits, "tt", ({}, {"modes": "kernel", "shuffle": False}))
    assert len(grid) == 5 and grid[0] == 2.0 and grid == sorted(grid)


@pytest.mark.parametrize("format", FOLDS)
def test_cores_train_from_scratch_and_are_saved_and_loaded(format, digits, tmp_path) -> None:
    model = net(digits, width=8)
    before = copy.deepcopy(model.state_dict())
    small = rstd.compress(model, digits, ratio=2.0, seed=2, format=format, epochs=2, lr=0.05, **TRAINING)
    report = small._tdlib["report"]
    assert report["params_ratio"] == pytest.approx(2.0, rel=0.02)
    assert report["history"]["cores"][-1]["train_loss"] < report["history"]["cores"][0]["train_loss"]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    tdlib.save(small, tmp_path / "small.safetensors")
    loaded = tdlib.load(tmp_path / "small.safetensors")
    x = torch.randn(4, *digits.input_shape)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), small.eval()(x))
    assert loaded.conv2.seed == small.conv2.seed is not None


def test_the_result_is_a_function_of_the_seed(digits) -> None:
    def run(seed: int) -> torch.Tensor:
        small = rstd.compress(
            net(digits, width=8), digits, ratio=2.0, seed=seed, epochs=1, lr=0.05, **TRAINING
        )
        return small.conv4.cores[0].detach()

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))


def test_bad_input_is_named(digits) -> None:
    with pytest.raises(BudgetError, match="params"):
        rstd.compress(net(digits), digits, ratio=2.0, by="macs", **TRAINING)
    with pytest.raises(UnknownName, match="tucker"):
        rstd.compress(net(digits), digits, ratio=2.0, format="svd", **TRAINING)
    with pytest.raises(BudgetError, match="reach"):
        rstd.compress(net(digits), digits, ratio=500.0, **TRAINING)


def test_post_hoc_projection_is_what_decompose_gives(digits) -> None:
    model = net(digits).eval()
    small = rstd.compress(model, digits, ratio=2.0, post_hoc=True, epochs=0, **TRAINING)
    same = tdlib.decompose(model, rstd.shuffled_plan(model, digits, "tt", 2.0)).eval()
    x = torch.randn(2, *digits.input_shape)
    torch.testing.assert_close(small.eval()(x), same(x))


# -- claims


def test_shuffled_networks_keep_their_accuracy_over_a_wide_range_of_ratios(digits) -> None:
    rows = []
    for ratio in (2.0, 16.0):
        for arm, options in (("shuffled", {}), ("kernel", {"shuffle": False, "modes": "kernel"})):
            small = rstd.compress(net(digits), digits, ratio=ratio, epochs=7, lr=0.1, **options, **TRAINING)
            accuracy = small._tdlib["report"]["after"]["test"]
            rows.append({"arm": arm, "ratio": ratio, "seed": 0, "accuracy": accuracy})
    table = rstd_analysis.stability(pd.DataFrame(rows))
    assert table["worst"]["shuffled"] > 85
    assert table["range_over_ratios"]["shuffled"] < table["range_over_ratios"]["kernel"] - 5
