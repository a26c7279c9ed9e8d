"""Damaged and forged files: the same content or a named error, never other content in spite of a sum, never a
raw error; no code is run, no connection opened, no memory taken that the file does not hold.

A few examples with every run of the tests; `make fuzz` tries others for FUZZ_MINUTES.
"""

import itertools
import json
import math
import socket
import struct
import time
import warnings
import zipfile
import zlib
from pathlib import Path

import fuzz_parts
import numpy as np
import pytest
import torch
from fuzz_parts import DAMAGE, EDITS, MARK, MINUTES, PARTS, outcome
from hypothesis import HealthCheck, Phase, given, seed, settings

import tdlib
from tdlib.errors import TdlibError
from tdlib.files import read_tensors, write_tensors

ATTACKS = [(name, "damage") for name in PARTS]
ATTACKS += [(name, "forgery") for name, part in PARTS.items() if part.forge]
FEW = 25  # examples of each attack where there are no minutes


@pytest.fixture(autouse=True)
def closed(monkeypatch):
    """No connection is opened and no planted code is run."""

    def refuse(*args, **kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    yield
    assert not MARK.exists()


@pytest.mark.parametrize("name, attack", ATTACKS, ids=["-".join(pair) for pair in ATTACKS])
def test_a_changed_file_is_read_as_it_was_or_refused(name, attack, tmp_path):
    part, path = PARTS[name], tmp_path / PARTS[name].name
    part.write(path)
    whole, original = path.read_bytes(), part.read(path)

    def attempt(change):
        path.write_bytes(fuzz_parts.damaged(whole, change) if attack == "damage" else whole)
        if attack == "forgery":
            part.forge(path, change)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # decoders' remarks on what they read
            found = outcome(name, attack, path, original)
        if not MINUTES:
            assert found in ("equal", "refused", "accepted"), fuzz_parts.RAW.get((name, attack), found)

    run = given(DAMAGE if attack == "damage" else EDITS)(attempt)
    options = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    if not MINUTES:
        settings(max_examples=FEW, derandomize=True, **options)(run)()
        return
    end = time.monotonic() + 60 * MINUTES / len(ATTACKS)
    for k in itertools.count():
        if time.monotonic() > end:
            break
        fresh = given(DAMAGE if attack == "damage" else EDITS)(attempt)
        settings(max_examples=100, phases=[Phase.generate], **options)(seed(k)(fresh))()
    count = fuzz_parts.COUNTS[name, attack]
    assert not count["raw"] and not count["different"], fuzz_parts.RAW.get((name, attack))


# -- memory


def network_bombs(folder):
    path = folder / "good.safetensors"
    fuzz_parts.network(path)
    tensors, metadata = read_tensors(path)
    header = json.loads(metadata["tdlib"])

    def ring(*ranks):
        layers = {"conv2": {"format": "tr", "ranks": ranks, "options": {}}}
        return header | {"layers": header["layers"] | layers}

    bombs = {
        "classes": header | {"spec": header["spec"] | {"classes": 30_000_000}},
        "width": header | {"spec": header["spec"] | {"kwargs": {"width": 20_000}}},
        "ranks": ring(10_000, 10_000, 10_000),
        "architecture": header | {"spec": {"name": "vit_h_14", "classes": 3, "kwargs": {}}, "layers": {}},
    }
    for name, forged in bombs.items():
        write_tensors(folder / f"{name}.safetensors", tensors, {"tdlib": json.dumps(forged)})
        yield tdlib.load, folder / f"{name}.safetensors"
    text = json.dumps({"__metadata__": {"tdlib": "[" + "[]," * 3_000_000}}).encode()
    (folder / "header.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    yield tdlib.load, folder / "header.safetensors"
    yield tdlib.load_statistics, folder / "header.safetensors"


def other_bombs(folder):
    zeros = bytes(2**27)
    torch.save({"w": torch.zeros(4)}, folder / "good.pt")
    with (
        zipfile.ZipFile(folder / "good.pt") as good,
        zipfile.ZipFile(folder / "bomb.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as bomb,
    ):
        for entry in good.infolist():
            bomb.writestr(entry.filename, zeros if "data/" in entry.filename else good.read(entry))
    yield fuzz_parts.read_state_dict, folder / "bomb.pt"
    header = np.lib.format.magic(1, 0) + struct.pack("<H", 118)
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({10**10}, 8, 8), }}".ljust(117) + "\n"
    with zipfile.ZipFile(folder / "bomb.npz", "w") as bomb:
        bomb.writestr("train_images.npy", header + text.encode())
        bomb.writestr("train_labels.npy", header + text.encode())
    yield fuzz_parts.npz_read, folder / "bomb.npz"

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    side = math.isqrt(2**32)
    pixels = chunk(b"IDAT", zlib.compress(bytes(2**24)))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)) + pixels
    (folder / "bomb.png").write_bytes(png + chunk(b"IEND", b""))
    yield fuzz_parts.picture, folder / "bomb.png"


def peak():
    """MiB that this process had at most since `forget_peak`."""
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(rows["VmHWM"].split()[0]) / 1024


def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def test_hostile_files_take_no_memory(tmp_path):
    tdlib.models.build("squeezenet1_1", 2)  # imports torchvision, once
    for read, path in [*network_bombs(tmp_path), *other_bombs(tmp_path)]:
        before = forget_peak()
        with pytest.raises(TdlibError):
            read(path)
        assert peak() - before < 100, path.name
