"""Devices and processes for ``fit``: Accelerate set-up, optimiser, random states, progress bar."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tdlib.errors import TdlibError, needs, unknown
from tdlib.train.hooks import Context


@dataclass
class Engine:
    """Where and how a model is trained. ``net`` is what the loop calls: the model, compiled or wrapped for
    DDP. accelerator: Accelerate's Accelerator.
    """

    accelerator: Any
    device: torch.device
    model: nn.Module
    net: nn.Module

    @classmethod
    def start(
        cls,
        model: nn.Module,
        device: str | torch.device | None,
        precision: str,
        channels_last: bool,
        compile: bool,
    ) -> Engine:
        """Move the model to its device and set up Accelerate (one process, or those of ``accelerate
        launch``).
        """
        accelerate = needs("accelerate", "train")
        if precision not in ("no", "bf16"):
            raise unknown("precision", precision, ("no", "bf16"))
        wanted = torch.device(device) if device is not None else None
        if wanted is not None and wanted.type == "cuda" and not torch.cuda.is_available():
            raise TdlibError(f"device {wanted} was asked for, but torch finds no CUDA device")
        # A process may train several times, on different devices.
        accelerate.state.AcceleratorState._reset_state(True)
        accelerator = accelerate.Accelerator(
            cpu=wanted is not None and wanted.type == "cpu", mixed_precision=precision, device_placement=False
        )
        single = accelerator.num_processes == 1
        where = wanted if wanted is not None and single else accelerator.device
        model.to(where)
        if channels_last:
            model.to(memory_format=torch.channels_last)
        net: Any = model
        if not single:
            net = accelerator.prepare_model(model, device_placement=False)
        if compile:
            net = torch.compile(net)
        return cls(accelerator, where, model, net)

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.accelerator.is_main_process

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self.accelerator.process_index

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.accelerator.num_processes

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Leaves the global random state and the model's forward as they were."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            try:
                yield
            finally:
                if self.world > 1:
                    self.accelerator.unwrap_model(self.net, keep_fp32_wrapper=False)

    def total(self, value: Tensor) -> Tensor:
        """Sum over processes."""
        return self.accelerator.reduce(value, "sum")

    def largest(self, value: Tensor) -> Tensor:
        """Largest over processes."""
        return self.accelerator.gather(value.reshape(1)).max()

    def agree(self, decision: bool) -> bool:
        """The main process's decision."""
        if self.world == 1:
            return decision
        vote = torch.tensor(int(decision and self.main), device=self.device)
        return bool(self.total(vote) > 0)

    def share_buffers(self) -> None:
        """Give every process the main process's buffers (running statistics of BatchNorm)."""
        if self.world > 1:
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, 0)

    def get_rng(self) -> dict[str, Tensor]:
        """States of the global random generators."""
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def set_rng(self, states: dict[str, Tensor]) -> None:
        """Restore what ``get_rng`` gave."""
        torch.set_rng_state(states["cpu"])
        if self.device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self.device)


def stream_seed(*key: int) -> int:
    """A 63-bit seed that is a pure function of ``key``."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1


OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def make_optimizer(
    model: nn.Module,
    name: str,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    device: torch.device,
) -> torch.optim.Optimizer:
    """SGD, Adam or AdamW over the trainable parameters, fused where the device has it. ``momentum`` is the
    first beta of Adam. Raises UnknownName, and TdlibError for weights in half precision and for what the
    optimiser does not take.
    """
    if name not in OPTIMIZERS:
        raise unknown("optimizer", name, OPTIMIZERS)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise TdlibError("the model has no trainable parameters")
    half = {str(p.dtype) for p in parameters if p.dtype not in (torch.float32, torch.float64)}
    if half:
        raise TdlibError(
            f"the model's weights are {', '.join(half)}, and updates would be lost in their rounding: train "
            'model.float(), with precision="bf16" for speed'
        )
    if nesterov and name != "sgd":
        raise TdlibError(f"nesterov=True belongs to the optimizer 'sgd', not {name!r}")
    options: dict[str, Any] = {
        "lr": lr,
        "weight_decay": weight_decay,
        "fused": device.type in ("cpu", "cuda"),
    }
    if name == "sgd":
        options |= {"momentum": momentum, "nesterov": nesterov}
    else:
        options["betas"] = (momentum, 0.999)
    try:
        return OPTIMIZERS[name](parameters, **options)
    except ValueError as error:
        raise TdlibError(f"optimizer {name!r}: {error}") from error


class Progress:
    """A bar over all steps with loss, accuracy and time left. On a GPU the numbers change once per epoch."""

    def __init__(self, show: bool, total: int, done: int) -> None:
        self.bar = tqdm(total=total, initial=done, unit="step", disable=not show, dynamic_ncols=True)
        self.show = show

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def advance(self, totals: Tensor, ctx: Context) -> None:
        """One step further."""
        if self.show and totals.device.type == "cpu":
            loss, correct, n = totals.tolist()
            now = f"epoch {ctx.epoch + 1}/{ctx.epochs} loss {loss / n:.3f} acc {100 * correct / n:.1f}%"
            self.bar.set_postfix_str(now, refresh=False)
        self.bar.update()

    def epoch(self, row: dict[str, Any]) -> None:
        """Show a finished epoch's metrics."""
        now = f"epoch {row['epoch'] + 1} loss {row['train_loss']:.3f} acc {row['train_accuracy']:.1f}%"
        if "val_accuracy" in row:
            now += f" val {row['val_accuracy']:.1f}%"
        self.bar.set_postfix_str(now)
