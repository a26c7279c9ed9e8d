"""Data: splits, batches as a function of (seed, epoch, step), sources, and errors before training starts."""

import io
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from tdlib import data, memory
from tdlib.data import Augment, loading
from tdlib.data.augment import draw, gather
from tdlib.data.images import random_area
from tdlib.errors import DataError, MemoryLimitError, TdlibError, UnknownName


def _npz(path, n=60, count=3, shape=(12, 12, 3), parts=("train", "test"), **replace):
    generator = np.random.default_rng(0)
    arrays = {}
    for part in parts:
        arrays[f"{part}_images"] = generator.integers(0, 256, (n, *shape), dtype=np.uint8)
        arrays[f"{part}_labels"] = (np.arange(n) % count).reshape(-1, 1)
    arrays |= replace
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def _same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True)
    )


def test_digits():
    digits = data.load("digits")
    assert digits.input_shape == (1, 8, 8) and digits.classes == list("0123456789")
    assert len(digits.train) + len(digits.val) + len(digits.test) == 1797
    assert int(digits.train.images.max()) == 255
    x = torch.cat([x for x, _ in digits.batches("train", 100, shuffle=False, drop_last=False)])
    assert (
        x.shape[1:] == (1, 8, 8)
        and abs(float(x.mean())) < 1e-4
        and float(x.std()) == pytest.approx(1, abs=1e-3)
    )
    image, label = digits.train[5]
    assert torch.allclose(image, x[5]) and label == int(digits.train.labels[5])


def test_digits_without_scikit_learn_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(TdlibError, match=r"this needs sklearn.*pip install 'tdlib\[train\]'"):
        data.load("digits")


def test_splits_by_seed_stratified_disjoint_and_test_untouched():
    first, second, again = data.load("digits"), data.load("digits", seed=1), data.load("digits")
    assert first.fingerprint == again.fingerprint != second.fingerprint
    assert torch.equal(first.test.images, second.test.images)
    assert not torch.equal(first.val.labels, second.val.labels)
    counts = torch.bincount(first.val.labels, minlength=10)
    assert int(counts.min()) >= 13 and int(counts.max()) <= 16
    none = data.load("digits", val_fraction=0)
    assert len(none.val) == 0 and len(none.train) == len(first.train) + len(first.val)


def test_batches_are_a_function_of_seed_epoch_and_step():
    digits = data.load("digits", limit=200)
    options = {"augment": Augment(pad=2, flip=True), "seed": 3, "epoch": 2}
    whole = list(digits.batches("train", 32, **options))
    assert _same(whole, list(digits.batches("train", 32, **options)))
    assert _same(whole[3:], list(digits.batches("train", 32, start_step=3, **options)))
    assert len(digits.batches("train", 32, start_step=3, **options)) == len(whole) - 3
    assert not _same(whole, list(digits.batches("train", 32, **(options | {"epoch": 3}))))
    assert not _same(whole, list(digits.batches("train", 32, **(options | {"seed": 4}))))


def test_processes_share_every_global_batch():
    digits = data.load("digits", limit=200)
    options = {"augment": Augment(pad=1), "seed": 3}
    whole = list(digits.batches("train", 31, **options))
    parts = [list(digits.batches("train", 31, rank=rank, world=3, **options)) for rank in range(3)]
    for step, (x, y) in enumerate(whole):
        for rank in range(3):
            assert torch.equal(parts[rank][step][0], x[rank::3]) and torch.equal(
                parts[rank][step][1], y[rank::3]
            )


def test_each_image_once_an_epoch_and_last_batches():
    digits = data.load("digits", limit=200)
    n = len(digits.train)
    labels = torch.cat([y for _, y in digits.batches("train", 32, drop_last=False)])
    assert torch.equal(labels.sort().values, digits.train.labels.sort().values)
    assert sum(len(y) for _, y in digits.batches("train", 32)) == 32 * (n // 32)
    assert torch.equal(torch.cat([y for _, y in digits.batches("test", 32)]), digits.test.labels)


@pytest.mark.parametrize("mode", ["zero", "reflect"])
@pytest.mark.parametrize("flip", [False, True])
def test_augmentation_is_pad_crop_flip(mode, flip):
    images = torch.randint(
        0, 256, (20, 9, 7, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    augment = Augment(pad=3, mode=mode, flip=flip)
    draws = draw(20, augment, seed=0, epoch=0)
    assert int(draws[:, :2].min()) == -3 and int(draws[:, :2].max()) == 3
    assert set(draws[:, 2].tolist()) == ({0, 1} if flip else {0})
    out = gather(images, torch.arange(20), draws, augment)
    padding = {"mode": "constant" if mode == "zero" else "reflect"}
    for i, (down, right, mirror) in enumerate(draws.tolist()):
        padded = np.pad(images[i].numpy(), ((3, 3), (3, 3), (0, 0)), **padding)
        crop = padded[3 + down : 12 + down, 3 + right : 10 + right]
        assert np.array_equal(out[i].numpy(), crop[:, ::-1] if mirror else crop)


def test_batches_are_channels_last(tmp_path):
    bundle = data.load(f"npz:{_npz(tmp_path / 'a.npz')}")
    x, y = next(iter(bundle.batches("train", 8, augment="auto")))
    assert x.shape == (8, 3, 12, 12) and x.is_contiguous(memory_format=torch.channels_last)
    assert x.dtype == torch.float32 and y.dtype == torch.int64


@pytest.mark.parametrize("shape", [(12, 12), (12, 12, 1), (12, 12, 3)])
def test_npz(tmp_path, shape):
    bundle = data.load(f"npz:{_npz(tmp_path / 'a.npz', shape=shape, parts=('train', 'val', 'test'))}")
    assert (len(bundle.train), len(bundle.val), len(bundle.test)) == (60, 60, 60)
    assert bundle.input_shape == (3 if shape[-1] == 3 else 1, 12, 12) and bundle.classes == ["0", "1", "2"]


def test_npz_without_test_set_sizes_names_and_limits(tmp_path):
    path = _npz(tmp_path / "a.npz", parts=("train",), classes=np.array(["x", "y", "z"]))
    bundle = data.load(f"npz:{path}", image_size=8, limit=30, mean=[0.5] * 3, std=[0.25] * 3)
    assert bundle.classes == ["x", "y", "z"] and bundle.input_shape == (3, 8, 8)
    assert len(bundle.train) + len(bundle.val) == 30 and len(bundle.test) == 12
    assert bundle.mean == (0.5,) * 3
    assert torch.bincount(torch.cat([bundle.train.labels, bundle.val.labels])).tolist() == [10, 10, 10]


@pytest.mark.parametrize(
    "replace, message",
    [
        ({"train_images": None}, "no array 'train_images'"),
        ({"train_labels": None}, "no array 'train_labels'"),
        ({"test_labels": None}, "test_images but no test_labels"),
        ({"train_images": np.zeros((60, 12, 12, 3), np.float32)}, "must be uint8"),
        ({"train_images": np.zeros((60, 12, 12, 4), np.uint8)}, r"must be \(N, H, W\)"),
        ({"train_images": np.zeros((60, 12), np.uint8)}, r"must be \(N, H, W\)"),
        ({"train_images": np.zeros((0, 12, 12), np.uint8)}, r"must be \(N, H, W\)"),
        ({"test_images": np.zeros((60, 10, 12, 3), np.uint8)}, "test images are"),
        ({"train_labels": np.arange(59) % 3}, "60 images but 59 labels"),
        ({"train_labels": np.zeros((60, 2), int)}, "labels must be integers"),
        ({"train_labels": np.zeros(60)}, "labels must be integers"),
        ({"train_labels": np.zeros(60, int)}, "one class only"),
        ({"train_labels": 2 * (np.arange(60) % 2)}, "empty class, no images with label 1"),
        ({"train_labels": np.arange(60) % 3 - 1}, "out of range: from -1"),
        ({"test_labels": np.arange(60) % 4}, "out of range: from 0 to 3, expected 0 to 2"),
        ({"train_labels": np.array([None] * 60)}, "cannot be read as an .npz of plain arrays"),
        ({"train_labels": np.full(60, 2**62)}, "out of range"),
        ({"train_labels": np.full(60, 2**64 - 1, np.uint64)}, "out of range"),
        ({"train_labels": np.full(60, 1, "m8[s]")}, "labels must be integers"),
        ({"test_images": np.zeros((0, 12, 12, 3), np.uint8)}, r"must be \(N, H, W\)"),
    ],
)
def test_bad_npz(tmp_path, replace, message):
    path = _npz(tmp_path / "a.npz", **replace)
    with pytest.raises(DataError, match=message):
        data.load(f"npz:{path}")


def test_npz_that_is_none(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        data.load(f"npz:{tmp_path / 'a.npz'}")
    (tmp_path / "a.npz").write_bytes(b"PK nonsense")
    with pytest.raises(DataError, match="cannot be read"):
        data.load(f"npz:{tmp_path / 'a.npz'}")


def _header(shape, dtype="|u1"):
    """The beginning of an .npy file."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        _header((2**40, 32, 32, 3)),  # 3 PB in a file of 300 bytes
        _header((10, 8, 8)) + bytes(639),
        _header((10, 8, 8)) + bytes(641),
        _header((-10, -8, 8)) + bytes(640),
        _header((10,), "|O") + bytes(80),
        _header((10, 8, 8))[:40],
        b"\x93NUMPY\x09\x00" + _header((10, 8, 8))[8:] + bytes(640),
        b"no array",
        b"",
    ],
)
def test_npz_whose_arrays_are_not_what_they_say(tmp_path, content):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as file:
        for name in ("train_images", "train_labels"):
            file.writestr(f"{name}.npy", content)
    with pytest.raises(DataError, match=r"cannot be read as an .npz of plain arrays"):
        data.load(f"npz:{path}")


def test_npz_bomb_is_not_unpacked(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    images = np.zeros((10_000, 32, 32, 3), np.uint8)
    np.savez_compressed(path, train_images=images, train_labels=np.arange(10_000) % 3)
    assert path.stat().st_size < 100_000
    monkeypatch.setattr(memory, "free", lambda device="cpu": 2**25)
    with pytest.raises(MemoryLimitError, match=r"unpacking .*a\.npz needs about"):
        data.load(f"npz:{path}")


def test_cifar_from_npz_under_root(tmp_path, monkeypatch):
    path = _npz(tmp_path / "cifar100.npz", n=200, count=100, shape=(32, 32, 3))
    bundle = data.load("cifar100", tmp_path, val_fraction=0.5)
    assert len(bundle.classes) == 100 == len(set(bundle.classes)) and bundle.classes == sorted(bundle.classes)
    assert bundle.augment == Augment(pad=4, flip=True) and bundle.mean == (0.5071, 0.4865, 0.4409)
    assert (len(bundle.train), len(bundle.val), len(bundle.test)) == (100, 100, 200)
    monkeypatch.setenv("TDLIB_DATA", str(tmp_path))
    assert data.load("cifar100", val_fraction=0.5).fingerprint == bundle.fingerprint
    path.rename(tmp_path / "cifar10.npz")
    with pytest.raises(DataError, match="out of range"):
        data.load("cifar10")


def test_torchvision_set_that_is_nowhere(tmp_path, monkeypatch):
    import torchvision

    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets, "SVHN", no_network)
    with pytest.raises(
        DataError, match=r"svhn was not found: looked for .*svhn\.npz.*no network.*TDLIB_DATA"
    ):
        data.load("svhn", tmp_path)


def test_torchvision_folders(tmp_path, monkeypatch, capsys):
    import torchvision

    class Stored:
        def __init__(self, root, train, download):
            print("Using downloaded and verified file")
            self.data = torch.zeros(40, 28, 28, dtype=torch.uint8)
            self.targets = torch.arange(40) % 10

    monkeypatch.setattr(torchvision.datasets, "MNIST", Stored)
    bundle = data.load("mnist", tmp_path, val_fraction=0.25)
    assert bundle.input_shape == (1, 28, 28) and len(bundle.train) == 30 and len(bundle.test) == 40
    assert not capsys.readouterr().out


def _folder(root, counts, size=(20, 16)):
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.full((size[1] + i, size[0], 3), (i * 10) % 256, np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def test_flat_image_folder_is_split(tmp_path):
    root = _folder(tmp_path / "f", {"ant": 10, "bee": 10})
    bundle = data.load(f"imagefolder:{root}")
    assert bundle.classes == ["ant", "bee"] and bundle.input_shape == (3, 20, 20)
    assert len(bundle.train) + len(bundle.val) == 16 and len(bundle.test) == 4
    assert data.load(f"imagefolder:{root}", image_size=12).input_shape == (3, 12, 12)


def test_image_folder_with_splits(tmp_path):
    for part in ("train", "val", "test"):
        _folder(tmp_path / part, {"ant": 3, "bee": 4})
    bundle = data.load(f"imagefolder:{tmp_path}", limit=6)
    assert (len(bundle.train), len(bundle.val), len(bundle.test)) == (6, 6, 6)


def test_large_folders_are_read_from_disk(tmp_path, monkeypatch):
    root = _folder(tmp_path / "f", {"ant": 10, "bee": 10})
    small = data.load(f"imagefolder:{root}")
    monkeypatch.setattr(loading, "CACHE_BYTES", 0)
    large = data.load(f"imagefolder:{root}")
    assert isinstance(large.train, data.FileSplit) and torch.equal(large.train.labels, small.train.labels)
    assert torch.equal(large.train[3][0], small.train[3][0])
    for (x, y), (u, v) in zip(large.batches("test", 3, workers=0), small.batches("test", 3), strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)
    options = {"augment": "auto", "seed": 1, "workers": 0}
    state = torch.get_rng_state()
    whole = list(large.batches("train", 4, **options))
    assert torch.equal(torch.get_rng_state(), state)
    assert _same(whole[2:], list(large.batches("train", 4, start_step=2, **options)))
    assert not _same(whole, list(large.batches("train", 4, epoch=1, **options)))
    assert large.fingerprint == data.load(f"imagefolder:{root}").fingerprint


def test_imagenet_layout(tmp_path):
    for part in ("train", "val"):
        _folder(tmp_path / "imagenet" / part, {"n01": 4, "n02": 4})
    bundle = data.load("imagenet", tmp_path, val_fraction=0.25, image_size=16)
    assert (len(bundle.train), len(bundle.val), len(bundle.test)) == (6, 2, 8)
    with pytest.raises(DataError, match=r"imagenet was not found.*TDLIB_DATA"):
        data.load("imagenet", tmp_path / "nowhere")


def test_bad_folders(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        data.load(f"imagefolder:{tmp_path / 'none'}")
    root = _folder(tmp_path / "f", {"ant": 3, "bee": 0})
    with pytest.raises(DataError, match=r"class 'bee' .* is empty: no files that end in .jpg"):
        data.load(f"imagefolder:{root}")
    (root / "bee" / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"0\.png cannot be read as an image"):
        data.load(f"imagefolder:{root}")
    with pytest.raises(DataError, match="at least two class folders"):
        data.load(f"imagefolder:{_folder(tmp_path / 'g', {'ant': 3})}")
    _folder(tmp_path / "h" / "train", {"ant": 2, "bee": 2})
    _folder(tmp_path / "h" / "test", {"ant": 2, "cat": 2})
    with pytest.raises(DataError, match="other classes than the training folder: bee, cat"):
        data.load(f"imagefolder:{tmp_path / 'h'}")


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: data.load("cifar11"), UnknownName, r"Did you mean.*cifar10.*npz:PATH"),
        (lambda: data.load("npz:"), UnknownName, "npz:PATH"),
        (lambda: data.load("digits", val_fraction=1.0), DataError, "fraction"),
        (lambda: data.load("digits", image_size=2), DataError, "image_size"),
        (lambda: data.load("digits", limit=1), DataError, "limit"),
        (lambda: data.load("digits", mean=[1.0, 2.0]), DataError, "mean and std need 1"),
        (lambda: data.load("digits", std="nan"), DataError, "mean and std need 1"),
        (lambda: data.load("digits", interpolation="nearest"), UnknownName, "bicubic, bilinear"),
        (lambda: data.load("digits").batches("dev", 8), UnknownName, "test, train, val"),
        (lambda: data.load("digits").batches("train", 0), DataError, "batch_size"),
        (lambda: data.load("digits").batches("train", 8, augment="much"), DataError, "unknown augment"),
        (lambda: Augment(mode="wrap"), DataError, "reflect"),
        (lambda: Augment(pad=-1), DataError, "pad"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_random_areas_lie_inside():
    for i in range(50):
        box = random_area((40, 20), 0.25, torch.Generator().manual_seed(i))
        assert 0 <= box[0] < box[2] <= 40.001 and 0 <= box[1] < box[3] <= 20.001


def test_normalisation_may_be_text():
    as_text = data.load("digits", mean="0.25", std="0.5")
    as_numbers = data.load("digits", mean=[0.25], std=[0.5])
    assert as_text.mean == as_numbers.mean == (0.25,) and as_text.fingerprint == as_numbers.fingerprint
    with pytest.raises(DataError, match=r"std must be numbers like .*, got 'half'"):
        data.load("digits", std="half")
