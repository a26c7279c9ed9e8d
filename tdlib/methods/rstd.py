"""RsTD: low-rank kernels after a random shuffling of their entries, trained from scratch or projected.

Source: Li, Sun, Yu, Hou, Zhao, "Low-rank Embedding of Kernels in Convolutional Neural Networks under Random
Shuffling", ICASSP 2019 (arXiv 1810.13098). The kernel of every listed layer is

W = unshuffle_pi( compose(cores) ),      cores of a TT, TR, CP or Tucker format of d near-equal modes,
(1)

with a permutation pi of its entries that is drawn once from a seed and never trained (`tensor.shuffled`). Two
uses:

    from scratch   minimise the loss over the cores; W is composed in every forward pass                  (2)
    post hoc       cores = decompose( shuffle_pi(W) ) of a trained kernel W, then (optionally) fine-tune  (3)

Without shuffling, (1) is the ordinary decomposition: of the same d modes, or of the kernel as it is
(modes="kernel"). Ratios count parameters. The convolution itself runs with the dense kernel, so MACs are not
saved.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..errors import BudgetError, unknown
from ..planning import Plan
from ..tensor.shuffled import FOLDS, ORDER
from .direct import (
    accuracies,
    finish,
    fit_selected,
    from_scratch,
    make_plan,
    stage,
    training_options,
)


def seed_of(seed: int, layer: str) -> int:
    """The seed of one layer's permutation, so that layers of equal shape are shuffled differently."""
    return zlib.crc32(f"{seed}/{layer}".encode())


def shuffled_plan(
    model: nn.Module,
    data: Any,
    format: str,
    ratio: float,
    *,
    seed: int = 0,
    shuffle: bool = True,
    order: int | None = None,
    modes: Any = None,
    skip: Sequence[str] | None = None,
    rule: str = "uniform",
) -> Plan:
    """The plan of (1) at a parameter ratio. format: "tt", "tr", "cp" or "tucker"; other arguments as in
    `compress`.
    """
    name = format.removeprefix("shuffled-")
    if name not in FOLDS:
        raise unknown("format of shuffled kernels", format, FOLDS)
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    options = {"seed": {n: seed_of(seed, n) for n in layers}, "shuffle": shuffle, "modes": modes}
    options |= {"order": (order or ORDER) if modes is None else None}
    return make_plan(model, data, f"shuffled-{name}", ratio, "params", skip=skip, rule=rule, options=options)


def compress(
    model: nn.Module,
    data: Any,
    *,
    ratio: float,
    by: str = "params",
    seed: int = 0,
    format: str = "tt",
    shuffle: bool = True,
    order: int | None = None,
    modes: Any = None,
    skip: Sequence[str] | None = None,
    rule: str = "uniform",
    post_hoc: bool = False,
    epochs: int = 30,
    lr: float = 0.05,
    progress: bool = True,
    **training: Any,
) -> nn.Module:
    """Train the cores from scratch (2), or with `post_hoc` project the trained kernels of `model` (3) and
    fine-tune.

    `model` is not changed; from scratch only its architecture is used. epochs, lr: of the training, post hoc
    of the fine-tuning (0 epochs: none). shuffle False: the unshuffled counterpart. order: number of
    near-equal modes (4), or modes: "kernel" for (O, I, kh, kw). skip None leaves the first convolution and
    the classifier dense. Other keyword arguments go to `train.fit`. Measurements: `result._tdlib["report"]`.

    Raises: BudgetError for by="macs", for these layers save parameters only.
    """
    if by != "params":
        raise BudgetError(
            "shuffled kernels save parameters, not MACs (the best reachable ratio in macs is below 1): "
            'use by="params"'
        )
    training = training_options(training, seed=seed, progress=progress)
    device, started = training.get("device"), time.perf_counter()
    plan = shuffled_plan(
        model, data, format, ratio, seed=seed, shuffle=shuffle, order=order, modes=modes, skip=skip, rule=rule
    )
    report: dict[str, Any] = {"method": "rstd", "format": format, "shuffled": shuffle, "history": {}}
    if post_hoc:
        report["dense"] = accuracies(model, data, device)
        options = stage(training, "finetune", started)
        return finish(model, data, plan, report, epochs=epochs, lr=lr, training=options)
    small = from_scratch(model, plan, seed)
    history, found = fit_selected(small, data, epochs=epochs, lr=lr, **stage(training, "cores", started))
    report["history"]["cores"] = history.rows
    report |= {"after": found["selected"], "last": found["last"], "seconds": time.perf_counter() - started}
    report |= {"params_ratio": plan.params_ratio, "macs_ratio": plan.macs_ratio, "plan": plan.to_dict()}
    small._tdlib["report"] = report  # type: ignore[index, operator, assignment]
    return small


def ratio_grid(
    model: nn.Module,
    data: Any,
    format: str,
    variants: Iterable[Mapping[str, Any]] = ({},),
    *,
    low: float = 2.0,
    high: float = 16.0,
    count: int = 5,
) -> list[float]:
    """`count` ratios from `low` to at most `high` in equal factors that every variant (options of
    `shuffled_plan`) reaches.
    """
    variants = list(variants)
    while high > 1.05:
        first = min(low, 1 + (high - 1) / 4)
        grid = [round(first * (high / first) ** (k / (count - 1)), 2) for k in range(count)]
        try:
            for ratio in grid:
                for options in variants:
                    shuffled_plan(model, data, format, ratio, **options)
            return grid
        except BudgetError:
            high *= 0.8
    raise BudgetError(f"no ratio above 1.05 can be reached with format {format!r}: skip fewer layers")
