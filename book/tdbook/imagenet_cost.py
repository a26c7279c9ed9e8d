"""Time and cost of the chapters at ImageNet's size, from measured images per second."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml

from tdbook import tables
from tdbook.paths import BOOK, ROOT
from tdlib.errors import DataError


def measured(results: Mapping[str, Any], network: str = "resnet18") -> dict[str, dict[str, Any]]:
    """Per machine of ``benchmarks/results.json``: images/s of training and of the forward pass of ``network``
    at 224x224, and how many forward passes the statistics of an image take. Rows of other sizes are left out.
    """
    found: dict[str, dict[str, Any]] = {}
    for row in results["rows"]:
        machine = results["machines"][row["topic"]]
        device = "cuda" if machine["device"] != "cpu" else "cpu core"
        name = machine["device"] if device == "cuda" else f"{machine['cpu']}, {machine['threads']} core(s)"
        speed = (row.get("extra") or {}).get("images_per_second")
        if speed is None or network not in row["name"] or "224" not in row["name"]:
            continue
        place = found.setdefault(name, {"device": device, "cores": machine["threads"]})
        if row["topic"].startswith("training"):
            place["training"] = speed
        else:
            place |= {"forward": speed, "statistics": row["ratio"]}
    return found


def hours(run: Mapping[str, Any], speed: Mapping[str, Any], images: int) -> tuple[float, str] | None:
    """(hours, the arithmetic) of one run on one machine; None where a speed is missing.

    Raises DataError for a run that says nothing to compute.
    """
    seconds, terms = 0.0, []
    if "epochs" in run:
        if "training" not in speed:
            return None
        epochs = sum(run["epochs"])
        seconds += epochs * images / speed["training"]
        parts = " + ".join(map(str, run["epochs"]))
        terms.append(f"({parts}) epochs × {images:,} images / {speed['training']:.3g} images/s")
    for key, what in (("statistics", "images of Σ"), ("forward", "images")):
        if key not in run:
            continue
        if "forward" not in speed:
            return None
        passes = speed["statistics"] if key == "statistics" else 1.0
        seconds += run[key] * passes / speed["forward"]
        factor = f" × {passes:.2f} passes" if key == "statistics" else ""
        terms.append(f"{run[key]:,} {what}{factor} / {speed['forward']:.3g} images/s")
    if not terms:
        raise DataError(
            f"{run.get('chapter')}: expected epochs, statistics or forward in book/imagenet.yml, found none"
        )
    return seconds / 3600, " + ".join(terms)


def page(results: Mapping[str, Any] | None, ledger: Mapping[str, Any]) -> str:
    """Markdown: a table per measured machine, and what is not measured yet."""
    found = measured(results) if results else {}
    price, images = ledger["price_per_hour"], ledger["images"]["train"]
    unit, parts = ledger["currency"], []
    for name, speed in found.items():
        rows = []
        for run in ledger["runs"]:
            estimate = hours(run, speed, images)
            rate = price[speed["device"]] * (speed["cores"] if speed["device"] != "cuda" else 1)
            row = {"chapter": run["chapter"], "run": run["what"]}
            if estimate is None:
                row |= {"arithmetic": "*not measured yet*"}
            else:
                time, arithmetic = estimate
                row |= {"arithmetic": arithmetic, "hours": f"{time:,.3g}" if time < 100 else f"{time:,.0f}"}
                row[f"cost ({unit})"] = f"{time * rate:,.2f}" if time * rate < 100 else f"{time * rate:,.0f}"
            rows.append(row | {"recipe": run["source"]})
        rate = (
            f"{price[speed['device']]} {unit} per {'GPU' if speed['device'] == 'cuda' else 'core'} and hour"
        )
        parts.append(f"**{name}** (assumed price: {rate})\n\n{tables.markdown(rows)}")
    if not any(speed["device"] == "cuda" for speed in found.values()):
        parts.append(
            "**GPU**: not measured yet. `python -m benchmarks --only training --only calibration "
            "--device cuda` measures images/s there, and this page gains its table."
        )
    return "\n\n".join(parts)


def generated() -> str:
    """The page's piece from the committed ledger and measurements."""
    ledger = yaml.safe_load((BOOK / "imagenet.yml").read_text(encoding="utf-8"))
    path = ROOT / "benchmarks" / "results.json"
    return page(json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None, ledger)
