"""What a layer's error does to the network: the Fisher information at the layers' outputs.

H = E[g g^T] per layer, g the gradient at its output of the loss with labels drawn from the network's own
predictions. Together with Sigma it gives 1/2 tr(H (W-What) Sigma (W-What)^T), a second-order estimate of the
KL divergence that the change of one layer causes. No labels are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdlib.calibration.passes import inputs_of, no_inputs, placed
from tdlib.modes import evaluating

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
            logits = model(placed(model, x)) / temperature
            labels = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator).flatten()
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
