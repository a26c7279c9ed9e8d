"""Cost of the data-aware part: gathering the statistics of ResNet-18 against its forward passes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch

import tdlib
from benchmarks.kernels import resnet
from benchmarks.timing import Row, invert, measure

TOPIC = "calibration"


def rows(quick: bool, device: str) -> Iterator[Row]:
    """Exact statistics of every convolution and linear layer, over several batches."""
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
