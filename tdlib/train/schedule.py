"""Learning rates as a pure function of the position in training, so a resumed run is on the same curve."""

from __future__ import annotations

import math

from tdlib.errors import TdlibError, unknown

SCHEDULES = ("cosine", "step", "constant")


def learning_rate(
    position: float,
    *,
    base: float,
    epochs: int,
    schedule: str = "cosine",
    step_epochs: int | None = None,
    step_gamma: float = 0.1,
    warmup_epochs: float = 0.0,
) -> float:
    """Learning rate at ``position`` (epochs since the start, with fraction).

    Linear warm-up from 0 to ``base``, then: ``cosine`` to 0 at the end, ``step`` times ``step_gamma`` every
    ``step_epochs`` whole epochs (default a third of the epochs), or ``constant``.
    """
    if position < warmup_epochs:
        return base * position / warmup_epochs if position > 0 else base * 1e-3
    if schedule == "cosine":
        done = (position - warmup_epochs) / max(epochs - warmup_epochs, 1e-9)
        return base * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    if schedule == "step":
        every = step_epochs or max(1, math.ceil(epochs / 3))
        return float(base * step_gamma ** math.floor((position + 1e-9) / every))
    return base


def check_schedule(schedule: str, step_epochs: int | None, warmup_epochs: float, epochs: int) -> None:
    """Raises UnknownName or TdlibError for a schedule that cannot be."""
    if schedule not in SCHEDULES:
        raise unknown("schedule", schedule, SCHEDULES)
    if step_epochs is not None and (step_epochs < 1 or schedule != "step"):
        raise TdlibError(
            f"step_epochs must be >= 1 and belongs to schedule 'step', got {step_epochs} and {schedule!r}"
        )
    if warmup_epochs < 0 or (epochs and warmup_epochs >= epochs):
        raise TdlibError(f"warmup_epochs must be in [0, epochs), got {warmup_epochs} of {epochs}")
