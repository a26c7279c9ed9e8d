"""ADMM-TT: train the dense network towards a low tensor rank, then decompose it.

Source: Yin, Sui, Liao, Yuan, "Towards Efficient Tensor Decomposition-Based DNN Model Compression with
Optimization Framework", CVPR 2021 (arXiv 2107.12422). The problem, for the listed layers l with target ranks
r_l,

    min  loss(W)   subject to   rank(W_l) <= r_l,                                                  (1)

is split with a low-rank copy Z and a scaled dual U into three steps, repeated once per epoch:

    Z <- P(W + U)                      project on the set of tensors of rank r_l                   (2)
    U <- U + W - Z                     scaled dual ascent                                          (3)
    W <- SGD on  loss(W) + rho/2 * sum_l ||W_l - Z_l + U_l||^2      one epoch, W stays dense       (4)

P is the format's own decomposition followed by its composition, the function that builds the final layers
too, so the penalty pulls towards exactly the set in which the compressed network lives. Details follow the
authors' code: one projection of Z alone before training (U stays 0); (2) and (3) at the start of every epoch,
before its batches; rho constant; at the end the decomposition is taken of W, not of Z.

How hard one epoch pulls depends on more than rho: with SGD of step size lr and momentum m, the penalty alone
shrinks W - Z + U per epoch by the factor exp(-rho * lr / (1 - m) * steps). `pull` computes that exponent. The
authors' setting (rho 1e-3, lr 0.1, m 0.9, 391 steps) has 0.39; a run of few or short epochs needs a larger
rho for the same pull.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, TdlibError
from ..planning import Plan
from ..train import Context, History, Hook, fit
from .direct import accuracies, finish, make_plan, require_finished, stage, training_options
from .projection import Group, dense_weight, group_layers, project_groups, relative_distance


def pull(rho: float, lr: float, steps: int, momentum: float = 0.9) -> float:
    """Exponent by which the penalty alone contracts W - Z + U in one epoch of `steps` SGD steps."""
    return rho * lr / (1 - momentum) * steps


def rho_for(strength: float, lr: float, steps: int, momentum: float = 0.9) -> float:
    """The rho with which one epoch of `steps` SGD steps has the pull `strength` (inverse of `pull`)."""
    return strength * (1 - momentum) / (lr * steps)


class ADMM(Hook):
    """Training hook that carries out equations (2) to (4).

    rho: penalty weight; 0 makes the hook an observer of plain training (Z = P(W), U = 0, nothing is pulled).
    rho_schedule: ((fraction of epochs, factor), ...), e.g. ((0.85, 5.0),): from that epoch on rho is rho *
    factor, and U is rescaled by old/new, because the scaled dual is the multiplier divided by rho.
    track_distance: also record `distance` = ||W - P(W)|| / ||W|| after each epoch (one more projection).

    Columns added to the history: `gap` = ||W - Z|| / ||W|| over all layers and `gap:LAYER` for each,
    `penalty` (value of the penalty term; the reported loss stays the task's), `rho`, `projection_seconds`.
    """

    def __init__(
        self,
        plan: Plan,
        rho: float = 1e-3,
        rho_schedule: Sequence[tuple[float, float]] = (),
        track_distance: bool = False,
    ) -> None:
        if rho < 0:
            raise TdlibError(f"rho must not be negative, got {rho}")
        self.plan, self.base_rho, self.rho = plan, rho, rho
        self.rho_schedule = tuple(sorted(rho_schedule))
        self.track_distance = track_distance
        self.z: dict[str, Tensor] = {}
        self.u: dict[str, Tensor] = {}
        self.seconds = 0.0
        self.groups: list[Group] = []
        self._weights: dict[str, nn.Parameter] = {}
        self._shift: list[Tensor] = []  # U - Z, so that the gradient of the penalty is rho * (W + shift)
        self._updated = -1  # last epoch whose Z and U are done, so that a resumed epoch does not update twice

    def on_start(self, ctx: Context) -> None:
        modules = dict(ctx.model.named_modules())
        self.groups = group_layers(ctx.model, self.plan)
        self._weights = {name: dense_weight(modules[name]) for name in self.plan}
        if self._updated < 0:
            self.z = project_groups(self._kernels(), self.groups)
            self.u = {name: torch.zeros_like(z) for name, z in self.z.items()}
        self._place()

    def on_epoch_start(self, ctx: Context) -> None:
        self.seconds = 0.0
        if ctx.epoch <= self._updated:
            return
        started = _now(ctx.device)
        self._set_rho(ctx.epoch / max(ctx.epochs, 1))
        self.update()
        self._updated = ctx.epoch
        self.seconds = _now(ctx.device) - started

    def update(self) -> None:
        """Equations (2) and (3), all layers."""
        w = self._kernels()
        self.z = project_groups({name: w[name] + self.u[name] for name in w}, self.groups)
        if self.rho > 0:
            self.u = {name: self.u[name] + w[name] - self.z[name] for name in w}
        self._place()

    def before_step(self, ctx: Context) -> None:
        """Add the penalty's gradient, rho * (W - Z + U), to the task's: the same as differentiating (4)."""
        if self.rho == 0:
            return
        with torch.no_grad():
            weights = list(self._weights.values())
            grads = [w.grad if w.grad is not None else torch.zeros_like(w) for w in weights]
            torch._foreach_add_(grads, [w.detach() for w in weights], alpha=self.rho)
            torch._foreach_add_(grads, self._shift, alpha=self.rho)
            for weight, grad in zip(weights, grads, strict=True):
                weight.grad = grad

    def after_epoch(self, ctx: Context) -> None:
        started = _now(ctx.device)
        w = self._kernels()
        ctx.row["gap"], gaps = relative_distance(w, self.z)
        ctx.row["rho"] = self.rho
        distance = [(w[name] - self.z[name] + self.u[name]).square().sum() for name in w]
        ctx.row["penalty"] = self.rho / 2 * float(torch.stack(distance).sum())
        if self.track_distance:
            ctx.row["distance"] = relative_distance(w, project_groups(w, self.groups))[0]
        ctx.row.update({f"gap:{name}": value for name, value in gaps.items()})
        ctx.row["projection_seconds"] = self.seconds + _now(ctx.device) - started

    def state_dict(self) -> dict[str, Any]:
        state = {"z": dict(self.z), "u": dict(self.u), "rho": self.rho, "updated": self._updated}
        return state | {"settings": self._settings(), "seconds": self.seconds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises CheckpointError for the state of a run with another rho or plan."""
        if state["settings"] != self._settings():
            there = state["settings"]
            raise CheckpointError(f"the checkpoint's ADMM had {there}, this one has {self._settings()}")
        self.z, self.u = dict(state["z"]), dict(state["u"])
        self.rho, self._updated = float(state["rho"]), int(state["updated"])
        self.seconds = float(state["seconds"])
        self._place()

    def _settings(self) -> str:
        layers = {name: (self.plan.formats[name], tuple(self.plan[name])) for name in self.plan}
        return f"rho {self.base_rho}, schedule {self.rho_schedule}, layers {layers}"

    def _kernels(self) -> dict[str, Tensor]:
        return {name: weight.detach().float() for name, weight in self._weights.items()}

    def _place(self) -> None:
        for name, weight in self._weights.items():
            self.z[name] = self.z[name].to(weight.device, torch.float32)
            self.u[name] = self.u[name].to(weight.device, torch.float32)
        self._shift = [(self.u[name] - self.z[name]).to(w.dtype) for name, w in self._weights.items()]

    def _set_rho(self, progress: float) -> None:
        factor = 1.0
        for start, value in self.rho_schedule:
            factor = value if progress >= start else factor
        new = self.base_rho * factor
        if new != self.rho and new > 0:
            self.u = {name: u * (self.rho / new) for name, u in self.u.items()}
        self.rho = new


def train_admm(
    model: nn.Module,
    data: Any,
    plan: Plan,
    *,
    epochs: int,
    rho: float = 1e-3,
    rho_schedule: Sequence[tuple[float, float]] = (),
    track_distance: bool = False,
    hooks: Sequence[Hook] = (),
    **training: Any,
) -> tuple[History, ADMM]:
    """Train `model` in place for `epochs` with the ADMM penalty towards `plan`. Other arguments go to
    `train.fit`.

    Returns the history (with the columns of `ADMM`) and the hook, whose `z` and `u` can be inspected.
    """
    admm = ADMM(plan, rho, rho_schedule, track_distance)
    return fit(model, data, epochs=epochs, hooks=(*hooks, admm), **training), admm


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
    dense_epochs: int = 0,
    epochs: int = 20,
    rho: float = 1e-3,
    rho_schedule: Sequence[tuple[float, float]] = (),
    finetune_epochs: int = 10,
    lr: float = 0.05,
    finetune_lr: float = 0.01,
    progress: bool = True,
    **training: Any,
) -> nn.Module:
    """Compress by ADMM: (dense training) -> ADMM epochs -> decomposition of W -> fine-tuning.

    `model` is not changed. dense_epochs > 0 trains it first, for a model that comes untrained. skip None
    leaves the first convolution and the classifier dense, as in the paper. Other keyword arguments go to
    `train.fit`. The measurements are in `result._tdlib["report"]`: accuracies in percent on validation and
    test split of the dense model, of W after ADMM, after decomposition (`before`) and after fine-tuning
    (`after`), achieved ratios, histories.
    """
    training = training_options(training, seed=seed, progress=progress)
    device, started = training.get("device"), time.perf_counter()
    dense = copy.deepcopy(model)
    report: dict[str, Any] = {"method": "admm", "rho": rho, "epochs": epochs, "history": {}}
    if dense_epochs:
        history = fit(dense, data, epochs=dense_epochs, lr=lr, **stage(training, "dense", started))
        require_finished(history)
        report["history"]["dense"] = history.rows
    report["dense"] = accuracies(dense, data, device)
    plan = make_plan(dense, data, format, ratio, by, skip=skip, rule=rule, ranks=ranks, options=options)
    history, _ = train_admm(
        dense, data, plan, epochs=epochs, rho=rho, rho_schedule=rho_schedule, lr=lr,
        **stage(training, "admm", started),
    )  # fmt: skip
    require_finished(history)
    report["history"]["admm"] = history.rows
    report["admm"] = accuracies(dense, data, device)
    training = stage(training, "finetune", started)
    return finish(dense, data, plan, report, epochs=finetune_epochs, lr=finetune_lr, training=training)


def _now(device: Any) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
