"""Ctrl-C and SIGTERM end a run at its next checkpoint instead of anywhere."""

from __future__ import annotations

import signal
import threading
from typing import Any

from tdlib.errors import Interrupted


class Signals:
    """Inside, the first SIGINT or SIGTERM is only noted, in `caught`; a second one acts as it would outside.

    Signals that are ignored outside stay so. Python has handlers in the main thread alone: elsewhere, or
    where not `wanted`, nothing changes.
    """

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted and threading.current_thread() is threading.main_thread()
        self.caught: int | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in (signal.SIGINT, signal.SIGTERM) if self.wanted else ():
            if signal.getsignal(number) is not signal.SIG_IGN:
                self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        while self.before:
            signal.signal(*self.before.popitem())

    def _note(self, number: int, _: object) -> None:
        self.caught = number
        self.__exit__()

    def heed(self, where: str) -> None:
        """Raises Interrupted where a signal was caught. where: the place and what is kept there."""
        if self.caught is not None:
            name = signal.Signals(self.caught).name
            raise Interrupted(f"{name} {where}; run the same again to go on from there", self.caught)
