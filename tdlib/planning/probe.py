"""One forward pass that shows which layers their network lets go of.

A parent may do more with a layer than call it: read its attributes, ask for its class, or hold on to the very
object in a patched forward. Inspection cannot tell; running the network does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from tdlib.formats import KernelFormat, LayerPlan, install
from tdlib.network import duplicate
from tdlib.planning.cost import Inputs, call, untouched


def probe(
    model: nn.Module, inputs: Inputs, output: Any, kernels: Mapping[str, KernelFormat]
) -> dict[str, str]:
    """{layer: why it cannot be replaced in this network}; empty where all can.

    inputs, output: of one forward pass. kernels: layer name -> the format that is to replace it. In a copy,
    every layer gives way to the module that its format puts there, except that this one computes with the
    dense weight: the output must be the model's own. If it is not, the layers go in by halves, and those with
    which it fails stay out. The copy shares the model's tensors; modes, buffers and random state are as
    before afterwards. A network on the meta device has no output to compare: {}.
    """
    without_values = any(p.is_meta for p in model.parameters())
    if not kernels or without_values or _trial(model, inputs, kernels, _leaves(output)) is None:
        return {}
    with untouched(model):
        output = call(model, inputs)  # again: attention may have rounded otherwise when counted
    expected = _leaves(output)
    found: dict[str, str] = {}

    def accepted(names: list[str], before: list[str]) -> list[str]:
        """`before` and those of the names that can be replaced with them."""
        reason = _trial(model, inputs, {name: kernels[name] for name in before + names}, expected)
        if reason is None:
            return before + names
        if len(names) == 1:
            found[names[0]] = reason
            return before
        half = len(names) // 2
        return accepted(names[half:], accepted(names[:half], before))

    accepted(list(kernels), [])
    return found


def _trial(
    model: nn.Module, inputs: Inputs, kernels: Mapping[str, KernelFormat], expected: Sequence[Any]
) -> str | None:
    """What goes wrong with these layers replaced, or None."""
    held: set[nn.Module] = set()  # layers, of the copy or the model itself, that ran beside their stand-ins
    with untouched(model), ExitStack() as context:
        network = duplicate(model, share=chain(model.parameters(), model.buffers()))
        layers = [net.get_submodule(name) for net in (network, model) for name in kernels]
        for (name, kernel), layer in zip(kernels.items(), layers, strict=False):
            module = _stand_in(layer, kernel)
            network = install(network, name, module, LayerPlan(kernel.name, ()))
        for layer in layers:
            hook = layer.register_forward_pre_hook(lambda layer, _: held.add(layer))
            context.callback(hook.remove)
        try:
            output = _leaves(call(network, inputs))
        except Exception as error:  # the model's own code
            line = (str(error).splitlines() or [""])[0]
            return f"the network does more with it than call it ({type(error).__name__}: {line})"
    if held:
        return "a list or a patched forward holds on to it: the network would still call the dense layer"
    if len(output) != len(expected) or not all(map(_same, output, expected)):
        return "the network does more with it than call it (its output differs when the layer is replaced)"
    return None


def _stand_in(layer: Any, kernel: KernelFormat) -> Any:
    """The format's module for this layer at the smallest ranks, computing as the layer does."""
    module: Any = kernel.blank(layer, kernel.clip((1,) * len(kernel.bounds)))
    if parametrize.is_parametrized(module):
        module.parametrizations.weight.forward = lambda: layer.weight
    else:
        module.forward, module.kernel = layer.forward, lambda: layer.weight
    return module


def _leaves(output: Any) -> list[Any]:
    """What an output holds; of an object that torch cannot look into (a dataclass), its attributes."""
    found = tree_leaves(output)
    return tree_leaves([x if isinstance(x, Tensor) else getattr(x, "__dict__", x) for x in found])


def _same(a: Any, b: Any) -> bool:
    """Whether two outputs are equal up to rounding (attention's fast path rounds otherwise)."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    size = b.abs().nan_to_num(0, 0, 0).max().item() if b.numel() else 0.0
    return torch.allclose(a, b, rtol=0, atol=size * torch.finfo(a.dtype).eps ** 0.5, equal_nan=True)
