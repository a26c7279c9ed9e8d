"""Progress bars on stderr for loops that take more than a few seconds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")


def bar(items: Iterable[T] | None, text: str | None, unit: str, show: bool, **more: Any) -> Any:
    """A tqdm bar over `items` or, with None, over `total` steps; it does nothing where `show` is False."""
    return tqdm(items, desc=text, unit=unit, disable=not show, mininterval=0.5, dynamic_ncols=True, **more)


def track(items: Iterable[T], text: str, unit: str, show: bool) -> Iterable[T]:
    """The items, with a bar while they are gone through."""
    return bar(items, text, unit, show)
