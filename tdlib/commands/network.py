"""Look at networks and methods: ``tdlib methods``, ``tdlib count``, ``tdlib plan``, ``tdlib compare``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .common import DebugOption, JsonOption, UsageError, open_model, parse_settings, shape_of

ModelArgument = Annotated[
    str, typer.Argument(help="A model name (resnet20, torchvision:resnet18, timm:NAME) or a file.")
]
ClassesOption = Annotated[int, typer.Option(help="Number of classes of a model given by name.")]
ShapeOption = Annotated[
    str | None, typer.Option(help="One input: channels,height,width, for example 3,32,32.")
]
WeightsOption = Annotated[
    str | None, typer.Option(help="Weights of a model given by name: a file or torchvision's name.")
]
ByOption = Annotated[str, typer.Option(help="What the ratio counts: params or macs.")]


def methods(as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """The compression methods: paper, what each needs, formats.

    \b
    Examples:
      tdlib methods
    """
    from tdlib.methods import available

    frame = available()
    if as_json:
        typer.echo(frame.to_json(orient="index"))
        return
    for name, row in frame.iterrows():
        typer.echo(f"{name}")
        for column, value in row.items():
            typer.echo(f"  {column:<9} {'yes' if value is True else 'no' if value is False else value}")


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

    shape = parse_or_none(input_shape)
    network = open_model(model, classes, input_shape=shape)
    cost = tdlib.count(network, shape_of(network, input_shape))
    typer.echo(cost.to_frame().to_json(orient="records") if as_json else str(cost))


def plan(
    model: ModelArgument,
    ratio: Annotated[float, typer.Option(help="Dense / compressed; above 1 is smaller.")] = 2.0,
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
        list[str] | None, typer.Option("--set", help="Option of the format, or multiple=16: key=value.")
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

    shape = parse_or_none(input_shape)
    network = open_model(model, classes, weights=weights, input_shape=shape)
    found = tdlib.plan(
        network, shape_of(network, input_shape), format=format, ratio=ratio, by=by, rule=rule,
        skip=tuple(skip or ()), **parse_settings(settings or ()),
    )  # fmt: skip
    typer.echo(json.dumps(found.to_dict()) if as_json else str(found))


def compare(
    dense: Annotated[Path, typer.Argument(help="File of the dense network.")],
    compressed: Annotated[Path, typer.Argument(help="File of the compressed network.")],
    input_shape: ShapeOption = None,
    batch: Annotated[int, typer.Option(help="Inputs per measured forward pass.")] = 1,
    repeats: Annotated[int, typer.Option(help="Forward passes that the median is taken of.")] = 20,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Parameters, MACs, bytes on disk and measured latency of two saved networks.

    \b
    Examples:
      tdlib compare dense.safetensors small.safetensors
    """
    import tdlib

    if batch < 1 or repeats < 1:
        raise UsageError("--batch and --repeats must be at least 1")
    before, after = open_model(str(dense)), open_model(str(compressed))
    shape = shape_of(before, input_shape)
    result = tdlib.compare(before, after, shape, batch=batch, repeats=repeats)
    typer.echo(result.to_frame().to_json(orient="records") if as_json else str(result))


def parse_or_none(text: str | None) -> tuple[int, ...] | None:
    """The written input shape, or None."""
    from .common import parse_shape

    return None if text is None else parse_shape(text)
