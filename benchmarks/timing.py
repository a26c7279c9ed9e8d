"""Interleaved timing: A and B alternate, so that whatever else the machine does falls on both.

On a CPU with one thread the clock is the process's CPU time, which stops while another process has the core;
otherwise it is the wall clock.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

Run = Callable[[], Any]


@dataclass
class Row:
    """One comparison. ``ratio`` = B's time / A's time (above 1: A is faster); the note says where not."""

    topic: str
    name: str
    a: str
    b: str
    ratio: float = float("nan")
    quartiles: tuple[float, float] = (float("nan"), float("nan"))
    a_ms: float = float("nan")
    b_ms: float = float("nan")
    pairs: int = 0
    error_a: float | None = None
    error_b: float | None = None
    target: float | None = None
    at_most: bool = False  # the target is an upper bound
    note: str = ""
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the target is met at no larger error; None without a target or a measurement."""
        if self.target is None or self.ratio != self.ratio:
            return None
        fast = self.ratio <= self.target if self.at_most else self.ratio >= self.target
        if self.error_a is None or self.error_b is None:
            return fast
        return fast and self.error_a <= self.error_b * (1 + ERROR_SLACK)

    def to_dict(self) -> dict[str, Any]:
        """As written to results.json."""
        return {k: _finite(v) for k, v in asdict(self).items()} | {"met": self.met}


ERROR_SLACK = 1e-3  # "no larger error": float32 rounding and different stopping points stay below this


def _finite(value: Any) -> Any:
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, tuple | list):
        return [_finite(v) for v in value]
    return value


def clock(device: str = "cpu") -> Callable[[], float]:
    """The clock to time with: see the module's docstring."""
    return time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def timed(run: Run, now: Callable[[], float], times: int = 1) -> tuple[float, Any]:
    """(seconds per run, what the last one returned)."""
    start = now()
    for _ in range(times):
        found = run()
    return (now() - start) / times, found


def measure(
    row: Row,
    a: Run,
    b: Run,
    *,
    errors: tuple[Callable[[Any], float], Callable[[Any], float]] | None = None,
    pairs: int = 15,
    seconds: float = 20.0,
    warm: bool = True,
    device: str = "cpu",
    first_b: float | None = None,
) -> Row:
    """Fill ``row`` by running ``a`` and ``b`` alternately, at most ``pairs`` times or for about ``seconds``.

    At least three pairs are taken; short runs are repeated inside one measurement until it lasts 20 ms.
    ``errors`` turns what ``a`` and ``b`` return into the row's errors. ``warm``: run both once before.
    ``first_b``: time of a run of ``b`` just before, which is then the first pair's.
    """
    now = clock(device)
    inner = 1
    if warm:
        a(), b()
        inner = max(1, int(2e-2 / max(timed(a, now)[0], 1e-7)))
    started = time.perf_counter()
    times: tuple[list[float], list[float]] = ([], [])
    found: list[Any] = [None, None]
    if first_b is not None:
        spent, found[0] = timed(a, now)
        times[0].append(spent)
        times[1].append(first_b)
    gc.collect()
    gc.disable()
    try:
        while len(times[0]) < pairs and (len(times[0]) < 3 or time.perf_counter() - started < seconds):
            for which in (1, 0) if len(times[0]) % 2 else (0, 1):
                spent, found[which] = timed((a, b)[which], now, inner)
                times[which].append(spent)
    finally:
        gc.enable()
    if errors is not None:
        row.error_a, row.error_b = (error(result) for error, result in zip(errors, found, strict=True))
    return fill(row, *times)


def fill(row: Row, times_a: list[float], times_b: list[float]) -> Row:
    """Median and quartiles of the pairwise ratio B / A, and the median times."""
    ratios = [y / x for x, y in zip(times_a, times_b, strict=True)]
    row.ratio = statistics.median(ratios)
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (row.ratio,) * 3
    row.quartiles = (low, high)
    row.a_ms, row.b_ms = 1e3 * statistics.median(times_a), 1e3 * statistics.median(times_b)
    row.pairs = len(ratios)
    return row


def invert(row: Row) -> Row:
    """Turn B / A into A / B (for costs: how many times B's time A takes)."""
    low, high = row.quartiles
    row.ratio, row.quartiles = 1 / row.ratio, (1 / high, 1 / low)
    return row
