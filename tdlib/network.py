"""What a network knows of itself: how its dense form is built, what was replaced, what was measured."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from tdlib.errors import TdlibError

#: Provenance.inputs as JSON; classes: None where they are not known.
INPUTS = {
    "classes": (None, [str]), "input_shape": [int], "mean": [float], "std": [float], "interpolation": str,
}  # fmt: skip


@dataclass
class Provenance:
    """Where a network comes from.

    spec: {"name", "classes", "kwargs"} of `tdlib.models.build`; None for a network built elsewhere. layers:
    replaced layer -> its LayerPlan. plan: of the plan that replaced them, as `Plan.to_dict` gives it. report:
    what a method measured on its way. inputs: of the data that it was trained on, as `Bundle.description`
    gives them (class names, mean and std, shape of one input, interpolation).
    """

    spec: dict[str, Any] | None = None
    layers: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] | None = None
    report: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] | None = None


def provenance(model: nn.Module) -> Provenance:
    """The network's own, or an empty one."""
    found = model.__dict__.get("_tdlib")
    return Provenance() if found is None else found


def attach(model: nn.Module, about: Provenance) -> None:
    """Make `about` the network's own; copies of the network take it along."""
    model.__dict__["_tdlib"] = about


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and values of all parameters and buffers: equal weights, equal
    fingerprint, on whichever device."""
    sha = hashlib.sha256()
    for name, value in model.state_dict().items():
        sha.update(repr((name, tuple(value.shape), str(value.dtype))).encode())
        sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def duplicate(model: nn.Module, share: Iterable[torch.Tensor] = ()) -> nn.Module:
    """A deep copy that has the tensors of `share` in common with the model.

    Also of a network that holds computed tensors, as old-style weight and spectral norms do. Raises:
    TdlibError for one that cannot be copied.
    """
    held = [value for module in model.modules() for value in vars(module).values()]
    computed = [value for value in held if isinstance(value, torch.Tensor) and not value.is_leaf]
    memo = {id(value): value.detach().clone() for value in computed} | {id(value): value for value in share}
    try:
        return copy.deepcopy(model, memo)
    except (RuntimeError, TypeError) as error:
        raise TdlibError(f"the network cannot be copied: {error}") from error


def check_layered(model: nn.Module) -> None:
    """Raises TdlibError for what has no layers to look at: a program that torch.export or TorchScript made of
    a network, or lazy layers that have seen no input."""
    parts = list(model.modules()) if isinstance(model, nn.Module) else [model]
    classes = {base for part in parts for base in type(part).__mro__}
    programs = any(base.__module__.startswith(("torch.export.", "torch.jit.")) for base in classes)
    if programs or not isinstance(model, nn.Module):
        raise TdlibError(
            f"a network of layers (nn.Module) is needed, got {type(model).__name__}: pass the network, "
            "as it was before torch.export or TorchScript"
        )
    for name, value in model.named_parameters():
        if is_lazy(value):
            raise TdlibError(f"{name!r} is not initialised yet: run the model once on a batch first")


def first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first of a call's arguments, given by position or by name; None where there is none."""
    return next(iter((*args, *kwargs.values())), None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
