"""One checkpoint file per directory: written atomically, verified when read, refused where it belongs
elsewhere.

File layout: a magic line, the SHA-256 of the payload, the payload (``torch.save`` of tensors and plain
values, read with ``weights_only=True``, so no code is ever unpickled).
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdlib.errors import CheckpointError, FileError
from tdlib.files import fits, write_atomic

NAME = "checkpoint.tdlib"
MAGIC = b"tdlib-checkpoint-1\n"
#: Arguments of training that do not decide its result, so that a run may go on with others.
FREE = (
    "checkpoint", "checkpoint_steps", "max_minutes", "origin",
    "device", "compile", "progress", "channels_last",
)  # fmt: skip

PLAIN = (bool, int, float, str, bytes, Path, torch.dtype, torch.device)


def prepare(directory: Path, model: nn.Module) -> None:
    """Create the directory, check that checkpoints of the model can be written there, remove remains of a
    killed write. Raises CheckpointError.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for left in directory.glob(f".{NAME}.*"):
            left.unlink(missing_ok=True)
        probe = directory / f".{NAME}.{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink(missing_ok=True)
        free = shutil.disk_usage(directory).free
    except OSError as error:
        raise CheckpointError(f"checkpoint directory {directory} cannot be written: {error}") from error
    # Weights, momentum and the best weights, in the old file and in the new one that replaces it.
    need = 6 * sum(value.nbytes for value in model.state_dict().values())
    if free < need:
        raise CheckpointError(
            f"checkpoint directory {directory} has {free / 1e6:.0f} MB free, checkpoints of this model need "
            f"{need / 1e6:.0f} MB: free some, or give a directory on another disk"
        )


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


def claim(directory: Path, identity: Mapping[str, str]) -> None:
    """Mark the directory as that of a run in several stages, which have directories of their own in it."""
    if not (directory / NAME).exists():
        write(directory, {"identity": dict(identity)})


def read(
    directory: Path, identity: Mapping[str, str] | None = None, model: nn.Module | None = None
) -> dict[str, Any] | None:
    """The state in ``directory``, or None where there is no checkpoint. Changes nothing there.

    identity: what the run is (see ``fit``); a checkpoint of another run is refused, but for one that differs
    in the starting weights alone and whose present weights ``model`` has. Raises CheckpointError.
    """
    path = directory / NAME
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error
    advice = f"nothing was overwritten; empty {directory} to start anew, or give another directory"
    head = len(MAGIC) + 65
    if not raw.startswith(MAGIC):
        raise CheckpointError(f"{path} is not a tdlib checkpoint; {advice}")
    payload = memoryview(raw)[head:]
    if hashlib.sha256(payload).hexdigest().encode() != raw[len(MAGIC) : head - 1]:
        raise CheckpointError(f"{path} is corrupt (checksum differs); {advice}")
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load names no closed list of what a malformed payload can raise
        raise CheckpointError(f"{path} cannot be read ({error}); {advice}") from error
    if not isinstance(state, dict) or not fits(state.get("identity", {}), {str: str}):
        raise CheckpointError(f"{path} is not a tdlib checkpoint, whatever its checksum says; {advice}")
    if identity is not None and state.get("identity") != identity:
        saved = state.get("identity") or {}
        differ = [key for key in sorted({*saved, *identity}) if saved.get(key) != identity.get(key)]
        if differ == ["weights"] and model is not None and _has(model, state.get("model")):
            return state
        named = [f"{k} ({_short(saved.get(k))} there, {_short(identity.get(k))} here)" for k in differ]
        raise CheckpointError(f"{path} belongs to another run: it differs in {', '.join(named)}; {advice}")
    return state


def _has(model: nn.Module, weights: Mapping[str, Tensor] | None) -> bool:
    """Whether these are the model's weights."""
    mine = model.state_dict()
    return weights is not None and all(torch.equal(mine[k].cpu(), value) for k, value in weights.items())


def _short(text: str | None) -> str:
    """At most a line of an identity's entry, in an error."""
    if text is None:
        return "absent"
    return text if len(text) <= 100 else f"{text[:80]}... {hashlib.sha256(text.encode()).hexdigest()[:8]}"


def described(value: Any) -> str:
    """The value as text that is the same in every process, for an identity: numbers and text as they are,
    tensors and arrays by a hash, tables, lists and dataclasses by what they hold, other objects by name.
    """
    if value is None or isinstance(value, PLAIN):
        return repr(value)
    if hasattr(value, "tolist"):  # tensors, numpy arrays and scalars
        tensor = torch.as_tensor(value).detach().cpu()
        content: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        return f"{tensor.dtype}{list(tensor.shape)}:{hashlib.sha256(content).hexdigest()[:16]}"
    if is_dataclass(value) and not isinstance(value, type):
        held: Any = {row.name: getattr(value, row.name) for row in fields(value)}
        return type(value).__name__ + described(held)
    if isinstance(value, Mapping):  # also what one of its own kind has beside its items
        held = {**value, **getattr(value, "__dict__", {})}
        return f"{{{', '.join(f'{described(k)}: {described(v)}' for k, v in held.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(described, value))}]"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(described, value)))}}}"
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def digest(identity: Mapping[str, str]) -> str:
    """SHA-256 of an identity."""
    return hashlib.sha256(repr(sorted(identity.items())).encode()).hexdigest()


def structure(model: nn.Module) -> str:
    """Hash of the names, shapes and dtypes of a model's parameters and buffers."""
    rows = [(name, tuple(value.shape), str(value.dtype)) for name, value in model.state_dict().items()]
    rows += [(name, value.requires_grad) for name, value in model.named_parameters()]  # type: ignore[misc]
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]
