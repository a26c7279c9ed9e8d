"""The two baselines that every method has to beat.

- direct: decompose a trained network once (TT-SVD, HOSVD, ...); fine-tuning is up to the caller;
- scratch: the compressed architecture with random factors, trained from the start.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from tdlib.formats import decompose, skeleton
from tdlib.models import build
from tdlib.network import provenance
from tdlib.planning import Plan
from tdlib.train import fit_selected

Tables = dict[str, list[dict[str, Any]]]


def direct(model: nn.Module, data: Any, plan: Plan, *, progress: bool = False) -> tuple[nn.Module, Tables]:
    """Every planned layer decomposed as it is. `model` is not changed, `data` not looked at."""
    return decompose(model, plan, progress=progress), {}


def scratch(
    model: nn.Module,
    data: Any,
    plan: Plan,
    *,
    epochs: int = 30,
    lr: float = 0.05,
    seed: int = 0,
    **training: Any,
) -> tuple[nn.Module, Tables]:
    """The compressed architecture of `plan` trained from random factors; no weight of `model` is kept.

    The epoch that is best on the validation split is kept. Other arguments go to `train.fit`. Tables:
    "scratch", a row per epoch.
    """
    small = untrained(model, plan, seed)
    history, _ = fit_selected(small, data, epochs=epochs, lr=lr, seed=seed, **training)
    return small, {"scratch": history.rows}


def untrained(model: nn.Module, plan: Plan, seed: int = 0) -> nn.Module:
    """The compressed architecture of `plan`, all weights drawn anew from `seed`, none kept of `model`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return skeleton(_reset(model), plan)


def _reset(model: nn.Module) -> nn.Module:
    """The network as its builder starts it; one built elsewhere is copied and its layers reset."""
    place = next(model.parameters())
    about = provenance(model)
    if about.spec:
        fresh = build(about.spec["name"], about.spec["classes"], **about.spec["kwargs"])
        return fresh.to(place.device, place.dtype).train(model.training)
    blank = copy.deepcopy(model)
    for module in blank.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    return blank
