"""Save and load: same outputs, one file, nothing partial, clear refusals; files of the version before."""

import errno
import json
import math
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import tdlib
from tdlib.calibration.statistics import Statistics
from tdlib.errors import CheckpointError, FileError, MemoryLimitError, TdlibError
from tdlib.files import read_tensors, write_tensors
from tdlib.formats import LayerPlan, skeleton
from tdlib.io import size_on_disk
from tdlib.network import provenance

V0 = Path(__file__).parent / "fixtures" / "v0"  # written by the version before, with what they gave there
EXPECTED = json.loads((V0 / "expected.json").read_text())


@pytest.fixture
def small():
    torch.manual_seed(0)
    model = tdlib.models.build("resnet20", 10)
    plan = tdlib.plan(model, (3, 32, 32), format="tt", ratio=3, order=2, skip=("conv1", "linear"))
    return skeleton(model, plan).eval()


def x(*shape):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))


def test_round_trip_by_the_path_alone(small, tmp_path):
    path = tmp_path / "small.safetensors"
    tdlib.save(small, path)
    rng = torch.get_rng_state()
    again = tdlib.load(path)
    assert torch.equal(rng, torch.get_rng_state()) and not again.training
    torch.testing.assert_close(again(x(3, 16, 16)), small(x(3, 16, 16)), rtol=0, atol=0)
    assert provenance(again).layers == provenance(small).layers
    assert provenance(again).spec["name"] == "resnet20"
    assert [p.name for p in tmp_path.iterdir()] == ["small.safetensors"]
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["tdlib"])
    assert header["version"] == 3 and header["library"] == tdlib.__version__
    assert size_on_disk(small) <= path.stat().st_size


@pytest.mark.parametrize("name", ["cnn", "lstm"])
def test_dense_and_decomposed_networks_with_an_input_shape(name, tmp_path):
    model = tdlib.models.build(name, 3, input_shape=(1, 12, 12)).eval()
    plan = tdlib.plan(model, (1, 12, 12), format="svd", ratio=1.5)
    for k, network in enumerate((model, tdlib.decompose(model, plan))):
        tdlib.save(network, tmp_path / f"{k}.safetensors")
        again = tdlib.load(tmp_path / f"{k}.safetensors")
        torch.testing.assert_close(again(x(1, 12, 12)), network(x(1, 12, 12)), rtol=0, atol=0)
    assert tdlib.Plan.from_dict(provenance(again).plan).ratio == plan.ratio


class Own(nn.Module):
    """Not from tdlib.models: a tied weight, a buffer, and mixed types."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.out = nn.Linear(8, 4).bfloat16()
        self.register_buffer("steps", torch.tensor(7))

    def forward(self, x):
        x = self.lstm(self.conv(x).flatten(2).mT)[0].mean(1)
        return self.out(self.b(self.a(x)).bfloat16())


def test_a_network_of_ones_own_needs_the_dense_one(tmp_path):
    torch.manual_seed(0)
    dense = Own().eval()
    small = tdlib.decompose(dense, {"conv": LayerPlan("tucker2", (4, 2))})
    small.conv[2].bias = None
    small.out = nn.Linear(8, 4).bfloat16()
    path = tmp_path / "own.safetensors"
    tdlib.save(small, path)
    with pytest.raises(CheckpointError, match=r"tdlib\.load\(path, model=network\)"):
        tdlib.load(path)
    with pytest.raises(CheckpointError, match="does not fit Own"):
        tdlib.load(path, model=Own())  # expects the bias
    small.conv[2].bias = nn.Parameter(torch.ones(8))
    small.steps += 1
    tdlib.save(small, path)
    other = Own().float()
    before = {k: v.clone() for k, v in other.state_dict().items()}
    again = tdlib.load(path, model=other)
    torch.testing.assert_close(again(x(3, 6, 6)), small(x(3, 6, 6)), rtol=0, atol=0)
    assert again.b.weight is again.a.weight and again.out.weight.dtype == torch.bfloat16 and again.steps == 8
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    with pytest.raises(CheckpointError, match="replaced layers already"):
        tdlib.load(path, model=small)


def test_biases_gained_after_decomposition_are_kept(small, tmp_path):
    conv = small.layer2[0].conv2
    conv.bias = nn.Parameter(torch.full((32,), 0.5))
    tdlib.save(small, tmp_path / "m.safetensors")
    again = tdlib.load(tmp_path / "m.safetensors")
    torch.testing.assert_close(again(x(3, 16, 16)), small(x(3, 16, 16)), rtol=0, atol=0)


def test_refusals(small, tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(CheckpointError, match="cannot read"):
        tdlib.load(path)
    path.write_bytes(b"not a safetensors file at all")
    with pytest.raises(CheckpointError, match="cannot read"):
        tdlib.load(path)
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=r"not written by tdlib\.save"):
        tdlib.load(path)
    tdlib.save(small, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        tdlib.load(path)
    header = {"version": 99, "spec": None, "layers": {}, "plan": None, "aliases": {}}
    save_file({"w": torch.ones(2)}, path, metadata={"tdlib": json.dumps(header)})
    with pytest.raises(CheckpointError, match="version 99"):
        tdlib.load(path)
    header |= {"version": 1, "spec": {"name": "resnet21", "classes": 10, "kwargs": {}}}
    save_file({"w": torch.ones(2)}, path, metadata={"tdlib": json.dumps(header)})
    with pytest.raises(CheckpointError, match="resnet21"):
        tdlib.load(path)
    header["spec"]["name"] = "resnet20"
    save_file({"w": torch.ones(2)}, path, metadata={"tdlib": json.dumps(header)})
    with pytest.raises(CheckpointError, match="does not fit"):
        tdlib.load(path)


def test_a_failed_save_leaves_the_old_file(small, tmp_path):
    path = tmp_path / "m.safetensors"
    tdlib.save(small, path)
    before = path.read_bytes()
    provenance(small).layers["x"] = LayerPlan("tt", (object(),))
    with pytest.raises(CheckpointError, match="JSON"):
        tdlib.save(small, path)
    assert path.read_bytes() == before
    del provenance(small).layers["x"]
    with pytest.raises(FileError, match="cannot write"):
        tdlib.save(small, tmp_path / "missing" / "m.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


# -- damaged and hostile files


def saved(path, name="cnn", classes=3, planned=None, **kwargs):
    """A small network in a file: (its tensors, its header)."""
    model = tdlib.models.build(name, classes, **({"width": 4} if name == "cnn" else {}), **kwargs)
    tdlib.save(skeleton(model, planned or {}), path)
    tensors, metadata = read_tensors(path)
    return {key: value.clone() for key, value in tensors.items()}, json.loads(metadata["tdlib"])


def forge(path, tensors, header):
    """A file whose SHA-256 is right: sums protect from damage, not from forgery."""
    text = header if isinstance(header, str) else json.dumps(header)
    write_tensors(path, tensors, {"tdlib": text})


@pytest.mark.parametrize("part", ["network", "statistics"])
def test_every_flipped_bit_is_noticed(part, tmp_path):
    path, read = tmp_path / "f.safetensors", tdlib.load
    if part == "network":
        saved(path)
    else:
        Statistics({"a": torch.eye(3)}, {"a": torch.ones(3)}, {"a": 7}, {"a": torch.eye(2)}).save(path)
        read = tdlib.load_statistics
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    draw = random.Random(0)
    for k in range(200):
        damaged = bytearray(whole)
        damaged[draw.randrange(header if k % 2 else len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"damaged|cannot read|not written by"):
            read(path)


def test_networks_of_a_versioned_layout_load_again(tmp_path):
    """mnasnet's own loading asks for the version that torch keeps beside the tensors."""
    model = tdlib.models.build("mnasnet0_5", 2).eval()
    tdlib.save(model, tmp_path / "m.safetensors")
    again = tdlib.load(tmp_path / "m.safetensors")
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())


@pytest.mark.parametrize(
    "name, kwargs, named",
    [
        ("timm:resnet18", {"checkpoint_path": "evil.pth"}, "checkpoint_path"),
        ("timm:resnet18", {"pretrained": True}, "pretrained"),
        ("resnet18", {"weights": "DEFAULT"}, "weights"),
        ("resnet18", {"norm_layer": "x"}, "norm_layer"),
        ("cnn", {"hidden": 4}, "hidden"),
    ],
)
def test_a_file_chooses_no_argument_that_could_open_another(name, kwargs, named, tmp_path, monkeypatch):
    def never(*args, **more):
        pytest.fail("the network was built")

    path = tmp_path / "m.safetensors"
    tensors, header = saved(path)
    forge(path, tensors, header | {"spec": {"name": name, "classes": 3, "kwargs": kwargs}})
    monkeypatch.setattr("tdlib.io.build", never)
    with pytest.raises(CheckpointError, match=f"built with {named}, which a file may not set"):
        tdlib.load(path)


def test_an_argument_that_no_file_may_set_is_named_when_saving(tmp_path):
    path = tmp_path / "m.safetensors"
    model = tdlib.models.build("squeezenet1_1", 2).eval()
    provenance(model).spec["kwargs"]["norm_layer"] = nn.GroupNorm
    with pytest.warns(UserWarning, match=r"built with norm_layer: .* tdlib\.load\(path, model=network\)"):
        tdlib.save(model, path)
    with pytest.raises(CheckpointError, match=r"tdlib\.load\(path, model=network\)"):
        tdlib.load(path)
    again = tdlib.load(path, model=tdlib.models.build("squeezenet1_1", 2))
    assert torch.equal(again(x(3, 64, 64)), model(x(3, 64, 64)))


HUGE = {"name": "cnn", "classes": 10**12, "kwargs": {"width": 4}}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"spec": HUGE}, "may be used|linear.weight has shape"),
        ({"spec": HUGE | {"classes": 3, "kwargs": {"width": 10**9}}}, "may be used|does not fit"),
        ({"spec": HUGE | {"classes": 10**30}}, "does not fit"),
        ({"spec": HUGE | {"classes": 4, "kwargs": {"width": 4}}}, r"linear.weight has shape \(3, 8\)"),
        ({"spec": HUGE | {"classes": 3.0}}, "'spec' in its header"),
        ({"spec": HUGE | {"classes": True}}, "'spec' in its header"),
        ({"spec": HUGE | {"classes": 3, "kwargs": []}}, "'spec' in its header"),
        ({"spec": HUGE | {"classes": 3, "kwargs": {"width": "a"}}}, "does not fit"),
        ({"spec": HUGE | {"classes": 3, "kwargs": {"width": None}}}, "does not fit"),
        ({"spec": HUGE | {"classes": 3, "kwargs": {"input_shape": []}}}, "does not fit"),
        ({"spec": "cnn"}, "'spec' in its header"),
        ({"spec": {}}, "'spec' in its header"),
        ({"layers": []}, "'layers' in its header"),
        ({"layers": None}, "'layers' in its header"),
        ({"layers": {"conv1": {"format": "tt", "ranks": ["a"], "options": {}}}}, "'layers' in its header"),
        ({"layers": {"conv1": {"format": "tt", "ranks": [math.nan], "options": {}}}}, "'layers'"),
        ({"layers": {"conv1": {"format": "tt", "ranks": [None], "options": {}}}}, "'layers'"),
        ({"layers": {"conv1": {"format": "tt", "ranks": [1, 1], "options": {"order": 10**9}}}}, "fit"),
        ({"layers": {"conv1": {"format": "tt", "ranks": [1, 1], "options": {"seed": []}}}}, "fit"),
        ({"layers": {"conv2": {"format": "tr", "ranks": [10**8] * 3, "options": {}}}}, "fit|needs about"),
        ({"layers": {"conv2": {"format": "cp", "ranks": [10**17], "options": {}}}}, "fit"),
        ({"layers": {"conv1.weight": {"format": "cp", "ranks": [1], "options": {}}}}, "fit"),
        ({"aliases": {"conv1.weight": 7}}, "'aliases' in its header"),
        ({"aliases": [1]}, "'aliases' in its header"),
        ({"aliases": {"conv9.weight": "conv1.weight"}}, "unexpected conv9.weight"),
        ({"plan": 7}, "'plan' in its header"),
        ({"versions": {"": "new"}}, "'versions' in its header"),
        ({"version": "3"}, "not written by"),
        ({"version": 0}, "not written by"),
        ("[" * 100_000, "not written by"),
        ("[]", "not written by"),
        ("7", "not written by"),
    ],
)
def test_headers_that_no_save_wrote(changes, message, tmp_path):
    path = tmp_path / "m.safetensors"
    tensors, header = saved(path)
    forge(path, tensors, changes if isinstance(changes, str) else header | changes)
    with pytest.raises(TdlibError, match=message):
        tdlib.load(path)


def test_tensors_of_another_kind_and_overlong_headers_are_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    tensors, header = saved(path)
    forge(path, tensors | {"conv1.weight": tensors["conv1.weight"].to(torch.int8)}, header)
    with pytest.raises(CheckpointError, match=r"conv1.weight is torch.int8"):
        tdlib.load(path)
    forge(path, tensors | {"conv1.bias": torch.ones(1)}, header)
    with pytest.raises(CheckpointError, match=r"conv1.bias has shape \(1,\)"):
        tdlib.load(path)
    with pytest.raises(CheckpointError, match="cannot be read again"):
        forge(path, tensors, header | {"plan": {"a": "b" * 2**23}})
    save_file({}, path, metadata={"tdlib": "[" + "[]," * 2**22})
    with pytest.raises(CheckpointError, match="overlong header"):
        tdlib.load(path)


def test_a_dense_network_too_large_for_the_machine_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    saved(path)
    monkeypatch.setattr("tdlib.memory.free", lambda device="cpu": 1000)
    with pytest.raises(MemoryLimitError, match=r"the dense network of .* needs about"):
        tdlib.load(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"mean.a": None},
        {"mean.a": torch.ones(2)},
        {"mean.a": torch.ones(3, 1)},
        {"sigma.a": torch.ones(3)},
        {"sigma.a": torch.ones(2, 2)},
        {"weight.a": torch.ones(2, 3)},
        {"weight.b": torch.ones(2, 2)},
        {"sigma.a": torch.ones(3, 3, dtype=torch.int64)},
        {"other": torch.ones(2)},
        {"counts": '{"a": 0}'},
        {"counts": '{"a": "7"}'},
        {"counts": '{"a": 7, "b": 7}'},
        {"counts": "[7]"},
        {"counts": "{"},
        {"counts": "[" * 100_000},
        {"counts": None},
    ],
)
def test_statistics_that_do_not_go_together_are_refused(changes, tmp_path):
    """With a right SHA-256, and without one as in the files of the version before."""
    path = tmp_path / "s.safetensors"
    whole = {"sigma.a": torch.eye(3), "mean.a": torch.ones(3), "weight.a": torch.eye(2), "counts": '{"a": 7}'}
    parts = {key: value for key, value in (whole | changes).items() if value is not None}
    text = {key: value for key, value in parts.items() if isinstance(value, str)}
    tensors = {key: value for key, value in parts.items() if key not in text}
    for write in (write_tensors, lambda path, tensors, text: save_file(tensors, path, metadata=text)):
        write(path, tensors, {"tdlib": "statistics", **text})
        with pytest.raises(CheckpointError, match=r"s\.safetensors"):
            tdlib.load_statistics(path)


@pytest.mark.parametrize("what", ["network", "statistics"])
def test_a_full_disk_leaves_the_old_file_and_nothing_partial(what, tmp_path, monkeypatch):
    path = tmp_path / "f.safetensors"
    made = {
        "network": lambda: tdlib.save(tdlib.models.build("cnn", 3, width=4), path),
        "statistics": Statistics({"a": torch.eye(3)}, {"a": torch.ones(3)}, {"a": 7}).save,
    }
    write = made[what] if what == "network" else lambda: made[what](path)
    write()
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match="No space left on device; the file that was there is unchanged"):
        write()
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# -- files of the version before


def example():
    """The input that EXPECTED's outputs are for."""
    torch.manual_seed(1)
    return torch.randn(2, 1, 8, 8)


def digits_network(row):
    torch.manual_seed(0)
    return tdlib.models.build(**row)


@pytest.mark.parametrize("name", EXPECTED["networks"])
def test_networks_of_the_version_before_load_and_are_saved_anew(name, tmp_path):
    row, dense = EXPECTED["networks"][name], None
    if "dense" in row:  # a network of its user's own
        dense = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    network = tdlib.load(V0 / name, dense)
    torch.testing.assert_close(network(example()), torch.tensor(row["outputs"]), rtol=1e-5, atol=1e-6)
    if "ranks" in row:
        layers = provenance(network).layers
        assert {layer: list(planned.ranks) for layer, planned in layers.items()} == row["ranks"]
        assert {layer: planned.format for layer, planned in layers.items()} == row["formats"]
        plan = tdlib.Plan.from_dict(provenance(network).plan)
        assert (plan.params, plan.macs) == (row["params"], row["macs"]) and dict(plan) == layers
        gained = 8 if name.startswith("gained") else 0  # a bias that no plan knows of
        cost = tdlib.count(network, (1, 8, 8))
        assert cost.params - gained == row["params"]
        # Composing takes less since.
        composed = any(planned.format.startswith("shuffled-") for planned in layers.values())
        assert cost.macs == row["macs"] or (composed and cost.macs < row["macs"])
    tdlib.save(network, tmp_path / name)
    assert torch.equal(tdlib.load(tmp_path / name, dense)(example()), network(example()))


def test_statistics_of_the_version_before_load():
    found = tdlib.load_statistics(V0 / "statistics.safetensors")
    assert found.counts == EXPECTED["statistics"]["counts"]
    for name, norms in EXPECTED["statistics"]["norms"].items():
        parts = {"sigma": found[name], "mean": found.means[name], "weight": found.weights[name]}
        assert {key: float(part.norm()) for key, part in parts.items()} == pytest.approx(norms, rel=1e-6)


def test_a_training_begun_by_the_version_before_is_refused(tmp_path):
    """Its identity did not know the starting weights."""
    row = EXPECTED["checkpoint"]
    shutil.copytree(V0 / "checkpoint", tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match=r"differs in weights \(absent there"):
        tdlib.train.fit(
            digits_network(row["build"]), tdlib.data.load(**row["data"]), **row["fit"],
            checkpoint=tmp_path / "checkpoint", device="cpu", progress=False,
        )  # fmt: skip
    (kept,) = (tmp_path / "checkpoint").iterdir()
    assert kept.read_bytes() == (V0 / "checkpoint" / kept.name).read_bytes()
