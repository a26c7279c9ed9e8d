"""BatchNorm statistics and mean outputs taken anew from calibration inputs."""

import copy

import pytest
import torch
from torch import nn

from tdlib.calibration import correct_bias, recalibrate_batchnorm, statistics
from tdlib.errors import DataError
from tdlib.formats import decompose


def test_batchnorm_recalibration_takes_the_statistics_of_the_data():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.5)).eval()
    x = torch.randn(64, 2, 4, 4) * 3 + 1
    recalibrate_batchnorm(model, x.split(16))
    y = model[0](x).detach()
    torch.testing.assert_close(model[1].running_mean, y.mean((0, 2, 3)), atol=1e-5, rtol=1e-5)
    assert model[1].momentum == 0.1 and not model[1].training
    with pytest.raises(DataError):
        recalibrate_batchnorm(nn.Linear(2, 2), [torch.zeros(1, 2)])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DataError, match="empty"):
        recalibrate_batchnorm(model, [])
    with pytest.raises(DataError, match="must be tensors"):
        recalibrate_batchnorm(model, ["a"])
    assert model[1].momentum == 0.1 and not model[1].training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("bias", [True, False])
def test_bias_correction_restores_the_mean_output_without_new_parameters(bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=bias), nn.BatchNorm2d(6), nn.ReLU()).eval()
    x = torch.rand(50, 3, 6, 6)
    stats = statistics(model, [x])
    small = decompose(model, {"0": {"format": "tucker2", "ranks": (2, 2), "options": {}}}, statistics=stats)
    size = sum(p.numel() for p in small.parameters())
    assert correct_bias(small, model, stats, ["0"], x) == ["0"]
    assert sum(p.numel() for p in small.parameters()) == size
    means = [m[:2](x).mean((0, 2, 3)).detach() for m in (model, small)]
    torch.testing.assert_close(means[1], means[0], atol=1e-4, rtol=1e-4)
    bare = nn.Sequential(nn.Linear(3, 2, bias=False))
    stats = statistics(bare, [torch.rand(9, 3)])
    assert correct_bias(copy.deepcopy(bare), bare, stats, ["0"], torch.rand(1, 3)) == []
