"""For use: BatchNorm folded away is the same function, what must stay stays; ONNX files are checked."""

import pytest
import torch
from torch import nn

import tdlib
from tdlib.errors import FileError, TdlibError
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
            return self.flat(self.linear(self.after(x.relu()).mean((2, 3)).flatten(1)))

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
    with pytest.raises(TdlibError, match="does not run on inputs of shape"):
        to_onnx(model, path, (2, 8, 8))
    assert not list(tmp_path.iterdir())


class Apart(nn.Module):
    """A convolution and its norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x))


class Reads(Apart):
    def forward(self, x):
        return super().forward(x) + self.conv.weight.sum()


class Named(Apart):
    def forward(self, x):
        return self.norm(input=self.conv(x))


def hooked(name):
    model = Apart()
    model.get_submodule(name).register_forward_hook(lambda module, args, output: output.clamp(0, 0.1))
    return model


def patched():
    model = Apart()
    plain = model.norm.forward
    model.norm.forward = lambda x: 2 * plain(x)
    return model


def rows(length=16, *, flat=None):
    """Linear, then a norm over axis 1: of (N, 16, 16) that is not the axis of the layer's outputs."""
    torch.manual_seed(0)
    before = [] if flat is None else [flat]
    return nn.Sequential(*before, nn.Linear(length, 16), nn.ReLU(), nn.Linear(16, 16), nn.BatchNorm1d(16))


@pytest.mark.parametrize(
    ("make", "shape", "left"),
    [
        (Apart, (4, 5, 5), 0),
        (Named, (4, 5, 5), 0),
        (Reads, (4, 5, 5), 1),
        (lambda: hooked("conv"), (4, 5, 5), 1),
        (lambda: hooked("norm"), (4, 5, 5), 1),
        (patched, (4, 5, 5), 1),
        (rows, (16, 16), 1),
        (rows, (16,), 1),  # the same module: nothing in sight says that its input is flat
        (lambda: rows(256, flat=nn.Flatten()), (16, 16), 0),
        (lambda: rows(16, flat=nn.Flatten(2)), (16, 4, 4), 1),
    ],
)
def test_folding_gives_the_same_outputs_or_leaves_the_norm(make, shape, left):
    torch.manual_seed(0)
    model, x = lively(make()), torch.randn(3, *shape)
    folded = fold_batchnorm(model)
    assert norms(folded) == left
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_random_networks_fold_to_the_same_outputs(seed):
    torch.manual_seed(seed)
    pick = torch.randint(0, 2, (12,)).tolist()
    layers, c = [], 3
    for k in range(4):
        out, groups = (c, c) if pick[k] and k else (6, 1)  # a depthwise one now and then
        layers += [nn.Conv2d(c, out, 3, padding=1, groups=groups, bias=bool(pick[4 + k]))]
        layers += [nn.ReLU()] * pick[8 + k] + [nn.BatchNorm2d(out, affine=bool(pick[k]))]
        c = out
    head = [nn.Flatten(), nn.Linear(c * 16, 5, bias=bool(pick[0])), nn.BatchNorm1d(5)]
    model, x = nn.Sequential(*layers, *head), torch.randn(4, 3, 4, 4)
    model.train()(torch.randn(32, 3, 4, 4))  # statistics of the norms
    model.eval()
    folded = fold_batchnorm(model)
    assert norms(folded) == sum(pick[8:])
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)


def test_norms_after_three_dimensional_convolutions_fold_and_folding_twice_changes_nothing():
    torch.manual_seed(0)
    volume = nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.Flatten(2)
    model = nn.Sequential(*volume, nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4))
    model.train()(torch.randn(8, 2, 5, 5, 5))
    model, x = model.eval(), torch.randn(3, 2, 5, 5, 5)
    folded = fold_batchnorm(fold_batchnorm(model))
    assert [type(m) for m in folded.modules() if "BatchNorm" in type(m).__name__] == [nn.BatchNorm1d]
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)


def test_what_hangs_on_the_network_itself_is_not_folded_away():
    for change in (lambda m: m.register_forward_hook(print), lambda m: setattr(m, "forward", abs)):
        model = Apart()
        change(model)
        with pytest.raises(TdlibError, match=r"hooks are attached|forward is patched"):
            fold_batchnorm(model)


class Tokens(nn.Module):
    """Integers and a mask in, a dict of two outputs out, as networks for text and segmentation have them."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(10, 4), nn.Linear(4, 3)

    def forward(self, tokens, mask):
        x = (self.table(tokens) * mask[..., None]).mean(1)
        return {"out": self.head(x), "aux": [x, tokens.argmax(1), None]}


def test_onnx_of_integers_several_inputs_and_several_outputs(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model, path = Tokens(), tmp_path / "net.onnx"
    inputs = torch.randint(0, 10, (1, 7)), torch.rand(1, 7).double()
    assert to_onnx(model, path, example_inputs=inputs) < 1e-4
    session = onnxruntime.InferenceSession(path)
    assert [given.name for given in session.get_inputs()] == ["input_0", "input_1"]
    assert [out.name for out in session.get_outputs()] == ["out", "aux_0", "aux_1"]
    for wrong in ({}, {"input_shape": (7,), "example_inputs": inputs}):
        with pytest.raises(TdlibError, match="either the input_shape"):
            to_onnx(model, path, **wrong)
    for bad in ((), [1, 2], (torch.ones(2, 3), torch.ones(3)), torch.tensor(1)):
        with pytest.raises(TdlibError, match="batch first, of one size"):
            to_onnx(model, path, example_inputs=bad)


class Odd(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: x / 0, r"NaN or Inf in the model's output 'output'"),
        (lambda x: {"out": x, "gone": x * float("nan")}, r"NaN or Inf in the model's output 'gone'"),
        (lambda x: (x, 3), r"output 'output_1' is a int"),
        (lambda x: torch.linalg.svd(x)[1], r"export failed: DispatchError: No ONNX function found for .*svd"),
    ],
)
def test_what_an_onnx_file_cannot_promise_is_refused_in_one_line(function, words, tmp_path):
    pytest.importorskip("onnxruntime")
    with pytest.raises(TdlibError, match=words) as caught:
        to_onnx(Odd(function), tmp_path / "net.onnx", (3, 4))
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_takes_no_file_is_named(tmp_path):
    pytest.importorskip("onnxruntime")
    with pytest.raises(FileError, match=r"cannot write .*none"):
        to_onnx(nn.Linear(4, 2), tmp_path / "none" / "net.onnx", (4,))
