"""Look at methods and networks: `tdlib methods`, `tdlib count`, `tdlib plan`, `tdlib compare`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from textwrap import indent
from typing import Annotated, Any

import typer

from tdlib.cli.common import (
    MODEL_HELP,
    ByOption,
    DebugOption,
    JsonOption,
    UsageError,
    WeightsOption,
    open_model,
    parse_settings,
    parse_shape,
    remembered,
)
from tdlib.errors import unknown

ModelArgument = Annotated[str, typer.Argument(help=MODEL_HELP)]
FileArgument = Annotated[
    Path, typer.Argument(help="A network that tdlib saved.", exists=True, dir_okay=False)
]
ClassesOption = Annotated[int, typer.Option(help="Number of classes of a model given by name.")]
ShapeOption = Annotated[
    str | None, typer.Option(help="One input: channels,height,width, for example 3,32,32.")
]


def methods(as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """The compression methods: paper, what each needs, formats.

    \b
    Examples:
      tdlib methods
    """
    from tabulate import tabulate

    from tdlib.methods import METHODS

    rows = {name: row.about for name, row in METHODS.items()}
    if as_json:
        typer.echo(json.dumps(rows))
        return
    for name, cells in rows.items():
        cells["labels"] = "yes" if cells["labels"] else "no"
        typer.echo(name + "\n" + indent(tabulate(cells.items(), tablefmt="plain"), "  "))


def count(
    model: ModelArgument,
    classes: ClassesOption = 10,
    input_shape: ShapeOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Parameters and MACs of a network, layer by layer.

    \b
    Examples:
      tdlib count resnet20 --classes 10 --input-shape 3,32,32
      tdlib count dense.safetensors
    """
    import tdlib

    shape = None if input_shape is None else parse_shape(input_shape)
    network = open_model(model, classes, input_shape=shape)
    cost = tdlib.count(network, shape or remembered_shape(network))
    if not as_json:
        typer.echo(str(cost))
        return
    rows = [{key: value for key, value in asdict(row).items() if key != "calls"} for row in cost.layers]
    typer.echo(json.dumps(rows))


def plan(
    model: ModelArgument,
    ratio: Annotated[
        float | None, typer.Option(help="Dense / compressed; 2 where neither this nor energy is set.")
    ] = None,
    by: ByOption = "params",
    format: Annotated[str, typer.Option(help="tt, tucker2, cp, cp4, svd, tr or tt-matrix.")] = "tt",
    rule: Annotated[
        str, typer.Option(help="How ranks are shared out: uniform, energy, evbmf or global.")
    ] = "uniform",
    skip: Annotated[
        list[str] | None, typer.Option(help="Layer name or pattern (layer4.*) that stays dense.")
    ] = None,
    classes: ClassesOption = 10,
    input_shape: ShapeOption = None,
    weights: WeightsOption = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Option of the format, multiple=16 or energy=0.9: key=value."),
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """The ranks that reach a ratio, and which layers stay dense and why; nothing is decomposed.

    \b
    Examples:
      tdlib plan resnet20 --classes 10 --input-shape 3,32,32 --format tt --ratio 2.4
      tdlib plan dense.safetensors --format tucker2 --ratio 2 --by macs --skip conv1 --set multiple=4
    """
    import tdlib
    from tdlib.formats import get_format
    from tdlib.methods.kinds import check_kinds

    shape = None if input_shape is None else parse_shape(input_shape)
    network = open_model(model, classes, weights, shape)
    given = parse_settings(settings or ())
    valid = ("energy", "multiple", *get_format(format).options)
    for name in given:
        if name not in valid:
            raise unknown(f"setting for format {format!r}", name, valid)
    check_kinds([tdlib.plan], given)
    if ratio is None and "energy" not in given:
        ratio = 2.0
    found = tdlib.plan(
        network, shape or remembered_shape(network), format=format, ratio=ratio, by=by, rule=rule,
        skip=skip or (), **given,
    )  # fmt: skip
    typer.echo(json.dumps(found.to_dict()) if as_json else str(found))


def compare(
    dense: FileArgument,
    compressed: FileArgument,
    input_shape: ShapeOption = None,
    batch: Annotated[int, typer.Option(min=1, help="Inputs per measured forward pass.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Forward passes that the median is taken of.")] = 20,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Parameters, MACs, bytes on disk and measured latency of two saved networks.

    \b
    Examples:
      tdlib compare dense.safetensors small.safetensors
    """
    import tdlib

    shape = None if input_shape is None else parse_shape(input_shape)
    before, after = tdlib.load(dense), tdlib.load(compressed)
    result = tdlib.compare(before, after, shape or remembered_shape(before), batch=batch, repeats=repeats)
    typer.echo(json.dumps(result.rows) if as_json else str(result))


def remembered_shape(network: Any) -> tuple[int, ...]:
    """The input shape that the network was trained or built for. Raises: UsageError where it names none."""
    inputs = remembered(network)
    if not inputs:
        raise UsageError("this model does not say what it takes; give --input-shape, for example 3,32,32")
    return tuple(inputs["input_shape"])
