"""What a layer's error does to the network: paired statistics, output weights, and measured harm.

- `paired`: statistics of one layer in the dense and in the partly compressed network, for sequential
  compression.
- `fisher`: H = E[g g^T] per layer, g the gradient at its output of the loss with labels drawn from
  the network's own predictions (the Fisher information). Together with Sigma it gives tr(H (W-What) Sigma
  (W-What)^T), a second-order estimate of the KL divergence that the change of one layer causes. No labels are
  needed.
- `divergence`: the KL divergence of a network's outputs from the dense network's, the harm itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdlib.calibration import evaluation, inputs_of
from tdlib.errors import DataError, NonFiniteError
from tdlib.moments import accumulator


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
    """
    first, second = dense.get_submodule(name), compressed.get_submodule(name)
    own, cross = accumulator(second, name), accumulator(first, name, cross=True)
    with evaluation(dense), evaluation(compressed):
        for batch in batches:
            x = inputs_of(batch)
            before, after = reach(dense, first, x), reach(compressed, second, x)
            if not torch.isfinite(after.sum()) and not torch.isfinite(after).all():
                raise NonFiniteError(f"the input of layer {name!r} holds NaN or Inf on the calibration data")
            own.update(after)
            cross.update(before, after)
    if own.count == 0:
        raise DataError("the calibration data is empty: `batches` gave no inputs")
    (sigma, mean), (mixed, dense_mean) = own.result(), cross.result()
    return Paired(sigma, mixed, mean, dense_mean, own.count)


def reach(model: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    """The input of `layer` when the model sees x; nothing behind the layer runs."""
    found: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0].detach())
        raise _Reached

    place = next(model.parameters())
    handle = layer.register_forward_pre_hook(stop)
    try:
        model(x.to(place.device, place.dtype))
    except _Reached:
        return found[0]
    finally:
        handle.remove()
    raise DataError("the calibration data never reaches the layer")


def call_order(model: nn.Module, names: Iterable[str], x: Tensor) -> list[str]:
    """The layers in the order in which the forward pass first calls them."""
    order: list[str] = []
    modules = dict(model.named_modules())

    def note(name: str) -> Any:
        return lambda *_: order.append(name) if name not in order else None

    handles = [modules[n].register_forward_pre_hook(note(n)) for n in names]
    place = next(model.parameters())
    try:
        with evaluation(model), torch.no_grad():
            model(x.to(place.device, place.dtype))
    finally:
        for handle in handles:
            handle.remove()
    return order


def fisher(
    model: nn.Module, batches: Iterable[Any], names: Sequence[str], *, temperature: float = 1.0, seed: int = 0
) -> dict[str, Tensor]:
    """Layer -> H (O, O) float64: sum over positions, mean over inputs, of g g^T at the layer's output.

    g is the gradient of the cross-entropy with a label drawn from softmax(logits / temperature). A higher
    temperature lets inputs speak on which the network is already certain (training images above all).
    """
    place = next(model.parameters())
    generator = torch.Generator().manual_seed(seed)
    modules = {n: model.get_submodule(n) for n in names}
    outputs: dict[str, Tensor] = {}
    totals: dict[str, Tensor] = {}
    seen = 0

    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: tuple[Any, ...], out: Tensor) -> Tensor:
            outputs[name] = out = out if out.requires_grad else out.detach().requires_grad_()
            return out

        return hook

    handles = [m.register_forward_hook(keep(n)) for n, m in modules.items()]
    try:
        with evaluation(model), torch.enable_grad():
            for batch in batches:
                x = inputs_of(batch)
                outputs.clear()
                logits = model(x.to(place.device, place.dtype)) / temperature
                labels = torch.multinomial(
                    logits.detach().softmax(-1).cpu(), 1, generator=generator
                ).flatten()
                loss = F.cross_entropy(logits, labels.to(logits.device), reduction="sum")
                gradients = torch.autograd.grad(loss, [outputs[n] for n in names])
                for name, g in zip(names, gradients, strict=True):
                    g = g.flatten(2).transpose(1, 2) if g.ndim == 4 else g
                    rows = g.reshape(-1, g.shape[-1])
                    totals[name] = totals.get(name, 0) + (rows.T @ rows).double()
                seen += len(x)
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise DataError("the calibration data is empty: `batches` gave no inputs")
    return {n: (totals[n] / seen).cpu() for n in names}


def damped(H: Tensor, share: float = 0.03) -> Tensor:
    """H + share * mean(diag H) * I: what the calibration data finds harmless still costs a little."""
    scale = H.diagonal().mean()
    if scale <= 0:
        return torch.eye(len(H), dtype=H.dtype)
    H = H.clone()
    H.diagonal().add_(share * scale)
    return H


@torch.no_grad()
def logits(model: nn.Module, batches: Iterable[Any]) -> Tensor:
    """Outputs of the model in eval mode, (inputs, classes)."""
    place = next(model.parameters())
    with evaluation(model):
        return torch.cat([model(inputs_of(b).to(place.device, place.dtype)).float().cpu() for b in batches])


def divergence(reference: Tensor, other: Tensor, temperature: float = 1.0) -> float:
    """Mean KL divergence of softmax(other) from softmax(reference), natural logarithm; both (inputs,
    classes).
    """
    p, q = F.log_softmax(reference / temperature, -1), F.log_softmax(other / temperature, -1)
    return float((p.exp() * (p - q)).sum(-1).mean())
