"""Loss and accuracy of a model, and how far two models agree."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Bundle
from ..errors import DataError


def evaluate(
    model: nn.Module,
    data: Bundle,
    split: str = "test",
    batch_size: int = 256,
    device: str | torch.device | None = None,
) -> dict[str, float]:
    """``{"loss", "accuracy", "n"}`` over a whole split; accuracy in percent. Default device: where the model
    is.

    The model's training mode is left as it was. Raises DataError for an empty split.
    """
    where = _place(model, device)
    if not len(data.split(split)):
        raise DataError(f"split {split!r} of {data.name} is empty")
    totals = sums(model, data, split, batch_size, where).tolist()
    return metrics(totals)


def agreement(
    dense: nn.Module,
    compressed: nn.Module,
    data: Bundle,
    split: str = "test",
    batch_size: int = 256,
    device: str | torch.device | None = None,
) -> dict[str, float]:
    """How far ``compressed`` answers like ``dense``.

    ``agreement``: percent of inputs with the same top-1 class; ``kl``: mean KL divergence in nats of
    compressed's class probabilities from dense's; ``n``.
    """
    where = _place(dense, device)
    _place(compressed, where)
    same, divergence, n = 0.0, 0.0, 0
    with inference(dense), inference(compressed):
        for x, _ in data.batches(split, batch_size, device=where):
            p, q = dense(x).float().log_softmax(1), compressed(x).float().log_softmax(1)
            same += float((p.argmax(1) == q.argmax(1)).sum())
            divergence += float(F.kl_div(q, p, reduction="sum", log_target=True))
            n += len(x)
    if not n:
        raise DataError(f"split {split!r} of {data.name} is empty")
    return {"agreement": 100 * same / n, "kl": divergence / n, "n": n}


def sums(
    model: nn.Module,
    data: Bundle,
    split: str,
    batch_size: int,
    device: torch.device,
    *,
    rank: int = 0,
    world: int = 1,
    amp: contextlib.AbstractContextManager[object] | None = None,
) -> Tensor:
    """(3,) on ``device``: summed loss, correct answers, images; of one process's share. No host
    synchronisation.
    """
    totals = new_totals(device)
    with inference(model), amp or contextlib.nullcontext():
        for x, y in data.batches(
            split, batch_size, device=device, rank=rank, world=world, shuffle=False, drop_last=False
        ):
            if len(y):
                scores = model(x).float()
                add(totals, F.cross_entropy(scores, y, reduction="sum"), scores, y)
    return totals


def new_totals(device: torch.device) -> Tensor:
    """Zeros (3,) for ``add``."""
    return torch.zeros(3, device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)


def add(totals: Tensor, loss_sum: Tensor, scores: Tensor, y: Tensor) -> None:
    """Add one batch to (summed loss, correct answers, images)."""
    correct = (scores.detach().argmax(1) == y).sum()
    totals[0] += loss_sum.detach()
    totals[1] += correct
    totals[2] += len(y)


def metrics(totals: list[float]) -> dict[str, float]:
    """``{"loss", "accuracy", "n"}`` from summed totals."""
    loss, correct, n = totals
    return {"loss": loss / max(n, 1), "accuracy": 100 * correct / max(n, 1), "n": int(n)}


@contextlib.contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _place(model: nn.Module, device: str | torch.device | None) -> torch.device:
    parameter = next(model.parameters(), torch.zeros(0))
    if device is None:
        return parameter.device
    model.to(device)
    return torch.device(device)
