"""`tdlib compress`: from a network and a data set to a smaller network, with what it gained and cost."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from tdlib.cli.common import (
    MODEL_HELP,
    ByOption,
    DebugOption,
    RatioOption,
    UsageError,
    WeightsOption,
    open_model,
    parse_settings,
)
from tdlib.errors import ClassCountError, unknown

TRAIN_HELP = "Train (or fine-tune) the dense network for this many epochs first."
RULE_HELP = "How ranks are shared out: as in `tdlib plan`, for iterative vbmf or nx; default: the method's."
SETTINGS = ("skip", "options", "finetune_epochs", "finetune_lr", "progress")  # of tdlib.compress, for --set


def compress(
    model: Annotated[str, typer.Option(help=MODEL_HELP)],
    data: Annotated[str, typer.Option(help="digits, cifar10, ..., imagefolder:PATH or npz:PATH.")],
    out: Annotated[Path, typer.Option(help="The compressed network, *.safetensors.")],
    method: Annotated[str, typer.Option(help="A name from `tdlib methods`.")] = "distribution-aware",
    ratio: RatioOption = 2.0,
    by: ByOption = "params",
    format: Annotated[
        str | None, typer.Option(help="Decomposition; the method's own choice where not given.")
    ] = None,
    rule: Annotated[str | None, typer.Option(help=RULE_HELP)] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Hyper-parameter of the method: key=value.")
    ] = None,
    weights: WeightsOption = None,
    train_epochs: Annotated[int, typer.Option(min=0, help=TRAIN_HELP)] = 0,
    train_lr: Annotated[float, typer.Option(help="Learning rate of that training.")] = 0.05,
    data_root: Annotated[
        Path | None, typer.Option(help="Folder of named data sets (else TDLIB_DATA).")
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="Side that images are brought to.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use at most this many images of each split.")] = None,
    onnx: Annotated[Path | None, typer.Option(help="Also write the compressed network as ONNX.")] = None,
    dense_out: Annotated[
        Path | None, typer.Option(help="Also write the dense network, *.safetensors.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    force: Annotated[bool, typer.Option("--force", help="Overwrite output files that exist.")] = False,
    debug: DebugOption = False,
) -> None:
    """Compress a network on your data and print what was gained and lost.

    Methods that train need labels. Methods that do not (direct, distribution-aware) want a trained network:
    give --weights or a file, or let --train-epochs train it here.

    distribution-aware goes three steps beyond its paper: it gives ranks where they do least harm, weighs the
    layers' outputs and fits the layers in sequence. The paper's own method is
    --rule uniform --set weigh_outputs=false --set sequential=false.

    \b
    Examples:
      tdlib compress --model dense.safetensors --data imagefolder:photos --method direct --format tucker2 \\
          --ratio 2 --by macs --out small.safetensors --onnx small.onnx
      tdlib compress --model cnn --train-epochs 2 --data imagefolder:photos --image-size 16 \\
          --method distribution-aware --ratio 2 --dense-out trained.safetensors --out sigma.safetensors
      tdlib compress --model dense.safetensors --data imagefolder:photos --method distribution-aware \\
          --rule uniform --set weigh_outputs=false --set sequential=false --out paper.safetensors
      tdlib compress --model cnn --train-epochs 2 --data npz:scans.npz --method admm --ratio 1.5 \\
          --set epochs=1 --set finetune_epochs=1 --out admm.safetensors
    """
    outputs = [path for path in (out, onnx, dense_out) if path is not None]
    check_outputs(outputs, force)
    if ratio <= 1:
        raise UsageError(f"--ratio {ratio:g}: dense / compressed must be above 1")
    hyper = parse_settings(settings or ())

    import torch

    import tdlib
    from tdlib import train

    check_names(method, format, by, rule, hyper)
    check_device(device)
    bundle = tdlib.data.load(data, data_root, seed=seed, image_size=image_size, limit=limit)
    sizes = f"{len(bundle.train)} training and {len(bundle.test)} test inputs"
    note(f"data: {data}, {sizes}, {len(bundle.classes)} classes")

    torch.manual_seed(seed)  # weights that are drawn
    try:
        dense = open_model(model, bundle.classes, weights, bundle.input_shape, new_head=train_epochs > 0)
    except ClassCountError as error:
        raise UsageError(
            f"the weights of {model} are for {error.have} classes, the data have {error.want}; "
            "--train-epochs N starts from these weights with a fresh last layer and trains it on yours"
        ) from error
    dense.to(device)
    check_fits(dense, bundle, model)
    if train_epochs:
        note(f"training the dense network for {train_epochs} epochs")
        train.fit(dense, bundle, epochs=train_epochs, lr=train_lr, seed=seed, device=device)
    elif weights is None and Path(model).suffix != ".safetensors":
        note("warning: the network has random weights; give --weights or --train-epochs")
    if dense_out is not None:
        tdlib.save(dense, dense_out)

    small = tdlib.compress(
        dense, method, bundle, ratio=ratio, by=by, format=format, rule=rule, seed=seed, device=device, **hyper
    )
    tdlib.save(small, out)
    typer.echo(before_after(dense, small, bundle))
    note(f"{method}: {tdlib.provenance(small).report['seconds']:.1f} s")
    if onnx is not None:
        difference = tdlib.export.to_onnx(small, onnx, bundle.input_shape)
        note(f"ONNX: {onnx}, outputs equal to PyTorch's within {difference:.1e}")
    note(f"written: {', '.join(map(str, outputs))}")


def before_after(dense: Any, small: Any, bundle: Any) -> str:
    """Table of both networks: parameters, MACs, the accuracies that `tdlib.compress` measured, agreement."""
    from tabulate import tabulate

    import tdlib
    from tdlib import train

    costs = [tdlib.count(network, bundle.input_shape) for network in (dense, small)]
    report = tdlib.provenance(small).report
    rows = [
        compared("parameters without BatchNorm", *(cost.weights for cost in costs)),
        compared("all parameters", *(cost.params for cost in costs)),
        compared("MACs of one input", *(cost.macs for cost in costs)),
    ]
    whole, before, after = (report[stage]["test"] for stage in ("dense", "before", "after"))
    stages = {"test accuracy before fine-tuning, %": before} if before != after else {}
    for name, accuracy in {**stages, "test accuracy, %": after}.items():
        rows.append([name, f"{whole:.2f}", f"{accuracy:.2f}", f"{accuracy - whole:+.2f}"])
    same = train.agreement(dense, small, bundle, "test")["agreement"]
    rows.append(["same prediction as dense, %", "", f"{same:.2f}", ""])
    head, align = ("", "dense", "compressed", "ratio"), ("left", "right", "right", "right")
    table = tabulate(rows, head, disable_numparse=True, colalign=align)
    return f"{table}\n({len(bundle.test)} test inputs)"


def compared(name: str, dense: int, compressed: int) -> list[str]:
    """A row of the table: both counts and dense / compressed."""
    return [name, f"{dense:,}", f"{compressed:,}", f"{dense / max(compressed, 1):.2f}x"]


def check_outputs(paths: list[Path], force: bool) -> None:
    """Refuse, before any work is done, outputs that exist, cannot be written or are the same file.

    Raises UsageError.
    """
    for path in paths:
        if path.exists() and not force:
            raise UsageError(f"{path} exists; --force overwrites it")
        if not path.parent.is_dir():
            raise UsageError(f"the folder of {path} does not exist")
        if not os.access(path.parent, os.W_OK):
            raise UsageError(f"the folder of {path} is not writable")
    if len({path.resolve() for path in paths}) < len(paths):
        raise UsageError("--out, --onnx and --dense-out must be different files")


def check_names(
    method: str, format: str | None, by: str, rule: str | None, hyper: dict[str, Any]
) -> None:
    """Stop on a wrong name before data are read. Raises UnknownName."""
    from tdlib.methods import METHODS, hyperparameters
    from tdlib.planning.rules import RULES

    valid = (*hyperparameters(method), *SETTINGS)
    for name in hyper:
        if name not in valid:
            raise unknown(f"hyper-parameter of {method!r}", name, valid)
    if format is not None and format not in METHODS[method].choices:
        raise unknown(f"format of {method!r}", format, METHODS[method].choices)
    if by not in ("params", "macs"):
        raise unknown("ratio kind", by, ("params", "macs"))
    if rule is not None and rule not in RULES:
        raise unknown("rule", rule, RULES)


def check_fits(network: Any, bundle: Any, name: str) -> None:
    """Raises UsageError where the network does not take these images or has another number of classes."""
    import torch

    from tdlib.train import inference

    try:
        with inference(network):
            example = torch.zeros(2, *bundle.input_shape, device=next(network.parameters()).device)
            outputs = network(example).shape[-1]
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{name} does not take images of shape {bundle.input_shape}: {reason}") from error
    if outputs != len(bundle.classes):
        raise UsageError(f"{name} has {outputs} outputs, the data have {len(bundle.classes)} classes")


def check_device(device: str) -> None:
    """Raises UsageError for a device that this machine lacks."""
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device}: not available here ({str(error).splitlines()[0]})") from error


def note(text: str) -> None:
    """Progress goes to stderr, results to stdout."""
    typer.echo(text, err=True)
