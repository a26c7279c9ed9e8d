"""Files that are whole or absent."""

from __future__ import annotations

import os
from pathlib import Path

from tdlib.errors import FileError


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
