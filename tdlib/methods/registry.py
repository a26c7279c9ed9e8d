"""The table of methods, and `compress`, which strings planning, a method and fine-tuning together.

A method is a file of this folder with a function `(model, data, plan, *, ...) -> (network, tables)`, which
does not change the model. To add one, write the file and add a row to `METHODS`.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn

from tdlib.calibration import calibration_batches, load_statistics
from tdlib.errors import BudgetError, DataError, TdlibError, needs, unknown
from tdlib.formats import FORMATS, get_format
from tdlib.methods.kinds import accepted, check_kinds, keywords, passes_on
from tdlib.network import attach, fingerprint, provenance
from tdlib.planning import Plan, end_layers, plan
from tdlib.train import accuracies, checkpoint, fit, fit_selected, rehearse, stage

EVERY = "*"  # among a method's formats: all that are registered


@dataclass(frozen=True)
class Method:
    """One row of the table.

    run: "module:function". paper: whose method it is, then what of it is ours or unverified. formats: that it
    works in, its own choice first; `EVERY` stands for all. planner: "module:function" of (model, data, *,
    format, ratio, by, ...) -> plan, where `compress` should not use `planned`. prepare: "module:function" of
    (model, data, *, ...) -> arguments for planner and run, measured once for both. defaults: arguments that
    `compress` sets otherwise. finetune_epochs: after the method, where the caller does not say.
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
    defaults: Mapping[str, Any] = field(default_factory=dict)
    finetune_epochs: int = 0

    @property
    def choices(self) -> tuple[str, ...]:
        """The formats by name."""
        named = (FORMATS if name == EVERY else (name,) for name in self.formats)
        return tuple(dict.fromkeys(chain.from_iterable(named)))

    @property
    def about(self) -> dict[str, Any]:
        """What the table of methods says of it."""
        return {
            "paper": self.paper, "data": self.data, "labels": self.labels, "training": self.training,
            "formats": ", ".join(self.choices), "ratio": self.ratio,
        }  # fmt: skip


METHODS: dict[str, Method] = {
    "direct": Method(
        "tdlib.methods.direct:direct", "baseline: decompose once", ("tt", EVERY),
        data="for measuring and fine-tuning", labels=False, training="optional fine-tuning",
    ),
    "admm": Method(
        "tdlib.methods.admm:admm",
        "Yin et al., CVPR 2021; uniform ranks, formats beside TT and Tucker-2 (ours)", ("tt", EVERY),
        training="full training, then fine-tuning", finetune_epochs=10,
    ),
    "iterative": Method(
        "tdlib.methods.iterative:iterative",
        "Gusak et al., ICCVW 2019; to a budget, not in a number of passes (ours)", ("tucker2", "cp"),
        training="fine-tuning after every step", ratio="reached step by step, stops at the target",
        planner="tdlib.methods.iterative:goal",
    ),
    "rstd": Method(
        "tdlib.methods.rstd:rstd",
        "Li et al., ICASSP 2019; formats, training from scratch (unverified); modes, ranks (ours)",
        ("tt", "tr", "cp", "tucker"),
        training="training from scratch through the factors", ratio="close to the target",
        planner="tdlib.methods.rstd:shuffled_plan",
    ),
    "distribution-aware": Method(
        "tdlib.methods.distribution_aware:distribution_aware",
        "Kalle et al., NeurIPS 2025; uniform ranks, TT (ours)",
        ("tucker2", "cp", "cp4", "tt"), data="unlabelled inputs", labels=False,
        prepare="tdlib.methods.distribution_aware:measured",
    ),
    "sequential": Method(
        "tdlib.methods.distribution_aware:distribution_aware",
        "ours, after Kalle et al.; ranks by harm, outputs weighed, layers fitted in sequence",
        ("tucker2", "cp", "cp4", "tt"), data="unlabelled inputs", labels=False,
        prepare="tdlib.methods.distribution_aware:measured",
        defaults={"rule": "global", "weigh_outputs": True, "sequential": True},
    ),
}  # fmt: skip


def available() -> Any:
    """pandas table of the methods: paper, needs (data, labels, training), formats, how the ratio is kept."""
    rows = [{"name": name, **row.about} for name, row in METHODS.items()]
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
    finetune_lr: float | None = None,
    seed: int = 0,
    device: Any = None,
    progress: bool = True,
    **hyper: Any,
) -> nn.Module:
    """Compress a trained `model` by the named method to `ratio` = dense / compressed, in "params" or "macs".

    Plans the ranks, runs the method on a copy, fine-tunes. `model` is neither changed nor moved.

    data: a data set or, for what needs no labels, an iterable of input batches (the first 1000 inputs or
    `samples` are used). format: default the method's first. skip: layers that stay dense; None: the first
    convolution and the classifier. rule, options: of `tdlib.plan` (the rule of "iterative"
    is its own); ranks: a table instead of a ratio. finetune_epochs at finetune_lr (0.01): training after the
    method (default: 10 for "admm", else none; the passes of "iterative" have `stage_epochs` and `stage_lr` of
    their own); the epoch that is best on the validation split is kept. device: where it all runs and the
    result is; None: methods that train choose a GPU where there is one, the others stay where the model is.
    hyper: arguments of the method and of `train.fit` (`hyperparameters(method)` lists them); checkpoint and
    max_minutes are for the whole. A checkpoint folder belongs to one run: other weights, data or arguments
    are refused before any work. Arguments that would be ignored are refused.

    "distribution-aware" is the paper's decomposition under Sigma, here at uniform ranks, each layer alone.
    "sequential" is ours and goes three steps beyond it: ranks by harm, outputs weighed, layers fitted in
    sequence. Both take each step as a switch (`rule`, `weigh_outputs`, `sequential`). Under `statistics` of
    other data nothing can be fitted in sequence: `sequential=False`.

    What was measured on the way is in `tdlib.provenance(result).report`: "method"; "settings", the arguments
    that are numbers or text; "plan", "params_ratio" and "macs_ratio" of the result; with a labelled data set
    accuracies in percent on its validation and test splits, "dense", "before" and "after" fine-tuning;
    "history", the tables of the method and of fine-tuning; "seconds".

    Raises: UnknownName for a method, a format or a hyper-parameter that does not exist, with the valid names;
    BudgetError where the ratio cannot be reached; DataError where labels are needed and there are none;
    CheckpointError; TdlibError for arguments of the wrong kind, or that contradict one another.
    """
    row, started = _row(method), time.perf_counter()
    run, planner = _function(row.run), _function(row.planner)
    epochs = row.finetune_epochs if finetune_epochs is None else finetune_epochs
    asked: dict[str, Any] = {"format": format or row.choices[0], "ratio": ratio, "by": by}
    asked |= {"skip": skip, "rule": rule, "ranks": ranks, "options": options}
    asked |= {"seed": seed, "device": device, "progress": progress}
    asked |= {"finetune_epochs": finetune_epochs, "finetune_lr": finetune_lr}
    asked = {name: value for name, value in asked.items() if value is not None} | hyper
    _check(method, asked, hyper, epochs)
    bundle = hasattr(data, "batches")
    labelled = bundle and bool(data.classes)
    if not labelled and (row.labels or epochs):
        found = f"{data.name} without labels" if bundle else f"a {type(data).__name__}"
        raise DataError(f"{method!r} needs a data set with labels to train on, got {found}")

    given = {**row.defaults, **asked}
    if ranks is not None:
        given.pop("rule", None)
    if epochs:
        given |= {"finetune_epochs": epochs, "finetune_lr": 0.01 if finetune_lr is None else finetune_lr}
    training = {name: value for name, value in given.items() if name in keywords(fit)}
    tuning = training | {"epochs": epochs, "lr": given.get("finetune_lr")}
    if isinstance(given.get("statistics"), str | Path):
        given["statistics"] = load_statistics(given["statistics"])
    dense = model if device is None else copy.deepcopy(model).to(device)
    folder = None if hyper.get("checkpoint") is None else Path(hyper["checkpoint"])
    if folder is not None:
        decisive = {name: value for name, value in given.items() if name not in checkpoint.FREE}
        identity = {name: checkpoint.described(value) for name, value in decisive.items()}
        identity |= {"method": method, "weights": fingerprint(model)[:16], "data": data.fingerprint[:16]}
        checkpoint.read(folder, identity)
        checkpoint.prepare(folder, model)
        given["origin"] = tuning["origin"] = checkpoint.digest(identity)
    if epochs:
        rehearse(dense, data, **tuning)

    inputs = data if bundle else calibration_batches(data, hyper.get("samples", 1000))
    if row.prepare:
        measure = _function(row.prepare)
        given |= measure(dense, inputs, **accepted(measure, given))
    chosen = planner(dense, inputs, **accepted(planner, given))
    if folder is not None:
        checkpoint.claim(folder, identity)
    small, tables = run(dense, inputs, chosen, **stage(accepted(run, given, fit), method, started))

    about = provenance(small)
    made = Plan.from_dict(about.plan) if about.plan else chosen
    settings = {name: value for name, value in given.items() if isinstance(value, str | int | float)}
    report: dict[str, Any] = {"method": method, "settings": settings, "plan": made.to_dict()}
    report |= {"params_ratio": made.params_ratio, "macs_ratio": made.macs_ratio, "history": tables}
    if labelled:
        report["dense"], report["before"] = (accuracies(net, data, device) for net in (dense, small))
    if epochs:
        history, _ = fit_selected(small, data, **stage(tuning, "finetune", started))
        tables["finetune"] = tables.get("finetune", []) + history.rows
    if labelled:
        report["after"] = accuracies(small, data, device)
    about.report = report | {"seconds": time.perf_counter() - started}
    attach(small, about)
    return small


def _check(method: str, asked: Mapping[str, Any], hyper: Mapping[str, Any], epochs: int) -> None:
    """Raises UnknownName, BudgetError or TdlibError for what the method does not know, cannot be or would be
    ignored, before anything is computed.
    """
    row = _row(method)
    for name in hyper:
        if name not in hyperparameters(method):
            raise unknown(f"hyper-parameter of {method!r}", name, hyperparameters(method))
    if asked["format"] not in row.choices:
        raise unknown(f"format for {method!r}", asked["format"], row.choices)
    parts = [_function(place) for place in (row.planner, row.run, row.prepare) if place]
    own = [name for part in parts for name in keywords(part)]
    check_kinds([compress, *parts, fit], asked)
    for name in ("rule", "ranks", "options"):
        if name in asked and name not in own:
            raise TdlibError(f"method {method!r} takes no {name}; leave it out")
    if ("ratio" in asked) == ("ranks" in asked):
        raise TdlibError("give either a ratio or an explicit table of ranks")
    if {"rule", "ranks"} <= asked.keys():
        raise TdlibError("a table of ranks leaves nothing to a rule: give either")
    if "ratio" in asked and not 1 < asked["ratio"] < math.inf:
        raise BudgetError(
            f"a ratio is dense / compressed and must be a number larger than 1, got {asked['ratio']}"
        )
    if epochs < 0 or not 0 < asked.get("finetune_lr", 1) < math.inf:
        raise TdlibError(
            f"need finetune_epochs >= 0 and finetune_lr > 0, got {epochs} and {asked.get('finetune_lr')}"
        )
    if asked.get("samples", 1) < 1:
        raise TdlibError(f"samples must be at least 1, got {asked['samples']}")
    trains = epochs > 0 or any(passes_on(part) for part in parts)
    idle = [name for name in hyper if name not in own and not trains]
    idle += ["finetune_lr"] if "finetune_lr" in asked and not epochs else []
    if idle:
        raise TdlibError(
            f"{', '.join(idle)} would be ignored: {method!r} trains nothing that takes it without "
            "finetune_epochs; give those as well, or leave it out"
        )


def planned(
    model: nn.Module,
    data: Any,
    *,
    format: str,
    ratio: float | None = None,
    by: str = "params",
    skip: Sequence[str] | None = None,
    rule: str | None = None,
    ranks: Mapping[str, Sequence[int]] | None = None,
    options: Mapping[str, Any] | None = None,
    statistics: Any = None,
    multiple: int = 1,
    progress: bool = False,
) -> Plan:
    """`tdlib.plan` with the papers' choice of dense layers (`end_layers`) where skip is None.

    data: a data set or a list of input batches, for the shape of one input.
    """
    get_format(format).check(options or {})
    shape = data.input_shape if hasattr(data, "input_shape") else data[0].shape[1:]
    return plan(
        model, tuple(shape), format, ratio, by, end_layers(model) if skip is None else skip, rule, ranks,
        statistics if rule == "global" else None, multiple=multiple, progress=progress, **dict(options or {}),
    )  # fmt: skip


def check(model: nn.Module, method: str, data: Any, **asked: Any) -> None:
    """Raises now what `compress` with these arguments would raise before its work: for wrong arguments, a
    ratio out of reach, a step of training that fails. Of the ranks only uniform ones are tried.

    So a `model` that is still to be trained is known to be compressible afterwards.
    """
    row = _row(method)
    given = {"format": row.choices[0], **{name: value for name, value in asked.items() if value is not None}}
    hyper = {name: value for name, value in given.items() if name not in keywords(compress)}
    epochs = given.get("finetune_epochs", row.finetune_epochs)
    _check(method, given, hyper, epochs)
    run, planner = _function(row.run), _function(row.planner)
    if epochs or passes_on(run):
        training = {name: value for name, value in given.items() if name in keywords(fit)}
        rehearse(model, data, **training | {"epochs": max(1, epochs), "lr": given.get("finetune_lr", 0.01)})
    if isinstance(given.get("statistics"), str | Path):
        load_statistics(given.pop("statistics"))
    if planner is planned:
        given["rule"] = "uniform"  # others measure
    planner(model, data, **accepted(planner, given))


def hyperparameters(method: str) -> tuple[str, ...]:
    """Names that `compress(..., method, ...)` takes beside its own: the method's, its planner's and those of
    `train.fit` for the training that it or fine-tuning does. Raises: UnknownName."""
    row = _row(method)
    parts = [_function(place) for place in (row.run, row.planner, row.prepare) if place]
    names = [name for part in parts for name in keywords(part)]
    names += [name for name in keywords(fit) if name not in ("epochs", "lr", "hooks")]
    taken = [*keywords(compress), "on_decomposed", "origin"]
    return tuple(name for name in dict.fromkeys(names) if name not in taken)


def _row(method: str) -> Method:
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    return METHODS[method]


def _function(place: str) -> Callable[..., Any]:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
