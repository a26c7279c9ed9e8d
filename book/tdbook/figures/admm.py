"""The figures of the chapter on ADMM."""

from __future__ import annotations

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
    tidy["ratio"] = [f"{ratio:g}× {style.UNITS[by]}" for ratio in tidy["ratio"]]
    return lines(tidy, "stage", "accuracy", "method", panels="ratio", share=True, aspect=1.2, wrap=2,
                 dense=frame["dense_test_accuracy"].mean(), ylabel="test accuracy (%)")  # fmt: skip


def penalty_alone(table: pd.DataFrame) -> Figure:
    """W over ADMM's epochs by the penalty alone, a colour per pull; table: `admm_study.penalty_alone`."""
    fig, axes = canvas(size=(6.4, 3.2))
    ax = axes[0, 0]
    colours = sns.color_palette("viridis", table["pull"].nunique())
    for colour, (strength, rows) in zip(colours, table.groupby("pull"), strict=True):
        ax.plot(rows["epoch"], rows["theory"], color=colour, label=f"p = {strength:.2g}")
        ax.plot(rows["epoch"], rows["along"], "o", color=colour, ms=4)
    ax.axhline(0, color=style.BLACK, lw=0.8)
    ax.set(xlabel="epochs of the penalty alone", ylabel="(W − Z) / (W₀ − Z₀);  0: low rank", xlim=(0, None))
    ax.legend(title="pull of an epoch")
    return fig


def convergence(history: pd.DataFrame) -> Figure:
    """Distance ||W - P(W)|| / ||W|| from the low-rank set, and validation accuracy of W; a line per run."""
    shown = {"distance": "‖W − P(W)‖ / ‖W‖", "val_accuracy": "validation accuracy of W (%)"}
    headings = {column: heading for column, heading in shown.items() if column in history}
    plain, *pulled = sorted(history["run"].unique(), key=lambda run: not run.startswith("plain"))
    tints = sns.light_palette(style.colour("admm"), len(pulled) + 1)[1:]  # ADMM's colour, a shade per ratio
    palette = {plain: style.colour("dense"), **dict(zip(pulled, tints, strict=True))}
    fig = lines(history, "epoch", headings, "run", xlabel="epoch before the decomposition", palette=palette)
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
