"""Every chapter runs on a user's own images: a folder of colour files or a file of grey arrays."""

from itertools import cycle

import nbformat
import numpy as np
import pytest
from PIL import Image

from tdbook import chapters

#: Every chapter, and the kind of data that it is given: half of them grey arrays, half colour files.
CHAPTERS = dict(zip(chapters.names(), cycle(["arrays", "folder"]), strict=False))
#: Values that make a chapter short, by parameter; a chapter gets those that it declares.
SHORT = {
    "model": "cnn", "seed": 1, "device": "cpu", "ratio": "2", "ratios": "2", "batch_size": 8, "epochs": 1,
    "dense_epochs": 1, "finetune_epochs": 1, "final_epochs": 1, "extras": False, "scratch": False,
    "samples": 24, "seeds": 1, "calibration_images": 24,
}  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """12 x 10 pixels, colour, 3 classes, no given split."""
    random, path = np.random.default_rng(0), tmp_path_factory.mktemp("user") / "photos"
    for index, name in enumerate(("ant", "bee", "cow")):
        (path / name).mkdir(parents=True)
        for number in range(14):
            pixels = random.integers(0, 90, (10, 12, 3), dtype=np.uint8)
            pixels[:, :, index] += 150
            Image.fromarray(pixels).save(path / name / f"{number}.png")
    return f"imagefolder:{path}"


@pytest.fixture(scope="session")
def arrays(tmp_path_factory):
    """9 x 9 pixels, grey, 4 classes, arrays as MedMNIST names them."""
    random, path = np.random.default_rng(1), tmp_path_factory.mktemp("user") / "scans.npz"
    parts = {}
    for split, number in (("train", 48), ("val", 12), ("test", 16)):
        labels = np.arange(number) % 4
        parts[f"{split}_labels"] = labels[:, None]
        noise = random.integers(0, 60, (number, 9, 9))
        parts[f"{split}_images"] = (noise + 45 * labels[:, None, None]).astype(np.uint8)
    np.savez(path, **parts)
    return f"npz:{path}"


@pytest.mark.parametrize(("chapter", "kind"), CHAPTERS.items())
def test_chapter_runs_on_own_data(chapter, kind, request, tmp_path, monkeypatch):
    monkeypatch.setenv("TDLIB_RECORDS", str(tmp_path / "records"))
    source = chapters.notebook(chapter)
    declared = chapters.defaults(source)
    assert {"dataset", "model", "profile", "data_dir", "seed", "device"} <= set(declared)
    given = {name: value for name, value in SHORT.items() if name in declared}
    given |= {"dataset": request.getfixturevalue(kind), "profile": "quick"}
    out = tmp_path / f"{chapter}.ipynb"
    chapters.execute(source, out, given, failed=tmp_path / "failed", timeout=240)
    cells = [cell for cell in nbformat.read(out, 4).cells if cell.cell_type == "code"]
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    text = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
    if chapter == "which_method":
        assert "3 classes" in text
