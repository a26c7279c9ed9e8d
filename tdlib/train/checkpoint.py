"""One checkpoint file per directory: written atomically, verified when read, refused where it belongs
elsewhere.

File layout: a magic line, the SHA-256 of the payload, the payload (``torch.save`` of tensors and plain
values, read with ``weights_only=True``, so no code is ever unpickled).
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdlib.errors import CheckpointError, FileError
from tdlib.files import write_atomic

NAME = "checkpoint.tdlib"
MAGIC = b"tdlib-checkpoint-1\n"


def prepare(directory: str | Path) -> Path:
    """Create the directory, check that it can be written, remove remains of a killed write. Raises
    CheckpointError.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for left in directory.glob(f".{NAME}.*"):
            left.unlink(missing_ok=True)
        probe = directory / f".{NAME}.{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"checkpoint directory {directory} cannot be written: {error}") from error
    return directory


def write(directory: Path, state: dict[str, Any]) -> Path:
    """Write ``state`` so that a reader sees either the old or the new file, whole. Raises CheckpointError."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    path = directory / NAME
    try:
        write_atomic(path, MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n", payload)
    except FileError as error:
        kept = "the last good checkpoint is kept" if path.exists() else "there is no earlier checkpoint"
        raise CheckpointError(f"checkpoint could not be written ({error}); {kept}") from error
    return path


def read(directory: Path, identity: dict[str, str] | None = None) -> dict[str, Any] | None:
    """The state in ``directory``, or None where there is no checkpoint.

    identity: what the run is (see ``fit``); a checkpoint of another run is refused. Raises CheckpointError.
    """
    path = directory / NAME
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error
    advice = "nothing was overwritten; delete it to start anew, or give another directory"
    head = len(MAGIC) + 65
    if not raw.startswith(MAGIC):
        raise CheckpointError(f"{path} is not a tdlib checkpoint; {advice}")
    payload = memoryview(raw)[head:]
    if hashlib.sha256(payload).hexdigest().encode() != raw[len(MAGIC) : head - 1]:
        raise CheckpointError(f"{path} is corrupt (checksum differs); {advice}")
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); {advice}") from error
    if identity is not None and state.get("identity") != identity:
        saved = state.get("identity") or {}
        differ = [
            f"{key} ({saved.get(key, 'absent')} there, {identity.get(key, 'absent')} here)"
            for key in sorted({*saved, *identity})
            if saved.get(key) != identity.get(key)
        ]
        raise CheckpointError(f"{path} belongs to another run: it differs in {', '.join(differ)}; {advice}")
    return dict(state)


def structure(model: nn.Module) -> str:
    """Hash of the names, shapes and dtypes of a model's parameters and buffers."""
    rows = [(name, tuple(value.shape), str(value.dtype)) for name, value in model.state_dict().items()]
    rows += [(name, value.requires_grad) for name, value in model.named_parameters()]  # type: ignore[misc]
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]
