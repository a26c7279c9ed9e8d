"""What a network knows of itself: how its dense form is built, what was replaced, what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass
class Provenance:
    """Where a network comes from.

    spec: {"name", "classes", "kwargs"} of `tdlib.models.build`; None for a network built elsewhere. layers:
    replaced layer -> its LayerPlan. plan: of the plan that replaced them, as `Plan.to_dict` gives it. report:
    what a method measured on its way.
    """

    spec: dict[str, Any] | None = None
    layers: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] | None = None
    report: dict[str, Any] = field(default_factory=dict)


def provenance(model: nn.Module) -> Provenance:
    """The network's own, or an empty one."""
    found = model.__dict__.get("_tdlib")
    return Provenance() if found is None else found


def attach(model: nn.Module, about: Provenance) -> None:
    """Make `about` the network's own; copies of the network take it along."""
    model.__dict__["_tdlib"] = about


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
