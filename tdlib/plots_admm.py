"""The figures of the ADMM-TT chapter: tables and tensors in, one matplotlib Figure out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from .plots import COLOURS, colour, draw_lines, label, new, styled
from .tensor.linalg import singular_values


def convergence(history: pd.DataFrame, by: str = "run") -> Figure:
    """Distance ||W - P(W)|| / ||W|| from the low-rank set, and validation accuracy of W; a line per run."""
    fig, axes = new(1, 2, size=(8.4, 3.2))
    with styled():
        for ax, column, name in zip(
            axes[0], ("distance", "val_accuracy"),
            ("‖W − P(W)‖ / ‖W‖", "validation accuracy of W (%)"), strict=True,
        ):  # fmt: skip
            draw_lines(ax, history, "epoch", column, by)
            ax.set(xlabel="epoch of the ADMM stage", ylabel=name)
        axes[0][0].set_ylim(bottom=0)
        axes[0][1].legend()
    return fig


def layer_gaps(history: Sequence[Mapping[str, Any]]) -> Figure:
    """||W - Z|| / ||W|| of every layer over the epochs, from the rows of one history."""
    frame = pd.DataFrame(history)
    columns = [column for column in frame.columns if column.startswith("gap:")]
    fig, axes = new(size=(5.4, 3.2))
    ax = axes[0][0]
    many = len(columns) > 8
    with styled():
        for position, column in enumerate(columns):
            ax.plot(frame["epoch"], frame[column], color=colour(column, position), lw=1.0 if many else 1.7,
                    marker="" if many else "o", label=column.removeprefix("gap:"))  # fmt: skip
        ax.plot(frame["epoch"], frame["gap"], color="black", lw=2.2, label="all layers")
        ax.set(xlabel="epoch", ylabel="‖W − Z‖ / ‖W‖")
        ax.set_ylim(bottom=0)
        ax.legend(ncols=1 if not many else 3, fontsize=8 if not many else 6)
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
    names = list(tt_unfoldings(next(iter(kernels.values()))))
    fig, axes = new(1, len(names), size=(4.2 * len(names), 3.2))
    with styled():
        for ax, unfolding, rank in zip(axes[0], names, ranks, strict=False):
            for position, (name, kernel) in enumerate(kernels.items()):
                s = singular_values(tt_unfoldings(kernel)[unfolding]).cpu().numpy()
                ax.plot(np.arange(1, len(s) + 1), np.maximum(s / s[0], 1e-6), color=colour(name, position),
                        label=label(name), marker="o" if len(s) <= 40 else "")  # fmt: skip
            ax.axvline(rank + 0.5, color="black", ls=":", lw=1.2, label=f"target rank {rank}")
            ax.set(yscale="log", xlabel="index", ylabel="singular value / largest")
            ax.set_title(f"{title}  {unfolding}".strip())
        axes[0][0].legend()
    return fig


def before_after(table: pd.DataFrame, dense: float) -> Figure:
    """Test accuracy against ratio, left right after the decomposition, right after fine-tuning; a line per
    method.

    table: columns ratio, method, before, after (percent; before may be missing). dense: accuracy of the dense
    network.
    """
    fig, axes = new(1, 2, size=(8.4, 3.3), sharex=True)
    with styled():
        for ax, column, heading in zip(
            axes[0], ("before", "after"), ("before fine-tuning", "after fine-tuning"), strict=True
        ):
            draw_lines(ax, table, "ratio", column, "method")
            ax.axhline(dense, color=COLOURS["dense"], ls="--", lw=1.2, label="dense")
            ax.set(xlabel="parameter ratio (dense / compressed)", ylabel="test accuracy (%)", title=heading)
        axes[0][1].legend()
    return fig


def beside_paper(records: pd.DataFrame, paper: pd.DataFrame) -> Figure:
    """Our records (mean and sd over seeds) and the paper's points; hollow points are figures nobody could
    check.

    records: columns method, ratio, accuracy. paper: a table of `tdlib.papers` with top1 and ratio.
    """
    fig, axes = new(size=(6.2, 3.6))
    ax = axes[0][0]
    with styled():
        for position, (name, group) in enumerate(records.groupby("method", sort=False)):
            stats = group.groupby("ratio")["accuracy"].agg(["mean", "std"]).fillna(0.0)
            ax.errorbar(stats.index, stats["mean"], stats["std"], color=colour(name, position), marker="o",
                        capsize=3, label=f"{label(name)} (here)")  # fmt: skip
        for position, (name, group) in enumerate(paper.groupby("method", sort=False)):
            sure = (group["top1_mark"] != "M") & (group["ratio_mark"] != "M")
            tint = colour({"ADMM-TT": "admm"}.get(str(name), str(name)), position + 2)
            for part, face in ((group[sure], tint), (group[~sure], "none")):
                if len(part):
                    doubt = "" if face != "none" else ", unverified"
                    ax.scatter(part["ratio"], part["top1"], marker="s", s=34, facecolors=face,
                               edgecolors=tint, label=f"{name} (reported{doubt})")  # fmt: skip
        ax.set(xlabel="parameter ratio (dense / compressed)", ylabel="test accuracy (%)")
        ax.legend(fontsize=7)
    return fig
