"""Projection of many kernels on their low-rank sets: layers of equal shape and plan in one batched call."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tdlib.errors import RankError, TdlibError, unknown
from tdlib.formats.base import KernelFormat, LayerPlan, Shape

Kernels = Mapping[str, Tensor]


class Projection:
    """P of all planned layers of a model: kernels by name -> the nearest ones of the planned ranks.

    Raises: UnknownName for a layer that the model lacks; RankError for an empty plan.
    """

    def __init__(self, model: nn.Module, plan: Mapping[str, LayerPlan]) -> None:
        if not plan:
            raise RankError("there is no layer to project: the plan is empty")
        self.groups: dict[tuple[Shape, LayerPlan], list[str]] = {}
        for name, planned in plan.items():
            self.groups.setdefault((tuple(dense_weight(model, name).shape), planned), []).append(name)
        self.bound: list[KernelFormat] = [planned.bind(shape) for shape, planned in self.groups]

    @torch.no_grad()
    def __call__(self, kernels: Kernels) -> dict[str, Tensor]:
        """Projected kernels, float32."""
        projected: dict[str, Tensor] = {}
        for ((_, planned), names), bound in zip(self.groups.items(), self.bound, strict=True):

            def one(kernel: Tensor, bound: KernelFormat = bound, planned: LayerPlan = planned) -> Tensor:
                return bound.project(kernel, planned.ranks)

            stack = [kernels[name].float() for name in names]
            batched = len(names) > 1 and bound.batched
            found = torch.vmap(one)(torch.stack(stack)).unbind(0) if batched else [one(k) for k in stack]
            projected.update(zip(names, found, strict=True))
        return projected


def dense_weight(model: nn.Module, name: str) -> nn.Parameter:
    """The kernel of a dense layer. Raises: UnknownName, TdlibError for a module that has none."""
    modules = dict(model.named_modules())
    if name not in modules:
        raise unknown("layer", name, modules)
    weight = getattr(modules[name], "weight", None)
    if not isinstance(weight, nn.Parameter):
        raise TdlibError(f"layer {name!r} ({type(modules[name]).__name__}) has no dense weight to project")
    return weight


def relative_distance(w: Kernels, z: Kernels) -> tuple[float, dict[str, float]]:
    """||W - Z|| / ||W|| of all layers together and of each layer; one transfer to the host."""
    pairs = [torch.stack([(w[name] - z[name]).square().sum(), w[name].square().sum()]) for name in w]
    squares = torch.stack(pairs).double()
    squares = torch.cat([squares, squares.sum(0, keepdim=True)]).clamp_min(1e-300)
    *each, overall = (squares[:, 0] / squares[:, 1]).sqrt().tolist()
    return overall, dict(zip(w, each, strict=True))


def truncation_error(model: nn.Module, plan: Mapping[str, LayerPlan]) -> tuple[float, dict[str, float]]:
    """||W - P(W)|| / ||W|| of all planned layers together and of each: what decomposing now would cut off."""
    kernels = {name: dense_weight(model, name).detach().float() for name in plan}
    return relative_distance(kernels, Projection(model, plan)(kernels))
