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


def differences(table: pd.DataFrame, by: str) -> str:
    """Iterative minus one-shot in words, per ratio and over all runs; columns as in `accuracy_and_time`."""
    then, end = "test_accuracy_recalibrated", "test_accuracy"
    pairs = table.pivot(index=["ratio", "seed"], columns="method", values=[then, end])
    gap = pairs.xs("iterative", axis=1, level=1) - pairs.xs("one-shot", axis=1, level=1)
    lines = [
        f"- **{ratio:g}×** ({by}): after the last decomposition the iteration stands "
        f"{rows[then].mean():+.1f} points from one-shot; after all fine-tuning it stands "
        f"{rows[end].mean():+.2f} points from it (seeds: {', '.join(f'{x:+.2f}' for x in rows[end])})."
        for ratio, rows in gap.groupby("ratio")
    ]
    counts = [f"{int((gap[when] > 0).sum())} of {len(gap)} runs {text}" for when, text in (
        (then, "after the last decomposition"), (end, "at the end"))]  # fmt: skip
    return "\n".join([*lines, f"\nThe iteration is ahead in {' and in '.join(counts)}."])


def descent(stages: Any, dense: float | None = None, one_shot: float | None = None) -> Figure:
    """Validation accuracy along one iterative run: a decomposition throws it down, fine-tuning lifts it.

    stages: the method's table "stages": val_before, val_after, ratio. one_shot: accuracy of decomposing
    at once at the final ranks, before fine-tuning.
    """
    frame = pd.DataFrame(stages).dropna(subset=["val_before", "val_after"])
    start = [] if dense is None else [{"place": 0.0, "accuracy": dense, "state": "dense"}]
    steps = [
        {"place": number + shift, "accuracy": getattr(row, column), "state": state}
        for number, row in enumerate(frame.itertuples(), 1)
        for shift, column, state in ((-0.12, "val_before", "decomposed"), (0.12, "val_after", "fine-tuned"))
    ]
    path = pd.DataFrame(start + steps)
    alone = [] if one_shot is None else [
        {"place": len(frame) - 0.12, "accuracy": one_shot, "state": "decomposed at once"}
    ]  # fmt: skip
    points = pd.concat([path, pd.DataFrame(alone)])
    tints = {"dense": style.GREY, "decomposed": style.ORANGE, "fine-tuned": style.colour("iterative"),
             "decomposed at once": style.colour("one-shot")}  # fmt: skip
    markers = {"dense": "o", "decomposed": "v", "fine-tuned": "^", "decomposed at once": "s"}
    fig, axes = canvas(size=(6.8, 3.2))
    ax = axes[0, 0]
    sns.lineplot(path, x="place", y="accuracy", color=style.colour("iterative"), lw=1.1, alpha=0.6, ax=ax)
    sns.scatterplot(points, x="place", y="accuracy", hue="state", style="state", palette=tints,
                    markers=markers, s=45, ax=ax)  # fmt: skip
    ax.set_xticks(range(1, len(frame) + 1), [f"{r:.2g}×" for r in frame["ratio"]],
                  rotation=0 if len(frame) < 12 else 90)  # fmt: skip
    ax.set(xlabel="ratio reached", ylabel="validation accuracy (%)")
    sns.move_legend(ax, "center left", bbox_to_anchor=(1, 0.5), title="", frameon=False)
    return fig
