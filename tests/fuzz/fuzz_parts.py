"""What is attacked, how it is changed, and the count of what came of it.

A part is a kind of file: how a good one is written, and how it is read into something that can be compared.
Two attacks on it: damage (bits, bytes and lengths of the file) and forgery (its content, with a right sum).
"""

import copy
import hashlib
import io
import json
import os
import resource
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from tabulate import tabulate

import tdlib
from tdbook.records import read_record, record
from tdlib.calibration.statistics import Statistics
from tdlib.data import images, sources
from tdlib.errors import TdlibError
from tdlib.files import read_tensors, write_tensors
from tdlib.formats import skeleton
from tdlib.models.weights import read_state_dict
from tdlib.network import provenance
from tdlib.train import checkpoint

MINUTES = float(os.environ.get("FUZZ_MINUTES", 0))
COUNTS: dict[tuple[str, str], Counter] = {}
MARK = Path(os.environ.get("TMPDIR", "/tmp")) / f"tdlib-fuzz-{os.getpid()}"


class Bomb:
    """Leaves a mark where it is unpickled."""

    def __reduce__(self):
        return MARK.write_text, ("code ran",)


# -- values that headers do not expect, put at a place of a JSON-like tree

ODD = (
    None, True, -1, 0, 2, 10**9, 10**30, 1.5, float("nan"), float("inf"), "", "a", "../x",
    [], [[]], [None], ["a"], [10**12] * 4, {}, {"": 0},
)  # fmt: skip
EDITS = st.lists(
    st.tuples(st.integers(0, 10**6), st.sampled_from(["set", "set", "drop", "add"]), st.sampled_from(ODD)),
    min_size=1,
    max_size=2,
)


def places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a tree of dicts and lists."""
    items = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree))
    found = [(tree, key) for key, _ in items]
    for _, item in items:
        found += places(item) if isinstance(item, dict | list) else []
    return found


def edited(tree: Any, edits: list[tuple[int, str, Any]]) -> Any:
    """A copy of the tree with values replaced, dropped and added."""
    tree = copy.deepcopy(tree)
    for at, how, value in edits:
        found = places(tree)
        if not found:
            return value
        value = copy.deepcopy(value)  # further edits may change it
        where, key = found[at % len(found)]
        if how == "set":
            where[key] = value
        elif how == "drop":
            del where[key]
        elif isinstance(where, dict):
            where[f"{key}2"] = value
        else:
            where.append(value)
    return tree


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit; tensors in type and shape too."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.equal(b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and type(a) is type(b):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


# -- the parts


@dataclass(frozen=True)
class Part:
    """write(path): a good file. read(path): what it says. forge(path, edits): a file with edited content and,
    where there is one, a right sum. summed: whether no damage may go unnoticed."""

    write: Callable[[Path], object]
    read: Callable[[Path], Any]
    forge: Callable[[Path, Any], object] | None = None
    summed: bool = False
    name: str = "file"


def network(path):
    torch.manual_seed(0)
    model = tdlib.models.build("cnn", 3, width=4)
    plan = {
        "conv2": {"format": "tr", "ranks": [2, 2, 2]},
        "conv3": {"format": "tucker2", "ranks": [2, 2]},
        "conv4": {"format": "shuffled-tt", "ranks": [2, 2, 2], "options": {"seed": 3, "order": 4}},
        "linear": {"format": "tt", "ranks": [2], "options": {}},
    }
    tdlib.save(skeleton(model, plan), path)


def network_read(path):
    found = tdlib.load(path)
    about = provenance(found)
    layers = {name: layer.to_dict() for name, layer in about.layers.items()}
    return [dict(found.state_dict()), layers, about.spec, about.plan, about.inputs]


def network_forge(path, edits):
    tensors, metadata = read_tensors(path)
    tensors = {name: value.clone() for name, value in tensors.items()}
    shapes = {name: [str(value.dtype), list(value.shape)] for name, value in tensors.items()}
    forged = edited({"header": json.loads(metadata["tdlib"]), "tensors": shapes}, edits)
    kept = forged.get("tensors")
    tensors = {name: value for name, value in tensors.items() if isinstance(kept, dict) and name in kept}
    write_tensors(path, tensors, {"tdlib": json.dumps(forged.get("header"))})


def statistics(path):
    draw = torch.Generator().manual_seed(0)
    sigma, mean = torch.rand(4, 4, generator=draw).double(), torch.rand(4, generator=draw)
    sigma = sigma @ sigma.T
    sigmas, means = {"a": sigma, "b.c": sigma + 1}, {"a": mean, "b.c": mean + 1}
    Statistics(sigmas, means, {"a": 7, "b.c": 9}, {"a": sigma + 2}).save(path)


def statistics_read(path):
    found = tdlib.load_statistics(path)
    return [dict(found), found.means, found.counts, found.weights]


def statistics_forge(path, edits):
    tensors, metadata = read_tensors(path)
    rows = {name: [value.flatten().tolist(), list(value.shape)] for name, value in tensors.items()}
    forged = edited({"counts": json.loads(metadata["counts"]), "tensors": rows}, edits)
    made = {}
    rows = forged.get("tensors")
    for name, row in (rows if isinstance(rows, dict) else {}).items():
        with suppress(Exception):  # no tensor at all is left out
            made[name] = torch.tensor(row[0]).reshape(row[1])
    counts = json.dumps(forged.get("counts"))
    write_tensors(path, made, {"tdlib": "statistics", "version": "2", "counts": counts})


STATE = {"identity": {"a": "b"}, "epoch": 3, "model": {"w": torch.arange(6.0)}, "rows": [{"epoch": 0}]}


def checkpoint_write(path):
    checkpoint.write(path.parent, STATE)


def checkpoint_read(path):
    return checkpoint.read(path.parent, {"a": "b"})


def checkpoint_forge(path, edits):
    buffer = io.BytesIO()
    torch.save(Bomb() if edits[0][0] % 10 == 0 else edited(STATE, edits), buffer)
    sum_ = hashlib.sha256(buffer.getvalue()).hexdigest().encode()
    path.write_bytes(checkpoint.MAGIC + sum_ + b"\n" + buffer.getvalue())


def weights_forge(path, edits):
    torch.save(
        Bomb() if edits[0][0] % 10 == 0 else edited({"model": STATE["model"], "epoch": 1}, edits), path
    )


def record_write(path):
    record("chapter", {"seed": 1, "ratio": 2.0}, {"accuracy": 91.5}, directory=path.parent, name=path.stem)


def record_forge(path, edits):
    path.write_text(json.dumps(edited(json.loads(path.read_text()), edits)))


def arrays():
    pixels = np.arange(12 * 4 * 4, dtype=np.uint8).reshape(12, 4, 4)
    labels = np.arange(12) % 3
    return {
        "train_images": pixels,
        "train_labels": labels,
        "test_images": pixels[:6],
        "test_labels": labels[:6],
    }


def npz_read(path):
    found = sources.npz(path)
    return [(part.items, part.labels) for part in (found.train, found.val, found.test) if part] + [
        found.classes
    ]


def npz_forge(path, edits):
    made = dict(arrays())
    for at, how, value in edits:
        name = sorted(made)[at % len(made)]
        if how == "drop":
            del made[name]
        else:
            made[name] = np.array(
                [Bomb() if at % 10 == 0 else str(value)] * 12, object if how == "add" else None
            )
    np.savez(path, **made)


def image(kind, **options):
    def write(path):
        pixels = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, kind, **options)

    return write


def picture(path):
    return images.read(path, 8)


STATE_DICT = {"a.weight": torch.arange(12.0).reshape(3, 4), "a.bias": torch.arange(3)}
PARTS = {
    "networks": Part(network, network_read, network_forge, True, "n.safetensors"),
    "statistics": Part(statistics, statistics_read, statistics_forge, True, "s.safetensors"),
    "checkpoints": Part(checkpoint_write, checkpoint_read, checkpoint_forge, True, checkpoint.NAME),
    "records": Part(record_write, read_record, record_forge, name="r.json"),
    "weights, safetensors": Part(lambda p: save_file(STATE_DICT, p), read_state_dict, name="w.safetensors"),
    "weights, torch": Part(lambda p: torch.save(STATE_DICT, p), read_state_dict, weights_forge, name="w.pt"),
    "weights, old torch": Part(
        lambda p: torch.save(STATE_DICT, p, _use_new_zipfile_serialization=False),
        read_state_dict,
        name="w.th",
    ),
    "npz": Part(lambda p: np.savez(p, **arrays()), npz_read, npz_forge, name="a.npz"),
    "npz, compressed": Part(lambda p: np.savez_compressed(p, **arrays()), npz_read, name="a.npz"),
    "images, PNG": Part(image("PNG"), picture, name="i.png"),
    "images, JPEG": Part(image("JPEG"), picture, name="i.jpg"),
    "images, TIFF": Part(image("TIFF", compression="tiff_lzw"), picture, name="i.tiff"),
    "images, other": Part(image("WEBP"), picture, name="i.webp"),
}

# -- damage

PLACE = st.integers(0, 2**20)
DAMAGE = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), PLACE, st.integers(0, 7)),
        st.tuples(st.just("flip"), st.integers(0, 600), st.integers(0, 7)),  # headers come first
        st.tuples(st.just("cut"), PLACE, st.just(0)),
        st.tuples(st.just("drop"), PLACE, st.integers(1, 100)),
        st.tuples(st.just("insert"), PLACE, st.binary(min_size=1, max_size=20)),
        st.tuples(st.just("write"), PLACE, st.sampled_from([b"\xff" * 8, b"\0" * 4, b"9" * 6, b"[" * 3000])),
    ),
    min_size=1,
    max_size=3,
)


def damaged(data: bytes, steps: list[tuple[str, int, Any]]) -> bytes:
    """The bytes after the steps."""
    for how, place, value in steps:
        at = place % max(1, len(data))
        if how == "flip" and data:
            data = data[:at] + bytes([data[at] ^ 1 << value]) + data[at + 1 :]
        elif how == "cut":
            data = data[:at]
        elif how == "drop":
            data = data[:at] + data[at + value :]
        elif how == "insert":
            data = data[:at] + value + data[at:]
        elif how == "write":
            data = data[:at] + value + data[at + len(value) :]
    return data


# -- the count

RAW: dict[tuple[str, str], BaseException] = {}


def outcome(name: str, attack: str, path: Path, original: Any) -> str:
    """Read the file and count what came of it: equal, refused, accepted (other content, no sum
    forbids it), different (in spite of a sum) or raw (an error that is none of tdlib's)."""
    part, count = PARTS[name], COUNTS.setdefault((name, attack), Counter())
    try:
        found = "equal" if same(part.read(path), original) else "accepted"
        if found == "accepted" and attack == "damage" and part.summed:
            found = "different"
    except TdlibError:
        found = "refused"
    except Exception as error:
        RAW.setdefault((name, attack), error)
        found = "raw"
    count[found] += 1
    return found


def table() -> str:
    """What was counted."""
    kinds = ("equal", "refused", "accepted", "different", "raw")
    rows = [(*key, sum(count.values()), *(count[kind] for kind in kinds)) for key, count in COUNTS.items()]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    text = tabulate(rows, headers=("part", "attack", "tried", *kinds))
    raw = "".join(f"\nraw in {' '.join(key)}: {error!r}" for key, error in RAW.items())
    return f"{text}\npeak memory of the process {peak:.0f} MiB{raw}"
