"""The figures of the chapter on distribution-aware decomposition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import Tensor

from tdbook import style
from tdbook.figures.common import canvas, closed, lines, plain_ticks, reference, spectrum
from tdbook.tables import accuracy
from tdlib.decompositions.sigma import sigma_error, svd_sigma


def against_ratio(frame: pd.DataFrame, by: str) -> Figure:
    """Accuracy as is, accuracy with BatchNorm re-estimated and KL divergence against the ratio in `by`, a
    line per method, a row of panels per format."""
    headings = {
        "test_accuracy": accuracy(frame), "test_accuracy_recalibrated": "BatchNorm re-estimated (%)",
        "kl": "KL from the dense outputs",
    }  # fmt: skip
    shown = frame.assign(kl=frame["kl"].clip(lower=1e-5), format=frame["format"].map(style.label))
    fig = lines(shown, "ratio", headings, "method", rows="format", xlabel=f"ratio ({by})", aspect=1.15)
    for as_is, fresh, kl in zip(fig.axes[::3], fig.axes[1::3], fig.axes[2::3], strict=True):
        kl.set_yscale("log")
        plain_ticks(kl.yaxis)
        low, high = zip(as_is.get_ylim(), fresh.get_ylim(), strict=True)
        for ax in (as_is, fresh):
            reference(ax, frame["dense_test_accuracy"].mean())
            ax.set_ylim(min(low), max(high))
    fig.subplots_adjust(wspace=0.25)  # room for the labels of the log axis
    return fig


def drops(frame: pd.DataFrame, dense: float) -> Figure:
    """Harm of compressing single layers against the error of the kernel (left) and of the output (right)."""
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


ERRORS = {"frobenius_error": "of the kernel", "sigma_error": "of the output"}


def error_sizes(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean and largest of both relative errors of the rows of either method."""
    table = frame.groupby("method")[list(ERRORS)].agg(["mean", "max"])
    return table.rename(index=style.label, columns=ERRORS).rename_axis(index=None).round(2)


def eigenvalues(statistics: Mapping[str, Tensor]) -> Figure:
    """Eigenvalues of Σ over their sum, and the share of the inputs' energy outside the leading directions."""
    found = {name: torch.linalg.eigvalsh(sigma).flip(0).clamp_min(0) for name, sigma in statistics.items()}
    table = spectrum({name: values / values.sum() for name, values in found.items()}, "layer")
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


def ranks(plans: Mapping[str, Mapping[str, Any]], channels: Mapping[str, Sequence[int]]) -> Figure:
    """Ranks of Tucker-2 per layer as fractions of the channels, a line per plan; a dense layer is at 1.

    plans: name -> plan. channels: layer -> (output channels, input channels).
    """

    def kept(plan: Mapping[str, Any], layer: str, k: int) -> float:
        return plan[layer].ranks[-1 if k else 0] / channels[layer][k] if layer in plan else 1.0

    rows = [
        {"layer": layer, "plan": name, "side": side, "kept": kept(plan, layer, k)}
        for name, plan in plans.items()
        for layer in channels
        for k, side in enumerate(("output rank", "input rank"))
    ]
    fig = lines(rows, "layer", "kept", "plan", panels="side", share=True, ylabel="rank / channels")
    for ax in fig.axes:
        ax.tick_params(axis="x", rotation=90)
        ax.set_ylim(0, 1.05)
    return fig


def sampling(frame: pd.DataFrame) -> Figure:
    """Relative error of Σ against the number of random positions per image."""
    return lines(
        frame, "positions", "error", "layer", logx=True, logy=True, xlabel="positions per image",
        ylabel="relative error of Σ",
    )  # fmt: skip


def sizes(frame: pd.DataFrame) -> Figure:
    """Accuracy and KL divergence against the number of calibration images, with the 95 % interval over
    draws."""
    headings = {"test_accuracy": "accuracy (%)", "kl": "KL from the dense outputs"}
    return lines(frame, "images", headings, logx=True, xlabel="calibration images")


def drift(frame: pd.DataFrame) -> Figure:
    """Error of the layers' real outputs along the network, a line per method."""
    fig = lines(frame, "layer", "error", "method", ylabel="relative error of the output", aspect=2.2)
    fig.axes[0].tick_params(axis="x", rotation=90)
    return fig


def projection(seed: int = 0) -> Figure:
    """Six kernels of two inputs each, brought to rank 1 in both norms: where Σ is an ellipse, the projection
    onto the line is oblique."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(6, 2, generator=generator, dtype=torch.float64) @ torch.diag(
        torch.tensor([1.0, 0.8]).double()
    )
    sigma = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    angle = torch.linspace(0, 2 * torch.pi, 200, dtype=torch.float64)
    circle = torch.stack([angle.cos(), angle.sin()])
    fig, axes = canvas(1, 2, (7.6, 2.9), sharex=True, sharey=True)
    for ax, norm, S in zip(axes[0], ("kernel", "output (Σ)"), (torch.eye(2).double(), sigma), strict=True):
        A, B = svd_sigma(W, 1, S)
        cut = A @ B
        values, vectors = torch.linalg.eigh(S)
        unit = (vectors * values.rsqrt()) @ circle * 0.5
        ax.plot(*unit, color=style.GREY, lw=1)
        ends = torch.stack([-B[0], B[0]]) / B.norm() * 2.5
        ax.plot(*ends.T, color=style.BLACK, lw=1)
        for w, c in zip(W, cut, strict=True):
            ax.plot(*torch.stack([w, c]).T, color=style.RED, lw=1)
        ax.plot(*W.T, "o", color=style.BLUE)
        ax.plot(*cut.T, ".", color=style.RED)
        errors = f"kernel {float((W - cut).norm() / W.norm()):.2f}, output {sigma_error(W, cut, sigma):.2f}"
        ax.set(aspect="equal", title=f"error of the {norm} smallest\n{errors}", xlabel="first input")
    axes[0, 0].set_ylabel("second input")
    return fig
