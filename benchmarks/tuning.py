"""The fastest way to train one network on this CPU: memory format, threads and bfloat16, by a short trial."""

from __future__ import annotations

import contextlib
import copy
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdlib.data import Bundle
from tdlib.errors import TdlibError, unknown


@dataclass(frozen=True)
class Setting:
    """One way to run training steps on a CPU."""

    channels_last: bool = True
    precision: str = "no"
    threads: int = 1

    def __str__(self) -> str:
        form = "channels_last" if self.channels_last else "contiguous"
        kind = "float32" if self.precision == "no" else self.precision
        return f"{form}, {kind}, {self.threads} thread{'s' if self.threads > 1 else ''}"


@dataclass(frozen=True)
class Tuning:
    """What ``tune_cpu`` found: the fastest setting, and what every setting took.

    best: the fastest. rows: setting, milliseconds per training step (median) and ``speed-up`` over the first
    row (contiguous, float32, all threads), fastest first.
    """

    best: Setting
    rows: list[dict[str, Any]]

    @property
    def options(self) -> dict[str, Any]:
        """Arguments for ``fit``."""
        return {"device": "cpu", "channels_last": self.best.channels_last, "precision": self.best.precision}

    @contextlib.contextmanager
    def applied(self) -> Iterator[dict[str, Any]]:
        """Inside, torch uses the best number of threads; gives the arguments for ``fit``."""
        with _threads(self.best.threads):
            yield self.options

    def __str__(self) -> str:
        width = max(len(row["setting"]) for row in self.rows)
        lines = [f"{r['setting']:{width}}  {r['ms']:9.1f} ms  {r['speed-up']:5.2f}x" for r in self.rows]
        return "\n".join(
            [f"{'a training step on this CPU':{width}}  {'median':>12}  {'speed-up':>6}", *lines]
        )


def has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (without, bf16 is slower than float32)."""
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(flags.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def tune_cpu(
    model: nn.Module,
    data: Bundle,
    *,
    batch_size: int = 128,
    threads: Sequence[int] | None = None,
    precisions: Sequence[str] | None = None,
    rounds: int = 3,
) -> Tuning:
    """Measure training steps of a copy of ``model`` in every memory format, precision and number of threads,
    in turn (so that a busy machine disturbs all alike), and choose the fastest. Model, data and random state
    stay as they are.

    threads: default 1 and the number that torch uses now. precisions: default float32, and bfloat16 where the
    CPU has it in hardware; ``("no",)`` to leave the numerics alone. rounds: measured steps of each setting,
    after one that is not measured.

        found = tune_cpu(model, data)
        print(found)
        with found.applied() as options:
            tdlib.train.fit(model, data, epochs=10, **options)

    Another memory format or number of threads rounds differently, so a run is repeatable only with the same
    setting: pass it on by hand where that matters.

    Raises: TdlibError for an empty split or numbers below 1; UnknownName for a precision.
    """
    if not len(data.train) or batch_size < 1 or rounds < 1:
        raise TdlibError(
            f"need training images, batch_size >= 1 and rounds >= 1, got {len(data.train)} images, "
            f"{batch_size} and {rounds}"
        )
    counts = sorted({1, torch.get_num_threads()} if threads is None else set(threads), reverse=True)
    if not counts or counts[-1] < 1 or counts[0] > (os.cpu_count() or 1):
        raise TdlibError(
            f"threads must be between 1 and the {os.cpu_count()} of this machine, got {list(counts)}"
        )
    kinds = list(precisions) if precisions is not None else ["no", "bf16"] if has_bf16() else ["no"]
    for kind in kinds:
        if kind not in ("no", "bf16"):
            raise unknown("precision", kind, ("no", "bf16"))
    settings = [Setting(last, kind, n) for n in counts for kind in kinds for last in (False, True)]
    x, y = next(iter(data.batches("train", min(batch_size, len(data.train)), shuffle=False)))
    times: dict[Setting, list[float]] = {setting: [] for setting in settings}
    with torch.random.fork_rng(devices=[]):
        steps = {setting: _Step(model, setting, x, y) for setting in settings}
        for number in range(rounds + 1):
            for setting in settings:
                spent = steps[setting]()
                if number:  # the first step of each allocates and plans
                    times[setting].append(spent)
    medians = {setting: statistics.median(spent) for setting, spent in times.items()}
    first = medians[settings[0]]
    ranked = sorted(medians, key=lambda setting: medians[setting])
    rows = [
        {"setting": str(one), "ms": 1e3 * medians[one], "speed-up": first / medians[one]} for one in ranked
    ]
    return Tuning(ranked[0], rows)


class _Step:
    """One training step of a copy of the model with one setting; a call gives its seconds."""

    def __init__(self, model: nn.Module, setting: Setting, x: Tensor, y: Tensor) -> None:
        form = torch.channels_last if setting.channels_last else torch.contiguous_format
        self.model = copy.deepcopy(model).cpu().train().to(memory_format=form)
        self.x = x.to(memory_format=form) if x.ndim == 4 else x
        self.y, self.setting = y, setting
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9, fused=True)

    def __call__(self) -> float:
        bf16 = self.setting.precision == "bf16"
        with _threads(self.setting.threads):
            started = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                scores = self.model(self.x)
            loss = F.cross_entropy(scores.float(), self.y)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            return time.perf_counter() - started


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
