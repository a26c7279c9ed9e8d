"""The moving parts of one ``fit``: a step, the end of an epoch, and the checkpoint between them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tdlib.calibration.passes import placed
from tdlib.errors import CheckpointError, NonFiniteError, needs
from tdlib.files import fits
from tdlib.train import checkpoint as store
from tdlib.train.engine import Engine, Progress, stream_seed
from tdlib.train.evaluation import add, class_scores, metrics, new_totals, sums
from tdlib.train.hooks import Context, Hook
from tdlib.train.interrupt import Signals

FORM = {
    "finished": bool, "epoch": int, "step": int, "rows": [dict], "row": dict, "model": dict, "hooks": [dict],
}  # fmt: skip
FORM_UNFINISHED = {**FORM, "optimizer": dict, "totals": Tensor, "rng": {str: Tensor}, "spent": float}


@dataclass
class History:
    """One row per finished epoch; ``finished`` is False where ``max_minutes`` stopped the run."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False

    def to_frame(self) -> Any:
        """The rows as a pandas DataFrame. Raises TdlibError where pandas is missing."""
        return needs("pandas", "train").DataFrame(self.rows)


@dataclass
class Run:
    """The moving parts of one ``fit``: position, running totals, checkpoint."""

    engine: Engine
    ctx: Context
    hooks: tuple[Hook, ...]
    history: History
    directory: Path | None
    identity: dict[str, str]
    every: int | None
    minutes: float | None
    signals: Signals
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.totals = new_totals(self.engine.device)
        self.bad_step = torch.full((), -1, device=self.engine.device)  # first step with a non-finite loss
        self.rng: dict[str, Tensor] | None = None
        self.spent = 0.0  # seconds of the current epoch before an interruption
        self.epoch_started = time.monotonic()

    def begin_epoch(self, seed: int) -> None:
        """Seed the global generators by (seed, epoch, process), or restore them in the middle of an epoch."""
        ctx = self.ctx
        self.epoch_started = time.monotonic()
        torch.manual_seed(
            stream_seed(seed, ctx.epoch, ctx.step if self.engine.world > 1 else 0, self.engine.rank)
        )
        if ctx.step == 0:
            self.totals.zero_()
            self.spent = 0.0
            ctx.row = {"epoch": ctx.epoch}
            for hook in self.hooks:
                hook.on_epoch_start(ctx)
        elif self.rng is not None:
            self.engine.set_rng(self.rng)
        self.rng = None
        self.engine.net.train()

    def step(
        self, x: Tensor, y: Tensor, global_batch: int, smoothing: float, clip: float | None, bar: Progress
    ) -> None:
        """Forward, backward, update. Gradients are those of the mean loss over the global batch."""
        engine, ctx = self.engine, self.ctx
        with engine.accelerator.autocast():
            outputs = engine.net(placed(ctx.model, x))
        scores = class_scores(outputs, ctx.data)
        mean = F.cross_entropy(scores, y, label_smoothing=smoothing)
        loss = mean if engine.world == 1 else mean * (len(y) * engine.world / global_batch)
        for hook in self.hooks:
            penalty = hook.penalty(ctx)
            loss = loss if penalty is None else loss + penalty
        ctx.optimizer.zero_grad(set_to_none=True)
        engine.accelerator.backward(loss)
        if clip is not None:
            engine.accelerator.clip_grad_norm_(ctx.model.parameters(), clip)
        for hook in self.hooks:
            hook.before_step(ctx)
        ctx.optimizer.step()
        with torch.no_grad():
            add(self.totals, mean * len(y), scores, y)
            bad = (self.bad_step < 0) & ~torch.isfinite(loss.detach())
            self.bad_step = torch.where(bad, ctx.step, self.bad_step)
        if engine.device.type == "cpu" and engine.world == 1:
            self.check_finite()
        for hook in self.hooks:
            hook.after_step(ctx)
        ctx.step += 1
        bar.advance(self.totals, ctx)

    def check_finite(self) -> None:
        """Raises NonFiniteError if the loss of a step of this epoch was NaN or infinite."""
        bad = int(self.bad_step)
        if bad >= 0:
            kept = f"; the last good checkpoint is in {self.directory}" if self.directory else ""
            raise NonFiniteError(
                f"the training loss became NaN or infinite at epoch {self.ctx.epoch}, step {bad} of "
                f"{self.ctx.steps} (both from 0): lower lr, add warmup_epochs or clip_norm{kept}"
            )

    def pause(self) -> bool:
        """Write a checkpoint in the middle of an epoch where one is due; True where the time is over.
        Raises Interrupted.
        """
        over = self.engine.world == 1 and self.out_of_time()
        due = self.every is not None and self.ctx.step % self.every == 0
        if over or due or self.signals.caught is not None:
            self.check_finite()
            self.save()
        self.heed()
        return over

    def heed(self) -> None:
        """Raises Interrupted where a signal came; the checkpoint is written."""
        ctx = self.ctx
        self.signals.heed(f"at epoch {ctx.epoch}, step {ctx.step} (both from 0), kept in {self.directory}")

    def out_of_time(self) -> bool:
        """Whether ``max_minutes`` are over (the main process decides for all)."""
        if self.minutes is None:
            return False
        return self.engine.agree(time.monotonic() - self.started > 60 * self.minutes)

    def end_epoch(self, validate: bool, batch_size: int, bar: Progress) -> None:
        """Read the epoch's totals (the one host synchronisation), validate, write row and checkpoint."""
        engine, ctx = self.engine, self.ctx
        self.bad_step = engine.largest(self.bad_step)
        self.check_finite()
        finite = torch.stack([parameter.isfinite().all() for parameter in ctx.model.parameters()])
        if not finite.all():  # by the last step: its loss was finite, there is no later one
            raise NonFiniteError(f"weights became NaN or infinite at the end of epoch {ctx.epoch}: lower lr")
        train = metrics(engine.total(self.totals).tolist())
        ctx.row |= {"lr": float(ctx.optimizer.param_groups[0]["lr"])}
        ctx.row |= {"train_loss": train["loss"], "train_accuracy": train["accuracy"]}
        engine.share_buffers()
        if validate and len(ctx.data.val):
            part = sums(
                ctx.model, ctx.data, "val", batch_size, engine.device,
                rank=engine.rank, world=engine.world, amp=engine.accelerator.autocast(),
            )  # fmt: skip
            val = metrics(engine.total(part).tolist())
            ctx.row |= {"val_loss": val["loss"], "val_accuracy": val["accuracy"]}
        for hook in self.hooks:
            hook.after_epoch(ctx)
        ctx.row["seconds"] = self.spent + time.monotonic() - self.epoch_started
        ctx.rows.append(ctx.row)
        bar.epoch(ctx.row)
        ctx.epoch, ctx.step = ctx.epoch + 1, 0
        if ctx.epoch < ctx.epochs and not ctx.stop:
            self.save()

    def save(self) -> None:
        """Write the checkpoint (main process)."""
        if self.directory is None or not self.engine.main:
            return
        ctx, done = self.ctx, self.history.finished
        state: dict[str, Any] = {
            "identity": self.identity,
            "finished": done,
            "epoch": ctx.epoch,
            "step": ctx.step,
            "rows": ctx.rows,
            "row": ctx.row if ctx.step else {},
            "model": dict(ctx.model.state_dict()),
            "hooks": [hook.state_dict() for hook in self.hooks],
        }
        if not done:
            state["optimizer"] = ctx.optimizer.state_dict()
            state["totals"], state["rng"] = self.totals, self.engine.get_rng()
            state["spent"] = self.spent + time.monotonic() - self.epoch_started if ctx.step else 0.0
        store.write(self.directory, state)

    def restore(self, saved: dict[str, Any] | None) -> None:
        """Continue from ``saved``. Raises CheckpointError where it is no state of this run."""
        if saved is None:
            return
        try:
            form = FORM if saved.get("finished") else FORM_UNFINISHED
            if not fits(saved, form) or not 0 <= saved["epoch"] <= self.ctx.epochs:
                raise ValueError("an entry is missing or of another kind")
            self._restore(saved)
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"checkpoint in {self.directory} cannot be restored: {error}") from error

    def _restore(self, saved: dict[str, Any]) -> None:
        ctx = self.ctx
        ctx.model.load_state_dict(saved["model"])
        for hook, state in zip(self.hooks, saved["hooks"], strict=True):
            hook.load_state_dict(state)
        ctx.rows[:] = saved["rows"]
        ctx.row, ctx.epoch, ctx.step = saved["row"], saved["epoch"], saved["step"]
        self.history.finished = saved["finished"]
        if not self.history.finished:
            ctx.optimizer.load_state_dict(saved["optimizer"])
            self.totals.copy_(saved["totals"])
            self.rng, self.spent = saved["rng"], saved["spent"]
