"""The two baselines that every method has to beat, and the end that all methods share.

- direct: decompose a trained network once (TT-SVD, HOSVD, ...), then fine-tune;
- scratch: build the compressed architecture with random factors and train it from the start.

`decompose_and_finetune` is the common end: decompose, measure before any training, fine-tune, measure again.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import TdlibError, unknown
from ..layers.replace import decompose, skeleton
from ..models import build
from ..planning import Plan, plan
from ..train import Context, History, Hook, evaluate, fit


def end_layers(model: nn.Module) -> tuple[str, ...]:
    """The layers that the papers leave dense: the first convolution (it sees the image), the classifier."""
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return tuple(convolutions[:1] + linears[-1:])


def make_plan(
    model: nn.Module,
    data: Any,
    format: str,
    ratio: float | None,
    by: str,
    *,
    skip: Sequence[str] | None = None,
    rule: str = "uniform",
    ranks: Mapping[str, Sequence[int]] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Plan:
    """`tdlib.plan` with the papers' choice of dense layers (`end_layers`) where skip is None."""
    skip = end_layers(model) if skip is None else tuple(skip)
    return plan(
        model, tuple(data.input_shape), format=format, ratio=ratio, by=by, skip=skip, rule=rule, ranks=ranks,
        **dict(options or {}),
    )  # fmt: skip


def training_options(given: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    """Check that every name in `given` is an argument of `train.fit`; defaults fill what is not given.

    Raises: UnknownName listing the valid names.
    """
    valid = list(inspect.signature(fit).parameters)[2:]
    for name in given:
        if name not in valid:
            raise unknown("training option", name, valid)
    return {**defaults, **given}


def stage(training: Mapping[str, Any], name: str, started: float) -> dict[str, Any]:
    """Options of one stage of several: its own checkpoint folder, and what is left of `max_minutes`."""
    options = dict(training)
    if options.get("checkpoint") is not None:
        options["checkpoint"] = Path(options["checkpoint"]) / name
    if options.get("max_minutes") is not None:
        options["max_minutes"] = max(0.01, options["max_minutes"] - (time.perf_counter() - started) / 60)
    return options


def accuracies(model: nn.Module, data: Any, device: str | None = None) -> dict[str, float]:
    """Accuracy in percent on the validation split, where there is one, and on the test split."""
    splits = [split for split in ("val", "test") if len(getattr(data, split))]
    return {split: evaluate(model, data, split, device=device)["accuracy"] for split in splits}


def decompose_and_finetune(
    dense: nn.Module,
    data: Any,
    plan: Plan,
    *,
    epochs: int,
    lr: float = 0.01,
    **training: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """Decompose `dense` (untouched) by `plan`, measure, fine-tune for `epochs`, measure.

    Returns the compressed model and {"before": {val, test}, "after": {val, test}, "last": {val, test},
    "history": rows, "seconds": ...}; after is the epoch selected on validation, whose weights the model has,
    last the last one. BatchNorm statistics are left as they were before fine-tuning.
    """
    started = time.perf_counter()
    small = decompose(dense, plan)
    device = training.get("device")
    result: dict[str, Any] = {"decomposition_seconds": time.perf_counter() - started}
    result["before"] = result["after"] = result["last"] = accuracies(small, data, device)
    result["history"] = []
    if epochs:
        history, found = fit_selected(small, data, epochs=epochs, lr=lr, **training)
        result |= {"history": history.rows, "after": found["selected"], "last": found["last"]}
    result["seconds"] = time.perf_counter() - started
    return small, result


class KeepBest(Hook):
    """Remembers the weights of the epoch with the highest validation accuracy (the later of equals)."""

    def __init__(self) -> None:
        self.epoch, self.accuracy = -1, float("-inf")
        self.weights: dict[str, Tensor] = {}

    def after_epoch(self, ctx: Context) -> None:
        accuracy = ctx.row.get("val_accuracy")
        if accuracy is not None and accuracy >= self.accuracy:
            self.epoch, self.accuracy = ctx.epoch, float(accuracy)
            self.weights = {name: value.detach().clone() for name, value in ctx.model.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "accuracy": self.accuracy, "weights": dict(self.weights)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.accuracy, self.weights = state["epoch"], state["accuracy"], dict(state["weights"])

    def restore(self, model: nn.Module) -> None:
        """Put the remembered weights into `model`; without a validation split there are none to put."""
        if self.weights:
            model.load_state_dict(self.weights)


def fit_selected(
    model: nn.Module, data: Any, *, hooks: Sequence[Hook] = (), **training: Any
) -> tuple[History, dict[str, Any]]:
    """`train.fit`, then the weights of the epoch that was best on the validation split, not on test.

    Returns the history and {"last": accuracies of the last epoch, "selected": of the chosen, "epoch": which}.
    """
    keep = KeepBest()
    history = fit(model, data, hooks=(*hooks, keep), **training)
    require_finished(history)
    last = accuracies(model, data, training.get("device"))
    keep.restore(model)
    selected = accuracies(model, data, training.get("device"))
    return history, {"last": last, "selected": selected, "epoch": keep.epoch}


def from_scratch(model: nn.Module, plan: Plan, seed: int = 0) -> nn.Module:
    """The compressed architecture of `plan`, all weights drawn anew from `seed`, none kept of `model`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return skeleton(_untrained(model), plan)


def _untrained(model: nn.Module) -> nn.Module:
    """The network as its builder starts it; one built elsewhere is copied and its layers reset."""
    spec = (getattr(model, "_tdlib", None) or {}).get("spec")
    if spec:
        return build(spec["name"], spec["classes"], **spec["kwargs"])
    blank = copy.deepcopy(model)
    for module in blank.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    return blank


def require_finished(history: History) -> None:
    """Stop a chain of stages whose time limit came before the end of this one."""
    if not history.finished:
        raise TdlibError(
            f"the time limit came after {len(history.rows)} epochs of this stage; "
            "start the same run again with the same checkpoint directory to continue"
        )


def compress(
    model: nn.Module,
    data: Any,
    *,
    ratio: float,
    by: str = "params",
    seed: int = 0,
    format: str = "tt",
    skip: Sequence[str] | None = None,
    rule: str = "uniform",
    ranks: Mapping[str, Sequence[int]] | None = None,
    options: Mapping[str, Any] | None = None,
    finetune_epochs: int = 0,
    finetune_lr: float = 0.01,
    progress: bool = True,
    **training: Any,
) -> nn.Module:
    """Decompose once, then fine-tune for `finetune_epochs` (0: no training at all).

    `model` is not changed. Other keyword arguments go to `train.fit`. Measurements:
    `result._tdlib["report"]`.
    """
    training = training_options(training, seed=seed, progress=progress)
    training = stage(training, "finetune", time.perf_counter())
    table = make_plan(model, data, format, ratio, by, skip=skip, rule=rule, ranks=ranks, options=options)
    report = {"method": "direct", "history": {}, "dense": accuracies(model, data, training.get("device"))}
    return finish(model, data, table, report, epochs=finetune_epochs, lr=finetune_lr, training=training)


def finish(
    dense: nn.Module,
    data: Any,
    plan: Plan,
    report: dict[str, Any],
    *,
    epochs: int,
    lr: float,
    training: Mapping[str, Any],
) -> nn.Module:
    """`decompose_and_finetune`, with what it measured and the ratios stored as the model's report."""
    small, result = decompose_and_finetune(dense, data, plan, epochs=epochs, lr=lr, **training)
    report["history"]["finetune"] = result.pop("history")
    report |= result | {"params_ratio": plan.params_ratio, "macs_ratio": plan.macs_ratio}
    report["plan"] = plan.to_dict()
    cast(dict[str, Any], small._tdlib)["report"] = report
    return small
