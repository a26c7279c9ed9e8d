"""What the chapters' figures have in common: lines of tidy tables, spectra, empty axes for pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from tdbook import style


def lines(table: Any, x: str, y: str | Mapping[str, str], by: str | None = None, *, panels: str | None = None,
          rows: str | None = None, dense: float | None = None, share: bool = False, logx: bool = False,
          logy: bool = False, xlabel: str | None = None, ylabel: str = "", title: str | None = None,
          height: float = 3.1, aspect: float = 1.35, wrap: int | None = None,
          palette: Mapping[str, Any] | None = None) -> Figure:  # fmt: skip
    """Column ``y`` against ``x``: a line per ``by``, a panel per ``panels``, a row of panels per ``rows``.

    Rows of the table that share x (seeds) become their mean with its 95 % interval. Several columns, given as
    column -> heading, become a panel each. ``dense`` marks the dense network's value. ``share``: one y axis
    for all panels. ``wrap``: panels in a row, with the legend below them.
    ``palette``: the colours of the lines, where they are not those of `style`.
    """
    frame = pd.DataFrame(table)
    if isinstance(y, Mapping):
        kept = [column for column in (x, by, rows) if column]
        frame = frame.rename(columns=y).melt(kept, list(y.values()), "panel", "shown")
        panels, y = "panel", "shown"
    frame = frame.dropna(subset=[x, y])
    if by:
        frame = frame.assign(**{by: frame[by].map(style.label)})
    grid = sns.relplot(
        frame, x=x, y=y, hue=by, col=panels, row=rows, kind="line", height=height, aspect=aspect,
        palette=palette or (style.palette(frame[by]) if by else None), col_wrap=wrap,
        errorbar=("ci", 95), seed=0,
        marker="o" if frame[x].nunique() <= 40 else None, facet_kws={"sharey": share},
    )  # fmt: skip
    grid.set_titles("{row_name}  {col_name}" if rows else "{col_name}").set_axis_labels(xlabel or x, ylabel)
    if grid.legend:
        grid.legend.set_title("")
        if wrap:
            sns.move_legend(grid, "upper center", bbox_to_anchor=(0.5, 0), ncols=wrap, title="")
    for ax in grid.axes.flat:
        if dense is not None:
            reference(ax, dense)
        if logx:
            ax.set_xscale("log")
            plain_ticks(ax.xaxis)
        if logy:
            ax.set_yscale("log")
    if title:
        grid.axes.flat[0].set_title(title)
    grid.tight_layout()
    return closed(grid.figure)


def accuracy_against_ratio(table: Any, *, by: str = "method", y: str = "test_accuracy",
                           dense: float | None = None, title: str | None = None) -> Figure:  # fmt: skip
    """Test accuracy (%) against the achieved ratio (log axis): a line per method."""
    return lines(table, "ratio", y, by, dense=dense, logx=True, title=title, ylabel="test accuracy (%)",
                 xlabel="ratio (dense / compressed, BatchNorm left out)")  # fmt: skip


def spectrum(named: Mapping[Any, Any], name: str = "matrix") -> pd.DataFrame:
    """Series of numbers as a tidy table: columns `name`, index (from 1), value, share (value / largest)."""
    frames = []
    for key, series in named.items():
        values = np.asarray(series, dtype=float)
        frames.append(pd.DataFrame({name: key, "index": np.arange(1, len(values) + 1), "value": values,
                                    "share": values / values.max()}))  # fmt: skip
    return pd.concat(frames, ignore_index=True)


def spectra(values: Mapping[str, Any], title: str | None = None) -> Figure:
    """Singular values, each scaled by its largest, on a log axis."""
    table = spectrum(values)
    table["share"] = table["share"].clip(lower=1e-8)  # the rounding floor would stretch the axis over noise
    return lines(table, "index", "share", "matrix", logy=True, ylabel="singular value / largest", title=title)


def canvas(rows: int = 1, columns: int = 1, size: Sequence[float] | None = None, **options: Any,
           ) -> tuple[Figure, np.ndarray]:  # fmt: skip
    """An empty figure and its (rows, columns) axes, for what is no table; ``size`` in inches."""
    inches = size or (4.2 * columns, 3.0 * rows)
    fig, axes = plt.subplots(rows, columns, squeeze=False, figsize=inches, layout="constrained", **options)
    return closed(fig), axes


def closed(fig: Figure) -> Figure:
    """The figure, detached from pyplot, so that a notebook shows it once."""
    plt.close(fig)
    return fig


def reference(ax: Axes, value: float, text: str = "dense") -> None:
    """A dashed line across the axes with its name at the right end."""
    ax.axhline(value, color=style.colour("dense"), ls="--", lw=1.2)
    ax.annotate(text, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", size="small",
                color=style.colour("dense"))  # fmt: skip


def plain_ticks(axis: Any) -> None:
    """Round numbers written out on a log axis."""
    low, high = axis.get_view_interval()
    spans = {12: (1.0, 1.5, 2.0, 3.0, 4.0, 6.0), 200: (1.0, 2.0, 5.0)}
    steps = next((steps for span, steps in spans.items() if high < span * low), (1.0,))
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
