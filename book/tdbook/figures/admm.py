"""The figures of the chapter on ADMM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from torch import Tensor

from tdbook import style
from tdbook.figures.common import canvas, lines, spectrum
from tdlib.tensor.linalg import singular_values


def convergence(history: pd.DataFrame, by: str = "run") -> Figure:
    """Distance ||W - P(W)|| / ||W|| from the low-rank set, and validation accuracy of W; a line per run."""
    headings = {"distance": "‖W − P(W)‖ / ‖W‖", "val_accuracy": "validation accuracy of W (%)"}
    fig = lines(history, "epoch", headings, by, xlabel="epoch of the ADMM stage")
    fig.axes[0].set_ylim(bottom=0)
    return fig


def layer_gaps(history: Sequence[Mapping[str, Any]]) -> Figure:
    """||W - Z|| / ||W|| of every layer over the epochs, from the rows of one history."""
    frame = pd.DataFrame(history).rename(columns={"gap": "gap:all layers"})
    gaps = frame.filter(like="gap:").rename(columns=lambda name: name.removeprefix("gap:"))
    tidy = gaps.assign(epoch=frame["epoch"]).melt("epoch", var_name="layer", value_name="gap")
    fig = lines(tidy, "epoch", "gap", "layer", ylabel="‖W − Z‖ / ‖W‖")
    fig.axes[0].set_ylim(bottom=0)
    return fig


def tt_unfoldings(kernel: Tensor) -> dict[str, Tensor]:
    """The matrices whose ranks are the TT-ranks: O × KI and OK × I of a kernel (O, K, I); O × I if linear."""
    if kernel.dim() == 2:
        return {"O × I": kernel.detach().float()}
    o, i = kernel.shape[:2]
    ordered = kernel.detach().float().reshape(o, i, -1).transpose(1, 2)  # (O, K, I)
    return {"O × K·I": ordered.reshape(o, -1), "O·K × I": ordered.reshape(-1, i)}


def unfolding_spectra(kernels: Mapping[str, Tensor], ranks: Sequence[int], title: str = "") -> Figure:
    """Singular values of the TT unfoldings, a line per kernel (direct, admm); the target rank is dotted."""
    tables = []
    for name, kernel in kernels.items():
        values = {key: singular_values(matrix).cpu() for key, matrix in tt_unfoldings(kernel).items()}
        tables.append(spectrum(values, "unfolding").assign(method=name))
    table = pd.concat(tables)
    table["unfolding"] = f"{title}  " + table["unfolding"]
    table["share"] = table["share"].clip(lower=1e-6)
    fig = lines(table, "index", "share", "method", panels="unfolding", logy=True,
                ylabel="singular value / largest")  # fmt: skip
    for ax, rank in zip(fig.axes, ranks, strict=False):
        ax.axvline(rank + 0.5, color=style.BLACK, ls=":", lw=1.2)
        ax.annotate(f" target rank {rank}", (rank + 0.5, 0.95), xycoords=("data", "axes fraction"),
                    size="small")  # fmt: skip
    return fig


def before_after(table: pd.DataFrame, dense: float) -> Figure:
    """Test accuracy against ratio, right after the decomposition and after fine-tuning; a line per method.

    table: columns ratio, method, before, after (percent; before may be missing). dense: accuracy of the dense
    network.
    """
    headings = {"before": "before fine-tuning", "after": "after fine-tuning"}
    return lines(table, "ratio", headings, "method", dense=dense, ylabel="test accuracy (%)",
                 xlabel="parameter ratio (dense / compressed)")  # fmt: skip


def beside_paper(records: pd.DataFrame, paper: pd.DataFrame) -> Figure:
    """Our records (mean and its 95 % interval) and the paper's points, hollow where nobody could check.

    records: columns method, ratio, accuracy. paper: a table of `tdbook.papers` with top1 and ratio.
    """
    fig, axes = canvas(size=(6.2, 3.6))
    ax = axes[0, 0]
    tints = {f"{style.label(name)} (here)": tint for name, tint in style.palette(records["method"]).items()}
    ours = records.assign(method=records["method"].map(style.label) + " (here)")
    sns.lineplot(ours, x="ratio", y="accuracy", hue="method", palette=tints, marker="o", err_style="bars",
                 errorbar=("ci", 95), seed=0, ax=ax)  # fmt: skip
    tints = style.palette(paper["method"])
    sure = (paper["top1_mark"] != "M") & (paper["ratio_mark"] != "M")
    for (method, checked), part in paper.groupby(["method", sure], sort=False):
        ax.scatter(part["ratio"], part["top1"], marker="s", s=34, edgecolors=tints[method],
                   facecolors=tints[method] if checked else "none",
                   label=f"{method} (reported{'' if checked else ', unverified'})")  # fmt: skip
    ax.set(xlabel="parameter ratio (dense / compressed)", ylabel="test accuracy (%)")
    ax.legend(fontsize="small")
    return fig
