"""Networks by name: ``build(name, classes)``, ``available()`` and the package's own trained
``pretrained(name)``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ClassCountError, DataError, TdlibError, UnknownName
from .cifar_resnet import DEPTHS, CifarResNet
from .external import build_timm, build_torchvision, torchvision_names
from .small import LSTMClassifier, SmallCNN
from .weights import load_weights, read_state_dict

__all__ = [
    "CifarResNet",
    "LSTMClassifier",
    "SmallCNN",
    "available",
    "build",
    "load_weights",
    "pretrained",
    "shipped",
]

OWN = (*DEPTHS, "cnn", "lstm")
ZOO = Path(__file__).parent / "zoo"


def available() -> list[str]:
    """Every name that ``build`` knows: the library's own, then torchvision's. timm's are written
    ``timm:NAME``.
    """
    return [*OWN, *torchvision_names()]


def build(
    name: str,
    classes: int | Sequence[str],
    *,
    input_shape: Sequence[int] | None = None,
    weights: str | Path | None = None,
    new_head: bool = False,
    **kw: Any,
) -> nn.Module:
    """Build a classifier for ``classes`` classes (a count, or the list of their names).

    name: ``resnet20|32|56`` (32x32 images, option-A shortcuts), ``cnn``, ``lstm``, a torchvision name
    (``resnet18`` or ``torchvision:resnet18``) or ``timm:NAME``.
    input_shape: (channels, height, width) of one input; ``cnn`` and ``lstm`` need it (default (1, 8, 8), the
    digits), others use its channel count for their first convolution.
    weights: a torchvision weight name (``DEFAULT``, ``IMAGENET1K_V1``), a local file (safetensors or a
    state_dict) or a name of ``shipped()``.
    new_head: keep a fresh last layer where the weights have another number of classes.

    Raises UnknownName, and DataError where weights do not fit.
    """
    count = _class_count(classes)
    shape = tuple(int(n) for n in input_shape) if input_shape is not None else None
    file, hub = _weight_source(weights)
    model, pretrained_classes = _construct(name, count, shape, hub, kw)
    if hub is not None and pretrained_classes != count and not new_head:
        raise ClassCountError(f"weights {hub!r} of {name}", int(pretrained_classes or 0), count)
    if file is not None:
        load_weights(model, file, new_head=new_head)
    spec_kw: dict[str, Any] = dict(kw)
    if shape is not None:
        spec_kw["input_shape"] = list(shape)
    model._tdlib = {"spec": {"name": name, "classes": count, "kwargs": spec_kw}, "layers": {}}  # type: ignore[assignment]
    return model


def pretrained(name: str) -> nn.Module:
    """A network trained by this project and shipped with the package (offline), e.g.
    ``resnet20-cifar100-reduced``; `shipped` says how well it was trained.

    Raises UnknownName listing what is there.
    """
    files = _zoo()
    if name not in files:
        there = ", ".join(files) if files else "none are shipped with this version"
        raise UnknownName(f"unknown pretrained network {name!r}; there are: {there}")
    state, meta = read_state_dict(files[name])
    if not {"name", "classes"} <= meta.keys():
        raise DataError(
            f"{files[name]} has no 'name' and 'classes' in its header, so the network cannot be built"
        )
    channels = [int(n) for n in meta["input_shape"].split(",")] if meta.get("input_shape") else None
    model = build(meta["name"], int(meta["classes"]), input_shape=channels)
    return load_weights(model, state, source=name)


def shipped() -> dict[str, dict[str, str]]:
    """The networks of ``pretrained``: name -> network, classes, data set, the scale of its training and the
    test accuracy measured for it.
    """
    return {name: read_state_dict(path)[1] for name, path in _zoo().items()}


def _zoo() -> dict[str, Path]:
    return {path.stem: path for path in sorted(ZOO.glob("*.safetensors"))}


def _construct(
    name: str, classes: int, shape: tuple[int, ...] | None, hub: str | None, kw: dict[str, Any]
) -> tuple[nn.Module, int | None]:
    """(model, number of classes that the torchvision/timm weights had)."""
    with _named(name):
        if name in OWN and hub is not None:
            raise DataError(
                f"{name} has no weights named {hub!r} and no file of that name exists; give a local file"
            )
        if name in DEPTHS:
            return CifarResNet(DEPTHS[name], classes, shape[0] if shape else 3, **kw), None
        if name == "cnn":
            return SmallCNN(classes, (shape or (1, 8, 8))[0], **kw), None
        if name == "lstm":
            return LSTMClassifier(classes, _lstm_features(shape or (1, 8, 8)), **kw), None
        if name.startswith("timm:"):
            return build_timm(name.removeprefix("timm:"), classes, shape, hub, kw)
        return build_torchvision(name.removeprefix("torchvision:"), classes, shape, hub, kw, OWN)


@contextlib.contextmanager
def _named(name: str):  # type: ignore[no-untyped-def]
    try:
        yield
    except TypeError as error:
        raise DataError(f"cannot build {name!r} with these options: {error}") from error


def _lstm_features(shape: tuple[int, ...]) -> int:
    if len(shape) == 3:
        return shape[0] * shape[2]  # rows are time steps
    if len(shape) == 2:
        return shape[1]
    raise DataError(
        f"lstm takes images (channels, rows, columns) or sequences (steps, features), not shape {shape}"
    )


def _class_count(classes: int | Sequence[str]) -> int:
    count = classes if isinstance(classes, int) else len(classes)
    if count < 1:
        raise TdlibError(f"classes must be at least 1, got {count}")
    return count


def _weight_source(weights: str | Path | None) -> tuple[Path | None, str | None]:
    """Split ``weights`` into (local file, name at torchvision or timm)."""
    if weights is None:
        return None, None
    path = Path(weights).expanduser()
    if path.is_file():
        return path, None
    if str(weights) in _zoo():
        return _zoo()[str(weights)], None
    if isinstance(weights, Path) or path.suffix or len(path.parts) > 1:
        raise DataError(f"weight file {path} does not exist")
    return None, str(weights)
