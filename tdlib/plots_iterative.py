"""The figures of the chapter on iterative decomposition: tables in, one matplotlib Figure out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .plots import COLOURS, colour, draw_lines, new, styled


def rank_path(rows: Any, title: str | None = None) -> Figure:
    """Heat map layer × pass of the ranks, one panel per rank (output, input), coloured by rank / bound.

    rows: the report's "ranks": layer, pass, ranks, bounds, dense (such a layer's extent is in brackets).
    """
    frame = pd.DataFrame(rows).rename(columns={"pass": "number"})
    layers, passes = list(dict.fromkeys(frame["layer"])), sorted(set(frame["number"]))
    count = max(len(ranks) for ranks in frame["ranks"])
    names = ["output rank", "input rank"] if count == 2 else ["rank"]
    size = (1.6 + (0.52 * len(passes) + 0.8) * count, 1.1 + 0.27 * len(layers))
    fig, axes = new(1, count, size=(max(size[0], 3.4 * count), max(size[1], 1.9)), sharey=True)
    with styled():
        for k, ax in enumerate(axes[0]):
            share = np.full((len(layers), len(passes)), np.nan)
            for row in frame.itertuples():
                at = layers.index(row.layer), passes.index(row.number)
                j = min(k, len(row.ranks) - 1)
                share[at] = row.ranks[j] / row.bounds[j]
                text = f"({row.ranks[j]})" if row.dense else f"{row.ranks[j]}"
                ax.text(at[1], at[0], text, ha="center", va="center", fontsize=7.5,
                        color="white" if share[at] > 0.55 else "black")  # fmt: skip
            image = ax.imshow(share, vmin=0, vmax=1, cmap="Blues", aspect="auto", interpolation="nearest")
            ax.set_xticks(range(len(passes)), [str(p) for p in passes])
            ax.set_yticks(range(len(layers)), layers)
            ax.set(xlabel="pass", title=names[k])
            ax.grid(False)
        fig.colorbar(image, ax=list(axes[0]), label="rank / full rank", shrink=0.9)
        if title:
            fig.suptitle(title)
    return fig


def accuracy_and_time(table: pd.DataFrame, dense: float, unit: str = "MACs") -> Figure:
    """Left: test accuracy right after the last decomposition; middle: at the end; right: wall time; against
    the ratio.

    table: columns method, ratio (achieved), before, after (percent, before may be missing), seconds.
    """
    fig, axes = new(1, 3, size=(10.4, 3.2))
    with styled():
        panels = (
            ("before", "after the last decomposition"),
            ("after", "after all fine-tuning"),
            ("seconds", "wall time"),
        )
        for ax, (column, heading) in zip(axes[0], panels, strict=True):
            draw_lines(ax, table, "ratio", column, "method")
            if column != "seconds":
                ax.axhline(dense, color=COLOURS["dense"], ls="--", lw=1.2, label="dense")
            ax.set(xlabel=f"{unit} ratio (dense / compressed)", title=heading)
            ax.set(ylabel="seconds" if column == "seconds" else "test accuracy (%)")
        axes[0][2].set_ylim(bottom=0)
        axes[0][1].legend()
    return fig


def descent(stages: Any, dense: float | None = None, one_shot: float | None = None) -> Figure:
    """Validation accuracy along one iterative run: every decomposition throws it down, every fine-tuning
    lifts it.

    stages: the report's "stages": val_before, val_after, ratio. one_shot: accuracy of decomposing at once at
    the final ranks, before fine-tuning.
    """
    frame = pd.DataFrame(stages).dropna(subset=["val_before", "val_after"])
    fig, axes = new(size=(5.8, 3.2))
    ax = axes[0][0]
    with styled():
        x = np.repeat(np.arange(1, len(frame) + 1), 2) + np.tile([-0.12, 0.12], len(frame))
        y = frame[["val_before", "val_after"]].to_numpy().reshape(-1)
        if dense is not None:
            x, y = np.r_[0.12, x], np.r_[dense, y]
        ax.plot(x, y, color=colour("iterative"), lw=1.1, alpha=0.6)
        at = np.arange(1, len(frame) + 1)
        ax.scatter(
            at - 0.12, frame["val_before"], color=colour("iterative"), facecolors="none", label="decomposed"
        )
        ax.scatter(at + 0.12, frame["val_after"], color=colour("iterative"), label="fine-tuned")
        if one_shot is not None:
            mark = {"color": colour("one-shot"), "marker": "s", "facecolors": "none"}
            ax.scatter([len(frame) - 0.12], [one_shot], label="decomposed at once", **mark)
        ax.set_xticks(at, [f"{r:.2g}×" for r in frame["ratio"]], rotation=0 if len(at) < 12 else 90)
        ax.set(xlabel="ratio reached", ylabel="validation accuracy (%)")
        ax.legend()
    return fig
