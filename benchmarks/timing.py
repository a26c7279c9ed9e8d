"""Interleaved timing: A and B alternate, so that whatever else the machine does falls on both."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

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


def _time(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(row: Row, a: Run, b: Run, *, pairs: int = 15, seconds: float = 20.0, warm: bool = True) -> Row:
    """Fill ``row`` by running ``a`` and ``b`` alternately, at most ``pairs`` times or for about ``seconds``.

    At least three pairs are taken; short runs are repeated inside one measurement until it lasts 5 ms.
    """
    started = time.perf_counter()
    if warm:
        a(), b()
    once = max(_time(a), 1e-7)
    inner = max(1, int(5e-3 / once))
    repeated_a, repeated_b = _repeat(a, inner), _repeat(b, inner)
    times_a: list[float] = []
    times_b: list[float] = []
    gc.collect()
    gc.disable()
    try:
        while len(times_a) < pairs and (len(times_a) < 3 or time.perf_counter() - started < seconds):
            if len(times_a) % 2:
                times_b.append(_time(repeated_b) / inner)
                times_a.append(_time(repeated_a) / inner)
            else:
                times_a.append(_time(repeated_a) / inner)
                times_b.append(_time(repeated_b) / inner)
    finally:
        gc.enable()
    return fill(row, times_a, times_b)


def fill(row: Row, times_a: list[float], times_b: list[float], *, a_over_b: bool = False) -> Row:
    """Median and quartiles of the pairwise ratio (B / A, or A / B), and the median times."""
    ratios = [x / y if a_over_b else y / x for x, y in zip(times_a, times_b, strict=True)]
    row.ratio = statistics.median(ratios)
    row.quartiles = (
        tuple(statistics.quantiles(ratios, n=4)[::2]) if len(ratios) > 1 else (row.ratio, row.ratio)
    )  # type: ignore[assignment]
    row.a_ms, row.b_ms = 1e3 * statistics.median(times_a), 1e3 * statistics.median(times_b)
    row.pairs = len(ratios)
    return row


def invert(row: Row) -> Row:
    """Turn B / A into A / B (for costs: how many times B's time A takes)."""
    low, high = row.quartiles
    row.ratio, row.quartiles = 1 / row.ratio, (1 / high, 1 / low)
    return row


def _repeat(run: Run, times: int) -> Run:
    def repeated() -> None:
        for _ in range(times):
            run()

    return repeated
