"""Save and load: same outputs, one file, nothing partial, clear refusals; files of the version before."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import tdlib
from tdlib.errors import CheckpointError, FileError
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
    assert header["version"] == 2 and header["library"] == tdlib.__version__
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
    with pytest.raises(CheckpointError, match="cannot read"):
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


def test_a_training_begun_by_the_version_before_goes_on(tmp_path):
    """The same rows and outputs as of the training that was never interrupted."""
    row = EXPECTED["checkpoint"]
    shutil.copytree(V0 / "checkpoint", tmp_path / "checkpoint")
    network = digits_network(row["build"])
    history = tdlib.train.fit(
        network, tdlib.data.load(**row["data"]), **row["fit"],
        checkpoint=tmp_path / "checkpoint", device="cpu", progress=False,
    )  # fmt: skip
    assert history.finished and len(history.rows) == row["fit"]["epochs"]
    for found, expected in zip(history.rows, row["rows"], strict=True):
        assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        outputs = network.eval()(example())
    torch.testing.assert_close(outputs, torch.tensor(row["outputs"]), rtol=1e-4, atol=1e-5)
