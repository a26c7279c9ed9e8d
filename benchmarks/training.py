"""Training: ADMM's extra time per epoch, and the training step against the ordinary loop."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import tdlib
from tdlib.data import ArraySplit, Bundle
from tdlib.methods.admm import ADMM

from .timing import Row, fill

TOPIC = "training"
EPOCH_STEPS = 391  # CIFAR: 50,000 images in batches of 128
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def images(number: int) -> Bundle:
    """Random images in the shape of CIFAR-10."""
    generator = torch.Generator().manual_seed(0)
    splits = []
    for n in (number, 16, 16):
        pixels = torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8, generator=generator)
        splits.append(ArraySplit(pixels, torch.arange(n) % 10, MEAN, STD))
    from tdlib.data import Augment

    return Bundle(
        "random", [str(i) for i in range(10)], MEAN, STD, (3, 32, 32), *splits, augment=Augment(pad=4, flip=True)
    )
