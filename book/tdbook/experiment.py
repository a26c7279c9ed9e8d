"""Arms × ratios × seeds: several roads from one dense network to compressed ones; what each keeps and costs.

Every chapter runs `experiment`. Its rows are tidy: one for each arm, ratio and seed, all with the same
columns; a record of a row is the row.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from inspect import signature
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

import tdlib
from tdbook.numerics import numerics
from tdbook.records import read_record, record, record_path
from tdlib.calibration import divergence
from tdlib.data import Bundle
from tdlib.errors import BudgetError, DataError
from tdlib.methods.kinds import accepted
from tdlib.network import fingerprint
from tdlib.planning import Plan
from tdlib.train import checkpoint, evaluate, fit, fit_selected, inference, recalibrated, stage

Tables = dict[str, list[dict[str, Any]]]
Key = tuple[str, float, int]


@dataclass(frozen=True)
class Arm:
    """One road from the dense network to a compressed one.

    run: (model, data, plan, *, ...) -> (network, tables), a method of `tdlib.methods` or a partial of it.
    plan: (network, ratio, seed) -> plan. start: (model, data, *, ...) -> (network, tables), what comes before
    where the arm does not start from the dense network itself; done once per seed for all arms that share it,
    its seconds, images and tables count in every row. finetune: arguments of `train.fit` for the training
    after `run`; none without epochs. trains: `run` itself trains with labels. scratch: it keeps no weight of
    the dense network, so there is no accuracy right after compression. columns: tables -> further columns of
    the row. about: parameters that its rows and records have beside the others, or otherwise.
    """

    run: Callable[..., tuple[nn.Module, Tables]]
    plan: Callable[[nn.Module, float, int], Plan]
    start: Callable[..., tuple[nn.Module, Tables]] | None = None
    finetune: Mapping[str, Any] = field(default_factory=dict)
    trains: bool = False
    scratch: bool = False
    columns: Callable[[Tables], dict[str, Any]] = lambda tables: {}
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Start:
    """What an arm starts from, and what that took."""

    network: nn.Module
    tables: Tables = field(default_factory=dict)
    seconds: float = 0.0
    images: int = 0
    trained: bool = False  # with labels, or only looked at inputs


@dataclass
class Results:
    """rows: see `experiment`. By (method, ratio, seed): tables (histories), and of the arms that ran here,
    not read from a record, networks and plans. dense: seed -> the network that all arms started from.
    starts: by (method, seed), the networks of arms that begin otherwise."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    tables: dict[Key, Tables] = field(default_factory=dict)
    networks: dict[Key, nn.Module] = field(default_factory=dict)
    plans: dict[Key, Plan] = field(default_factory=dict)
    dense: dict[int, nn.Module] = field(default_factory=dict)
    starts: dict[tuple[str, int], nn.Module] = field(default_factory=dict)

    @property
    def frame(self) -> pd.DataFrame:
        """The rows as a tidy table."""
        return pd.DataFrame(self.rows)


@dataclass(frozen=True)
class Recorder:
    """Where rows become records: parameters identify the run beside method, ratio, by and seed. The library's
    own numbers (`numerics`) are among every record's settings."""

    chapter: str
    parameters: Mapping[str, Any]
    scale: str = "quick"
    notes: str | None = None
    directory: Path | None = None  # default see `record_path`

    def read(
        self, about: Mapping[str, Any], settings: Mapping[str, Any], data: Bundle
    ) -> tuple[dict[str, Any], Tables, str | None] | None:
        """(row, tables, fingerprint of its dense network) of an earlier run of the same, or None."""
        parameters = {**self.parameters, **about}
        decides = {**settings, "numerics": numerics()}
        path = record_path(self.chapter, parameters, self.directory, settings=decides, data=data)
        if not path.is_file():
            return None
        found = read_record(path)
        return {**about, **found["metrics"]}, found.get("history") or {}, found["start"]

    def write(
        self, about: Mapping[str, Any], row: Mapping[str, Any], history: Tables, *,
        settings: Mapping[str, Any], **more: Any,
    ) -> None:  # fmt: skip
        """Write the record of one row; more: of `record`."""
        metrics = {name: value for name, value in row.items() if name not in about}
        record(
            self.chapter, {**self.parameters, **about}, metrics, directory=self.directory, scale=self.scale,
            settings={**settings, "numerics": numerics()}, history=history, notes=self.notes, **more,
        )  # fmt: skip


def experiment(
    dense: Callable[[int], nn.Module],
    data: Bundle,
    arms: Mapping[str, Arm],
    *,
    ratios: Sequence[float],
    seeds: Sequence[int] = (0,),
    by: str = "params",
    reference: Callable[[nn.Module, int], nn.Module] | None = None,
    training: Mapping[str, Any] | None = None,
    epoch: Mapping[str, Any] | None = None,
    recorder: Recorder | None = None,
    progress: bool = False,
) -> Results:
    """Run every arm at every ratio and seed.

    dense: seed -> the trained network, moved to the device of `training`. reference: (dense network, seed) ->
    the network that rows are compared with, where the dense one has to train on for as many epochs as the
    arms; once per seed, and it must not change the dense one. training: arguments of `train.fit` for all
    training alike (batch_size, device, precision, checkpoint, max_minutes, ...); an arm's own go before.
    epoch: asks for test_accuracy_epoch, and holds what that one epoch of `train.fit` sets otherwise (lr).
    recorder: writes a record of every row as soon as it is there; rows whose record exists are read instead
    of run, so a stopped experiment continues. A record is known by its parameters, the settings of its arm
    and the data; it also holds the ranks and the fingerprint of the dense network, which has to be the same
    for all rows of a seed (else DataError). progress: say when a row is there, and show bars. An arm that
    cannot reach a ratio has no row there, and says so. Raises: BudgetError where none reaches any.

    Columns: method (the arm), ratio (the target), by, seed. Accuracies in percent on the test split:
    dense_test_accuracy (of the reference), start_test_accuracy (of the dense network that all arms started
    from), test_accuracy_before (right after the last decomposition),
    test_accuracy_recalibrated (the same with BatchNorm re-estimated on images drawn by the seed),
    test_accuracy_epoch (the same, BatchNorm as it is, after one epoch of fine-tuning; of `epoch` alone),
    test_accuracy (at the end; of the fine-tuning epochs that of the best on validation), test_accuracy_last
    (after the last epoch of fine-tuning); and val_accuracy. agreement with the dense network's top-1
    (percent) and kl divergence from it (nats) on test, n images. params_ratio, macs_ratio and speedup
    (measured, batch of one): dense / compressed. seconds: of the whole arm from the dense network on, without
    measuring. images: inputs drawn from the training split by the process that finished the row; labels:
    whether their labels were used; epochs: of all its training.
    """
    results, started = Results(), time.perf_counter()
    same = {"progress": progress, **(training or {})}
    starts: dict[tuple[Any, int], Start] = {}
    references: dict[int, Reference] = {}
    missed: dict[str, None] = {}
    began: dict[int, str] = {}  # seed -> fingerprint of the dense network, of this run or of its records
    for seed, ratio, (name, arm) in product(seeds, map(float, ratios), arms.items()):
        about = {"method": name, "ratio": ratio, "by": by, "seed": seed, **arm.about}
        settings = described(arm, same, epoch)
        found = None if recorder is None else recorder.read(about, settings, data)
        if found is None:
            begun = time.perf_counter()
            options = stage({**same, "seed": seed}, f"{name}-{ratio:g}-{by}-{seed}", started)
            if seed not in results.dense:
                network = dense(seed).to(options.get("device"))
                results.dense[seed] = network
                compared = network if reference is None else reference(network, seed)
                references[seed] = Reference.of(compared, network, data, options.get("device"))
            start_weights = fingerprint(results.dense[seed])
            decisive = {**about, "settings": described(arm, same), "data": data.fingerprint}
            decisive |= {"start": start_weights, "numerics": numerics()}
            _one_start(began, seed, start_weights)
            options["origin"] = checkpoint.digest({k: repr(v) for k, v in decisive.items()})
            if (arm.start, seed) not in starts:
                before = stage({**same, "seed": seed}, f"start-{name}-{seed}", started)
                starts[arm.start, seed] = _start(arm, results.dense[seed], data, before)
            start = starts[arm.start, seed]
            results.starts[name, seed] = start.network
            try:
                row, tables, small, plan = _run(arm, ratio, references[seed], start, data, options, epoch)
            except BudgetError as problem:
                missed[f"{name} at {ratio:g}×: {problem}"] = None
                print(f"{name} at {ratio:g}×: {problem}")
                continue
            results.networks[name, ratio, seed], results.plans[name, ratio, seed] = small, plan
            if recorder is not None:
                recorder.write(
                    about, row, tables, data=data, device=options.get("device"), settings=settings,
                    wall_seconds=time.perf_counter() - begun, start=start_weights,
                    tables={"ranks": [{"layer": k, "ranks": v} for k, v in plan.ranks.items()]},
                )  # fmt: skip
            found = {**about, **row}, tables, start_weights
        elif found[2] is not None:
            _one_start(began, seed, found[2])
        results.rows.append(found[0])
        results.tables[name, ratio, seed] = found[1]
        if progress:
            took, accuracy = found[0]["seconds"], found[0]["test_accuracy"]
            print(f"{name} {ratio:g}× seed {seed}: {accuracy:.2f} % ({took:.0f} s)", flush=True)
    if missed and not results.rows:
        raise BudgetError("no ratio was reached, ask for others. " + "; ".join(missed))
    return results


def _one_start(began: dict[int, str], seed: int, start: str) -> None:
    """Raises DataError where rows of one seed would be compared that began from different networks."""
    if began.setdefault(seed, start) != start:
        raise DataError(
            f"the records of seed {seed} began from other weights than this run's dense network has: go on "
            "with the checkpoint or weights that they began from, or write the records to another folder"
        )


def _start(arm: Arm, dense: nn.Module, data: Bundle, options: dict[str, Any]) -> Start:
    if arm.start is None:
        return Start(dense)
    begun, counted = time.perf_counter(), CountedBundle.of(data)
    network, tables = arm.start(dense, counted, **_taken(arm.start, options))
    images = counted.drawn.get("train", 0)
    return Start(network, tables, time.perf_counter() - begun, images, trained=network is not dense)


@dataclass(frozen=True)
class Reference:
    """The network that rows are compared with; its outputs on the test split, and the labels there. start:
    accuracy there, in percent, of the network that all arms start from."""

    network: nn.Module
    logits: Tensor
    labels: Tensor
    start: float

    @classmethod
    def of(cls, network: nn.Module, dense: nn.Module, data: Bundle, device: Any) -> Reference:
        """Both networks measured; they may be the same."""
        outputs, labels = _answers(network, data, device)
        first = outputs if network is dense else _answers(dense, data, device)[0]
        return cls(network, outputs, labels, _percent(first.argmax(1) == labels))

    def accuracy(self, outputs: Tensor) -> float:
        """Of outputs on the test split, in percent."""
        return _percent(outputs.argmax(1) == self.labels)


def _answers(model: nn.Module, data: Bundle, device: Any) -> tuple[Tensor, Tensor]:
    """(outputs, labels) on the test split, on the CPU; the model is moved to the device, if one is given."""
    if device is not None:
        model.to(device)
    place = next(model.parameters()).device
    with inference(model):
        found = [(model(x).float().cpu(), y.cpu()) for x, y in data.batches("test", 256, device=place)]
    outputs, labels = zip(*found, strict=True)
    return torch.cat(outputs), torch.cat(labels)


def _percent(hits: Tensor) -> float:
    return 100 * float(hits.sum()) / len(hits)


def _run(
    arm: Arm,
    ratio: float,
    reference: Reference,
    start: Start,
    data: Bundle,
    options: dict[str, Any],
    epoch: Mapping[str, Any] | None,
) -> tuple[dict[str, Any], Tables, nn.Module, Plan]:
    """One row (without the columns that name it), the tables, the network and its plan."""
    device, watch, counted = options.get("device"), Watch(start.seconds), CountedBundle.of(data)
    begun = time.perf_counter()
    cut: list[nn.Module] = []  # the network right after its last decomposition, where the method shows it

    def on_decomposed(small: nn.Module) -> None:
        with watch.paused():
            cut[:] = [copy.deepcopy(small)]

    with watch.running():
        plan = arm.plan(start.network, ratio, options["seed"])
        given = _taken(arm.run, {**options, "on_decomposed": on_decomposed})
        small, tables = arm.run(start.network, counted, plan, **given)
    tables = {**start.tables, **tables}
    measured: dict[str, float] = {}
    outputs = last = None
    if not arm.scratch:
        measured, outputs = _right_after(cut[0] if cut else small, reference, data, options, epoch)
    if arm.finetune.get("epochs"):
        settings = {**stage(options, "finetune", begun), **arm.finetune}
        with watch.running():
            history, found = fit_selected(small, counted, **settings)
        tables = {**tables, "finetune": tables.get("finetune", []) + history.rows}
        last = found["last"]["test"]
    if outputs is None or cut or last is not None:
        outputs = _answers(small, data, device)[0]
    made = tdlib.provenance(small).plan  # of a method that chooses the ranks itself
    plan = Plan.from_dict(made) if made else plan
    labels = arm.trains or bool(arm.finetune.get("epochs")) or start.trained
    # Epochs that a checkpoint brought took their seconds in an earlier process.
    trained = [epoch for table in tables.values() for epoch in table if "train_loss" in epoch]
    seconds = max(watch.seconds, sum(epoch["seconds"] for epoch in trained))
    whole = tdlib.compare(reference.network, small, data.input_shape, repeats=5).whole
    row = {
        "dense_test_accuracy": reference.accuracy(reference.logits),
        "start_test_accuracy": reference.start,
        **measured,
        "test_accuracy": reference.accuracy(outputs),
        "test_accuracy_last": last,
        "val_accuracy": evaluate(small, data, "val", device=device)["accuracy"] if len(data.val) else None,
        "agreement": _percent(outputs.argmax(1) == reference.logits.argmax(1)),
        "kl": divergence(reference.logits, outputs),
        "n": len(outputs),
        "params_ratio": whole["params_ratio"],
        "macs_ratio": whole["macs_ratio"],
        "speedup": whole["speedup"],
        "seconds": seconds,
        "images": start.images + counted.drawn.get("train", 0),
        "labels": labels,
        "epochs": len(trained),
        **arm.columns(tables),
    }
    return row, tables, small, plan


def _right_after(
    small: nn.Module,
    reference: Reference,
    data: Bundle,
    options: Mapping[str, Any],
    epoch: Mapping[str, Any] | None,
) -> tuple[dict[str, float], Tensor]:
    """What a network keeps right after a decomposition, and its outputs on the test split; it is left as it
    is."""
    device = options.get("device")
    outputs = _answers(small, data, device)[0]
    changed = {"recalibrated": recalibrated(small, data, device, seed=options["seed"])}
    if epoch is not None:
        changed["epoch"] = copy.deepcopy(small)
        fit(changed["epoch"], data, **_one_epoch(options, epoch))
    accuracies = {name: reference.accuracy(_answers(net, data, device)[0]) for name, net in changed.items()}
    found = {"before": reference.accuracy(outputs), **accuracies}
    return {f"test_accuracy_{name}": value for name, value in found.items()}, outputs


def _one_epoch(training: Mapping[str, Any], epoch: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `fit` for the epoch that only measures: without a checkpoint or a limit of time."""
    once = {"epochs": 1, "checkpoint": None, "max_minutes": None, "progress": False, "validate": False}
    return {**training, **epoch, **once}


def described(
    arm: Arm, training: Mapping[str, Any], epoch: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What decides a row of this arm beside ratio, seed and data: the functions and all their arguments that
    are plain values, defaults and those of training included."""
    found: dict[str, Any] = {"run": arguments(arm.run, training)}
    if arm.start is not None:
        found["start"] = arguments(arm.start, training)
    if arm.finetune.get("epochs"):
        found["finetune"] = arguments(fit, {**training, **arm.finetune})
    if epoch is not None and not arm.scratch:
        found["epoch"] = arguments(fit, _one_epoch(training, epoch))
    return found


def arguments(function: Callable[..., Any], training: Mapping[str, Any]) -> dict[str, Any]:
    """The function's name, and its arguments that are plain values: its defaults and those of `train.fit`
    where it passes them on, `training` and what a partial sets.
    """
    plain = getattr(function, "func", function)  # of a partial
    given = {p.name: p.default for p in signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
    if any(p.kind is p.VAR_KEYWORD for p in signature(function).parameters.values()):
        given = {p.name: p.default for p in signature(fit).parameters.values()} | given
    given |= {name: value for name, value in training.items() if name in given}
    given |= getattr(function, "keywords", {}) | vars(getattr(plain, "__self__", SimpleNamespace()))
    kept = {k: v for k, v in given.items() if isinstance(v, str | int | float | list | tuple)}
    about = {k: v for k, v in kept.items() if k not in _NO_MATTER}
    return {"function": f"{plain.__module__}.{plain.__qualname__}", **about}


_NO_MATTER = {*checkpoint.FREE, "seed"} - {"channels_last"}


def _taken(run: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that `run` takes; what a partial has set itself stays."""
    return accepted(run, {**options, **getattr(run, "keywords", {})}, fit)


class Watch:
    """Seconds of what runs inside `running`, without what runs inside `paused`."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    @contextmanager
    def running(self, sign: int = 1) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += sign * (time.perf_counter() - begun)

    def paused(self) -> Any:
        """To be used inside `running`."""
        return self.running(-1)


class _Counting:
    """Batches that add the number of inputs they give out to `drawn[split]`."""

    def __init__(self, batches: Any, drawn: dict[str, int], split: str) -> None:
        self._batches, self._drawn, self._split = batches, drawn, split

    def __len__(self) -> int:
        return len(self._batches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self._batches:
            self._drawn[self._split] = self._drawn.get(self._split, 0) + len(x)
            yield x, y


@dataclass(frozen=True)
class CountedBundle(Bundle):
    """A data set that counts the inputs drawn from each of its splits, in `drawn`."""

    drawn: dict[str, int] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, data: Bundle) -> CountedBundle:
        """The same data, counted from now on."""
        return cls(**{row.name: getattr(data, row.name) for row in fields(Bundle)})

    def batches(self, split: str, batch_size: int, **options: Any) -> Any:
        """As `Bundle.batches`."""
        return _Counting(super().batches(split, batch_size, **options), self.drawn, split)
