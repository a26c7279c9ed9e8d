"""Records of runs: one JSON file each, with what is needed to judge and repeat it, checked on every way.

``record`` writes one, ``read_record`` reads one, ``records`` gives a table of a folder of them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import torch
from pydantic import Field, field_validator

from tdbook.paths import ROOT
from tdbook.schema import Strict, Text, validate
from tdlib.data.bundle import SPLITS
from tdlib.errors import DataError, FileError, NonFiniteError
from tdlib.files import write_atomic

SCHEMA_VERSION = 2  # 1: without start, splits and settings
PACKAGES = ("torch", "torchvision", "tdlib", "tensorly", "numpy", "scipy", "accelerate", "scikit-learn")

Rows = list[dict[str, Any]]


class Git(Strict):
    """The commit that a run started from; dirty: with changes that are not committed."""

    commit: Annotated[str, Field(pattern="^[0-9a-f]{40,64}$")]
    dirty: bool


class Device(Strict):
    """What a run ran on; threads: of a CPU."""

    type: Text
    name: Text
    threads: int | None = None


class Record(Strict):
    """What a record's file must hold."""

    schema_: Annotated[Literal[1, 2], Field(alias="schema")]
    chapter: Annotated[str, Field(pattern="^[A-Za-z0-9_.-]+$")]
    parameters: dict[str, Any]
    settings: dict[str, Any] = Field(default_factory=dict)
    metrics: Annotated[dict[str, Any], Field(min_length=1)]
    seed: int | None
    git: Git | None
    versions: dict[str, str]
    device: Device
    wall_seconds: float | None
    data: str | None
    splits: dict[str, int] = Field(default_factory=dict)
    start: str | None = None
    created: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
    scale: Annotated[str, Field(pattern="^(quick|full|reduced: .+)$")]
    history: Rows | dict[str, Rows] = Field(default_factory=list)
    tables: dict[str, Rows] = Field(default_factory=dict)
    notes: str = ""

    @field_validator("versions")
    @classmethod
    def _named(cls, versions: dict[str, str]) -> dict[str, str]:
        if not {"python", "torch"} <= set(versions):
            raise ValueError("must name the versions of python and torch")
        return versions


def record(
    chapter: str,
    parameters: Mapping[str, Any],
    metrics: Mapping[str, Any],
    *,
    directory: str | Path | None = None,
    scale: str = "quick",
    seed: int | None = None,
    device: str | torch.device | None = None,
    wall_seconds: float | None = None,
    data: Any = None,
    history: Any = None,
    tables: Mapping[str, Any] | None = None,
    notes: str | None = None,
    name: str | None = None,
    settings: Mapping[str, Any] | None = None,
    start: str | None = None,
) -> Path:
    """Write one run's record and return its path, see `record_path`.

    The same parameters, settings and data give the same file, which a new run replaces, whole or not at all.
    directory: default the environment variable TDLIB_RECORDS, else book/results.
    settings: what decides the result beside the parameters (arguments of the method and of training, with
    their defaults). start: fingerprint of the network that was compressed.
    scale: "quick", "full", or "reduced: what was reduced".
    seed: default ``parameters["seed"]``. data: a Bundle or its fingerprint. history: rows of an epoch table
    (a History, a DataFrame, a list of dicts, or a dict of these by stage); tables: further ones by name.
    name: another file name stem.

    Raises NonFiniteError for NaN or infinity (name a missing number None), DataError for what is no JSON or
    breaks the schema, or where the file cannot be written.
    """
    content: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        "chapter": chapter,
        "parameters": plain(parameters),
        "settings": plain(settings or {}),
        "metrics": plain(metrics),
        "seed": seed if seed is not None else plain(parameters).get("seed"),
        "git": git_state(),
        "versions": versions(),
        "device": device_name(device),
        "wall_seconds": wall_seconds,
        "data": getattr(data, "fingerprint", data),
        "splits": splits_of(data),
        "start": start,
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "scale": scale,
    }
    if history is not None:
        by_stage = isinstance(history, Mapping)
        content["history"] = {k: _rows(v) for k, v in history.items()} if by_stage else _rows(history)
    if tables is not None:
        content["tables"] = {key: _rows(value) for key, value in tables.items()}
    if notes is not None:
        content["notes"] = notes
    check(content, f"record of chapter {chapter!r}")
    path = record_path(chapter, parameters, directory, settings=settings, data=data)
    path = path if name is None else path.with_name(f"{name}.json")
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text.encode())
    except (OSError, FileError) as error:
        raise DataError(f"record {path} could not be written: {error}") from error
    return path


def record_path(
    chapter: str,
    parameters: Mapping[str, Any],
    directory: str | Path | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    data: Any = None,
) -> Path:
    """Where the record of a run lies: CHAPTER-HASH.json in `directory`, by default the environment variable
    TDLIB_RECORDS or book/results; HASH is of everything that decides the result. Raises DataError for
    parameters that have no JSON form.
    """
    folder = Path(directory or os.environ.get("TDLIB_RECORDS") or "book/results")
    decides = {"parameters": parameters, "settings": settings or {}}
    decides["data"] = getattr(data, "fingerprint", data)
    return folder / f"{chapter}-{parameter_hash(decides)}.json"


def splits_of(data: Any) -> dict[str, int]:
    """Images in each split of a Bundle; nothing for a fingerprint."""
    return {name: len(data.split(name)) for name in SPLITS} if hasattr(data, "split") else {}


def read_record(path: str | Path) -> dict[str, Any]:
    """One record, checked. Raises DataError naming the file and what is wrong with it."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        check(content, str(path))
    except DataError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: nested without end
        raise DataError(f"{path} is not a record: {error}") from error
    return dict(content)


def records(directory: str | Path = "book/results", chapter: str | None = None) -> pd.DataFrame:
    """All records in ``directory`` (not in folders in it) as a pandas DataFrame, oldest first.

    One row each: chapter, created, scale, seed, device, commit, dirty, wall_seconds, data, path, then every
    plain parameter and metric under its name (``metric_NAME`` where a parameter has the same name). Tables
    and histories stay in the files, see ``read_record``. Raises DataError for a file that breaks the schema.
    """
    if not Path(directory).is_dir():
        raise DataError(f"{directory} is not a folder of records")
    rows = []
    for path in sorted(Path(directory).glob("*.json")):
        content = read_record(path)
        if chapter is None or content["chapter"] == chapter:
            rows.append(_row(path, content))
    rows.sort(key=lambda row: (row["created"], row["path"]))
    return pd.DataFrame(rows)


def check(content: Any, where: str) -> None:
    """Raises DataError or NonFiniteError where ``content`` is no valid record."""
    _refuse_non_finite(content, where)
    validate(Record, content, where)


def plain(value: Any) -> Any:
    """``value`` as JSON has it: tables with text keys, lists, text, numbers, None. Raises DataError."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, Path | torch.device | torch.dtype):
        return str(value)
    if hasattr(value, "tolist"):  # tensors, numpy arrays and scalars
        return plain(value.tolist())
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    raise DataError(f"{value!r} of type {type(value).__name__} has no JSON form")


def parameter_hash(parameters: Mapping[str, Any]) -> str:
    """12 hexadecimal digits that depend on the parameters, not on their order. Raises DataError."""
    content = plain(parameters)
    try:
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise DataError(f"parameters must be finite numbers, text, lists or tables: {error}") from error
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def git_state() -> dict[str, Any] | None:
    """``{"commit", "dirty"}`` of the book's repository, None outside one. Records do not count as dirt."""
    top = _git("rev-parse", "--show-toplevel")
    commit = _git("rev-parse", "HEAD")
    if top is None or commit is None or Path(top) != ROOT:
        return None
    changed = _git(
        "status", "--porcelain", "--untracked-files=no", "--", ":(top)", ":(top,exclude)book/results"
    )
    return {"commit": commit, "dirty": bool(changed)}


def versions() -> dict[str, str]:
    """Versions of Python and the packages that decide results."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__
    return found


def device_name(device: str | torch.device | None = None) -> dict[str, Any]:
    """``{"type", "name"}`` of a device (default: CUDA where there is one); threads for a CPU."""
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if where.type == "cuda" and torch.cuda.is_available():
        return {"type": "cuda", "name": torch.cuda.get_device_name(where)}
    return {"type": where.type, "name": _cpu_name(), "threads": torch.get_num_threads()}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown"


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _rows(table: Any) -> Rows:
    if isinstance(table, pd.DataFrame):  # its missing values become null
        table = table.astype(object).where(table.notna(), None).to_dict(orient="records")
    rows = plain(getattr(table, "rows", table))
    if not isinstance(rows, list):
        raise DataError(
            f"a table of a record must be a list of rows, a DataFrame or a History, not {type(table)}"
        )
    return rows


def _row(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    git = content["git"] or {}
    row = {key: content[key] for key in ("chapter", "created", "scale", "seed")}
    row |= {"device": content["device"]["name"], "commit": git.get("commit"), "dirty": git.get("dirty")}
    row |= {key: content[key] for key in ("wall_seconds", "data")} | {"path": str(path)}
    row |= {k: v for k, v in content["parameters"].items() if k not in row and not isinstance(v, dict | list)}
    for key, value in content["metrics"].items():
        if not isinstance(value, dict | list):
            row[f"metric_{key}" if key in row else key] = value
    return row


def _refuse_non_finite(value: Any, where: str, place: Sequence[str] = ()) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise NonFiniteError(
            f"{where}: {'/'.join(place)} is {value}; a record holds finite numbers (or None)"
        )
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_non_finite(item, where, (*place, str(key)))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _refuse_non_finite(item, where, (*place, str(i)))
