"""What is decomposed: random kernels whose spectrum decays like a trained network's, or trained weights."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

import tdlib

EXPONENT = 0.7  # singular values of both channel modes fall as k ** -0.7


def decaying_kernel(
    out: int, inp: int, side: int = 3, *, seed: int = 0, exponent: float = EXPONENT
) -> Tensor:
    """Random (out, inp, side, side) kernel, power-law spectrum on both channel modes, Kaiming's scale."""
    generator = torch.Generator().manual_seed(seed)
    core = torch.randn(out, inp, side * side, generator=generator)
    for mode, size in ((0, out), (1, inp)):
        basis = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
        scaled = basis * torch.arange(1, size + 1).pow(-exponent)
        core = torch.movedim(torch.tensordot(scaled, core, dims=([1], [mode])), 0, mode)
    kernel = core.reshape(out, inp, side, side)
    return kernel * (2 / (inp * side * side)) ** 0.5 / kernel.std()


def resnet(name: str, *, seed: int = 0) -> tuple[nn.Module, str]:
    """torchvision's network with weights and a sentence on where they come from.

    TDLIB_WEIGHTS may name a file of trained ResNet-18 weights; without it, and for ResNet-50, every
    convolution gets a decaying kernel.
    """
    file = os.environ.get("TDLIB_WEIGHTS")
    if name == "resnet18" and file and Path(file).is_file():
        return tdlib.models.build(name, 1000, weights=file).eval(), "trained weights"
    torch.manual_seed(seed)
    model = tdlib.models.build(name, 1000).eval()
    with torch.no_grad():
        for index, module in enumerate(m for m in model.modules() if isinstance(m, nn.Conv2d)):
            out, inp, side, _ = module.weight.shape
            module.weight.copy_(decaying_kernel(out, inp, side, seed=seed + index))
    return model, f"random weights, spectrum decaying as k^-{EXPONENT}"


def convolutions(model: nn.Module) -> dict[str, Tensor]:
    """Weights of all convolutions but the first (the stem stays dense)."""
    found = {name: m.weight.detach() for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    return dict(list(found.items())[1:])


def relative_error(weight: Tensor, approximation: Tensor) -> float:
    """Frobenius error relative to the weight, in float64."""
    weight = weight.double()
    return float((weight - approximation.double()).norm() / weight.norm())
