"""A format of one's own is one class and one row: here k×k (I → r), then 1×1 (r → O), in this file alone."""

import math

import pytest
import torch
from format_cases import CONVOLUTIONS, check_composed_kernel, check_full_rank
from torch import nn

import tdlib
from tdlib.decompositions.sigma import svd_sigma
from tdlib.decompositions.svd import SVD
from tdlib.export import to_onnx
from tdlib.formats import FORMATS, Format, KernelFormat, decompose, register
from tdlib.formats.chains import Chain, all_axes, conv, finish
from tdlib.formats.projection import Projection


class Thin(KernelFormat):
    """W (O, I·kh·kw) = A (O, r) B (r, I·kh·kw) (Zhang et al. 2015, arXiv 1505.06798)."""

    decomposition = SVD

    def layout(self):
        return self.shape[0], math.prod(self.shape[1:])

    def macs(self, ranks, hw_in, hw_out):
        return ranks[0] * sum(self.extents) * math.prod(hw_out)

    def module(self, layer, factors):
        a, b = factors
        first = conv(layer, b.reshape(-1, *self.shape[1:]), axes=all_axes(layer))
        return finish(layer, Chain(first, conv(layer, a, last=True)))

    def decompose_sigma(self, weight, ranks, sigma):
        return list(svd_sigma(self.fold(weight), ranks[0], sigma))


@pytest.fixture(autouse=True)
def thin():
    register(Format("thin", "k×k to few channels, then 1×1", {"conv": Thin, "pointwise": Thin}))
    yield
    del FORMATS["thin"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tdlib.models.build("cnn", 10, input_shape=(1, 8, 8), width=8).eval()


@pytest.mark.parametrize("name", [*CONVOLUTIONS, "1x1, stride, padding"])
def test_it_passes_the_case_table(name):
    check_full_rank(name, "thin", {})
    check_composed_kernel(name, "thin", {})


@pytest.mark.parametrize("rule", ["uniform", "energy", "global"])
def test_it_is_planned_decomposed_saved_and_loaded(model, rule, tmp_path):
    plan = tdlib.plan(model, (1, 8, 8), "thin", 1.5, rule=rule, skip=("conv1",))
    assert plan.ratio == pytest.approx(1.5, rel=0.02) and "does not apply" in plan.skipped["linear"]
    small = decompose(model, plan)
    cost = tdlib.count(small, (1, 8, 8))
    assert (cost.params, cost.macs) == (plan.params, plan.macs)
    tdlib.save(small, tmp_path / "small.safetensors")
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(tdlib.load(tmp_path / "small.safetensors")(x), small(x))
    assert {row["format"] for row in tdlib.compare(model, small, (1, 8, 8), repeats=1).rows} == {"", "thin"}


def test_it_is_projected_batched_and_decomposed_under_sigma(model):
    plan = tdlib.plan(model, (1, 8, 8), "thin", 1.5, skip=("conv1",))
    kernels = {name: model.get_submodule(name).weight.detach() for name in plan}
    small = decompose(model, plan)
    for name, projected in Projection(model, plan)(kernels).items():
        torch.testing.assert_close(projected, tdlib.to_dense(small.get_submodule(name)), rtol=1e-3, atol=1e-5)
    x = torch.randn(64, 1, 8, 8) * torch.linspace(0.1, 3, 8)
    aware = decompose(model, plan, tdlib.statistics(model, [x]))
    dense, plain, aware = (net(x) for net in (model, small, aware))
    assert (aware - dense).norm() < (plain - dense).norm()


def test_a_method_compresses_in_it(model):
    x = torch.randn(8, 1, 8, 8)
    small = tdlib.compress(model, "direct", [x], format="thin", ratio=1.5, progress=False)
    assert {layer.format for layer in tdlib.provenance(small).layers.values()} == {"thin"}
    assert "thin" in tdlib.methods.available().loc["admm", "formats"]


def test_it_is_exported(model, tmp_path):
    pytest.importorskip("onnxruntime")
    small = decompose(model, tdlib.plan(model, (1, 8, 8), "thin", 1.5))
    assert to_onnx(small, tmp_path / "small.onnx", (1, 8, 8)) < 1e-4


def test_a_class_that_defines_nothing_says_what_is_missing():
    with pytest.raises(TypeError, match="KernelFormat must define layout"):
        KernelFormat("nothing", (8, 6, 3, 3), {})
    register(Format("thin", "", {"linear": type("Half", (Thin,), {"macs": KernelFormat.macs})}))
    with pytest.raises(TypeError, match="Half must define macs"):
        tdlib.plan(nn.Sequential(nn.Linear(9, 9)), (9,), "thin", 1.2)
