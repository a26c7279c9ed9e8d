"""Where a network comes from, attached to the network itself, so that it can be saved and built again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass
class Provenance:
    """Where a network comes from: how to build the dense one, and which layers were replaced.

    spec: {"name", "classes", "kwargs"} of `tdlib.models.build`; None for a network built elsewhere. layers:
    name of the layer -> `tdlib.formats.LayerPlan`. plan: the one that replaced them, as `Plan.to_dict` gives
    it. report: what a method measured on its way.
    """

    spec: dict[str, Any] | None = None
    layers: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] | None = None
    report: dict[str, Any] = field(default_factory=dict)


def provenance(model: nn.Module) -> Provenance:
    """The provenance attached to `model`; where there is none, a new empty one is attached."""
    return vars(model).setdefault("_tdlib", Provenance())
