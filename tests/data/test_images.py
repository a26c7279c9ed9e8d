"""Image files of every kind: read right or refused by name, mode and reason."""

import io
import struct
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import tdlib
from tdlib import data
from tdlib.data.images import decode, read
from tdlib.errors import DataError

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
DEEP = (np.arange(256, dtype=np.uint32) * 257).astype(np.uint16).reshape(16, 16)


def pixels(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return np.asarray(decode(path))


def grey(path):
    channels = pixels(path).transpose(2, 0, 1)
    assert (channels == channels[0]).all()
    return channels[0]


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_16_bit_images_are_scaled(tmp_path, name):
    Image.fromarray(DEEP).save(tmp_path / name)
    assert np.array_equal(grey(tmp_path / name), RAMP)


def test_big_endian_16_bit_images_are_scaled(tmp_path):
    tags = [(256, 16), (257, 16), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1), (278, 16), (279, 512)]
    rows = b"".join(struct.pack(">HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    content = b"MM" + struct.pack(">HI", 42, 520) + DEEP.astype(">u2").tobytes()
    (tmp_path / "a.tif").write_bytes(content + struct.pack(">H", len(tags)) + rows + bytes(4))
    with Image.open(tmp_path / "a.tif") as image:
        assert image.mode == "I;16B"
    assert np.array_equal(grey(tmp_path / "a.tif"), RAMP)


@pytest.mark.parametrize(("kind", "mode"), [(np.float32, "F"), (np.int32, "I")])
def test_numbers_of_unknown_range_are_refused(tmp_path, kind, mode):
    Image.fromarray(RAMP.astype(kind)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=rf"a\.tif holds .* \(mode '{mode}'\).*8 or 16 bits"):
        decode(tmp_path / "a.tif")


def test_other_modes_show_the_same_picture(tmp_path):
    colour = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    expected = np.asarray(colour)
    alpha = Image.fromarray(RAMP)

    def saved(image, name, **options):
        image.save(tmp_path / name, **options)
        return pixels(tmp_path / name)

    with_alpha = colour.copy()
    with_alpha.putalpha(alpha)
    assert np.array_equal(saved(with_alpha, "rgba.png"), expected)
    assert np.array_equal(saved(Image.merge("LA", (alpha, alpha)), "la.png")[..., 0], RAMP)
    bright = alpha.point(lambda v: 255 * (v > 99), "1")
    assert np.array_equal(saved(bright, "1.png")[..., 2], 255 * (RAMP > 99))
    palette = colour.quantize(64)
    shown = np.asarray(palette.convert("RGB"))
    assert np.array_equal(saved(palette, "p.png"), shown)
    assert np.array_equal(saved(palette, "clear.png", transparency=bytes(range(64))), shown)
    assert np.array_equal(saved(colour.convert("CMYK"), "cmyk.tif"), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("deep", [False, True])
def test_images_are_upright(tmp_path, orientation, deep):
    """However the camera lay: the file holds the inverse of what EXIF asks for."""
    upright = (DEEP if deep else RAMP)[:8]
    back = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.T,
        6: np.rot90(upright), 7: upright[::-1, ::-1].T, 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(np.ascontiguousarray(back)).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(grey(tmp_path / "a.png"), RAMP[:8])
    assert read(tmp_path / "a.png", 8).shape == (8, 8, 3)


def content(image, format):
    stream = io.BytesIO()
    image.save(stream, format)
    return stream.getvalue()


def test_damaged_and_huge_images_are_refused(tmp_path, monkeypatch):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    random = np.random.default_rng(1)
    for format in ("PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP"):
        whole = content(noise, format)
        for cut in (0, 1, 8, 20, len(whole) // 2):
            (tmp_path / "a").write_bytes(whole[:cut])
            with pytest.raises(DataError, match=r"a.* cannot be"):
                read(tmp_path / "a", 16)
        for _ in range(20):  # what is still an image may be read
            spoilt = bytearray(whole)
            for place in random.integers(0, min(200, len(whole)), 4):
                spoilt[place] = random.integers(256)
            (tmp_path / "a").write_bytes(spoilt)
            try:
                assert read(tmp_path / "a", 16).shape == (16, 16, 3)
            except DataError:
                continue
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    (tmp_path / "a").write_bytes(content(noise, "PNG"))
    with pytest.raises(DataError, match=r"cannot be read as an image: .*bomb"):
        decode(tmp_path / "a")
    Image.new("L", (1, 900)).save(tmp_path / "narrow.png")
    with pytest.raises(DataError, match=r"narrow\.png is too narrow.*1 x 900"):
        read(tmp_path / "narrow.png", 16)


def test_interpolation_is_asked_for_and_remembered(tmp_path, monkeypatch):
    for name in ("ant", "bee"):
        for i in range(6):
            picture = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(picture).save(tmp_path / name / f"{i}.png")

    def load(interpolation):
        return data.load(f"imagefolder:{tmp_path}", image_size=16, interpolation=interpolation)

    soft, sharp = load("bilinear"), load("bicubic")
    assert soft.description == sharp.description | {"interpolation": "bilinear"}
    assert sharp.description["interpolation"] == "bicubic"
    assert not torch.equal(soft.test.images, sharp.test.images) and soft.fingerprint != sharp.fingerprint
    monkeypatch.setattr(data.loading, "CACHE_BYTES", 0)
    on_disk = load("bicubic")
    assert torch.equal(on_disk.test[0][0], sharp.test[0][0])
    assert on_disk.fingerprint != load("bilinear").fingerprint


# -- images without labels


@pytest.fixture
def photos(tmp_path):
    """20 pictures in one folder."""
    random = np.random.default_rng(0)
    for i in range(20):
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    return tmp_path


def test_a_folder_of_images_alone_has_no_labels(photos):
    bundle = data.load(f"imagefolder:{photos}")
    assert bundle.classes == [] and bundle.input_shape == (3, 16, 16)
    assert [len(part) for part in (bundle.train, bundle.val, bundle.test)] == [14, 2, 4]
    x, y = next(iter(bundle.batches("train", 14)))
    assert x.shape == (14, 3, 16, 16) and y.tolist() == [-1] * 14
    assert len(data.load(f"imagefolder:{photos}", limit=6).train) == 5


def test_images_alone_in_split_folders(photos):
    for part, count in (("train", 12), ("test", 8)):
        (photos / part).mkdir()
        for path in sorted(photos.glob("*.png"))[:count]:
            path.rename(photos / part / path.name)
    bundle = data.load(f"imagefolder:{photos}", val_fraction=0)
    assert bundle.classes == [] and (len(bundle.train), len(bundle.test)) == (12, 8)
    (photos / "test" / "ant").mkdir()
    (photos / "test" / "bee").mkdir()
    with pytest.raises(DataError, match="other classes than the training folder: ant, bee"):
        data.load(f"imagefolder:{photos}")


def test_one_class_or_nothing_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"at least two class folders, or images.*found neither"):
        data.load(f"imagefolder:{tmp_path / 'empty'}")
    with pytest.raises(DataError, match=r"at least two class folders.*found \['empty'\]"):
        data.load(f"imagefolder:{tmp_path}")


def test_what_needs_labels_says_so(photos):
    bundle = data.load(f"imagefolder:{photos}")
    net = tdlib.models.build("cnn", 3, input_shape=bundle.input_shape, width=8)
    assert bundle.description["classes"] is None
    calls = {
        "training": lambda: tdlib.train.fit(net, bundle, epochs=1, device="cpu"),
        "accuracy": lambda: tdlib.train.evaluate(net, bundle),
        "'admm'": lambda: tdlib.compress(net, "admm", bundle, ratio=2, device="cpu"),
        "'direct'": lambda: tdlib.compress(net, "direct", bundle, ratio=2, finetune_epochs=1, device="cpu"),
    }
    for purpose, call in calls.items():
        with pytest.raises(DataError, match=f"{purpose} needs .*labels"):
            call()
    small = tdlib.compress(net, "sequential", bundle, ratio=1.5, progress=False)
    report = tdlib.provenance(small).report
    assert report["params_ratio"] == pytest.approx(1.5, rel=0.02)
    assert not {"dense", "before", "after"} & report.keys()
    assert tdlib.train.agreement(net, small, bundle)["n"] == 4
