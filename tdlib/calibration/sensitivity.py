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
from torch.autograd.graph import GradientEdge, get_gradient_edge

from tdlib.calibration.moments import accumulator
from tdlib.calibration.passes import check_finite, inputs, no_inputs, placed, rows_of, threads_for
from tdlib.errors import DataError
from tdlib.network import evaluating, first

TEMPERATURE = 4.0  # of the predictions from which `statistics(output_weights=True)` draws labels


def fisher(
    model: nn.Module, batches: Iterable[Any], names: Sequence[str], *, temperature: float = 1.0, seed: int = 0
) -> dict[str, Tensor]:
    """Layer -> H (O, O) float64 on the CPU: sum over positions, mean over inputs, of g g^T at the layer's
    output.

    g is the gradient of the cross-entropy with a label drawn from softmax(logits / temperature). A higher
    temperature lets inputs speak on which the network is already certain (training images above all). What
    a layer computes in several calls adds up.
    Raises: DataError for no batch and for a network whose output is not (inputs, classes), NonFiniteError
    where that is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    outputs: list[tuple[str, GradientEdge]] = []
    totals: dict[str, Tensor] = {
        name: layer.weight.new_zeros(len(layer.weight), len(layer.weight), dtype=torch.float64)
        for name, layer in layers.items()
    }
    seen = 0

    def keep(name: str) -> Callable[..., Tensor]:
        def hook(_: nn.Module, __: tuple[Any, ...], out: Tensor) -> Tensor:
            if not out.requires_grad:
                out = out.detach().requires_grad_().clone()  # a leaf itself may not be changed in place
            outputs.append((name, get_gradient_edge(out)))  # `out` itself an in-place ReLU would overwrite
            return out

        return hook

    with evaluating(model), torch.enable_grad(), ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_hook(keep(name)))
        for x in inputs(batches):
            outputs.clear()
            with threads_for(model, x.numel()):
                logits = class_scores(model(placed(model, x)), len(x)) / temperature
                chances = logits.detach().softmax(-1).cpu()
                labels = torch.multinomial(chances, 1, generator=generator).flatten()
                loss = F.cross_entropy(logits, labels.to(logits.device), reduction="sum")
                gradients = torch.autograd.grad(loss, [edge for _, edge in outputs], allow_unused=True)
                for (name, _), g in zip(outputs, gradients, strict=True):
                    if g is not None:  # what is computed but not used does no harm
                        rows = rows_of(layers[name], g)
                        totals[name] += rows.T @ rows
            seen += len(x)
    if seen == 0:
        raise no_inputs()
    return {n: (totals[n] / seen).cpu() for n in names}


def class_scores(found: Any, count: int) -> Tensor:
    """The output of a network for `count` inputs. Raises: DataError unless it is (count, classes),
    NonFiniteError."""
    scores = isinstance(found, Tensor) and found.is_floating_point() and found.ndim == 2
    if not scores or len(found) != count:
        shape = f"of shape {tuple(found.shape)}, {found.dtype}" if isinstance(found, Tensor) else ""
        raise DataError(
            f"weights of the outputs need class scores (inputs, classes); for {count} inputs the network "
            f"gives a {type(found).__name__} {shape}: wrap it so that it returns them, or go without "
            "(output_weights=False; weigh_outputs=False in compress)"
        )
    check_finite("the network's output", found.detach())
    return found


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
        for x in inputs(batches):
            with threads_for(dense, x.numel()):
                before, after = reach(dense, first, x), reach(compressed, second, x)
                check_finite(f"the input of layer {name!r}", after)
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

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(first(args, kwargs).detach())
        raise _Reached

    with layer.register_forward_pre_hook(stop, with_kwargs=True):
        try:
            model(placed(model, x))
        except _Reached:
            return found[0]
    raise DataError("the calibration data never reaches the layer")
