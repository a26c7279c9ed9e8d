"""Records of runs: one JSON file each, with what is needed to judge and repeat it, checked against a schema.

``record`` writes one, ``read_record`` reads one, ``records`` gives a table of a folder of them.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema
import torch

from .errors import DataError, NonFiniteError
from .runs import parameter_hash, plain
from .train.checkpoint import write_atomic

SCHEMA_VERSION = 1
PACKAGES = ("torch", "torchvision", "tdlib", "tensorly", "numpy", "scipy", "accelerate", "scikit-learn")

_NUMBER_OR_NULL = {"type": ["number", "null"]}
_TEXT = {"type": "string", "minLength": 1}
_TABLE = {"type": "array", "items": {"type": "object"}}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": [
        "schema", "chapter", "parameters", "metrics", "seed", "git", "versions", "device", "wall_seconds",
        "data", "created", "scale",
    ],
    "properties": {
        "schema": {"const": SCHEMA_VERSION},
        "chapter": {"type": "string", "pattern": "^[A-Za-z0-9_.-]+$"},
        "parameters": {"type": "object"},
        "metrics": {"type": "object", "minProperties": 1},
        "seed": {"type": ["integer", "null"]},
        "git": {
            "type": ["object", "null"],
            "required": ["commit", "dirty"],
            "properties": {
                "commit": {"type": "string", "pattern": "^[0-9a-f]{40,64}$"},
                "dirty": {"type": "boolean"},
            },
            "additionalProperties": False,
        },
        "versions": {
            "type": "object",
            "required": ["python", "torch"],
            "additionalProperties": {"type": "string"},
        },
        "device": {
            "type": "object",
            "required": ["type", "name"],
            "properties": {"type": _TEXT, "name": _TEXT, "threads": {"type": "integer"}},
            "additionalProperties": False,
        },
        "wall_seconds": _NUMBER_OR_NULL,
        "data": {"type": ["string", "null"]},
        "created": {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$"},
        "scale": {"type": "string", "pattern": "^(quick|full|reduced: .+)$"},
        "history": {"anyOf": [_TABLE, {"type": "object", "additionalProperties": _TABLE}]},
        "tables": {"type": "object", "additionalProperties": _TABLE},
        "notes": {"type": "string"},
    },
}  # fmt: skip


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
) -> Path:
    """Write one run's record and return its path, DIRECTORY/CHAPTER-HASH.json (HASH of the parameters).

    The same parameters give the same file, which a new run replaces, whole or not at all.
    directory: default the environment variable TDLIB_RECORDS, else book/results.
    scale: "quick", "full", or "reduced: what was reduced".
    seed: default ``parameters["seed"]``. data: a Bundle or its fingerprint. history: rows of an epoch table
    (a History, a DataFrame, a list of dicts, or a dict of these by stage); tables: further ones by name.
    name: another file name stem.

    Raises NonFiniteError for NaN or infinity (name a missing number None), DataError for what is no JSON or
    breaks the schema, or where the file cannot be written.
    """
    folder = Path(directory if directory is not None else os.environ.get("TDLIB_RECORDS") or "book/results")
    content: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        "chapter": chapter,
        "parameters": plain(parameters),
        "metrics": plain(metrics),
        "seed": seed if seed is not None else plain(parameters).get("seed"),
        "git": git_state(),
        "versions": versions(),
        "device": device_name(device),
        "wall_seconds": wall_seconds,
        "data": getattr(data, "fingerprint", data),
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
    path = folder / f"{name or f'{chapter}-{parameter_hash(parameters)}'}.json"
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text.encode())
    except OSError as error:
        raise DataError(f"record {path} could not be written: {error}") from error
    return path


def read_record(path: str | Path) -> dict[str, Any]:
    """One record, checked. Raises DataError naming the file and what is wrong with it."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a record: {error}") from error
    check(content, str(path))
    return dict(content)


def records(directory: str | Path = "book/results", chapter: str | None = None) -> Any:
    """All records under ``directory`` as a pandas DataFrame, oldest first.

    One row each: chapter, created, scale, seed, device, commit, dirty, wall_seconds, data, path, then every
    plain parameter and metric under its name (``metric_NAME`` where a parameter has the same name). Tables
    and histories stay in the files, see ``read_record``. Raises DataError for a file that breaks the schema.
    """
    import pandas

    folder = Path(directory)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder of records")
    rows = []
    for path in sorted(folder.rglob("*.json")):
        content = read_record(path)
        if chapter is None or content["chapter"] == chapter:
            rows.append(_row(path, content))
    rows.sort(key=lambda row: (row["created"], row["path"]))
    return pandas.DataFrame(rows)


def check(content: Any, where: str) -> None:
    """Raises DataError or NonFiniteError where ``content`` is no valid record."""
    _refuse_non_finite(content, where)
    found = sorted(jsonschema.Draft202012Validator(SCHEMA).iter_errors(content), key=lambda e: list(e.path))
    if found:
        place = "/".join(str(part) for part in found[0].path) or "the top level"
        raise DataError(f"{where} breaks the schema at {place}: {found[0].message[:300]}")


def git_state() -> dict[str, Any] | None:
    """``{"commit", "dirty"}`` of the repository that holds tdlib, None outside one. Records do not count as
    dirt.
    """
    top = _git("rev-parse", "--show-toplevel")
    commit = _git("rev-parse", "HEAD")
    if top is None or commit is None or not (Path(top) / "tdlib" / "records.py").is_file():
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
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _rows(table: Any) -> list[dict[str, Any]]:
    if hasattr(table, "to_dict") and hasattr(table, "columns"):  # a DataFrame; its missing values become null
        table = [
            {
                key: None if isinstance(value, float) and math.isnan(value) else value
                for key, value in row.items()
            }
            for row in table.to_dict(orient="records")
        ]
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
