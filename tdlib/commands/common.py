"""What the commands share: options, parsing of values, checks of output files, tables, error lines."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tdlib.errors import DataError, TdlibError, UnknownName

CLICK_ERROR: type[Exception] = typer.BadParameter.__mro__[2]  # ClickException, wherever click is
_state = {"debug": False}


def _set_debug(value: bool) -> bool:
    if value:
        _state["debug"] = True
    return value


DebugOption = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error.", callback=_set_debug)
]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite output files that exist.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


class UsageError(TdlibError):
    """The command line asks for something that cannot be started (exit code 2)."""


def debugging() -> bool:
    """Whether --debug was given."""
    return _state["debug"]


def reset() -> None:
    """Forget --debug (several commands may run in one process)."""
    _state["debug"] = False


def exit_code(error: Exception) -> int | None:
    """2 for a wrong command line, 1 for a failure, None where typer itself reports the error."""
    if isinstance(error, CLICK_ERROR | typer.Exit | typer.Abort):
        return None
    return 2 if isinstance(error, UsageError | UnknownName | FileNotFoundError) else 1


def error_line(error: Exception) -> str:
    """One line that says what went wrong; foreign errors carry their type and the hint to --debug."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, TdlibError):
        return f"error: {text}"
    return f"error: {type(error).__name__}: {text} (--debug shows where)"


def parse_shape(text: str) -> tuple[int, ...]:
    """``3,32,32`` or ``3x32x32`` -> (3, 32, 32)."""
    try:
        shape = tuple(int(part) for part in text.lower().replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise UsageError(f"--input-shape {text!r}: give channels,height,width, for example 3,32,32")
    return shape


def parse_value(text: str) -> Any:
    """A number, true/false/null, a JSON list or table, else the text itself."""
    words = {"none": None, "null": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return float(text)  # .5, 1e-3
    except ValueError:
        return text


def parse_settings(pairs: Iterable[str]) -> dict[str, Any]:
    """``["epochs=3", "rho=1e-3"]`` -> {"epochs": 3, "rho": 0.001}."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key.isidentifier():
            raise UsageError(f"--set {pair!r}: write key=value")
        settings[key] = parse_value(value)
    return settings


def check_output(path: Path | None, force: bool) -> None:
    """Refuse, before any work is done, an output that exists or cannot be written."""
    if path is None:
        return
    if path.exists() and not force:
        raise UsageError(f"{path} exists; --force overwrites it")
    folder = path.parent
    if not folder.is_dir():
        raise UsageError(f"the folder of {path} does not exist")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"the folder of {path} is not writable")


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Aligned text table; numbers to the right, the first column to the left."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        rest = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "  ".join([row[0].ljust(widths[0]), *rest]).rstrip()

    return "\n".join([line(cells[0]), "  ".join("-" * width for width in widths), *map(line, cells[1:])])


def open_model(
    model: str,
    classes: int | Sequence[str] | None = None,
    *,
    weights: str | None = None,
    input_shape: Sequence[int] | None = None,
    new_head: bool = False,
) -> Any:
    """A network from a file that tdlib wrote (``small.safetensors``), or by name (``timm:NAME``)."""
    import tdlib

    path = Path(model)
    if path.suffix == ".safetensors" or path.is_file():
        if not path.is_file():
            raise UsageError(f"model file {path} does not exist")
        if weights is not None:
            raise UsageError("--weights goes with a model name; a model file brings its own")
        return tdlib.load(path)
    if classes is None:
        raise UsageError(f"--classes is needed to build {model!r}")
    if weights is not None and Path(weights).suffix and not Path(weights).expanduser().is_file():
        raise DataError(f"weight file {weights} does not exist")
    return tdlib.models.build(model, classes, input_shape=input_shape, weights=weights, new_head=new_head)


def shape_of(model: Any, text: str | None) -> tuple[int, ...]:
    """The input shape: what the user wrote, else what the model's file remembers. Raises UsageError."""
    if text is not None:
        return parse_shape(text)
    spec = (getattr(model, "_tdlib", None) or {}).get("spec") or {}
    remembered = spec.get("kwargs", {}).get("input_shape")
    if remembered:
        return tuple(int(n) for n in remembered)
    raise UsageError("this model does not say what it takes; give --input-shape, for example 3,32,32")
