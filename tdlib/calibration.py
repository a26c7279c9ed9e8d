"""Calibration data: input statistics of every layer, BatchNorm recalibration and bias correction.

`statistics` streams, by forward hooks in one pass, the uncentred second moment Sigma = E[x x^T] and the mean
E[x] of the input patches of every Conv2d (groups 1) and of the inputs of every Linear. Patches follow stride,
dilation, padding and padding_mode, all positions weigh the same, and their order is that of
`weight.reshape(O, -1)`: channel, kh, kw. Products are float32, totals float64. How the products are formed is
in `tdlib.moments`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from tdlib.errors import DataError, NonFiniteError
from tdlib.moments import accumulator
from tdlib.sigma_file import Statistics, load_statistics

__all__ = [
    "Statistics",
    "correct_bias",
    "load_statistics",
    "recalibrate_batchnorm",
    "shift_output",
    "statistics",
]


TEMPERATURE = 4.0  # of the predictions from which `output_weights` draws labels


def statistics(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Iterable[str] | None = None,
    *,
    positions: int | None = None,
    output_weights: bool = False,
    seed: int = 0,
    shrinkage: float | None = None,
) -> Statistics:
    """Input statistics of the model's layers over `batches` of inputs (or of (inputs, labels) pairs).

    layers: names or globs; all Conv2d with groups 1 and all Linear if None. positions: use at most this many
    random output positions of every image (drawn from `seed`) instead of all; the relative error of Sigma
    falls as 1/sqrt(images * positions). output_weights: also take the Fisher information at the layers'
    outputs (`Statistics.weights`). shrinkage: weight s in (1-s) Sigma + s mean(diag) I; if None, 0, except
    for layers that saw fewer patches than Sigma has rows, which warn and get 0.1 * n / (n + patches).

    Runs in eval mode without gradients and restores every module's mode.
    Raises: DataError for no batch or no layer, NonFiniteError naming the layer whose input is not finite.
    """
    chosen = measurable(model, layers)
    generator = torch.Generator().manual_seed(seed)
    if output_weights:
        batches = list(batches)  # gone through twice
    moments = {n: accumulator(m, n, positions, generator) for n, m in chosen.items()}
    run(model, batches, {n: moments[n].update for n in chosen})
    sigmas, means, counts = {}, {}, {}
    for name, moment in moments.items():
        if moment.count == 0:
            raise DataError(
                f"layer {name!r} was never reached by the calibration data; leave it out of `layers`"
            )
        sigma, means[name] = moment.result()
        counts[name] = moment.count
        sigmas[name] = shrink(
            sigma, shrinkage_for(name, len(sigma), moment.count) if shrinkage is None else shrinkage
        )
    if not output_weights:
        return Statistics(sigmas, means, counts)
    from tdlib.sensitivity import damped, fisher  # which needs the functions below

    found = fisher(model, batches, list(chosen), temperature=TEMPERATURE, seed=seed)
    return Statistics(sigmas, means, counts, {n: damped(h) for n, h in found.items()})


def measurable(model: nn.Module, layers: Iterable[str] | None) -> dict[str, nn.Module]:
    """Name -> module of the layers whose statistics can be taken, restricted to the names or globs in
    `layers`.
    """
    known: dict[str, nn.Module] = {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.groups == 1)
    }
    if layers is None:
        chosen = known
    else:
        patterns = [layers] if isinstance(layers, str) else list(layers)
        for pattern in patterns:
            if not any(fnmatch(n, pattern) for n in known):
                raise DataError(
                    f"no Conv2d (groups 1) or Linear layer matches {pattern!r}; there are: {', '.join(known)}"
                )
        chosen = {n: m for n, m in known.items() if any(fnmatch(n, p) for p in patterns)}
    if not chosen:
        raise DataError("the model has no Conv2d (groups 1) or Linear layer to take statistics of")
    return chosen


def shrinkage_for(name: str, size: int, count: int) -> float:
    """0 if there are at least as many patches as rows of Sigma, else a warning and 0.1 * size / (size +
    count).
    """
    if count >= size:
        return 0.0
    amount = 0.1 * size / (size + count)
    warnings.warn(
        f"layer {name!r}: Sigma is {size} x {size} but the calibration data gave only {count} patches; it is "
        f"shrunk by {amount:.3f} towards a multiple of the identity. Use more images.",
        stacklevel=3,
    )
    return amount


def shrink(sigma: Tensor, amount: float, scale: Tensor | None = None) -> Tensor:
    """(1 - amount) Sigma + amount * scale * I; scale: the mean of Sigma's diagonal if None."""
    if amount == 0:
        return sigma
    ridge = amount * (sigma.diagonal().mean() if scale is None else scale)
    sigma = sigma * (1 - amount)
    sigma.diagonal().add_(ridge)
    return sigma


@torch.no_grad()
def run(model: nn.Module, batches: Iterable[Any], taps: Mapping[str, Callable[[Tensor], None]]) -> int:
    """Forward `batches` in eval mode, calling taps[name](input) at each named layer; returns the number of
    inputs.
    """
    place = next(model.parameters(), torch.empty(0))
    modules = dict(model.named_modules())

    def tap(name: str, update: Callable[[Tensor], None]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach()
            if not torch.isfinite(x.sum()) and not torch.isfinite(x).all():
                raise NonFiniteError(f"the input of layer {name!r} holds NaN or Inf on the calibration data")
            update(x)

        return hook

    handles = [modules[n].register_forward_pre_hook(tap(n, u)) for n, u in taps.items()]
    seen = 0
    try:
        with evaluation(model):
            for batch in batches:
                x = inputs_of(batch)
                seen += len(x)
                model(x.to(place.device, place.dtype if x.is_floating_point() else x.dtype))
    finally:
        for handle in handles:
            handle.remove()
    if seen == 0:
        raise DataError("the calibration data is empty: `batches` gave no inputs")
    return seen


def inputs_of(batch: Any) -> Tensor:
    """The input tensor of a batch given as inputs or as an (inputs, labels, ...) tuple or list."""
    x = batch[0] if isinstance(batch, (tuple, list)) else batch
    if not isinstance(x, Tensor):
        raise DataError(
            f"calibration batches must be tensors or (inputs, labels) pairs, got {type(batch).__name__}"
        )
    return x


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, the previous mode of every module outside."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def recalibrate_batchnorm(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Replace, in place, the running statistics of every BatchNorm by those of `batches`; everything else in
    eval mode.

    The average over batches is cumulative (momentum None), so the batches should be of equal size. Returns
    the model. Raises: DataError for a model without BatchNorm or without batches.
    """
    norms = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    if not norms:
        raise DataError("the model has no BatchNorm with running statistics to recalibrate")
    momenta = [m.momentum for m in norms]
    place = next(model.parameters())
    seen = 0
    with evaluation(model):
        for norm in norms:
            norm.momentum = None
            norm.train()
        for batch in batches:
            if seen == 0:
                for norm in norms:
                    norm.reset_running_stats()
            x = inputs_of(batch)
            seen += len(x)
            model(x.to(place.device, place.dtype))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    if seen == 0:
        raise DataError("the calibration data is empty: `batches` gave no inputs")
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
    from tdlib.layers.dense import to_dense  # calibration is below the layers in the package, but for this

    corrected = []
    for name in names:
        W, What = dense.get_parameter(f"{name}.weight"), to_dense(compressed.get_submodule(name))
        mean = statistics.means[name].to(W.device)
        shift = (W.double().flatten(1) - What.double().flatten(1)) @ mean
        if shift_output(compressed, name, shift, example):
            corrected.append(name)
    return corrected


@torch.no_grad()
def shift_output(model: nn.Module, name: str, shift: Tensor, example: Tensor) -> bool:
    """Add `shift` (O,) to the output of a layer, in place, without adding a parameter.

    It goes into the layer's bias or, without one, into the running mean of the BatchNorm that takes its
    output. False, and nothing is done, where there is neither.
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
def norm_behind(
    model: nn.Module, layer: nn.Module, example: Tensor
) -> nn.modules.batchnorm._BatchNorm | None:
    """The BatchNorm that receives the output of `layer` itself, found by one forward pass of `example`."""
    found: list[nn.modules.batchnorm._BatchNorm] = []
    output: list[Tensor] = []

    def arrived(norm: nn.Module, args: tuple[Any, ...]) -> None:
        if output and args[0] is output[-1]:
            found.append(norm)  # type: ignore[arg-type]

    handles = [layer.register_forward_hook(lambda _, __, out: output.append(out))]
    norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    handles += [norm.register_forward_pre_hook(arrived) for norm in norms]
    place = next(model.parameters())
    try:
        with evaluation(model):
            model(example[:1].to(place.device, place.dtype))
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
