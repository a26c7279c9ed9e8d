"""Statistics of one layer in the dense and in the partly compressed network, for compression in sequence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tdlib.calibration.moments import accumulator
from tdlib.calibration.passes import check_finite, inputs_of, no_inputs, placed
from tdlib.errors import DataError
from tdlib.modes import evaluating


class _Reached(Exception):
    """Stops a forward pass at the layer of interest."""


@dataclass(frozen=True)
class Paired:
    """Of one layer: sigma = E[xhat xhat^T] in the compressed network, cross = E[x xhat^T] with x in the dense
    one (both (n, n)), their means (n,), and the number of patches; float64."""

    sigma: Tensor
    cross: Tensor
    mean: Tensor
    dense_mean: Tensor
    count: int


@torch.no_grad()
def paired(dense: nn.Module, compressed: nn.Module, name: str, batches: Iterable[Any]) -> Paired:
    """Statistics of the inputs of layer `name`, not yet replaced in `compressed`, in both networks side by
    side.

    Raises: DataError for no batch or a layer that is not reached, NonFiniteError if its input in the
    compressed network is not finite.
    """
    first, second = dense.get_submodule(name), compressed.get_submodule(name)
    own, cross = accumulator(second, name), accumulator(first, name, cross=True)
    with evaluating(dense), evaluating(compressed):
        for batch in batches:
            x = inputs_of(batch)
            before, after = reach(dense, first, x), reach(compressed, second, x)
            check_finite(name, after)
            own.update(after)
            cross.update(before, after)
    if own.count == 0:
        raise no_inputs()
    (sigma, mean), (mixed, dense_mean) = own.result(), cross.result()
    return Paired(sigma, mixed, mean, dense_mean, own.count)


def reach(model: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    """The input of `layer` when the model sees x; nothing behind the layer runs.

    Raises: DataError if the layer is never called.
    """
    found: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0].detach())
        raise _Reached

    with layer.register_forward_pre_hook(stop):
        try:
            model(placed(model, x))
        except _Reached:
            return found[0]
    raise DataError("the calibration data never reaches the layer")
