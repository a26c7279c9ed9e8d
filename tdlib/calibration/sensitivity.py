"""What a layer's error does to the network, and what the compressed front does to a layer's inputs.

- `fisher`: H = E[g g^T] per layer, g the gradient at its output of the loss with labels drawn from the
  network's own predictions. Together with Sigma it gives 1/2 tr(H (W-What) Sigma (W-What)^T), a second-order
  estimate of the KL divergence that the change of one layer causes. No labels are needed.
- `paired`: moments of one layer's inputs in the dense and in the partly compressed network side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdlib.calibration.moments import accumulator
from tdlib.calibration.passes import check_finite, inputs_of, no_inputs, placed, threads_for
from tdlib.errors import DataError
from tdlib.network import evaluating

TEMPERATURE = 4.0  # of the predictions from which `statistics(output_weights=True)` draws labels


def fisher(
    model: nn.Module, batches: Iterable[Any], names: Sequence[str], *, temperature: float = 1.0, seed: int = 0
) -> dict[str, Tensor]:
    """Layer -> H (O, O) float64 on the CPU: sum over positions, mean over inputs, of g g^T at the layer's
    output.

    g is the gradient of the cross-entropy with a label drawn from softmax(logits / temperature). A higher
    temperature lets inputs speak on which the network is already certain (training images above all).
    Raises: DataError for no batch.
    """
    generator = torch.Generator().manual_seed(seed)
    outputs: dict[str, Tensor] = {}
    totals: dict[str, Tensor] = {}
    seen = 0

    def keep(name: str) -> Callable[..., Tensor]:
        def hook(_: nn.Module, __: tuple[Any, ...], out: Tensor) -> Tensor:
            outputs[name] = out = out if out.requires_grad else out.detach().requires_grad_()
            return out

        return hook

    with evaluating(model), torch.enable_grad(), ExitStack() as hooks:
        for name in names:
            hooks.enter_context(model.get_submodule(name).register_forward_hook(keep(name)))
        for batch in batches:
            x = inputs_of(batch)
            outputs.clear()
            with threads_for(model, x.numel()):
                logits = model(placed(model, x)) / temperature
                chances = logits.detach().softmax(-1).cpu()
                labels = torch.multinomial(chances, 1, generator=generator).flatten()
                loss = F.cross_entropy(logits, labels.to(logits.device), reduction="sum")
                gradients = torch.autograd.grad(loss, [outputs[n] for n in names])
                for name, g in zip(names, gradients, strict=True):
                    g = g.flatten(2).transpose(1, 2) if g.ndim == 4 else g
                    rows = g.reshape(-1, g.shape[-1])
                    totals[name] = totals.get(name, 0) + (rows.T @ rows).double()
            seen += len(x)
    if seen == 0:
        raise no_inputs()
    return {n: (totals[n] / seen).cpu() for n in names}


def damped(H: Tensor, share: float = 0.03) -> Tensor:
    """H + share * mean(diag H) * I: what the calibration data finds harmless still costs a little."""
    scale = H.diagonal().mean()
    if scale <= 0:
        return torch.eye(len(H), dtype=H.dtype)
    H = H.clone()
    H.diagonal().add_(share * scale)
    return H


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
            with threads_for(dense, x.numel()):
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
