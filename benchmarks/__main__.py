"""``python -m benchmarks [--quick] [--only TOPIC]``: measure, print, write ``benchmarks/results.json``."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

from benchmarks.report import line, machine, merge, summary, write
from benchmarks.timing import Row

TOPICS = ("decomposition", "latency", "calibration", "training", "busy")
CPU_ONLY = ("decomposition", "busy")
RESULTS = Path(__file__).parent / "results.json"


def main(arguments: list[str] | None = None) -> int:
    """Run the topics; rows of topics that are not run stay in the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, few repetitions; not written by default"
    )
    parser.add_argument("--only", action="append", choices=TOPICS, help="one topic; may be repeated")
    parser.add_argument(
        "--out", type=Path, help="results file (default benchmarks/results.json, quick: none)"
    )
    parser.add_argument("--device", default="cpu", help="where all but the decompositions run: cpu or cuda")
    options = parser.parse_args(arguments)
    topics = options.only or list(TOPICS)
    out = options.out or (None if options.quick else RESULTS)
    rows: list[Row] = []
    suffix = "" if options.device == "cpu" else " on GPU"  # beside the rows of the CPU, not in their place
    for topic in topics:
        started, before = time.perf_counter(), len(rows)
        print(f"\n{topic}", flush=True)
        module = importlib.import_module(f".{topic}", __package__)
        given = (options.quick,) if topic in CPU_ONLY else (options.quick, options.device)
        for row in module.rows(*given):
            row.topic += "" if topic in CPU_ONLY else suffix
            rows.append(row)
            print(line(row), flush=True)
            if out is not None:
                write(out, merge(out, rows, machine(options.device, options.quick)))
        print(f"{len(rows) - before} rows in {time.perf_counter() - started:.0f} s", flush=True)
    print("\n" + summary(rows))
    if out is not None:
        print(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
