"""`tdlib compress`: from a network and a data set to a smaller network, with what it gained and cost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from tdlib.cli import checks
from tdlib.cli.common import (
    MODEL_HELP,
    ByOption,
    DebugOption,
    RatioOption,
    UsageError,
    WeightsOption,
    is_file,
    note,
    open_model,
    parse_settings,
    remembered,
)
from tdlib.errors import ClassCountError, needs

TRAIN_HELP = "Train (or fine-tune) the dense network for this many epochs first."
CLASSES_HELP = "Number of classes of a model given by name, where the images have no labels."
MEAN_HELP = "Normalisation of the pixels (0 to 1): one number per channel, as 0.5,0.5,0.5."
RULE_HELP = "How ranks are shared out: as in `tdlib plan`, for iterative vbmf or nx; default: the method's."


def compress(
    model: Annotated[str, typer.Option(help=MODEL_HELP)],
    data: Annotated[str, typer.Option(help="digits, cifar10, ..., imagefolder:PATH or npz:PATH.")],
    out: Annotated[Path, typer.Option(help="The compressed network, *.safetensors.")],
    method: Annotated[str, typer.Option(help="A name from `tdlib methods`.")] = "sequential",
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
    classes: Annotated[int | None, typer.Option(min=1, help=CLASSES_HELP)] = None,
    train_epochs: Annotated[int, typer.Option(min=0, help=TRAIN_HELP)] = 0,
    train_lr: Annotated[float, typer.Option(help="Learning rate of that training.")] = 0.05,
    data_root: Annotated[
        Path | None, typer.Option(help="Folder of named data sets (else TDLIB_DATA).")
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="Side that images are brought to.")] = None,
    mean: Annotated[str | None, typer.Option(help=MEAN_HELP)] = None,
    std: Annotated[str | None, typer.Option(help="Standard deviation, as --mean.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use at most this many images of each split.")] = None,
    onnx: Annotated[Path | None, typer.Option(help="Also write the compressed network as ONNX.")] = None,
    dense_out: Annotated[
        Path | None, typer.Option(help="Also write the dense network; after training: OUT-dense.safetensors.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    force: Annotated[bool, typer.Option("--force", help="Overwrite output files that exist.")] = False,
    debug: DebugOption = False,
) -> None:
    """Compress a network on your data and print what was gained and lost.

    Methods that train need labels. Methods that do not (direct, distribution-aware, sequential) want a
    trained network: give --weights or a file, or let --train-epochs train it here. They also take a folder of
    images alone, and then measure how often both networks answer alike instead of accuracies.

    A network that was trained by tdlib, torchvision or timm says what it was trained on: classes, image size,
    normalisation. That is what the data are brought to; --image-size, --mean and --std are for others.

    --set checkpoint=DIR keeps what was trained: stopped (Ctrl-C, kill), the same command with --force goes on
    from there.

    distribution-aware is the method of its paper. sequential, the default, is this project's own and goes
    three steps beyond it: it cuts ranks where that does least harm, weighs the layers' outputs and fits the
    layers in sequence.

    \b
    Examples:
      tdlib compress --model dense.safetensors --data imagefolder:photos --method direct --format tucker2 \\
          --ratio 2 --by macs --out small.safetensors --onnx small.onnx
      tdlib compress --model dense.safetensors --data imagefolder:unsorted --method sequential \\
          --ratio 2 --by macs --out unlabelled.safetensors
      tdlib compress --model cnn --train-epochs 2 --data imagefolder:photos --image-size 16 \\
          --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5 --set checkpoint=run \\
          --method sequential --ratio 2 --dense-out trained.safetensors --out sequential.safetensors
      tdlib compress --model dense.safetensors --data imagefolder:photos --method distribution-aware \\
          --ratio 2 --by macs --out paper.safetensors
      tdlib compress --model cnn --train-epochs 2 --data npz:scans.npz --method admm --ratio 1.5 \\
          --set epochs=1 --set finetune_epochs=1 --out admm.safetensors
    """
    if train_epochs and dense_out is None:
        dense_out = out.with_name(f"{out.stem}-dense.safetensors")
    outputs = [path for path in (out, onnx, dense_out) if path is not None]
    checks.outputs(outputs, onnx, force)
    if not 1 < ratio < math.inf:
        raise UsageError(f"--ratio {ratio:g}: dense / compressed must be a number above 1")
    hyper = parse_settings(settings or ())

    import torch

    import tdlib
    from tdlib import train

    checks.names(method, format, by, rule, hyper)
    checks.device(device)
    for package in ("onnx", "onnxscript", "onnxruntime") if onnx else ():
        needs(package, "onnx")
    dense = open_model(model, 0, weights) if is_file(model) else None
    inputs = remembered(dense) if dense is not None else tdlib.models.inputs_of(model, weights)
    asked = {"image_size": image_size, "mean": mean, "std": std}
    bundle = open_data(data, inputs, asked, root=data_root, seed=seed, limit=limit)
    kinds = f"{len(bundle.classes)} classes" if bundle.classes else "no labels"
    note(f"data: {data}, {len(bundle.train)} training and {len(bundle.test)} test inputs, {kinds}")
    note(f"inputs: {described(bundle, inputs, weights or model if dense or weights else '')}")
    checks.data(bundle, method, train_epochs, hyper, classes, named=dense is None)
    if not train_epochs:
        checks.same(bundle, inputs, weights or model)

    torch.manual_seed(seed)  # weights that are drawn
    try:
        dense = dense or open_model(
            model, bundle.classes or classes or 0, weights, bundle.input_shape, new_head=train_epochs > 0
        )
    except ClassCountError as error:
        if not bundle.classes:
            mend = f"the weights of {model} are for {error.have} classes: --classes {error.have}"
            raise UsageError(mend) from error
        raise UsageError(
            f"the weights of {model} are for {error.have} classes, the data have {error.want}; "
            "--train-epochs N starts from these weights with a fresh last layer and trains it on yours"
        ) from error
    dense.to(device)
    checks.fits(dense, bundle, model)
    kept = hyper.get("checkpoint")
    if train_epochs and not checks.trains(method, hyper):
        hyper.pop("checkpoint", None)  # all the training there is comes before the method
    request: dict[str, Any] = {"ratio": ratio, "by": by, "format": format, "rule": rule}
    request |= {"seed": seed, "device": device, **hyper}
    tdlib.methods.check(dense, method, bundle, **request)
    checks.space(outputs, dense)

    with going_on(kept, dense_out if train_epochs else None):
        if train_epochs:
            note(f"training the dense network for {train_epochs} epochs")
            folder = None if kept is None else Path(str(kept)) / "dense"
            train.fit(
                dense, bundle, epochs=train_epochs, lr=train_lr, seed=seed, device=device, checkpoint=folder
            )
            checks.trained(dense, bundle, train_lr)
        elif weights is None and not is_file(model):
            note("warning: the network has random weights; give --weights or --train-epochs")
        remember(dense, bundle)
        if dense_out is not None:
            tdlib.save(dense, dense_out)
            note(f"written: {dense_out}, the dense network")
        small = tdlib.compress(dense, method, bundle, **request)
    tdlib.save(small, out)
    typer.echo(before_after(dense, small, bundle))
    note(f"{method}: {tdlib.provenance(small).report['seconds']:.1f} s")
    if onnx is not None:
        difference = tdlib.export.to_onnx(small, onnx, bundle.input_shape)
        note(f"ONNX: {onnx}, outputs equal to PyTorch's within {difference:.1e}")
    note(f"written: {', '.join(map(str, outputs))}")


def open_data(data: str, inputs: dict[str, Any] | None, asked: dict[str, Any], **source: Any) -> Any:
    """The data set, its images as `asked` or else as the network knows them from its training."""
    import tdlib

    known = dict(inputs or {})
    known.pop("classes", None)
    shape = known.pop("input_shape", ())
    if len(shape) == 3 and shape[1] == shape[2]:
        known["image_size"] = shape[1]
    given = {name: value for name, value in asked.items() if value is not None}
    return tdlib.data.load(data, **source, **{**known, **given})


def described(bundle: Any, inputs: dict[str, Any] | None, name: str) -> str:
    """The images as the network gets them, and whether it was trained so; name: of what was trained."""
    about = bundle.description
    shape, mean, std = (checks.shown(about[key]) for key in ("input_shape", "mean", "std"))
    text = f"{shape}, mean {mean}, std {std}, {about['interpolation']}"
    if not name:
        return text
    if not inputs or "mean" not in inputs:
        return f"{text}; {name} does not say what it was trained on"
    same = all(inputs[key] == about[key] for key in ("input_shape", "mean", "std", "interpolation"))
    return f"{text}; {name} was trained {'so' if same else 'otherwise'}"


def remember(network: Any, bundle: Any) -> None:
    """Note in the network what data it was used with; class names that it knows stay where there are no
    labels.
    """
    from tdlib.network import attach, provenance

    about = provenance(network)
    classes = bundle.description["classes"] or (about.inputs or {}).get("classes")
    about.inputs = bundle.description | {"classes": classes}
    attach(network, about)


@contextmanager
def going_on(checkpoint: str | None, dense: Path | None) -> Iterator[None]:
    """Says how to go on where the work inside is interrupted. dense: the file that training ends in."""
    try:
        yield
    except KeyboardInterrupt:
        if checkpoint is not None:
            note(f"kept in {checkpoint}: the same command with --force goes on from there")
        elif dense is not None and dense.is_file():
            note(f"kept in {dense}: --model {dense} without --train-epochs goes on from there")
        else:
            note("nothing was kept; --set checkpoint=DIR keeps what is trained")
        raise


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
    if bundle.classes:
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
