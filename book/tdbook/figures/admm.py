"""The figures of the chapter on ADMM."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tdbook import admm_study, style
from tdbook.figures.common import canvas, lines, reference, spectrum

#: Accuracies of a row in the order of the road, and what the figure calls them.
STAGES = {
    "start_test_accuracy": "dense", "uncut_test_accuracy": "W", "test_accuracy_before": "cut",
    "test_accuracy_recalibrated": "fresh\nBatchNorm", "test_accuracy_epoch": "one\nepoch",
    "test_accuracy": "end",
}  # fmt: skip


def stages(frame: pd.DataFrame, by: str) -> Figure:
    """Test accuracy along each road, a panel per ratio: the dense network, W trained and not yet cut, cut,
    with BatchNorm re-estimated, after one epoch of fine-tuning, at the end.

    frame: rows of `experiment`, methods as the text names them. A road that trains nothing before the cut
    goes on from the dense network, and one from scratch has only its end.
    """
    uncut = frame["uncut_test_accuracy"].fillna(frame["start_test_accuracy"])
    frame = frame.assign(uncut_test_accuracy=uncut)
    early = [name for name in STAGES if name != "test_accuracy"]
    frame.loc[frame["test_accuracy_before"].isna(), early] = None
    tidy = frame.rename(columns=STAGES).melt(["ratio", "method"], list(STAGES.values()), "stage", "accuracy")
    tidy["ratio"] = [f"{ratio:g}× ({by})" for ratio in tidy["ratio"]]
    return lines(tidy, "stage", "accuracy", "method", panels="ratio", share=True, aspect=1.2,
                 dense=frame["dense_test_accuracy"].mean(), ylabel="test accuracy (%)")  # fmt: skip


def first_epoch(table: pd.DataFrame) -> Figure:
    """W after ADMM's first epoch by the penalty alone, against the pull; table: `admm_study.first_epoch`."""
    fig, axes = canvas(size=(5.4, 3.2))
    ax = axes[0, 0]
    sns.lineplot(table, x="pull", y="theory", color=style.GREY, label="2 exp(−p) − 1", ax=ax)
    ax.plot(table["pull"], table["along"], "o", color=style.BLUE, label="steps of the library")
    places = ((1, "W₀", "bottom"), (0, "Z₀, in the low-rank set", "bottom"),
              (-1, "2Z₀ − W₀, the penalty's target", "top"))  # fmt: skip
    for height, text, side in places:
        ax.axhline(height, color=style.BLACK, lw=0.8, ls=":" if height else "-")
        ax.annotate(text, (1, height), xycoords=("axes fraction", "data"), ha="right", va=side, size="small")
    for strength, text, side in ((0.39, "the authors' ", "right"), (math.log(2), " ln 2", "left")):
        ax.axvline(strength, color=style.RED, lw=1, ls="--")
        ax.annotate(text, (strength, -0.8), color=style.RED, ha=side, size="small")
    ax.set(xlabel="pull p of the epoch", ylabel="(W − Z) in units of (W₀ − Z₀)", ylim=(-1.25, 1.25),
           xlim=(-0.5, None))  # fmt: skip
    ax.legend(loc="upper right", bbox_to_anchor=(1, 0.9))
    return fig


def convergence(history: pd.DataFrame) -> Figure:
    """Distance ||W - P(W)|| / ||W|| from the low-rank set, and validation accuracy of W; a line per run."""
    shown = {"distance": "‖W − P(W)‖ / ‖W‖", "val_accuracy": "validation accuracy of W (%)"}
    headings = {column: heading for column, heading in shown.items() if column in history}
    fig = lines(history, "epoch", headings, "run", xlabel="epoch before the decomposition")
    fig.axes[0].set_ylim(bottom=0)
    return fig


def layer_gaps(history: pd.DataFrame) -> Figure:
    """||W - Z|| / ||W|| of every layer over the epochs of ADMM."""
    frame = history.rename(columns={"gap": "gap:all layers"})
    gaps = frame.filter(like="gap:").rename(columns=lambda name: name.removeprefix("gap:"))
    tidy = gaps.assign(epoch=frame["epoch"]).melt("epoch", var_name="layer", value_name="gap")
    fig = lines(tidy, "epoch", "gap", "layer", ylabel="‖W − Z‖ / ‖W‖")
    fig.axes[0].set_ylim(bottom=0)
    return fig


def unfolding_spectra(spectra: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Singular values of the TT unfoldings, a line per method; the target rank is dotted.

    spectra: method -> rows of `admm_study.spectra`, of the same layer.
    """
    table = pd.concat(
        spectrum({f"{row['layer']}  {row['unfolding']}": row["values"]}, "unfolding").assign(method=method)
        for method, rows in spectra.items()
        for row in rows
    )
    table["share"] = table["share"].clip(lower=1e-6)
    fig = lines(table, "index", "share", "method", panels="unfolding", logy=True,
                ylabel="singular value / largest")  # fmt: skip
    for ax, row in zip(fig.axes, next(iter(spectra.values())), strict=True):
        if row["rank"] is not None:
            ax.axvline(row["rank"] + 0.5, color=style.BLACK, ls=":", lw=1.2)
            ax.annotate(f" target rank {row['rank']}", (row["rank"] + 0.5, 0.95),
                        xycoords=("data", "axes fraction"), size="small")  # fmt: skip
    return fig


def beside_paper(records: pd.DataFrame, paper: pd.DataFrame) -> Figure:
    """Our records (mean and its 95 % interval) and the paper's points, hollow where nobody could check.

    records: those of one experiment. paper: a table of `tdbook.papers` with network, method, top1 and ratio.
    """
    fig, axes = canvas(size=(6.2, 3.6))
    ax = axes[0, 0]
    ours = records.assign(method=records["method"] + " (here)")
    tints = {f"{name} (here)": tint for name, tint in style.palette(records["method"]).items()}
    sns.lineplot(ours, x="ratio", y="test_accuracy", hue="method", palette=tints, marker="o", seed=0, ax=ax,
                 err_style="bars", errorbar=("ci", 95))  # fmt: skip
    reference(ax, records["dense_test_accuracy"].mean(), "dense (here)")
    network = paper["network"].str.replace("-", "").str.lower()
    paper = paper[(network == records["model"].iloc[0]) & (paper["method"] != "dense")]
    tints = style.palette(paper["method"])
    sure = (paper["top1_mark"] != "M") & (paper["ratio_mark"] != "M")
    for (method, checked), part in paper.groupby(["method", sure], sort=False):
        ax.scatter(part["ratio"], part["top1"], marker="s", s=34, edgecolors=tints[method],
                   facecolors=tints[method] if checked else "none",
                   label=f"{method} (reported{'' if checked else ', unverified'})")  # fmt: skip
    ax.set(xlabel="parameter ratio (dense / compressed)", ylabel="test accuracy (%)")
    ax.set_title(_title(records))
    ax.legend(fontsize="small")
    return fig


def learning(records: pd.DataFrame) -> Figure:
    """Validation accuracy over the epochs of fine-tuning, a line per method and ratio of one experiment."""
    fig = lines(admm_study.learning(records["path"]), "epoch", "accuracy", "run", title=_title(records),
                xlabel="epoch of fine-tuning", ylabel="validation accuracy (%)")  # fmt: skip
    fig.axes[0].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return fig


def _title(records: pd.DataFrame) -> str:
    return ", ".join(records.iloc[0][admm_study.EXPERIMENT])
