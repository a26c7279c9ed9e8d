"""One case table for all formats: what a replaced layer must do, whatever the layer's geometry."""

import copy

import pytest
import torch
from layer_cases import GEOMETRIES, LINEAR, VARIANTS, make_input, make_layer
from torch import nn

from tdlib.layers import FORMATS, get_format, kind_of, project, to_dense

CASES = [
    pytest.param(name, format, options, id=f"{format}{options or ''}-{name}")
    for name in [*GEOMETRIES, *LINEAR]
    for format, options in VARIANTS
    if kind_of(make_layer(name).weight.shape) in get_format(format).kinds
]


def replaced(layer, format, ranks, **options):
    """The module in place of the layer, and the factors it is built from."""
    row = get_format(format)
    ranks = row.clip(layer.weight.shape, ranks, **options)
    factors = row.factorise(layer.weight.detach(), ranks, **options)
    return row.build(layer, factors, **options), factors, ranks


def middle(row, shape, **options):
    """Ranks about half way to the bounds (CP's bounds are far off)."""
    return tuple(min(6, max(1, (b + 1) // 2)) for b in row.bounds(shape, **options))


@pytest.mark.parametrize(("name", "format", "options"), CASES)
def test_full_rank_is_the_same_function(name, format, options):
    layer = make_layer(name)
    x = make_input(layer)
    bounds = get_format(format).bounds(layer.weight.shape, **options)
    module, _, ranks = replaced(layer, format, bounds, **options)
    assert ranks == bounds
    torch.testing.assert_close(module(x), layer(x), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(to_dense(module), layer.weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("name", "format", "options"), CASES)
def test_module_is_the_layer_with_the_composed_kernel(name, format, options):
    layer = make_layer(name)
    x = make_input(layer)
    row = get_format(format)
    ranks = middle(row, layer.weight.shape, **options)
    module, factors, ranks = replaced(layer, format, ranks, **options)
    kernel = row.compose(factors, layer.weight.shape, **options)
    dense = copy.deepcopy(layer)
    dense.weight.data = kernel
    torch.testing.assert_close(to_dense(module), kernel)
    torch.testing.assert_close(module(x), dense(x))
    assert module(x).is_contiguous()
    torch.testing.assert_close(project(layer.weight.detach(), format, ranks, **options), kernel)
    # The parameters are what the formula says, and what the shapes of the factors say.
    bias = 0 if layer.bias is None else layer.bias.numel()
    params, _ = row.cost(layer.weight.shape, ranks, **options)
    assert sum(p.numel() for p in module.parameters()) - bias == params
    assert [tuple(f.shape) for f in factors] == row.shapes(layer.weight.shape, ranks, **options)


@pytest.mark.parametrize(("format", "options"), VARIANTS)
def test_error_falls_with_the_rank(format, options):
    layer = make_layer("linear" if format == "tt-matrix" else "3x3")
    row, weight = get_format(format), layer.weight.detach()
    bounds = row.bounds(weight.shape, **options)
    errors = []
    for share in (0.0, 0.1, 0.3, 0.6, 1.0):
        ranks = tuple(max(1, round(share * b)) for b in bounds)
        errors.append(float((weight - project(weight, format, ranks, **options)).norm()))
    assert errors[-1] < 1e-6 * float(weight.norm()) < errors[0]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(("format", "options"), VARIANTS)
def test_uniform_family_and_bounds(format, options):
    shape = (12, 10) if format == "tt-matrix" else (8, 6, 3, 3)
    options = {} if "out_modes" in options else options
    row = get_format(format)
    params = [
        row.cost(shape, row.at(shape, t, **options), **options)[0] for t in (0.0, 0.1, 0.3, 0.5, 0.8, 1.0)
    ]
    assert params == sorted(params) and params[0] < params[-1]
    bounds = row.bounds(shape, **options)
    assert row.clip(shape, bounds, **options) == bounds
    if format not in ("tr",):  # a ring may use more than TR-SVD's exact ranks
        assert row.clip(shape, [10 * b for b in bounds], **options) == bounds


@pytest.mark.parametrize(("format", "options"), [v for v in VARIANTS if FORMATS[v[0]].batched])
def test_projection_of_a_stack_by_vmap(format, options):
    layer = make_layer("linear" if format == "tt-matrix" else "3x3")
    stack = torch.stack([layer.weight.detach(), layer.weight.detach().flip(0) * 2]).float()
    ranks = middle(get_format(format), layer.weight.shape, **options)
    batched = torch.vmap(lambda w: project(w, format, ranks, **options))(stack)
    single = torch.stack([project(w, format, ranks, **options) for w in stack])
    torch.testing.assert_close(batched, single, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("format", "options"), VARIANTS)
def test_gradients(format, options):
    layer = make_layer("linear" if format == "tt-matrix" else "unequal strides")
    module, _, _ = replaced(
        layer, format, [2] * len(get_format(format).bounds(layer.weight.shape, **options)), **options
    )
    x = make_input(layer, batch=1)[..., :5, :] if layer.weight.ndim == 4 else make_input(layer, batch=1)
    names, values = zip(*module.named_parameters(), strict=True)

    def run(x, *values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    inputs = (x.requires_grad_(), *(v.detach().requires_grad_() for v in values))
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize(("format", "options"), VARIANTS)
def test_dtype_mode_and_flags_are_kept(format, options):
    name = "linear" if format == "tt-matrix" else "3x3"
    row = get_format(format)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.06)):
        layer = make_layer(name).to(dtype).eval()
        layer.weight.requires_grad_(False)
        module, _, _ = replaced(layer, format, row.bounds(layer.weight.shape, **options), **options)
        assert not module.training and not any(m.training for m in module.modules())
        assert all(p.dtype == dtype and p.device == layer.weight.device for p in module.parameters())
        flags = {n: p.requires_grad for n, p in module.named_parameters()}
        assert [n for n, flag in flags.items() if flag] == [n for n in flags if n.endswith("bias")]
        x = make_input(layer)
        y = module(x)
        assert y.dtype == dtype
        error = (y.double() - layer(x).double()).norm() / layer(x).double().norm()
        assert error < tolerance


@pytest.mark.parametrize(("format", "options"), VARIANTS)
def test_channels_last_and_autocast(format, options):
    layer = make_layer("linear" if format == "tt-matrix" else "stride 2").float()
    x = make_input(layer)
    if layer.weight.ndim == 4:
        layer, x = layer.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    row = get_format(format)
    module, _, _ = replaced(layer, format, row.bounds(layer.weight.shape, **options), **options)
    y = module(x)
    torch.testing.assert_close(y, layer(x), rtol=1e-3, atol=1e-4)
    if layer.weight.ndim == 4:
        assert y.is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, dense = module(x), layer(x)
    assert half.dtype == dense.dtype == torch.bfloat16
    assert (half.float() - dense.float()).norm() < 0.06 * dense.float().norm()


def test_chains_are_plain_layers():
    """Formats that are chains use only nn.Sequential of nn.Conv2d or nn.Linear, bias on the last."""
    for format in ("tt", "tucker2", "cp", "cp4", "svd"):
        for name in ("3x3", "1x1", "linear"):
            layer = make_layer(name)
            row = get_format(format)
            module, _, _ = replaced(layer, format, middle(row, layer.weight.shape))
            assert type(module) is nn.Sequential
            assert all(type(m) in (nn.Conv2d, nn.Linear) for m in module)
            assert [m.bias is not None for m in module] == [False] * (len(module) - 1) + [True]


def test_three_core_train_is_the_tucker_chain_with_the_same_factors():
    layer = make_layer("dilation")
    module, cores, _ = replaced(layer, "tt", (3, 4))
    core = cores[1].transpose(1, 2).unflatten(2, (3, 3))
    tucker = get_format("tucker2").build(layer, [core, cores[0][0], cores[2][:, :, 0].T])
    x = make_input(layer)
    torch.testing.assert_close(module(x), tucker(x))


def test_order_of_the_modes_is_row_major_with_the_transpose():
    """A kernel built by hand from cores over (o1, o2, K, i1, i2) is recovered at the ranks of these cores."""
    generator = torch.Generator().manual_seed(3)
    sizes, ranks = (4, 2, 9, 2, 3), (1, 1, 3, 2, 2, 1)
    cores = [
        torch.randn(ranks[k], n, ranks[k + 1], generator=generator, dtype=torch.float64)
        for k, n in enumerate(sizes)
    ]
    kernel = (
        torch.einsum("aob,bpc,ckd,die,ejf->opkij", *cores)
        .reshape(8, 9, 6)
        .transpose(1, 2)
        .reshape(8, 6, 3, 3)
    )
    options = {"out_modes": (4, 2), "in_modes": (2, 3)}
    torch.testing.assert_close(project(kernel, "tt", (1, 3, 2, 2), **options), kernel)
    other = {"out_modes": (2, 4), "in_modes": (2, 3)}
    assert (project(kernel, "tt", (1, 3, 2, 2), **other) - kernel).norm() > 0.1 * kernel.norm()
