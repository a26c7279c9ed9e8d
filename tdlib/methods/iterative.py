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
pass are trimmed, so that it ends at the budget and not below it.

From the second pass on only the Tucker core G (or the second factor of the SVD) is decomposed, and the new
outer factors A, B are multiplied into the 1×1 convolutions around it, so a chain never grows:

    W = G x_0 U x_1 V,   G ~ G' x_0 A x_1 B   =>   W ~ G' x_0 (U A) x_1 (V B)                       (3)

Fine-tuning makes U and V lose their orthonormal columns; the core nearest to G is then not the one nearest to
W. With `orthogonal` (default; ours) the triangular factors of U and V move into G first, which makes (3) the
Tucker-2 projection of W itself; `orthogonal=False` is the published step. A CP core is diagonal, so a smaller
rank is fitted to the kernel.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tdlib import planning
from tdlib.decompositions.svd import SVD, svd_factors
from tdlib.decompositions.tucker import TUCKER2, tucker2
from tdlib.errors import NonFiniteError, TdlibError, unknown
from tdlib.formats import Factors, LayerPlan, Ranks, install, to_dense
from tdlib.formats.chains import bias_of
from tdlib.methods.direct import Tables
from tdlib.network import attach, provenance
from tdlib.planning import Plan, count, end_layers
from tdlib.planning.budget import Budget, Choice, make_budget, spent
from tdlib.planning.candidates import Candidate, candidates
from tdlib.planning.shrinking import accept, check_reachable, check_rule, next_ranks, trim
from tdlib.train import EarlyStopping, evaluate, fit, require_finished, stage

FORMATS = ("tucker2", "cp")


def iterative(
    model: nn.Module,
    data: Any,
    plan: Plan,
    *,
    rule: str = "vbmf",
    weakening: float = 0.6,
    factor: float = 1.5,
    least: int = 2,
    group_size: int | None = None,
    stage_epochs: int = 5,
    patience: int = 3,
    stage_lr: float = 0.01,
    orthogonal: bool = True,
    on_decomposed: Callable[[nn.Module], None] = lambda network: None,
    **training: Any,
) -> tuple[nn.Module, Tables]:
    """Compress a copy of the trained `model` in passes until it costs what `plan` costs, within 2 %.

    plan: the layers, their format and the budget; the ranks on the way and at the end are the method's own
    (`tdlib.provenance(result)` has them). rule: "vbmf" with `weakening` w, or "nx", which divides every
    layer's parameters by `factor` x per pass; a pass in which "vbmf" finds nothing to cut falls back to "nx",
    and the table says so. least: lower bound of every rank. group_size: layers decomposed between two
    fine-tunings (None: all layers of a pass). Each fine-tuning takes at most `stage_epochs` at `stage_lr`; of
    its epochs the best on validation is kept. on_decomposed: called with the network after every
    decomposition, before it is fine-tuned. Other arguments go to `train.fit`.

    Tables: "ranks" (a row per layer and pass), "stages" (per fine-tuning: epochs, validation accuracy before
    and after, ratio), "finetune" (per epoch).
    Raises: BudgetError before any training where ranks of at least `least` cannot meet the budget;
    UnknownName, TdlibError.
    """
    if plan.format not in FORMATS:
        raise unknown("format of the iterative method", plan.format, FORMATS)
    check_rule(rule, weakening, factor, least)
    if patience < 1 or stage_epochs < 0 or (group_size is not None and group_size < 1):
        raise TdlibError(
            "need patience >= 1, stage_epochs >= 0 and group_size >= 1, "
            f"got {patience}, {stage_epochs}, {group_size}"
        )
    found, budget = budgeted(model, data, plan, least)
    small = copy.deepcopy(model)
    sites = {c.name: Site(c, small.get_submodule(c.name), orthogonal) for c in found}
    tables: Tables = {"ranks": [], "stages": [], "finetune": []}
    now: Choice = dict.fromkeys(sites)
    started, number = time.perf_counter(), 0
    while (left := spent(found, now)) > budget.limit and not budget.met(left):
        number += 1
        wanted, used = choose(sites, now, budget, rule, weakening, factor, least)
        tables["ranks"] += rank_rows(found, wanted, number, used)
        for group, names in enumerate(groups_of(list(sites), group_size)):
            changed = {name: r for name in names if (r := wanted[name]) and r != now[name]}
            if not changed:
                continue
            for name, ranks in changed.items():
                small = install(small, name, sites[name].shrink(ranks), LayerPlan(plan.format, ranks))
            now |= changed
            on_decomposed(small)
            options = stage({"lr": stage_lr, **training}, f"pass{number}-group{group}", started)
            row, epochs = finetune(small, data, stage_epochs, patience, options)
            place = {"pass": number, "group": group}
            ratio = budget.ratio_of(spent(found, now))
            tables["stages"].append({**place, "layers": list(changed), "ratio": ratio, **row})
            first = len(tables["finetune"])
            tables["finetune"] += [{**e, "epoch": first + k, **place} for k, e in enumerate(epochs)]
    done = {name: ranks for name, ranks in now.items() if ranks}
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
    least: int = 2,
) -> Plan:
    """The plan to give to `iterative`: layers, format and budget; its ranks, uniform ones, play no part.

    skip None leaves the first convolution and the classifier dense. Raises: as `tdlib.plan`; BudgetError
    where ranks of at least `least` cannot meet the budget.
    """
    skip = end_layers(model) if skip is None else skip
    found = planning.plan(model, tuple(data.input_shape), format, ratio, by, skip)
    budgeted(model, data, found, least)
    return found


def budgeted(model: nn.Module, data: Any, plan: Plan, least: int) -> tuple[list[Candidate], Budget]:
    """The plan's layers and its budget. Raises BudgetError where ranks of at least `least` cannot meet it."""
    cost = count(model, data.input_shape)
    found = [c for c in candidates(model, cost, plan.format, plan.by, (), {})[0] if c.name in plan]
    budget = make_budget(cost.by(plan.by), found, plan.ratio, plan.by)
    check_reachable(found, budget, least)
    return found, budget


def groups_of(names: Sequence[str], size: int | None) -> list[list[str]]:
    """Layers in groups of `size` (None: all in one), the last layers of the network first."""
    backwards = list(names)[::-1]
    size = size or max(1, len(backwards))
    return [backwards[k : k + size] for k in range(0, len(backwards), size)]


def choose(
    sites: Mapping[str, Site],
    now: Choice,
    budget: Budget,
    rule: str,
    weakening: float,
    factor: float,
    least: int,
) -> tuple[Choice, str]:
    """Ranks of the next pass, trimmed to the budget, and the rule that gave them."""
    found = [site.candidate for site in sites.values()]
    for used in dict.fromkeys((rule, "nx")):
        wanted = {
            name: next_ranks(site.candidate, now[name], site.core(), used, weakening, factor, least)
            for name, site in sites.items()
        }
        choice = trim(found, now, accept(found, now, wanted), budget)
        if spent(found, choice) < 0.98 * spent(found, now) or budget.met(spent(found, choice)):
            return choice, used
    lowest: Choice = {c.name: tuple(min(least, n) for n in (now[c.name] or c.bounds)) for c in found}
    return trim(found, now, accept(found, now, lowest), budget), "least"


def finetune(
    model: nn.Module, data: Any, epochs: int, patience: int, options: Mapping[str, Any]
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
        history = fit(model, data, epochs=epochs, hooks=(stopping,), **options)
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


class Site:
    """One layer on its way: the geometry it started from, the module it is now, and how to shrink that."""

    def __init__(self, candidate: Candidate, dense: nn.Module, orthogonal: bool) -> None:
        self.candidate, self.orthogonal = candidate, orthogonal
        self.geometry: Any = copy.deepcopy(dense)
        self.module: Any = dense
        self.dense = True

    @property
    def refitted(self) -> bool:
        """Whether a smaller rank is fitted to the whole kernel: the first pass, and CP in every pass."""
        return self.dense or self.candidate.kernel.decomposition not in (TUCKER2, SVD)

    def core(self) -> Tensor:
        """What the next pass decomposes; its unfoldings are those that EVBMF sees."""
        return to_dense(self.module).detach() if self.refitted else self._factors()[0]

    def shrink(self, ranks: Ranks) -> nn.Module:
        """The module of these (smaller) ranks, from now on the present one. Raises NonFiniteError."""
        if not all(bool(torch.isfinite(p).all()) for p in self.module.parameters()):
            raise NonFiniteError(
                f"layer {self.candidate.name!r} has NaN or Inf in its weights: lower the fine-tuning lr"
            )
        kernel = self.candidate.kernel
        if self.refitted:
            factors = kernel.decompose(to_dense(self.module).detach(), ranks)
        else:
            factors = recompress(self._factors(), ranks)
        last = self.module if self.dense else self.module[-1]
        self.geometry.to(last.weight.device, last.weight.dtype).train(self.module.training)
        self.geometry.bias = bias_of(last)
        self.module, self.dense = kernel.module(self.geometry, factors), False
        return self.module

    def _factors(self) -> Factors:
        """[core (r_out, r_in, kh, kw), U (O, r_out), V (I, r_in)] of the chain, or [A (O, r), B (r, I)]."""
        weights = [member.weight.detach().float() for member in self.module]
        if len(weights) == 2:
            factors = [weights[1].flatten(1), weights[0].flatten(1)]
        else:
            factors = [weights[1], weights[2].flatten(1), weights[0].flatten(1).mT]
        return orthogonalise(factors) if self.orthogonal else factors


def orthogonalise(factors: Factors) -> Factors:
    """The same kernel with orthonormal outer factors: their triangular parts are multiplied into the core."""
    if len(factors) == 2:
        q, r = torch.linalg.qr(factors[1].mT)
        return [factors[0] @ r.mT, q.mT]
    core, u, v = factors
    (q_u, r_u), (q_v, r_v) = torch.linalg.qr(u), torch.linalg.qr(v)
    return [torch.einsum("ab,bc...,dc->ad...", r_u, core, r_v), q_u, q_v]


def recompress(factors: Factors, ranks: Sequence[int]) -> Factors:
    """Equation (3): decompose the core (or A of A B) at `ranks`, multiply the new outer factors outwards."""
    if len(factors) == 2:
        second, first = svd_factors(factors[0], ranks[0])
        return [second, first @ factors[1]]
    core, (a, b) = tucker2(factors[0], ranks)
    return [core, factors[1] @ a, factors[2] @ b]
