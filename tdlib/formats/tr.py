"""Tensor ring over (O, K, I), channels optionally factorised; always so for layers without spatial extent.

Ranks start with the closing one, r_0. Source: Zhao et al. 2016 (arXiv 1606.05535).
"""

from __future__ import annotations

from typing import Any

from tdlib.decompositions.tr import TR
from tdlib.formats.base import Format, kind_of, register
from tdlib.formats.tt import Cores


class Ring(Cores):
    """Ring cores over (*out_modes, K, *in_modes)."""

    decomposition = TR

    def resolve(self, options: dict[str, Any]) -> dict[str, Any]:
        if not options and kind_of(self.shape) == "conv":  # whole channels
            return {}
        return super().resolve(options)


register(
    Format(
        "tr",
        "tensor ring over (O, K, I), channels optionally factorised",
        kinds={"conv": Ring, "pointwise": Ring, "linear": Ring},
        options=("out_modes", "in_modes", "order"),
    )
)
