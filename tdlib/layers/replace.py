"""Replace the layers that a plan names: `decompose` by factors of their weights, `skeleton` by random
ones."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from tdlib.errors import DataError, NonFiniteError, TdlibError, unknown
from tdlib.layers.chains import Layer
from tdlib.layers.formats import Format, get_format
from tdlib.layers.weighted import factorise_weighted

Row = Mapping[str, Any]


def decompose(
    model: nn.Module, plan: Mapping[str, Any], statistics: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """A copy of the model in which every planned layer is replaced by its factorisation.

    plan: a `Plan`, or a plain mapping from layer names to {"format", "ranks", "options"}.
    statistics: layer name → Σ (n, n), the second moments of its inputs; factors then minimise the error of
    the layer's output on that data instead of the error of its weight.
    A replaced layer keeps device, dtype, train/eval mode and requires_grad. `model` is not changed.
    Raises: NonFiniteError naming the layer whose weight has NaN or Inf; UnknownName for a layer the model
    has not; DataError for a layer without statistics.
    """
    rows = plan_rows(plan)
    if statistics is not None:
        missing = sorted(set(rows) - set(statistics))
        if missing:
            raise DataError(
                f"statistics lack {', '.join(missing)}; they have: {', '.join(statistics) or 'none'}"
            )

    def factorised(name: str, layer: Layer, row: Format, ranks: tuple[int, ...], options: Row) -> nn.Module:
        weight = layer.weight.detach()
        if not bool(torch.isfinite(weight).all()):
            raise NonFiniteError(f"layer {name!r} has NaN or Inf in its weight")
        if statistics is None:
            factors = row.factorise(weight, ranks, **options)
        elif row.factorise_sigma is None:
            raise TdlibError(f"format {row.name!r} has no data-aware factorisation; leave `statistics` out")
        else:
            H = getattr(statistics, "weights", {}).get(name)
            factors = factorise_weighted(row, weight, ranks, statistics[name], H, options)
        return row.build(layer, factors, **options)

    with torch.no_grad():
        result = _replace(model, rows, factorised)
    if hasattr(plan, "to_dict"):
        result._tdlib["plan"] = plan.to_dict()  # type: ignore[index, operator]
    return result


def skeleton(model: nn.Module, layers: Mapping[str, Any]) -> nn.Module:
    """The structure that `decompose` gives, with random factors: to load weights into, or to train from
    scratch.

    layers: as `plan` in `decompose`. The factors are scaled so that the composed kernels have Kaiming
    variance.
    """

    def blank(name: str, layer: Layer, row: Format, ranks: tuple[int, ...], options: Row) -> nn.Module:
        module = row.blank(layer, ranks, **options)
        reset_parameters(module)
        return module

    return _replace(model, plan_rows(layers), blank)


@torch.no_grad()
def reset_parameters(module: nn.Module, gain: float = 2.0) -> None:
    """Random factors for one replaced layer; the composed kernel's entries have variance gain / fan-in.

    Each member of a chain gets variance 1 / fan-in, the last one `gain` times that: the ranks cancel in the
    product.
    """
    if not isinstance(module, nn.Sequential):
        cast(Any, module).reset_parameters(gain)
        return
    members = [member for member in module if isinstance(member, nn.Conv2d | nn.Linear)]
    for k, member in enumerate(members):
        scale = gain if k == len(members) - 1 else 1.0
        member.weight.normal_(0.0, math.sqrt(scale / member.weight[0].numel()))


def plan_rows(plan: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Layer name → {"format", "ranks", "options"} as plain lists and dicts, from a Plan or from such a
    mapping."""
    formats = getattr(plan, "formats", None)
    rows = {}
    for name, value in plan.items():
        if formats is not None:
            value = {"format": formats[name], "ranks": value, "options": plan.options[name]}  # type: ignore[attr-defined]
        options = {
            k: list(v) if isinstance(v, tuple) else v for k, v in dict(value.get("options") or {}).items()
        }
        rows[name] = {
            "format": str(value["format"]),
            "ranks": [int(r) for r in value["ranks"]],
            "options": options,
        }
    return rows


def _replace(model: nn.Module, rows: Mapping[str, Row], make: Callable[..., nn.Module]) -> nn.Module:
    """Deep copy of `model` with make(name, layer, format, ranks, options) in place of every named layer."""
    result = copy.deepcopy(model)
    done: dict[str, Any] = {}
    for name, row in rows.items():
        layer = _find(result, name)
        scheme = get_format(row["format"])
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in row["options"].items()}
        try:
            ranks = scheme.clip(layer.weight.shape, row["ranks"], **options)
            module = make(name, layer, scheme, ranks, options)
        except TdlibError as error:
            if name in str(error):
                raise
            raise type(error)(f"layer {name!r}: {error}") from error
        if layer is result:
            result = module
        for parent, attribute in _places(result, layer):
            setattr(parent, attribute, module)
        done[name] = {**row, "ranks": list(ranks)}
    before = getattr(model, "_tdlib", None) or {"spec": None, "layers": {}}
    record = {
        "spec": copy.deepcopy(before.get("spec")),
        "layers": {**copy.deepcopy(before.get("layers", {})), **done},
    }
    result._tdlib = record  # type: ignore[assignment]
    return result


def _find(model: nn.Module, name: str) -> Layer:
    """The Conv2d or Linear of that name in the model."""
    known: dict[str, Layer] = {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, nn.Conv2d | nn.Linear) and type(m) in (nn.Conv2d, nn.Linear)
    }
    if name not in known:
        raise unknown("layer", name, known)
    layer = known[name]
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        raise TdlibError(f"layer {name!r} is a grouped convolution ({layer.groups} groups); it stays dense")
    return layer


def _places(model: nn.Module, layer: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """(parent, attribute) of every place where the layer is registered; more than one if it is shared."""
    for parent in list(model.modules()):
        for attribute, child in list(parent._modules.items()):  # named_children would hide a repeated one
            if child is layer:
                yield parent, attribute


__all__ = ["decompose", "plan_rows", "reset_parameters", "skeleton"]
