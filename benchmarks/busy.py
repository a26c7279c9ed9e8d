"""The default method on a machine whose processor others want too, against the same on an idle one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack

import torch

import tdlib
from benchmarks.timing import Row, invert, measure

TOPIC = "busy"
OTHERS = 2


def rows(quick: bool) -> Iterator[Row]:
    """`compress` with as many threads as there are cores, two busy processes beside it or none."""
    data = tdlib.data.load("digits")
    torch.manual_seed(0)
    model = tdlib.models.build("cnn", 10)
    threads = torch.get_num_threads()

    def idle() -> None:
        tdlib.compress(model, "sequential", data, ratio=2, progress=False)

    def busy() -> None:
        for other in others:
            other.send_signal(signal.SIGCONT)
        try:
            idle()
        finally:
            for other in others:
                other.send_signal(signal.SIGSTOP)

    row = Row(
        TOPIC,
        f"sequential beside {OTHERS} busy processes, {os.cpu_count()} cores",
        "busy machine",
        "idle machine",
        target=3.0,
        at_most=True,
        note="ratio: wall-clock time on the busy machine / on the idle one",
    )
    with ExitStack() as stack:
        others = [
            stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            for _ in range(OTHERS)
        ]
        for other in others:
            stack.callback(other.kill)
            other.send_signal(signal.SIGSTOP)
        torch.set_num_threads(os.cpu_count() or 1)
        stack.callback(torch.set_num_threads, threads)
        measure(row, busy, idle, pairs=5 if quick else 15, seconds=30 if quick else 120)
    yield invert(row)
