"""Run directories named by the hash of their parameters: started again, a run continues or is found done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import CheckpointError, DataError
from .train.checkpoint import write_atomic


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


def run_directory(chapter: str, parameters: Mapping[str, Any], root: str | Path = "runs") -> Path:
    """ROOT/CHAPTER-HASH: the directory of the run with these parameters (not created)."""
    if not chapter or not all(c.isalnum() or c in "_.-" for c in chapter):
        raise DataError(f"chapter {chapter!r} must be of letters, digits, '_', '.' and '-'")
    return Path(root) / f"{chapter}-{parameter_hash(parameters)}"


@dataclass(frozen=True)
class Run:
    """One run's directory: parameters.json, a checkpoint per stage, result.json once done.

    run = Run.start("admm_tt", parameters, "runs")
    if not run.done:
        fit(model, data, ..., checkpoint=run.checkpoint("dense"))
        run.finish({"test_accuracy": 91.2})
    print(run.result())
    """

    path: Path
    parameters: Mapping[str, Any]

    @classmethod
    def start(cls, chapter: str, parameters: Mapping[str, Any], root: str | Path = "runs") -> Run:
        """Create or find the run's directory. Raises CheckpointError where it cannot be written or is
        another's.
        """
        run = cls(run_directory(chapter, parameters, root), plain(parameters))
        file = run.path / "parameters.json"
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            if file.exists():
                if json.loads(file.read_text(encoding="utf-8")) != run.parameters:
                    raise CheckpointError(f"{run.path} belongs to a run with other parameters, see {file}")
            else:
                write_atomic(file, _json(run.parameters))
        except OSError as error:
            raise CheckpointError(f"run directory {run.path} cannot be written: {error}") from error
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{file} is corrupt ({error}); delete {run.path} to start anew") from error
        return run

    @property
    def done(self) -> bool:
        """Whether ``finish`` was called."""
        return (self.path / "result.json").is_file()

    @property
    def log(self) -> Path:
        """A file for what the run prints."""
        return self.path / "run.log"

    def checkpoint(self, stage: str) -> Path:
        """The checkpoint directory of one stage (a call of ``fit``)."""
        return self.path / stage

    def finish(self, result: Mapping[str, Any]) -> Path:
        """Write the result; from now on the run is done. Raises CheckpointError, DataError."""
        file = self.path / "result.json"
        try:
            write_atomic(file, _json(plain(result)))
        except OSError as error:
            raise CheckpointError(f"result {file} could not be written: {error}") from error
        return file

    def result(self) -> dict[str, Any] | None:
        """What ``finish`` wrote, or None. Raises CheckpointError where the file is corrupt."""
        file = self.path / "result.json"
        try:
            return dict(json.loads(file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{file} is corrupt ({error}); delete it to finish the run again"
            ) from error


def _json(value: Any) -> bytes:
    try:
        return (json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()
    except ValueError as error:
        raise DataError(f"only finite numbers can be written: {error}") from error
