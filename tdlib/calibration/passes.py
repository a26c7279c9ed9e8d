"""Calibration inputs, and forward passes over them that look at what arrives at the layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tdlib.decompositions.linalg import one_thread
from tdlib.errors import DataError, NonFiniteError
from tdlib.network import evaluating, first

SMALL_PASS = 1e10


def calibration_batches(
    data: Any, samples: int = 1000, batch_size: int = 100, seed: int = 0, device: str | torch.device = "cpu"
) -> list[Tensor]:
    """At most `samples` inputs as batches on `device`, without labels.

    data: a Bundle, for random training images (drawn from `seed`) without augmentation in batches of
    `batch_size`; or any iterable of inputs or (inputs, labels) batches, for the first of them.
    Raises: DataError if there are none.
    """
    source = data
    if hasattr(data, "batches"):
        size = min(batch_size, len(data.train), samples)
        source = data.batches("train", size, device=device, seed=seed, shuffle=True, drop_last=False)
    placed_ones = (x.to(device) for x in inputs(source))
    kept = [x for x in limited(placed_ones, samples) if len(x)]
    if not kept:
        raise DataError(
            "no calibration inputs: give a Bundle with training images, or an iterable of batches"
        )
    return kept


def limited(batches: Iterable[Tensor], samples: int) -> Iterator[Tensor]:
    """The first `samples` inputs of the batches; no batch beyond them is asked for."""
    for x in batches:
        yield x[:samples]
        samples -= len(x)
        if samples <= 0:
            return


def inputs(batches: Iterable[Any], title: str = "", progress: bool = False) -> Iterator[Tensor]:
    """The input tensors of the batches, with a bar of this title where `progress`.

    Raises: DataError for one tensor instead of batches, and as `inputs_of`.
    """
    if isinstance(batches, Tensor):
        raise DataError(
            f"calibration inputs come in batches, got one tensor of shape {tuple(batches.shape)}: pass "
            "[inputs], or inputs.split(64)"
        )
    for batch in tqdm(batches, title, unit="batch", disable=not progress):
        yield inputs_of(batch)


def inputs_of(batch: Any) -> Tensor:
    """The input tensor of a batch given as inputs or as an (inputs, labels, ...) tuple or list.

    Raises: DataError for anything else, and for bytes (pixels that are not normalised).
    """
    x = batch[0] if isinstance(batch, (tuple, list)) else batch
    if not isinstance(x, Tensor):
        raise DataError(
            f"calibration batches must be tensors or (inputs, labels) pairs, got {type(batch).__name__}"
        )
    if x.dtype == torch.uint8:
        raise DataError(
            "calibration inputs are bytes (uint8): normalise them as for training, (x / 255 - mean) / std"
        )
    return x


def placed(model: nn.Module, x: Tensor) -> Tensor:
    """x on the device of the model's parameters and, where it is floating-point, in their dtype."""
    place = next(model.parameters(), torch.empty(0))
    return x.to(place.device, place.dtype if x.is_floating_point() else x.dtype)


def threads_for(model: nn.Module, values: int) -> AbstractContextManager[None]:
    """One thread inside where a batch of so many values is little work for the model: values × parameters,
    an upper bound of the multiply-accumulates of most networks, below `SMALL_PASS`."""
    return one_thread(values * sum(p.numel() for p in model.parameters()) < SMALL_PASS)


def no_inputs() -> DataError:
    """The error to raise where the batches held not a single input."""
    return DataError("the calibration data is empty: `batches` gave no inputs")


def check_finite(what: str, x: Tensor) -> None:
    """Raises: NonFiniteError naming `what` if x holds NaN or Inf."""
    if not torch.isfinite(x.sum()) and not torch.isfinite(x).all():  # a sum alone may overflow
        raise NonFiniteError(f"{what} holds NaN or Inf on the calibration data")


def rows_of(layer: nn.Module, out: Tensor) -> Tensor:
    """(positions, O) of a tensor at the layer's output, which may have any leading axes."""
    out = out.movedim(channel_axis(layer, out), -1)
    return out.reshape(-1, out.shape[-1])


def channel_axis(layer: nn.Module, out: Tensor) -> int:
    """Of the output of a layer, replaced or not: before the positions of a convolution, last for a linear
    one."""
    return out.ndim - 1 - len(getattr(layer, "kernel_size", ()))


@torch.no_grad()
def run(model: nn.Module, batches: Iterable[Any], taps: Mapping[str, Callable[[Tensor], None]]) -> int:
    """Forward `batches` in eval mode, calling taps[name](input) at each named layer; returns the number of
    inputs.

    Raises: DataError if there are none, NonFiniteError naming the layer whose input is not finite.
    """

    def tap(name: str, update: Callable[[Tensor], None]) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = first(args, kwargs).detach()
            check_finite(f"the input of layer {name!r}", x)
            update(x)

        return hook

    seen = 0
    with evaluating(model), ExitStack() as hooks:
        for name, update in taps.items():
            layer = model.get_submodule(name)
            hooks.enter_context(layer.register_forward_pre_hook(tap(name, update), with_kwargs=True))
        for x in inputs(batches):
            seen += len(x)
            with threads_for(model, x.numel()):
                model(placed(model, x))
    if seen == 0:
        raise no_inputs()
    return seen


@torch.no_grad()
def call_order(model: nn.Module, names: Iterable[str], x: Tensor) -> list[str]:
    """The layers in the order in which the forward pass of x first calls them."""
    order: dict[str, None] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda *_: order.setdefault(name)

    with evaluating(model), ExitStack() as hooks:
        for name in names:
            hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(note(name)))
        model(placed(model, x))
    return list(order)
