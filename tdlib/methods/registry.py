"""The table of methods, and `compress`, which strings planning, a method and fine-tuning together.

A method is a file of this folder with a function `(model, data, plan, *, ...) -> (network, tables)`, which
does not change the model. To add one, write the file and add a row to `METHODS`.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from torch import nn

from tdlib.calibration import calibration_batches
from tdlib.errors import TdlibError, needs, unknown
from tdlib.planning import Plan, end_layers, plan
from tdlib.provenance import attach, provenance
from tdlib.train import accuracies, fit, fit_selected, stage

FACTORISED = ("tt", "tucker2", "cp", "cp4", "svd", "tr", "tt-matrix")


@dataclass(frozen=True)
class Method:
    """One row of the table.

    run: "module:function". formats: that it works in, its own choice first. planner: "module:function" of
    (model, data, *, format, ratio, by, ...) -> plan, where `compress` should not use `planned`. prepare:
    "module:function" of (model, data, *, ...) -> arguments for planner and run, measured once for both. rule: of
    the ranks. defaults: arguments of run that `compress` sets otherwise. finetune_epochs: after the method,
    where the caller does not say.
    """

    run: str
    paper: str
    formats: tuple[str, ...]
    data: str = "training set"
    labels: bool = True
    training: str = "none"
    ratio: str = "within 2 % of the target"
    planner: str = "tdlib.methods.registry:planned"
    prepare: str = ""
    rule: str = "uniform"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    finetune_epochs: int = 0


METHODS: dict[str, Method] = {
    "direct": Method(
        "tdlib.methods.direct:direct", "baseline: decompose once", FACTORISED,
        data="for measuring and fine-tuning", labels=False, training="optional fine-tuning",
    ),
    "admm": Method(
        "tdlib.methods.admm:admm", "Yin et al., CVPR 2021", FACTORISED,
        training="full training, then fine-tuning", finetune_epochs=10,
    ),
    "iterative": Method(
        "tdlib.methods.iterative:iterative", "Gusak et al., ICCVW 2019", ("tucker2", "cp"),
        training="fine-tuning after every step", ratio="reached step by step, stops at the target",
    ),
    "rstd": Method(
        "tdlib.methods.rstd:rstd", "Li et al., ICASSP 2019", ("tt", "tr", "cp", "tucker"),
        training="training from scratch through the factors", ratio="close to the target",
        planner="tdlib.methods.rstd:shuffled_plan",
    ),
    "distribution-aware": Method(
        "tdlib.methods.distribution_aware:distribution_aware", "Kalle et al., NeurIPS 2025",
        ("tucker2", "cp", "cp4", "tt"),
        data="unlabelled inputs", labels=False, rule="global",
        prepare="tdlib.methods.distribution_aware:measured", defaults={"weigh_outputs": True, "sequential": True},
    ),
}  # fmt: skip


def available() -> Any:
    """pandas table of the methods: paper, needs (data, labels, training), formats, how the ratio is kept."""
    rows = [
        {
            "name": name, "paper": row.paper, "data": row.data, "labels": row.labels,
            "training": row.training, "formats": ", ".join(row.formats), "ratio": row.ratio,
        }
        for name, row in METHODS.items()
    ]  # fmt: skip
    return needs("pandas", "train").DataFrame(rows).set_index("name")


def compress(
    model: nn.Module,
    method: str,
    data: Any,
    *,
    ratio: float | None = None,
    by: str = "params",
    format: str | None = None,
    skip: Sequence[str] | None = None,
    rule: str | None = None,
    ranks: Mapping[str, Sequence[int]] | None = None,
    options: Mapping[str, Any] | None = None,
    finetune_epochs: int | None = None,
    finetune_lr: float = 0.01,
    seed: int = 0,
    device: Any = None,
    progress: bool = True,
    **hyper: Any,
) -> nn.Module:
    """Compress a trained `model` by the named method to `ratio` = dense / compressed, in "params" or "macs".

    Plans the ranks, runs the method on a copy, fine-tunes. `model` is neither changed nor moved.

    format: default the method's first. skip: layers that stay dense; None: the first convolution and the
    classifier, as in the papers. rule, options: of `tdlib.plan`; ranks: a table instead of a ratio.
    finetune_epochs at finetune_lr: training after the method (default: 10 for "admm", else none); the epoch
    that is best on the validation split is kept. hyper: arguments of the method and of `train.fit`
    (`hyperparameters(method)` lists them); checkpoint and max_minutes are for the whole.

    "distribution-aware" here is the paper's decomposition under Sigma with our three steps beyond it: ranks by
    harm, outputs weighted, layers fitted in sequence, which keep more accuracy at equal ratio. The paper's own:
    `rule="uniform", weigh_outputs=False, sequential=False`.

    What was measured on the way is in `tdlib.provenance(result).report`: accuracies in percent on the
    validation and test splits (dense; before, after fine-tuning), ratios, tables of the method, seconds.

    Raises: UnknownName for a method, a format or a hyper-parameter that does not exist, with the valid names;
    BudgetError where the ratio cannot be reached.
    """
    row = _row(method)
    run, planner = _function(row.run), _function(row.planner)
    for name in hyper:
        if name not in hyperparameters(method):
            raise unknown(f"hyper-parameter of {method!r}", name, hyperparameters(method))
    format = row.formats[0] if format is None else format
    if format not in row.formats:
        raise unknown(f"format of {method!r}", format, row.formats)
    if (ratio is None) == (ranks is None):
        raise TdlibError("give either a ratio or an explicit table of ranks")
    started = time.perf_counter()
    dense = copy.deepcopy(model) if device is None else copy.deepcopy(model).to(device)

    given = {"format": format, "ratio": ratio, "by": by, "skip": skip, "ranks": ranks, "options": options}
    given |= {"rule": rule or row.rule, "seed": seed, "device": device, "progress": progress}
    given |= {**row.defaults, **hyper}
    if row.prepare:
        prepare = _function(row.prepare)
        given |= prepare(dense, data, **accepted(prepare, given))
    chosen = planner(dense, data, **accepted(planner, given))
    small, tables = run(dense, data, chosen, **stage(accepted(run, given, fit), method, started))
    measured = hasattr(data, "batches")
    report: dict[str, Any] = {"method": method, "plan": chosen.to_dict(), "history": tables}
    report |= {"params_ratio": chosen.params_ratio, "macs_ratio": chosen.macs_ratio}
    if measured:
        report["dense"], report["before"] = (accuracies(net, data, device) for net in (dense, small))
    epochs = row.finetune_epochs if finetune_epochs is None else finetune_epochs
    if epochs:
        own = {name: value for name, value in given.items() if name in _names(fit)}
        settings = stage({**own, "epochs": epochs, "lr": finetune_lr}, "finetune", started)
        history, _ = fit_selected(small, data, **settings)
        tables["finetune"] = tables.get("finetune", []) + history.rows
    if measured:
        report["after"] = accuracies(small, data, device)
    about = provenance(small)
    about.report = report | {"seconds": time.perf_counter() - started}
    attach(small, about)
    return small


def planned(
    model: nn.Module,
    data: Any,
    *,
    format: str,
    ratio: float | None = None,
    by: str = "params",
    skip: Sequence[str] | None = None,
    rule: str = "uniform",
    ranks: Mapping[str, Sequence[int]] | None = None,
    options: Mapping[str, Any] | None = None,
    statistics: Any = None,
    multiple: int = 1,
    progress: bool = False,
) -> Plan:
    """`tdlib.plan` with the papers' choice of dense layers (`end_layers`) where skip is None."""
    return plan(
        model, _input_shape(data), format, ratio, by, end_layers(model) if skip is None else skip, rule, ranks,
        statistics, multiple=multiple, progress=progress, **dict(options or {}),
    )  # fmt: skip


def _input_shape(data: Any) -> tuple[int, ...]:
    """Of a data set, or of the first of an iterable of batches."""
    if hasattr(data, "input_shape"):
        return tuple(data.input_shape)
    return tuple(calibration_batches(data, 1)[0].shape[1:])


def hyperparameters(method: str) -> tuple[str, ...]:
    """Names that `compress(..., method, ...)` takes beside its own: the method's, its planner's and those of
    `train.fit` for the training that it or fine-tuning does. Raises: UnknownName."""
    row = _row(method)
    parts = [_function(place) for place in (row.run, row.planner, row.prepare) if place]
    names = [name for part in parts for name in _names(part)]
    names += [name for name in _names(fit) if name not in ("epochs", "lr", "hooks")]
    return tuple(name for name in dict.fromkeys(names) if name not in _names(compress))


def _row(method: str) -> Method:
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    return METHODS[method]


def _function(place: str) -> Callable[..., Any]:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def _names(function: Callable[..., Any]) -> list[str]:
    """Keyword arguments of a function."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


def accepted(
    function: Callable[..., Any], given: Mapping[str, Any], rest: Callable[..., Any] | None = None
) -> dict[str, Any]:
    """Those of the given arguments that the function takes by name, or passes on to `rest`."""
    open_ = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
    valid = _names(function) + (_names(rest) if rest is not None and open_ else [])
    return {name: value for name, value in given.items() if name in valid}
