"""Projection of many kernels on their low-rank sets: equal shapes and ranks go through one batched call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import RankError, TdlibError, unknown
from ..layers.formats import get_format, project
from ..planning import Plan


class Group(NamedTuple):
    """Layers whose kernels have one shape, format and rank: projected as one stack."""

    names: tuple[str, ...]
    format: str
    ranks: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]


def group_layers(model: nn.Module, plan: Plan) -> list[Group]:
    """Group the plan's layers by (shape, format, ranks, options).

    Raises: UnknownName for a layer that the model lacks; RankError for an empty plan.
    """
    if not len(plan):
        raise RankError("ADMM needs at least one layer to regularise; the plan is empty")
    modules = dict(model.named_modules())
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name in plan:
        if name not in modules:
            raise unknown("layer", name, list(modules))
        options = tuple(sorted(plan.options.get(name, {}).items()))
        key = (tuple(dense_weight(modules[name]).shape), plan.formats[name], tuple(plan[name]), options)
        groups.setdefault(key, []).append(name)
    return [Group(tuple(names), key[1], key[2], key[3]) for key, names in groups.items()]


def project_groups(kernels: Mapping[str, Tensor], groups: Sequence[Group]) -> dict[str, Tensor]:
    """P of equation (2) for every kernel, one batched call per group; float32, no gradient."""
    projected: dict[str, Tensor] = {}
    with torch.no_grad():
        for names, fmt, ranks, options in groups:
            one = _projection(fmt, ranks, dict(options))
            stack = torch.stack([kernels[name].float() for name in names])
            if len(names) > 1 and get_format(fmt).batched:
                result = torch.vmap(one)(stack)
            else:
                result = torch.stack([one(kernel) for kernel in stack])
            projected.update(zip(names, result.float().unbind(0), strict=True))
    return projected


def truncation_error(model: nn.Module, plan: Plan) -> tuple[float, dict[str, float]]:
    """||W - P(W)|| / ||W|| of all planned layers together and of each: what decomposing now would cut off."""
    modules = dict(model.named_modules())
    kernels = {name: dense_weight(modules[name]).detach().float() for name in plan}
    return relative_distance(kernels, project_groups(kernels, group_layers(model, plan)))


def _projection(fmt: str, ranks: tuple[int, ...], options: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    def one(kernel: Tensor) -> Tensor:
        return project(kernel, fmt, ranks, **options)

    return one


def dense_weight(module: nn.Module) -> nn.Parameter:
    """The kernel of a dense layer. Raises TdlibError for a module that has none."""
    weight = module.weight
    if not isinstance(weight, nn.Parameter):
        raise TdlibError(f"{type(module).__name__} has no dense weight to regularise")
    return weight


def relative_distance(w: Mapping[str, Tensor], z: Mapping[str, Tensor]) -> tuple[float, dict[str, float]]:
    """||W - Z|| / ||W|| of all layers together and of each layer; one transfer to the host."""
    pairs = [torch.stack([(w[name] - z[name]).square().sum(), w[name].square().sum()]) for name in w]
    squares = torch.stack(pairs).double()
    squares = torch.cat([squares, squares.sum(0, keepdim=True)]).clamp_min(1e-300)
    *each, overall = (squares[:, 0] / squares[:, 1]).sqrt().tolist()
    return overall, dict(zip(w, each, strict=True))
