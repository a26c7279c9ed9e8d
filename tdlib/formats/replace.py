"""Replace the layers that a plan names: `decompose` by factors of their weight, `skeleton` by random ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm import tqdm

from tdlib import memory
from tdlib.errors import DataError, TdlibError, unknown
from tdlib.formats.base import KernelFormat, LayerPlan, finite, get_format
from tdlib.formats.chains import Layer, computes_plainly
from tdlib.network import attach, check_layered, duplicate, provenance

WORKSPACE = 5  # float64 matrices as large as Sigma that a decomposition under it takes


def decompose(
    model: nn.Module,
    plan: Mapping[str, Any],
    statistics: Mapping[str, Tensor] | None = None,
    *,
    progress: bool = False,
) -> nn.Module:
    """A copy of the model in which every planned layer is replaced by its factorisation.

    plan: a `Plan`, or a plain mapping from layer names to {"format", "ranks", "options"}.
    statistics: layer name → Σ (n, n), the second moments of its inputs; factors then minimise the error of
    the layer's output on that data instead of the error of its weight. Where they carry the Fisher
    information at the outputs (`Statistics.weights`), the error is weighted by it.
    A replaced layer keeps device, dtype, train/eval mode and requires_grad. `model` is not changed.
    Raises: NonFiniteError naming the layer whose weight has NaN or Inf; UnknownName for a layer the model
    has not; TdlibError for one that must stay as it is (see `obstacle`); DataError for a layer without
    statistics; MemoryLimitError.
    """
    missing = [] if statistics is None else sorted(set(plan) - set(statistics))
    if missing:
        known = ", ".join(statistics or ()) or "none"
        raise DataError(f"statistics lack {', '.join(missing)}; they have: {known}")
    if plan and statistics is not None:
        widest = max(plan, key=lambda name: len(statistics[name]))
        n = len(statistics[widest])
        what = f"the decomposition of layer {widest!r} under its Sigma ({n} x {n})"
        memory.require(WORKSPACE * 8 * n**2, what, "leave the layer out of the plan")
    fisher = getattr(statistics, "weights", {})

    def factorised(name: str, layer: Layer, bound: KernelFormat, ranks: Sequence[int]) -> nn.Module:
        sigma = None if statistics is None else statistics[name]
        factors = bound.decompose(finite(layer.weight, name), ranks, sigma, fisher.get(name))
        return bound.module(layer, factors)

    with torch.no_grad():
        return _replaced(model, plan, factorised, progress)


def blank(model: nn.Module, plan: Mapping[str, Any]) -> nn.Module:
    """The structure that `decompose` gives, with zero factors: to load weights into."""
    return _replaced(model, plan, lambda name, layer, bound, ranks: bound.blank(layer, ranks))


def skeleton(model: nn.Module, plan: Mapping[str, Any]) -> nn.Module:
    """The structure that `decompose` gives, with random factors: to train from scratch. They are
    scaled so that the composed kernels have Kaiming variance."""
    return _replaced(model, plan, lambda name, layer, bound, ranks: bound.random(layer, ranks))


def install(model: nn.Module, name: str, module: nn.Module, planned: LayerPlan) -> nn.Module:
    """Put `module` in the place of layer `name`, wherever that is registered, and note it; in place.

    Returns the model; `module` itself where the layer is the whole model (name "").
    """
    old, about = model.get_submodule(name), provenance(model)
    for parent, attribute in _places(model, old):
        setattr(parent, attribute, module)
    about.layers[name] = planned
    result = module if old is model else model
    attach(result, about)
    return result


def attached(module: nn.Module) -> str | None:
    """What is attached to this very module, so that it does more than its class says; or None."""
    if "forward" in vars(module):
        return "its forward is patched"
    held = [found for key, found in vars(module).items() if key.endswith("_hooks")]
    hooks = [hook for found in held if isinstance(found, dict) for hook in found.values()]  # fx: lists
    names = {getattr(hook, "__name__", type(hook).__name__) for hook in hooks}
    return f"hooks are attached to it ({', '.join(sorted(names))})" if hooks else None


def obstacle(layer: nn.Module) -> str | None:
    """Why factors of its weight cannot take this layer's place, or None: it computes something else than
    nn.Conv2d or nn.Linear do, or has something attached that would be lost."""
    if parametrize.is_parametrized(layer):
        return "its weight is parametrised"
    if not computes_plainly(layer):
        return f"{type(layer).__name__} has a forward of its own"
    if reason := attached(layer):
        return reason
    plain = vars(_plain(layer))
    own = [key for key in _names(vars(layer)) - _names(plain) if not key.startswith("_")]
    if own:
        return f"it has attributes of its own ({', '.join(sorted(own))})"
    weight = layer._parameters.get("weight")
    return None if weight is not None and weight.is_floating_point() else "its weight is no real parameter"


def project(weight: Tensor, format: str, ranks: Sequence[int], **options: Any) -> Tensor:
    """The kernel of these ranks nearest to `weight` as the format's decomposition finds it; same shape and
    dtype. torch.vmap maps it over a stack of kernels where the format is `batched` (not CP, nor shuffled)."""
    return get_format(format).bind(weight.shape, **options).project(weight, ranks)


def _replaced(
    model: nn.Module, plan: Mapping[str, Any], make: Callable[..., nn.Module], progress: bool = False
) -> nn.Module:
    """Deep copy of `model` with make(name, layer, bound format, ranks) in place of every named layer."""
    check_layered(model)
    result = duplicate(model)
    about = provenance(result)
    attach(result, about)
    for name in tqdm(list(plan), "decomposition", unit="layer", disable=not progress):
        planned, layer = LayerPlan.of(plan[name]), _find(result, name)
        try:
            bound = planned.bind(layer.weight.shape)
            module = make(name, layer, bound, planned.ranks)
        except TdlibError as error:
            if f"layer {name!r}" in str(error):
                raise
            raise type(error)(f"layer {name!r}: {error}") from error
        planned = LayerPlan(planned.format, bound.clip(planned.ranks), bound.options)
        result = install(result, name, module, planned)
    if hasattr(plan, "to_dict"):
        about.plan = plan.to_dict()
    return result


def _find(model: nn.Module, name: str) -> Layer:
    """The layer of that name in the model. Raises UnknownName; TdlibError for one that must stay dense."""
    known: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, Layer)}
    if name not in known:
        raise unknown("layer", name, known)
    layer, reason = known[name], obstacle(known[name])
    if layer.__dict__.get("groups", 1) != 1:
        reason = f"it is a grouped convolution ({layer.groups} groups)"
    if reason:
        raise TdlibError(f"layer {name!r} stays dense: {reason}")
    return layer


def _plain(layer: nn.Module) -> nn.Module:
    """A layer of torch's own of the same kind."""
    kind: Any = next(base for base in type(layer).__mro__ if base.__module__.startswith("torch.nn.modules."))
    return kind(1, 1, 1, device="meta")


def _names(held: Mapping[str, Any]) -> set[str]:
    """Names of a module's attributes, parameters, buffers and children."""
    return set(held).union(held["_parameters"], held["_buffers"], held["_modules"])


def _places(model: nn.Module, layer: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """(parent, attribute) of every place where the layer is registered; more than one if it is shared."""
    for parent in list(model.modules()):
        for attribute, child in list(parent._modules.items()):  # named_children would hide a repeated one
            if child is layer:
                yield parent, attribute
