"""The harm itself: how far a network's outputs are from the dense network's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdlib.calibration.passes import inputs, placed, threads_for
from tdlib.network import evaluating


@torch.no_grad()
def logits(model: nn.Module, batches: Iterable[Any]) -> Tensor:
    """Outputs of the model in eval mode, (inputs, classes), float32 on the CPU."""
    found = []
    with evaluating(model):
        for x in inputs(batches):
            with threads_for(model, x.numel()):
                found.append(model(placed(model, x)).float().cpu())
    return torch.cat(found)


def divergence(reference: Tensor, other: Tensor, temperature: float = 1.0) -> float:
    """Mean KL divergence of softmax(other) from softmax(reference), natural logarithm; both (inputs,
    classes).
    """
    p, q = F.log_softmax(reference / temperature, -1), F.log_softmax(other / temperature, -1)
    return float((p.exp() * (p - q)).sum(-1).mean())
