"""The figures of the RsTD chapter: tables and tensors in, one matplotlib Figure out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from .plots import COLOURS, CYCLE, label, new, styled

ARMS = {"shuffled": CYCLE[3], "kernel": CYCLE[0], "folded": CYCLE[2], "noise": "#999999"}
NAMES = {
    "shuffled": "shuffled, folded",
    "folded": "not shuffled, folded",
    "kernel": "not shuffled, O × I × k × k",
    "noise": "Gaussian noise, folded",
}


def _colour(name: str, position: int) -> str:
    return ARMS.get(name, CYCLE[position % len(CYCLE)])


def over_ratios(table: pd.DataFrame, dense: float | None = None, floor: float | None = None) -> Figure:
    """Left: accuracy against ratio, mean and sd over seeds, one point per run; right: its range over the
    ratios.

    table: columns arm, ratio, seed, accuracy (percent). dense: the dense network's accuracy; floor: chance.
    """
    fig, axes = new(1, 2, size=(8.8, 3.4), gridspec_kw={"width_ratios": [2.2, 1]})
    left, right = axes[0]
    with styled():
        for position, (arm, group) in enumerate(table.groupby("arm", sort=False)):
            tint, stats = _colour(str(arm), position), group.groupby("ratio")["accuracy"].agg(["mean", "std"])
            left.plot(stats.index, stats["mean"], color=tint, marker="o", label=NAMES.get(str(arm), str(arm)))
            spread = stats["std"].fillna(0.0)
            left.fill_between(
                stats.index, stats["mean"] - spread, stats["mean"] + spread, color=tint, alpha=0.18, lw=0
            )
            left.scatter(group["ratio"], group["accuracy"], color=tint, s=9, alpha=0.6)
            per_seed = group.groupby("seed")["accuracy"].agg(lambda a: a.max() - a.min())
            right.bar(position, per_seed.mean(), 0.65, color=tint, alpha=0.75)
            right.scatter([position] * len(per_seed), per_seed, color="black", s=10, zorder=3)
        if dense is not None:
            left.axhline(dense, color=COLOURS["dense"], ls="--", lw=1.2, label="dense")
        if floor is not None:
            left.axhline(floor, color=COLOURS["dense"], ls=":", lw=1.0, label="chance")
        left.set_xscale("log")
        ticks = sorted(set(table["ratio"]))
        left.set_xticks(ticks, [f"{t:g}" for t in ticks])
        left.minorticks_off()
        left.set(xlabel="parameter ratio (dense / compressed)", ylabel="test accuracy (%)")
        left.legend(fontsize=7.5)
        arms = list(dict.fromkeys(table["arm"]))
        right.set_xticks(range(len(arms)), arms)
        right.set(ylabel="points", title="best − worst ratio, per seed")
        right.grid(False, axis="x")
    return fig


def shuffling(kernel: Tensor, shuffled: Tensor) -> Figure:
    """A kernel as the matrix O × I·K before and after its entries are permuted, and the singular values of
    both.
    """
    from .tensor.linalg import singular_values

    fig, axes = new(1, 3, size=(9.4, 2.7), gridspec_kw={"width_ratios": [1.3, 1.3, 1]})
    bound = float(kernel.abs().quantile(0.99)) if kernel.numel() < 10**6 else float(kernel.abs().max())
    with styled():
        pairs = (
            ("trained kernel, O × I·K", "folded", kernel),
            ("its entries shuffled", "shuffled", shuffled),
        )
        for ax, (title, arm, matrix) in zip(axes[0][:2], pairs, strict=True):
            ax.imshow(matrix, vmin=-bound, vmax=bound, cmap="RdBu_r", aspect="auto", interpolation="nearest")
            ax.set(title=title, xticks=[], yticks=[])
            ax.grid(False)
            values = singular_values(matrix)
            axes[0][2].plot(np.arange(1, len(values) + 1), values / values.norm(), color=ARMS[arm],
                            label={"folded": "trained"}.get(arm, arm))  # fmt: skip
        axes[0][2].set(xlabel="index", title="singular values / norm")
        axes[0][2].set_ylim(bottom=0)
        axes[0][2].legend()
    return fig


def projection(errors: pd.DataFrame, accuracy: pd.DataFrame, dense: float) -> Figure:
    """Left: relative error of projecting the trained kernels, per layer; right: accuracy without fine-tuning.

    errors: columns layer, variant, error. accuracy: columns arm, ratio, accuracy (percent).
    """
    fig, axes = new(1, 2, size=(8.8, 3.2))
    left, right = axes[0]
    layers, variants = list(dict.fromkeys(errors["layer"])), list(dict.fromkeys(errors["variant"]))
    width = 0.8 / len(variants)
    with styled():
        for position, name in enumerate(variants):
            heights = errors[errors["variant"] == name].set_index("layer")["error"].reindex(layers)
            at = np.arange(len(layers)) + (position - (len(variants) - 1) / 2) * width
            left.bar(at, heights, width * 0.92, color=_colour(name, position), label=NAMES.get(name, name))
        left.set_xticks(range(len(layers)), layers, rotation=0 if len(layers) < 6 else 90, fontsize=7.5)
        left.set(ylabel="‖W − P(W)‖ / ‖W‖", title="error of the projection")
        left.grid(False, axis="x")
        left.set_ylim(0, 1.3)
        left.legend(fontsize=7, ncols=2, loc="upper center")
        for position, (arm, group) in enumerate(accuracy.groupby("arm", sort=False)):
            stats = group.groupby("ratio")["accuracy"].mean()
            right.plot(
                stats.index,
                stats,
                color=_colour(str(arm), position),
                marker="o",
                label=NAMES.get(str(arm), str(arm)),
            )
        right.axhline(dense, color=COLOURS["dense"], ls="--", lw=1.2, label="dense")
        right.set(xlabel="parameter ratio", ylabel="test accuracy (%)", title="without fine-tuning")
    return fig


def kernel_spectra(
    spectra: Mapping[str, Mapping[str, Mapping[str, Tensor]]], kind: str, layers: Sequence[str]
) -> Figure:
    """Singular values (norm 1) of the kernels of several networks, one panel per layer.

    spectra: network -> layer -> kind ("spatial" or "channel") -> values, as `rstd.kernel_spectra` gives them.
    """
    tints = {"images": CYCLE[0], "pixels shuffled": CYCLE[1], "before training": "#999999"}
    fig, axes = new(1, len(layers), size=(2.7 * len(layers) + 0.6, 2.8), sharey=True)
    with styled():
        for ax, layer in zip(axes[0], layers, strict=True):
            for position, (network, table) in enumerate(spectra.items()):
                values = table[layer][kind]
                ax.plot(np.arange(1, len(values) + 1), values, color=tints.get(network, CYCLE[position]),
                        marker="o" if len(values) <= 12 else "", label=label(network))  # fmt: skip
            ax.set(title=layer, xlabel="index")
        axes[0][0].set(ylabel="singular value / norm")
        axes[0][0].set_ylim(bottom=0)
        axes[0][-1].legend(fontsize=7.5)
    return fig
