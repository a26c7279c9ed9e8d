"""The figures of the chapter on shuffled kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from torch import Tensor

from tdbook import rstd_analysis, style, tables
from tdbook.figures.common import canvas, lines, plain_ticks, reference, spectrum
from tdlib.decompositions.linalg import singular_values

STEADY = {
    "range_over_ratios": "range over ratios (points)", "sd_of_range": "± over seeds", "worst": "worst (%)",
    "sd_over_seeds": "± at equal ratio (points)", "seeds": "n",
}  # fmt: skip


def _named(table: pd.DataFrame, column: str) -> dict[str, Any]:
    """Arguments of seaborn that colour the table by a column of arms."""
    frame = table.assign(**{column: table[column].map(style.label)})
    return {"data": frame, "hue": column, "palette": style.palette(frame[column])}


def over_ratios(table: pd.DataFrame, dense: Mapping[str, float]) -> Figure:
    """Against the ratio, points, mean and its 95 % interval: test accuracy, and training loss in the last
    epoch; at the right the range of the accuracy over the ratios.

    table: columns method, ratio, seed, test_accuracy (percent), train_loss (nats). dense: the last two of the
    dense network.
    """
    fig, axes = canvas(1, 3, (12, 3.4), width_ratios=[2, 2, 1.4])
    arms = _named(table, "method")
    headings = {"test_accuracy": "test accuracy (%)", "train_loss": "training loss, last epoch (nats)"}
    for ax, (column, heading) in zip(axes[0], headings.items(), strict=False):
        sns.lineplot(**arms, x="ratio", y=column, errorbar=("ci", 95), seed=0, ax=ax,
                     legend=column == "test_accuracy")  # fmt: skip
        sns.scatterplot(**arms, x="ratio", y=column, s=16, legend=False, ax=ax)
        reference(ax, dense[column])
        ax.set_xscale("log")
        plain_ticks(ax.xaxis)
        ax.set(xlabel="parameter ratio (dense / compressed)", ylabel=heading)
    axes[0, 0].legend(title="", fontsize="small")
    runs = table.groupby(["method", "seed"], sort=False)["test_accuracy"]
    spread = (runs.max() - runs.min()).rename("range").reset_index()
    right, tints = axes[0, 2], style.palette(spread["method"])
    sns.barplot(spread, x="range", y="method", hue="method", palette=tints, errorbar=None, ax=right)
    sns.stripplot(spread, x="range", y="method", color=style.BLACK, size=4, jitter=False, ax=right)
    right.set(ylabel="", xlabel="points", title="best − worst ratio, per seed")
    return fig


def rates(table: pd.DataFrame) -> str:
    """Of `rstd_training.choice`: validation accuracy (percent) and, in brackets, mean loss in the first epoch
    at every rate, a row per arm; the chosen rate in bold.
    """
    pairs = zip(table["val_accuracy"], table["first_loss"], table["chosen"], strict=True)
    cells = [f"**{a:.1f} ({b:.2f})**" if kept else f"{a:.1f} ({b:.2f})" for a, b, kept in pairs]
    named = table.assign(cell=cells, arm=table["method"].map(style.label))
    shown = named.pivot(index="arm", columns="lr", values="cell").rename(columns="lr {:g}".format)
    return tables.markdown(shown.loc[named["arm"].unique()].reset_index())


def steadiness(table: pd.DataFrame) -> pd.DataFrame:
    """`rstd_analysis.stability` with headings in words; a dash where one seed has no deviation."""
    shown = rstd_analysis.stability(table).rename(columns=STEADY).round(2).astype(object)
    return shown.where(shown.notna(), "–")


def shuffling(kernel: Tensor, shuffled: Tensor) -> Figure:
    """A kernel as the matrix O × I·K, the same with its entries permuted, and the singular values of both."""
    fig, axes = canvas(1, 3, (9.4, 2.7), width_ratios=[1.3, 1.3, 1])
    bound = float(kernel.abs().quantile(0.99)) if kernel.numel() < 10**6 else float(kernel.abs().max())
    pairs = {"trained kernel, O × I·K": kernel, "its entries shuffled": shuffled}
    for ax, (title, matrix) in zip(axes[0], pairs.items(), strict=False):
        sns.heatmap(matrix, vmin=-bound, vmax=bound, cmap="RdBu_r", cbar=False, xticklabels=False,
                    yticklabels=False, rasterized=True, ax=ax)  # fmt: skip
        ax.set_title(title)
    both = {"trained": kernel, "shuffled": shuffled}
    table = spectrum({name: singular_values(m) / m.norm() for name, m in both.items()}, "kernel")
    tints = {"trained": style.colour("folded"), "shuffled": style.colour("shuffled")}
    sns.lineplot(table, x="index", y="value", hue="kernel", palette=tints, ax=axes[0, 2])
    axes[0, 2].set(title="singular values / norm", ylabel="")
    axes[0, 2].set_ylim(bottom=0)
    axes[0, 2].legend(title="")
    return fig


def projection(errors: pd.DataFrame) -> Figure:
    """Relative error of projecting the trained kernels, per layer. errors: columns layer, variant, error."""
    fig, axes = canvas(1, 1, (6.4, 3))
    ax = axes[0, 0]
    sns.barplot(**_named(errors, "variant"), x="layer", y="error", errorbar=None, ax=ax)
    ax.tick_params(axis="x", rotation=0 if errors["layer"].nunique() < 6 else 90)
    ax.set(ylabel="‖W − P(W)‖ / ‖W‖", xlabel="", title="error of the projection", ylim=(0, 1.3))
    ax.legend(title="", fontsize="small", ncols=2, loc="upper center")
    return fig


def after_projection(table: pd.DataFrame, dense: float) -> Figure:
    """Accuracy of projected networks against the ratio: as they are, with BatchNorm re-estimated, and after
    one epoch of fine-tuning. table: of `experiment` with `epoch`.
    """
    headings = {
        "test_accuracy_before": "projected", "test_accuracy_recalibrated": "+ BatchNorm",
        "test_accuracy_epoch": "+ 1 epoch",
    }  # fmt: skip
    return lines(table, "ratio", headings, "method", dense=dense, share=True, height=2.8, aspect=1.0,
                 ylabel="test accuracy (%)", xlabel="parameter ratio")  # fmt: skip


def effective_ranks(ranked: pd.DataFrame) -> Figure:
    """Effective rank / full rank of every kernel's spatial and channel unfolding, a colour per network: a
    point per seed, the line through their means. ranked: columns network, seed, layer, spatial, channel.
    """
    fig, axes = canvas(1, 2, (9.4, 3), sharey=True)
    for ax, kind in zip(axes[0], ("spatial", "channel"), strict=True):
        same = {"x": "layer", "y": kind, "hue": "network", "ax": ax}
        sns.pointplot(ranked, errorbar=None, linewidth=1.2, markersize=0, legend=kind == "channel", **same)
        sns.stripplot(ranked, size=4, jitter=False, legend=False, **same)
        ax.set(xlabel="", title=f"{kind} unfolding", ylabel="effective rank / full rank")
        ax.tick_params(axis="x", rotation=0 if ranked["layer"].nunique() < 6 else 90)
    axes[0, 1].legend(title="", fontsize="small")
    return fig


def kernel_spectra(
    spectra: Mapping[str, Mapping[str, Mapping[str, Tensor]]], kind: str, layers: Sequence[str]
) -> Figure:
    """Singular values (norm 1) of the kernels of several networks, one panel per layer.

    spectra: network -> layer -> kind ("spatial" or "channel") -> values, as `kernel_spectra` gives them.
    """
    table = pd.concat(
        spectrum({layer: found[layer][kind] for layer in layers}, "layer").assign(network=network)
        for network, found in spectra.items()
    )
    fig = lines(table, "index", "value", "network", panels="layer", share=True, aspect=0.9, height=2.8,
                ylabel="singular value / norm")  # fmt: skip
    fig.axes[0].set_ylim(bottom=0)
    return fig
