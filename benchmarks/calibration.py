"""Cost of the data-aware part: gathering the statistics of ResNet-18 against its forward passes, and the
default method where other processes want the processor too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator

import torch

import tdlib
from benchmarks.kernels import resnet
from benchmarks.timing import Row, invert, measure

TOPIC = "calibration"


def rows(quick: bool, device: str) -> Iterator[Row]:
    """Exact statistics of every convolution and linear layer, over several batches; on a CPU also the
    default method on a busy machine."""
    if device == "cpu":
        yield busy_machine()
    side, batch, number = (160, 4, 1) if quick else (224, 16, 8)
    model, source = resnet("resnet18")
    model.to(device)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(batch, 3, side, side, generator=generator).to(device) for _ in range(number)]

    @torch.inference_mode()
    def passes() -> None:
        for x in batches:
            model(x)
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    def gather() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few images: enough for the time, not for the statistics
            tdlib.statistics(model, batches)

    row = Row(
        TOPIC,
        f"exact statistics, resnet18 at {side}x{side}, {number} x {batch} images",
        "statistics",
        "forward pass",
        target=3.0,
        at_most=True,
        note=f"ratio: time of the statistics / time of the forward passes; {source}",
    )
    measure(row, gather, passes, pairs=3 if quick else 5, seconds=20 if quick else 240, device=device)
    row.extra = {"images_per_second": 1e3 * number * batch / row.b_ms}  # of the forward pass
    yield invert(row)


def busy_machine() -> Row:
    """The default method on a small network while one other process per core computes, against the same on
    the machine as it is."""
    torch.manual_seed(0)
    data = tdlib.data.load("digits", limit=1200)
    model = tdlib.models.build("cnn", 10, input_shape=(1, 8, 8), width=8)
    cores = os.cpu_count() or 1
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]

    def tell(what: signal.Signals) -> None:
        for process in others:
            process.send_signal(what)

    def alone() -> None:
        tdlib.compress(model, "sequential", data, ratio=2, progress=False)

    def beside() -> None:
        tell(signal.SIGCONT)
        try:
            alone()
        finally:
            tell(signal.SIGSTOP)

    row = Row(
        TOPIC,
        f"default method on a small network beside {cores} busy processes on {cores} cores",
        "beside them",
        "alone",
        target=3.0,
        at_most=True,
        note="ratio: time beside the busy processes / time alone",
    )
    try:
        tell(signal.SIGSTOP)
        measure(row, beside, alone, pairs=7, seconds=60)
    finally:
        for process in others:
            process.kill()
            process.wait()
    return invert(row)
