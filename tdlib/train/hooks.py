"""What a method may do during training: subclass ``Hook`` and override what is needed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tdlib.data import Bundle
from tdlib.train.checkpoint import described


@dataclass
class Context:
    """The state of training that hooks see.

    model: the unwrapped model. epoch counts from 0; step counts within the epoch, of ``steps``. row: this
    epoch's metrics, complete in ``after_epoch`` (hooks may add columns; numbers or strings). rows: the
    finished epochs. stop: set in ``after_epoch`` to end training after this epoch (early stopping).
    """

    model: nn.Module
    data: Bundle
    optimizer: torch.optim.Optimizer
    device: torch.device
    epochs: int
    steps: int
    epoch: int = 0
    step: int = 0
    row: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    stop: bool = False


class Hook:
    """Does nothing; override. A resumed run calls ``on_start`` and then ``load_state_dict``."""

    def identity(self) -> str:
        """What tells this hook from another in a checkpoint's identity, asked before training starts. By
        default the class and all attributes; override where some of them decide nothing.
        """
        return type(self).__qualname__ + described(vars(self))

    def on_start(self, ctx: Context) -> None:
        """Before the first epoch, model on its device."""

    def on_epoch_start(self, ctx: Context) -> None:
        """Before the batches of an epoch (not repeated when an epoch is resumed in its middle)."""

    def penalty(self, ctx: Context) -> Tensor | None:
        """A scalar added to the loss of every step, or None."""
        return None

    def before_step(self, ctx: Context) -> None:
        """After backward, before the optimiser's step: gradients are there."""

    def after_step(self, ctx: Context) -> None:
        """After the optimiser's step."""

    def after_epoch(self, ctx: Context) -> None:
        """After validation; may add columns to ``ctx.row``."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values to be checkpointed."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave (tensors come on the CPU)."""
