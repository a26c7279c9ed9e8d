"""Run a chapter over a grid of parameters, several jobs per device at a time: ``tdlib sweep grid.yaml``.

A grid file names sweeps, in the form that the Snakefile reads too (``book/sweeps.yml``):

    admm_ratio:
      chapter: admm_tt
      base: {profile: quick}                      # the same in every job
      grid: {ratio: [1.5, 2.5], seed: [0, 1, 2]}  # one job per combination

Files are the Snakefile's as well, so either of the two continues what the other began:
FOLDER/SWEEP/CELL.ipynb (there only once the job is done), FOLDER/SWEEP/CELL/*.json (its records),
FOLDER/SWEEP.csv (all records of the sweep). Beside them lies CELL.log.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import IO, Any

from tdlib.errors import DataError, TdlibError, unknown

KEYS = ("chapter", "base", "grid")


@dataclass(frozen=True)
class Job:
    """One cell of a sweep: a chapter and its parameters."""

    sweep: str
    cell: str
    chapter: str
    parameters: Mapping[str, Any]

    def notebook(self, folder: Path) -> Path:
        """Where the executed notebook lies once the job is done."""
        return folder / self.sweep / f"{self.cell}.ipynb"

    def log(self, folder: Path) -> Path:
        """What the job printed."""
        return folder / self.sweep / f"{self.cell}.log"


@dataclass(frozen=True)
class Outcome:
    """What became of a job: ``done``, ``was done``, ``failed`` or ``not started``."""

    job: Job
    state: str
    seconds: float = 0.0
    device: str = ""
    message: str = ""


def read_grid(path: str | Path) -> dict[str, list[Job]]:
    """Jobs of every sweep in a grid file. Raises DataError, UnknownName (keys, chapters, parameters)."""
    from tdlib import chapters

    try:
        import yaml
    except ImportError as error:
        raise TdlibError("sweeps need PyYAML and papermill: pip install 'tdlib[book]'") from error
    path = Path(path)
    if not path.is_file():
        raise DataError(f"grid file {path} does not exist")
    try:
        sweeps = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise DataError(f"{path} is not YAML: {error}") from error
    if not isinstance(sweeps, Mapping) or not all(isinstance(sweep, Mapping) for sweep in sweeps.values()):
        raise DataError(f"{path} must map names of sweeps to tables with the keys {', '.join(KEYS)}")
    found = {}
    for name, sweep in sweeps.items():
        for key in sweep:
            if key not in KEYS:
                raise unknown(f"key of sweep {name!r}", key, KEYS)
        chapter, base, grid = sweep.get("chapter"), sweep.get("base") or {}, sweep.get("grid")
        if (
            not isinstance(grid, Mapping)
            or not grid
            or not all(isinstance(v, list) and v for v in grid.values())
        ):
            raise DataError(f"{path}: sweep {name!r} needs a grid: parameter names with lists of values")
        declared = chapters.defaults(chapters.notebook(str(chapter)))
        for key in [*base, *grid]:
            if key not in declared:
                raise unknown(f"parameter of chapter {chapter!r}", str(key), sorted(declared))
        rows = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
        given = {"profile": "quick"} | dict(base)
        found[str(name)] = [Job(str(name), _cell(row), str(chapter), given | row) for row in rows]
    return found


def _cell(row: Mapping[str, Any]) -> str:
    return "_".join(f"{key}-{value}" for key, value in row.items()).replace("/", "-")


def run_jobs(
    jobs: Iterable[Job],
    folder: str | Path,
    *,
    devices: Sequence[str] = ("cpu",),
    per_device: int = 1,
    max_minutes: float | None = None,
    report: Callable[[Outcome], None] = lambda outcome: None,
    poll_seconds: float = 0.1,
) -> list[Outcome]:
    """Run every job in its own process, ``per_device`` at a time on each device; a failure stops no other.

    A job whose notebook exists is not run again. After ``max_minutes`` no further job is started and those
    running are asked to stop (SIGTERM). Stopping this process stops its jobs. ``report`` is called as each
    job ends.
    """
    folder = Path(folder)
    waiting, outcomes = deque(jobs), []
    free = [device for _ in range(per_device) for device in devices]
    running: dict[subprocess.Popen[bytes], tuple[Job, str, float, IO[bytes]]] = {}
    started = time.monotonic()

    def end(outcome: Outcome) -> None:
        outcomes.append(outcome)
        report(outcome)

    try:
        while waiting or running:
            late = max_minutes is not None and time.monotonic() - started > 60 * max_minutes
            if late:
                for process in running:
                    process.terminate()
                while waiting:
                    end(Outcome(waiting.popleft(), "not started", message="time limit"))
            while waiting and free:
                job = waiting.popleft()
                if job.notebook(folder).is_file():
                    end(Outcome(job, "was done"))
                    continue
                device = free.pop(0)
                log = _open_log(job.log(folder))
                running[_start(job, folder, device, per_device, log)] = (job, device, time.monotonic(), log)
            for process in [p for p in running if p.poll() is not None]:
                job, device, begun, log = running.pop(process)
                log.close()
                free.append(device)
                state = "done" if process.returncode == 0 and job.notebook(folder).is_file() else "failed"
                message = "" if state == "done" else ("time limit" if late else _last_line(job.log(folder)))
                end(Outcome(job, state, time.monotonic() - begun, device, message))
            if running:
                time.sleep(poll_seconds)
    finally:
        for process, (_, _, _, log) in running.items():
            process.terminate()
            process.wait()
            log.close()
    return outcomes


def _open_log(path: Path) -> IO[bytes]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("wb")
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from error


def _start(job: Job, folder: Path, device: str, per_device: int, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start one job in a process of its own with its share of the cores, or its GPU."""
    from tdlib import chapters

    environment = dict(os.environ)
    kind, _, index = device.partition(":")
    parameters = dict(job.parameters)
    if "device" in chapters.defaults(chapters.notebook(job.chapter)):
        parameters.setdefault("device", kind)
    if kind == "cuda" and index:
        environment["CUDA_VISIBLE_DEVICES"] = index
    share = max(1, (os.cpu_count() or 1) // per_device)
    environment.setdefault("OMP_NUM_THREADS", str(share))
    cell = job.notebook(folder).with_suffix("")
    command = [
        sys.executable, "-m", "tdlib.chapters", "run", str(chapters.notebook(job.chapter)),
        "--output", str(job.notebook(folder).resolve()),
        "--failed", str((folder / "failed" / job.sweep / job.cell).resolve()),
        "--records", str(cell.resolve()),
        *(part for name, value in parameters.items() for part in ("-p", f"{name}={_text(value)}")),
    ]  # fmt: skip
    return subprocess.Popen(command, cwd=chapters.ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


def _text(value: Any) -> str:
    import json

    return value if isinstance(value, str) else json.dumps(value)


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it ended without a word"


def hints(devices: Sequence[str], per_device: int) -> list[str]:
    """Advice on sharing a GPU: without MPS the kernels of several processes take turns."""
    sharing = per_device > 1 and any(device.startswith("cuda") for device in devices)
    pipe = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"))
    if sharing and not pipe.exists():
        return [
            "hint: jobs that share a GPU run side by side only under NVIDIA's MPS; start it once with "
            "`nvidia-cuda-mps-control -d` (stop it with `echo quit | nvidia-cuda-mps-control`)"
        ]
    return []
