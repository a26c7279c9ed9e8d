"""Options of ``fit`` that are passed on by methods of several stages."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tdlib.errors import TdlibError, unknown
from tdlib.train.loop import fit
from tdlib.train.run import History


def training_options(given: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    """``given`` with ``defaults`` for what it leaves out. Raises UnknownName for what is no option of
    ``fit``.
    """
    valid = list(inspect.signature(fit).parameters)[2:]
    for name in given:
        if name not in valid:
            raise unknown("training option", name, valid)
    return {**defaults, **given}


def stage(training: Mapping[str, Any], name: str, started: float) -> dict[str, Any]:
    """The options for one stage of several: its own checkpoint folder ``name``, and what is left of
    ``max_minutes`` since ``started`` (of ``time.perf_counter()``).
    """
    options = dict(training)
    if options.get("checkpoint") is not None:
        options["checkpoint"] = Path(options["checkpoint"]) / name
    if options.get("max_minutes") is not None:
        options["max_minutes"] = max(0.01, options["max_minutes"] - (time.perf_counter() - started) / 60)
    return options


def require_finished(history: History) -> None:
    """Raises TdlibError where the time limit came before the end of this stage."""
    if not history.finished:
        raise TdlibError(
            f"the time limit came after {len(history.rows)} epochs of this stage; "
            "start the same run again with the same checkpoint directory to continue"
        )
