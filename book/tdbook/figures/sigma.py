"""The figures of the chapter on distribution-aware decomposition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from torch import Tensor

from tdbook import style
from tdbook.figures.common import closed, lines, plain_ticks, reference, spectrum


def against_ratio(rows: Any, dense: float | None = None, x: str = "ratio", xlabel: str = "ratio") -> Figure:
    """Accuracy and KL divergence against the ratio, a line per variant, a row of panels per format."""
    frame = pd.DataFrame(rows)
    frame["kl"] = frame["kl"].clip(lower=1e-5)
    headings = {"test_accuracy": "accuracy (%)", "kl": "KL from the dense outputs"}
    fig = lines(frame, x, headings, "method", rows="format", xlabel=xlabel, aspect=1.3)
    for accuracy, kl in zip(fig.axes[::2], fig.axes[1::2], strict=True):
        kl.set_yscale("log")
        plain_ticks(kl.yaxis)
        if dense is not None:
            reference(accuracy, dense)
    return fig


def drops(rows: Any, dense: float) -> Figure:
    """Harm of compressing single layers against the error of the kernel (left) and of the output (right)."""
    frame = pd.DataFrame(rows)
    frame = frame.assign(lost=dense - frame["test_accuracy"], method=frame["method"].map(style.label))
    headings = {
        "frobenius_error": "relative error of the kernel", "sigma_error": "relative error of the output (Σ)",
    }  # fmt: skip
    tidy = frame.melt(["method", "lost"], list(headings), "norm", "error").replace({"norm": headings})
    grid = sns.relplot(
        tidy, x="error", y="lost", hue="method", style="method", col="norm", kind="scatter", s=45, height=3.3,
        aspect=1.2, palette=style.palette(tidy["method"]), facet_kws={"sharex": False},
    )  # fmt: skip
    grid.set_titles("{col_name}").set_axis_labels("relative error", "accuracy lost (points)")
    grid.legend.set_title("")
    return closed(grid.figure)


def rank_correlation(rows: Any) -> pd.DataFrame:
    """Spearman's correlation of each error with the KL divergence that it causes, over layers and ranks."""
    names = {"frobenius_error": "kernel error", "sigma_error": "output error (Σ)"}
    ranks = pd.DataFrame(rows)[[*names, "kl"]].rank()
    return ranks.corr()["kl"].drop("kl").rename(names).to_frame("rank correlation with the KL divergence")


def eigenvalues(spectra: Mapping[str, Tensor]) -> Figure:
    """Eigenvalues of Σ over their sum, and the share of the inputs' energy outside the leading directions."""
    table = spectrum(spectra, "layer")
    by_layer = table.groupby("layer")
    table["place"] = table["index"] / by_layer["index"].transform("max")
    table["left"] = (1 - by_layer["value"].cumsum()).clip(lower=1e-6)
    table["value"] = table["value"].clip(lower=1e-10)
    headings = {"value": "eigenvalue / sum", "left": "energy left out"}
    return lines(table, "place", headings, "layer", logy=True, xlabel="directions / size of Σ")


def descent(traces: Mapping[str, Sequence[float]]) -> Figure:
    """Relative output error after every sweep of the alternating least squares."""
    table = spectrum({name: np.sqrt(trace) for name, trace in traces.items()}, "solver")
    table["sweep"] = table["index"] - 1
    return lines(table, "sweep", "value", "solver", logy=True, ylabel="relative error of the output")


def ranks(tables: Mapping[str, Mapping[str, Sequence[int]]], bounds: Mapping[str, Sequence[int]]) -> Figure:
    """Ranks per layer as fractions of the channels, a line per plan; a dense layer is at 1."""

    def kept(table: Mapping[str, Sequence[int]], layer: str, k: int) -> float:
        return table[layer][k] / bounds[layer][k] if layer in table else 1.0

    rows = [
        {"layer": layer, "plan": name, "side": side, "kept": kept(table, layer, k)}
        for name, table in tables.items()
        for layer in bounds
        for k, side in enumerate(("output rank", "input rank"))
    ]
    fig = lines(rows, "layer", "kept", "plan", panels="side", share=True, ylabel="rank / channels")
    for ax in fig.axes:
        ax.tick_params(axis="x", rotation=90)
        ax.set_ylim(0, 1.05)
    return fig


def sampling(rows: Any) -> Figure:
    """Relative error of Σ against the number of random positions per image."""
    return lines(rows, "positions", "error", "layer", logx=True, logy=True, xlabel="positions per image",
                 ylabel="relative error of Σ")  # fmt: skip


def record_table(rows: Any) -> pd.DataFrame:
    """Accuracy and agreement in percent and KL divergence, each over the ratios; a dash where nothing ran."""
    shown = {
        "test_accuracy": ("accuracy (%)", "{:.1f}"),
        "agreement": ("agreement (%)", "{:.1f}"),
        "kl": ("KL", "{:.2f}"),
    }
    parts = {}
    for column, (name, digits) in shown.items():
        wide = pd.DataFrame(rows).pivot_table(index="method", columns="ratio", values=column, sort=False)
        wide = wide.sort_index(axis=1).rename(columns=lambda ratio: f"{ratio:g}×")
        parts[name] = wide.map(lambda value, digits=digits: "–" if pd.isna(value) else digits.format(value))
    table = pd.concat(parts, axis=1)
    table.columns.names, table.index.name = [None, None], None
    return table
