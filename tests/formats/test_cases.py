"""One case table for all formats: what a replaced layer must do, whatever the layer's geometry."""

import copy
import math

import pytest
import torch
from format_cases import (
    CASES,
    KINDS,
    OTHERS,
    WAYS,
    case_id,
    check_composed_kernel,
    check_full_rank,
    make_input,
    make_layer,
    middle,
    replaced,
)
from torch import nn

from tdlib.errors import RankError, TdlibError, UnknownName
from tdlib.formats import FORMATS, get_format, kind_of, project, to_dense
from tdlib.formats.chains import Chain

table = pytest.mark.parametrize(("name", "format", "options"), CASES, ids=case_id)
kinds = pytest.mark.parametrize(("name", "format", "options"), KINDS, ids=case_id)
#: Every format with a layer that it holds.
EACH = [("3x3" if "conv" in FORMATS[name].kinds else "linear", name) for name in sorted(FORMATS)]


def bind(name, format, options):
    layer = make_layer(name)
    return layer, get_format(format).bind(layer.weight.shape, **options)


@table
def test_a_replaced_layer_is_the_layer_with_the_composed_kernel(name, format, options):
    check_full_rank(name, format, options)
    check_composed_kernel(name, format, options)


def test_the_table_covers_every_format_and_every_kind_of_layer():
    covered = {(format, kind_of(make_layer(name).weight.shape)) for name, format, _ in CASES}
    assert {format for format, _ in covered} == set(FORMATS)
    # What is not in it is the same class as something that is.
    rows = [(row.kinds | row.factored)[kind] for row in FORMATS.values() for kind in row.kinds]
    tried = {get_format(f).bind(make_layer(n).weight.shape, **o).__class__ for n, f, o in CASES}
    assert set(rows) <= tried


@pytest.mark.parametrize(("format", "options"), [*((way, {}) for way in WAYS), *OTHERS, ("tt-matrix", {})])
def test_the_error_falls_and_the_cost_rises_with_the_ranks(format, options):
    layer, bound = bind("linear" if format == "tt-matrix" else "3x3", format, options)
    weight = layer.weight.detach()
    ladder = [bound.uniform(share) for share in (0.01, 0.1, 0.3, 0.6)] + [bound.bounds]
    errors = [float((weight - bound.project(weight, ranks)).norm() / weight.norm()) for ranks in ladder]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-6 < 0.1 < errors[0]
    params = [bound.cost(ranks)[0] for ranks in ladder]
    assert params == sorted(params) and params[0] < params[-1]
    assert bound.error(weight, ladder[2]) == pytest.approx(errors[2] ** 2, rel=0.3)


@pytest.mark.parametrize(
    ("name", "format"), [case for case in EACH if case[1] not in ("cp", "cp4", "shuffled-cp")]
)
def test_a_stack_of_kernels_is_projected_by_vmap(name, format):
    layer, bound = bind(name, format, {})
    stack = torch.stack([layer.weight.detach(), layer.weight.detach().flip(0) * 2]).float()
    ranks = middle(bound)
    together = torch.vmap(lambda w: project(w, format, ranks))(stack)
    torch.testing.assert_close(
        together, torch.stack([project(w, format, ranks) for w in stack]), rtol=1e-3, atol=1e-4
    )


@kinds
def test_gradients(name, format, options):
    layer, bound = bind(name, format, options)
    module = replaced(layer, bound, bound.clip([2] * len(bound.bounds)))
    names, values = zip(*module.named_parameters(), strict=True)

    def run(x, *values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    inputs = (make_input(layer).requires_grad_(), *(v.detach().requires_grad_() for v in values))
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@kinds
def test_dtype_mode_flags_and_copies(name, format, options):
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.06)):
        layer = make_layer(name).to(dtype).eval()
        layer.weight.requires_grad_(False)
        bound = get_format(format).bind(layer.weight.shape, **options)
        module = replaced(layer, bound, bound.bounds)
        assert not any(m.training for m in module.modules())
        assert {p.dtype for p in module.parameters()} == {dtype}
        flags = {n: p.requires_grad for n, p in module.named_parameters()}
        assert [n for n, flag in flags.items() if flag] == [n for n in flags if n.endswith("bias")]
        x = make_input(layer)
        y = module(x)
        assert y.dtype == dtype
        error = (y.double() - layer(x).double()).norm() / layer(x).double().norm()
        assert error < tolerance
        assert torch.equal(copy.deepcopy(module)(x), y)
        shared = {p.data_ptr() for p in module.parameters()} & {p.data_ptr() for p in layer.parameters()}
        assert not shared


@kinds
def test_channels_last_and_autocast(name, format, options):
    layer = make_layer(name).float()
    x = make_input(layer)
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(layer.weight.ndim)
    if last:
        layer, x = layer.to(memory_format=last), x.to(memory_format=last)
    bound = get_format(format).bind(layer.weight.shape, **options)
    module = replaced(layer, bound, bound.bounds)
    y = module(x)
    torch.testing.assert_close(y, layer(x), rtol=1e-3, atol=1e-4)
    if layer.weight.ndim == 4:  # in 3-D torch itself does not keep it everywhere
        assert y.is_contiguous(memory_format=last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, dense = module(x), layer(x)
    assert half.dtype == dense.dtype == torch.bfloat16
    assert (half.float() - dense.float()).norm() < 0.06 * dense.float().norm()


@kinds
def test_everything_is_on_the_layers_device(name, format, options):
    """The meta device stands for any other than the CPU."""
    layer = make_layer(name).to("meta")
    bound = get_format(format).bind(layer.weight.shape, **options)
    for module in (bound.random(layer, middle(bound)), bound.blank(layer, middle(bound))):
        assert {t.device.type for t in (*module.parameters(), *module.buffers())} == {"meta"}
        x = make_input(make_layer(name)).to("meta")
        assert module(x).shape == layer(x).shape and to_dense(module).device.type == "meta"


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_random_factors_give_kernels_of_kaiming_variance(format):
    layers = {"conv": nn.Conv2d(32, 48, 3), "pointwise": nn.Conv2d(32, 48, 1), "linear": nn.Linear(48, 36)}
    layers |= {"conv1d": nn.Conv1d(32, 48, 3), "pointwise1d": nn.Conv1d(32, 48, 1)}
    layers |= {"conv3d": nn.Conv3d(12, 16, (3, 2, 2)), "pointwise3d": nn.Conv3d(32, 48, 1)}
    for kind in FORMATS[format].kinds:
        layer = layers[kind]
        bound, variances = get_format(format).bind(layer.weight.shape), []
        for seed in range(20):
            torch.manual_seed(seed)
            module = bound.random(layer, bound.uniform(0.6))
            variances.append(float(to_dense(module).detach().var()) * layer.weight[0].numel() / 2)
        assert sum(variances) / 20 == pytest.approx(1, rel=0.4), kind


def test_chains_are_plain_layers():
    """Formats that are chains use only nn.Conv2d or nn.Linear one after the other, bias on the last."""
    for format in ("tt", "tucker2", "cp", "cp4", "svd"):
        for name in ("3x3", "1x1", "linear"):
            layer, bound = bind(name, format, {})
            module = replaced(layer, bound, middle(bound))
            assert type(module) is Chain
            assert all(type(m) in (nn.Conv2d, nn.Linear) for m in module)
            assert [m.bias is not None for m in module] == [False] * (len(module) - 1) + [True]


def test_the_train_of_three_cores_is_the_tucker_chain_with_the_same_factors():
    layer, train = bind("dilation", "tt", {})
    first, core, last = train.decompose(layer.weight.detach(), (3, 4))
    _, tucker = bind("dilation", "tucker2", {})
    same = tucker.module(layer, [core.transpose(1, 2).unflatten(2, (3, 3)), first[0], last[:, :, 0].mT])
    x = make_input(layer)
    torch.testing.assert_close(train.module(layer, [first, core, last])(x), same(x))


def test_the_order_of_the_modes_is_row_major_with_the_transpose():
    """A kernel built by hand from cores over (o1, o2, K, i1, i2) is recovered at the ranks of these cores."""
    generator = torch.Generator().manual_seed(3)
    sizes, ranks = (4, 2, 9, 2, 3), (1, 1, 3, 2, 2, 1)
    cores = [
        torch.randn(ranks[k], n, ranks[k + 1], generator=generator, dtype=torch.float64)
        for k, n in enumerate(sizes)
    ]
    tensor = torch.einsum("aob,bpc,ckd,die,ejf->opkij", *cores)
    kernel = tensor.reshape(8, 9, 6).transpose(1, 2).reshape(8, 6, 3, 3)
    found = project(kernel, "tt", (1, 3, 2, 2), out_modes=(4, 2), in_modes=(2, 3))
    torch.testing.assert_close(found, kernel)
    other = project(kernel, "tt", (1, 3, 2, 2), out_modes=(2, 4), in_modes=(2, 3))
    assert (other - kernel).norm() > 0.1 * kernel.norm()


@pytest.mark.parametrize(
    ("shape", "format", "options", "error", "words"),
    [
        ((8, 6, 3, 3), "tuker2", {}, UnknownName, "Did you mean 'tucker2'"),
        ((8, 6, 3, 3), "tt", {"modes": 3}, UnknownName, "out_modes"),
        ((8, 6, 3, 3), "tucker2", {"order": 2}, UnknownName, "Leave it out, or take.* tt,"),
        ((8, 6, 3, 3), "tt", {"out_modes": (5, 5)}, RankError, "multiply to 25"),
        ((8, 6, 3, 3), "tr", {"order": 0}, RankError, "order.*got 0"),
        ((8, 6), "tt-matrix", {"out_modes": (2, 4), "in_modes": (6,)}, RankError, "as many out_modes"),
        ((8, 6, 3, 3), "tt-matrix", {}, TdlibError, "does not apply to a conv"),
        ((8,), "svd", {}, TdlibError, "kernel has shape"),
        ((8, 6, 3), "tt", {}, TdlibError, "'tt' does not apply to a conv1d layer"),
        ((8, 6, 1, 1, 1), "tr", {}, TdlibError, "'tr' does not apply to a pointwise3d layer"),
        ((8, 6, 3, 3), "shuffled-tt", {"modes": (7, 7)}, RankError, "432 entries"),
        ((8, 6, 3, 3), "shuffled-tt", {"modes": "other"}, RankError, "'kernel'"),
        ((8, 6, 3, 3), "shuffled-tt", {"order": 1}, RankError, "at least 2"),
        ((8, 6, 3, 3), "shuffled-tt", {"seed": -1}, RankError, "seed"),
        ((8, 6, 3, 3), "shuffled-tt", {"seed": "a"}, RankError, "seed.*'a'"),
        ((8, 6, 3, 3), "shuffled-tt", {"order": 3, "modes": (48, 9)}, RankError, "drop one of them"),
        ((8, 6, 3, 3), "shuffled-tt", {"modes": (48, "9")}, RankError, "modes must be a whole number"),
        ((8, 6), "tt", {"order": 2, "out_modes": (2, 4), "in_modes": (6,)}, RankError, "drop order"),
        ((8, 6), "tt", {"order": "2"}, RankError, "order.*got '2'"),
        ((8, 6), "tr", {"order": 10**6}, RankError, "at most 24"),
        ((8, 6), "tr", {"order": float("nan")}, RankError, "got nan"),
        ((8, 6), "tr", {"out_modes": 8.0}, RankError, "out_modes must be.*got 8.0"),
        ((8, 6), "tr", {"in_modes": (2, None)}, RankError, "in_modes must be"),
        ((8, 6, 3, 3), "shuffled-tt", {"out_modes": (2, 4)}, UnknownName, "shuffle"),
    ],
)
def test_wrong_options_are_named(shape, format, options, error, words):
    with pytest.raises(error, match=words):
        get_format(format).bind(shape, **options)


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ((1,), "takes 2 ranks, got 1"),
        ((1, 2, 3), "got 3"),
        ((0, 1), "rank 0 in"),
        ((1.5, 1), "rank 1.5 in"),
        ((float("nan"), 1), "rank nan in"),
        ((None, 1), "rank None in"),
        (("a", 1), "rank 'a' in"),
        (((2,), 1), r"rank \(2,\) in"),
        ("ab", "rank 'a' in"),
        (None, "takes 2 ranks, got 1"),
        (torch.tensor(3), "takes 2 ranks, got 1"),
    ],
)
def test_wrong_ranks_are_named_with_the_format_and_the_kernel(ranks, words):
    bound = get_format("tucker2").bind((8, 6, 3, 3))
    for call in (bound.clip, lambda r: bound.decompose(torch.ones(8, 6, 3, 3), r)):
        with pytest.raises(RankError, match=words) as caught:
            call(ranks)
        assert "'tucker2'" in str(caught.value) and "(8, 6, 3, 3)" in str(caught.value)
    assert bound.clip((100, 10**30)) == bound.clip(torch.tensor((100, 4000))) == (8, 6)
    assert bound.clip((100, 4)) == (8, 4) and math.prod(bound.bounds) == 48
