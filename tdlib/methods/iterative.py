"""Iterative decomposition: compress a little, fine-tune, compress again, until the budget is met (MUSCO).

Source: Gusak, Kholiavchenko, Ponomarev, Markeeva, Blagoveschensky, Cichocki, Oseledets, "Automated
Multi-Stage Compression of Neural Networks" (first named "One time is not enough"), ICCV Workshops 2019 (arXiv
1903.09973).

    repeat until cost(network) = cost(dense network) / ratio:                                       (a pass)
        choose smaller ranks for every layer             (`planning.shrinking`, eq. 1 and 2 there)
        for each group of layers, first group first:
            decompose its layers at these ranks
            re-estimate the statistics of BatchNorm on training images
            fine-tune the network; stop when validation accuracy has not risen for `patience` epochs

A k×k convolution becomes Tucker-2 (or CP), a 1×1 convolution or linear layer an SVD. Order, lowest ranks and
BatchNorm are as in the authors' code (musco-pytorch: `compression_step`, `min_rank`, and `calibrate` of its
example notebook). It runs a fixed number of passes; here they go on to a budget, and the ranks of the last
one are trimmed, so that it ends there and not below it (ours).

From the second pass on only the Tucker core (or the second factor of the SVD) is decomposed, so a chain never
grows (`formats.recompression`, eq. 3); with `orthogonal` (ours) the factors around it are made orthonormal
first.

Every fine-tuning has a schedule of its own. With `one_schedule` (ours) the learning rate goes down once, over
all of them.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from tdlib import planning
from tdlib.errors import TdlibError, unknown
from tdlib.formats import LayerPlan, Ranks, install
from tdlib.formats.recompression import Recompression
from tdlib.methods.direct import Tables
from tdlib.network import attach, provenance
from tdlib.planning import Plan, count, end_layers
from tdlib.planning.budget import Budget, Choice, make_budget, spent
from tdlib.planning.candidates import Candidate, candidates
from tdlib.planning.shrinking import accept, check_reachable, check_rule, lowest, next_ranks, trim
from tdlib.train import (
    Context,
    EarlyStopping,
    Hook,
    evaluate,
    fit,
    learning_rate,
    reestimate_batchnorm,
    require_finished,
    stage,
)

FORMATS = ("tucker2", "cp")


def iterative(
    model: nn.Module,
    data: Any,
    plan: Plan,
    *,
    rule: str = "vbmf",
    weakening: float | None = None,
    factor: float = 1.5,
    least: int | None = None,
    group_size: int | None = None,
    stage_epochs: int = 5,
    patience: int = 3,
    stage_lr: float = 0.01,
    batchnorm: bool = True,
    orthogonal: bool = False,
    one_schedule: bool = False,
    on_decomposed: Callable[[nn.Module], None] = lambda network: None,
    **training: Any,
) -> tuple[nn.Module, Tables]:
    """Compress a copy of the trained `model` in passes until it costs what `plan` costs, within 2 %.

    plan: the layers, their format and the budget; the ranks on the way and at the end are the method's own
    (`tdlib.provenance(result)` has them). rule: "vbmf" with `weakening` w (0.6), or "nx", which divides every
    layer's parameters by `factor` x per pass; a pass in which "vbmf" finds nothing to cut falls back to "nx"
    (ours), and the table says so. least: lower bound of every rank; None: the authors' (`shrinking.lowest`).
    group_size: layers decomposed between two fine-tunings (None: all layers of a pass). Each fine-tuning
    takes at most `stage_epochs` at `stage_lr`; of its epochs the best on validation is kept. batchnorm:
    re-estimate its statistics before every fine-tuning, on training images drawn by the seed. orthogonal,
    one_schedule: ours, see above; the latter needs the number of passes beforehand, so the rule "nx", and a
    fine-tuning that stops early leaves the rest of its part of the schedule out.
    on_decomposed: called with the network after every decomposition, before anything is repaired. Other
    arguments go to `train.fit`.

    Tables: "ranks" (a row per layer and pass), "stages" (per fine-tuning: epochs, ratio, validation accuracy
    before its first epoch and after it), "finetune" (per epoch).
    Raises: BudgetError before any training where the budget cannot be met with ranks of at least `least`;
    UnknownName, TdlibError (also for a weakening that the rule would ignore).
    """
    if plan.format not in FORMATS:
        raise unknown("format of the iterative method", plan.format, FORMATS)
    check_rule(rule, weakening, factor, least)
    if one_schedule and rule != "nx":
        raise TdlibError(f"one_schedule needs rule 'nx', whose passes are known beforehand, not {rule!r}")
    if patience < 1 or stage_epochs < 0 or (group_size is not None and group_size < 1):
        raise TdlibError(
            "need patience >= 1, stage_epochs >= 0 and group_size >= 1, "
            f"got {patience}, {stage_epochs}, {group_size}"
        )
    found, budget = budgeted(model, data, plan, least)
    small = copy.deepcopy(model)
    sites = {c.name: Recompression(c.name, c.kernel, small.get_submodule(c.name), orthogonal) for c in found}
    share = 0.6 if weakening is None else weakening
    ranks_of = partial(choose, found, sites, budget, rule, share, factor, least)
    tables: Tables = {"ranks": [], "stages": [], "finetune": []}
    total = len(list(way(found, budget, ranks_of, group_size))) if one_schedule else 0
    last: Choice = {}
    started = time.perf_counter()
    for number, step in enumerate(way(found, budget, ranks_of, group_size)):
        if step.wanted is not last:
            last = step.wanted
            tables["ranks"] += rank_rows(found, last, step.number, step.rule)
        for name, ranks in step.changed.items():
            small = install(small, name, sites[name].shrink(ranks), LayerPlan(plan.format, ranks))
        on_decomposed(small)
        options = stage({"lr": stage_lr, **training}, f"pass{step.number}-group{step.group}", started)
        if batchnorm:
            reestimate_batchnorm(small, data, options.get("device"), seed=options.get("seed", 0))
        hooks = [Continued(number * stage_epochs, total * stage_epochs, options)] if one_schedule else []
        row, epochs = finetune(small, data, stage_epochs, patience, hooks, options)
        place = {"pass": step.number, "group": step.group}
        tables["stages"].append({**place, "layers": list(step.changed), "ratio": step.ratio, **row})
        first = len(tables["finetune"])
        tables["finetune"] += [{**e, "epoch": first + k, **place} for k, e in enumerate(epochs)]
    done = {name: ranks for name, ranks in last.items() if ranks}
    about = provenance(small)
    about.plan = planning.plan(model, tuple(data.input_shape), plan.format, by=plan.by, ranks=done).to_dict()
    attach(small, about)
    return small, tables


def goal(
    model: nn.Module,
    data: Any,
    *,
    ratio: float,
    by: str = "params",
    format: str = "tucker2",
    skip: Sequence[str] | None = None,
    least: int | None = None,
) -> Plan:
    """The plan to give to `iterative`: layers, format and budget; its ranks, uniform ones, play no part.

    skip None leaves the first convolution and the classifier dense. Raises: as `tdlib.plan`; BudgetError
    where ranks of at least `least` (None: the authors' bounds) cannot meet the budget.
    """
    skip = end_layers(model) if skip is None else skip
    found = planning.plan(model, tuple(data.input_shape), format, ratio, by, skip)
    budgeted(model, data, found, least)
    return found


def budgeted(model: nn.Module, data: Any, plan: Plan, least: int | None) -> tuple[list[Candidate], Budget]:
    """The plan's layers and its budget. Raises BudgetError where ranks of at least `least` cannot meet it."""
    cost = count(model, data.input_shape)
    found = [c for c in candidates(model, cost, plan.format, plan.by, (), {})[0] if c.name in plan]
    budget = make_budget(cost.by(plan.by), found, plan.ratio, plan.by)
    check_reachable(found, budget, least)
    return found, budget


@dataclass(frozen=True)
class Step:
    """The decompositions between two fine-tunings: new ranks of the layers that change, and of every layer at
    the end of the pass; the ratio reached."""

    number: int  # of the pass, from 1
    group: int
    rule: str
    changed: dict[str, Ranks]
    wanted: Choice
    ratio: float


def way(
    found: Sequence[Candidate],
    budget: Budget,
    ranks_of: Callable[[Choice], tuple[Choice, str]],
    group_size: int | None,
) -> Iterator[Step]:
    """The steps down to the budget, first layers first. The ranks of a pass are chosen when its first step is
    asked for, so by the weights of that moment."""
    now: Choice = {c.name: None for c in found}
    names, number, size = list(now), 0, group_size or max(1, len(found))
    while (left := spent(found, now)) > budget.limit and not budget.met(left):
        number += 1
        wanted, rule = ranks_of(now)
        for group, first in enumerate(range(0, len(names), size)):
            members = names[first : first + size]
            changed = {name: r for name in members if (r := wanted[name]) and r != now[name]}
            if changed:
                now = {**now, **changed}
                yield Step(number, group, rule, changed, wanted, budget.ratio_of(spent(found, now)))


def choose(
    found: Sequence[Candidate],
    sites: Mapping[str, Recompression],
    budget: Budget,
    rule: str,
    weakening: float,
    factor: float,
    least: int | None,
    now: Choice,
) -> tuple[Choice, str]:
    """Ranks of the next pass, trimmed to the budget, and the rule that gave them."""
    for used in dict.fromkeys((rule, "nx")):
        wanted = {
            c.name: next_ranks(c, now[c.name], sites[c.name].core(), used, weakening, factor, least)
            for c in found
        }
        choice = trim(found, now, accept(found, now, wanted), budget)
        if spent(found, choice) < 0.98 * spent(found, now) or budget.met(spent(found, choice)):
            return choice, used
    bottom: Choice = {c.name: tuple(map(min, lowest(c, least), now[c.name] or c.bounds)) for c in found}
    return trim(found, now, accept(found, now, bottom), budget), "least"


class Continued(Hook):
    """The learning rate of a longer training of which this is a part: from epoch `start` on, of `epochs`."""

    def __init__(self, start: int, epochs: int, options: Mapping[str, Any]) -> None:
        taken = ("schedule", "step_epochs", "step_gamma", "warmup_epochs")
        self.start, self.base = start, options["lr"]
        self.shape = {"epochs": epochs, **{name: options[name] for name in taken if name in options}}

    def before_step(self, ctx: Context) -> None:
        """Set it in place of the one of this part."""
        position = self.start + ctx.epoch + ctx.step / ctx.steps
        for group in ctx.optimizer.param_groups:
            group["lr"] = learning_rate(position, base=self.base, **self.shape)


def finetune(
    model: nn.Module,
    data: Any,
    epochs: int,
    patience: int,
    hooks: Sequence[Hook],
    options: Mapping[str, Any],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Fine-tune in place with early stopping; the weights of the best validation epoch stay.

    Returns (a row of the table "stages", a row per epoch).
    """
    began, device = time.perf_counter(), options.get("device")

    def validation() -> float | None:
        return evaluate(model, data, "val", device=device)["accuracy"] if len(data.val) else None

    before, rows = validation(), []
    if epochs:
        stopping = EarlyStopping(patience)
        history = fit(model, data, epochs=epochs, hooks=(*hooks, stopping), **options)
        require_finished(history)
        stopping.restore(model)
        rows = history.rows
    row = {"epochs": len(rows), "val_before": before, "val_after": validation()}
    return {**row, "seconds": time.perf_counter() - began}, rows


def rank_rows(found: Sequence[Candidate], choice: Choice, number: int, rule: str) -> list[dict[str, Any]]:
    """One row per layer: what the pass makes of it."""
    rows = []
    for c in found:
        ranks, (params, macs) = choice[c.name], c.both(choice[c.name])
        row = {"pass": number, "layer": c.name, "rule": rule, "ranks": list(ranks or c.bounds)}
        row |= {"bounds": list(c.bounds), "dense": ranks is None, "params": params, "macs": macs}
        rows.append(row)
    return rows
