"""``tdlib compress``: from a network and a data set to a smaller network, with what it gained and cost."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ClassCountError
from .common import DebugOption, ForceOption, UsageError, check_output, open_model, parse_settings, table

FITS_FIRST = "Train (or fine-tune) the dense network for this many epochs first."


def compress(
    model: Annotated[str, typer.Option(help="A name (resnet20, torchvision:resnet18, timm:NAME) or a file.")],
    data: Annotated[str, typer.Option(help="digits, cifar10, ..., imagefolder:PATH or npz:PATH.")],
    out: Annotated[Path, typer.Option(help="The compressed network, *.safetensors.")],
    method: Annotated[str, typer.Option(help="A name from `tdlib methods`.")] = "distribution-aware",
    ratio: Annotated[float, typer.Option(help="Dense / compressed; above 1 is smaller.")] = 2.0,
    by: Annotated[str, typer.Option(help="What the ratio counts: params or macs.")] = "params",
    format: Annotated[
        str | None, typer.Option(help="Decomposition; the method's own choice where not given.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Hyper-parameter of the method: key=value.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Weights of a model given by name: a file, or DEFAULT.")
    ] = None,
    train_epochs: Annotated[int, typer.Option(min=0, help=FITS_FIRST)] = 0,
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
    force: ForceOption = False,
    debug: DebugOption = False,
) -> None:
    """Compress a network on your data and print what was gained and lost.

    Methods that train need labels. Methods that do not (direct, distribution-aware) want a trained network:
    give --weights or a file, or let --train-epochs train it here.

    \b
    Examples:
      tdlib compress --model dense.safetensors --data imagefolder:photos --method direct --format tucker2 \\
          --ratio 2 --by macs --out small.safetensors --onnx small.onnx
      tdlib compress --model cnn --train-epochs 2 --data imagefolder:photos --image-size 16 \\
          --method distribution-aware --ratio 2 --dense-out trained.safetensors --out sigma.safetensors
      tdlib compress --model cnn --train-epochs 2 --data npz:scans.npz --method admm --ratio 1.5 \\
          --set epochs=1 --set finetune_epochs=1 --out admm.safetensors
    """
    outputs = [path for path in (out, onnx, dense_out) if path is not None]
    for path in outputs:
        check_output(path, force)
    if len({path.resolve() for path in outputs}) < len(outputs):
        raise UsageError("--out, --onnx and --dense-out must be different files")
    if ratio <= 1:
        raise UsageError(f"--ratio {ratio:g}: dense / compressed must be above 1")
    hyper = parse_settings(settings or ()) | ({"format": format} if format else {})

    import tdlib
    from tdlib import methods, train

    check_method(method, by, hyper)
    choose_device(device)
    bundle = tdlib.data.load(data, data_root, seed=seed, image_size=image_size, limit=limit)
    sizes_text = f"{len(bundle.train)} training and {len(bundle.test)} test inputs"
    note(f"data: {data}, {sizes_text}, {len(bundle.classes)} classes")
    seed_all(seed)
    options: dict[str, Any] = {
        "weights": weights,
        "input_shape": bundle.input_shape,
        "new_head": train_epochs > 0,
    }
    try:
        dense = open_model(model, bundle.classes, **options).to(device)
    except ClassCountError as error:
        raise UsageError(
            f"the weights of {model} are for {error.have} classes, the data have {error.want}; "
            "--train-epochs N starts from these weights with a fresh last layer and trains it on yours"
        ) from error
    check_fits(dense, bundle, model)
    if train_epochs:
        note(f"training the dense network for {train_epochs} epochs")
        train.fit(dense, bundle, epochs=train_epochs, lr=train_lr, seed=seed, device=device)
    elif weights is None and Path(model).suffix != ".safetensors":
        note("warning: the network has random weights; give --weights or --train-epochs")

    started = time.perf_counter()
    for name, value in (("device", device), ("progress", True)):
        if name in methods.hyperparameters(method):
            hyper.setdefault(name, value)
    small = tdlib.compress(dense, method, bundle, ratio=ratio, by=by, seed=seed, **hyper)
    seconds = time.perf_counter() - started
    typer.echo(before_after(dense, small, bundle, device))
    note(f"{method}: {seconds:.1f} s")
    if dense_out is not None:
        tdlib.save(dense.cpu(), dense_out)
    if onnx is not None:
        from tdlib.export import to_onnx

        difference = to_onnx(small, onnx, bundle.input_shape)
        note(f"ONNX: {onnx}, outputs equal to PyTorch's within {difference:.1e}")
    tdlib.save(small.cpu(), out)
    note(f"written: {', '.join(map(str, outputs))}")


def before_after(dense: Any, small: Any, bundle: Any, device: str) -> str:
    """Table of both networks: parameters, MACs, test accuracy, agreement."""
    import tdlib
    from tdlib import train

    costs = [tdlib.count(network, bundle.input_shape) for network in (dense, small)]
    tested = [train.evaluate(network, bundle, "test", device=device) for network in (dense, small)]
    accuracy = [result["accuracy"] for result in tested]
    same = train.agreement(dense, small, bundle, "test")
    rows = [
        compared("parameters without BatchNorm", [cost.weights for cost in costs]),
        compared("all parameters", [cost.params for cost in costs]),
        compared("MACs of one input", [cost.macs for cost in costs]),
        ["test accuracy, %", *(f"{value:.2f}" for value in accuracy), f"{accuracy[1] - accuracy[0]:+.2f}"],
        ["same prediction as dense, %", "", f"{same['agreement']:.2f}", ""],
    ]
    return table(["", "dense", "compressed", "ratio"], rows) + f"\n({tested[0]['n']} test inputs)"


def compared(name: str, pair: list[int]) -> list[str]:
    """A row of the table: both counts and dense / compressed."""
    return [name, f"{pair[0]:,}", f"{pair[1]:,}", f"{pair[0] / max(pair[1], 1):.2f}x"]


def check_method(method: str, by: str, hyper: dict[str, Any]) -> None:
    """Stop on a wrong name before data are read. Raises UnknownName."""
    from tdlib import methods
    from tdlib.errors import unknown

    valid = methods.hyperparameters(method)
    for name in hyper:
        if name not in valid:
            raise unknown(f"hyper-parameter of {method!r}", name, valid)
    if by not in ("params", "macs"):
        raise unknown("ratio kind", by, ("params", "macs"))


def check_fits(network: Any, bundle: Any, name: str) -> None:
    """Raises UsageError where the network does not take these images or has another number of classes."""
    import torch

    training = network.training
    try:
        with torch.inference_mode():
            example = torch.zeros(2, *bundle.input_shape, device=next(network.parameters()).device)
            outputs = network.eval()(example).shape[-1]
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{name} does not take images of shape {bundle.input_shape}: {reason}") from error
    finally:
        network.train(training)
    if outputs != len(bundle.classes):
        raise UsageError(f"{name} has {outputs} outputs, the data have {len(bundle.classes)} classes")


def choose_device(device: str) -> None:
    """Raises UsageError for a device that this machine lacks."""
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device}: not available here ({str(error).splitlines()[0]})") from error


def seed_all(seed: int) -> None:
    """Seed torch before a network draws its weights."""
    import torch

    torch.manual_seed(seed)


def note(text: str) -> None:
    """Progress goes to stderr, results to stdout."""
    typer.echo(text, err=True)
