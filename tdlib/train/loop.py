"""``fit``: one training loop for CPU, one GPU and several processes (Hugging Face Accelerate), resumable at any step."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Augment, Bundle
from ..errors import NonFiniteError, TdlibError
from . import checkpoint as store
from .engine import Engine, Progress, make_optimizer, stream_seed
from .evaluation import add, metrics, new_totals, sums
from .hooks import Context, Hook
from .schedule import check_schedule, learning_rate


@dataclass
class History:
    """One row per finished epoch; ``finished`` is False where ``max_minutes`` stopped the run."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False

    def to_frame(self) -> Any:
        """The rows as a pandas DataFrame."""
        import pandas

        return pandas.DataFrame(self.rows)


def fit(
    model: nn.Module,
    data: Bundle,
    *,
    epochs: int,
    lr: float = 0.1,
    batch_size: int = 128,
    optimizer: str = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    nesterov: bool = False,
    schedule: str = "cosine",
    step_epochs: int | None = None,
    step_gamma: float = 0.1,
    warmup_epochs: float = 0.0,
    label_smoothing: float = 0.0,
    augment: Augment | str | None = "auto",
    hooks: Sequence[Hook] = (),
    checkpoint: str | Path | None = None,
    checkpoint_steps: int | None = None,
    max_minutes: float | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    precision: str = "no",
    channels_last: bool = True,
    compile: bool = False,
    progress: bool = True,
    validate: bool = True,
    clip_norm: float | None = None,
) -> History:
    """Train ``model`` in place on ``data.train``; each epoch is measured on ``data.val`` (never on the test set).

    batch_size: over all processes together. Batches that do not fill up at the end of an epoch are left out (other
    images each epoch). schedule: see ``learning_rate``. label_smoothing applies to the training loss.
    checkpoint: a directory; written after every epoch, every ``checkpoint_steps`` steps and when ``max_minutes`` are
    over. Called again with the same arguments, ``fit`` continues there, or loads the trained weights and returns at
    once if the run was finished. On a CPU the result is the same to the bit as without interruption.
    device: default the GPU where there is one. precision: "no" (float32) or "bf16" (autocast).
    compile: torch.compile the forward pass. The global random state is left as it was.

    Raises NonFiniteError (loss NaN or infinite; the checkpoint before it is kept), CheckpointError, TdlibError.
    """
    identity_of = {key: value for key, value in locals().items() if key not in _NOT_IDENTITY}
    _check(epochs, lr, batch_size, label_smoothing, checkpoint_steps, max_minutes, data)
    check_schedule(schedule, step_epochs, warmup_epochs, epochs)
    directory = store.prepare(checkpoint) if checkpoint is not None else None
    identity = {key: repr(value) for key, value in identity_of.items()}
    identity |= {"augment": repr(data.resolve(augment)), "hooks": repr([type(hook).__name__ for hook in hooks])}
    identity |= {"model": store.structure(model), "data": data.fingerprint[:16]} if directory else {}
    saved = store.read(directory, identity) if directory else None

    engine = Engine.start(model, device, precision, channels_last, compile)
    if batch_size < engine.world:
        raise TdlibError(f"batch_size {batch_size} is less than one image for each of {engine.world} processes")
    optim = make_optimizer(model, optimizer, lr, momentum, weight_decay, nesterov, engine.device)
    ctx = Context(model, data, optim, engine.device, epochs, data.steps("train", batch_size, drop_last=True))
    for hook in hooks:
        hook.on_start(ctx)
    history = History(ctx.rows)
    run = _Run(engine, ctx, tuple(hooks), history, directory, identity, checkpoint_steps, max_minutes)
    run.restore(saved)
    if history.finished:
        return history
    rate = {
        "base": lr, "epochs": epochs, "schedule": schedule, "step_epochs": step_epochs, "step_gamma": step_gamma,
        "warmup_epochs": warmup_epochs,
    }  # fmt: skip
    bar = Progress(progress and engine.main, epochs * ctx.steps, ctx.epoch * ctx.steps + ctx.step)
    with engine.running(), bar:
        while ctx.epoch < epochs:
            batches = data.batches(
                "train", batch_size, device=engine.device, seed=seed, epoch=ctx.epoch, augment=augment,
                rank=engine.rank, world=engine.world, start_step=ctx.step,
            )  # fmt: skip
            run.begin_epoch(seed)
            for x, y in batches:
                for group in optim.param_groups:
                    group["lr"] = learning_rate(ctx.epoch + ctx.step / ctx.steps, **rate)  # type: ignore[arg-type]
                run.step(x, y, min(batch_size, len(data.train)), label_smoothing, clip_norm, bar)
                if ctx.step < ctx.steps and run.pause():
                    return history
            run.end_epoch(validate, max(batch_size, 256), bar)
            if run.out_of_time() and ctx.epoch < epochs:
                return history
    history.finished = True
    run.save()
    return history


_NOT_IDENTITY = {
    "model", "data", "hooks", "augment", "checkpoint", "checkpoint_steps", "max_minutes", "device", "compile",
    "progress", "channels_last",
}  # fmt: skip


def _check(
    epochs: int, lr: float, batch_size: int, smoothing: float, steps: int | None, minutes: float | None, data: Bundle
) -> None:
    if epochs < 0 or batch_size < 1 or not (lr > 0 and math.isfinite(lr)):
        raise TdlibError(f"need epochs >= 0, batch_size >= 1 and lr > 0, got {epochs}, {batch_size} and {lr}")
    if not 0 <= smoothing < 1:
        raise TdlibError(f"label_smoothing must be in [0, 1), got {smoothing}")
    if (steps is not None and steps < 1) or (minutes is not None and minutes <= 0):
        raise TdlibError(f"checkpoint_steps and max_minutes must be positive, got {steps} and {minutes}")
    if not len(data.train):
        raise TdlibError(f"the training split of {data.name} is empty")


@dataclass
class _Run:
    """The moving parts of one ``fit``: position, running totals, checkpoint."""

    engine: Engine
    ctx: Context
    hooks: tuple[Hook, ...]
    history: History
    directory: Path | None
    identity: dict[str, str]
    every: int | None
    minutes: float | None
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
        torch.manual_seed(stream_seed(seed, ctx.epoch, ctx.step if self.engine.world > 1 else 0, self.engine.rank))
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
            scores = engine.net(x)
        scores = scores.float()
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
        bar.advance(self.totals, ctx, live=engine.device.type == "cpu")

    def check_finite(self) -> None:
        """Raises NonFiniteError if the loss of a step of this epoch was NaN or infinite."""
        bad = int(self.bad_step)
        if bad >= 0:
            kept = f"; the last good checkpoint is in {self.directory}" if self.directory else ""
            raise NonFiniteError(
                f"the training loss became NaN or infinite at epoch {self.ctx.epoch}, step {bad} of {self.ctx.steps} "
                f"(both from 0): lower lr, add warmup_epochs or clip_norm{kept}"
            )

    def pause(self) -> bool:
        """Write a checkpoint in the middle of an epoch where one is due; True where the time is over."""
        over = self.engine.world == 1 and self.out_of_time()
        if over or (self.every is not None and self.ctx.step % self.every == 0):
            self.check_finite()
            self.save()
        return over

    def out_of_time(self) -> bool:
        """Whether ``max_minutes`` are over (the main process decides for all)."""
        over = self.minutes is not None and time.monotonic() - self.started > 60 * self.minutes
        return over if self.minutes is None else self.engine.agree(over)

    def end_epoch(self, validate: bool, batch_size: int, bar: Progress) -> None:
        """Read the epoch's totals (the one host synchronisation), validate, write the row and the checkpoint."""
        engine, ctx = self.engine, self.ctx
        self.bad_step = engine.largest(self.bad_step)
        self.check_finite()
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
        if ctx.epoch < ctx.epochs:
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
        store.write(self.directory, store.to_cpu(state))

    def restore(self, saved: dict[str, Any] | None) -> None:
        """Continue from ``saved``."""
        if saved is None:
            return
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
