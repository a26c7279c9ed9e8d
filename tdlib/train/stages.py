"""Training in stages: which epoch is kept (chosen on validation, never on test), how good its weights are,
and what is left of the time for the next stage.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdlib.calibration import recalibrate_batchnorm
from tdlib.data import Bundle
from tdlib.errors import TdlibError
from tdlib.train.evaluation import evaluate
from tdlib.train.hooks import Context, Hook
from tdlib.train.loop import fit
from tdlib.train.run import History


class KeepBest(Hook):
    """Remembers the weights of the epoch with the highest validation accuracy (the later of equals)."""

    def __init__(self) -> None:
        self.epoch, self.accuracy = -1, float("-inf")
        self.weights: dict[str, Tensor] = {}

    def identity(self) -> str:
        """The class: what is remembered is no setting."""
        return type(self).__qualname__

    def after_epoch(self, ctx: Context) -> None:
        """Take this epoch's weights if none were better."""
        accuracy = ctx.row.get("val_accuracy")
        if accuracy is not None and accuracy >= self.accuracy:
            self.epoch, self.accuracy = ctx.epoch, float(accuracy)
            self.weights = {name: value.detach().clone() for name, value in ctx.model.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        """Epoch, accuracy and weights."""
        return {"epoch": self.epoch, "accuracy": self.accuracy, "weights": dict(self.weights)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        self.epoch, self.accuracy, self.weights = state["epoch"], state["accuracy"], dict(state["weights"])

    def restore(self, model: nn.Module) -> None:
        """Put the remembered weights into ``model``; without a validation split there are none to put."""
        if self.weights:
            model.load_state_dict(self.weights)


class EarlyStopping(KeepBest):
    """``KeepBest`` that ends training when the validation accuracy has not risen for ``patience`` epochs."""

    def __init__(self, patience: int) -> None:
        super().__init__()
        self.patience, self.stale = patience, 0

    def identity(self) -> str:
        """The class and its patience."""
        return f"{super().identity()}(patience={self.patience})"

    def after_epoch(self, ctx: Context) -> None:
        """Count the epochs without a rise; without a validation split there are none."""
        risen = ctx.row.get("val_accuracy", float("inf")) > self.accuracy
        super().after_epoch(ctx)
        self.stale = 0 if risen else self.stale + 1
        ctx.stop = ctx.stop or self.stale >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """As ``KeepBest``, with the epochs since the last rise."""
        return {**super().state_dict(), "stale": self.stale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        super().load_state_dict(state)
        self.stale = int(state["stale"])


def rehearse(model: nn.Module, data: Bundle, **training: Any) -> None:
    """One step of ``fit`` on a copy: raises now what it would raise once the work before it is done."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return  # several processes stop at the end of an epoch only
    once: dict[str, Any] = {"max_minutes": 1e-9, "checkpoint": None, "progress": False, "validate": False}
    fit(copy.deepcopy(model), data, **{**training, **once})


def fit_selected(
    model: nn.Module, data: Bundle, *, hooks: Sequence[Hook] = (), **training: Any
) -> tuple[History, dict[str, Any]]:
    """``fit``, then the weights of the epoch that was best on the validation split.

    Returns the history and {"last": accuracies of the last epoch, "selected": of the chosen, "epoch": which}.
    Raises TdlibError where ``max_minutes`` stopped the run, and what ``fit`` raises.
    """
    keep = KeepBest()
    history = fit(model, data, hooks=(*hooks, keep), **training)
    require_finished(history)
    last = accuracies(model, data, training.get("device"))
    keep.restore(model)
    selected = accuracies(model, data, training.get("device"))
    return history, {"last": last, "selected": selected, "epoch": keep.epoch}


def accuracies(model: nn.Module, data: Bundle, device: str | torch.device | None = None) -> dict[str, float]:
    """{"val", "test"}: accuracy in percent on the splits that are not empty. device: as in ``evaluate``."""
    splits = [split for split in ("val", "test") if len(data.split(split))]
    return {split: evaluate(model, data, split, device=device)["accuracy"] for split in splits}


def reestimate_batchnorm(
    model: nn.Module,
    data: Bundle,
    device: str | torch.device | None = None,
    images: int = 2000,
    seed: int = 0,
) -> None:
    """Take the statistics of BatchNorm anew, in place, from (at most) `images` training images, drawn by
    `seed`; without BatchNorm nothing is done. The model is moved to the device, if one is given.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if any(norm.track_running_stats for norm in norms):
        place = device if device is not None else next(model.parameters()).device
        size = min(256, images, len(data.train))
        batches = data.batches("train", size, device=place, seed=seed)
        recalibrate_batchnorm(model.to(place), (x for x, _ in islice(batches, images // size)))


def recalibrated(
    model: nn.Module,
    data: Bundle,
    device: str | torch.device | None = None,
    images: int = 2000,
    seed: int = 0,
) -> nn.Module:
    """A copy after `reestimate_batchnorm`.

    Right after a decomposition the old statistics alone can hold a network at chance; with fresh ones its
    accuracy says what the weights still know.
    """
    fresh = copy.deepcopy(model)
    reestimate_batchnorm(fresh, data, device, images, seed)
    return fresh


def stage(training: Mapping[str, Any], name: str, started: float) -> dict[str, Any]:
    """The options for one stage of several: its own checkpoint folder ``name``, and what is left of
    ``max_minutes`` since ``started`` (of ``time.perf_counter()``).
    """
    options = dict(training)
    if options.get("checkpoint") is not None:
        options["checkpoint"] = Path(options["checkpoint"]) / name
    if options.get("max_minutes") is not None:
        options["max_minutes"] = max(0.01, options["max_minutes"] - (time.perf_counter() - started) / 60)
    return options


def require_finished(history: History) -> None:
    """Raises TdlibError where the time limit came before the end of this stage."""
    if not history.finished:
        raise TdlibError(
            f"the time limit came after {len(history.rows)} epochs of this stage; "
            "start the same run again with the same checkpoint directory to continue"
        )
