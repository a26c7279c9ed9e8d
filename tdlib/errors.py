"""The library's named errors: each says what was found, what was expected and how to mend it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from typing import Any

__all__ = [
    "BudgetError",
    "CheckpointError",
    "ClassCountError",
    "DataError",
    "FileError",
    "Interrupted",
    "MemoryLimitError",
    "NonFiniteError",
    "RankError",
    "TdlibError",
    "UnknownName",
    "needs",
    "unknown",
]


class TdlibError(ValueError):
    """Root of every error that tdlib raises on purpose."""


class RankError(TdlibError):
    """A rank or a list of ranks that no decomposition can have (below 1, not whole, wrong count)."""


class BudgetError(TdlibError):
    """A compression ratio that cannot be reached; the message names the best reachable one."""


class DataError(TdlibError):
    """A data set that is missing, misshapen or inconsistent."""


class ClassCountError(DataError):
    """Weights of another number of classes than the network; `have` and `want` are the two numbers."""

    def __init__(self, source: str, have: int, want: int) -> None:
        super().__init__(
            f"{source} is for {have} classes, the model has {want}: build it with classes={have}, or pass "
            "new_head=True to start from a fresh last layer"
        )
        self.have, self.want = have, want


class CheckpointError(TdlibError):
    """A checkpoint or saved model that is corrupt, foreign or of another run."""


class FileError(TdlibError):
    """A file that cannot be written: no such folder, read-only, disk full."""


class MemoryLimitError(TdlibError):
    """Work that would take more memory than there is; the message says which part and what to do."""


class NonFiniteError(TdlibError):
    """NaN or infinity where a number was needed (weights, loss, statistics)."""


class UnknownName(TdlibError):
    """A name that is not in a table; the message lists the valid ones."""


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM (its number in `signal`) came, and a checkpoint was written; the message says how to
    go on. No TdlibError, for like any KeyboardInterrupt it has to pass `except Exception`.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def unknown(kind: str, name: object, valid: Iterable[str]) -> UnknownName:
    """The error to raise for `name`: the closest and all `valid` names of this `kind` (of more than 100, the
    nearest five).

    >>> raise unknown("format", "tuker2", ["tt", "tucker2"])  # doctest: +SKIP
    """
    names = sorted(valid)
    close = get_close_matches(str(name), names, n=5)
    if len(names) > 100:
        return UnknownName(
            f"unknown {kind} {name!r}. Nearest of the {len(names)}: {', '.join(close) or 'none'}."
        )
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return UnknownName(f"unknown {kind} {name!r}.{hint} Valid names: {', '.join(names) or 'none'}.")


def needs(package: str, extra: str) -> Any:
    """The imported `package`, which comes with an extra of tdlib. Raises TdlibError naming the `extra`."""
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        raise TdlibError(
            f"this needs {package.partition('.')[0]}, which is not installed: pip install 'tdlib[{extra}]'"
        ) from error
