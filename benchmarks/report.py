"""Results as a file and as text; nothing is measured here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Row, clock

PACKAGES = ("torch", "torchvision", "tensorly", "tensorly-torch", "numpy")
WIDTH = 62


def machine(device: str, quick: bool) -> dict[str, Any]:
    """Where and with what the rows were measured."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": "CPU time" if clock(device) is time.process_time else "wall clock",
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "load_1min": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
        "quick": quick,
    }


def _cpu_name() -> str:
    try:
        for text in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if text.startswith("model name"):
                return text.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def merge(path: Path, rows: Sequence[Row], where: dict[str, Any]) -> dict[str, Any]:
    """New rows replace those of the same topics in the file; the others stay, each with its own machine."""
    topics = {row.topic for row in rows}
    old: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    kept = [row for row in old.get("rows", []) if row["topic"] not in topics]
    machines = {t: m for t, m in old.get("machines", {}).items() if t not in topics}
    machines |= {row.topic: where for row in rows}
    return {"machines": machines, "rows": kept + [row.to_dict() for row in rows]}


def write(path: Path, results: dict[str, Any]) -> None:
    """Write atomically."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def line(row: Row) -> str:
    """One row as text."""
    if row.ratio != row.ratio:
        return f"  {row.name:<{WIDTH}} {row.b}: {row.note}"
    low, high = row.quartiles
    errors = ""
    if row.error_a is not None and row.error_b is not None:
        errors = f"  error {row.error_a:.5f} / {row.error_b:.5f}"
    verdict = {None: "", True: "  met", False: "  MISSED"}[row.met]
    bound = f" (target {'<=' if row.at_most else '>='} {row.target:g})" if row.target is not None else ""
    times = f"{row.a_ms:.4g} / {row.b_ms:.4g} ms"
    return (
        f"  {row.name:<{WIDTH}} {row.b:<32} {row.ratio:7.2f} [{low:.2f}, {high:.2f}] n={row.pairs}  {times}"
        f"{errors}{bound}{verdict}"
    )


def summary(rows: Sequence[Row]) -> str:
    """How many targets are met, and which are not."""
    judged = [row for row in rows if row.met is not None]
    missed = [row for row in judged if not row.met]
    text = f"{len(judged) - len(missed)} of {len(judged)} targets met"
    return "\n".join([text, *(f"missed: {row.name}, against {row.b}: {row.ratio:.2f}" for row in missed)])
