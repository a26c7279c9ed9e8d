"""Layers whose kernel is composed of its factors: parametrised layers, kept kernels, permutations."""

import pytest
import torch
from format_cases import make_input, make_layer, middle, replaced
from torch import nn
from torch.nn.utils import parametrize

import tdlib
from tdlib.errors import CheckpointError, RankError
from tdlib.formats import get_format, project, skeleton, to_dense


def shuffled(format="shuffled-tt", name="unequal strides", **options):
    layer = make_layer(name)
    bound = get_format(format).bind(layer.weight.shape, **options)
    return layer, bound, replaced(layer, bound, middle(bound))


def factors(module):
    return dict(module.parametrizations.weight.named_parameters())


def test_the_layer_is_a_plain_one_with_a_parametrised_weight():
    layer, bound, module = shuffled()
    assert isinstance(module, nn.Conv2d) and parametrize.is_parametrized(module, "weight")
    assert [tuple(f.shape) for f in factors(module).values()] == bound.shapes(middle(bound))
    assert module.state_dict().keys() == {
        "bias",
        *(f"parametrizations.weight.original{k}" for k in range(3)),
        "parametrizations.weight.original3",
        "parametrizations.weight.0.shuffle",
    }
    assert torch.equal(module.weight, to_dense(module)) and module.weight.shape == layer.weight.shape
    with pytest.raises(ValueError, match="right_inverse"):
        module.weight = torch.zeros_like(layer.weight)  # a kernel is not a set of factors


def test_the_kernel_follows_its_factors_and_can_be_kept():
    _, _, module = shuffled()
    x = make_input(make_layer("unequal strides"))
    with torch.no_grad():
        first = module(x)
        with parametrize.cached():
            assert torch.equal(module(x), first) and module.weight is module.weight
        factors(module)["original0"].mul_(2.0)
        bias = module.bias[:, None, None]
        torch.testing.assert_close(module(x) - bias, 2 * (first - bias))
    module(x).sum().backward()
    assert all(bool(factor.grad.abs().sum() > 0) for factor in factors(module).values())


@pytest.mark.parametrize("shuffle", [True, False])
def test_folding_is_the_layout_of_the_entries(shuffle):
    """A kernel whose permuted, folded entries are a low-rank tensor is recovered from its own seed only."""
    options = {"modes": (8, 6, 9), "seed": 3, "shuffle": shuffle}
    bound = get_format("shuffled-cp").bind((8, 6, 3, 3), **options)
    generator = torch.Generator().manual_seed(0)
    terms = [torch.randn(n, 2, generator=generator) for n in (8, 6, 9)]
    kernel = bound.unfold(torch.einsum("ar,br,cr->abc", *terms))
    assert (project(kernel, "shuffled-cp", (2,), **options) - kernel).norm() < 0.02 * kernel.norm()
    other = project(kernel, "shuffled-cp", (2,), **{**options, "seed": 4, "shuffle": True})
    assert (other - kernel).norm() > 0.5 * kernel.norm()


def test_a_network_may_have_a_seed_for_each_layer_and_is_saved_with_them(tmp_path):
    torch.manual_seed(0)
    model = tdlib.models.build("cnn", 10, input_shape=(1, 8, 8), width=8).eval()
    seeds = {"conv2": 5, "conv*": 7}
    plan = tdlib.plan(model, (1, 8, 8), "shuffled-tt", 2.0, skip=("conv1", "linear"), seed=seeds)
    assert [layer.options["seed"] for layer in plan.values()] == [5, 7, 7]
    small = skeleton(model, plan).eval()
    tdlib.save(small, tmp_path / "small.safetensors")
    again = tdlib.load(tmp_path / "small.safetensors")
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(again(x), small(x))
    assert tdlib.provenance(again).layers == tdlib.provenance(small).layers == dict(plan)


def test_a_permutation_is_checked_when_it_is_loaded():
    layer, bound, module = shuffled(seed=3)
    same = bound.random(layer, middle(bound))
    same.load_state_dict(module.state_dict())
    x = make_input(layer)
    assert torch.equal(same(x), module(x))
    for options in ({"seed": 4}, {"shuffle": False}):
        other = get_format("shuffled-tt").bind(layer.weight.shape, **options).random(layer, middle(bound))
        with pytest.raises(CheckpointError, match="give the layer the seed of the saved one"):
            other.load_state_dict(module.state_dict())
    state = module.state_dict()
    key = "parametrizations.weight.0.shuffle"
    state[key] = state[key] + torch.tensor([0, 1])  # what another version of torch would draw from the seed
    with pytest.raises(CheckpointError, match="load it with the version of torch that saved it"):
        same.load_state_dict(state)


def test_export_compile_and_counting_are_those_of_a_layer():
    layer, bound, module = shuffled(seed=1)
    x = make_input(layer)
    module = module.eval()
    with torch.no_grad():
        exported = torch.export.export(module, (x,)).module()
        torch.testing.assert_close(exported(x), module(x))
    cost = tdlib.count(module, (6, 5, 6))
    params, macs = bound.cost(middle(bound), (5, 6), tuple(module(x).shape[2:]))
    assert (cost.params, cost.macs) == (params + 8, macs)


def test_hashed_kernels_are_projected_on_a_random_subspace():
    layer, bound, module = shuffled("hashed", "3x3", seed=3)
    weight, (d,) = layer.weight.detach(), middle(bound)
    rest = weight - bound.project(weight, (d,))
    inside = to_dense(bound.random(layer, (d,))).detach()
    assert abs(float((rest * inside).sum())) < 1e-9 and factors(module)["original0"].shape == (d,)
    shares = inside.abs().flatten().unique(return_counts=True)[1]
    assert len(shares) == d and shares.max() - shares.min() <= 1
    plain = inside.flatten()[: 2 * d]
    assert not torch.equal(plain[:d], -plain[d:])  # entries in random order


def test_plans_save_parameters_and_not_macs():
    model = tdlib.models.build("cnn", 10, input_shape=(1, 8, 8))
    for format in ("shuffled-tt", "shuffled-tr", "shuffled-cp", "shuffled-tucker"):
        plan = tdlib.plan(model, (1, 8, 8), format, 4.0)
        assert plan.ratio == pytest.approx(4.0, rel=0.02) and plan.macs_ratio < 1
    with pytest.raises(RankError, match=r"layer 'conv1'.*at least 2"):
        tdlib.plan(model, (1, 8, 8), "shuffled-tt", 4.0, order=1)
