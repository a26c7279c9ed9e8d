"""Loss and accuracy of a model, and how far two models agree."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tdlib.calibration.passes import placed, threads_for
from tdlib.data import Bundle
from tdlib.errors import DataError, TdlibError
from tdlib.network import evaluating


def evaluate(
    model: nn.Module,
    data: Bundle,
    split: str = "test",
    batch_size: int = 256,
    device: str | torch.device | None = None,
) -> dict[str, float]:
    """``{"loss", "accuracy", "n"}`` over a whole split; accuracy in percent.

    device: default where the model is, else the model is moved there. Its training mode is left as it was.
    Raises DataError for an empty split and for images without labels.
    """
    data.require_labels("accuracy")
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
    compressed's class probabilities from dense's; ``n``. device: as in ``evaluate``, for both networks.
    """
    where = _place(dense, device)
    _place(compressed, where)
    same, divergence, n = 0.0, 0.0, 0
    with inference(dense), inference(compressed):
        for x, _ in data.batches(split, batch_size, device=where):
            p, q = (class_scores(net(placed(net, x)), data).log_softmax(1) for net in (dense, compressed))
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
    threads = threads_for(model, batch_size * math.prod(data.input_shape))
    with threads, inference(model), amp or contextlib.nullcontext():
        for x, y in data.batches(
            split, batch_size, device=device, rank=rank, world=world, shuffle=False, drop_last=False
        ):
            if len(y):
                scores = class_scores(model(placed(model, x)), data)
                add(totals, F.cross_entropy(scores, y, reduction="sum"), scores, y)
    return totals


def class_scores(outputs: Any, data: Bundle) -> Tensor:
    """A network's outputs (N, classes) in float32.

    Raises TdlibError where they are no such tensor, or have fewer columns than the data have classes.
    """
    if not isinstance(outputs, Tensor) or outputs.dim() != 2:
        found = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise TdlibError(
            f"a classifier's output is one tensor (images, classes), this network gives {found}; where these "
            "are auxiliary outputs, build it without them (aux_logits=False)"
        )
    if outputs.shape[1] < len(data.classes):
        raise TdlibError(
            f"the network has {outputs.shape[1]} outputs, {data.name} has {len(data.classes)} classes: build "
            "it with as many"
        )
    return outputs.float()


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
    """Evaluation mode without gradients; kernels that are composed of factors are composed once."""
    with evaluating(model), torch.no_grad(), parametrize.cached():
        yield


def _place(model: nn.Module, device: str | torch.device | None) -> torch.device:
    if device is None:
        return next(model.parameters(), torch.zeros(0)).device
    model.to(device)
    return torch.device(device)
