"""Iterative decomposition: compress a little, fine-tune, compress again, until the budget is met (MUSCO).

Source: Gusak, Kholiavchenko, Ponomarev, Markeeva, Blagoveschensky, Cichocki, Oseledets, "Automated
Multi-Stage Compression of Neural Networks" (first named "One time is not enough"), ICCV Workshops 2019 (arXiv
1903.09973).

    repeat until cost(network) = cost(dense network) / ratio:                                       (a pass)
        choose smaller ranks for every layer             (`planning.shrinking`, eq. 1 and 2 there)
        for each group of layers, last group first:
            decompose its layers at these ranks
            fine-tune the network; stop when validation accuracy has not risen for `patience` epochs

A k×k convolution becomes Tucker-2 (or CP), a 1×1 convolution or linear layer an SVD. The ranks of the last
pass are trimmed, so that it ends at the budget and not below.

From the second pass on only the Tucker core G (or the second factor of the SVD) is decomposed, and the new
outer factors A, B are multiplied into the 1×1 convolutions around it, so a chain never grows:

    W = G x_0 U x_1 V,   G ~ G' x_0 A x_1 B   =>   W ~ G' x_0 (U A) x_1 (V B)                       (3)

Fine-tuning makes U and V lose their orthonormal columns; the core nearest to G is then not the one nearest to
W. With `orthogonal` (default) the triangular factors of U and V move into G first, which makes (3) the
Tucker-2 projection of W itself; `orthogonal=False` is the published step. A CP core is diagonal, so a smaller
rank is fitted to the kernel.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..errors import TdlibError, unknown
from ..layers.replace import decompose
from ..planning import Plan, plan
from ..planning.budget import Budget, Choice, make_budget, spent
from ..planning.candidates import Ranks, candidates
from ..planning.cost import count
from ..planning.shrinking import accept, check_reachable, check_rule, next_ranks, trim
from ..train import evaluate, fit
from .direct import (
    accuracies,
    decompose_and_finetune,
    end_layers,
    require_finished,
    stage,
    training_options,
)
from .stepwise import EarlyStopping, Layer, recalibrated

FORMATS = ("tucker2", "cp")


def groups_of(names: Sequence[str], size: int | None) -> list[list[str]]:
    """Layers in groups of `size` (None: all in one), the last layers of the network first."""
    backwards = list(names)[::-1]
    size = size or max(1, len(backwards))
    return [backwards[k : k + size] for k in range(0, len(backwards), size)]


def compress(
    model: nn.Module,
    data: Any,
    *,
    ratio: float,
    by: str = "params",
    seed: int = 0,
    format: str = "tucker2",
    rule: str = "vbmf",
    weakening: float = 0.6,
    factor: float = 1.5,
    least: int = 2,
    skip: Sequence[str] | None = None,
    group_size: int | None = None,
    finetune_epochs: int = 5,
    patience: int = 3,
    final_epochs: int = 0,
    finetune_lr: float = 0.01,
    orthogonal: bool = True,
    progress: bool = True,
    **training: Any,
) -> nn.Module:
    """Compress in passes until `ratio` = dense / compressed ("params" or "macs") is met within 2 %.

    `model` (trained) is not changed. rule: "vbmf" with `weakening` w, or "nx", which divides every layer's
    parameters by `factor` x per pass; a pass in which "vbmf" finds nothing to cut falls back to "nx", and the
    report's rows say so. least: lower bound of every rank. skip None leaves the first convolution and the
    classifier dense. group_size: layers decomposed between two fine-tunings (None: all layers of a pass).
    Each fine-tuning takes at most `finetune_epochs`; final_epochs adds one at the end. Other keyword
    arguments go to `train.fit`.

    `result._tdlib["report"]`: ranks (one row per layer and pass), stages (one row per fine-tuning: epochs,
    validation accuracy before and after, ratio), passes, epochs (sum), achieved ratios, history, seconds, and
    accuracies in percent: dense; before (right after the last decomposition); recalibrated (the same with
    fresh BatchNorm statistics); after.

    Raises: BudgetError before any training where the ratio cannot be reached; UnknownName, TdlibError.
    """
    if format not in FORMATS:
        raise unknown("format of the iterative method", format, FORMATS)
    check_rule(rule, weakening, factor, least)
    if patience < 1 or finetune_epochs < 0 or (group_size is not None and group_size < 1):
        raise TdlibError(
            "need patience >= 1, finetune_epochs >= 0 and group_size >= 1, "
            f"got {patience}, {finetune_epochs}, {group_size}"
        )
    training = training_options(training, **{"seed": seed, "progress": progress, "schedule": "cosine"})
    started = time.perf_counter()
    skip = end_layers(model) if skip is None else tuple(skip)
    sites, _ = candidates(model, count(model, data.input_shape), format, by, skip, {})
    budget = make_budget(count(model, data.input_shape).by(by), sites, ratio, by)
    check_reachable(sites, budget, least)
    small = copy.deepcopy(model)
    layers = {site.name: Layer(site, small.get_submodule(site.name), orthogonal) for site in sites}
    choice: Choice = dict.fromkeys(layers)
    run = _Run(small, data, layers, dict(training), patience, finetune_lr, started)
    report: dict[str, Any] = {"method": "iterative", "rule": rule, "format": format}
    report["dense"] = accuracies(model, data, training.get("device"))
    number = 0
    while spent(sites, choice) > budget.limit and not budget.met(spent(sites, choice)):
        choice, used = _choose(layers, choice, budget, rule, weakening, factor, least)
        number += 1
        run.note_ranks(number, choice, used)
        for position, names in enumerate(groups_of(list(layers), group_size)):
            names = [name for name in names if run.replace(name, choice[name])]
            if names:
                run.finetune(number, position, names, finetune_epochs, budget)
    if final_epochs:
        run.finetune(number + 1, 0, [], final_epochs, budget)
    table = final_plan(model, data, run.ranks(), format, by)
    report |= {
        "ranks": run.rank_rows,
        "stages": run.stages,
        "passes": number,
        "history": {"finetune": run.history},
    }
    report |= {
        "epochs": len(run.history),
        "before": run.before,
        "recalibrated": run.recalibrated,
        "after": accuracies(small, data, training.get("device")),
    }
    report |= {"params_ratio": table.params_ratio, "macs_ratio": table.macs_ratio, "plan": table.to_dict()}
    report["seconds"] = time.perf_counter() - started
    before = getattr(model, "_tdlib", None) or {"spec": None, "layers": {}}
    done = {
        name: {"format": format, "ranks": list(ranks), "options": {}} for name, ranks in run.ranks().items()
    }
    record = {**copy.deepcopy(before), "layers": {**before.get("layers", {}), **done}, "report": report}
    small._tdlib = record  # type: ignore[assignment]
    return small


def one_shot(
    model: nn.Module,
    data: Any,
    ranks: Mapping[str, Sequence[int]],
    *,
    epochs: int,
    by: str = "params",
    seed: int = 0,
    format: str = "tucker2",
    finetune_lr: float = 0.01,
    progress: bool = True,
    **training: Any,
) -> nn.Module:
    """The comparison: decompose `model` once at the ranks that the iteration ended with, then fine-tune for
    all its epochs.

    ranks and epochs: of an iterative result, `final_ranks(small)` and `small._tdlib["report"]["epochs"]`.
    """
    training = training_options(training, seed=seed, progress=progress)
    report: dict[str, Any] = {"method": "one-shot", "dense": accuracies(model, data, training.get("device"))}
    table = final_plan(model, data, ranks, format, by)
    device = training.get("device")
    report["recalibrated"] = recalibrated(decompose(model, table), data, device)
    small, result = decompose_and_finetune(model, data, table, epochs=epochs, lr=finetune_lr, **training)
    report |= {"history": {"finetune": result.pop("history")}, "epochs": epochs, **result}
    report |= {"params_ratio": table.params_ratio, "macs_ratio": table.macs_ratio, "plan": table.to_dict()}
    small._tdlib["report"] = report  # type: ignore[index, operator, assignment]
    return small


def final_ranks(small: nn.Module) -> dict[str, Ranks]:
    """Layer -> ranks of a compressed network."""
    layers: Mapping[str, Any] = small._tdlib["layers"]  # type: ignore[index, assignment]
    return {name: tuple(row["ranks"]) for name, row in layers.items()}


def final_plan(model: nn.Module, data: Any, ranks: Mapping[str, Sequence[int]], format: str, by: str) -> Plan:
    """The plan that decomposes `model` at once at these ranks; every other layer stays dense."""
    return plan(model, tuple(data.input_shape), format=format, by=by, ranks=ranks)


def _choose(
    layers: Mapping[str, Layer],
    now: Choice,
    budget: Budget,
    rule: str,
    weakening: float,
    factor: float,
    least: int,
) -> tuple[Choice, str]:
    """Ranks of the next pass, trimmed to the budget, and the rule that gave them."""
    sites = [layer.site for layer in layers.values()]
    for used in dict.fromkeys((rule, "nx")):
        wanted = {
            name: next_ranks(layer.site, now[name], layer.core(), used, weakening, factor, least)
            for name, layer in layers.items()
        }
        choice = trim(sites, now, accept(sites, now, wanted), budget)
        if spent(sites, choice) < 0.98 * spent(sites, now) or budget.met(spent(sites, choice)):
            return choice, used
    lowest: Choice = {s.name: tuple(min(least, n) for n in (now[s.name] or s.bounds)) for s in sites}
    return trim(sites, now, accept(sites, now, lowest), budget), "least"


class _Run:
    """The network on its way and the tables of what happened to it."""

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        layers: dict[str, Layer],
        training: dict[str, Any],
        patience: int,
        lr: float,
        started: float,
    ) -> None:
        self.model, self.data, self.layers, self.training = model, data, layers, training
        self.patience, self.lr, self.started = patience, lr, started
        self.now: Choice = dict.fromkeys(layers)
        self.rank_rows: list[dict[str, Any]] = []
        self.stages: list[dict[str, Any]] = []
        self.history: list[dict[str, Any]] = []
        self.before: dict[str, float] = {}
        self.recalibrated: dict[str, float] = {}

    def ranks(self) -> dict[str, Ranks]:
        """Ranks of the decomposed layers."""
        return {name: ranks for name, ranks in self.now.items() if ranks is not None}

    def note_ranks(self, number: int, choice: Choice, rule: str) -> None:
        for name, ranks in choice.items():
            size, cost = self.layers[name].site.bounds, self.layers[name].site.both(ranks)
            row = {
                "pass": number,
                "layer": name,
                "rule": rule,
                "ranks": list(ranks or size),
                "bounds": list(size),
            }
            self.rank_rows.append({**row, "dense": ranks is None, "params": cost[0], "macs": cost[1]})

    def replace(self, name: str, ranks: Ranks | None) -> bool:
        """Put the layer at these ranks into the model; False where it has them already."""
        if ranks is None or ranks == self.now[name]:
            return False
        layer, self.now[name] = self.layers[name], ranks
        old, layer.module = layer.module, layer.at(ranks)
        for parent in list(self.model.modules()):
            for attribute, child in list(parent._modules.items()):
                if child is old:
                    setattr(parent, attribute, layer.module)
        return True

    def finetune(self, number: int, group: int, names: list[str], epochs: int, budget: Budget) -> None:
        """Fine-tune with early stopping; the weights of the best validation epoch stay."""
        began, device = time.perf_counter(), self.training.get("device")
        before = accuracies(self.model, self.data, device)
        if names:
            self.before, self.recalibrated = before, recalibrated(self.model, self.data, device)
        row: dict[str, Any] = {
            "pass": number,
            "group": group,
            "layers": names,
            "val_before": before.get("val"),
        }
        stopping = EarlyStopping(self.patience)
        options = stage(self.training, f"pass{number}-group{group}", self.started)
        rows: list[dict[str, Any]] = []
        if epochs:
            history = fit(self.model, self.data, epochs=epochs, lr=self.lr, hooks=(stopping,), **options)
            require_finished(history)
            stopping.restore(self.model)
            rows = history.rows
        done = len(self.history)
        self.history += [{**r, "epoch": done + k, "pass": number, "group": group} for k, r in enumerate(rows)]
        sites = [layer.site for layer in self.layers.values()]
        row |= {"epochs": len(rows), "ratio": budget.ratio_of(spent(sites, self.now))}
        row["val_after"] = (
            evaluate(self.model, self.data, "val", device=device)["accuracy"] if len(self.data.val) else None
        )
        self.stages.append({**row, "seconds": time.perf_counter() - began})
