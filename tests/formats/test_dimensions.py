"""Convolutions in one and three dimensions, from the plan to the file; kernels equal to TensorLy's."""

import copy

import pytest
import tensorly
import torch
from torch import nn

import tdlib
from tdlib.errors import TdlibError
from tdlib.formats import LayerPlan, decompose, get_format, to_dense

tensorly.set_backend("pytorch")


def sound():
    return nn.Sequential(
        nn.Conv1d(2, 24, 7, stride=2, padding=3), nn.BatchNorm1d(24), nn.ReLU(),
        nn.Conv1d(24, 32, 5, padding="same", dilation=2), nn.ReLU(), nn.Conv1d(32, 24, 1),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(24, 4),
    )  # fmt: skip


def video():
    return nn.Sequential(
        nn.Conv3d(3, 16, (3, 5, 5), stride=(1, 2, 2), padding=(1, 2, 2)), nn.BatchNorm3d(16), nn.ReLU(),
        nn.Conv3d(16, 24, 3, padding=1, padding_mode="replicate"), nn.ReLU(), nn.Conv3d(24, 16, 1, stride=2),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


NETWORKS = {"sound": (sound, (2, 40)), "video": (video, (3, 6, 12, 10))}


@pytest.mark.parametrize("by", ["params", "macs"])
@pytest.mark.parametrize("format", ["tucker2", "svd", "cp", "cp4"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_planned_decomposed_and_saved(name, format, by, tmp_path):
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    model = make().eval()
    plan = tdlib.plan(model, shape, format, 2, by=by)
    small, dense = decompose(model, plan), copy.deepcopy(model)
    assert "3" in plan and plan.ratio == pytest.approx(2, rel=0.02)
    cost = tdlib.count(small, shape)
    assert (cost.params, cost.macs) == (plan.params, plan.macs)
    for layer in plan:
        dense.get_submodule(layer).weight.data = to_dense(small.get_submodule(layer)).detach()
    x = torch.randn(2, *shape)
    torch.testing.assert_close(small(x), dense(x), rtol=1e-4, atol=1e-5)
    tdlib.save(small, tmp_path / "small.safetensors")
    assert torch.equal(tdlib.load(tmp_path / "small.safetensors", make())(x), small(x))


@pytest.mark.parametrize("format", ["tucker2", "cp", "cp4"])
@pytest.mark.parametrize("name", NETWORKS)
def test_statistics_lower_the_output_error(name, format):
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    model, x = make()[:4].eval(), torch.randn(24, *shape) * torch.linspace(0.2, 3, shape[-1])
    plan, found = (
        {"3": LayerPlan(format, (4,) * (1 + (format == "tucker2")))},
        tdlib.statistics(model, [x], "3"),
    )
    if (name, format) == ("video", "cp4"):
        with pytest.raises(TdlibError, match="layer '3': cp4 has no data-aware decomposition of a 3-D"):
            decompose(model, plan, found)
        return
    with torch.no_grad():
        plain, aware = ((decompose(model, plan, s)(x) - model(x)).norm() for s in (None, found))
    assert aware < 0.99 * plain


def test_other_formats_say_that_they_do_not_apply():
    for name, kind in (("sound", "1d"), ("video", "3d")):
        make, shape = NETWORKS[name]
        skipped = tdlib.plan(make(), shape, "tt", 1.002).skipped
        assert skipped["3"] == f"format 'tt' does not apply to a conv{kind} layer"
        assert skipped["5"] == f"format 'tt' does not apply to a pointwise{kind} layer"


@pytest.mark.parametrize("size", [(5,), (2, 3, 2)])
def test_kernels_are_as_near_as_tensorlys(size):
    torch.manual_seed(0)
    weight = torch.randn(8, 6, *size)
    ranks, modes = (4, 3), [0, 1]
    (core, factors), _ = tensorly.decomposition.partial_tucker(weight, rank=ranks, modes=modes)
    theirs = weight - tensorly.tenalg.multi_mode_dot(core, factors, modes=modes)
    ours = weight - get_format("tucker2").bind(weight.shape).project(weight, ranks)
    assert ours.norm() <= 1.01 * theirs.norm()
    theirs = weight - tensorly.cp_to_tensor(
        tensorly.decomposition.parafac(weight, 6, init="random", random_state=0)
    )
    ours = weight - get_format("cp4").bind(weight.shape).project(weight, (6,))
    assert ours.norm() <= 1.03 * theirs.norm()
