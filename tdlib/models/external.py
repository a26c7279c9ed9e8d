"""Models of torchvision and timm, built with the wanted number of classes and input channels."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import DataError, UnknownName


@cache
def torchvision_names() -> tuple[str, ...]:
    """Names of torchvision's image classification networks."""
    import torchvision

    return tuple(torchvision.models.list_models(module=torchvision.models))


def build_torchvision(
    name: str,
    classes: int,
    shape: tuple[int, ...] | None,
    weights: str | None,
    kw: dict[str, Any],
    own: Sequence[str],
) -> tuple[nn.Module, int | None]:
    """(model, classes of the loaded weights or None). Raises UnknownName listing valid names."""
    import torchvision

    if name not in torchvision_names():
        close = difflib.get_close_matches(name, [*own, *torchvision_names()], n=3)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise UnknownName(
            f"unknown model {name!r}.{hint} Valid: {', '.join(own)}; timm:NAME; torchvision's "
            f"{', '.join(torchvision_names())}"
        )
    options = dict(kw)
    if name in ("googlenet", "inception_v3"):
        options.setdefault("init_weights", True)
        options.setdefault("aux_logits", False)
    if weights is None:
        model = torchvision.models.get_model(name, weights=None, num_classes=classes, **options)
        return _adapt_input(model, shape), None
    try:
        enum = torchvision.models.get_model_weights(name)
        entry = enum[weights]
    except KeyError:
        valid = ", ".join(entry.name for entry in enum)
        raise UnknownName(
            f"{name} has no weights named {weights!r}; valid: {valid} (or a local file)"
        ) from None
    options.pop("init_weights", None)
    options.pop("aux_logits", None)
    known = len(entry.meta["categories"])
    try:
        model = torchvision.models.get_model(name, weights=entry, **options)
    except OSError as error:  # no network, no disk space, no permission
        raise DataError(
            f"weights {entry.name} of {name} could not be downloaded ({error}); give a local file of weights "
            f"instead, or put {Path(entry.url).name} into {Path(torch.hub.get_dir()) / 'checkpoints'}"
        ) from error
    if known != classes:
        _replace_head(model, classes)
    return _adapt_input(model, shape), known


def build_timm(
    name: str, classes: int, shape: tuple[int, ...] | None, weights: str | None, kw: dict[str, Any]
) -> tuple[nn.Module, int | None]:
    """A timm model; ``weights="DEFAULT"`` (or a timm tag) loads timm's. Raises DataError where timm is not
    installed.
    """
    try:
        import timm
    except ImportError:
        raise DataError(
            f"model timm:{name} needs the package timm, which is not installed: pip install timm"
        ) from None
    if name not in timm.list_models():
        close = difflib.get_close_matches(name, timm.list_models(), n=5)
        raise UnknownName(
            f"timm {timm.__version__} has no model {name!r}; nearest: {', '.join(close) or 'none'}"
        )
    full = name if weights in (None, "DEFAULT") else f"{name}.{weights}"
    channels = shape[0] if shape else 3
    model = timm.create_model(
        full, pretrained=weights is not None, num_classes=classes, in_chans=channels, **kw
    )
    return model, classes if weights is not None else None


def _adapt_input(model: nn.Module, shape: tuple[int, ...] | None) -> nn.Module:
    """Replace the first convolution where the input has not three channels (grey images)."""
    if shape is None or shape[0] == 3:
        return model
    name, conv = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    new = nn.Conv2d(
        shape[0],
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        bias=conv.bias is not None,
    )
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)
    return model


def _replace_head(model: nn.Module, classes: int) -> None:
    """Replace the last Linear (or 1x1 convolution) by a fresh one with ``classes`` outputs."""
    name, last = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    parent, _, leaf = name.rpartition(".")
    if isinstance(last, nn.Linear):
        new: nn.Module = nn.Linear(last.in_features, classes, last.bias is not None)
    else:
        new = nn.Conv2d(last.in_channels, classes, last.kernel_size, bias=last.bias is not None)  # type: ignore[arg-type]
    setattr(model.get_submodule(parent), leaf, new)
