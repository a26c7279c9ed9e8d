"""Tiny data, models and runs for the training tests; importable by child processes."""

import os
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

import tdlib
from tdlib import models, train
from tdlib.data import ArraySplit, Augment, Bundle
from tdlib.train.run import Run


def tiny_bundle(n: int = 96, size: int = 8, channels: int = 1) -> Bundle:
    """Three classes, each a bright band at another height, with noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(2 * n) % 3
    images = torch.randint(0, 120, (2 * n, size, size, channels), generator=generator)
    for row in range(2 * n):
        images[row, 2 * labels[row] : 2 * labels[row] + 2] += 100
    mean, std = (0.3,) * channels, (0.2,) * channels
    parts = [
        ArraySplit(images[a:b].to(torch.uint8), labels[a:b], mean, std)
        for a, b in ((0, n), (n, n + n // 2), (n + n // 2, 2 * n))
    ]
    augment = Augment(pad=1, flip=True)
    return Bundle("tiny", ["a", "b", "c"], mean, std, (channels, size, size), *parts, augment=augment)


def tiny_model(norm: bool = True, seed: int = 0, dropout: float = 0.0) -> torch.nn.Module:
    """A narrow cnn with fixed initial weights, optionally with dropout (which uses the global generator)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = models.build("cnn", 3, input_shape=(1, 8, 8), width=4, norm=norm)
    return torch.nn.Sequential(torch.nn.Dropout(dropout), net) if dropout else net


class Counting(train.Hook):
    """A penalty that grows with the number of steps, kept in the hook's state."""

    def __init__(self) -> None:
        self.count = torch.zeros(())
        self.calls: list[str] = []

    def on_start(self, ctx: train.Context) -> None:
        self.calls.append("on_start")

    def on_epoch_start(self, ctx: train.Context) -> None:
        self.calls.append("on_epoch_start")

    def penalty(self, ctx: train.Context) -> torch.Tensor:
        self.calls.append("penalty")
        return 1e-4 * self.count * sum(p.square().sum() for p in ctx.model.parameters())

    def before_step(self, ctx: train.Context) -> None:
        self.calls.append("before_step")
        assert all(p.grad is not None for p in ctx.model.parameters())

    def after_step(self, ctx: train.Context) -> None:
        self.calls.append("after_step")
        self.count += 1

    def after_epoch(self, ctx: train.Context) -> None:
        self.calls.append("after_epoch")
        ctx.row["count"] = float(self.count)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.count = state["count"]


class Slow(Counting):
    """Counting, slowed down and reporting its first step, so that a killer can aim."""

    def __init__(self, pipe: Connection, delay: float) -> None:
        super().__init__()
        self.pipe, self.delay = pipe, delay

    def identity(self) -> str:
        return "Slow"  # neither decides anything

    def after_step(self, ctx: train.Context) -> None:
        if "after_step" not in self.calls:
            self.pipe.send("training")
        super().after_step(ctx)
        time.sleep(self.delay)


def long_run(directory: Path, pipe: Connection, delay: float) -> None:
    """A run with a checkpoint at every step (dropout, augmentation, a stateful hook) -> final.pt."""
    torch.set_num_threads(1)
    net = tiny_model(dropout=0.2)
    history = train.fit(
        net, tiny_bundle(), epochs=13, batch_size=12, lr=0.02, hooks=[Slow(pipe, delay)],
        checkpoint=directory, checkpoint_steps=1, device="cpu", progress=False, warmup_epochs=1,
    )  # fmt: skip
    assert history.finished
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in history.rows]
    torch.save({"weights": net.state_dict(), "rows": rows}, directory / "final.pt")


def compressed_run(directory: Path, pipe: Connection, method: str, delay: float) -> None:
    """A small cnn compressed on digits, with a checkpoint at every step -> final.pt."""
    torch.set_num_threads(1)
    data = tdlib.data.load("digits", limit=256)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = models.build("cnn", data.classes, input_shape=data.input_shape, width=8)
    step = Run.step

    def slow(*args: object) -> None:
        step(*args)
        pipe.send("training")
        time.sleep(delay)

    Run.step = slow
    options = {
        "rstd": {"epochs": 10},
        "iterative": {"stage_epochs": 3, "rule": "nx", "least": 2, "patience": 9},
    }[method]
    small = tdlib.compress(
        net, method, data, ratio=2.5, batch_size=64, checkpoint=directory / "checkpoint", checkpoint_steps=1,
        device="cpu", progress=False, **options,
    )  # fmt: skip
    report = tdlib.provenance(small).report
    rows = [row for table in report["history"].values() for row in table]
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
    torch.save({"weights": small.state_dict(), "rows": rows}, directory / "final.pt")


def one_of_two(rank: int, port: int, directory: Path, norm: bool) -> None:
    """One process of a two-process run; the main one saves its weights and history."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    net, history = two_process_run(norm, directory / "checkpoint")
    torch.save({"weights": net.state_dict(), "rows": history.rows}, directory / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def two_process_run(norm: bool, checkpoint: Path | None = None) -> tuple[torch.nn.Module, train.History]:
    """The run that ``one_of_two`` shares. 15 images a batch: the processes have 8 and 7."""
    net = tiny_model(norm=norm)
    history = train.fit(
        net, tiny_bundle(), epochs=2, batch_size=15, lr=0.05, hooks=[Counting()], device="cpu",
        progress=False, label_smoothing=0.1, clip_norm=1.0, checkpoint=checkpoint,
    )  # fmt: skip
    return net, history
