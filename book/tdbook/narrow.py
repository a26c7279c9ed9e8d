"""A baseline that decomposes nothing: the same family of networks, narrower, trained from scratch."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from torch import nn

import tdlib
from tdbook.experiment import Arm, Tables
from tdlib.data import Bundle
from tdlib.methods.direct import scratch
from tdlib.models import structural
from tdlib.planning import Plan


def width_at(model: str, data: Bundle, ratio: float, by: str = "params") -> int | None:
    """The width of `tdlib.models.build(model, ...)` whose cost (by: params or macs) comes nearest to that of
    the usual width divided by `ratio`; None for families without a width."""
    if "width" not in structural(model):
        return None
    target = _cost(model, data, by) / ratio
    costs = {1: _cost(model, data, by, width=1)}
    while costs[len(costs)] < target:
        costs[len(costs) + 1] = _cost(model, data, by, width=len(costs) + 1)
    return min(costs, key=lambda width: abs(math.log(costs[width] / target)))


def arm(model: str, width: int, **training: Any) -> Arm:
    """The network of this width, trained from scratch by `train.fit` with these arguments."""
    start = partial(_untrained, name=model, width=width)
    return Arm(partial(scratch, **training), _nothing, start, trains=True, scratch=True)


def _cost(model: str, data: Bundle, by: str, **width: Any) -> int:
    network = tdlib.models.build(model, data.classes, input_shape=data.input_shape, **width)
    return tdlib.count(network, data.input_shape).by(by)


def _untrained(model: nn.Module, data: Bundle, *, name: str, width: int) -> tuple[nn.Module, Tables]:
    return tdlib.models.build(name, data.classes, input_shape=data.input_shape, width=width), {}


def _nothing(network: nn.Module, ratio: float, seed: int) -> Plan:
    """A plan that leaves every layer dense."""
    return Plan({}, {}, "", "", "params", 0, 0, 0)
