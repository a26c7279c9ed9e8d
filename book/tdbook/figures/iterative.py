"""The figures of the chapter on iterative decomposition."""

from __future__ import annotations

from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from tdbook import style
from tdbook.figures.common import canvas, lines, reference


def rank_path(rows: Any, title: str) -> Figure:
    """Heat map layer × pass of the ranks, one panel per rank (output, input), coloured by rank / bound.

    rows: the method's table "ranks": layer, pass, ranks, bounds, dense (such a layer's extent is in
    brackets).
    """
    frame = pd.DataFrame(rows)
    count = frame["ranks"].map(len).max()
    layers, passes = frame["layer"].unique(), frame["pass"].nunique()
    size = (max(1.6 + (0.52 * passes + 0.8) * count, 3.4 * count), max(1.1 + 0.27 * len(layers), 1.9))
    fig, axes = canvas(1, count, size, sharey=True)
    for k, ax in enumerate(axes[0]):
        pick = [min(k, len(ranks) - 1) for ranks in frame["ranks"]]
        rank = pd.Series([row[i] for row, i in zip(frame["ranks"], pick, strict=True)])
        bound = pd.Series([row[i] for row, i in zip(frame["bounds"], pick, strict=True)])
        text = rank.astype(str).where(~frame["dense"].astype(bool), "(" + rank.astype(str) + ")")
        cells = frame.assign(share=rank / bound, text=text).pivot(index="layer", columns="pass").loc[layers]
        sns.heatmap(cells["share"], annot=cells["text"], fmt="", cmap="Blues", vmin=0, vmax=1, ax=ax,
                    cbar=ax is axes[0][-1], cbar_kws={"label": "rank / full rank"})  # fmt: skip
        ax.set(title=("output rank", "input rank")[k] if count == 2 else "rank", ylabel="")
        ax.tick_params(axis="y", rotation=0)
    fig.suptitle(title)
    return fig


def accuracy_and_time(table: pd.DataFrame, dense: float, unit: str = "MACs") -> Figure:
    """Test accuracy right after the last decomposition, BatchNorm re-estimated, and at the end, and wall
    time; against the ratio.

    table: columns method, ratio (the target), test_accuracy_recalibrated, test_accuracy (percent), seconds.
    """
    headings = {
        "test_accuracy_recalibrated": "test accuracy, decomposed + BatchNorm (%)",
        "test_accuracy": "test accuracy, at the end (%)",
        "seconds": "wall time (seconds)",
    }
    fig = lines(table, "ratio", headings, "method", xlabel=f"{unit} ratio (dense / compressed)", aspect=1.1)
    for ax in fig.axes[:2]:
        reference(ax, dense)
    fig.axes[2].set_ylim(bottom=0)
    return fig


def roads(table: pd.DataFrame, dense: float | None = None) -> Figure:
    """Validation accuracy over the epochs of fine-tuning, a line per road; triangles mark decompositions.

    table: rows of `iterative_study.road`, of several methods. dense: the dense network's accuracy.
    """
    tints = style.palette(table["method"])
    fig, axes = canvas(size=(6.8, 3.2))
    ax = axes[0, 0]
    same = {"x": "epochs", "y": "accuracy", "hue": "method", "palette": tints, "ax": ax}
    sns.lineplot(table, estimator=None, sort=False, **same)
    sns.scatterplot(table[table["state"] == "decomposed"], marker="v", s=55, legend=False, zorder=3, **same)
    if dense is not None:
        reference(ax, dense)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set(xlabel="epochs of fine-tuning so far", ylabel="validation accuracy (%)")
    sns.move_legend(ax, "center left", bbox_to_anchor=(1, 0.5), title="", frameon=False)
    return fig
