"""Factorising an extent into near-equal modes."""

from __future__ import annotations

import functools
import math

from tdlib.errors import RankError


@functools.cache
def factorise_modes(n: int, d: int) -> tuple[int, ...]:
    """n as a product of d whole numbers, as equal as possible (least sum), ascending: (48, 2) -> (6, 8).

    Raises: RankError if n or d is below 1.
    """
    if n < 1 or d < 1:
        raise RankError(f"factorise_modes needs n ≥ 1 and d ≥ 1, got n={n}, d={d}")
    if d == 1:
        return (n,)
    # The smallest factor is at most the d-th root.
    small = (k for k in range(1, math.isqrt(n) + 1) if n % k == 0 and k**d <= n)
    options = (tuple(sorted((k, *factorise_modes(n // k, d - 1)))) for k in small)
    return min(options, key=lambda f: (sum(f), f[-1]))
