"""The errors tdlib raises: each names the wrong value, what was expected, and how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TdlibError(ValueError):
    """Base class: bad input, detected before anything was changed."""


class RankError(TdlibError):
    """A rank that is no positive integer, or of the wrong count for its format."""


class BudgetError(TdlibError):
    """A compression ratio that the model, format and skip list cannot reach."""


class DataError(TdlibError):
    """Missing, malformed or inconsistent data."""


class CheckpointError(TdlibError):
    """A checkpoint or saved model that is corrupt, foreign, or cannot be written."""


class NonFiniteError(TdlibError):
    """NaN or infinity in weights, activations or the loss."""


class UnknownName(TdlibError):
    """A name that is not in a table of valid names."""


def unknown(kind: str, name: object, valid: Iterable[str]) -> UnknownName:
    """The error for an unknown ``name``: lists the ``valid`` ones and suggests the closest.

    Returned rather than raised, so that call sites read ``raise unknown("format", name, FORMATS)``.
    """
    names = sorted(str(v) for v in valid)
    close = difflib.get_close_matches(str(name), names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return UnknownName(f"unknown {kind} {str(name)!r}{hint} (valid: {', '.join(names) or 'none'})")
