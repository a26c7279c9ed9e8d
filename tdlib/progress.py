"""Progress bars for loops that take more than a few seconds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


def track(items: Iterable[T], text: str, unit: str, show: bool) -> Iterable[T]:
    """The items, with a bar on stderr while they are gone through; unchanged where `show` is False."""
    if not show:
        return items
    from tqdm import tqdm

    return iter(tqdm(items, desc=text, unit=unit, mininterval=0.5, dynamic_ncols=True))


@contextmanager
def counter(total: int, text: str, unit: str, show: bool) -> Iterator[Any]:
    """A function to call after each of `total` steps; it does nothing where `show` is False."""
    if not show:
        yield lambda: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=text, unit=unit, mininterval=0.5, dynamic_ncols=True) as bar:
        yield lambda: bar.update(1)
