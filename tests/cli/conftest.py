"""A folder as a user has it: images, arrays, a trained network and its compressed form."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import tdlib


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """The folder, made once."""
    folder = tmp_path_factory.mktemp("user")
    random = np.random.default_rng(0)
    for index, name in enumerate(("ant", "bee", "cow")):
        for number in range(12):
            pixels = random.integers(0, 80, (16, 16, 3), dtype=np.uint8)
            pixels[:, :, index] += 150
            (folder / "photos" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / "photos" / name / f"{number}.png")
    (folder / "unsorted").mkdir()
    for path in (folder / "photos").rglob("*.png"):
        (folder / "unsorted" / f"{path.parent.name}{path.name}").write_bytes(path.read_bytes())
    labels = np.arange(40) % 4
    scans = (random.integers(0, 60, (40, 8, 8)) + 45 * labels[:, None, None]).astype(np.uint8)
    np.savez(
        folder / "scans.npz", train_images=scans, train_labels=labels, test_images=scans, test_labels=labels
    )
    data = tdlib.data.load(f"imagefolder:{folder / 'photos'}")
    torch.manual_seed(0)
    dense = tdlib.models.build("cnn", data.classes, input_shape=data.input_shape)
    tdlib.train.fit(dense, data, epochs=3, batch_size=8, lr=0.05, device="cpu", progress=False)
    tdlib.save(dense, folder / "dense.safetensors")
    tdlib.save(
        tdlib.decompose(dense, tdlib.plan(dense, data.input_shape, format="tucker2", ratio=2)),
        folder / "two.safetensors",
    )
    foreign = tdlib.models.build("cnn", 5, input_shape=data.input_shape)
    save_file(foreign.state_dict(), folder / "five.safetensors")
    return folder


@pytest.fixture
def user(made, tmp_path, monkeypatch):
    """A fresh working directory with links to what `made` made."""
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path
