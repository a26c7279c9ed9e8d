"""Figures of the distribution-aware chapter. Each takes tables and returns a Figure; see `tdlib.plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from tdlib.plots import COLOURS, CYCLE, draw_lines, new, styled

NAMES = {
    "frobenius": "kernel error (Frobenius)", "sigma": "output error (Σ)", "global": "+ ranks by harm",
    "sequential": "+ in sequence", "bias": "+ bias correction", "batchnorm": "in sequence + BatchNorm",
    "transfer": "Σ of other images",
}  # fmt: skip


def named(rows: Any) -> pd.DataFrame:
    """The rows with the variants' names as the text writes them."""
    frame = pd.DataFrame(rows)
    return frame.assign(method=frame["method"].map(lambda m: NAMES.get(m, m)))


def against_ratio(rows: Any, dense: float | None = None, x: str = "ratio", xlabel: str = "ratio") -> Figure:
    """Accuracy and KL divergence against the ratio, a line per variant, a row of panels per format."""
    frame = named(rows)
    formats = list(dict.fromkeys(frame["format"]))
    fig, axes = new(len(formats), 2, size=(10.4, 3.2 * len(formats)))
    with styled():
        for panels, name in zip(axes, formats, strict=True):
            part = frame[frame["format"] == name]
            draw_lines(panels[0], part, x, "test_accuracy", "method")
            draw_lines(panels[1], part.assign(kl=part["kl"].clip(lower=1e-5)), x, "kl", "method")
            if dense is not None:
                panels[0].axhline(dense, color=COLOURS["dense"], ls="--", lw=1.2, label="dense")
            panels[0].set(xlabel=xlabel, ylabel="accuracy (%)", title=name)
            panels[1].set(xlabel=xlabel, ylabel="KL from the dense outputs", yscale="log", title=name)
            lines = panels[0].get_legend_handles_labels()
            panels[1].legend(*lines, loc="center left", bbox_to_anchor=(1.02, 0.5))
    return fig


def drops(rows: Any, dense: float) -> Figure:
    """Harm of compressing single layers against the error of the kernel (left) and of the output (right)."""
    frame = pd.DataFrame(rows)
    fig, axes = new(1, 2, size=(9.2, 3.4), sharey=True)
    panels = (
        ("frobenius_error", "relative error of the kernel"),
        ("sigma_error", "relative error of the output (Σ)"),
    )
    with styled():
        for ax, (column, label) in zip(axes[0], panels, strict=True):
            for k, (method, marker) in enumerate((("frobenius", "o"), ("sigma", "^"))):
                part = frame[frame["method"] == method]
                drop = dense - part["test_accuracy"]
                ax.scatter(part[column], drop, marker=marker, s=26, color=CYCLE[k], label=NAMES[method])
            ax.set(xlabel=label)
        axes[0][0].set_ylabel("accuracy lost (points)")
        axes[0][1].legend()
    return fig


def rank_correlation(rows: Any) -> pd.DataFrame:
    """Spearman's rank correlation of each error with the KL divergence that it causes, over all layers and
    ranks.
    """
    frame = pd.DataFrame(rows)
    ranks = frame[["frobenius_error", "sigma_error", "kl"]].rank()
    found = (
        ranks.corr()["kl"]
        .drop("kl")
        .rename({"frobenius_error": "kernel error", "sigma_error": "output error (Σ)"})
    )
    return found.to_frame("rank correlation with the KL divergence")


def eigenvalues(spectra: Mapping[str, Tensor]) -> Figure:
    """Left: eigenvalues of Σ over their sum. Right: the share of the inputs' energy outside the leading
    directions.
    """
    fig, axes = new(1, 2, size=(9.2, 3.4))
    tints = np.linspace(0.15, 0.9, max(2, len(spectra)))
    with styled():
        for (name, values), tint in zip(spectra.items(), tints, strict=False):
            v = values.numpy()
            at = np.arange(1, len(v) + 1) / len(v)
            colour = (0.1, 0.25 + 0.6 * tint, 0.75 - 0.5 * tint)
            axes[0][0].plot(at, np.maximum(v, 1e-10), color=colour, label=name)
            axes[0][1].plot(at, np.maximum(1 - np.cumsum(v), 1e-6), color=colour, label=name)
        axes[0][0].set(yscale="log", xlabel="index / size of Σ", ylabel="eigenvalue / sum")
        axes[0][1].set(yscale="log", xlabel="directions kept / size of Σ", ylabel="energy left out")
        if len(spectra) <= 10:
            axes[0][0].legend()
    return fig


def descent(traces: Mapping[str, Sequence[float]]) -> Figure:
    """Relative output error after every sweep of the alternating least squares."""
    fig, axes = new(size=(5.2, 3.1))
    ax = axes[0][0]
    with styled():
        for k, (name, trace) in enumerate(traces.items()):
            ax.plot(range(len(trace)), np.sqrt(trace), color=CYCLE[k % len(CYCLE)], marker="o", label=name)
        ax.set(xlabel="sweep", ylabel="relative error of the output", yscale="log")
        ax.legend()
    return fig


def ranks(tables: Mapping[str, Mapping[str, Sequence[int]]], bounds: Mapping[str, Sequence[int]]) -> Figure:
    """Output and input ranks per layer as fractions of the channels, one line per plan."""
    layers = list(bounds)
    fig, axes = new(1, 2, size=(9.2, 3.3), sharey=True)
    with styled():
        for side, ax in enumerate(axes[0]):
            for k, (name, table) in enumerate(tables.items()):
                kept = [
                    table[n][min(side, len(table[n]) - 1)] / bounds[n][min(side, len(bounds[n]) - 1)]
                    if n in table
                    else 1.0
                    for n in layers
                ]
                ax.plot(
                    range(len(layers)),
                    kept,
                    marker="o",
                    color=CYCLE[k % len(CYCLE)],
                    label=NAMES.get(name, name),
                )
            ax.set_xticks(range(len(layers)), layers, rotation=90, fontsize=7)
            ax.set_title(("output rank", "input rank")[side])
        axes[0][0].set(ylabel="rank / channels", ylim=(0, 1.05))
        axes[0][1].legend()
    return fig


def sampling(rows: Any) -> Figure:
    """Relative error of Σ against the number of random positions per image."""
    fig, axes = new(size=(5.2, 3.1))
    with styled():
        draw_lines(axes[0][0], rows, "positions", "error", "layer")
        axes[0][0].set(xscale="log", yscale="log", xlabel="positions per image", ylabel="relative error of Σ")
        axes[0][0].legend()
    return fig


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
