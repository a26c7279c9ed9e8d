"""Models: exact counts, names of public checkpoints, weights from files, errors that say what is valid."""

import copy
import sys
import urllib.error
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import tdlib
from tdlib import models
from tdlib.errors import CheckpointError, ClassCountError, DataError, TdlibError, UnknownName
from tdlib.models import building
from tdlib.models import weights as weight_files
from tdlib.network import Provenance, provenance


def _count(net):
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    "name, classes, params, bn",
    [
        ("resnet20", 10, 269_722, 1_376),
        ("resnet20", 100, 275_572, 1_376),
        ("resnet32", 10, 464_154, 2_272),
        ("resnet32", 100, 470_004, 2_272),
        ("resnet44", 10, 658_586, 3_168),
        ("resnet56", 10, 853_018, 4_064),
        ("resnet110", 10, 1_727_962, 8_096),
    ],
)
def test_parameter_counts(name, classes, params, bn):
    """He et al. 2016, section 4.2 (0.27, 0.46, 0.66, 0.85 and 1.7 million parameters)."""
    net = models.build(name, classes)
    assert _count(net) == params
    norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert sum(_count(m) for m in norms) == bn
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, classes)


def test_resnet_parameter_names_are_the_public_ones():
    names = set(models.build("resnet20", 10).state_dict())
    expected = {"conv1.weight", "bn1.weight", "linear.weight", "linear.bias"}
    for layer in (1, 2, 3):
        for block in (0, 1, 2):
            for part in (1, 2):
                expected |= {
                    f"layer{layer}.{block}.conv{part}.weight",
                    f"layer{layer}.{block}.bn{part}.running_var",
                }
    assert expected <= names
    assert not [name for name in names if "downsample" in name or "shortcut" in name]


def test_a_narrower_resnet_keeps_its_form_and_odd_widths_work():
    narrow, usual = models.build("resnet20", 10, width=5), models.build("resnet20", 10)
    assert set(narrow.state_dict()) == set(usual.state_dict())
    assert narrow.linear.in_features == 20 and narrow(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_option_a_shortcut_is_subsampling_and_zero_channels():
    block = models.build("resnet20", 10).layer2[0].eval()
    for parameter in block.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.rand(1, 16, 8, 8)
    out = block(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any() and not out[:, 24:].any()


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("name", ["cnn", "lstm"])
def test_small_networks_fit_any_input(name, shape):
    net = models.build(name, 7, input_shape=shape)
    assert net(torch.zeros(2, *shape)).shape == (2, 7)
    spec = {"name": name, "classes": 7, "kwargs": {"input_shape": list(shape)}}
    assert provenance(net) == provenance(copy.deepcopy(net)) == Provenance(spec)


def test_lstm_is_torch_lstm():
    net = models.build("lstm", 4, input_shape=(1, 5, 6), hidden=8)
    reference = torch.nn.LSTM(6, 8, batch_first=True)
    with torch.no_grad():
        reference.weight_ih_l0.copy_(net.input_to_hidden.weight)
        reference.weight_hh_l0.copy_(net.hidden_to_hidden.weight)
        reference.bias_ih_l0.copy_(net.input_to_hidden.bias)
        reference.bias_hh_l0.zero_()
    x = torch.randn(3, 5, 6)
    torch.testing.assert_close(net(x), net.linear(reference(x)[0][:, -1]))
    torch.testing.assert_close(net(x[:, None]), net(x))


def test_grey_stems():
    assert models.build("resnet20", 10, input_shape=(1, 32, 32)).conv1.in_channels == 1
    net = models.build("resnet18", 10, input_shape=(1, 64, 64)).eval()
    assert net(torch.zeros(1, 1, 64, 64)).shape == (1, 10)


def test_torchvision_by_both_names():
    plain, prefixed = models.build("resnet18", 1000), models.build("torchvision:resnet18", 1000)
    assert _count(plain) == _count(prefixed) == 11_689_512
    assert provenance(plain).spec["name"] == "resnet18"
    assert {"resnet20", "cnn", "lstm", "resnet18", "vgg16"} <= set(models.available())


def test_class_names_instead_of_a_count():
    assert models.build("cnn", ["a", "b", "c"]).linear.out_features == 3


@pytest.mark.parametrize("kind", ["safetensors", "pt", "nested", "prefixed"])
def test_weights_from_files_and_half_precision(tmp_path, kind):
    net = models.build("resnet20", 10)
    state = {
        key: value.half() if value.is_floating_point() else value for key, value in net.state_dict().items()
    }
    path = tmp_path / f"w.{'safetensors' if kind == 'safetensors' else 'pt'}"
    if kind == "safetensors":
        state = {key: value for key, value in state.items() if "num_batches" not in key}
        save_file(state, path)
    elif kind == "nested":
        torch.save({"state_dict": state, "epoch": 3}, path)
    else:
        torch.save(
            {("module." if kind == "prefixed" else "") + key: value for key, value in state.items()}, path
        )
    loaded = models.build("resnet20", 10, weights=path)
    for key, value in loaded.state_dict().items():
        if "num_batches" not in key:
            assert value.dtype == torch.float32 and torch.equal(value, state[key].float())


def test_class_mismatch_teaches(tmp_path):
    path = tmp_path / "w.pt"
    net = models.build("cnn", 10)
    torch.save(net.state_dict(), path)
    with pytest.raises(DataError, match=r"for 10 classes, the model has 5.*new_head=True"):
        models.build("cnn", 5, weights=path)
    fresh = models.build("cnn", 5, weights=path, new_head=True)
    assert torch.equal(fresh.conv1.weight, net.conv1.weight) and fresh.linear.out_features == 5


def _evil(path):
    class Evil:
        def __reduce__(self):
            return print, ("code ran",)

    torch.save(Evil(), path)


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda p: p.write_bytes(b"nonsense"), "cannot be read as weights"),
        (lambda p: p.write_bytes(b""), "cannot be read as weights"),
        (_evil, "cannot be read as weights"),
        (lambda p: torch.save([1, 2], p), "holds no state_dict"),
        (lambda p: torch.save({"conv1.weight": torch.zeros(1)}, p), "does not fit SmallCNN: missing"),
        (lambda p: torch.save(models.build("cnn", 10, width=8).state_dict(), p), "has shape"),
        (
            lambda p: torch.save(
                models.build("cnn", 10).state_dict() | {"bn1.bias": torch.full((32,), torch.nan)}, p
            ),
            "NaN or infinite values in bn1.bias",
        ),
    ],
)
def test_bad_weight_files(tmp_path, capsys, write, message):
    path = tmp_path / "w.pt"
    write(path)
    with pytest.raises(DataError, match=message):
        models.build("cnn", 10, weights=path)
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: models.build("resnet21", 10), UnknownName, "resnet20"),
        (lambda: models.build("torchvision:nothing", 10), UnknownName, "resnet18"),
        (lambda: models.build("resnet18", 5, weights="DEFAULT"), ClassCountError, "for 1000 classes.*has 5"),
        (lambda: models.build("cnn", 0), TdlibError, "at least 1"),
        (lambda: models.build("cnn", 10, depth=3), DataError, "depth"),
        (lambda: models.build("lstm", 10, input_shape=(3,)), DataError, "sequences"),
        (lambda: models.build("cnn", 10, weights="IMAGENET1K_V1"), DataError, "no weights named"),
        (lambda: models.build("cnn", 10, weights="missing/w.pt"), DataError, "does not exist"),
        (lambda: models.build("resnet18", 1000, weights="IMAGENET1K_V9"), UnknownName, "IMAGENET1K_V1"),
        (lambda: models.pretrained("resnet20-nothing"), UnknownName, "unknown pretrained network"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_timm_absent_says_how(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(TdlibError, match=r"this needs timm.*pip install 'tdlib\[timm\]'"):
        models.build("timm:resnet10t", 10)


def test_pretrained_reads_the_zoo(tmp_path, monkeypatch):
    net = models.build("resnet20", 5)
    state = {key: value.half() for key, value in net.state_dict().items() if value.is_floating_point()}
    save_file(
        state, tmp_path / "mine.safetensors", {"name": "resnet20", "classes": "5", "input_shape": "3,32,32"}
    )
    monkeypatch.setattr(building, "ZOO", tmp_path)
    loaded = models.pretrained("mine")
    assert torch.equal(loaded.linear.weight, net.linear.weight.half().float())
    with pytest.raises(UnknownName, match="Valid names: mine"):
        models.pretrained("other")


def test_loading_is_all_or_nothing():
    net = models.build("cnn", 10)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    state = {key: torch.zeros_like(value) for key, value in before.items()}
    state["linear.weight"] = torch.zeros(3, 3)
    with pytest.raises(DataError):
        weight_files.load_weights(net, state)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_every_shipped_network_says_what_it_is_and_loads_by_name():
    there = models.shipped()
    assert there
    for name, meta in there.items():
        assert {"name", "classes", "input_shape", "dataset", "scale", "test_accuracy"} <= meta.keys()
        net = models.pretrained(name)
        same = models.build(meta["name"], int(meta["classes"]), weights=name)
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), same.parameters(), strict=True))
        assert (building.ZOO / f"{name}.safetensors").stat().st_size <= 2**20


def test_weights_that_cannot_be_downloaded_name_the_file_to_provide(monkeypatch):
    import torchvision

    def fail(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torchvision.models, "get_model", fail)
    with pytest.raises(DataError, match=r"could not be downloaded.*no route.*resnet18-f37072fd\.pth"):
        models.build("resnet18", 1000, weights="DEFAULT")


def test_torchvisions_weights_say_what_they_were_trained_on(monkeypatch, capsys):
    import torchvision

    size = {"resnet18": (224, "bilinear"), "inception_v3": (299, "bilinear"), "swin_v2_t": (256, "bicubic")}
    for name, (side, interpolation) in size.items():
        inputs = models.inputs_of(name, "DEFAULT")
        assert inputs["input_shape"] == [3, side, side] and inputs["interpolation"] == interpolation
        assert inputs["mean"] == [0.485, 0.456, 0.406] and inputs["classes"] is None
    assert models.inputs_of("resnet18", None) is None
    with pytest.raises(UnknownName, match="IMAGENET1K_V1"):
        models.inputs_of("torchvision:resnet18", "IMAGENET")
    get_model = torchvision.models.get_model

    def downloaded(name, weights, **options):
        if weights:
            print("Downloading")
        return get_model(name, weights=None)

    monkeypatch.setattr(torchvision.models, "get_model", downloaded)
    net = models.build("squeezenet1_1", 1000, weights="DEFAULT")
    assert provenance(net).inputs == models.inputs_of("squeezenet1_1", "DEFAULT")
    assert provenance(models.build("squeezenet1_1", 1000)).inputs is None
    grey = models.build("squeezenet1_1", 5, weights="DEFAULT", new_head=True, input_shape=(1, 64, 64))
    assert provenance(grey).inputs is None  # its first convolution is fresh
    said = capsys.readouterr()
    assert "Downloading" in said.err and not said.out


@pytest.fixture
def timm(monkeypatch):
    """As much of timm as is called, with one network."""
    record = {"input_size": (3, 224, 224), "mean": (0.5,) * 3, "std": (0.5,) * 3, "num_classes": 1000}
    config = SimpleNamespace(to_dict=lambda: record)

    def create_model(name, pretrained, num_classes, in_chans):
        if pretrained and name == "mixer.gone":
            raise OSError("no route to host")
        net = models.SmallCNN(num_classes, in_chans, width=4)
        net.made_as = (name, pretrained)
        return net

    fake = ModuleType("timm")
    fake.__version__, fake.list_models, fake.create_model = "1.0", lambda: ["mixer"], create_model
    fake.get_pretrained_cfg = lambda name: {"mixer": config, "mixer.gone": config}.get(name)
    fake.data = ModuleType("timm.data")
    fake.data.resolve_data_config = lambda pretrained_cfg: {"interpolation": "bicubic", **pretrained_cfg}
    monkeypatch.setitem(sys.modules, "timm", fake)
    monkeypatch.setitem(sys.modules, "timm.data", fake.data)


@pytest.mark.usefixtures("timm")
def test_timms_weights_say_what_they_were_trained_on():
    net = models.build("timm:mixer", 1000, weights="DEFAULT")
    assert net.made_as == ("mixer", True)
    assert provenance(net).inputs == {
        "classes": None, "input_shape": [3, 224, 224], "mean": [0.5] * 3, "std": [0.5] * 3,
        "interpolation": "bicubic",
    }  # fmt: skip
    assert provenance(models.build("timm:mixer", 10)).inputs is None


@pytest.mark.usefixtures("timm")
def test_timms_weights_are_refused_as_torchvisions_are():
    with pytest.raises(ClassCountError, match="'DEFAULT' of timm:mixer is for 1000 classes, the model has 5"):
        models.build("timm:mixer", 5, weights="DEFAULT")
    assert models.build("timm:mixer", 5, weights="DEFAULT", new_head=True).linear.out_features == 5
    with pytest.raises(DataError, match=r"'gone' of timm:mixer could not be loaded \(no route.*HF_HUB"):
        models.build("timm:mixer", 1000, weights="gone")
    with pytest.raises(UnknownName, match="mixer"):
        models.build("timm:mixture", 10)


def test_weights_from_a_saved_network_bring_its_inputs(tmp_path):
    inputs = {
        "classes": ["a", "b", "c"], "input_shape": [3, 8, 8], "mean": [0.5] * 3, "std": [0.5] * 3,
        "interpolation": "bilinear",
    }  # fmt: skip
    net = models.build("cnn", 3, input_shape=(3, 8, 8))
    provenance(net).inputs = inputs
    tdlib.save(net, tmp_path / "a.safetensors")
    assert models.inputs_of("cnn", tmp_path / "a.safetensors") == inputs
    same = models.build("cnn", 3, input_shape=(3, 8, 8), weights=tmp_path / "a.safetensors")
    assert provenance(same).inputs == inputs
    other = models.build("cnn", 4, input_shape=(3, 8, 8), weights=tmp_path / "a.safetensors", new_head=True)
    assert provenance(other).inputs == inputs | {"classes": None}
    provenance(net).inputs = inputs | {"mean": "0.5"}
    tdlib.save(net, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="inputs"):
        tdlib.load(tmp_path / "b.safetensors")
    save_file(net.state_dict(), tmp_path / "c.safetensors")
    assert models.inputs_of("cnn", tmp_path / "c.safetensors") is None
