"""Repair after compression, from calibration inputs alone: BatchNorm statistics and the means of outputs."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tdlib.calibration.passes import channel_axis, inputs, no_inputs, placed, threads_for
from tdlib.calibration.statistics import Statistics
from tdlib.errors import DataError
from tdlib.formats import to_dense
from tdlib.network import evaluating, first

BatchNorm = nn.modules.batchnorm._BatchNorm  # what BatchNorm1d, 2d, 3d and SyncBatchNorm have in common


@torch.no_grad()
def recalibrate_batchnorm(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Replace, in place, the running statistics of every BatchNorm by those of `batches`; everything else in
    eval mode.

    The average over batches is cumulative (momentum None), so the batches should be of equal size. Returns
    the model. Raises: DataError for a model without BatchNorm or without batches.
    """
    norms = [m for m in model.modules() if isinstance(m, BatchNorm) and m.track_running_stats]
    if not norms:
        raise DataError("the model has no BatchNorm with running statistics to recalibrate")
    momenta = [m.momentum for m in norms]
    seen = 0
    try:
        with evaluating(model):
            for norm in norms:
                norm.momentum = None
                norm.train()
            for x in inputs(batches):
                if seen == 0:
                    for norm in norms:
                        norm.reset_running_stats()
                seen += len(x)
                with threads_for(model, x.numel()):
                    model(placed(model, x))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    if seen == 0:
        raise no_inputs()
    return model


@torch.no_grad()
def correct_bias(
    compressed: nn.Module, dense: nn.Module, statistics: Statistics, names: Iterable[str], example: Tensor
) -> list[str]:
    """Shift, in place, the output of each named layer so that its mean over the statistics is the dense
    layer's.

    The shift is (W - What) E[x]; see `shift_output` for where it goes. example: a batch of inputs, to find
    the BatchNorms. Returns the layers that were corrected.
    """
    corrected = []
    for name in names:
        W, What = (to_dense(network.get_submodule(name)) for network in (dense, compressed))
        mean = statistics.means[name].to(W.device)
        shift = (W.double().flatten(1) - What.double().flatten(1)) @ mean
        if shift_output(compressed, name, shift, example):
            corrected.append(name)
    return corrected


@torch.no_grad()
def shift_output(model: nn.Module, name: str, shift: Tensor, example: Tensor) -> bool:
    """Add `shift` (O,) to the output of a layer, in place, without adding a parameter.

    It goes into the layer's bias or, without one, into the running mean of the BatchNorm that takes its
    output. False, and nothing is done, where there is neither. example: a batch of inputs, to find that
    BatchNorm.
    """
    layer = model.get_submodule(name)
    last = layer[-1] if isinstance(layer, nn.Sequential) else layer
    bias = getattr(last, "bias", None)
    if isinstance(bias, Tensor):
        bias.add_(shift.to(bias))
        return True
    norm = norm_behind(model, layer, example)
    if norm is None or norm.running_mean is None:
        return False
    norm.running_mean.sub_(shift.to(norm.running_mean))
    return True


@torch.no_grad()
def norm_behind(model: nn.Module, layer: nn.Module, example: Tensor) -> BatchNorm | None:
    """The BatchNorm that receives the output of `layer` itself and normalises its channels, found by one
    forward pass of `example`."""
    found: list[BatchNorm] = []
    output: list[Tensor] = []

    def arrived(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = first(args, kwargs)
        if output and x is output[-1] and channel_axis(layer, x) == 1:
            found.append(norm)  # type: ignore[arg-type]

    with evaluating(model), ExitStack() as hooks:
        hooks.enter_context(layer.register_forward_hook(lambda _, __, out: output.append(out)))
        for norm in model.modules():
            if isinstance(norm, BatchNorm):
                hooks.enter_context(norm.register_forward_pre_hook(arrived, with_kwargs=True))
        model(placed(model, example[:1]))
    return found[0] if found else None
