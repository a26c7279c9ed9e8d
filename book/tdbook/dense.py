"""The dense networks that a chapter starts from, and what it compares with where they have to train on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

from tdbook.settings import file_name
from tdlib.data import Bundle
from tdlib.models import build
from tdlib.train import fit, fit_selected, require_finished

Options = Callable[[str], dict[str, Any]]  # name of a stage -> arguments of `train.fit`, device among them


def trained(
    model: str, data: Bundle, epochs: int, options: Options, *, select: bool = False, **given: Any
) -> Callable[[int], nn.Module]:
    """Seed -> the dense network after `epochs`, trained once, on its device. given: of `models.build`.

    select: the epoch that is best on validation is kept, else the last.
    """

    @cache
    def network(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        fresh = build(model, data.classes, input_shape=data.input_shape, **given)
        return _train(fresh, data, epochs, seed, options(f"{file_name(model)}-{seed}"), select)

    return network


def trained_on(
    data: Bundle, epochs: int, options: Options, tuning: Mapping[str, Any]
) -> Callable[[nn.Module, int], nn.Module]:
    """(dense network, seed) -> a copy after `epochs` more and those of fine-tuning, of which the best on
    validation is kept."""

    def network(dense: nn.Module, seed: int) -> nn.Module:
        further = _train(copy.deepcopy(dense), data, epochs, seed, options(f"further-{seed}"), False)
        last = {**options(f"reference-{seed}"), **tuning}
        return _train(further, data, last.pop("epochs"), seed, last, True)

    return network


def _train(
    net: nn.Module, data: Bundle, epochs: int, seed: int, options: dict[str, Any], select: bool
) -> nn.Module:
    if epochs and select:
        fit_selected(net, data, epochs=epochs, seed=seed, **options)
    elif epochs:
        require_finished(fit(net, data, epochs=epochs, seed=seed, **options))
    return net.to(options["device"])
