"""Calibration inputs: the first few of whatever data there is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from tdlib.calibration.passes import inputs_of
from tdlib.errors import DataError


def calibration_batches(
    data: Any, samples: int = 1000, batch_size: int = 100, seed: int = 0, device: str | torch.device = "cpu"
) -> list[Tensor]:
    """At most `samples` inputs as batches on `device`, without labels.

    data: a Bundle, for random training images (drawn from `seed`) without augmentation in batches of
    `batch_size`; or any iterable of inputs or (inputs, labels) batches, for the first of them.
    Raises: DataError if there are none.
    """
    source = data
    if hasattr(data, "batches"):
        size = min(batch_size, len(data.train), samples)
        source = data.batches("train", size, device=device, seed=seed, shuffle=True, drop_last=False)
    inputs = (inputs_of(batch).to(device) for batch in source)
    kept = [x for x in limited(inputs, samples) if len(x)]
    if not kept:
        raise DataError(
            "no calibration inputs: give a Bundle with training images, or an iterable of batches"
        )
    return kept


def limited(batches: Iterable[Tensor], samples: int) -> Iterator[Tensor]:
    """The first `samples` inputs of the batches; no batch beyond them is asked for."""
    for x in batches:
        yield x[:samples]
        samples -= len(x)
        if samples <= 0:
            return
