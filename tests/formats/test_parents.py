"""Parents that read a layer's attributes find them where the layer was replaced."""

import copy

import pytest
import torch
from format_cases import KINDS, case_id, make_input, make_layer, middle, replaced
from torch import nn

import tdlib
from tdlib.errors import TdlibError
from tdlib.formats import LayerPlan, decompose, get_format, to_dense
from tdlib.formats.chains import GEOMETRY
from tdlib.formats.projection import truncation_error

kinds = pytest.mark.parametrize(("name", "format", "options"), KINDS, ids=case_id)


@kinds
def test_a_replaced_layer_says_of_itself_what_the_layer_said(name, format, options):
    layer = make_layer(name)
    bound = get_format(format).bind(layer.weight.shape, **options)
    module = copy.deepcopy(replaced(layer, bound, middle(bound)))
    said = [n for n in GEOMETRY if hasattr(layer, n)]
    assert len(said) > 1 and all(getattr(module, n) == getattr(layer, n) for n in said)
    assert torch.equal(module.bias, layer.bias)
    assert torch.equal(module.weight, to_dense(module)) and module.weight.requires_grad
    assert "weight" not in {n for n, _ in module.named_parameters(recurse=False)} | set(module.state_dict())
    for value in (nn.Parameter(torch.zeros_like(layer.weight)), torch.zeros_like(layer.weight)):
        with pytest.raises((KeyError, AttributeError, ValueError)):
            module.weight = value  # a kernel is not a set of factors


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(("format", "share"), [("svd", 1.0), ("svd", 0.4), ("tr", 0.4), ("tt-matrix", 0.4)])
def test_a_transformer_encoder_computes_with_the_composed_matrices(norm_first, format, share):
    """In eval mode it never calls its layers, but reads their weights."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, 0.0, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    plan = {}
    for name, module in model.named_modules():
        if name.endswith(("linear1", "linear2")):
            bound = get_format(format).bind(module.weight.shape)
            ranks = bound.bounds if share == 1 else bound.uniform(share)
            plan[name] = LayerPlan(format, ranks)
    small, dense = decompose(model, plan), copy.deepcopy(model)
    for name in plan:
        dense.get_submodule(name).weight.data = to_dense(small.get_submodule(name)).detach()
    x, padding = torch.randn(3, 5, 16), torch.arange(5) >= torch.tensor([[5], [3], [2]])
    torch.testing.assert_close(small(x), dense(x), rtol=1e-4, atol=1e-5)  # with gradients: layer by layer
    with torch.no_grad():
        torch.testing.assert_close(small(x), dense(x), rtol=1e-4, atol=1e-5)
        masked = [net(x, src_key_padding_mask=padding) for net in (small, dense)]
        torch.testing.assert_close(*masked, rtol=1e-4, atol=1e-5)
        if share == 1:
            torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)


def test_initialisers_that_ask_for_a_weight_reach_the_factors_alone():
    layer = make_layer("3x3")
    bound = get_format("tucker2").bind(layer.weight.shape)
    module = replaced(layer, bound, middle(bound))

    def init(m):
        if hasattr(m, "weight") and m.weight is not None:
            nn.init.constant_(m.weight, 0.5)

    module.apply(init)
    assert all(bool((p == 0.5).all()) for n, p in module.named_parameters() if n.endswith("weight"))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(("name", "format"), [("3x3", "tucker2"), ("1x1", "svd"), ("linear", "svd")])
def test_torchscript_and_fx_see_the_chain_alone(name, format):
    layer = make_layer(name)
    bound, x = get_format(format).bind(layer.weight.shape), make_input(layer)
    module = replaced(layer, bound, middle(bound)).eval()
    for other in (torch.jit.script(module), torch.jit.trace(module, x), torch.fx.symbolic_trace(module)):
        torch.testing.assert_close(other(x), module(x))


def test_a_replaced_layer_has_no_dense_weight_to_project_or_plan():
    model = nn.Sequential(make_layer("3x3").float())
    small = decompose(model, {"0": LayerPlan("tucker2", (3, 3))})
    with pytest.raises(TdlibError, match="has no dense weight"):
        truncation_error(small, {"0": LayerPlan("tucker2", (1, 1))})
    assert tdlib.count(small, (6, 8, 8)).params == 8 + 6 * 3 + 3 * 9 * 3 + 3 * 8
