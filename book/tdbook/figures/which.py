"""The tables and figures of the chapter "Which method when": rows of `experiment` in, seeds averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from tdbook import style, tables
from tdbook.experiment import Arm, Key, described
from tdbook.figures.common import closed, plain_ticks, reference
from tdlib.planning import Plan

#: What a reader may have -> which rows are open to him.
SITUATIONS: dict[str, Any] = {
    "the trained network alone": lambda row: row.images == 0 and not row.labels,
    "some inputs, no labels": lambda row: not row.labels,
    "the training set, a few epochs": lambda row: row.epochs <= row.short,
    "the training set, time to train": lambda row: True,
}

KEEPS = tables.COLUMNS | {
    "kept": "kept (points)", "agreement": "agreement (%)", "dense_test_accuracy": "dense (%)"
}  # fmt: skip


def means(rows: pd.DataFrame) -> pd.DataFrame:
    """Each method and ratio as one row: means over the seeds, and `kept`, test accuracy minus dense."""
    table = rows.groupby(["method", "ratio"], sort=False).mean(numeric_only=True).reset_index()
    kept = table["test_accuracy"] - table["dense_test_accuracy"]
    return table.assign(kept=kept, labels=table["labels"].astype(bool))


def rank_rules(arms: Mapping[str, Arm], plans: Mapping[Key, Plan]) -> dict[str, str]:
    """How the ranks of each method were chosen: by its own rule where it has one, else by its plan's."""
    own = {name: described(arm, {})["run"].get("rule") for name, arm in arms.items()}
    found = {name: plan.rule for (name, _, _), plan in plans.items()}
    return found | {name: f"{rule}, pass by pass" for name, rule in own.items() if rule}


def asks(rows: pd.DataFrame, rules: Mapping[str, str]) -> pd.DataFrame:
    """What each method asks: images, labels and epochs; least and most, where its rows differ. And the rule
    of its ranks, see `rank_rules`; a dash where it has none, or its rows come from records."""
    table = {}
    for name, group in rows.groupby("method", sort=False):
        images, epochs = group["images"], group["epochs"].round(1)
        table[name] = {
            "images": _span(images.min(), images.max()),
            "labels": "yes" if group["labels"].any() else "no",
            "epochs": _span(epochs.min(), epochs.max()),
            "ranks by": rules.get(name) or "–",
        }
    return pd.DataFrame.from_dict(table, orient="index").rename_axis("method")


def keeps(rows: pd.DataFrame, keys: Sequence[str] = ("ratio", "method")) -> pd.DataFrame:
    """What is left and what it took, a row for each of `keys`: mean ± deviation over the seeds."""
    kept = rows["test_accuracy"] - rows["dense_test_accuracy"]
    return tables.summary(rows.assign(kept=kept), keys, KEEPS)


def _span(least: float, most: float) -> str:
    return f"{least:,g}" if least == most else f"{least:,g} to {most:,g}"


def pareto_front(table: pd.DataFrame, cost: str, value: str) -> pd.DataFrame:
    """Rows that no other row beats: none with at most their ``cost`` has more ``value``. Sorted by cost."""
    best, kept = -np.inf, []
    for index, row in table.sort_values([cost, value], ascending=[True, False]).iterrows():
        if row[value] > best:
            best = row[value]
            kept.append(index)
    return table.loc[kept]


def pareto(rows: pd.DataFrame) -> Figure:
    """Test error (log) against parameters and against MACs: a marker per method, the Pareto front in grey."""
    costs = {"params": "parameters", "macs": "MACs"}
    table = _with_error(means(rows))
    table = table.assign(**{name: 1 / table[f"{unit}_ratio"] for unit, name in costs.items()})
    tidy = table.melt(["method", "error"], list(costs.values()), "cost", "share")
    grid = sns.relplot(
        tidy, x="share", y="error", col="cost", kind="line", markers=True, dashes=False, lw=0.8,
        height=3.6, aspect=1.1, facet_kws={"sharex": False}, **_marks(tidy),
    )  # fmt: skip
    for ax, cost in zip(grid.axes[0], costs.values(), strict=True):
        front = pareto_front(table, cost, "test_accuracy")
        ax.step(front[cost], front["error"], where="post", color=style.GREY, lw=6, alpha=0.35, zorder=1)
    grid.set_axis_labels("cost (dense = 1)", "test error (%)")
    return _finished(grid, rows)


def error_against_time(rows: pd.DataFrame) -> Figure:
    """Test error (log) against seconds spent (log); one panel per ratio."""
    table = _with_error(means(rows))
    tidy = table.assign(seconds=table["seconds"].clip(lower=0.01), at=table["ratio"].map("{:g}×".format))
    grid = sns.relplot(
        tidy, x="seconds", y="error", col="at", kind="scatter", s=50, height=3.4, aspect=0.95, **_marks(tidy)
    )
    grid.set_axis_labels("seconds", "test error (%)")
    return _finished(grid, rows)


def _with_error(rows: pd.DataFrame) -> pd.DataFrame:
    """With test errors in percent; a network without any is drawn at half a test image."""
    return rows.assign(error=(100 - rows["test_accuracy"]).clip(lower=50 / rows["n"]))


def _marks(table: pd.DataFrame) -> dict[str, Any]:
    return {"hue": "method", "style": "method", "palette": style.palette(table["method"])}


def _finished(grid: sns.FacetGrid, rows: pd.DataFrame) -> Figure:
    """Log axes with plain numbers, the dense network's error, panels headed by their value."""
    dense = _with_error(rows.assign(test_accuracy=rows["dense_test_accuracy"]))["error"].mean()
    grid.set_titles("{col_name}").set(xscale="log", yscale="log")
    grid.legend.set_title("")
    for ax in grid.axes[0]:
        reference(ax, dense)
        plain_ticks(ax.xaxis)
        plain_ticks(ax.yaxis)
    return closed(grid.figure)


def decide(rows: pd.DataFrame, validated: int, short: float) -> pd.DataFrame:
    """For what a reader has, the method to take at every ratio, with its test accuracy and the points kept.

    Of the methods that the situation allows, those within two standard errors of the best validation accuracy
    count as equal, and the fastest of them is taken. validated: inputs of the validation split (0: the test
    split is used). short: the number of epochs that counts as few.
    """
    table = means(rows).assign(short=short)
    score = "val_accuracy" if validated else "test_accuracy"
    chosen = {}
    for situation, open_to in SITUATIONS.items():
        allowed = table[[bool(open_to(row)) for row in table.itertuples()]]
        chosen[situation] = {f"{ratio:g}×": "–" for ratio in table["ratio"].unique()}
        for ratio, group in allowed.groupby("ratio"):
            top = group[score].max()
            equal = group[group[score] >= top - 2 * standard_error(top, validated)]
            best = equal.sort_values("seconds").iloc[0]
            text = f"{best['method']}: {best['test_accuracy']:.1f} % ({best['kept']:+.1f})"
            chosen[situation][f"{ratio:g}×"] = text
    return pd.DataFrame.from_dict(chosen, orient="index").rename_axis("you have")


def standard_error(accuracy: float, images: int) -> float:
    """Of an accuracy (percent) measured on so many images, in points; at least as of half an image wrong."""
    if not images:
        return 0.0
    wrong = max(1 - accuracy / 100, 0.5 / images)
    return 100 * (wrong * (1 - wrong) / images) ** 0.5


def verdict(rows: pd.DataFrame) -> str:
    """Markdown: at every ratio the best method without labels and the best with training, and the error."""
    table, lines = means(rows), []
    for ratio, at in table.groupby("ratio"):
        groups = {"without labels": at[~at["labels"]], "with training": at[at["labels"]]}
        found = [f"{text}, {_praise(group)}" for text, group in groups.items() if len(group)]
        lines.append(f"- **{ratio:g}×**: " + "; ".join(found) + ".")
    images, dense = int(rows["n"].iloc[0]), rows["dense_test_accuracy"].mean()
    lines.append(
        f"- With {images} test images one standard error of an accuracy like the dense network's is "
        f"{standard_error(dense, images):.1f} points: differences below two of these decide nothing."
    )
    return "\n".join(lines)


def limits(rows: pd.DataFrame) -> str:
    """Markdown: what equal ratios leave unequal, and how many rows are too near the dense network to tell."""
    table, words = means(rows), {"params": "parameters", "macs": "MACs"}
    by = rows["by"].iloc[0]
    other = next(unit for unit in words if unit != by)
    lines = []
    for ratio, at in table.groupby("ratio"):
        least, most = (at.loc[find(at[f"{other}_ratio"])] for find in (pd.Series.idxmin, pd.Series.idxmax))
        lines.append(
            f"- At **{ratio:g}×** in {words[by]} the ratios in {words[other]} go from "
            f"{_of(least, other)} to {_of(most, other)}."
        )
    error = standard_error(rows["dense_test_accuracy"].mean(), int(rows["n"].iloc[0]))
    near = int((table["kept"].abs() < 2 * error).sum())
    lines.append(
        f"- {near} of {len(table)} rows lie within two standard errors ({2 * error:.1f} points) of the dense "
        "network's accuracy: this run does not tell them from it."
    )
    return "\n".join(lines)


def _of(row: pd.Series, unit: str) -> str:
    return f"{row[f'{unit}_ratio']:.2f} ({row['method']})"


def _praise(group: pd.DataFrame) -> str:
    top = group.sort_values(["test_accuracy", "seconds"], ascending=[False, True]).iloc[0]
    return (
        f"{top['method']} with {top['test_accuracy']:.1f} % "
        f"({top['kept']:+.1f} points, {top['seconds']:.0f} s)"
    )
