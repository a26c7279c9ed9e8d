"""RsTD: low-rank kernels after a random shuffling of their entries, trained from scratch.

Source: Li, Sun, Yu, Hou, Zhao, "Low-rank Embedding of Kernels in Convolutional Neural Networks under Random
Shuffling", ICASSP 2019 (arXiv 1810.13098). The kernel of every listed layer is

    W = unshuffle_pi( compose(cores) ),   cores of a TT, TR, CP or Tucker format of d near-equal modes,    (1)

with a permutation pi of its entries that is drawn once from a seed and never trained (`formats.shuffled`).
The loss is minimised over the cores; W is composed in every forward pass. Only the abstract was at hand: it
has the shuffling and the low-rank tensor; near-equal modes and training from scratch are unverified. Without
shuffling, (1) is the ordinary decomposition: of the same d modes, or of the kernel as it is (modes="kernel").
Ratios count parameters: the convolution itself runs with the dense kernel, so MACs are not saved.
`tdlib.decompose` with a plan of `shuffled_plan` projects trained kernels on (1) instead.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

from torch import nn

from tdlib.errors import BudgetError, unknown
from tdlib.methods.direct import Tables, scratch
from tdlib.planning import Plan, end_layers, plan

FORMATS = ("tt", "tr", "cp", "tucker")


def rstd(
    model: nn.Module,
    data: Any,
    plan: Plan,
    *,
    epochs: int = 30,
    lr: float = 0.05,
    seed: int = 0,
    **training: Any,
) -> tuple[nn.Module, Tables]:
    """The cores of (1) trained from random ones (of `seed`); no weight of `model` is kept.

    plan: of `shuffled_plan`. The epoch that is best on the validation split is kept. Other arguments go to
    `train.fit`. Tables: "cores", a row per epoch.
    """
    small, tables = scratch(model, data, plan, epochs=epochs, lr=lr, seed=seed, **training)
    return small, {"cores": tables["scratch"]}


def shuffled_plan(
    model: nn.Module,
    data: Any,
    *,
    ratio: float,
    format: str = "tt",
    by: str = "params",
    seed: int = 0,
    skip: Sequence[str] | None = None,
    rule: str = "uniform",
    shuffle: bool = True,
    order: int | None = None,
    modes: Any = None,
) -> Plan:
    """The plan of (1) at a parameter ratio. format: "tt", "tr", "cp" or "tucker".

    seed: of the permutations; every layer has its own. shuffle False: the unshuffled counterpart. order:
    number of near-equal modes (4), or modes: "kernel" for (O, I, kh, kw). skip None leaves the first
    convolution and the classifier dense. Raises: UnknownName; BudgetError where the ratio cannot be reached,
    and for by="macs", for these layers save parameters only.
    """
    if by != "params":
        raise BudgetError(
            "shuffled kernels save parameters, not MACs (the best reachable ratio in macs is below 1): "
            'use by="params"'
        )
    name = format.removeprefix("shuffled-")
    if name not in FORMATS:
        raise unknown("format of shuffled kernels", format, FORMATS)
    return plan(
        model, tuple(data.input_shape), format=f"shuffled-{name}", ratio=ratio, rule=rule,
        skip=end_layers(model) if skip is None else skip,
        seed=layer_seeds(model, seed), shuffle=shuffle, order=order, modes=modes,
    )  # fmt: skip


def layer_seeds(model: nn.Module, seed: int) -> dict[str, int]:
    """Layer name -> the seed of its own permutation."""
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return {layer: zlib.crc32(f"{seed}/{layer}".encode()) for layer in layers}
