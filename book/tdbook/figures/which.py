"""The tables and figures of the chapter "Which method when": rows of `tdbook.measure` in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from tdbook import style
from tdbook.figures.common import closed, plain_ticks, reference

#: What a reader may have -> which rows are open to him: (training images, labels).
SITUATIONS: dict[str, Any] = {
    "the trained network alone": lambda row: row.images == 0 and not row.labels,
    "some inputs, no labels": lambda row: not row.labels,
    "the training set, a few epochs": lambda row: row.epochs <= row.short,
    "the training set, time to train": lambda row: True,
}


def pareto_front(table: pd.DataFrame, cost: str, value: str = "accuracy") -> pd.DataFrame:
    """Rows that no other row beats: none with at most their ``cost`` has more ``value``. Sorted by cost."""
    best, kept = -np.inf, []
    for index, row in table.sort_values([cost, value], ascending=[True, False]).iterrows():
        if row[value] > best:
            best = row[value]
            kept.append(index)
    return table.loc[kept]


def error_floor(tested: int) -> float:
    """Test error (percent) drawn for a network without any: half an image of ``tested``."""
    return 50 / tested


def pareto(table: pd.DataFrame, dense: Mapping[str, float], tested: int, by: str = "name") -> Figure:
    """Test error (log) against parameters and against MACs: a marker per method, the Pareto front in grey.

    table: columns name, params, macs, accuracy. dense: the same of the dense network. tested: test inputs.
    """
    costs, floor = {"params": "parameters", "macs": "MACs"}, error_floor(tested)
    scaled = table.assign(error=_error(table, floor), **{cost: table[cost] / dense[cost] for cost in costs})
    tidy = scaled.melt([by, "error"], list(costs), "cost", "share").replace({"cost": costs})
    grid = sns.relplot(tidy, x="share", y="error", col="cost", kind="line", markers=True, dashes=False,
                       lw=0.8, height=3.6, aspect=1.1, facet_kws={"sharex": False}, **_marks(tidy, by),
                       )  # fmt: skip
    for ax, cost in zip(grid.axes[0], costs, strict=True):
        front = pareto_front(scaled, cost)
        ax.step(front[cost], front["error"], where="post", color=style.GREY, lw=6, alpha=0.35, zorder=1)
    grid.set_axis_labels("cost (dense = 1)", "test error (%)")
    return _finished(grid, max(100 - dense["accuracy"], floor))


def error_against_time(
    table: pd.DataFrame, dense: Mapping[str, float], tested: int, by: str = "name"
) -> Figure:
    """Test error (log) against seconds spent (log); one panel per ratio."""
    floor = error_floor(tested)
    tidy = table.assign(error=_error(table, floor), seconds=table["seconds"].clip(lower=0.01),
                        at=table["ratio"].map("{:g}×".format))  # fmt: skip
    grid = sns.relplot(tidy, x="seconds", y="error", col="at", kind="scatter", s=50, **_marks(tidy, by),
                       height=3.4, aspect=0.95)  # fmt: skip
    grid.set_axis_labels("seconds", "test error (%)")
    return _finished(grid, max(100 - dense["accuracy"], floor))


def _error(table: pd.DataFrame, floor: float) -> pd.Series:
    return (100 - table["accuracy"]).clip(lower=floor)


def _marks(table: pd.DataFrame, by: str) -> dict[str, Any]:
    return {"hue": by, "style": by, "palette": style.palette(table[by])}


def _finished(grid: sns.FacetGrid, dense: float) -> Figure:
    """Log axes with plain numbers, the dense network's error, panels headed by their value."""
    grid.set_titles("{col_name}").set(xscale="log", yscale="log")
    grid.legend.set_title("")
    for ax in grid.axes[0]:
        reference(ax, dense)
        plain_ticks(ax.xaxis)
        plain_ticks(ax.yaxis)
    return closed(grid.figure)


def side_by_side(table: pd.DataFrame, by: str = "name") -> pd.DataFrame:
    """One row per method: what it asks (at the first ratio); accuracy, points kept and seconds per ratio."""
    rows = {}
    for name, group in table.groupby(by, sort=False):
        first = group.iloc[0]
        row: dict[tuple[str, str], Any] = {
            ("asks", "images"): int(first["images"]),
            ("asks", "labels"): "yes" if first["labels"] else "no",
            ("asks", "epochs"): round(float(first["epochs"]), 1),
        }
        for one in group.itertuples():
            at = f"{one.ratio:g}×"
            row |= {(at, "accuracy"): round(one.accuracy, 1), (at, "kept"): round(one.kept, 1)}
            row |= {(at, "seconds"): round(one.seconds, 1), (at, "MACs ratio"): round(one.macs_ratio, 2)}
        rows[name] = row
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")


def decide(table: pd.DataFrame, validated: int, short: float, by: str = "name") -> pd.DataFrame:
    """For what a reader has, the method to take at every ratio, with its test accuracy and the points kept.

    Of the methods that the situation allows, those within one standard error of the best validation accuracy
    count as equal, and the fastest of them is taken. validated: inputs of the validation split (0: the test
    split is used). short: the number of epochs that counts as few.
    """
    score = "val_accuracy" if "val_accuracy" in table and table["val_accuracy"].notna().all() else "accuracy"
    rows = {}
    for situation, open_to in SITUATIONS.items():
        row = {}
        for ratio, group in table.assign(short=short).groupby("ratio"):
            allowed = group[[bool(open_to(one)) for one in group.itertuples()]]
            if allowed.empty:
                row[f"{ratio:g}×"] = "–"
                continue
            top = allowed[score].max() / 100
            slack = 100 * (max(top * (1 - top), 1e-4) / max(validated, 1)) ** 0.5 if validated else 0.0
            equal = allowed[allowed[score] >= 100 * top - slack]
            best = equal.sort_values("seconds").iloc[0]
            row[f"{ratio:g}×"] = f"{best[by]}: {best['accuracy']:.1f} % ({best['kept']:+.1f})"
        rows[situation] = row
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("you have")
