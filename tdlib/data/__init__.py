"""Data sets by name: ``load(name)`` gives a Bundle with train, validation and test splits."""

from tdlib.data.augment import Augment
from tdlib.data.bundle import Batches, Bundle
from tdlib.data.loading import available, load
from tdlib.data.sources import IMAGENET_MEAN, IMAGENET_STD
from tdlib.data.splits import ArraySplit, FileSplit

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "ArraySplit",
    "Augment",
    "Batches",
    "Bundle",
    "FileSplit",
    "available",
    "load",
]
