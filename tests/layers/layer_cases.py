"""The case table: every kind of layer geometry and every format that covers it."""

from __future__ import annotations

import torch
from torch import nn

#: name -> (layer arguments, input height and width); in 6, out 8 channels unless given.
GEOMETRIES = {
    "3x3": dict(kernel_size=3, padding=1),
    "no padding": dict(kernel_size=3),
    "no bias": dict(kernel_size=3, padding=1, bias=False),
    "stride 2": dict(kernel_size=3, stride=2, padding=1),
    "unequal strides": dict(kernel_size=3, stride=(2, 1), padding=(1, 0)),
    "dilation": dict(kernel_size=3, dilation=2, padding=2),
    "unequal dilation": dict(kernel_size=3, dilation=(1, 2), padding=(2, 1), stride=(1, 2)),
    "same": dict(kernel_size=3, padding="same"),
    "same, even kernel, dilation": dict(kernel_size=(2, 3), padding="same", dilation=(2, 1)),
    "valid": dict(kernel_size=(3, 5), padding="valid"),
    "reflect": dict(kernel_size=3, padding=1, padding_mode="reflect"),
    "replicate": dict(kernel_size=(3, 5), padding=(1, 2), padding_mode="replicate", stride=2),
    "circular": dict(kernel_size=3, padding=(2, 1), padding_mode="circular"),
    "same, circular": dict(kernel_size=3, padding="same", padding_mode="circular"),
    "1xk": dict(kernel_size=(1, 5), padding=(0, 2)),
    "1x1": dict(kernel_size=1),
    "1x1, stride, padding": dict(kernel_size=1, stride=(2, 3), padding=(1, 0)),
    "1x1, padding, replicate": dict(kernel_size=1, padding=1, padding_mode="replicate", bias=False),
}
LINEAR = {"linear": dict(), "linear, no bias": dict(bias=False)}

#: format with options, as (format, options)
VARIANTS = [
    ("tt", {}),
    ("tt", {"order": 2}),
    ("tt", {"out_modes": (4, 2), "in_modes": (6,)}),
    ("tucker2", {}),
    ("cp", {}),
    ("cp4", {}),
    ("svd", {}),
    ("tr", {}),
    ("tr", {"order": 2}),
    ("tt-matrix", {}),
    ("tt-matrix", {"out_modes": (2, 2, 2), "in_modes": (3, 1, 2)}),
]


def make_layer(name: str, **more: object) -> nn.Module:
    """The layer of that name, in double precision, with fixed random weights."""
    torch.manual_seed(0)
    if name in LINEAR:
        return nn.Linear(6, 8, dtype=torch.float64, **LINEAR[name])
    return nn.Conv2d(6, 8, dtype=torch.float64, **{**GEOMETRIES[name], **more})


def make_input(layer: nn.Module, batch: int = 1) -> torch.Tensor:
    """A fixed random input for the layer."""
    generator = torch.Generator().manual_seed(1)
    shape = (batch, 3, 6) if isinstance(layer, nn.Linear) else (batch, 6, 5, 6)
    return torch.randn(shape, generator=generator, dtype=layer.weight.dtype)
