"""What the chapter on iterative decomposition needs beside the method: its opponent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

import tdlib
from tdlib.planning import Plan
from tdlib.train import reestimate_batchnorm

Tables = dict[str, list[dict[str, Any]]]


def at_once(
    model: nn.Module,
    data: Any,
    plan: Plan,
    *,
    seed: int = 0,
    device: Any = None,
    on_decomposed: Callable[[nn.Module], None] = lambda network: None,
) -> tuple[nn.Module, Tables]:
    """One decomposition, BatchNorm re-estimated as `iterative` does it: ready for fine-tuning.

    on_decomposed: called with the network before BatchNorm is touched.
    """
    small = tdlib.decompose(model, plan, progress=False)
    on_decomposed(small)
    reestimate_batchnorm(small, data, device, seed=seed)
    return small, {}
