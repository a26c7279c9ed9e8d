"""For use: BatchNorm folded away is the same function, what must stay stays; ONNX files are checked."""

import pytest
import torch
from torch import nn

import tdlib
from tdlib.errors import TdlibError
from tdlib.export import fold_batchnorm, to_onnx


def lively(model):
    """Norms with statistics and weights that are not trivial."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            for tensor, low in ((module.running_mean, -0.3), (module.bias.data, -0.3)):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + low)
            for tensor in (module.running_var, module.weight.data):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model.eval()


def norms(model):
    return sum(isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d) for m in model.modules())


@pytest.mark.parametrize(
    ("name", "format"),
    [("resnet20", None), ("resnet20", "tucker2"), ("cnn", "tt"), ("cnn", "cp4"), ("cnn", "svd")],
)
def test_folded_networks_compute_the_same_without_norms(name, format):
    torch.manual_seed(0)
    model = lively(tdlib.models.build(name, 10, input_shape=(3, 32, 32)))
    if format is not None:
        model = tdlib.decompose(model, tdlib.plan(model, (3, 32, 32), format, 2.0)).eval()
    x = torch.randn(2, 3, 32, 32)
    folded = fold_batchnorm(model)
    assert norms(model) > 0 and norms(folded) == 0
    assert torch.allclose(folded(x), model(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("format", ["tr", "shuffled-tt"])
def test_norms_after_layers_that_are_no_chain_stay(format):
    torch.manual_seed(0)
    model = lively(tdlib.models.build("cnn", 10, input_shape=(1, 8, 8)))
    small = tdlib.decompose(model, tdlib.plan(model, (1, 8, 8), format, 2.0, skip=("conv1", "linear"))).eval()
    folded, x = fold_batchnorm(small), torch.randn(2, 1, 8, 8)
    assert norms(small) == 4 and norms(folded) == 3
    assert torch.allclose(folded(x), small(x), atol=1e-4, rtol=1e-4)


def test_a_norm_after_something_else_or_a_shared_layer_stays():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.one, self.two = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            self.after, self.linear, self.flat = nn.BatchNorm2d(4), nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            x = self.two(self.conv(self.one(self.conv(x))))
            return self.flat(self.linear(self.after(x.relu()).mean((2, 3))))

    model = lively(Odd())
    folded, x = fold_batchnorm(model), torch.randn(3, 4, 5, 5)
    assert norms(folded) == 3
    assert torch.allclose(folded(x), model(x), atol=1e-5)


def test_a_forward_that_cannot_be_traced_is_named():
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(TdlibError, match="not traceable"):
        fold_batchnorm(Branches())


def test_an_onnx_file_computes_the_same_or_is_not_written(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = lively(tdlib.models.build("cnn", 10, input_shape=(1, 8, 8), width=8)).train()
    path = tmp_path / "net.onnx"
    assert to_onnx(model, path, (1, 8, 8)) < 1e-4
    assert model.training and [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
    path.unlink()
    monkeypatch.setattr("tdlib.export.TOLERANCE", -1.0)
    with pytest.raises(TdlibError, match="computes something else"):
        to_onnx(model, path, (1, 8, 8))
    with pytest.raises(TdlibError, match="export failed"):
        to_onnx(model, path, (2, 8, 8))
    assert not list(tmp_path.iterdir())
