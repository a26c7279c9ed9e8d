"""Files that are whole or absent."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomic(path: str | Path, *parts: bytes | memoryview) -> None:
    """Write the parts, one after the other, to `path`: nothing partial ever has that name.

    They go to a temporary file beside it, which is flushed to the disk and renamed. Raises: OSError; a file
    that was there before is then still whole.
    """
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(draft, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
