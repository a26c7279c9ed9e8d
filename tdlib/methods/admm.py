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
shrinks W - Z + U per epoch by the factor exp(-p), p = rho * lr / (1 - m) * steps, which `pull` computes. The
authors' setting (rho 1e-3, lr 0.1, m 0.9, 391 steps) has p = 0.39, until lr falls. More is not better: in the
first epoch U = W0 - Z0, so the penalty's target Z - U is 2 Z0 - W0, the mirror image of W0, and the penalty
alone takes W - Z to (2 exp(-p) - 1) (W0 - Z0), which is 0 at p = ln 2. From then on U swings it through the
low-rank set and back, at every p: an oscillation that exp(-p / 2) damps per epoch.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tdlib.errors import TdlibError
from tdlib.formats import decompose
from tdlib.formats.projection import Projection, dense_weight, relative_distance
from tdlib.methods.direct import Tables
from tdlib.planning import Plan
from tdlib.train import Context, History, Hook, fit, require_finished


def admm(
    model: nn.Module,
    data: Any,
    plan: Plan,
    *,
    epochs: int = 20,
    rho: float = 1e-3,
    lr: float = 0.05,
    track_distance: bool = False,
    **training: Any,
) -> tuple[nn.Module, Tables]:
    """ADMM epochs on a copy of the dense `model`, then the decomposition of W at the planned ranks.

    Arguments and table "admm" (a row per epoch): see `regularise`.
    """
    w, history = regularise(
        model, data, plan, epochs=epochs, rho=rho, lr=lr, track_distance=track_distance, **training
    )
    return decompose(w, plan), {"admm": history.rows}


def regularise(
    model: nn.Module,
    data: Any,
    plan: Plan,
    *,
    epochs: int,
    rho: float = 1e-3,
    track_distance: bool = False,
    hooks: Sequence[Hook] = (),
    **training: Any,
) -> tuple[nn.Module, History]:
    """(W after `epochs` with the penalty towards `plan`, the history with the columns of `ADMM`).

    `model` is not changed. Other arguments go to `train.fit`.
    """
    w = copy.deepcopy(model)
    hook = ADMM(plan, rho, track_distance)
    history = fit(w, data, epochs=epochs, hooks=(*hooks, hook), **training)
    require_finished(history)
    return w, history


def pull(rho: float, lr: float, steps: int, momentum: float = 0.9) -> float:
    """Exponent by which the penalty alone contracts W - Z + U in one epoch of `steps` SGD steps."""
    return rho * lr / (1 - momentum) * steps


def rho_for(strength: float, lr: float, steps: int, momentum: float = 0.9) -> float:
    """The rho with which one epoch of `steps` SGD steps has the pull `strength` (inverse of `pull`)."""
    return strength * (1 - momentum) / (lr * steps)


class ADMM(Hook):
    """Training hook that carries out equations (2) to (4).

    rho: penalty weight; 0 makes the hook an observer of plain training (Z = P(W), U = 0, nothing is pulled).
    track_distance: also record `distance` = ||W - P(W)|| / ||W|| after each epoch (one more projection).

    Columns added to the history: `gap` = ||W - Z|| / ||W|| over all layers and `gap:LAYER` for each,
    `penalty` (value of the penalty term; the reported loss stays the task's), `rho`, `projection_seconds`.
    """

    def __init__(self, plan: Plan, rho: float = 1e-3, track_distance: bool = False) -> None:
        if rho < 0:
            raise TdlibError(f"rho must not be negative, got {rho}")
        self.plan, self.rho, self.track_distance = plan, rho, track_distance
        self.z: dict[str, Tensor] = {}
        self.u: dict[str, Tensor] = {}
        self.seconds = 0.0
        self._weights: dict[str, nn.Parameter] = {}
        self._shift: list[Tensor] = []  # U - Z, so that the gradient of the penalty is rho * (W + shift)
        self._updated = -1  # last epoch whose Z and U are done, so that a resumed epoch does not update twice

    def identity(self) -> str:
        layers = {name: (layer.format, layer.ranks, layer.options) for name, layer in self.plan.items()}
        return f"ADMM(rho={self.rho}, track_distance={self.track_distance}, layers={layers})"

    def on_start(self, ctx: Context) -> None:
        self.project = Projection(ctx.model, self.plan)
        self._weights = {name: dense_weight(ctx.model, name) for name in self.plan}
        if self._updated < 0:
            self.z = self.project(self._kernels())
            self.u = {name: torch.zeros_like(z) for name, z in self.z.items()}
        self._place()

    def on_epoch_start(self, ctx: Context) -> None:
        self.seconds = 0.0
        if ctx.epoch <= self._updated:
            return
        started = _now(ctx.device)
        self.update()
        self._updated = ctx.epoch
        self.seconds = _now(ctx.device) - started

    def update(self) -> None:
        """Equations (2) and (3), all layers."""
        w = self._kernels()
        self.z = self.project({name: w[name] + self.u[name] for name in w})
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
            ctx.row["distance"] = relative_distance(w, self.project(w))[0]
        ctx.row.update({f"gap:{name}": value for name, value in gaps.items()})
        ctx.row["projection_seconds"] = self.seconds + _now(ctx.device) - started

    def state_dict(self) -> dict[str, Any]:
        return {"z": dict(self.z), "u": dict(self.u), "updated": self._updated, "seconds": self.seconds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.z, self.u = dict(state["z"]), dict(state["u"])
        self._updated, self.seconds = int(state["updated"]), float(state["seconds"])
        self._place()

    def _kernels(self) -> dict[str, Tensor]:
        return {name: weight.detach().float() for name, weight in self._weights.items()}

    def _place(self) -> None:
        for name, weight in self._weights.items():
            self.z[name] = self.z[name].to(weight.device, torch.float32)
            self.u[name] = self.u[name].to(weight.device, torch.float32)
        self._shift = [(self.u[name] - self.z[name]).to(w.dtype) for name, w in self._weights.items()]


def _now(device: Any) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
