"""The case table: layers of every geometry, the formats that hold them, and what must be true of both."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tdlib.formats import FORMATS, KernelFormat, get_format, project, to_dense

Case = tuple[str, str, dict[str, Any]]  # layer, format, options

#: name -> arguments of a convolution of 6 channels to 8.
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "3x3": dict(kernel_size=3, padding=1),
    "no padding": dict(kernel_size=3),
    "no bias": dict(kernel_size=3, padding=1, bias=False),
    "stride 2": dict(kernel_size=3, stride=2, padding=1),
    "unequal strides": dict(kernel_size=3, stride=(2, 1), padding=(1, 0)),
    "dilation": dict(kernel_size=3, dilation=2, padding=2),
    "all unequal": dict(kernel_size=(3, 2), dilation=(1, 2), padding=(2, 1), stride=(1, 2)),
    "same": dict(kernel_size=3, padding="same"),
    "same, even kernel, dilation": dict(kernel_size=(2, 3), padding="same", dilation=(2, 1)),
    "valid": dict(kernel_size=(3, 5), padding="valid"),
    "reflect": dict(kernel_size=3, padding=1, padding_mode="reflect"),
    "replicate": dict(kernel_size=(3, 5), padding=(1, 2), padding_mode="replicate", stride=2),
    "circular": dict(kernel_size=3, padding=(2, 1), padding_mode="circular"),
    "same, circular": dict(kernel_size=3, padding="same", padding_mode="circular"),
    "1xk": dict(kernel_size=(1, 5), padding=(0, 2)),
}
POINTWISE: dict[str, dict[str, Any]] = {
    "1x1": dict(kernel_size=1),
    "1x1, stride, padding": dict(kernel_size=1, stride=(2, 3), padding=(1, 0)),
    "1x1, replicate": dict(kernel_size=1, padding=1, padding_mode="replicate", bias=False),
}
#: The same in one and in three dimensions; every name says which.
IN_1D: dict[str, dict[str, Any]] = {
    "1-D": dict(kernel_size=3, stride=2, padding=2, dilation=2),
    "1-D, same": dict(kernel_size=4, padding="same", dilation=2, padding_mode="circular", bias=False),
    "1-D, reflect": dict(kernel_size=5, padding=2, padding_mode="reflect"),
    "1-D, 1": dict(kernel_size=1, stride=2, padding=1),
}
IN_3D: dict[str, dict[str, Any]] = {
    "3-D": dict(kernel_size=(3, 2, 3), stride=(1, 2, 1), padding=(0, 1, 2), dilation=(1, 1, 2)),
    "3-D, same": dict(kernel_size=(2, 3, 1), padding="same", padding_mode="replicate"),
    "3-D, circular": dict(kernel_size=(1, 3, 3), padding=(0, 1, 2), padding_mode="circular", bias=False),
    "3-D, 1": dict(kernel_size=1, stride=(1, 2, 1), padding=(1, 0, 1)),
}
LINEAR: dict[str, dict[str, Any]] = {"linear": dict(), "linear, no bias": dict(bias=False)}

#: The ways to carry a convolution's geometry: in one member, height and width apart, in the layer itself.
WAYS = ("tucker2", "svd", "shuffled-tt")
#: Everything else that holds a convolution.
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("tt", {}),
    ("tt", {"order": 2}),
    ("tt", {"out_modes": (4, 2), "in_modes": (6,)}),
    ("cp", {}),
    ("cp4", {}),
    ("tr", {}),
    ("tr", {"order": 2}),
    ("shuffled-tt", {"modes": "kernel", "shuffle": False}),
    ("shuffled-tr", {"seed": 5}),
    ("shuffled-cp", {"order": 3}),
    ("shuffled-tucker", {}),
]
#: What holds layers without spatial extent.
MATRICES: list[tuple[str, dict[str, Any]]] = [
    ("svd", {}),
    ("tt", {"order": 2}),
    ("tr", {}),
    ("shuffled-tucker", {"seed": 3}),
]
#: What holds convolutions of any number of dimensions.
ANY = ("tucker2", "cp", "cp4", "svd", "shuffled-tt")
PAIRED: list[tuple[str, dict[str, Any]]] = [
    ("tt-matrix", {}),
    ("tt-matrix", {"out_modes": (2, 2, 2), "in_modes": (3, 1, 2)}),
]

# A format that is not named above is tried as it comes, on every kind of layer that it takes.
NAMED = {*WAYS, *(format for format, _ in [*OTHERS, *MATRICES, *PAIRED])}
OTHERS += [(name, {}) for name, row in FORMATS.items() if name not in NAMED and "conv" in row.kinds]
MATRICES += [(name, {}) for name, row in FORMATS.items() if name not in NAMED and "pointwise" in row.kinds]
PAIRED += [
    (name, {})
    for name, row in FORMATS.items()
    if name not in NAMED and "linear" in row.kinds and "pointwise" not in row.kinds
]

CASES: list[Case] = [
    *((name, format, {}) for name in CONVOLUTIONS for format in WAYS),
    *((name, format, options) for name in ("all unequal", "circular") for format, options in OTHERS),
    *((name, format, options) for name in POINTWISE for format, options in MATRICES),
    *((name, format, options) for name in LINEAR for format, options in [*MATRICES, *PAIRED]),
    *((name, format, {}) for name in (*IN_1D, *IN_3D) for format in ANY),
]
#: Every kind of module once.
KINDS: list[Case] = [
    ("unequal strides", "tucker2", {}),
    ("unequal strides", "cp4", {}),
    ("unequal strides", "svd", {}),
    ("unequal strides", "tt", {"order": 2}),
    ("unequal strides", "tr", {}),
    ("unequal strides", "shuffled-tt", {"seed": 7}),
    ("1x1, stride, padding", "svd", {}),
    ("1-D", "tucker2", {}),
    ("3-D", "cp4", {}),
    ("linear", "svd", {}),
    ("linear", "tr", {}),
    ("linear", "tt-matrix", {}),
    ("linear", "shuffled-cp", {}),
]


def case_id(value: object) -> str:
    """How pytest shows a part of a case."""
    return value if isinstance(value, str) else str(value or "")


def make_layer(name: str) -> Any:
    """The layer of that name, in double precision, with fixed random weights."""
    torch.manual_seed(0)
    if name in LINEAR:
        return nn.Linear(6, 8, dtype=torch.float64, **LINEAR[name])
    kind = {"1-D": nn.Conv1d, "3-D": nn.Conv3d}.get(name[:3], nn.Conv2d)
    return kind(6, 8, dtype=torch.float64, **(CONVOLUTIONS | POINTWISE | IN_1D | IN_3D)[name])


def make_input(layer: Any) -> Tensor:
    """A fixed random input for the layer, of batch 1."""
    generator = torch.Generator().manual_seed(1)
    shape = (1, 3, 6) if isinstance(layer, nn.Linear) else (1, 6, *(5, 6, 4)[: layer.weight.ndim - 2])
    return torch.randn(shape, generator=generator, dtype=layer.weight.dtype, device=layer.weight.device)


def middle(bound: KernelFormat) -> tuple[int, ...]:
    """Ranks about half way to the bounds (CP's bounds are far off)."""
    return bound.clip([min(6, max(1, (b + 1) // 2)) for b in bound.bounds])


def replaced(layer: Any, bound: KernelFormat, ranks: tuple[int, ...]) -> nn.Module:
    """The module in place of the layer."""
    return bound.module(layer, bound.decompose(layer.weight.detach(), ranks))


def check_full_rank(name: str, format: str, options: dict[str, Any]) -> None:
    """At the bounds the module is the same function."""
    layer = make_layer(name)
    bound, x = get_format(format).bind(layer.weight.shape, **options), make_input(layer)
    assert bound.clip(bound.bounds) == bound.bounds
    module = replaced(layer, bound, bound.bounds)
    torch.testing.assert_close(module(x), layer(x), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(to_dense(module), layer.weight, rtol=1e-6, atol=1e-7)


def check_composed_kernel(name: str, format: str, options: dict[str, Any]) -> None:
    """Below them it is the layer with the composed kernel, at the predicted parameters and MACs."""
    layer = make_layer(name)
    bound, x = get_format(format).bind(layer.weight.shape, **options), make_input(layer)
    ranks = middle(bound)
    factors = bound.decompose(layer.weight.detach(), ranks)
    module, kernel = bound.module(layer, factors), bound.compose(factors)
    dense = copy.deepcopy(layer)
    dense.weight.data = kernel
    torch.testing.assert_close(to_dense(module), kernel)
    torch.testing.assert_close(project(layer.weight.detach(), format, ranks, **options), kernel)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        found = module(x)
    expected = dense(x)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous()
    maps = ((3, 1), (3, 1)) if layer.weight.ndim == 2 else (x.shape[2:], expected.shape[2:])
    bias = 0 if layer.bias is None else layer.bias.numel()
    counted = sum(p.numel() for p in module.parameters()) - bias, counter.get_total_flops() // 2
    assert bound.cost(ranks, *maps) == counted
    assert [tuple(f.shape) for f in factors] == bound.shapes(ranks)
