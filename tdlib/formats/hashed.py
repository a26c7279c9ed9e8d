"""Kernels of d numbers, each of which stands for random entries with random signs: a random linear subspace.

No tensor structure at all: the baseline for formats that claim one. The option `seed` is of the draw (default
0), as of the shuffled formats. These layers save parameters, not MACs. Source: see `decompositions.hashed`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tdlib.decompositions.hashed import hashed
from tdlib.formats.base import KINDS, Format, Shape, register
from tdlib.formats.shuffled import Shuffled


class Hashed(Shuffled):
    """The kernel's entries, permuted, as one vector."""

    def __init__(self, name: str, shape: Sequence[int], options: Mapping[str, Any]) -> None:
        self.decomposition = hashed(math.prod(shape))
        super().__init__(name, shape, options)

    def resolve(self, options: dict[str, Any]) -> dict[str, Any]:
        return {"seed": super().resolve(options)["seed"]}

    @property
    def seed(self) -> int | None:
        """Seed of the permutation."""
        return int(self.options["seed"])

    def layout(self) -> Shape:
        return (math.prod(self.shape),)


register(
    Format(
        "hashed",
        "every parameter stands for random entries with random signs: fewer parameters, not MACs",
        kinds=dict.fromkeys(KINDS, Hashed),
        options=("seed",),
    )
)
