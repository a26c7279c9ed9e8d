"""What the commands share: options, how values are read, opening a network."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from tdlib.errors import TdlibError

MODEL_HELP = "A name (resnet20, torchvision:resnet18, timm:NAME) or a file."


def _debug(ctx: typer.Context, value: bool) -> None:
    if value:
        ctx.meta["debug"] = True  # shared by a command and what it is a command of


DebugOption = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error.", callback=_debug)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
RatioOption = Annotated[float, typer.Option(help="Dense / compressed; above 1 is smaller.")]
ByOption = Annotated[str, typer.Option(help="What the ratio counts: params or macs.")]
WeightsOption = Annotated[
    str | None, typer.Option(help="Weights of a model given by name: a file, or DEFAULT.")
]


class UsageError(TdlibError):
    """The command line asks for something that cannot be started (exit code 2)."""


def parse_shape(text: str) -> tuple[int, ...]:
    """`3,32,32` or `3x32x32` -> (3, 32, 32). Raises: UsageError."""
    try:
        shape = tuple(int(part) for part in text.lower().replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise UsageError(f"--input-shape {text!r}: give channels,height,width, for example 3,32,32")
    return shape


def parse_value(text: str) -> Any:
    """A value written as in JSON (1e-3, true, [8, 4]) or Python (.5, True, None), else the text itself."""
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError):
            return read(text)
    return text


def parse_settings(pairs: Iterable[str]) -> dict[str, Any]:
    """`["epochs=3", "rho=1e-3"]` -> {"epochs": 3, "rho": 0.001}. Raises: UsageError."""
    settings = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key.isidentifier():
            raise UsageError(f"--set {pair!r}: write key=value")
        settings[key] = parse_value(value)
    return settings


def note(text: str) -> None:
    """Progress goes to stderr, results to stdout."""
    typer.echo(text, err=True)


def is_file(model: str) -> bool:
    """Whether a model is meant as a file that tdlib wrote, not as a name."""
    return Path(model).suffix == ".safetensors" or Path(model).is_file()


def remembered(network: Any) -> dict[str, Any] | None:
    """What the network says of its inputs, see `tdlib.Provenance`; at least their shape, if it was built for
    one.
    """
    from tdlib import provenance

    about = provenance(network)
    shape = about.spec and about.spec["kwargs"].get("input_shape")
    return about.inputs or ({"input_shape": list(shape)} if shape else None)


def open_model(
    model: str,
    classes: int | Sequence[str],
    weights: str | None = None,
    input_shape: Sequence[int] | None = None,
    new_head: bool = False,
) -> Any:
    """A network from a file that tdlib wrote (`small.safetensors`), or by name as in `tdlib.models.build`.

    Raises: UsageError for a file that does not exist or comes with weights, and what loading or building
    raises.
    """
    import tdlib

    path = Path(model)
    if not is_file(model):
        return tdlib.models.build(model, classes, input_shape=input_shape, weights=weights, new_head=new_head)
    if not path.is_file():
        raise UsageError(f"model file {path} does not exist")
    if weights is not None:
        raise UsageError("--weights goes with a model name; a model file brings its own")
    return tdlib.load(path)
