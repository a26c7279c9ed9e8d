"""What a network knows of itself: how its dense form is built, what was replaced, what was measured."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass
class Provenance:
    """Where a network comes from.

    spec: {"name", "classes", "kwargs"} of `tdlib.models.build`; None for a network built elsewhere. layers:
    replaced layer -> its LayerPlan. plan: of the plan that replaced them, as `Plan.to_dict` gives it. report:
    what a method measured on its way. inputs: of the data that it was trained on, as `Bundle.description`
    gives them (class names, mean and std, shape of one input, interpolation).
    """

    spec: dict[str, Any] | None = None
    layers: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] | None = None
    report: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] | None = None


def provenance(model: nn.Module) -> Provenance:
    """The network's own, or an empty one."""
    found = model.__dict__.get("_tdlib")
    return Provenance() if found is None else found


def attach(model: nn.Module, about: Provenance) -> None:
    """Make `about` the network's own; copies of the network take it along."""
    model.__dict__["_tdlib"] = about


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and values of all parameters and buffers: equal weights, equal
    fingerprint, on whichever device."""
    sha = hashlib.sha256()
    for name, value in model.state_dict().items():
        sha.update(repr((name, tuple(value.shape), str(value.dtype))).encode())
        sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
