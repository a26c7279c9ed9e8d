"""Models of torchvision and timm, built with the wanted number of classes and input channels."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdlib.errors import ClassCountError, DataError, needs, unknown


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
    new_head: bool,
    options: dict[str, Any],
) -> nn.Module:
    """A torchvision model. Raises UnknownName for weights, ClassCountError, DataError where they cannot be
    downloaded.
    """
    import torchvision

    if weights is None:
        if name in ("googlenet", "inception_v3"):
            options = {"init_weights": True, "aux_logits": False, **options}
        model = torchvision.models.get_model(name, weights=None, num_classes=classes, **options)
        _adapt_input(model, shape)
        return model
    known = torchvision.models.get_model_weights(name).__members__
    if weights not in known:
        raise unknown(f"weights of {name}", weights, known)
    entry = known[weights]
    have = len(entry.meta["categories"])
    if have != classes and not new_head:
        raise ClassCountError(f"weights {weights!r} of {name}", have, classes)
    try:
        model = torchvision.models.get_model(name, weights=entry, **options)
    except OSError as error:  # no network, no disk space, no permission
        raise DataError(
            f"weights {entry.name} of {name} could not be downloaded ({error}); give a local file of weights "
            f"instead, or put {Path(entry.url).name} into {Path(torch.hub.get_dir()) / 'checkpoints'}"
        ) from error
    if have != classes:
        _replace_head(model, classes)
    _adapt_input(model, shape)
    return model


def build_timm(
    name: str, classes: int, shape: tuple[int, ...] | None, weights: str | None, options: dict[str, Any]
) -> nn.Module:
    """A timm model; ``weights="DEFAULT"`` (or a timm tag) loads timm's, with a fresh last layer where the
    number of classes differs. Raises UnknownName; TdlibError where timm is not installed.
    """
    timm = needs("timm", "timm")
    if name not in timm.list_models():
        raise unknown(f"model of timm {timm.__version__}", name, timm.list_models())
    full = name if weights in (None, "DEFAULT") else f"{name}.{weights}"
    channels = shape[0] if shape else 3
    return timm.create_model(
        full, pretrained=weights is not None, num_classes=classes, in_chans=channels, **options
    )


def _adapt_input(model: nn.Module, shape: tuple[int, ...] | None) -> None:
    """Replace the first convolution where the input has not three channels (grey images)."""
    if shape is None or shape[0] == 3:
        return
    name = next(n for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    old: Any = model.get_submodule(name)
    geometry = (old.out_channels, old.kernel_size, old.stride, old.padding, old.dilation)
    model.set_submodule(name, nn.Conv2d(shape[0], *geometry, bias=old.bias is not None))


def _replace_head(model: nn.Module, classes: int) -> None:
    """Replace the last Linear (or 1x1 convolution) by a fresh one with ``classes`` outputs."""
    name, last = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    bias = last.bias is not None
    if isinstance(last, nn.Linear):
        model.set_submodule(name, nn.Linear(last.in_features, classes, bias))
    else:
        model.set_submodule(name, nn.Conv2d(last.in_channels, classes, 1, bias=bias))
