"""Files that are whole or absent, and files of tensors (safetensors) that notice their own damage."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tdlib.errors import CheckpointError, FileError

LONGEST = 2**23  # bytes of a header; parsing a longer one would take memory that its file does not
SUM, PLACE = "tdlib.sha256", re.compile(rb'"tdlib\.sha256":"([0-9a-f]{64})"')
BLANK = "0" * 64  # stands in the sum's own place while it is computed


def write_atomic(path: str | Path, *parts: bytes | memoryview) -> None:
    """Write the parts, one after the other, to `path`: nothing partial ever has that name.

    They go to a temporary file beside it, which is flushed to the disk and renamed. Raises: FileError (no
    such folder, read-only, disk full); a file that was there before is then still whole.
    """
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            with open(draft, "wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        kept = "; the file that was there is unchanged" if path.is_file() else ""
        raise FileError(f"cannot write {path}: {error.strerror or error}{kept}") from error


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata as `write_atomic` does, with the SHA-256 of the whole file in its header.

    Raises: FileError; CheckpointError where the header is longer than `read_tensors` takes.
    """
    data = memoryview(save(dict(tensors), metadata={**metadata, SUM: BLANK}))
    end = 8 + int.from_bytes(data[:8], "little")
    place = PLACE.search(data, 0, end)
    if end > LONGEST or place is None:
        raise CheckpointError(f"{path}: a header of {end} bytes cannot be read again ({LONGEST} at most)")
    at, after = place.span(1)
    write_atomic(path, data[:at], hashlib.sha256(data).hexdigest().encode(), data[after:])


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file; whoever wrote it. The tensors are mapped, not yet in memory.

    A SHA-256 in the header is checked, and in the metadata as `SUM` then.
    Raises: CheckpointError if the file is missing, malformed, or damaged.
    """
    try:
        with open(path, "rb") as file:
            size = file.read(8)
            length = int.from_bytes(size, "little")
            if length > LONGEST:
                raise CheckpointError(f"cannot read {path}: no safetensors file, or an overlong header")
            header = size + file.read(length)
            if place := PLACE.search(header):
                at, after = place.span(1)
                found = hashlib.sha256(header[:at] + BLANK.encode() + header[after:])
                while part := file.read(2**20):
                    found.update(part)
                if found.hexdigest().encode() != place[1]:
                    raise CheckpointError(f"{path} is damaged: its content does not have its SHA-256")
        with safe_open(path, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
            metadata = dict(opened.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not place:
        metadata.pop(SUM, None)  # what is left of it
    return tensors, metadata


def parse(text: str, path: str | Path) -> Any:
    """The JSON of a text in the file. Raises: CheckpointError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError: nested without end
        raise CheckpointError(f"{path} holds no JSON that can be read: {error}") from error


def fits(value: Any, form: Any) -> bool:
    """Whether JSON has a form: a type or None, [form of every item], {str: form of every value},
    {key: form of its value, ...}, or a tuple of forms of which one is enough. True is no int."""
    if isinstance(form, tuple):
        return any(fits(value, one) for one in form)
    if isinstance(form, list):
        return isinstance(value, list) and all(fits(item, form[0]) for item in value)
    if not isinstance(form, dict):
        return value is None if form is None else type(value) is form
    if not isinstance(value, dict):
        return False
    if str in form:
        return all(fits(item, form[str]) for item in value.values())
    return all(key in value and fits(value[key], one) for key, one in form.items())
