"""The figures of the chapter on shuffled kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from torch import Tensor

from tdbook import rstd_analysis, style
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


def over_ratios(table: pd.DataFrame, dense: float | None = None) -> Figure:
    """Left: accuracy against ratio, points, mean and its 95 % interval; right: its range over the ratios.

    table: columns method, ratio, seed, test_accuracy (percent). dense: the dense network's accuracy.
    """
    fig, axes = canvas(1, 2, (8.8, 3.4), width_ratios=[2.2, 1])
    left, right = axes[0]
    arms = _named(table, "method")
    sns.lineplot(**arms, x="ratio", y="test_accuracy", errorbar=("ci", 95), seed=0, ax=left)
    sns.scatterplot(**arms, x="ratio", y="test_accuracy", s=16, legend=False, ax=left)
    if dense is not None:
        reference(left, dense)
    left.set_xscale("log")
    plain_ticks(left.xaxis)
    left.set(xlabel="parameter ratio (dense / compressed)", ylabel="test accuracy (%)")
    left.legend(title="", fontsize="small")
    runs = table.groupby(["method", "seed"], sort=False)["test_accuracy"]
    spread = (runs.max() - runs.min()).rename("range").reset_index()
    tints = style.palette(spread["method"])
    sns.barplot(spread, x="method", y="range", hue="method", palette=tints, errorbar=None, ax=right)
    sns.stripplot(spread, x="method", y="range", color=style.BLACK, size=4, jitter=False, ax=right)
    right.set(xlabel="", ylabel="points", title="best − worst ratio, per seed")
    return fig


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


def projection(errors: pd.DataFrame, accuracy: pd.DataFrame, dense: float) -> Figure:
    """Left: relative error of projecting the trained kernels, per layer; right: accuracy without fine-tuning.

    errors: columns layer, variant, error. accuracy: columns method, ratio, test_accuracy (percent).
    """
    fig, axes = canvas(1, 2, (9.4, 3.2))
    left, right = axes[0]
    sns.barplot(**_named(errors, "variant"), x="layer", y="error", errorbar=None, ax=left)
    left.tick_params(axis="x", rotation=0 if errors["layer"].nunique() < 6 else 90)
    left.set(ylabel="‖W − P(W)‖ / ‖W‖", xlabel="", title="error of the projection", ylim=(0, 1.3))
    left.legend(title="", fontsize="small", ncols=2, loc="upper center")
    sns.lineplot(**_named(accuracy, "method"), x="ratio", y="test_accuracy", marker="o", errorbar=None,
                 legend=False, ax=right)  # fmt: skip
    reference(right, dense)
    right.set(xlabel="parameter ratio", ylabel="test accuracy (%)", title="without fine-tuning")
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
