"""Distribution-aware tensor decomposition (Kalle et al., NeurIPS 2025), and three steps beyond the paper.

The paper (arXiv 2511.04494): decompose every kernel so that the error of the layer's OUTPUT on calibration
inputs is smallest,

    min ||(W - What) Sigma^(1/2)||_F,     Sigma = E[x x^T] of the layer's input patches in the dense network;

no labels, no training. That is `distribution_aware(model, data, plan)` with its defaults, and the method
"distribution-aware" of `tdlib.compress`; the solver is ours, in two blocks where the paper's Tucker-2 (its
Algorithm 2) has three, see `tdlib.decompositions.sigma.tucker`.

Ours, each a switch that reports name, all three together the method "sequential":
- `weigh_outputs`: the output error is measured by H, the Fisher information at the layer's output, so that
  what later layers ignore may change: min tr(H (W - What) Sigma (W - What)^T);
- `sequential`: layers are replaced from the input to the output; each is fitted to reproduce the dense
  network's output from the inputs that the already compressed front really gives it, so that errors are
  undone instead of added up;
- ranks by harm: `tdlib.plan(..., rule="global", statistics=...)` with statistics that carry H puts them where
  they lower the KL divergence of the network's output most per unit of cost.
Bias correction and BatchNorm recalibration change more than the kernels; they stand apart and are off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tdlib import calibration
from tdlib.calibration import TEMPERATURE, Statistics, calibration_batches, damped, fisher, load_statistics
from tdlib.calibration.passes import threads_for
from tdlib.calibration.statistics import require_memory, shrink, shrinkage_for
from tdlib.decompositions.sigma import corrected_target, sigma_error
from tdlib.errors import TdlibError
from tdlib.formats import decompose, install, to_dense
from tdlib.formats.base import finite
from tdlib.methods.direct import Tables
from tdlib.network import attach, provenance
from tdlib.planning import Plan, count, end_layers
from tdlib.planning.budget import make_budget
from tdlib.planning.candidates import candidates

Given = Statistics | str | Path | None
WORKSPACE = 8  # matrices as large as Sigma that one layer takes beside it: paired moments, target, factors


def distribution_aware(
    model: nn.Module,
    data: Any,
    plan: Plan,
    *,
    statistics: Given = None,
    samples: int = 1000,
    weigh_outputs: bool = False,
    sequential: bool = False,
    bias_correction: bool = False,
    recalibrate: bool = False,
    seed: int = 0,
    progress: bool = False,
    memory_limit: float | None = None,
) -> tuple[nn.Module, Tables]:
    """Decompose at the planned ranks under Sigma; the paper's method unless a switch says otherwise.

    data: a data set (`samples` of its training images are used, without labels) or an iterable of input
    batches. statistics: of the dense network, an object or a file, perhaps from other data; taken here where
    None. memory_limit: as in `tdlib.statistics`, for what the decomposition takes beside them too. `model` is
    not changed. Tables: "layers", see `layer_errors`.
    Raises: as `statistics` and `decompose`.
    """
    batches = calibration_batches(data, samples, seed=seed, device=next(model.parameters()).device)
    with threads_for(model, batches[0].numel()):
        found = statistics_of(
            model, batches, list(plan), statistics, weigh_outputs, seed, progress, memory_limit
        )
        if sequential:
            small = in_sequence(model, plan, batches, found.weights, bias_correction, progress)
        else:
            small = decompose(model, plan, found, progress=progress)
            if bias_correction:
                calibration.correct_bias(small, model, found, plan, batches[0])
        if recalibrate:
            calibration.recalibrate_batchnorm(small, batches)
        return small, {"layers": layer_errors(model, small, plan, found)}


def statistics_of(
    model: nn.Module,
    batches: Sequence[Tensor],
    layers: Sequence[str],
    given: Given,
    weigh_outputs: bool,
    seed: int,
    progress: bool,
    memory_limit: float | None = None,
) -> Statistics:
    """The given statistics or those of `batches`; with H where outputs are weighed, without it where not.

    Raises: MemoryLimitError also where they, but not the decomposition beside them, would fit.
    """
    if given is None:
        named = {name: model.get_submodule(name) for name in layers}
        require_memory(named, weigh_outputs, memory_limit, WORKSPACE)
        return calibration.statistics(
            model, batches, layers, output_weights=weigh_outputs, seed=seed, progress=progress,
            memory_limit=memory_limit,
        )  # fmt: skip
    found = _given(given)
    weights = found.weights if weigh_outputs else {}
    if weigh_outputs and not weights:
        passes = tqdm(batches, "sensitivity", unit="batch", disable=not progress)
        information = fisher(model, passes, layers, temperature=TEMPERATURE, seed=seed)
        weights = {name: damped(H) for name, H in information.items()}
    return Statistics(found, found.means, found.counts, weights)


def _given(statistics: Statistics | str | Path) -> Statistics:
    return load_statistics(statistics) if isinstance(statistics, str | Path) else statistics


def in_sequence(
    model: nn.Module,
    plan: Plan,
    batches: Sequence[Tensor],
    weights: Mapping[str, Tensor],
    bias_correction: bool = False,
    progress: bool = False,
) -> nn.Module:
    """Planned layers replaced in the order in which they run, each fitted to the dense network's output.

    With x the layer's input in the dense network and xhat in the compressed one: the target is the kernel
    argmin_M E||W x - M xhat||^2, decomposed under E[xhat xhat^T]. weights: layer -> H, may be empty.
    bias_correction: both moments are taken about their means, and the difference of means goes into the bias
    (or the BatchNorm behind).
    """
    small = decompose(model, {})
    order = calibration.call_order(model, plan, batches[0][:1])
    for name in tqdm(order, "decomposition", unit="layer", disable=not progress):
        layer: Any = model.get_submodule(name)
        W, bound = finite(layer.weight, name), plan[name].bind(layer.weight.shape)
        p = calibration.paired(model, small, name, batches)
        sigma, cross = p.sigma, p.cross
        if bias_correction:
            sigma, cross = sigma - torch.outer(p.mean, p.mean), cross - torch.outer(p.dense_mean, p.mean)
        amount = shrinkage_for(name, len(sigma), p.count)
        cross = shrink(cross, amount, sigma.diagonal().mean())  # the same pull towards W on both
        sigma = shrink(sigma, amount)
        target = corrected_target(W, cross.to(W.device), sigma.to(W.device))
        factors = bound.decompose(target, plan[name].ranks, sigma, weights.get(name))
        small = install(small, name, bound.module(layer, factors), plan[name])
        if bias_correction:
            What = to_dense(small.get_submodule(name)).detach().double().flatten(1)
            shift = W.double().flatten(1) @ p.dense_mean.to(W.device) - What @ p.mean.to(W.device)
            calibration.shift_output(small, name, shift, batches[0][:1])
    about = provenance(small)
    about.plan = plan.to_dict()
    attach(small, about)
    return small


def measured(
    model: nn.Module,
    data: Any,
    *,
    format: str = "tucker2",
    by: str = "params",
    skip: Sequence[str] | None = None,
    ranks: Mapping[str, Sequence[int]] | None = None,
    options: Mapping[str, Any] | None = None,
    statistics: Given = None,
    samples: int | None = None,
    weigh_outputs: bool = False,
    sequential: bool = False,
    bias_correction: bool = False,
    recalibrate: bool = False,
    multiple: int = 1,
    ratio: float | None = None,
    seed: int = 0,
    progress: bool = False,
    memory_limit: float | None = None,
) -> dict[str, Any]:
    """What ranks by harm and the decomposition share: the statistics of the layers that can be decomposed.

    Arguments as in `tdlib.plan` and `distribution_aware`. Given `statistics` stand for other data, so nothing
    can be fitted in sequence then. Raises: TdlibError where it is to be, or where `samples` would not be
    looked at beside them; BudgetError, before anything is measured.
    """
    if statistics is not None:
        looks = bias_correction or recalibrate or (weigh_outputs and not _given(statistics).weights)
        if sequential or (samples is not None and not looks):
            name, mend = ("sequential", "sequential=False") if sequential else ("samples", "no samples")
            raise TdlibError(
                f"{name} and statistics exclude one another, statistics stand for other inputs: "
                f"give {mend}, or no statistics"
            )
    batches = calibration_batches(data, samples or 1000, seed=seed, device=next(model.parameters()).device)
    cost = count(model, batches[0].shape[1:])
    skip = end_layers(model) if skip is None else skip
    layers, _ = candidates(model, cost, format, by, skip, options or {}, multiple)
    names = [c.name for c in layers if ranks is None or any(fnmatchcase(c.name, p) for p in ranks)]
    if not names:  # nothing to measure; planning says why
        return {}
    if ratio is not None:
        make_budget(cost.by(by), layers, ratio, by)
    found = statistics_of(model, batches, names, statistics, weigh_outputs, seed, progress, memory_limit)
    return {"statistics": found}


def layer_errors(
    model: nn.Module, small: nn.Module, plan: Plan, statistics: Mapping[str, Tensor]
) -> list[dict[str, Any]]:
    """A row per layer: its ranks, the relative errors of its output (under Sigma) and of its kernel."""
    rows = []
    for name, planned in plan.items():
        W = to_dense(model.get_submodule(name)).detach().cpu()
        What = to_dense(small.get_submodule(name)).detach().cpu()
        row: dict[str, Any] = {"layer": name, "ranks": list(planned.ranks)}
        row["sigma_error"] = sigma_error(W, What, statistics[name])
        row["frobenius_error"] = float((W - What).double().norm() / W.double().norm())
        rows.append(row)
    return rows
