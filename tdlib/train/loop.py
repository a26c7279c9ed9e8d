"""``fit``: one training loop for CPU, one GPU and several processes (Hugging Face Accelerate), resumable at
any step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from tdlib.data import Augment, Bundle
from tdlib.errors import DataError, TdlibError
from tdlib.network import attach, fingerprint, provenance
from tdlib.train import checkpoint as store
from tdlib.train.engine import Engine, Progress, make_optimizer
from tdlib.train.hooks import Context, Hook
from tdlib.train.interrupt import Signals
from tdlib.train.run import History, Run
from tdlib.train.schedule import check_schedule, learning_rate


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
    origin: str | None = None,
) -> History:
    """Train ``model`` in place on ``data.train``; each epoch is measured on ``data.val`` (never on the test
    set). The model stays on the device that it was trained on and remembers what its inputs were
    (`Provenance.inputs`).

    batch_size: over all processes together. Batches that do not fill up at the end of an epoch are left out
    (other images each epoch). schedule: see ``learning_rate``. label_smoothing applies to the training loss.
    checkpoint: a directory; written after every epoch, every ``checkpoint_steps`` steps and when
    ``max_minutes`` are over. Called again with the same arguments and the same starting weights (or those
    that the stopped run left in the model), ``fit`` continues there, or loads the trained weights and returns
    at once if the run was finished. On a CPU the result is the same to the bit as without interruption. A
    directory of another run (weights, data, hooks, any argument that decides the result) is refused and left
    as it is. Ctrl-C and SIGTERM end at a checkpoint there (in one process, in the main thread).
    origin: fingerprint of what the starting weights were made from, where they themselves may differ in the
    last bits on another machine; default their own.
    device: default the GPU where there is one. precision: "no" (float32) or "bf16" (autocast).
    compile: torch.compile the forward pass. The global random state is left as it was.

    Raises NonFiniteError (loss NaN or infinite; the checkpoint before it is kept), CheckpointError,
    DataError (no data set, or one without labels), UnknownName, TdlibError (also where accelerate is
    missing), Interrupted.
    """
    identity_of = {key: value for key, value in locals().items() if key not in _NOT_IDENTITY}
    _check(epochs, lr, batch_size, label_smoothing, checkpoint_steps, max_minutes, data)
    check_schedule(schedule, step_epochs, warmup_epochs, epochs)
    identity = {key: repr(value) for key, value in identity_of.items()}
    identity["augment"] = repr(data.resolve(augment))
    directory, saved = None if checkpoint is None else Path(checkpoint), None
    if directory is not None:
        identity |= {"model": store.structure(model), "weights": (origin or fingerprint(model))[:16]}
        identity["data"] = data.fingerprint[:16]
        identity["hooks"] = repr([hook.identity() for hook in hooks])
        saved = store.read(directory, identity, None if origin else model)
        store.prepare(directory, model)

    about = provenance(model)
    about.inputs = data.description
    attach(model, about)
    engine = Engine.start(model, device, precision, channels_last, compile)
    if batch_size < engine.world:
        raise TdlibError(
            f"batch_size {batch_size} is less than one image for each of {engine.world} processes"
        )
    optim = make_optimizer(model, optimizer, lr, momentum, weight_decay, nesterov, engine.device)
    ctx = Context(model, data, optim, engine.device, epochs, data.steps("train", batch_size, drop_last=True))
    for hook in hooks:
        hook.on_start(ctx)
    history = History(ctx.rows)
    signals = Signals(directory is not None and engine.world == 1)
    run = Run(
        engine, ctx, tuple(hooks), history, directory, identity, checkpoint_steps, max_minutes, signals
    )
    run.restore(saved)
    if history.finished:
        return history
    rate = partial(
        learning_rate, base=lr, epochs=epochs, schedule=schedule, step_epochs=step_epochs,
        step_gamma=step_gamma, warmup_epochs=warmup_epochs,
    )  # fmt: skip
    bar = Progress(progress and engine.main, epochs * ctx.steps, ctx.epoch * ctx.steps + ctx.step)
    with engine.running(), bar, signals:
        while ctx.epoch < epochs and not ctx.stop:
            batches = data.batches(
                "train", batch_size, device=engine.device, seed=seed, epoch=ctx.epoch, augment=augment,
                rank=engine.rank, world=engine.world, start_step=ctx.step,
            )  # fmt: skip
            run.begin_epoch(seed)
            for x, y in batches:
                for group in optim.param_groups:
                    group["lr"] = rate(ctx.epoch + ctx.step / ctx.steps)
                run.step(x, y, min(batch_size, len(data.train)), label_smoothing, clip_norm, bar)
                if ctx.step < ctx.steps and run.pause():
                    return history
            run.end_epoch(validate, max(batch_size, 256), bar)
            if ctx.epoch < epochs and not ctx.stop:
                run.heed()
                if run.out_of_time():
                    return history
        history.finished = True
        run.save()
        run.heed()
    return history


_NOT_IDENTITY = {"model", "data", "hooks", "augment", *store.FREE}  # the first four are named otherwise


def _check(
    epochs: int,
    lr: float,
    batch_size: int,
    smoothing: float,
    steps: int | None,
    minutes: float | None,
    data: Bundle,
) -> None:
    if not hasattr(data, "batches"):
        raise DataError(f"data must be a data set, as tdlib.data.load gives it, not a {type(data).__name__}")
    if epochs < 0 or batch_size < 1 or not (lr > 0 and math.isfinite(lr)):
        raise TdlibError(f"need epochs >= 0, batch_size >= 1 and lr > 0, got {epochs}, {batch_size} and {lr}")
    if not 0 <= smoothing < 1:
        raise TdlibError(f"label_smoothing must be in [0, 1), got {smoothing}")
    if (steps is not None and steps < 1) or (minutes is not None and minutes <= 0):
        raise TdlibError(f"checkpoint_steps and max_minutes must be positive, got {steps} and {minutes}")
    data.require_labels("training")
    if not len(data.train):
        raise TdlibError(f"the training split of {data.name} is empty")
