"""Distribution-aware tensor decomposition (Kalle et al., NeurIPS 2025), and three steps beyond the paper.

The paper: decompose every kernel so that the error of the layer's OUTPUT on calibration inputs is smallest,
min ||(W - What) Sigma^(1/2)||_F with Sigma = E[x x^T] of its input patches; no labels, no training.

Beyond it, each with a switch:
- `weigh_outputs`: the output error is measured by H, the Fisher information at the layer's output, so that
  what later layers ignore may change: min tr(H (W - What) Sigma (W - What)^T);
- `rule="global"`: ranks go where they lower the KL divergence of the network's output most per unit of cost
  (`tdlib.harm`);
- `sequential`: layers are replaced from the input to the output; each is fitted to reproduce the dense
  network's output from the inputs that the already compressed front really gives it, so that errors are
  undone instead of added up. BatchNorm recalibration and bias correction from the same inputs are separate
  and off unless asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..calibration import (
    TEMPERATURE,
    Statistics,
    correct_bias,
    inputs_of,
    load_statistics,
    recalibrate_batchnorm,
    shift_output,
    shrink,
    shrinkage_for,
)
from ..calibration import statistics as take_statistics
from ..errors import DataError, TdlibError
from ..harm import HarmCurves
from ..layers.dense import to_dense
from ..layers.formats import get_format
from ..layers.replace import decompose
from ..layers.weighted import factorise_weighted
from ..planning import Plan, count, plan
from ..planning.candidates import Candidate, candidates
from ..planning.curves import Point
from ..progress import counter, track
from ..sensitivity import call_order, damped, divergence, fisher, logits, paired
from ..tensor.sigma_norm import corrected_target, sigma_error
from .direct import accuracies, end_layers


def calibration_batches(
    data: Any, samples: int = 1000, batch_size: int = 100, seed: int = 0, device: str | torch.device = "cpu"
) -> list[Tensor]:
    """At most `samples` inputs as batches: random training images of a Bundle without augmentation, or the
    first of any iterable of inputs or (inputs, labels) batches. Labels are dropped. Raises: DataError if
    there is none."""
    if hasattr(data, "batches"):
        batch_size = min(batch_size, len(data.train), samples)
        source = data.batches("train", batch_size, device=device, seed=seed, shuffle=True, drop_last=False)
        batches = [inputs_of(b) for b in islice(source, -(-samples // batch_size))]
    else:
        batches, seen = [], 0
        for batch in data:
            batches.append(inputs_of(batch).to(device))
            seen += len(batches[-1])
            if seen >= samples:
                break
    left = samples
    kept = []
    for x in batches:
        kept.append(x[:left])
        left -= len(kept[-1])
    kept = [x for x in kept if len(x)]
    if not kept:
        raise DataError(
            "no calibration inputs: give a Bundle with training images, or an iterable of batches"
        )
    return kept


def compress(
    model: nn.Module,
    data: Any,
    *,
    ratio: float,
    by: str = "params",
    seed: int = 0,
    format: str = "tucker2",
    rule: str = "global",
    ranks: Mapping[str, Sequence[int]] | None = None,
    skip: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    samples: int = 1000,
    batch_size: int = 100,
    positions: int | None = None,
    statistics: Statistics | str | Path | None = None,
    weigh_outputs: bool = True,
    sequential: bool = True,
    points: int = 0,
    measure_samples: int = 300,
    recalibrate: bool = False,
    bias_correction: bool = False,
    evaluate: bool = True,
    progress: bool = False,
    device: str | torch.device | None = None,
) -> nn.Module:
    """Compress without training to `ratio` = dense / compressed, from unlabelled calibration inputs.

    data: a Bundle (its training images are used) or an iterable of input batches. samples: how many inputs.
    statistics: those of another data set (a file or an object): then nothing is taken from `data` but what
    the options below need, and the layers are replaced at once, not in sequence. positions: random patches
    per image and layer instead of all. points: ranks per layer at which harm is measured, on
    `measure_samples` inputs, for rule "global"; 0, the default, trusts the prediction, which chose better in
    our trials. ranks: an explicit table instead of a rule. evaluate: also measure accuracy where `data` is a
    Bundle. progress: show bars. `model` is not changed; its report is in `result._tdlib["report"]`. Raises:
    as `plan` and `statistics`.
    """
    started = time.perf_counter()
    row = get_format(format)
    if row.factorise_sigma is None:
        raise TdlibError(
            f"format {format!r} has no data-aware factorisation; there is one for tucker2, tt, cp, cp4, svd"
        )
    device = device or next(model.parameters()).device
    model = model.to(device)
    batches = calibration_batches(data, samples, batch_size, seed, device)
    shape = tuple(getattr(data, "input_shape", None) or batches[0].shape[1:])
    skip = end_layers(model) if skip is None else tuple(skip)
    settings = dict(options or {})
    names = [c.name for c in candidates(model, count(model, shape), format, by, skip, settings)[0]]
    if ranks is not None:
        names = [n for n in names if any(fnmatchcase(n, pattern) for pattern in ranks)]
    given = load_statistics(statistics) if isinstance(statistics, (str, Path)) else statistics
    stats = (
        take_statistics(
            model,
            track(batches, "statistics", "batch", progress),
            names or None,
            positions=positions,
            seed=seed,
        )
        if given is None
        else given
    )
    seconds = {"statistics": time.perf_counter() - started}
    weights = None
    if weigh_outputs and stats.weights:
        weights = stats.weights
    elif weigh_outputs and names:
        passes = track(batches, "sensitivity", "batch", progress)
        found = fisher(model, passes, names, temperature=TEMPERATURE, seed=seed)
        weights = {n: damped(h) for n, h in found.items()}
    curves = None
    if rule == "global" and ranks is None:
        probe = list(limited(batches, measure_samples))
        curves = HarmCurves(model, stats, weights, probe, points)
    target = ratio if ranks is None else None
    with counter(len(names) if curves else 0, "ranks", "layer", progress and curves is not None) as done:
        table = plan(
            model, shape, format, target, by, skip, rule, ranks, stats,
            curves=None if curves is None else _counted(curves, done), **settings,
        )  # fmt: skip
    seconds["ranks"] = time.perf_counter() - started - sum(seconds.values())
    if sequential and given is None:
        small = in_sequence(
            model, table, batches, weights, bias_correction=bias_correction, progress=progress
        )
    else:
        small = at_once(model, table, stats, weights, progress=progress)
        if bias_correction:
            correct_bias(small, model, stats, table, batches[0])
    about: dict[str, Any] = vars(small)["_tdlib"]
    about["plan"] = table.to_dict()
    seconds["decomposition"] = time.perf_counter() - started - sum(seconds.values())
    reference = logits(model, batches)
    report: dict[str, Any] = {
        "method": "distribution-aware",
        "sequential": sequential and given is None,
        "weigh_outputs": weigh_outputs,
        "rule": table.rule,
        "samples": sum(map(len, batches)),
        "params_ratio": table.params_ratio,
        "macs_ratio": table.macs_ratio,
        "plan": table.to_dict(),
        "calibration_kl": divergence(reference, logits(small, batches)),
        "layers": layer_errors(model, small, table, stats),
        "harm": curves.rows if curves else [],
        "history": {},
    }
    bundle = evaluate and hasattr(data, "batches")
    if bundle:
        report["dense"] = accuracies(model, data, str(device))
        report["before"] = report["after"] = accuracies(small, data, str(device))
    if recalibrate:
        recalibrate_batchnorm(small, batches)
        report["recalibrated_kl"] = divergence(reference, logits(small, batches))
        if bundle:
            report["after"] = accuracies(small, data, str(device))
    report["seconds"] = time.perf_counter() - started
    report["stage_seconds"] = seconds
    about["report"] = report
    return small


def _counted(curves: HarmCurves, done: Callable[[], None]) -> Callable[[Candidate], list[Point]]:
    """The curves, calling `done` after each."""

    def one(candidate: Candidate) -> list[Point]:
        curve = curves(candidate)
        done()
        return curve

    return one


def limited(batches: Iterable[Tensor], samples: int) -> Iterable[Tensor]:
    """The first `samples` inputs of the batches."""
    for x in batches:
        if samples <= 0:
            return
        yield x[:samples]
        samples -= len(x)


def at_once(
    model: nn.Module,
    table: Plan,
    statistics: Mapping[str, Tensor],
    weights: Mapping[str, Tensor] | None = None,
    *,
    progress: bool = False,
) -> nn.Module:
    """Every planned layer decomposed under its Sigma of the dense network (the paper), and its H if given."""
    small = decompose(model, {})
    for name in track(table, "decomposition", "layer", progress):
        layer = model.get_submodule(name)
        H = None if weights is None else weights[name]
        replace(small, name, layer, model.get_parameter(f"{name}.weight"), table, statistics[name], H)
    return small


def in_sequence(
    model: nn.Module,
    table: Plan,
    batches: Sequence[Tensor],
    weights: Mapping[str, Tensor] | None = None,
    *,
    bias_correction: bool = False,
    progress: bool = False,
) -> nn.Module:
    """Planned layers replaced in the order in which they run, each fitted to the dense network's output.

    With x the layer's input in the dense network and xhat in the compressed one: the target is the kernel
    argmin_M E||W x - M xhat||^2, decomposed under E[xhat xhat^T]. bias_correction: both moments are taken
    about their means, and the difference of means goes into the bias (or the BatchNorm behind).
    """
    small = decompose(model, {})
    order = call_order(model, table, batches[0][:1])
    for name in track(order, "decomposition", "layer", progress):
        layer = model.get_submodule(name)
        p = paired(model, small, name, batches)
        sigma, cross = p.sigma, p.cross
        if bias_correction:
            sigma, cross = sigma - torch.outer(p.mean, p.mean), cross - torch.outer(p.dense_mean, p.mean)
        amount = shrinkage_for(name, len(sigma), p.count)
        cross = shrink(cross, amount, sigma.diagonal().mean())  # the same pull towards W on both sides
        sigma = shrink(sigma, amount)
        W = model.get_parameter(f"{name}.weight").detach()
        target = corrected_target(W, cross.to(W.device), sigma.to(W.device))
        replace(small, name, layer, target, table, sigma, None if weights is None else weights[name])
        if bias_correction:
            What = to_dense(small.get_submodule(name)).detach().double().flatten(1)
            shift = W.double().flatten(1) @ p.dense_mean.to(W.device) - What @ p.mean.to(W.device)
            shift_output(small, name, shift, batches[0][:1])
    return small


def replace(
    small: nn.Module,
    name: str,
    layer: nn.Module,
    weight: Tensor,
    table: Plan,
    sigma: Tensor,
    H: Tensor | None,
) -> None:
    """Put the factorisation of `weight` in the place of layer `name` of `small`."""
    row, options = get_format(table.formats[name]), table.options[name]
    factors = factorise_weighted(row, weight, table[name], sigma, H, options)
    entry = {"format": row.name, "ranks": list(table[name]), "options": options}
    install(small, name, row.build(cast(nn.Conv2d, layer), factors, **options), entry)


def install(model: nn.Module, name: str, module: nn.Module, entry: Mapping[str, Any]) -> None:
    """Put `module` in the place of layer `name`, wherever that is registered; note it as `decompose` does."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for attribute, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, attribute, module)
    vars(model)["_tdlib"]["layers"][name] = dict(entry)


def layer_errors(
    model: nn.Module, small: nn.Module, table: Plan, statistics: Mapping[str, Tensor]
) -> list[dict[str, Any]]:
    """Per layer: ranks, relative error of the output under Sigma and of the kernel (Frobenius)."""
    rows = []
    for name in table:
        W = model.get_parameter(f"{name}.weight").detach().cpu()
        What = to_dense(small.get_submodule(name)).detach().reshape(W.shape).cpu()
        frobenius = float((W - What).norm() / W.norm())
        rows.append(
            {
                "layer": name,
                "ranks": list(table[name]),
                "sigma_error": sigma_error(W, What, statistics[name]),
                "frobenius_error": frobenius,
            }
        )
    return rows
