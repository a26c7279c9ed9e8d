"""The book's figures: small programs that take numbers or tables and return a matplotlib Figure.

A chapter holds one call per figure; the drawing is here, in one style. No function computes a result
and none shows or saves: put the returned Figure last in a cell, or call ``fig.savefig``.

Tables are pandas frames (or lists of dicts). ``line_chart`` covers most needs; colours are fixed
per format and per method (``colour``), so that a reader meets the same colour in every chapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

#: Okabe and Ito's colours, distinguishable with any colour vision; grey is kept for the dense network.
CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#8C6D31")
COLOURS = {
    "dense": "#555555", "tt": CYCLE[0], "tucker2": CYCLE[1], "cp": CYCLE[2], "cp4": CYCLE[4],
    "tr": CYCLE[3], "svd": CYCLE[5], "tt-matrix": CYCLE[6],
    "direct": CYCLE[5], "scratch": CYCLE[4], "admm": CYCLE[0], "iterative": CYCLE[2], "rstd": CYCLE[3],
    "distribution_aware": CYCLE[1], "one-shot": CYCLE[5],
}
#: Names as the text writes them.
LABELS = {
    "dense": "dense", "tt": "TT", "tucker2": "Tucker-2", "cp": "CP", "cp4": "CP4", "tr": "TR", "svd": "SVD",
    "tt-matrix": "TT-matrix", "direct": "direct", "scratch": "from scratch", "admm": "ADMM",
    "iterative": "iterative", "rstd": "RsTD", "distribution_aware": "distribution-aware",
}
STYLE: dict[str, Any] = {
    "figure.dpi": 130, "savefig.dpi": 130, "figure.constrained_layout.use": True,
    "font.size": 9.5, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.labelsize": 9.5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "#e3e3e3", "grid.linewidth": 0.7, "lines.linewidth": 1.7, "lines.markersize": 4.5,
    "legend.frameon": False, "legend.fontsize": 8.5, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
    "axes.prop_cycle": cycler(color=CYCLE), "image.cmap": "RdBu_r", "image.interpolation": "nearest",
}


def styled() -> AbstractContextManager[None]:
    """The book's matplotlib settings as a context manager."""
    return mpl.rc_context(STYLE)  # type: ignore[arg-type, unused-ignore]


def colour(name: object, position: int = 0) -> str:
    """Fixed colour of a format or method; of anything else the ``position``-th of the cycle."""
    return COLOURS.get(str(name).lower(), CYCLE[position % len(CYCLE)])


def label(name: object) -> str:
    """A format's or method's name as the text writes it; anything else unchanged."""
    return LABELS.get(str(name).lower(), str(name))


def new(rows: int = 1, columns: int = 1, *, size: tuple[float, float] | None = None, **options: Any,
        ) -> tuple[Figure, np.ndarray]:
    """An empty figure in the book's style, detached from pyplot so that a notebook shows it once.

    Returns the Figure and a (rows, columns) array of Axes; ``size`` in inches, default 4.2 x 3 per panel.
    """
    inches = size or (4.2 * columns, 3.0 * rows)
    with styled():
        fig, axes = plt.subplots(rows, columns, squeeze=False, figsize=inches, **options)
    plt.close(fig)
    return fig, axes


def _plain_log_ticks(axis: Any) -> None:
    low, high = axis.get_view_interval()
    subs = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0) if high < 12 * low else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(base=10, subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_minor_formatter(NullFormatter())


def draw_lines(ax: Axes, table: Any, x: str, y: str, by: str | None = None, *, band: bool = True,
               marker: str = "o", styles: Mapping[str, str] | None = None) -> None:
    """Lines of column ``y`` against ``x`` on ``ax``, one per value of ``by``.

    Rows that share x (seeds, say) become their mean with a band of one standard deviation.
    ``styles`` maps a value of ``by`` to a matplotlib line style.
    """
    frame = pd.DataFrame(table).dropna(subset=[x, y])
    groups: list[tuple[object, pd.DataFrame]] = (
        [(y, frame)] if by is None else [(k, g) for k, g in frame.groupby(by, sort=False)])
    for position, (name, group) in enumerate(groups):
        stats = group.groupby(x)[y].agg(["mean", "std", "count"])
        at = stats.index.to_numpy(dtype=float)
        tint = colour(name, position)
        ax.plot(at, stats["mean"], color=tint, marker=marker if len(at) <= 30 else "", label=label(name),
                linestyle=(styles or {}).get(str(name), "-"))
        if band and (stats["count"] > 1).any():
            spread = stats["std"].fillna(0.0)
            ax.fill_between(at, stats["mean"] - spread, stats["mean"] + spread, color=tint, alpha=0.18, lw=0)


def line_chart(table: Any, x: str, y: str | Sequence[str], by: str | None = None, *,
               xlabel: str | None = None, ylabel: str | Sequence[str] | None = None,
               title: str | Sequence[str] | None = None,
               logx: bool = False, logy: bool = False, band: bool = True, reference: float | None = None,
               reference_label: str = "dense", size: tuple[float, float] | None = None,
               styles: Mapping[str, str] | None = None) -> Figure:
    """One panel per column named in ``y``: lines against ``x``, one per value of ``by``.

    ``reference`` draws a dashed horizontal line (the dense network's value). Rows with the same x are
    averaged and shown with a band of one standard deviation.
    """
    columns = [y] if isinstance(y, str) else list(y)
    labels = [ylabel] * len(columns) if ylabel is None or isinstance(ylabel, str) else list(ylabel)
    titles = [title] * len(columns) if title is None or isinstance(title, str) else list(title)
    fig, axes = new(1, len(columns), size=size)
    with styled():
        for ax, column, name, heading in zip(axes[0], columns, labels, titles, strict=True):
            draw_lines(ax, table, x, column, by, band=band, styles=styles)
            if reference is not None:
                ax.axhline(reference, color=COLOURS["dense"], ls="--", lw=1.2, label=reference_label)
            if logx:
                ax.set_xscale("log")
                _plain_log_ticks(ax.xaxis)
            if logy:
                ax.set_yscale("log")
            ax.set_xlabel(xlabel or x)
            ax.set_ylabel(name or column)
            if heading:
                ax.set_title(heading)
        if by is not None or reference is not None:
            axes[0][-1].legend()
    return fig


def accuracy_against_ratio(table: Any, *, by: str = "method", x: str = "ratio", y: str = "accuracy",
                           dense: float | None = None, title: str | None = None) -> Figure:
    """Test accuracy (%) against the achieved ratio (log axis): a line per method, mean and sd over seeds."""
    return line_chart(table, x, y, by, xlabel="ratio (dense / compressed, BatchNorm left out)",
                      ylabel="test accuracy (%)", title=title, logx=True, reference=dense, size=(5.4, 3.4))


def training_curves(history: Any, *, by: str | None = None) -> Figure:
    """Training loss and validation accuracy over epochs, from ``History.to_frame()`` or several of them."""
    frame = pd.DataFrame(history)
    columns = [c for c in ("train_loss", "val_accuracy") if c in frame and frame[c].notna().any()]
    names = {"train_loss": "training loss", "val_accuracy": "validation accuracy (%)"}
    return line_chart(frame, "epoch", columns, by, ylabel=[names[c] for c in columns])


def spectra(values: Mapping[str, Any], *, title: str | None = None, xlabel: str = "index", marks:
            Mapping[str, int] | None = None) -> Figure:
    """Singular values, each scaled by its largest, on a log axis; ``marks`` gives a rank to mark per name."""
    fig, axes = new(size=(5.4, 3.2))
    ax = axes[0][0]
    with styled():
        for position, (name, series) in enumerate(values.items()):
            s = np.asarray(series, dtype=float)
            tint = colour(name, position)
            # Values at the rounding floor would stretch the axis over noise.
            ax.plot(np.arange(1, len(s) + 1), np.maximum(s / s.max(), 1e-8), color=tint, label=label(name),
                    marker="o" if len(s) <= 40 else "")
            if marks and name in marks:
                ax.axvline(marks[name] + 0.5, color=tint, ls=":", lw=1.2)
        ax.set(yscale="log", xlabel=xlabel, ylabel="singular value / largest")
        if title:
            ax.set_title(title)
        ax.legend()
    return fig


def bars(table: Any, category: str, value: str, by: str | None = None, *, ylabel: str | None = None,
         title: str | None = None, reference: float | None = None, horizontal: bool = False,
         size: tuple[float, float] | None = None) -> Figure:
    """Grouped bars of ``value`` per ``category``, side by side per ``by``; repeated rows are averaged."""
    frame = pd.DataFrame(table)
    keys = [value] if by is None else list(dict.fromkeys(frame[by]))
    names = list(dict.fromkeys(frame[category]))
    fig, axes = new(size=size or (max(4.2, 0.42 * len(names) * len(keys) + 1.5), 3.0))
    ax = axes[0][0]
    width = 0.8 / len(keys)
    with styled():
        for position, key in enumerate(keys):
            part = frame if by is None else frame[frame[by] == key]
            heights = part.groupby(category)[value].mean().reindex(names)
            at = np.arange(len(names)) + (position - (len(keys) - 1) / 2) * width
            draw = ax.barh if horizontal else ax.bar
            draw(at, heights, width * 0.92, color=colour(key, position), label=label(key))
        ticks, line = (ax.set_yticks, ax.axvline) if horizontal else (ax.set_xticks, ax.axhline)
        ticks(np.arange(len(names)), [label(n) for n in names])
        ax.grid(False, axis="y" if horizontal else "x")
        if horizontal:
            ax.invert_yaxis()
        (ax.set_xlabel if horizontal else ax.set_ylabel)(ylabel or value)
        if reference is not None:
            line(reference, color=COLOURS["dense"], ls="--", lw=1.2)
        if title:
            ax.set_title(title)
        if by is not None:  # above the axes: bars leave no free corner
            ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(keys), borderaxespad=0.1)
    return fig
