"""Modes: lists of whole numbers, and factorising an extent into near-equal ones."""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

from tdlib.errors import RankError

MOST = 24  # modes, of which each at least halves an extent of up to 2^24


def whole_numbers(values: Any, what: str) -> tuple[int, ...]:
    """`values`, one or a sequence, as integers. Raises: RankError, naming `what`, for anything below 1."""
    try:
        found = tuple(operator.index(v) for v in (values if hasattr(values, "__len__") else (values,)))
    except TypeError:
        found = ()
    if not found or min(found) < 1:
        raise RankError(f"{what} must be a whole number of at least 1, or several, got {values!r}")
    return found


def factorise_modes(n: int, d: int) -> tuple[int, ...]:
    """n as a product of d whole numbers, as equal as possible (least sum), ascending: (48, 2) -> (6, 8).

    Raises: RankError if n or d is below 1, or d above 24.
    """
    (size,), (count,) = whole_numbers(n, "an extent"), whole_numbers(d, "the number of modes (order)")
    if count > MOST:
        raise RankError(f"the number of modes (order) is at most {MOST}, got {count}")
    return _factorise(size, count)


@functools.cache
def _factorise(n: int, d: int) -> tuple[int, ...]:
    if d == 1:
        return (n,)
    # The smallest factor is at most the d-th root.
    small = (k for k in range(1, math.isqrt(n) + 1) if n % k == 0 and k**d <= n)
    options = (tuple(sorted((k, *_factorise(n // k, d - 1)))) for k in small)
    return min(options, key=lambda f: (sum(f), f[-1]))
