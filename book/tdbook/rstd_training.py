"""How the networks of the chapter on shuffled kernels are trained: the arms and the baselines beside them, a
learning rate for each, and what is recorded of networks that are no arm of an experiment.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
from torch import nn

from tdbook.experiment import Recorder, Tables, arguments
from tdlib.data import Bundle
from tdlib.errors import NonFiniteError
from tdlib.methods.direct import untrained
from tdlib.methods.rstd import layer_seeds, shuffled_plan
from tdlib.network import fingerprint
from tdlib.planning import Plan, end_layers, plan
from tdlib.train import evaluate, fit, fit_selected, stage

PlanOf = Callable[[nn.Module, float, int], Plan]  # (network, ratio, seed) -> plan

#: The seed that learning rates are chosen at: none that is reported, and the same whichever are.
TRIAL = 1000


def variants(order: int | None) -> dict[str, dict[str, Any]]:
    """Options of `shuffled_plan` for the three tensor arms; order: of the folded tensor."""
    return {
        "shuffled": {"order": order},
        "folded": {"order": order, "shuffle": False},
        "kernel": {"modes": "kernel", "shuffle": False},
    }


def plans(data: Bundle, format: str, order: int | None) -> dict[str, PlanOf]:
    """The plan of every arm: the tensors of `variants`, and the random subspace, which has no tensor."""

    def tensor(options: Mapping[str, Any]) -> PlanOf:
        return lambda net, ratio, seed: shuffled_plan(
            net, data, ratio=ratio, format=format, seed=seed, **options
        )

    def subspace(net: nn.Module, ratio: float, seed: int) -> Plan:
        return plan(
            net, data.input_shape, format="hashed", ratio=ratio, rule="uniform", skip=end_layers(net),
            seed=layer_seeds(net, seed),
        )  # fmt: skip

    return {name: tensor(options) for name, options in variants(order).items()} | {
        "random subspace": subspace
    }


def trials(
    net: nn.Module, data: Bundle, arms: Mapping[str, PlanOf], rates: Sequence[float], *, ratio: float,
    recorder: Recorder | None = None, **training: Any,
) -> Tables:  # fmt: skip
    """The epochs of every arm and of the dense network at every rate, "arm, rate" -> rows; none where the
    loss became infinite. The test split is not looked at. A record of the same is read instead.

    net: the architecture; ratio: of the arms; training: of `train.fit`.
    """
    about = {"method": "learning rates", "ratio": ratio, "by": "params", "seed": TRIAL}
    settings = {"run": arguments(fit, {**training, "lr": list(rates)})}
    found = None if recorder is None else recorder.read(about, settings, data)
    if found is not None:
        return found[1]
    begun, tables = time.perf_counter(), Tables()
    dense = plan(net, data.input_shape, ranks={})
    for name, planned in {"dense": dense, **{k: of(net, ratio, TRIAL) for k, of in arms.items()}}.items():
        for rate in rates:
            key = f"{name}, {rate:g}"
            fresh = untrained(net, planned, TRIAL)
            try:
                tables[key] = fit(fresh, data, lr=rate, seed=TRIAL, **stage(training, key, 0)).rows
            except NonFiniteError:
                tables[key] = []
    if recorder is not None:
        metrics = {f"lr of {name}": rate for name, rate in chosen(choice(tables, len(data.classes))).items()}
        recorder.write(
            about, metrics, tables, data=data, device=training.get("device"), settings=settings,
            wall_seconds=time.perf_counter() - begun,
        )  # fmt: skip
    return tables


def choice(found: Tables, classes: int) -> pd.DataFrame:
    """The rate of each arm: of those whose mean loss in the first epoch stays within that of guessing,
    ln(classes) (of all, where none does), the one with the highest validation accuracy at any epoch.

    found: of `trials`. Columns: method, lr, first_loss (nats), val_accuracy (percent), chosen.
    """
    rows = []
    for key, epochs in found.items():
        name, _, rate = key.rpartition(", ")
        first = epochs[0]["train_loss"] if epochs else math.inf
        best = max((epoch["val_accuracy"] for epoch in epochs), default=0.0)
        rows.append({"method": name, "lr": float(rate), "first_loss": first, "val_accuracy": best})
    table = pd.DataFrame(rows)
    order = table.assign(sound=table["first_loss"] <= math.log(classes)).sort_values(
        ["sound", "val_accuracy"], kind="stable"
    )
    return table.assign(chosen=table.index.isin(order.groupby("method").tail(1).index))


def chosen(table: pd.DataFrame) -> dict[str, float]:
    """Arm -> its rate, of the table of `choice`."""
    return dict(table[table["chosen"]].set_index("method")["lr"])


def ends(table: pd.DataFrame) -> str:
    """In words: whose chosen rate is the smallest or the largest of the grid."""
    bounds = (table["lr"].min(), table["lr"].max())
    at_end = [name for name, rate in chosen(table).items() if rate in bounds]
    if not at_end:
        return "No chosen rate is the smallest or the largest of the grid."
    return (
        f"The smallest or largest rate of the grid was chosen for: {', '.join(at_end)}. A rate beyond it "
        "was not tried."
    )


def losses(tables: Tables) -> dict[str, float]:
    """Mean training loss (nats) of the first and of the last epoch."""
    rows = [*tables.values()][-1]
    return {"first_loss": rows[0]["train_loss"], "train_loss": rows[-1]["train_loss"]}


def dense_network(
    net: nn.Module, data: Bundle, method: str, *, seed: int, select: bool = True,
    measure: Callable[[nn.Module], Mapping[str, float]] = lambda net: {}, images: Bundle | None = None,
    recorder: Recorder | None = None, **training: Any,
) -> dict[str, Any]:  # fmt: skip
    """Train a dense network in place and give its row: method, seed, test_accuracy (percent), n, epochs,
    losses and what `measure` says of it; recorded without format and ratio.

    select: the epoch that is best on validation is kept, else the last. images: the data that `data` shows
    in another form, where it does; the record names them and the form.
    """
    start, begun = fingerprint(net), time.perf_counter()
    options = {"seed": seed, **stage(training, f"{method}-{seed}", 0)}
    history = fit_selected(net, data, **options)[0] if select else fit(net, data, **options)
    tested = evaluate(net, data, device=training.get("device"))
    about = {"method": method, "format": None, "ratio": None, "by": None, "seed": seed}
    metrics = {
        "test_accuracy": tested["accuracy"], "n": tested["n"], "epochs": len(history.rows), "labels": True,
        **losses({"dense": history.rows}), **measure(net),
    }  # fmt: skip
    if recorder is not None:
        form = {} if images is None else {"images": {"form": data.name}}
        recorder.write(
            about, metrics, {"dense": history.rows}, data=images or data, device=training.get("device"),
            settings={"run": arguments(fit, training)} | form, start=start,
            wall_seconds=time.perf_counter() - begun,
        )  # fmt: skip
    return {"method": method, "seed": seed, **metrics}
