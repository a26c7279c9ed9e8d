"""What `tdlib compress` refuses before it starts, and once training has ended."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

from tdlib.cli.common import UsageError
from tdlib.errors import NonFiniteError, unknown

SETTINGS = ("skip", "options", "finetune_epochs", "finetune_lr", "progress")  # of tdlib.compress, for --set


def outputs(paths: list[Path], onnx: Path | None, force: bool) -> None:
    """Refuse, before any work is done, outputs that exist, cannot be written or are the same file.

    Raises UsageError.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise UsageError("--out, --onnx and --dense-out must be different files")
    for path in paths:
        suffix = ".onnx" if path == onnx else ".safetensors"
        if path.suffix != suffix:
            raise UsageError(f"{path}: the name of this file must end in {suffix}")
        if path.is_dir():
            raise UsageError(f"{path} is a folder")
        if path.exists() and not force:
            raise UsageError(f"{path} exists; --force overwrites it")
        if not path.parent.is_dir():
            raise UsageError(f"the folder of {path} does not exist")
        if not os.access(path.parent, os.W_OK):
            raise UsageError(f"the folder of {path} is not writable")


def names(method: str, format: str | None, by: str, rule: str | None, hyper: dict[str, Any]) -> None:
    """Stop on a wrong name before data are read. Raises UnknownName."""
    from tdlib.methods import METHODS, hyperparameters
    from tdlib.planning import rules, shrinking

    valid = (*hyperparameters(method), *SETTINGS)
    for name in hyper:
        if name not in valid:
            raise unknown(f"hyper-parameter of {method!r}", name, valid)
    if format is not None and format not in METHODS[method].choices:
        raise unknown(f"format of {method!r}", format, METHODS[method].choices)
    if by not in ("params", "macs"):
        raise unknown("ratio kind", by, ("params", "macs"))
    valid = shrinking.RULES if method == "iterative" else tuple(rules.RULES)
    if rule is not None and rule not in valid:
        raise unknown(f"rule of {method!r}", rule, valid)


def device(device: str) -> None:
    """Raises UsageError for a device that this machine lacks."""
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device}: not available here ({str(error).splitlines()[0]})") from error


def data(
    bundle: Any, method: str, epochs: int, hyper: dict[str, Any], classes: int | None, named: bool
) -> None:
    """Refuse, before any work is done, data that lack what is needed of them. named: the network is built by
    its name. Raises UsageError.
    """
    if not len(bundle.test):
        raise UsageError(f"{bundle.name} has no test images; give more images, or a larger --limit")
    if (classes is None) == (named and not bundle.classes):
        raise UsageError(
            "--classes says how many classes a model given by name has (ImageNet's weights: 1000) where the "
            f"images have no labels; {'give it here' if classes is None else 'leave it out here'}"
        )
    if bundle.classes:
        return
    if epochs or trains(method, hyper):
        raise UsageError(
            f"{bundle.name} has no labels, and training needs them: put the images into one folder per "
            "class, or choose a method that needs none (see `tdlib methods`), without --train-epochs"
        )


def same(bundle: Any, inputs: dict[str, Any] | None, name: str) -> None:
    """Raises UsageError where the network `name` was trained on other classes or otherwise shaped images."""
    words = {"classes": "", "input_shape": " --image-size", "mean": " --mean", "std": " --std"}
    for key, option in words.items():
        was, now = (inputs or {}).get(key), bundle.description[key]
        if was is None or now is None or was == now:
            continue
        mend = f"leave{option} out" if option else "name the folders alike"
        raise UsageError(
            f"{name} was trained with {key} {shown(was)}, the data have {shown(now)}: {mend}, or let "
            "--train-epochs N train it on these data"
        )


def shown(value: list[Any]) -> str:
    """The beginning of a list as text."""
    short = [f"{item:.4g}" if isinstance(item, float) else str(item) for item in value[:8]]
    return ", ".join(short) + (f", ... ({len(value)})" if len(value) > 8 else "")


def trains(method: str, hyper: dict[str, Any]) -> bool:
    """Whether the method trains, or what follows it."""
    from tdlib.methods import METHODS

    return METHODS[method].labels or bool(hyper.get("finetune_epochs"))


def fits(network: Any, bundle: Any, name: str) -> None:
    """Raises UsageError where the network does not take these images or has another number of classes."""
    import torch

    from tdlib.train import inference

    try:
        with inference(network):
            example = torch.zeros(2, *bundle.input_shape, device=next(network.parameters()).device)
            outputs = network(example).shape[-1]
    except (RuntimeError, ValueError, AssertionError) as error:
        reason, *_ = str(error).splitlines() or [type(error).__name__]
        raise UsageError(f"{name} does not take images of shape {bundle.input_shape}: {reason}") from error
    if bundle.classes and outputs != len(bundle.classes):
        raise UsageError(f"{name} has {outputs} outputs, the data have {len(bundle.classes)} classes")


def space(paths: list[Path], network: Any) -> None:
    """Raises UsageError where there is no room for the files; each is at most about as large as the dense
    network.
    """
    from tdlib.io import size_on_disk

    need = size_on_disk(network) * len(paths)
    for path in paths:
        free = shutil.disk_usage(path.parent).free
        if free < need:
            raise UsageError(f"the files need about {need:,} bytes, the disk of {path} has {free:,} left")


def trained(network: Any, bundle: Any, lr: float) -> None:
    """Raises NonFiniteError where training has ended in numbers that are none."""
    from tdlib import train

    loss = train.evaluate(network, bundle, "val" if len(bundle.val) else "test")["loss"]
    if not math.isfinite(loss):
        raise NonFiniteError(f"training ended with a loss of {loss}: --train-lr {lr:g} is too large")
