"""Progress bars on stderr for loops that take more than a few seconds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")


def bar(items: Collection[T] | None, text: str | None, unit: str, show: bool, **more: Any) -> Any:
    """A tqdm bar over `items` or, with None, over `total` steps; it does nothing where `show` is False."""
    return tqdm(items, desc=text, unit=unit, disable=not show, mininterval=0.5, dynamic_ncols=True, **more)


def track(items: Collection[T], text: str, unit: str, show: bool) -> Iterable[T]:
    """The items, with a bar while they are gone through."""
    return bar(items, text, unit, show)


@contextmanager
def counter(total: int, text: str, unit: str, show: bool) -> Iterator[Callable[[], Any]]:
    """A function to call after each of `total` steps."""
    with bar(None, text, unit, show, total=total) as steps:
        yield steps.update
