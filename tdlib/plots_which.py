"""The tables and figures of the chapter "Which method when": rows of ``tdlib.methods.measure`` in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from .plots import CYCLE, new, styled

MARKERS = "osD^vPX*"

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
    fig, axes = new(1, 2, size=(9.6, 3.8), sharey=True)
    floor = error_floor(tested)
    with styled():
        for ax, cost, text in zip(axes[0], ("params", "macs"), ("parameters", "MACs"), strict=True):
            scaled = table.assign(**{cost: table[cost] / dense[cost]})
            front = pareto_front(scaled, cost)
            ax.step(
                front[cost], _error(front, floor), where="post", color="#999999", lw=6, alpha=0.35, zorder=1
            )
            for position, (name, rows) in enumerate(scaled.groupby(by, sort=False)):
                rows = rows.sort_values(cost)
                ax.plot(rows[cost], _error(rows, floor), lw=0.8, label=name, **_mark(position))
            ax.axhline(max(100 - dense["accuracy"], floor), color="#555555", ls="--", lw=1, label="dense")
            ax.set(xlabel=f"{text} (dense = 1)", xscale="log", yscale="log")
            _plain_ticks(ax, "x", scaled[cost])
            _plain_ticks(ax, "y", pd.concat([_error(scaled, floor), pd.Series([100 - dense["accuracy"]])]))
        axes[0][0].set(ylabel="test error (%)")
        axes[0][1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return fig


def error_against_time(
    table: pd.DataFrame, dense: Mapping[str, float], tested: int, by: str = "name"
) -> Figure:
    """Test error (log) against seconds spent (log); one panel per ratio."""
    ratios, floor = sorted(table["ratio"].unique()), error_floor(tested)
    fig, axes = new(1, len(ratios), size=(3.2 * len(ratios) + 1.8, 3.4), sharey=True, sharex=True)
    with styled():
        for ax, ratio in zip(axes[0], ratios, strict=True):
            for position, (name, rows) in enumerate(table.groupby(by, sort=False)):
                rows = rows[rows["ratio"] == ratio]
                ax.plot(
                    rows["seconds"].clip(lower=0.01),
                    _error(rows, floor),
                    ls="",
                    label=name,
                    **_mark(position),
                )
            ax.axhline(max(100 - dense["accuracy"], floor), color="#555555", ls="--", lw=1, label="dense")
            ax.set(xlabel="seconds", title=f"{ratio:g}×", xscale="log", yscale="log")
        _plain_ticks(axes[0][0], "x", table["seconds"].clip(lower=0.01))
        _plain_ticks(axes[0][0], "y", _error(table, floor))
        axes[0][0].set_ylabel("test error (%)")
        axes[0][-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return fig


def _error(table: pd.DataFrame, floor: float) -> pd.Series:
    return (100 - table["accuracy"]).clip(lower=floor)


def _mark(position: int) -> dict[str, Any]:
    return {"marker": MARKERS[position % len(MARKERS)], "ms": 6.5, "color": CYCLE[position % len(CYCLE)]}


def _plain_ticks(ax: Axes, letter: str, values: pd.Series) -> None:
    """Ticks at round numbers written out, on a log axis that shows the values with a margin."""
    low, high = values.min() / 1.15, values.max() * 1.15
    steps = (1, 2, 5) if high / low < 200 else (1,)
    places = [m * 10.0**e for e in range(-4, 6) for m in steps]
    ax.set(**{f"{letter}lim": (low, high)})
    axis = getattr(ax, f"{letter}axis")
    axis.set_major_locator(FixedLocator([place for place in places if low <= place <= high]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


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


__all__ = ["SITUATIONS", "decide", "error_against_time", "pareto", "pareto_front", "side_by_side"]
