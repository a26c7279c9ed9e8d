"""Models of torchvision and timm, built with the wanted number of classes and input channels."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
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
        with redirect_stdout(sys.stderr):  # where torch.hub says that it downloads
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
    name: str,
    classes: int,
    shape: tuple[int, ...] | None,
    weights: str | None,
    new_head: bool,
    options: dict[str, Any],
) -> nn.Module:
    """A timm model; ``weights="DEFAULT"`` (or a timm tag) loads timm's. Raises UnknownName, ClassCountError,
    DataError where they cannot be downloaded; TdlibError where timm is not installed.
    """
    timm = needs("timm", "timm")
    if name not in timm.list_models():
        raise unknown(f"model of timm {timm.__version__}", name, timm.list_models())
    full = _timm_name(name, weights)
    options = {"num_classes": classes, "in_chans": shape[0] if shape else 3, **options}
    if weights is None:
        return timm.create_model(full, pretrained=False, **options)
    have = _timm_settings(full).get("num_classes", classes)
    if have != classes and not new_head:
        raise ClassCountError(f"weights {weights!r} of timm:{name}", have, classes)
    try:
        with redirect_stdout(sys.stderr):
            return timm.create_model(full, pretrained=True, **options)
    except (OSError, RuntimeError) as error:  # no network (after retries), no such weights
        raise DataError(
            f"weights {weights!r} of timm:{name} could not be loaded ({error}); give a local file of weights "
            "instead. HF_HUB_OFFLINE=1 keeps to what was downloaded before and does not try the network"
        ) from error


def torchvision_inputs(name: str, weights: str) -> dict[str, Any]:
    """What torchvision's weights were trained on, as `Provenance.inputs`. Raises UnknownName."""
    import torchvision

    known = torchvision.models.get_model_weights(name).__members__
    if weights not in known:
        raise unknown(f"weights of {name}", weights, known)
    look = known[weights].transforms()
    shape = [3, look.crop_size[0], look.crop_size[0]]
    return _inputs(shape, look.mean, look.std, look.interpolation.value)


def timm_inputs(name: str, weights: str) -> dict[str, Any]:
    """What timm's weights were trained on, as `Provenance.inputs`. Raises TdlibError without timm."""
    config = needs("timm.data", "timm").resolve_data_config(
        pretrained_cfg=_timm_settings(_timm_name(name, weights))
    )
    return _inputs(config["input_size"], config["mean"], config["std"], config["interpolation"])


def _inputs(shape: Sequence[int], mean: Sequence[float], std: Sequence[float], how: str) -> dict[str, Any]:
    means, stds = (list(map(float, numbers)) for numbers in (mean, std))
    return {"classes": None, "input_shape": list(shape), "mean": means, "std": stds, "interpolation": how}


def _timm_name(name: str, weights: str | None) -> str:
    return name if weights in (None, "DEFAULT") else f"{name}.{weights}"


def _timm_settings(full: str) -> dict[str, Any]:
    """timm's record of the weights; empty where there is none."""
    found = needs("timm", "timm").get_pretrained_cfg(full)
    return found.to_dict() if found else {}


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
